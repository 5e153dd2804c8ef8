"""The test's side of the rank processes: starting them, asking them, never waiting without a bound."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Iterator, Sequence

from pools import Shape

HERE = Path(__file__).resolve().parent
# Longest that a rank may take to answer anything; a test that reaches it fails with the rank's own log.
ANSWER_S = 60.0

FAILED, BOOTSTRAPPING, WAITING, TRANSFERRING, SUCCESS = range(5)


class RankError(AssertionError):
    """A rank did not answer, or answered with an exception."""


class Rank:
    """One process."""

    def __init__(self, name: str, extra: dict[str, str] | None = None, program: Path = HERE / "rank_process.py") -> None:
        self.name = name
        self.log = tempfile.NamedTemporaryFile("w+", prefix=f"{name}-", suffix=".log", delete=False)
        self.process = subprocess.Popen(
            [sys.executable, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment(extra or {}),
        )

    def start(self, **setup: Any) -> None:
        """Begins the construction of the rank; `finish` waits for it."""
        self.ask("start", **setup)

    def ask(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, "with": arguments}).encode() + b"\n")
        self.process.stdin.flush()

    def finish(self, timeout: float = ANSWER_S) -> dict[str, Any]:
        """The answer to the oldest question."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            why = "did not answer in time" if not ready else "ended"
            raise RankError(f"{self.name} {why}; its log:\n{self.tail()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RankError(f"{self.name}: {answer['error']}; its log:\n{self.tail()}")
        return dict(answer)

    def call(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.ask(do, **arguments)
        return self.finish()

    def until(self, room: int, *states: int, timeout: float = 20.0) -> list[int]:
        """Polls until one of the states; what was seen."""
        seen = self.call("until", room=room, states=list(states), timeout=timeout)["seen"]
        if seen[-1] not in states:
            why = self.call("failure", room=room) if seen[-1] == FAILED else ""
            raise RankError(f"{self.name}: room {room} is at {seen}, never at {states}; {why}; its log:\n{self.tail()}")
        return list(seen)

    def tail(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text()[-4000:]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        """Ends the process, however it is. A second call does nothing."""
        if self.log.closed:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self.log.close()
        os.unlink(self.log.name)


def environment(extra: dict[str, str]) -> dict[str, str]:
    """What a process of a test sees: this checkout's package and its entry point, unless an installed wheel is under test."""
    inherited = {key: value for key, value in os.environ.items() if key.startswith(("KVTRANSFER", "PATH", "HOME", "SGLANG"))}
    checkout = f"{HERE.parent}{os.pathsep}{HERE / 'plugin'}"
    return {
        **inherited,
        "PYTHONPATH": "" if os.environ.get("KVTRANSFER_TEST_INSTALLED") == "1" else checkout,
        "PYTHONUNBUFFERED": "1",
        "SGLANG_HOST_IP": "127.0.0.1",
        "MC_FORCE_TCP": "1",
        **extra,
    }


def free_port(row: int = 1) -> int:
    """A port that nobody listens on now; of `row` of them that follow each other, the first."""
    while True:
        with ExitStack() as held:
            first = held.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                for more in range(1, row):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port + more))
            except (OSError, OverflowError):
                continue
            return port


def shapes(tp: int, pp: int = 1, **model: Any) -> Iterator[Shape]:
    """The ranks of one server, stage by stage."""
    for pp_rank in range(pp):
        for tp_rank in range(tp):
            yield Shape(tp_rank=tp_rank, tp_size=tp, pp_rank=pp_rank, pp_size=pp, **model)


class Pair:
    """A prefill server and a decode server. Use as a context."""

    def __init__(
        self,
        prefill_tp: int = 1,
        decode_tp: int = 1,
        prefill_pp: int = 1,
        decode_pp: int = 1,
        backend: str = "kvtransfer",
        registry: str | None = None,
        environment: dict[str, str] | None = None,
        decode_model: dict[str, Any] | None = None,
        prefill_places: Sequence[dict[str, Any]] = ({},),
        setup: dict[str, Any] | None = None,
        decode_environment: dict[str, str] | None = None,
        **model: Any,
    ) -> None:
        # Data- or context-parallel ranks of the prefill server, each with the same shape; what all ranks are told besides.
        self.prefill_places = prefill_places
        self.setup = setup or {}
        self.backend = backend
        self.registry_backend = registry or backend
        self.environment = environment or {}
        self.decode_environment = decode_environment or {}
        self.port = free_port()
        self._scratch = tempfile.mkdtemp(prefix="kvt-")
        self._stack = ExitStack()
        self.prefill_shapes = list(shapes(prefill_tp, prefill_pp, **model))
        self.decode_shapes = list(shapes(decode_tp, decode_pp, **{**model, **(decode_model or {})}))
        self.prefill: list[Rank] = []
        self.decode: list[Rank] = []

    def __enter__(self) -> Pair:
        try:
            self.registry = self.begin("registry", None, self.registry_backend)
            self.registry.finish()
            self.prefill = [self.begin("prefill", shape, **at) for at in self.prefill_places for shape in self.prefill_shapes]
            self.decode = [self.begin("decode", shape) for shape in self.decode_shapes]
            for rank in [*self.prefill, *self.decode]:
                rank.finish()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    def begin(self, role: str, shape: Shape | None, backend: str | None = None, **setup: Any) -> Rank:
        """Starts a process of the pair; its construction is waited for with `finish`."""
        place = "" if shape is None else f"-tp{shape.tp_rank}-pp{shape.pp_rank}"
        broadcast = f"{self._scratch}/{role}"
        special = self.decode_environment if role == "decode" else {}
        rank = Rank(f"{role}{place}", {**self.environment, **special, "TEST_BROADCAST": broadcast})
        self._stack.callback(rank.stop)
        rank.start(
            role=role,
            backend=backend or self.backend,
            bootstrap_port=self.port,
            **self.setup,
            **setup,
            **({} if shape is None else {"shape": asdict(shape)}),
        )
        return rank

    def open(self, room: int, both: bool = True) -> None:
        """Opens the room on every rank and waits for the handshakes."""
        ranks = [*self.prefill, *self.decode] if both else self.decode
        for rank in ranks:
            rank.ask("open", room=room)
        for rank in ranks:
            rank.finish()
        for rank in self.decode:
            rank.until(room, WAITING)

    def transfer(
        self,
        room: int,
        source: Sequence[int],
        target: Sequence[int],
        chunks: Sequence[int] | None = None,
        prefix_pages: int = 0,
        slots: tuple[int, int] = (1, 2),
        states: tuple[Any, Any] = (None, None),
        event_s: float = 0.0,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """A whole request: handshake, grant, chunks, success on every rank, every byte compared. The polls that were seen."""
        source, target = list(source), list(target)
        page = self.prefill_shapes[0].page_size
        self.open(room)
        for rank in self.decode:
            rank.call("grant", room=room, pages=target, slot=slots[1], states=states[1], prefix=prefix_pages * page)
        for rank in self.prefill:
            rank.until(room, WAITING)
            assert rank.call("begin", room=room, pages=len(source), slot=slots[0])["prefix"] == prefix_pages * page
        done = 0
        sizes = list(chunks or [len(source)])
        for at, size in enumerate(sizes):
            last = at + 1 == len(sizes)
            for rank in self.prefill:
                rank.ask(
                    "send", room=room, pages=source[done : done + size], first_token=(prefix_pages + done) * page, last=last,
                    slot=slots[0], states=states[0] if last else None, event_s=event_s,
                )  # fmt: skip
            for rank in self.prefill:
                rank.finish()
            done += size
        polls = self.succeed(room)
        for rank in self.decode:
            found = rank.call(
                "check", room=room, pages=target[: len(source)], first_token=prefix_pages * page, slot=slots[1],
                states=states[1], all_pages=target,
            )  # fmt: skip
            assert found == {"wrong": [], "touched": []}, (rank.name, found)
        for rank in [*self.prefill, *self.decode]:
            left = rank.call("clear", room=room)
            assert left["status"] == 0, (rank.name, left)
        return polls

    def succeed(self, room: int, timeout: float = 30.0) -> tuple[list[list[int]], list[list[int]]]:
        """Polls every rank until it has succeeded."""
        for rank in [*self.prefill, *self.decode]:
            rank.ask("until", room=room, states=[SUCCESS, FAILED], timeout=timeout)
        seen = [[rank.finish()["seen"] for rank in ranks] for ranks in (self.prefill, self.decode)]
        for ranks, polls in zip((self.prefill, self.decode), seen):
            for rank, poll in zip(ranks, polls):
                if poll[-1] != SUCCESS:
                    raise RankError(f"{rank.name}: {poll}, {rank.call('failure', room=room)}; its log:\n{rank.tail()}")
        return seen[0], seen[1]
