"""Which SGLang releases this backend was tested with, and the refusal for the others.

SGLang gives plug-ins no stable interface: the classes a backend must bring are duck-typed and change between releases. So
outside of the tested releases the backend does not register itself (the command line then rejects its name) unless told to.
"""

from __future__ import annotations

import re

# The releases that the suite in ffi/python/tests has passed with. Those between them have not been tried.
TESTED = ((0, 5, 17), (0, 5, 22), (0, 5, 23))


def parse(version: str) -> tuple[int, int, int]:
    """The first three numbers of a version; `0.5.12.post1` counts as 0.5.12."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if numbers is None:
        raise ValueError(f"{version!r} is no SGLang version")
    major, minor, patch = (int(number) for number in numbers.groups())
    return (major, minor, patch)


def refusal(version: str) -> str | None:
    """Why the backend does not register itself in that release; `None` where it was tested."""
    if parse(version) in TESTED:
        return None
    tested = ", ".join(".".join(str(number) for number in release) for release in TESTED)
    return (
        f"kvtransfer was tested with SGLang {tested}; this is {version}: the backend stays unregistered. "
        "Set KVTRANSFER_UNTESTED_SGLANG=1 to try it anyway, or install a tested release."
    )
