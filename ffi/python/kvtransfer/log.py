"""The library's log lines, in Python's `logging` under the name `kvtransfer`.

The library calls back from its own threads, which then wait for the GIL; so only warnings and errors are forwarded unless a
lower level is asked for, and none after the interpreter began to end.
"""

from __future__ import annotations

import atexit
import logging
from typing import Any

from ._native import check, ffi, lib

logger = logging.getLogger("kvtransfer")

# Python's level for each of the library's (KVT_LOG_ERROR first).
_LEVELS = {1: logging.ERROR, 2: logging.WARNING, 3: logging.INFO, 4: logging.DEBUG, 5: logging.DEBUG}
# Keeps the C callable alive for as long as the library may call it.
_sink: Any = None


def forward(level: int = logging.WARNING) -> None:
    """Forwards the library's lines of `level` and above to the `kvtransfer` logger. Default: warnings and errors."""
    global _sink
    wanted = max(number for number, python in _LEVELS.items() if python >= level)
    sink = ffi.callback("void(int32_t, const char *, size_t, const char *, size_t, void *)", _take)
    check(lib.kvt_log(wanted, sink, ffi.NULL))
    if _sink is None:
        atexit.register(silence)
    _sink = sink


def silence() -> None:
    """Stops forwarding. Called at exit: a library thread must not meet an interpreter that is gone."""
    lib.kvt_log(1, ffi.NULL, ffi.NULL)


def _take(level: int, target: Any, target_length: int, text: Any, length: int, _user_data: Any) -> None:
    part = ffi.unpack(target, target_length).decode("utf-8", "replace")
    line = ffi.unpack(text, length).decode("utf-8", "replace")
    logger.log(_LEVELS.get(level, logging.INFO), "%s: %s", part, line)
