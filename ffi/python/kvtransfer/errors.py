"""What calls of this package raise: one exception per blame, each with the library's code and its own sentence.

The numbers are those of `kvtransfer.h` and are never given another meaning: 1xx a wrong call, 2xx this host, 3xx the peer,
4xx the transfer, 9xx the library's end.
"""

from __future__ import annotations


class KvtError(Exception):
    """Anything that the library refused or lost. `str()` is the library's sentence."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        """The status, as in `kvtransfer.h`."""
        self.text = text
        """The sentence, with the fix in it where there is one."""


class MisuseError(KvtError):
    """The call itself was wrong (1xx): another call, or another moment, would do."""


class DuplicateRoomError(MisuseError):
    """The room number is live on this engine."""


class UnknownPeerError(MisuseError):
    """The peer is not connected any more; connect again."""


class HostError(KvtError):
    """This host cannot do it (2xx): an address in use, memory that cannot be registered, no device."""


class PeerError(KvtError):
    """The other side cannot be reached, refused, or does not fit (3xx)."""


class TransferError(KvtError):
    """A transfer ended without success (4xx)."""


class ShutDownError(KvtError):
    """The engine was shut down (900)."""


class LibraryPanicError(KvtError):
    """A bug in the library (901). The handle it happened on is of no more use; please report the sentence."""


# Codes that callers tell apart from the others of their range.
DUPLICATE_ROOM = 104
UNKNOWN_PEER = 106
ENDED = 107
NOT_READY = 108
BAD_ITEMS = 109
PEER_FAILED = 303
PEER_LOST = 304
UNREACHABLE = 300
CANCELLED = 400
TIMEOUT = 401
WOULD_WAIT = 403
SHUTDOWN = 900
PANIC = 901


def exception_for(code: int, text: str) -> KvtError:
    """The exception of a status: the narrowest class that fits it."""
    exact: dict[int, type[KvtError]] = {
        DUPLICATE_ROOM: DuplicateRoomError,
        UNKNOWN_PEER: UnknownPeerError,
        SHUTDOWN: ShutDownError,
        PANIC: LibraryPanicError,
    }
    ranges: dict[int, type[KvtError]] = {1: MisuseError, 2: HostError, 3: PeerError, 4: TransferError}
    kind = exact.get(code) or ranges.get(code // 100, KvtError)
    return kind(code, text)
