"""What every cost is made of: numbers of weights, and work by the kind of operation."""

from __future__ import annotations

from dataclasses import dataclass

from cineline.core.config import Dtype

ITEMSIZE: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights.

    Attributes:
        cast: those that take the component's dtype.
        kept: those that stay float32 whatever that is.
    """

    cast: int = 0
    kept: int = 0

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.cast + other.cast, self.kept + other.kept)

    def __mul__(self, times: int) -> Parameters:
        return Parameters(self.cast * times, self.kept * times)

    @property
    def count(self) -> int:
        return self.cast + self.kept

    def nbytes(self, dtype: Dtype) -> int:
        """Bytes of them where the component has that dtype."""
        return self.cast * ITEMSIZE[dtype] + self.kept * ITEMSIZE["float32"]


@dataclass(frozen=True)
class Work:
    """What a unit computes; devices do these kinds at different rates.

    Attributes:
        linear, attention, convolution: FLOP, 2 a multiplication with its addition.
        moved: bytes that element-wise operations read and write.
        calls: units called, each of which costs some time by itself.
    """

    linear: float = 0.0
    attention: float = 0.0
    convolution: float = 0.0
    moved: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.linear + other.linear,
            self.attention + other.attention,
            self.convolution + other.convolution,
            self.moved + other.moved,
            self.calls + other.calls,
        )

    def __mul__(self, times: float) -> Work:
        return Work(
            self.linear * times,
            self.attention * times,
            self.convolution * times,
            self.moved * times,
            self.calls * times,
        )

    @property
    def flop(self) -> float:
        return self.linear + self.attention + self.convolution
