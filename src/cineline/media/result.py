"""A finished request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cineline.core.output import whole_file
from cineline.media.about import TENSORS_KEY

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Video:
    """A finished request.

    Attributes:
        latents: float32 [C, F', H', W'], before decoding (C channels, F' latent frames).
        frames: uint8 [F, H, W, 3], or None when the request stopped at the latents.
        fps: frames a second.
        describe: what made it, as JSON (see `engine.about`).
    """

    latents: torch.Tensor
    frames: np.ndarray | None
    fps: int
    describe: Callable[[], str] | None = field(default=None, repr=False, compare=False)

    def save(self, path: str | Path, metadata: bool = True) -> None:
        """Write the frames as H.264, yuv420p, or (.webp, .gif) as an endless animation; one alone as a picture, too
        (.png, .jpg). With "/" at its end the path is a folder's, of a PNG a frame.

        Args:
            metadata: whether the file says what made it (`cineline show`).

        Raises:
            OutputError: there are no frames, or the file cannot be written.
        """
        from cineline.media.video import write_video

        about = self.describe() if metadata and self.describe else None
        write_video(self.frames, self.fps, Path(path), str(path).endswith("/"), about)


def save_latents(latents: torch.Tensor, path: Path, about: str | None = None) -> None:
    """Write them as a .safetensors file, whole or not at all, with what it says of itself.

    Raises:
        OutputError: the file cannot be written.
    """
    from safetensors.torch import save

    metadata = None if about is None else {TENSORS_KEY: about}
    # The library's own writer has an error of its own for a full disk.
    with whole_file(path) as temporary:
        temporary.write_bytes(save({"latents": latents.contiguous()}, metadata))
