"""Prompts to embeddings, as diffusers' Wan pipelines make them, by an encoder that is cut over the stages.

Legend: D the encoder's width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from cineline.core.config import TextEncoder
from cineline.core.request import Branch, WorkItem
from cineline.errors import CheckpointError, reason, shown
from cineline.families.pipeline_parallel import StagePart
from cineline.families.wan.constants import TEXT_TOKENS
from cineline.families.wan.recognise import SPIECE
from cineline.families.wan.shapes import Component
from cineline.families.wan.spec import WanSpec
from cineline.families.wan.spiece import lacking, write_tokenizer
from cineline.families.wan.state import WanState
from cineline.families.wan.vocabulary import check_numbers, check_special
from cineline.families.wan.weights import weights_of
from cineline.weights.sources import open_source

log = logging.getLogger(__name__)


class Tokenizer:
    """Prompts to token numbers.

    Args:
        home: its folder, or a text encoder's file that has it as ComfyUI's do.
        text: the config of the text encoder that it must belong to.

    Raises:
        CheckpointError: it cannot be loaded, or belongs to another text encoder.
    """

    def __init__(self, home: Path, text: Mapping[str, Any]) -> None:
        with unpacked(home) as folder:
            if (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file():
                _check_readers(home, "add a tokenizer.json")
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            except Exception as error:  # of files that are broken it raises anything
                raise CheckpointError(f"{shown(home)} cannot be loaded ({reason(error)}): download it again.") from None
        check_numbers(home, set(self._tokenizer.get_vocab().values()), text)
        check_special(home, "pad", self._tokenizer.pad_token_id, text)
        check_special(home, "eos", self._tokenizer.eos_token_id, text)

    def __call__(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Token numbers int64 [1, 512] of one prompt, and its mask: 1 up to its last token, 0 behind."""
        cleaned = prompt_clean(prompt)
        count = len(self._tokenizer(cleaned).input_ids)
        if count > TEXT_TOKENS:
            log.warning("A prompt of %d tokens is cut off after %d: %r...", count, TEXT_TOKENS, cleaned[:40])
        tokens = self._tokenizer(
            [cleaned],
            padding="max_length",
            max_length=TEXT_TOKENS,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return tokens.input_ids, tokens.attention_mask


@contextmanager
def unpacked(home: Path) -> Iterator[Path]:
    """The tokenizer's folder: where it is inside a text encoder's file, one that is made of it for the moment.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if not home.is_file():
        yield home
        return
    _check_readers(home, "put a folder 'tokenizer' with a tokenizer.json beside it")
    model = open_source(home).read(SPIECE)[0]
    with TemporaryDirectory(prefix="cineline-tokenizer-") as folder:
        try:
            write_tokenizer(model.numpy().tobytes(), Path(folder))
        except Exception as error:  # of bytes that are no model it raises anything
            raise CheckpointError(
                f"{shown(home)}: its tensor {shown(SPIECE)} is no SentencePiece model of UMT5's ({reason(error)}): "
                "download it again, or put the tokenizer into a folder 'tokenizer' beside it."
            ) from None
        yield Path(folder)


def _check_readers(home: Path, remedy: str) -> None:
    """Without them transformers takes the file for another kind, and asks for a library that would not help."""
    if missing := lacking():
        raise CheckpointError(
            f"{shown(home)} has a spiece.model and no tokenizer.json, which takes libraries that are not installed: "
            f'run pip install "cineline[spiece]" (it brings {" and ".join(missing)}), or {remedy}.'
        )


def config_of(component: Component) -> Any:
    """The text encoder's config, as transformers has it.

    Raises:
        CheckpointError: it takes none from what is there.
    """
    try:
        return UMT5Config.from_dict(dict(component.config))
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(
            f"{shown(component.path)}: the text encoder cannot be loaded ({reason(error)}): download it again."
        ) from None


class TextSlice:
    """Some layers of the UMT5 encoder, with no other weights than theirs.

    Args:
        component: the text encoder.
        layers: numbers of neighbours, maybe none.
        is_first, is_last: the embedding of tokens, and the norm behind the last layer, are here too.
        dtype, device: of the weights, and `home` where they are kept.

    Attributes:
        device: where it runs.
        bytes_read: of the weights, so far.
    """

    def __init__(
        self,
        component: Component,
        layers: range,
        is_first: bool,
        is_last: bool,
        dtype: torch.dtype,
        device: torch.device,
        home: TextEncoder = "resident",
    ) -> None:
        self._component = component
        self._layers = layers
        self._is_first, self._is_last = is_first, is_last
        self._dtype = dtype
        self.device = torch.device("cpu") if home == "cpu" else device
        self._reloads = home == "reload"
        self._stack: Any = None
        self.bytes_read = 0
        self._load()
        self.release()

    def run(self, states: Tensor, mask: Tensor) -> Tensor:
        """Its layers over hidden states [1, 512, D], or token numbers [1, 512] on the first slice; [1, 512, D].

        Behind the last layer what stands behind the prompt's last token is zero.
        """
        if self._stack is None:
            self._load()
        states, mask = states.to(self.device), mask.to(self.device)
        given = {"input_ids" if self._is_first else "inputs_embeds": states}
        made: Tensor = self._stack(attention_mask=mask, **given).last_hidden_state
        if self._is_last:
            made.masked_fill_(mask.unsqueeze(-1) == 0, 0)
        return made

    def release(self) -> None:
        """No prompt is left for now: free the weights where they are loaded anew for the next one."""
        if self._reloads:
            self._stack = None

    def _load(self) -> None:
        """Build the encoder and read this slice of it; transformers' own forward then runs what is left of it."""
        with torch.device("meta"):
            whole = UMT5EncoderModel(config_of(self._component))
        # The encoder has its own reference to the embedding; the outer one is not used in a forward.
        del whole.shared
        weights = weights_of(self._component)
        own, tied = "encoder.embed_tokens.weight", "shared.weight"
        aliases = {} if own in weights else {own: tied}
        weights.check_names({aliases.get(name, name) for name in whole.state_dict()}, ignored=["shared"])
        stack = whole.encoder
        stack.block = nn.ModuleList(stack.block[number] for number in self._layers)
        if not self._is_first:
            del stack.embed_tokens
        if not self._is_last:
            stack.final_layer_norm = nn.Identity()
        stored = {name: f"encoder.{self._stored_name(name)}" for name in stack.state_dict()}
        stored = {name: aliases.get(whole_name, whole_name) for name, whole_name in stored.items()}
        fp32 = UMT5EncoderModel._keep_in_fp32_modules if self._dtype == torch.float16 else ()  # as transformers does
        weights.load(stack, self._dtype, self.device, fp32, aliases=stored)
        self.bytes_read += weights.bytes_read
        self._stack = stack

    def _stored_name(self, name: str) -> str:
        """Layers are numbered from 0 here, and through the whole encoder there."""
        kind, _, rest = name.partition(".")
        if kind != "block":
            return name
        number, _, rest = rest.partition(".")
        return f"block.{self._layers[int(number)]}.{rest}"


class TextPart:
    """A rank's part of the text encoder, which is on the first rank of each stage; the head has the tokenizer, too.

    Attributes:
        bytes_read: of the weights.
    """

    def __init__(self, spec: WanSpec, part: StagePart) -> None:
        self._part = part
        dtype, home = getattr(torch, part.config.dtype), part.config.text_encoder
        self._tokenizer = (
            Tokenizer(spec.tokenizer_home, spec.text) if part.is_head and part.place.is_first_lane else None
        )
        self._slice = (
            TextSlice(
                spec.component("text_encoder"), part.cut.text, part.is_head, part.is_tail, dtype, part.device, home
            )
            if part.place.is_first_lane
            else None
        )
        self.bytes_read = self._slice.bytes_read if self._slice else 0

    def compute(self, state: WanState, item: WorkItem, starts: bool, ends: bool) -> None:
        """The prompt of the item's branch; behind the last layers it is an embedding."""
        assert self._slice is not None
        states, mask = self._tokens(state, item.branch) if starts else state.take_hidden()
        mask = mask.to(self._slice.device)  # once, for the slice and for those behind it
        states = self._slice.run(states, mask).to(self._part.device)
        if item.branch == [each for each in self._part.branches(state.job) if each in state.job.shape.texts][-1]:
            self._slice.release()
        state.hidden = (states,) if ends else (states, mask.to(self._part.device))

    def _tokens(self, state: WanState, branch: Branch) -> tuple[Tensor, Tensor]:
        assert self._tokenizer is not None
        return self._tokenizer(state.job.prompt if branch is Branch.COND else state.job.negative_prompt)
