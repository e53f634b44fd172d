"""A finished request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cineline.core.output import whole_file

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
    """

    latents: torch.Tensor
    frames: np.ndarray | None
    fps: int

    def save(self, path: str | Path) -> None:
        """Write the frames as H.264, yuv420p, or (.webp, .gif) as an endless animation; one alone as a picture, too
        (.png, .jpg). With "/" at its end the path is a folder's, of a PNG a frame.

        Raises:
            OutputError: there are no frames, or the file cannot be written.
        """
        from cineline.media.video import write_video

        write_video(self.frames, self.fps, Path(path), as_folder=str(path).endswith("/"))


def save_latents(latents: torch.Tensor, path: Path) -> None:
    """Write them as a .safetensors file, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    from safetensors.torch import save

    # The library's own writer has an error of its own for a full disk.
    with whole_file(path) as temporary:
        temporary.write_bytes(save({"latents": latents.contiguous()}))
