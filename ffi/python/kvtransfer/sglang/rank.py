"""One rank's part of the backend: SGLang's "manager", around one engine.

SGLang's `CommonKVManager` keeps what is SGLang's own: the parallel place of the rank, its row in the bootstrap registry, the
mapping of decode ranks to prefill ranks, the statuses that a pipeline's stages share. Its control plane is not used: the row's
`rank_port` is the engine's listener, so pages, statuses and reasons all travel over the engine's connections, and the ZMQ
socket that the base class binds is closed again before the rank is known to anybody.
"""

from __future__ import annotations

import logging
import threading
import time
from types import SimpleNamespace
from typing import Any, Sequence

from sglang.srt.disaggregation.common.conn import CommonKVManager
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.environ import envs

from .. import log
from ..engine import Engine, PollSet, Source
from ..errors import CANCELLED, PEER_LOST, TIMEOUT, UNREACHABLE
from ..transfer import Outcome, Transfer
from . import options
from .chunks import ChunkQueue
from .kv_layout import buffers_of, layout_of
from .metrics import RankMetrics
from .peers import Peers, Target
from .stages import StageWatch

logger = logging.getLogger("kvtransfer.sglang")

# A role switch must be over in 3 s; each of the three things that are ended may take so long.
TEARDOWN_STEP = 0.9
# How long the scheduler's thread waits for the registry's answer before it goes on and asks again a second later: a healthy
# registry answers in a few milliseconds, a black-holed one would hold the loop for seconds.
LOOK_UP_PATIENCE = 0.03
# How long freeing pages may wait for a network card to let go of them; the engine itself needs about 10 ms.
DRAIN_PATIENCE = 0.5


class KvtransferKVManager(CommonKVManager):
    """The engine of one scheduler process, and the rooms that its requests have open."""

    supports_role_switch = True
    supports_deferred_decode_kv_release = True
    reports_transfer_latency = True
    # Releases that know it set it on the instance.
    enable_deferred_decode_kv_release = False
    enable_staging = False
    _staging_handler = None

    def __init__(self, args: Any, disaggregation_mode: Any, server_args: Any, is_mla_backend: bool | None = False) -> None:
        # None only until the constructor is through.
        self.engine: Any = None
        self.options = options.read_all()
        self._rooms: dict[int, Any] = {}
        self._rooms_lock = threading.Lock()
        self._draining: dict[int, Transfer] = {}
        self._lookups: dict[str, Any] = {}
        self._is_released = False
        self._stages: StageWatch | None = None
        super().__init__(args, disaggregation_mode, server_args, bool(is_mla_backend))
        if self.engine is None:
            self._start_engine()
        self._close_unused_socket()
        self.chunks = ChunkQueue()
        self.peers = Peers(self.engine, self._fetch_row, self.options["connect_timeout"])
        self.metrics = RankMetrics.start(self)
        if disaggregation_mode == DisaggregationMode.PREFILL and self.pp_size > 1 and hasattr(self, "check_status_pp_consensus"):
            # Older releases let every stage poll for itself and agree over torch.distributed.
            self._stages = StageWatch(self.live_rooms)

    # -- starting and ending -----------------------------------------------------------------------------------------

    def register_to_bootstrap(self) -> None:
        """Starts the engine, whose listener is this rank's address in the registry, then registers as SGLang does."""
        self._start_engine()
        super().register_to_bootstrap()

    def _start_engine(self) -> None:
        log.forward(getattr(logging, self.options["log"].upper()))
        self.layout = layout_of(self)
        self.engine = Engine(self.layout, self._configuration())
        self.polled = PollSet()
        if self.disaggregation_mode == DisaggregationMode.PREFILL:
            self.rank_port = self.engine.listen_port
        logger.info("kvtransfer engine of rank %s: %s", self.kv_args.engine_rank, self.engine.summary())

    def _configuration(self) -> dict[str, Any]:
        chosen = self.options
        rank = int(self.kv_args.engine_rank)
        host = f"[{self.local_ip}]" if ":" in self.local_ip else self.local_ip
        config: dict[str, Any] = {
            "lanes": chosen["lanes"],
            "same_host": chosen["same_host"],
            "rdma": {
                "usage": chosen["rdma"],
                "devices": chosen["rdma_devices"] or getattr(self.kv_args, "ib_device", None) or "",
                "gpu": int(getattr(self.kv_args, "gpu_id", 0) or 0),
            },
            # A grant waits for its sender as long as SGLang lets a decode request wait: then nobody wants it any more.
            "node": {
                "orphan_ttl_ms": int(envs.SGLANG_DISAGGREGATION_WAITING_TIMEOUT.get() * 1000),
                "peer_silence_max_ms": int(chosen["peer_silence"] * 1000),
            },
        }
        if chosen["token"]:
            config["token"] = chosen["token"]
        if self.disaggregation_mode == DisaggregationMode.PREFILL:
            # Decode ranks dial; a prefill rank listens, as SGLang's own ranks do, on the address it registers.
            port = chosen["listen_port"]
            config["listen"] = f"{host}:{port + rank if port else 0}"
        if chosen["telemetry_port"]:
            config["telemetry"] = {"listen": f"{host}:{chosen['telemetry_port'] + rank}"}
        return {**config, **chosen["engine"]}

    def _close_unused_socket(self) -> None:
        # Before it is closed, nobody knows its port. After it, no frame of a stranger can end a thread: there is none.
        self.server_socket.close(linger=0)

    def teardown(self) -> None:
        """Ends everything of this role, within 3 s; the KV pool stays the scheduler's."""
        started = time.monotonic()
        if self._stages is not None:
            self._stages.close()
        self.metrics.close()
        if not self.chunks.close(TEARDOWN_STEP):
            logger.warning("a chunk still waits for the GPU; its room is failed")
        self.peers.close()
        if self.engine is not None:
            self.engine.close()
        if hasattr(self.request_status, "close"):
            self.request_status.close()
        self._zmq_ctx.term()
        logger.info("kvtransfer torn down in %.0f ms", (time.monotonic() - started) * 1000)

    # -- memory that comes and goes (release_memory_occupation / resume_memory_occupation) ---------------------------

    def register_buffer_to_engine(self) -> None:
        if self._is_released and self.engine.can_release_memory:
            self.engine.restore_memory(*buffers_of(self.layout))
        self._is_released = False

    def deregister_buffer_to_engine(self) -> None:
        if self._is_released:
            return
        if self.engine.can_release_memory:
            self.engine.release_memory(*buffers_of(self.layout))
        elif self.engine.info().get("rdma"):
            logger.warning("the KV memory stays pinned by the RDMA devices while SGLang releases it; set KVTRANSFER_RDMA=off")
        self._is_released = True

    # -- rooms -------------------------------------------------------------------------------------------------------

    def claim(self, room: int, user: Any) -> bool:
        """Gives a room to one sender or receiver; False if another one has it."""
        with self._rooms_lock:
            return self._rooms.setdefault(room, user) is user

    def release(self, room: int, user: Any) -> None:
        """Takes the room back from its user."""
        with self._rooms_lock:
            if self._rooms.get(room) is user:
                del self._rooms[room]

    def live_rooms(self) -> list[Any]:
        """Every sender or receiver that has a room now."""
        with self._rooms_lock:
            return list(self._rooms.values())

    def open_send(self, room: int) -> Transfer:
        """Opens the sending side of a room. The bound on its whole life is SGLang's two timeouts together."""
        bound = self.bootstrap_timeout + envs.SGLANG_DISAGGREGATION_WAITING_TIMEOUT.get()
        transfer = self.engine.send(room, timeout=bound)
        self.polled.add(transfer)
        return transfer

    def open_receive(self, room: int, sources: Sequence[Source], request: dict[str, Any]) -> Transfer:
        """Grants the pages of a request to its prefill ranks."""
        transfer = self.engine.receive(room, sources, timeout=self.waiting_timeout, **request)
        self.polled.add(transfer)
        return transfer

    def retire(self, transfer: Transfer, reason: str) -> None:
        """Lets go of a transfer. One that is not over is ended, and kept until nothing of it can touch memory."""
        self.polled.remove(transfer)
        if not transfer.has_ended():
            transfer.cancel(reason)
        if transfer.has_ended():
            self._close(transfer)
        elif self.disaggregation_mode == DisaggregationMode.DECODE and self.enable_deferred_decode_kv_release:
            self._draining[transfer.room] = transfer
        else:
            transfer.fence(DRAIN_PATIENCE)
            self._close(transfer)

    def _close(self, transfer: Transfer) -> None:
        self.metrics.ended(transfer.outcome())
        transfer.close()

    def padded(self, state_indices: Sequence[Any] | None) -> list[Any]:
        """One item list per state component, `None` for those that the request has nothing of."""
        count = len(getattr(self.kv_args, "state_types", None) or [])
        given = list(state_indices or [])[:count]
        return given + [None] * (count - len(given))

    def is_abort_release_safe(self, bootstrap_room: int, required_acks: int) -> bool:
        """Whether nothing can write to the pages of a failed room any more. The engine knows by itself."""
        transfer = self._draining.get(bootstrap_room)
        return transfer is None or transfer.has_ended()

    def clear_deferred_abort_state(self, bootstrap_room: int) -> None:
        transfer = self._draining.pop(bootstrap_room, None)
        if transfer is not None:
            self._close(transfer)

    def should_verify_kv_checksum(self, bootstrap_addr: str) -> bool:
        """Digests cover the same bytes only where both sides are cut alike."""
        info = self.prefill_info_table.get(bootstrap_addr)
        return info is not None and info.attn_tp_size == self.attn_tp_size and info.pp_size == self.pp_size

    # -- prefill servers (decode) ------------------------------------------------------------------------------------

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """As the base class, but the question to the registry is asked on another thread: a prefill host that swallows
        packets does not hold the decode loop. False means: not yet, or not reachable."""
        if bootstrap_addr in self.prefill_info_table:
            # What is kept of a question that is answered would answer the next one too, after the server has changed.
            self._lookups.pop(bootstrap_addr, None)
            return True
        answer = self._lookups.get(bootstrap_addr)
        if answer is None:
            answer = self._lookups[bootstrap_addr] = self.peers.submit(self.look_up, bootstrap_addr)
        deadline = time.monotonic() + LOOK_UP_PATIENCE
        while not answer.done() and time.monotonic() < deadline:
            time.sleep(0.001)
        if not answer.done():
            return False
        self._lookups.pop(bootstrap_addr, None)
        if answer.exception() is not None:
            logger.error("the registry at %s was asked in vain: %s", bootstrap_addr, answer.exception())
        # Not the answer itself: another thread may have found out since that it holds no more.
        return bootstrap_addr in self.prefill_info_table

    def look_up(self, bootstrap_addr: str) -> Any:
        """Asks a prefill server's registry for its shape. Waits. `None` if it does not answer; an answer with `refusal` set if
        the two servers cannot work together."""
        try:
            found = CommonKVManager.try_ensure_parallel_info(self, bootstrap_addr)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            # SGLang's own backends let this end the decode scheduler. Here the requests that name this prefill server fail
            # with the sentence, and other prefill servers go on being served.
            refusal = str(error)
            logger.error("the prefill server at %s does not fit: %s", bootstrap_addr, refusal)
            self.prefill_info_table[bootstrap_addr] = SimpleNamespace(
                refusal=refusal, dp_size=1, follow_bootstrap_room=True, prefill_http_port=None, attn_tp_size=0, pp_size=0
            )
            return self.prefill_info_table[bootstrap_addr]
        return self.prefill_info_table.get(bootstrap_addr) if found else None

    def forget(self, bootstrap_addr: str) -> None:
        """Drops what is known of a prefill server, so that the next request asks its registry again."""
        self.prefill_info_table.pop(bootstrap_addr, None)
        self._lookups.pop(bootstrap_addr, None)
        self.peers.forget(bootstrap_addr)

    def note_failure(self, bootstrap_addr: str, outcome: Outcome) -> None:
        """A lost prefill rank may come back as another one, under another address."""
        if outcome.status in (PEER_LOST, UNREACHABLE) and bootstrap_addr in self.prefill_info_table:
            self.forget(bootstrap_addr)

    def reason_of(self, room: int, outcome: Outcome) -> str:
        """How a request failed, for SGLang's log and the client."""
        if outcome.status == TIMEOUT:
            return f"Request {room} timed out in KVPoll.WaitingForInput: {outcome.reason}"
        if outcome.status == CANCELLED and not outcome.reason:
            return "Aborted by AbortReq."
        return outcome.reason

    def _fetch_row(self, server: str, target: Target) -> dict[str, Any] | str:
        """A prefill rank's row, or why there is none."""
        from .registry import fetch_row

        return fetch_row(server, target)


