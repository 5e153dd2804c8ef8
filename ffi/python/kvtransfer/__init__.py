"""KV-cache transfer between prefill and decode workers: the Python face of libkvtransfer.

Imports without CUDA, RDMA, torch or numpy. `Engine` holds a rank's memory and peers, `Transfer` is one request's part of it,
`BootstrapServer` an SGLang-compatible registry; `kvtransfer.sglang` is the backend for SGLang.
"""

from ._native import version
from .bootstrap import BootstrapServer
from .engine import Engine, PollSet, Source
from .errors import (
    DuplicateRoomError,
    HostError,
    KvtError,
    LibraryPanicError,
    MisuseError,
    PeerError,
    ShutDownError,
    TransferError,
    UnknownPeerError,
)
from .layout import Component, Entry, Kind, Layout, Memory, Slice
from .transfer import Outcome, State, Transfer

__version__ = version()

__all__ = [
    "BootstrapServer", "Component", "DuplicateRoomError", "Engine", "Entry", "HostError", "Kind", "KvtError", "Layout",
    "LibraryPanicError", "Memory", "MisuseError", "Outcome", "PeerError", "PollSet", "ShutDownError", "Slice", "Source", "State",
    "Transfer", "TransferError", "UnknownPeerError",
]  # fmt: skip
