"""Which one an engine is of several that stand side by side (no torch)."""

from __future__ import annotations

import os
from typing import NamedTuple

from cineline.errors import InvalidConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"


class Replica(NamedTuple):
    """Its number among the engines of one model that one process has, and how many these are.

    The numbers of its requests are `number`, `number + of`, and so on, so that no two engines have the same.
    """

    number: int = 0
    of: int = 1

    def devices(self, ranks: int, device: str) -> dict[str, str]:
        """What the ranks' environment says where engines share this machine's accelerators out.

        Raises:
            InvalidConfig: there is not one for each rank of each engine.
        """
        if self.of == 1 or device != "cuda":
            return {}
        import torch

        given = os.environ.get(VISIBLE)
        named = [str(each) for each in range(torch.cuda.device_count())] if given is None else given.split(",")
        if len(named) < self.of * ranks:
            raise InvalidConfig(
                f"replicas={self.of} of {ranks} ranks need {self.of * ranks} accelerators, and here are {len(named)}: "
                "use fewer replicas or stages."
            )
        return {VISIBLE: ",".join(named[self.number * ranks : (self.number + 1) * ranks])}


ALONE = Replica()
"""The only one."""
