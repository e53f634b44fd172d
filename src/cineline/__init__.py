"""Cineline: Wan 2.2 video over pipeline stages, several requests in flight, bit for bit."""

from cineline.core.config import ModelFiles, ParallelConfig
from cineline.core.request import VideoRequest
from cineline.engine.api import Engine
from cineline.engine.handle import RequestHandle
from cineline.errors import (
    CheckpointError,
    CinelineError,
    EngineClosed,
    InvalidConfig,
    InvalidRequest,
    NotFinite,
    OutOfMemory,
    OutputError,
    RankFailed,
    RequestCancelled,
    RequestTimedOut,
    ResultTimeout,
    WrongProcess,
)
from cineline.media.result import Video

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CinelineError",
    "Engine",
    "EngineClosed",
    "InvalidConfig",
    "InvalidRequest",
    "ModelFiles",
    "NotFinite",
    "OutOfMemory",
    "OutputError",
    "ParallelConfig",
    "RankFailed",
    "RequestCancelled",
    "RequestHandle",
    "RequestTimedOut",
    "ResultTimeout",
    "Video",
    "VideoRequest",
    "WrongProcess",
    "__version__",
]
