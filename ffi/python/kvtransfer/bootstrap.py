"""An SGLang-compatible bootstrap registry, served by the library's own threads."""

from __future__ import annotations

import json
from typing import Any, Mapping

from ._native import check, ffi, lib, taken


class BootstrapServer:
    """Runs from construction to `close` or the end of the `with` block.

    `config` is the library's, by field name; `{"listen": "0.0.0.0:8998"}` is a usual one. Raises `HostError` if the address
    cannot be listened on.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        text = json.dumps(dict(config)).encode()
        place = ffi.new("kvt_bootstrap_t **")
        check(lib.kvt_bootstrap_new(text, len(text), place))
        self._handle: Any = ffi.gc(place[0], lib.kvt_bootstrap_free)
        self.address = taken(lambda out: lib.kvt_bootstrap_address(self._handle, out, ffi.NULL))
        """Where it listens, "host:port"."""

    def __enter__(self) -> BootstrapServer:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends it. A second call does nothing."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        ffi.release(handle)
