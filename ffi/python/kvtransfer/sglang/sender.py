"""The sending side of one request, as SGLang's prefill scheduler sees it."""

from __future__ import annotations

import logging
import queue
import time
from typing import Any, NoReturn

import numpy as np
from sglang.srt.disaggregation.base.conn import KVPoll, KVTransferMetric
from sglang.srt.disaggregation.common.conn import CommonKVSender, KVTransferError

from ..errors import KvtError
from ..transfer import State, Transfer

logger = logging.getLogger("kvtransfer.sglang")

ANOTHER_RANK = "Failed due to an unknown reason from another rank"
NOTHING = np.empty(0, dtype=np.int32)


class KvtransferKVSender(CommonKVSender):
    """Opens the room at once, pushes page lists as the scheduler computes them, and polls.

    Everything that ends the room here reaches the decode rank with its reason: an abort, a bootstrap timeout, a refused chunk.
    """

    # The page list may still be on its way to the host when send() is called; `indices_event` is waited for off this thread.
    supports_host_tensor_indices = True

    def __init__(self, mgr: Any, bootstrap_addr: str, bootstrap_room: int, *more: Any, **named: Any) -> None:
        # What follows the room differs between releases and is the base class's business.
        self._transfer: Transfer | None = None
        self._failure: str | None = None
        self._owner = mgr.claim(bootstrap_room, self)
        self._chunks_waiting = 0
        self._dummy_state: int | None = None
        self._started: float | None = None
        self._latency: float | None = None
        self.num_kv_indices = 0
        # The scheduler writes it before send(); releases differ in whether the base class makes it.
        self._early_send_wait_event: Any = None
        self.curr_idx = 0
        super().__init__(mgr, bootstrap_addr, bootstrap_room, *more, **named)
        if self.init_time is None:
            # Older releases leave the bootstrap clock to the backend.
            self.init_time = time.time()
        if not self._owner:
            self._fail(f"room {bootstrap_room} is already in use on this rank; draw a new room number for every request")
        elif mgr.is_dummy_cp_rank:
            self._dummy_state = KVPoll.WaitingForInput
        elif mgr.request_status.get(bootstrap_room) == KVPoll.Failed:
            self._fail(mgr.failure_records.get(bootstrap_room, "refused before it started"))
        else:
            try:
                self._transfer = mgr.open_send(bootstrap_room)
            except KvtError as error:
                self._fail(error.text)

    # -- what the scheduler calls ------------------------------------------------------------------------------------

    def pop_decode_prefix_len(self) -> int:
        transfer = self._transfer
        return 0 if transfer is None else transfer.prefix_tokens()

    def send(
        self, kv_indices: Any, state_indices: Any = None, num_kv_tokens: int | None = None, indices_event: Any = None
    ) -> None:
        if self.conclude_state in (KVPoll.Success, KVPoll.Failed):
            return
        self.curr_idx += len(kv_indices)
        is_last = self.curr_idx == self.num_kv_indices
        if self._started is None:
            self._started = time.perf_counter()
        if self._dummy_state is not None:
            if is_last:
                self._dummy_state = KVPoll.Success
            return
        events = tuple(event for event in (self._early_send_wait_event, indices_event) if event is not None)
        self._early_send_wait_event = None
        states = state_indices if is_last else None
        if not events and self._chunks_waiting == 0:
            self._push(kv_indices, states, is_last)
            return
        self._chunks_waiting += 1
        try:
            self.kv_mgr.chunks.put(events, lambda: self._push_later(kv_indices, states, is_last))
        except queue.Full:
            self._fail("too many chunks wait for the GPU on this rank")

    def poll(self) -> int:
        return self._conclude(self.own_state()) if self.conclude_state is None else self.conclude_state

    def poll_pp_consensus(self) -> int:
        """The least advanced state over the stages of the pipeline; only the first stage asks."""
        if self.conclude_state is not None:
            return self.conclude_state
        self.publish(self.own_state())
        return self._conclude(int(self.kv_mgr.check_status_pp_consensus(self.bootstrap_room)))

    def own_state(self) -> int:
        """Where this rank's part stands, by SGLang's numbers."""
        if self._failure is not None:
            return int(KVPoll.Failed)
        if self._dummy_state is not None:
            return self._dummy_state
        if self._transfer is None:
            # Seen by the stage watch before the constructor is through.
            return int(KVPoll.Bootstrapping)
        state = int(self.kv_mgr.polled.state(self._transfer))
        if state == KVPoll.Bootstrapping and self._check_bootstrap_timeout() is not None:
            self._fail(self.kv_mgr.failure_records.get(self.bootstrap_room, "timed out in KVPoll.Bootstrapping"))
            return int(KVPoll.Failed)
        return state

    def publish(self, state: int) -> None:
        """Puts the state where the first stage of a pipeline reads it."""
        if self._owner:
            self.kv_mgr.update_status(self.bootstrap_room, state)

    def get_transfer_metric(self) -> KVTransferMetric:
        """What the engine counted: bytes to all receivers together, and the time from the first chunk to the end."""
        total = self._transfer.outcome().bytes if self._transfer is not None else 0
        return KVTransferMetric(transfer_latency_s=self._latency, transfer_total_bytes=total)

    def failure_exception(self) -> NoReturn:
        reason = self._failure or self._reason_of_transfer()
        self.conclude_state = KVPoll.Failed
        if self._transfer is not None:
            # The scheduler frees the pages right after this: nothing may read them any more.
            self._transfer.cancel(reason or "another rank of the request failed")
        self.clear()
        raise KVTransferError(self.bootstrap_room, reason or ANOTHER_RANK, is_from_another_rank=reason is None)

    def abort(self) -> None:
        if self.conclude_state is None:
            self._fail("Aborted by AbortReq.")
            self.conclude_state = KVPoll.Failed

    def clear(self) -> None:
        if not self._owner:
            return
        self._owner = False
        if self._transfer is not None:
            self.kv_mgr.retire(self._transfer, "the request was cleared")
        self.kv_mgr.release(self.bootstrap_room, self)
        self.kv_mgr.request_status.pop(self.bootstrap_room, None)
        with self.kv_mgr.failure_lock:
            self.kv_mgr.failure_records.pop(self.bootstrap_room, None)

    # -- inner -------------------------------------------------------------------------------------------------------

    def _push(self, kv_indices: Any, state_indices: Any, is_last: bool) -> None:
        """One call into the library per chunk; the lists are copied there and not looked at here."""
        transfer = self._transfer
        if transfer is None:
            return
        items = [as_items(kv_indices)]
        if is_last:
            items += [NOTHING if part is None else as_items(part) for part in self.kv_mgr.padded(state_indices)]
            items.append(NOTHING if self.aux_index is None else np.array([self.aux_index], dtype=np.int32))
        try:
            transfer.push(items, last=is_last)
        except KvtError as error:
            # A transfer that ended has its own reason, which poll() will tell; everything else fails the room here.
            if not transfer.has_ended():
                self._fail(error.text)

    def _push_later(self, kv_indices: Any, state_indices: Any, is_last: bool) -> None:
        try:
            if self._failure is None:
                self._push(kv_indices, state_indices, is_last)
        except Exception as error:
            self._fail(f"a chunk could not be handed to the engine: {error}")
            raise
        finally:
            self._chunks_waiting -= 1

    def _fail(self, reason: str) -> None:
        """Ends the room with a reason, which the decode rank is told."""
        if self._failure is None:
            self._failure = reason
        if self._transfer is not None:
            self._transfer.cancel(reason)
        self.publish(int(KVPoll.Failed))

    def _conclude(self, state: int) -> int:
        if state not in (KVPoll.Success, KVPoll.Failed):
            return state
        self.conclude_state = state
        if state == KVPoll.Failed and self._failure is None:
            self._failure = self._reason_of_transfer()
        if state == KVPoll.Success and self._started is not None:
            self._latency = time.perf_counter() - self._started
        self.publish(state)
        return state

    def _reason_of_transfer(self) -> str | None:
        if self._transfer is None or self._transfer.poll() is not State.FAILED:
            return None
        return self._transfer.outcome().reason


def as_items(indices: Any) -> np.ndarray:
    """Page or slot numbers as the library takes them: int32, in one piece. Copies only what is neither."""
    if hasattr(indices, "numpy"):
        indices = indices.numpy()
    return np.ascontiguousarray(indices, dtype=np.int32).reshape(-1)
