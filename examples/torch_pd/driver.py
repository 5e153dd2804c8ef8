"""Starts the three processes, sends them the same prompts, compares their tokens, and says what the times were."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection, wait
from typing import Any, Callable, Iterator

import kvtransfer as kvt

from . import report, workers
from .messages import Close, Closed, Failed, Generated, Open, Opened, Ready, Received, Request, Sent
from .model import choose
from .settings import Run, Settings, parse
from .workload import lengths, prompt

# Loading a model: transformers' import alone takes tens of seconds on a slow disk.
LOAD_S = 300.0


class RunError(Exception):
    """The run could not be made; the sentence says why."""


class Process:
    """A worker and the driver's end of its pipe."""

    def __init__(self, name: str, target: Callable[[Connection, Settings], None], settings: Settings) -> None:
        # Spawned, not forked: a child of a process that has used CUDA cannot use it.
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, settings), name=name, daemon=True)
        self._process.start()
        theirs.close()

    def tell(self, message: Any) -> None:
        """Gives it something to do."""
        try:
            self.connection.send(message)
        except OSError as error:
            raise RunError(f"the {self.name} process is gone (exit code {self._process.exitcode}): {error}") from error

    def hear(self, kind: type, timeout: float) -> Any:
        """Its next message, which must be of this kind."""
        if not self.connection.poll(timeout):
            raise RunError(f"the {self.name} process said nothing for {timeout:.0f} s while {kind.__name__} was due")
        return self.checked(self._received(), kind)

    def checked(self, message: Any, kind: type) -> Any:
        """The message, unless it is another."""
        if isinstance(message, Failed):
            raise RunError(f"the {self.name} process failed:\n{message.text}")
        if not isinstance(message, kind):
            raise RunError(f"the {self.name} process said {message} where {kind.__name__} was due")
        return message

    def received(self, kind: type) -> Any:
        """A message that is there already."""
        return self.checked(self._received(), kind)

    def end(self) -> None:
        """Hangs up and makes sure that it is gone."""
        self.connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _received(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(5)
            raise RunError(f"the {self.name} process died with exit code {self._process.exitcode}") from None


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request and what it was for."""

    request: Request
    is_warm_up: bool


@dataclasses.dataclass(frozen=True)
class Answered:
    """What became of a request on a path."""

    asked: Asked
    at: float
    """When the driver sent it."""
    sent: Sent
    received: Received


def main(arguments: list[str] | None = None) -> int:
    """0: every token as it should be; 1: one is not; 2: the run could not be made."""
    run = parse(arguments)
    settings = dataclasses.replace(run.settings, model=choose(run.settings))
    run = dataclasses.replace(run, settings=settings)
    print(f"kvtransfer {kvt.__version__}, Python {sys.version.split()[0]}, {settings}", flush=True)
    try:
        return _run(run)
    except RunError as error:
        print(f"FAILED: {error}", file=sys.stderr, flush=True)
        return 2


def _run(run: Run) -> int:
    settings = run.settings
    asked, controls = workload(run)
    with processes(settings) as (single, prefill, decode):
        ready = [process.hear(Ready, LOAD_S) for process in (single, prefill, decode)]
        for process, told in zip((single, prefill, decode), ready, strict=True):
            print(f"{process.name}: {told.model}, ready after {told.loaded_s:.1f} s", flush=True)
        if len({told.weights for told in ready}) != 1:
            raise RunError("the processes drew different weights; their tokens cannot be compared")
        truth = {}
        for one in [*asked, *controls]:
            single.tell(one.request)
            generated = single.hear(Generated, settings.timeout)
            truth[one.request.room] = generated
        print(f"single: {len(truth)} prompts answered", flush=True)
        outcomes = []
        for path in run.paths:
            opened = open_path(prefill, decode, path, settings.timeout)
            print(f"\n--path {path}: {opened.path}{f' ({opened.reason})' if opened.reason else ''}", flush=True)
            started = time.monotonic()
            answered = list(exchange(prefill, decode, asked, run.in_flight, settings.timeout))
            took = time.monotonic() - started
            lost = list(exchange(prefill, decode, controls, run.in_flight, settings.timeout))
            for process in (prefill, decode):
                process.tell(Close())
                process.hear(Closed, settings.timeout)
            outcome = report.Outcome(path, opened.path, answered, lost, truth, took)
            print("\n".join(report.rows(outcome)), flush=True)
            outcomes.append(outcome)
    if run.json:
        with open(run.json, "w", encoding="utf-8") as file:
            json.dump([report.plain(outcome) for outcome in outcomes], file, indent=1)
    print("\n" + "\n".join(report.table(outcomes)), flush=True)
    return 0 if all(outcome.is_right() for outcome in outcomes) else 1


def workload(run: Run) -> tuple[list[Asked], list[Asked]]:
    """The prompts with the warm-ups in front, and the controls, which have pages enough to lose one."""
    settings, page = run.settings, run.settings.page_size
    warm_ups = [min(length, run.longest) for length in ([settings.chunk + page, 3 * page] * run.warm_ups)[: run.warm_ups]]
    wanted = lengths(run.prompts, run.longest, page, settings.chunk, settings.seed)
    controls = [min(length, run.longest) for length in range(3 * page, (3 + run.controls) * page, page)]
    asked = []
    for number, length in enumerate([*warm_ups, *wanted, *controls]):
        is_control = number >= len(warm_ups) + len(wanted)
        request = Request(1 + number, prompt(settings, number, length), settings.new_tokens, is_control)
        asked.append(Asked(request, is_warm_up=number < len(warm_ups)))
    return asked[: len(warm_ups) + len(wanted)], asked[len(warm_ups) + len(wanted) :]


@contextlib.contextmanager
def processes(settings: Settings) -> Iterator[tuple[Process, Process, Process]]:
    """The three workers, loading side by side; gone when the block is left."""
    started: list[Process] = []
    try:
        for name, target in (("single", workers.run_single), ("prefill", workers.run_prefill), ("decode", workers.run_decode)):
            started.append(Process(name, target, settings))
        yield started[0], started[1], started[2]
    finally:
        for process in reversed(started):
            process.end()


def open_path(prefill: Process, decode: Process, path: str, timeout: float) -> Opened:
    """An engine on each side, connected; what decode says of the way between them."""
    prefill.tell(Open(path))
    listening = prefill.hear(Opened, timeout)
    decode.tell(Open(path, listening.address))
    connected: Opened = decode.hear(Opened, timeout)
    return connected


def exchange(prefill: Process, decode: Process, asked: list[Asked], in_flight: int, timeout: float) -> Iterator[Answered]:
    """Sends requests to both sides, so many at a time, and gives each with both sides' answers."""
    waiting = list(reversed(asked))
    live: dict[int, tuple[Asked, float]] = {}
    sent: dict[int, Sent] = {}
    received: dict[int, Received] = {}
    while waiting or live:
        while waiting and len(live) < in_flight:
            one = waiting.pop()
            live[one.request.room] = (one, time.monotonic())
            for process in (decode, prefill):
                process.tell(one.request)
        ready = wait([prefill.connection, decode.connection], timeout)
        if not ready:
            raise RunError(f"nothing was heard for {timeout:.0f} s of rooms {sorted(live)}")
        if prefill.connection in ready:
            answer = prefill.received(Sent)
            sent[answer.room] = answer
        if decode.connection in ready:
            answer = decode.received(Received)
            received[answer.room] = answer
        for room in [room for room in live if room in sent and room in received]:
            one, at = live.pop(room)
            yield Answered(one, at, sent.pop(room), received.pop(room))
