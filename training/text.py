"""The tokenizer and the text encoder's shape: word by word, because the captions have few words."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from training.clips import vocabulary

SPECIAL = ("<pad>", "</s>", "<unk>")
DIM = 64


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Lower case, signs apart from words, `</s>` at the end; a word that is not known is `<unk>`.

    Full stops are left out: the vocabulary has one, but no caption.
    """
    words = {word: number for number, word in enumerate([*SPECIAL, *vocabulary()])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(".", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


def make_text_encoder(vocabulary_size: int) -> UMT5EncoderModel:
    """An untrained encoder; it is trained with the transformer."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary_size, d_model=DIM, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0
        )
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str], length: int) -> dict[str, Tensor]:
    """Token ids and mask, both [B, length]."""
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    return dict(tokenizer(list(captions), **options))
