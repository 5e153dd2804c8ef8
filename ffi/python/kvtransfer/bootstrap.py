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
        port = ffi.new("uint16_t *")
        check(lib.kvt_bootstrap_new(text, len(text), place, port))
        self._handle: Any = ffi.gc(place[0], lib.kvt_bootstrap_free)
        self.port = int(port[0])
        """Where it listens; the one that the system picked, if port 0 was asked for."""

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


def call(request: Mapping[str, Any]) -> dict[str, Any]:
    """Makes one request to a registry, ours or SGLang's own, and waits for the answer without the GIL.

    `request` is as `kvt_bootstrap_call` in the header says: `address`, `call`, and what the call needs.
    """
    text = json.dumps(dict(request)).encode()
    return dict(json.loads(taken(lambda place: lib.kvt_bootstrap_call(text, len(text), place, ffi.NULL)) or "{}"))
