"""A SentencePiece model as a folder that transformers reads a tokenizer from, with SentencePiece's own tokens.

transformers' `T5Tokenizer` takes number 2 for unknown and knows no bytes; UMT5's model has 3, and spells in bytes what
it does not know. So the backend is built as the model says, and of a class that leaves it so.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from tokenizers.processors import TemplateProcessing

READERS = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
"""Libraries that transformers reads a spiece.model with, and the module of each."""

TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""Of what is written."""

PAD, EOS = "<pad>", "</s>"
"""UMT5's pieces for them, which a model need not say."""

UNIGRAM = 1
"""A model's type (github.com/google/sentencepiece, src/sentencepiece_model.proto)."""


def lacking() -> list[str]:
    """The libraries that are needed and not installed."""
    return [library for library, module in READERS.items() if not _is_installed(module)]


def write_tokenizer(model: bytes, folder: Path) -> None:
    """A tokenizer.json and its config, with `EOS` behind each text.

    Only the texts of its own special pieces, such as "</s>", are read otherwise than by SentencePiece: as those.

    Raises:
        ValueError, LookupError: the bytes are no model of UMT5's. Exception: or of nobody's.
    """
    from transformers.convert_slow_tokenizer import SpmConverter, import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString(model)
    pieces = [piece.piece for piece in proto.pieces]
    end, unknown = pieces.index(EOS), pieces[proto.trainer_spec.unk_id]
    if proto.trainer_spec.model_type != UNIGRAM:
        raise ValueError("it is no unigram model")
    backend = SpmConverter.build_tokenizer_from_spm_proto(proto, [(one.piece, one.score) for one in proto.pieces])
    backend.post_processor = TemplateProcessing(single=["$A", EOS], special_tokens=[(EOS, end)])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": TOKENIZER_CLASS, "pad_token": PAD, "eos_token": EOS, "unk_token": unknown}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even what it is in
        return False
