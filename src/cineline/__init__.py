"""Cineline: Wan 2.2 video over pipeline stages, several requests in flight, bit for bit."""

from cineline.config import ParallelConfig
from cineline.engine import Engine
from cineline.errors import (
    CheckpointError,
    CinelineError,
    EngineClosed,
    InvalidConfig,
    InvalidRequest,
    OutputError,
    RankFailed,
    RequestCancelled,
    ResultTimeout,
)
from cineline.handle import RequestHandle
from cineline.request import Video, VideoRequest

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CinelineError",
    "Engine",
    "EngineClosed",
    "InvalidConfig",
    "InvalidRequest",
    "OutputError",
    "ParallelConfig",
    "RankFailed",
    "RequestCancelled",
    "RequestHandle",
    "ResultTimeout",
    "Video",
    "VideoRequest",
    "__version__",
]
