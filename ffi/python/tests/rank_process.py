"""One scheduler process of a test: SGLang's real classes over host buffers, told what to do line by line.

Reads one JSON object per line from standard input, answers each with one on standard output. What the scheduler's queues
would call is called here with the arguments they would use. Everything SGLang prints goes to standard error.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
import traceback
from types import SimpleNamespace
from typing import Any, Callable

import stand_ins

stand_ins.install()

import numpy as np  # noqa: E402
from pools import Pool, Shape  # noqa: E402


def publish(setup: dict[str, Any], shape: Shape) -> Any:
    """What the launcher and torch.distributed would have told this process."""
    from sglang.srt.runtime_context import get_context, get_device, get_parallel

    group = SimpleNamespace(rank_in_group=shape.pp_rank, world_size=shape.pp_size, is_last_rank=True, broadcast_object=shared)
    dp_size, dp_rank = setup.get("dp_size", 1), setup.get("dp_rank", 0)
    is_older = older_places(group, dp_size, dp_rank)
    args = get_context().override_server_args(
        **({"dp_size": dp_size, "enable_dp_attention": dp_size > 1} if is_older else {}),
        disaggregation_mode=setup["role"],
        disaggregation_transfer_backend=setup.get("backend", "kvtransfer"),
        disaggregation_bootstrap_port=setup["bootstrap_port"],
        host=setup.get("host", "127.0.0.1"),
        port=30000,
        device="cpu",
        pp_size=shape.pp_size,
        enable_metrics=setup.get("enable_metrics", False),
        load_balance_method=setup.get("load_balance_method", "follow_bootstrap_room"),
    ).install()
    values = {
        "attn_tp_size": shape.tp_size, "attn_tp_rank": shape.tp_rank, "tp_size": shape.tp_size, "tp_rank": shape.tp_rank,
        "attn_cp_size": setup.get("cp_size", 1), "attn_cp_rank": setup.get("cp_rank", 0), "attn_dp_size": dp_size,
        "attn_dp_rank": dp_rank, "attn_dcp_size": 1, "attn_dcp_rank": 0, "pp_size": shape.pp_size,
        "pp_rank": shape.pp_rank, "dp_size": dp_size if is_older else 1, "dp_rank": 0, "num_dp_ranks": dp_size, "pp_group": group,
        "enable_dp_attention": dp_size > 1,
        "dist_init_addr": None, "nnodes": 1, "node_rank": 0, "enable_kv_cache_sharding": False, "world_group": group,
        "enable_cp_tp_group_sharing": False, "enable_dsa_cache_layer_split": False,
        "load_balance_method": setup.get("load_balance_method", "follow_bootstrap_room"),
    }  # fmt: skip
    parallel = get_parallel()
    (parallel._overrides if not hasattr(parallel, "_stamp") else parallel._stamp).update(values)
    get_device()._set("gpu_id", 0)
    get_device()._set("device", "cpu")
    return args


def older_places(group: Any, dp_size: int, dp_rank: int) -> bool:
    """Releases before 0.5.20 ask functions for some of it, and count attention's data-parallel ranks in `dp_size`; whether this is one."""
    from sglang.srt.disaggregation.common import conn

    is_older = hasattr(conn, "get_attention_dp_size")
    for name, value in (("get_attention_dp_size", dp_size), ("get_attention_dp_rank", dp_rank), ("get_pp_group", group)):
        if hasattr(conn, name):
            setattr(conn, name, lambda value=value: value)
    return is_older


def shared(value: Any, src: int = 0) -> Any:
    """torch.distributed's broadcast among the stages of a pipeline, through a file of the test's."""
    path = os.environ["TEST_BROADCAST"]
    if value is not None:
        with open(f"{path}.part", "w") as file:
            json.dump(value, file)
        os.replace(f"{path}.part", path)
        return value
    deadline = time.monotonic() + 20
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise TimeoutError("the first stage never said its address")
        time.sleep(0.01)
    with open(path) as file:
        return json.load(file)


class Rank:
    """The manager, and the requests in flight."""

    def __init__(self, setup: dict[str, Any]) -> None:
        from sglang.srt.disaggregation import utils
        from sglang.srt.disaggregation.utils import DisaggregationMode, KVClassType, TransferBackend
        from sglang.srt.plugins import load_plugins

        shape = dict(setup["shape"])
        shape["states"] = tuple(tuple(state) for state in shape.get("states", ()))
        self.shape = Shape(**shape)
        self.is_prefill = setup["role"] == "prefill"
        self.server_args = publish(setup, self.shape)
        load_plugins()
        self.pool = self.make_pool(setup)
        backend = TransferBackend(setup.get("backend", "kvtransfer"))
        self.kind = lambda kind: utils.get_kv_class(backend, kind)
        self.kinds = KVClassType
        if backend is TransferBackend.MOONCAKE:
            # The scheduler does this for the backends that it knows by name.
            from sglang.srt.distributed.device_communicators.mooncake_transfer_engine import init_mooncake_transfer_engine

            init_mooncake_transfer_engine("127.0.0.1", 0, None)
        if "look_up_patience" in setup:
            from kvtransfer.sglang import rank

            rank.LOOK_UP_PATIENCE = setup["look_up_patience"]
        mode = DisaggregationMode.PREFILL if self.is_prefill else DisaggregationMode.DECODE
        self.args = self._kv_args(setup)
        self.manager = self.kind(KVClassType.MANAGER)(self.args, mode, self.server_args, self.shape.latent_bytes > 0)
        self.requests: dict[int, Any] = {}
        self.bootstrap_addr = f"127.0.0.1:{setup['bootstrap_port']}"

    def make_pool(self, setup: dict[str, Any]) -> Pool:
        """The memory; the benchmarks have another."""
        return Pool(self.shape, self.is_prefill)

    def _kv_args(self, setup: dict[str, Any]) -> Any:
        from sglang.srt.disaggregation.base.conn import StateType

        args = self.kind(self.kinds.KVARGS)()
        self.pool.fill_kv_args(args)
        args.engine_rank = self.shape.tp_rank
        args.pp_rank = self.shape.pp_rank
        args.system_dp_rank = 0
        args.rust_http_port = None
        args.kv_cache_dtype_str = setup.get("dtype", "bfloat16")
        args.state_types = [StateType(name) for name, _, _ in self.shape.states]
        args.is_hybrid_mla_backend = False
        args.swa_kv_cache_layout = "nhd"
        args.ib_device = None
        args.gpu_id = 0
        args.mla_compression_ratios = None
        if self.is_prefill:
            args.prefill_start_layer = self.shape.rank_layers.start
            args.prefill_end_layer = self.shape.rank_layers.stop
        elif self.shape.pp_size > 1:
            # The model's configuration, from which a decode stage would work it out, does not exist here.
            args.prefill_start_layer = self.shape.rank_layers.start
        if not self.shape.latent_bytes:
            args.kv_head_num = self.shape.rank_heads
            args.total_kv_head_num = self.shape.heads
        return args

    # -- what the parent asks for --------------------------------------------------------------------------------------

    def open(self, room: int, dp_rank: int = 0, key: int | None = None, wait: float = 10.0, fake: bool = False) -> dict[str, Any]:
        """A sender, or a receiver with its handshake begun. `fake`: SGLang's own for warm-up requests, around our manager."""
        key = room if key is None else key
        if fake:
            self.requests[key] = self.open_fake(room)
            return {}
        if self.is_prefill:
            kind = self.kind(self.kinds.SENDER)
            self.requests[key] = kind(mgr=self.manager, bootstrap_addr=self.bootstrap_addr, bootstrap_room=room, **self.older())
            return {}
        receiver = self.kind(self.kinds.RECEIVER)(self.manager, self.bootstrap_addr, room)
        self.requests[key] = receiver
        deadline = time.monotonic() + wait
        while not self.manager.try_ensure_parallel_info(self.bootstrap_addr):
            if time.monotonic() > deadline:
                receiver.abort()
                return {"info": False}
            time.sleep(0.02)
        started = time.perf_counter()
        receiver.init(dp_rank)
        return {"info": True, "init_s": time.perf_counter() - started}

    def open_fake(self, room: int) -> Any:
        """What the scheduler makes for a request whose bootstrap host is `FAKE_BOOTSTRAP_HOST`."""
        from sglang.srt.disaggregation import utils

        kind = self.kinds.SENDER if self.is_prefill else self.kinds.RECEIVER
        made = utils.get_kv_class(utils.TransferBackend.FAKE, kind)
        if self.is_prefill:
            known = inspect.signature(made.__init__).parameters
            told = {name: value for name, value in self.older().items() if name in known}
            return made(mgr=self.manager, bootstrap_addr="2.2.2.2:1", bootstrap_room=room, **told)
        receiver = made(self.manager, "2.2.2.2:1", room)
        receiver.init(0)
        return receiver

    def older(self) -> dict[str, Any]:
        """What releases before 0.5.20 tell a sender besides."""
        from sglang.srt.disaggregation.common.conn import CommonKVSender

        known = inspect.signature(CommonKVSender.__init__).parameters
        told = {"dest_tp_ranks": [self.shape.tp_rank], "pp_rank": self.shape.pp_rank}
        return {name: value for name, value in told.items() if name in known}

    def grant(self, room: int, pages: list[int], slot: int | None, states: Any = None, prefix: int = 0) -> dict[str, Any]:
        """Decode: what `_send_kv_metadata` calls."""
        indices = np.array(pages, dtype=np.int32)
        state_indices = None if states is None else [None if part is None else np.array(part, np.int32) for part in states]
        self.requests[room].send_metadata(indices, slot, state_indices, decode_prefix_len=prefix)
        return {}

    def begin(self, room: int, pages: int, slot: int) -> dict[str, Any]:
        """Prefill: what `finalize_bootstrap` calls."""
        sender = self.requests[room]
        prefix = sender.pop_decode_prefix_len()
        sender.init(pages, slot)
        return {"prefix": prefix}

    def send(self, room: int, pages: list[int], first_token: int, last: bool, slot: int = 0, states: Any = None,
             event_s: float = 0.0) -> dict[str, Any]:  # fmt: skip
        """Prefill: computes pages and sends them as one chunk. `event_s`: the pages are only written so much later, and an
        event says when."""
        sender = self.requests[room]
        if states is not None:
            self.pool.write_states(room, states)
        if last:
            self.pool.write_aux(room, slot)
        if event_s:
            sender._early_send_wait_event = Late(event_s, lambda: self.pool.write(room, pages, first_token))
        else:
            self.pool.write(room, pages, first_token)
        if not sender.should_send_kv_chunk(len(pages), last):
            return {"skipped": True}
        state_indices = None if states is None else [None if part is None else np.array(part, np.int32) for part in states]
        started = time.perf_counter()
        sender.send(np.array(pages, dtype=np.int32), state_indices)
        return {"send_s": time.perf_counter() - started}

    def timed(self, room: int, pages: list[int], slot: int) -> dict[str, Any]:
        """Prefill: sends pages as they are, in one last chunk; the time until Success."""
        self.pool.write_aux(room, slot)
        indices = np.array(pages, dtype=np.int32)
        started = time.perf_counter()
        self.requests[room].send(indices, None)
        while (state := int(self.requests[room].poll())) not in (0, 4):
            time.sleep(0.0002)
            if time.perf_counter() - started > 60:
                break
        return {"s": time.perf_counter() - started, "state": state}

    def until(self, room: int, states: list[int], timeout: float) -> dict[str, Any]:
        """Polls as the scheduler's loop does, until one of the states; the states that were seen, in order."""
        seen: list[int] = []
        deadline = time.monotonic() + timeout
        poller = self.requests[room]
        # Older releases have no such store: their stages poll each for itself.
        consensus = hasattr(self.manager, "check_status_pp_consensus") and self.shape.pp_size > 1 and self.shape.pp_rank == 0
        while True:
            state = int(poller.poll_pp_consensus() if self.is_prefill and consensus else poller.poll())
            if not seen or seen[-1] != state:
                seen.append(state)
            if state in states or time.monotonic() > deadline:
                return {"seen": seen}
            time.sleep(0.0005)

    def check(self, room: int, pages: list[int], first_token: int = 0, slot: int | None = None, states: Any = None,
              all_pages: list[int] | None = None) -> dict[str, Any]:  # fmt: skip
        """Decode: compares bytes."""
        wrong = self.pool.wrong(room, pages, first_token, states or [], slot)
        touched = [] if all_pages is None else self.pool.touched(all_pages)
        self.pool.wipe(all_pages or [])
        return {"wrong": wrong, "touched": touched}

    def wipe(self) -> dict[str, Any]:
        """Decode: forgets what failed requests have left in the pages."""
        self.pool.wipe(list(range(self.shape.pages)))
        return {}

    def failure(self, room: int) -> dict[str, Any]:
        """What the scheduler would log and tell the client."""
        try:
            self.requests[room].failure_exception()
        except Exception as error:
            return {
                "text": str(error),
                "kind": type(error).__name__,
                "room": getattr(error, "bootstrap_room", None),
                "other_rank": getattr(error, "is_from_another_rank", None),
            }
        return {"text": None}

    def abort(self, room: int) -> dict[str, Any]:
        self.requests[room].abort()
        return {}

    def notify(self, room: int) -> dict[str, Any]:
        self.requests[room].ensure_abort_notified(force_arm=True)
        return {"notified": self.requests[room].abort_notified}

    def clear(self, room: int) -> dict[str, Any]:
        self.requests.pop(room).clear()
        return {"rooms": len(getattr(self.manager, "_rooms", ())), "status": len(getattr(self.manager.request_status, "_local_map", self.manager.request_status))}  # fmt: skip

    def metric(self, room: int) -> dict[str, Any]:
        metric = self.requests[room].get_transfer_metric()
        return {"bytes": metric.transfer_total_bytes, "latency": metric.transfer_latency_s}

    def checksum(self) -> dict[str, Any]:
        return {"verified": bool(self.manager.should_verify_kv_checksum(self.bootstrap_addr))}

    def series(self) -> dict[str, Any]:
        """Our Prometheus series, as /metrics shows them."""
        from prometheus_client import generate_latest

        lines = generate_latest().decode().splitlines()
        found = (line.rpartition(" ") for line in lines if line.startswith("kvtransfer_"))
        return {name: float(value) for name, _, value in found}

    def safe(self, room: int, acks: int = 1) -> dict[str, Any]:
        return {"safe": bool(self.manager.is_abort_release_safe(room, acks))}

    def info(self) -> dict[str, Any]:
        return self.manager.engine.info()

    def buffers(self, registered: bool) -> dict[str, Any]:
        """The two calls of release/resume_memory_occupation."""
        if registered:
            self.manager.register_buffer_to_engine()
        else:
            self.manager.deregister_buffer_to_engine()
        return {}

    def teardown(self) -> dict[str, Any]:
        started = time.monotonic()
        self.manager.teardown()
        return {"seconds": time.monotonic() - started}

    def rank_port(self) -> dict[str, Any]:
        return {"port": self.manager.rank_port, "ip": self.manager.local_ip, "pid": os.getpid()}


class Late:
    """A CUDA event's stand-in: happens some time after it was made, and only then are the pages written."""

    def __init__(self, seconds: float, happen: Any) -> None:
        self._at = time.monotonic() + seconds
        self._happen = happen

    def synchronize(self) -> None:
        time.sleep(max(0.0, self._at - time.monotonic()))
        self._happen()


class Registry:
    """The process of the HTTP server, which starts the bootstrap registry through SGLang's own `start_disagg_service`."""

    def __init__(self, setup: dict[str, Any]) -> None:
        from sglang.srt.managers.disagg_service import start_disagg_service
        from sglang.srt.plugins import load_plugins

        args = publish({**setup, "role": "prefill"}, Shape())
        load_plugins()
        # Releases before 0.5.20 pass the arguments along.
        self.server = start_disagg_service(*[args][: len(inspect.signature(start_disagg_service).parameters)])

    def what(self) -> dict[str, Any]:
        return {"kind": type(self.server).__name__}

    def close(self) -> dict[str, Any]:
        self.server.close()
        return {}


def serve(make: Callable[[dict[str, Any]], Any]) -> None:
    """Answers until standard input ends. `make` turns what "start" came with into the object that is asked from then on."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    actor: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if asked["do"] == "start":
                actor = make(asked["with"])
                answer: dict[str, Any] = {}
            else:
                answer = getattr(actor, asked["do"])(**asked["with"]) or {}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    serve(lambda setup: Registry(setup) if setup["role"] == "registry" else Rank(setup))
