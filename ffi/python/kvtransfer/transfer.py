"""One side's part in one room."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Sequence

from . import errors
from ._native import check, ffi, lib, owned_text

UNTIL_READY = 1
UNTIL_ENDED = 2
LAST = 1
# Milliseconds fit 32 bits: 49 days, which stands for "as long as it takes".
MILLIS_MAX = 2**32 - 1


class State(IntEnum):
    """SGLang's `KVPoll`, with its numbers: several ranks' states combine by minimum."""

    FAILED = 0
    BOOTSTRAPPING = 1
    WAITING_FOR_INPUT = 2
    TRANSFERRING = 3
    SUCCESS = 4


@dataclass(frozen=True)
class Outcome:
    """How a transfer stands, or ended."""

    status: int
    """0 after success, `errors.WOULD_WAIT` while it is live, else why it failed."""
    state: State
    prefix_tokens: int
    """Tokens that the receivers hold already; 0 until all have granted their pages."""
    is_ready: bool
    bytes: int
    """Payload bytes that were placed or acknowledged; 0 unless it succeeded."""
    batches: int
    waited_s: float
    """From opening to the first batch."""
    moving_s: float
    """From the first batch to the end."""
    reason: str
    """Why it failed, in a sentence; empty otherwise."""


class Transfer:
    """Made by `Engine.send` and `Engine.receive`. Any thread may use it. Leaving the `with` block cancels a live one."""

    def __init__(self, pointer: Any, room: int) -> None:
        # The destructor runs when no call uses the pointer any more, so closing never races with another thread.
        self._handle = ffi.gc(pointer, lib.kvt_transfer_free)
        self.room = room
        """The rendezvous number."""
        self._end: Outcome | None = None

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def handle(self) -> Any:
        """The library's pointer. Raises `MisuseError` after `close`."""
        if self._handle is None:
            raise errors.MisuseError(errors.ENDED, f"room {self.room}: the transfer is closed")
        return self._handle

    def push(self, items: Sequence[Any], last: bool = False) -> None:
        """Queues pages: one list of item numbers per component of the layout, lists at the end may be left out.

        A list is anything with the buffer protocol that holds 32-bit integers (numpy int32 arrays are not copied here), or a
        sequence of numbers. Never waits for the network. `last`: no chunk follows; that one may be empty.
        """
        keep, lists = as_lists(items)
        check(lib.kvt_transfer_push(self.handle, lists, len(items), LAST if last else 0))
        del keep

    def poll(self) -> State:
        """Where it stands. `PollSet` asks for many in one call."""
        if self._end is not None:
            return self._end.state
        state = ffi.new("uint8_t *")
        handles = ffi.new("const kvt_transfer_t *[]", [self.handle])
        check(lib.kvt_transfer_poll_many(handles, 1, state))
        return State(state[0])

    def has_ended(self) -> bool:
        """Whether it is over; then nothing of it touches memory any more."""
        return self._handle is None or self.poll() in (State.FAILED, State.SUCCESS)

    def outcome(self) -> Outcome:
        """How it stands now."""
        if self._end is not None:
            return self._end
        return self._wait(UNTIL_ENDED, 0)

    def prefix_tokens(self) -> int:
        """Tokens that the receivers hold already; 0 until all have granted their pages."""
        return self.outcome().prefix_tokens

    def wait_ready(self, timeout: float) -> bool:
        """Waits, without the GIL, until pages may be pushed or it is over; False if `timeout` seconds passed."""
        outcome = self._wait(UNTIL_READY, timeout)
        return outcome.is_ready or outcome.status != errors.WOULD_WAIT

    def wait(self, timeout: float) -> Outcome | None:
        """Waits, without the GIL, for the end; `None` if `timeout` seconds passed."""
        outcome = self._end or self._wait(UNTIL_ENDED, timeout)
        return None if outcome.status == errors.WOULD_WAIT else outcome

    def result(self, timeout: float) -> Outcome:
        """As `wait`, but raises: what it failed with, or `TransferError` with code `errors.WOULD_WAIT`."""
        outcome = self.wait(timeout)
        if outcome is None:
            raise errors.TransferError(errors.WOULD_WAIT, f"room {self.room}: {timeout} s passed; the transfer goes on")
        if outcome.status != 0:
            raise errors.exception_for(outcome.status, outcome.reason)
        return outcome

    def cancel(self, reason: str = "") -> None:
        """Ends it and tells the other side why. Does not wait: with RDMA it is over some 10 ms later, otherwise at once."""
        if self._handle is None or self._end is not None:
            return
        text = reason.encode()
        check(lib.kvt_transfer_cancel(self._handle, text, len(text)))

    def fence(self, timeout: float) -> bool:
        """Ends it and waits, without the GIL, until nothing of it can touch memory; False if `timeout` seconds passed."""
        if self._handle is None or self._end is not None:
            return True
        status = lib.kvt_transfer_fence(self._handle, millis(timeout))
        if status == errors.WOULD_WAIT:
            return False
        check(status)
        return True

    def close(self) -> None:
        """Gives it back; a live one is cancelled, and waited for. How it ended stays readable."""
        if self._handle is None:
            return
        if self._end is None:
            self.cancel()
            self._wait(UNTIL_ENDED, 0)
        self._handle = None

    def _wait(self, until: int, timeout: float) -> Outcome:
        given = ffi.new("kvt_outcome_t *")
        reason = ffi.new("char **")
        status = lib.kvt_transfer_wait(self.handle, until, millis(timeout), given, reason)
        if status not in (0, errors.WOULD_WAIT):
            check(status)
        outcome = Outcome(
            status=given.status,
            state=State(given.state),
            prefix_tokens=given.prefix_tokens,
            is_ready=bool(given.is_ready),
            bytes=given.bytes,
            batches=given.batches,
            waited_s=given.waited_ns / 1e9,
            moving_s=given.moving_ns / 1e9,
            reason=owned_text(reason[0]),
        )
        if outcome.status != errors.WOULD_WAIT:
            self._end = outcome
        return outcome


def millis(seconds: float) -> int:
    """Seconds as the library takes them, at least one millisecond if not zero."""
    return min(max(int(seconds * 1000), 1 if seconds > 0 else 0), MILLIS_MAX)


def as_lists(items: Sequence[Any]) -> tuple[list[Any], Any]:
    """Item lists as the library takes them, and what must be kept alive during the call. Copies no page list that is one
    piece of 32-bit integers already."""
    keep: list[Any] = []
    lists = ffi.new("kvt_items_t[]", max(len(items), 1))
    for place, numbers in enumerate(items):
        view = _view(numbers)
        pointer = ffi.from_buffer("int32_t[]", view)
        keep.append((view, pointer))
        lists[place].items = pointer
        lists[place].count = len(pointer)
    return keep, lists


def _view(numbers: Any) -> Any:
    try:
        view = memoryview(numbers)
    except TypeError:
        return array("i", numbers)
    if view.itemsize != 4 or view.format not in ("i", "l", "=i", "<i"):
        raise errors.MisuseError(errors.BAD_ITEMS, f"item numbers must be 32-bit integers, not format {view.format!r}")
    if not view.c_contiguous:
        raise errors.MisuseError(errors.BAD_ITEMS, "item numbers must lie in one piece; make them contiguous")
    return numbers
