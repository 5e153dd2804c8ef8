"""The receiving side of one request, as SGLang's decode scheduler sees it."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, NoReturn

import numpy as np
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVReceiver, KVTransferError

from ..errors import KvtError, UnknownPeerError
from ..transfer import State, Transfer
from .peers import Group, PeerSetupError, Target
from .sender import ANOTHER_RANK, NOTHING, as_items

logger = logging.getLogger("kvtransfer.sglang")

ABORTED = "Aborted by AbortReq."


class KvtransferKVReceiver(CommonKVReceiver):
    """Finds and connects the prefill ranks off the scheduler's thread, then grants the pages in one call.

    A failure that poll() shows means that nothing can write to the pages any more, so the scheduler may free them.
    """

    def __init__(self, mgr: Any, bootstrap_addr: str, bootstrap_room: int | None = None) -> None:
        self._guard = threading.RLock()
        self._group: Group | None = None
        self._transfer: Transfer | None = None
        self._opening = False
        self._failure: str | None = None
        self._request: dict[str, Any] | None = None
        self.bootstrap_infos: list[dict[str, Any]] | None = None
        self.prefill_info: Any = None
        self.chunk_staging_infos: list[Any] = []
        self._owner = mgr.claim(bootstrap_room, self)
        super().__init__(mgr, bootstrap_addr, bootstrap_room)
        if not self._owner:
            self._fail(f"room {bootstrap_room} is already in use on this rank; draw a new room number for every request")

    # -- what the scheduler calls ------------------------------------------------------------------------------------

    def init(self, prefill_dp_rank: int) -> None:
        """Starts the search for the prefill ranks. Returns at once; poll() stays Bootstrapping until they are connected."""
        if self._failure is not None:
            return
        info = self.kv_mgr.prefill_info_table.get(self.bootstrap_addr)
        if info is None:
            self._fail(f"The prefill server at {self.bootstrap_addr} was healthy before, but now it is down")
            return
        refusal = getattr(info, "refusal", None)
        if refusal is not None:
            # Looked up anew by the next request: the other side may be restarted with other arguments.
            self.kv_mgr.prefill_info_table.pop(self.bootstrap_addr, None)
            self._fail(refusal)
            return
        self.prefill_info = info
        self.prefill_dp_rank = prefill_dp_rank
        self._adopt(info)
        group = self.kv_mgr.peers.known(self.bootstrap_addr, self._targets())
        if group is not None:
            self._use(group)
        else:
            self.kv_mgr.peers.submit(self._connect)

    def send_metadata(
        self,
        kv_indices: Any,
        aux_index: int | None = None,
        state_indices: Any = None,
        decode_prefix_len: int | None = None,
        destination: Any = None,
        device_kv_indices: Any = None,
    ) -> None:
        if getattr(destination, "value", "device") != "device":
            raise NotImplementedError("Host KV destinations are not supported")
        if device_kv_indices is not None:
            raise NotImplementedError("A second index list (HiSparse) is not supported")
        if self._failure is not None:
            return
        states = [NOTHING if part is None else as_items(part).copy() for part in self.kv_mgr.padded(state_indices)]
        aux = NOTHING if aux_index is None else np.array([aux_index], dtype=np.int32)
        # Kept, because opening is tried once more if the prefill ranks turn out to be others than they were.
        self._request = {
            "items": [as_items(kv_indices).copy(), *states, aux],
            "receivers_expected": int(self.required_dst_info_num),
            "prefix_tokens": int(decode_prefix_len or 0),
        }
        self.init_time = time.time()
        try:
            self._open()
        except UnknownPeerError:
            # A prefill server was restarted since the last request. The registry is asked again, off this thread.
            self._opening = True
            self.kv_mgr.peers.submit(self._reopen)
        except KvtError as error:
            self._fail(error.text)

    def poll(self) -> int:
        if self.conclude_state is not None:
            return self.conclude_state
        state = self.own_state()
        if state in (KVPoll.Success, KVPoll.Failed):
            self.conclude_state = state
            if state == KVPoll.Failed and self._failure is None:
                self._failure = self._reason_of_transfer()
            self._publish(state)
        return state

    def own_state(self) -> int:
        """Where this rank's part stands, by SGLang's numbers."""
        if self._failure is not None:
            return int(KVPoll.Failed)
        transfer = self._transfer
        if transfer is not None:
            state = int(self.kv_mgr.polled.state(transfer))
            if state == KVPoll.Failed:
                self.kv_mgr.note_failure(self.bootstrap_addr, transfer.outcome())
            return state
        return int(KVPoll.Bootstrapping if self._group is None else KVPoll.WaitingForInput)

    def failure_exception(self) -> NoReturn:
        reason = self._failure or self._reason_of_transfer()
        self.conclude_state = KVPoll.Failed
        self._withdraw(reason or "another rank of the request failed")
        self.clear()
        raise KVTransferError(self.bootstrap_room, reason or ANOTHER_RANK, is_from_another_rank=reason is None)

    def abort(self) -> None:
        if self._failure is None and self.conclude_state is None:
            self._fail(ABORTED)
        self.conclude_state = KVPoll.Failed
        self.ensure_abort_notified()

    def ensure_abort_notified(self, *, force_arm: bool = False) -> None:
        """Tells the prefill ranks, once. They stop by themselves when the transfer is cancelled, so this only concerns rooms
        for which no page was granted yet: their senders would wait for their bootstrap timeout."""
        if self.abort_notified:
            return
        self.abort_notified = self.bootstrap_infos is not None
        self._withdraw(self._failure or ABORTED)

    def clear(self) -> None:
        with self._guard:
            if not self._owner:
                return
            self._owner = False
        if self.conclude_state is None:
            self.conclude_state = KVPoll.Failed
        if self._transfer is not None:
            self.kv_mgr.retire(self._transfer, "the request was cleared")
        self.kv_mgr.release(self.bootstrap_room, self)
        super().clear()
        with self.kv_mgr.failure_lock:
            self.kv_mgr.failure_records.pop(self.bootstrap_room, None)

    # -- inner -------------------------------------------------------------------------------------------------------

    def _adopt(self, info: Any) -> None:
        self.target_tp_rank = info.target_tp_rank
        self.target_tp_ranks = info.target_tp_ranks
        self.target_cp_ranks = info.target_cp_ranks
        self.target_pp_ranks = info.target_pp_ranks
        self.required_dst_info_num = info.required_dst_info_num
        self.required_prefill_response_num = info.required_prefill_response_num

    def _targets(self) -> tuple[Target, ...]:
        """Every prefill rank of the request. Of a latent cache one tensor-parallel rank sends and the others only conclude."""
        latent = self.kv_mgr.is_mla_backend
        return tuple(
            Target(self.prefill_dp_rank, cp, tp, pp, latent and self.target_tp_rank is not None and tp != self.target_tp_rank)
            for cp in self.target_cp_ranks
            for tp in self.target_tp_ranks
            for pp in reversed(self.target_pp_ranks)
        )

    def _connect(self) -> None:
        """On a connecting thread: finds and connects the prefill ranks of the room."""
        try:
            self._use(self.kv_mgr.peers.connect(self.bootstrap_addr, self._targets()))
        except PeerSetupError as error:
            self.kv_mgr.forget(self.bootstrap_addr)
            self._fail(str(error))
        except Exception as error:
            logger.exception("the prefill ranks of room %s could not be connected", self.bootstrap_room)
            self._fail(f"the prefill ranks could not be connected: {error}")

    def _use(self, group: Group) -> None:
        with self._guard:
            self._group = group
            self.bootstrap_infos = list(group.rows)
            was_aborted = self._failure is not None
        if was_aborted:
            self.ensure_abort_notified()
        else:
            self._publish(int(KVPoll.WaitingForInput))

    def _open(self) -> None:
        with self._guard:
            group, request = self._group, self._request
            if self._failure is not None or not self._owner or group is None or request is None:
                return
            self._transfer = self.kv_mgr.open_receive(self.bootstrap_room, group.sources, request)

    def _reopen(self) -> None:
        """On a connecting thread: looks the prefill server up anew and opens the room with what is found."""
        try:
            self.kv_mgr.forget(self.bootstrap_addr)
            info = self.kv_mgr.look_up(self.bootstrap_addr)
            if info is None:
                raise PeerSetupError(f"The prefill server at {self.bootstrap_addr} was healthy before, but now it is down")
            if getattr(info, "refusal", None) is not None:
                raise PeerSetupError(info.refusal)
            self._adopt(info)
            self._use(self.kv_mgr.peers.connect(self.bootstrap_addr, self._targets()))
            self._open()
        except (PeerSetupError, KvtError) as error:
            self._fail(str(error))
        except Exception as error:
            logger.exception("room %s could not be opened anew", self.bootstrap_room)
            self._fail(f"the prefill ranks could not be connected: {error}")
        finally:
            self._opening = False

    def _withdraw(self, reason: str) -> None:
        """Ends the room towards the prefill ranks, with the reason."""
        with self._guard:
            if self._transfer is not None:
                self._transfer.cancel(reason)
                return
            group = self._group
            if group is None or not self._owner:
                return
            # Nothing was granted. An empty grant that is cancelled at once tells the senders, also those that come later.
            try:
                self._transfer = self.kv_mgr.open_receive(
                    self.bootstrap_room, group.sources, {"items": [], "receivers_expected": self.required_dst_info_num}
                )
                self._transfer.cancel(reason)
            except KvtError as error:
                logger.debug("the prefill ranks of room %s were not told of its end: %s", self.bootstrap_room, error)

    def _fail(self, reason: str) -> None:
        with self._guard:
            if self._failure is None:
                self._failure = reason
            if self._transfer is not None:
                self._transfer.cancel(reason)
        self._publish(int(KVPoll.Failed))

    def _publish(self, state: int) -> None:
        if self._owner:
            self.kv_mgr.update_status(self.bootstrap_room, state)

    def _reason_of_transfer(self) -> str | None:
        if self._transfer is None or self._transfer.poll() is not State.FAILED:
            return None
        return self.kv_mgr.reason_of(self.bootstrap_room, self._transfer.outcome())
