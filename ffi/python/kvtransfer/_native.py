"""The shared library, opened at import, with the declarations of the header it was built with.

cffi in its ABI mode: no compiler, no CPython ABI, so one wheel serves every Python. It releases the GIL around every call.
`KVTRANSFER_LIBRARY` names another file, for development.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Callable

from cffi import FFI

from . import errors

_HERE = Path(__file__).resolve().parent
# The version of the header that this package was written against; the library must say the same.
ABI_VERSION = 1

ffi: Any = FFI()


def declarations(header: str) -> str:
    """The header as cffi reads it: without preprocessor lines, comments and the C++ linkage braces; numeric macros kept."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", header, flags=re.DOTALL)
    numbers = re.findall(r"^#define[ \t]+(\w+)[ \t]+(-?\d+)[ \t]*$", text, flags=re.MULTILINE)
    text = re.sub(r"^[ \t]*#[^\n]*(?:\\\n[^\n]*)*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"extern\s+\"C\"\s*\{", "", text)
    lines = text.splitlines()
    opened = sum(line.count("{") - line.count("}") for line in lines)
    while opened < 0 and lines:
        # The brace that closed `extern "C"`, now without its partner.
        at = max(place for place, line in enumerate(lines) if line.strip() == "}")
        del lines[at]
        opened += 1
    return "\n".join([*lines, *(f"#define {name} {value}" for name, value in numbers)])


def _file(name: str) -> Path:
    for folder in (_HERE, _HERE.parent.parent / "include"):
        if (folder / name).is_file():
            return folder / name
    raise ImportError(f"kvtransfer's {name} is missing beside {_HERE}: install the package anew")


def _open() -> Any:
    named = os.environ.get("KVTRANSFER_LIBRARY")
    path = Path(named) if named else next(iter(sorted((_HERE / "_library").glob("*.so"))), _HERE / "_library")
    try:
        opened = ffi.dlopen(str(path))
    except OSError as error:
        raise ImportError(f"kvtransfer's library cannot be opened: {error}") from error
    found = opened.kvt_abi_version()
    if found != ABI_VERSION:
        raise ImportError(f"{path} has ABI version {found}, this package needs {ABI_VERSION}: install matching versions of both")
    return opened


ffi.cdef(declarations(_file("kvtransfer.h").read_text()))
lib = _open()


def check(status: int) -> None:
    """Raises the exception of a status that is not OK, with the library's sentence for this thread's last call."""
    if status == 0:
        return
    text = ffi.string(lib.kvt_last_error()).decode("utf-8", "replace")
    raise errors.exception_for(status, text or status_text(status))


def status_text(status: int) -> str:
    """What a status means, in general."""
    return str(ffi.string(lib.kvt_status_text(status)).decode())


def taken(call: Callable[[Any], int]) -> str:
    """A text that the library gives away: read, and given back. Raises what `call` failed with."""
    place = ffi.new("char **")
    check(call(place))
    return owned_text(place[0])


def owned_text(text: Any) -> str:
    """Reads a text of the library's and gives it back; empty for NULL."""
    if text == ffi.NULL:
        return ""
    try:
        return str(ffi.string(text).decode("utf-8", "replace"))
    finally:
        lib.kvt_text_free(text)


def version() -> str:
    """The library's version."""
    return str(ffi.string(lib.kvt_version()).decode())
