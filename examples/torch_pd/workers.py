"""The three processes: prefill, decode, and the single one that does both and whose tokens are the truth.

All that a worker needs of kvtransfer is here: an `Engine` over its pool, `connect`, and one `Transfer` per request on each
side. Decode grants pages with `receive`, prefill fills them chunk by chunk with `push`, and both learn of the same end.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any, Callable

import kvtransfer as kvt
import numpy as np
from kvtransfer import log

from .jobs import Jobs
from .messages import Close, Closed, Failed, Generated, Open, Opened, Ready, Received, Request, Sent
from .model import Model, load
from .pages import PageBook, Rows, engine_config, layout
from .settings import Settings, pages_of


class Worker:
    """What prefill and decode have in common: a model, its pool, an engine at a time, a pipe to the driver."""

    def __init__(self, connection: Connection, settings: Settings, gpu: int) -> None:
        self.settings = settings
        self._connection = connection
        self._sending = threading.Lock()
        started = time.monotonic()
        self.model: Model = load(settings, gpu)
        self.model.warm_up()
        self.book = PageBook(settings.pages, settings.seed + gpu)
        self.rows = Rows()
        self.engine: kvt.Engine | None = None
        self.gpu = gpu if settings.device == "cuda" else None
        self.tell(Ready(self.model.name, self.model.weights_sum(), time.monotonic() - started))

    def tell(self, message: Any) -> None:
        """Any thread may."""
        with self._sending:
            self._connection.send(message)

    def failed(self, error: BaseException) -> None:
        """For threads whose exception nobody would see."""
        self.tell(Failed("".join(traceback.format_exception(error))))

    def serve(self, handlers: dict[type, Callable[[Any], None]]) -> None:
        """Does what the driver says until it hangs up."""
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, ConnectionError):
                return  # it is gone; so are we
            handlers[type(message)](message)

    def open(self, path: str, listens: bool) -> kvt.Engine:
        """Starts an engine over the pool. Every page must be quiet: decode's peer may write at any time from now on."""
        assert self.engine is None, "the driver closes an engine before it opens the next"
        model, settings = self.model, self.settings
        described = layout(settings, model.addresses(), model.dtype, model.item_bytes, self.gpu, self.rows)
        config = engine_config(path, settings.copy_percent)
        if listens:
            config["listen"] = "127.0.0.1:0"
        self.engine = kvt.Engine(described, config)
        return self.engine

    def close(self, _message: Close) -> None:
        """Ends the engine. After `Engine.close` nothing touches the pool any more."""
        assert self.engine is not None, "the driver opened it"
        self.engine.close()
        self.engine = None
        self.tell(Closed())


class Prefill(Worker):
    """Computes prompts in chunks; each chunk's pages leave as soon as its kernels are done, while the next is computed."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        super().__init__(connection, settings, settings.prefill_gpu)
        # Two threads: one waits for kernels, one for the ends of transfers, so that a slow end delays no other's chunks.
        self._pushes = Jobs("push", self.failed)
        self._ends = Jobs("ends", self.failed)

    def start(self, message: Open) -> None:
        """The listening side. A decode process connects to it."""
        engine = self.open(message.path, listens=True)
        self.tell(Opened(address=f"127.0.0.1:{engine.listen_port}"))

    def request(self, request: Request) -> None:
        """Launches a prompt's chunks. Returns when the last is launched, not when it is done."""
        assert self.engine is not None, "requests come after Open"
        settings, started, length = self.settings, time.monotonic(), len(request.tokens)
        pages = self.book.take(pages_of(length, settings.page_size), settings.timeout)
        slot = int(self.rows.free.take(1, settings.timeout)[0])
        sending = self.engine.send(request.room, settings.timeout)
        sequence = self.model.sequence(pages)
        tokens = self.model.tokens(request.tokens)
        for at in range(0, length, settings.chunk):
            end = min(at + settings.chunk, length)
            step = self.model.extend(sequence, tokens[at:end])
            chunk = pages[at // settings.page_size : pages_of(end, settings.page_size)]
            if end < length:
                self._pushes.put(functools.partial(self._push, sending, step, chunk))
            else:
                self._pushes.put(functools.partial(self._push_last, sending, step, chunk, request, slot, pages, started))

    def _push(self, sending: kvt.Transfer, step: Any, pages: np.ndarray) -> None:
        """A chunk, on a thread that may wait. `wait_ready`: decode may not have granted its pages yet."""
        step.wait()  # for the chunk's CUDA event: the pages hold what they should
        if not sending.wait_ready(self.settings.timeout):
            raise TimeoutError(f"room {sending.room}: decode granted no pages within {self.settings.timeout} s")
        sending.push([pages])

    def _push_last(
        self, sending: kvt.Transfer, step: Any, chunk: np.ndarray, request: Request, slot: int, pages: np.ndarray, started: float
    ) -> None:
        step.wait()
        computed = time.monotonic()
        length = len(request.tokens)
        self.rows.write(slot, step.token(), request.room, length)
        if not sending.wait_ready(self.settings.timeout):
            raise TimeoutError(f"room {sending.room}: decode granted no pages within {self.settings.timeout} s")
        # One list per component of the layout: pages, and the metadata row, which arrives after them.
        sending.push([chunk, [slot]], last=True)
        # For the report: how much of the earlier chunks decode has confirmed by now. Asked after the push, to delay nothing.
        earlier = (len(pages) - len(chunk)) * self.model.item_bytes * 2 * self.settings.shape.layers
        early = min(self._confirmed(request.room), earlier)
        chunks = -(-length // self.settings.chunk)
        self._ends.put(lambda: self._end(sending, request, slot, pages, (started, computed, chunks, early)))

    def _confirmed(self, room: int) -> int:
        assert self.engine is not None, "its transfer is live"
        return next((told["bytes"] for told in self.engine.info()["rooms"] if told["room"] == room), 0)

    def _end(
        self, sending: kvt.Transfer, request: Request, slot: int, pages: np.ndarray, told: tuple[float, float, int, int]
    ) -> None:
        """Waits for decode's confirmation. Only now may the pages be used again."""
        with sending:
            outcome = sending.result(self.settings.timeout)
        started, computed, chunks, early = told
        digest = self.model.digest(pages, len(request.tokens))
        self.book.give(pages)
        self.rows.free.give([slot])
        self.tell(Sent(request.room, started, computed, chunks, outcome.bytes, early, digest))


class Decode(Worker):
    """Grants pages, waits for them to be filled, and goes on from the first token."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        super().__init__(connection, settings, settings.decode_gpu)
        self._peer = 0
        # Requests that come while another is generated get their grants at once: prefill never waits for decode's model.
        self._generations = Jobs("generate", self.failed)

    def start(self, message: Open) -> None:
        """The dialling side."""
        engine = self.open(message.path, listens=False)
        self._peer = engine.connect(message.address, self.settings.timeout)
        [peer] = engine.info()["peers"]
        self.tell(Opened(path=peer["path"], reason=peer["path_reason"]))

    def request(self, request: Request) -> None:
        """Grants pages for the prompt. From here on prefill may write to them, whatever this process does."""
        assert self.engine is not None, "requests come after Open"
        settings, length = self.settings, len(request.tokens)
        pages = self.book.take(pages_of(length + request.new_tokens, settings.page_size), settings.timeout)
        slot = int(self.rows.free.take(1, settings.timeout)[0])
        granted = pages[: pages_of(length, settings.page_size)]
        receiving = self.engine.receive(request.room, [kvt.Source(self._peer)], [granted, [slot]], settings.timeout)
        at = time.monotonic()
        self._generations.put(lambda: self._generate(receiving, request, pages, slot, at))

    def _generate(self, receiving: kvt.Transfer, request: Request, pages: np.ndarray, slot: int, granted: float) -> None:
        length = len(request.tokens)
        with receiving:
            outcome = receiving.result(self.settings.timeout)
        first = self.rows.read(slot, request.room, length)
        arrived = time.monotonic()
        if request.is_control:
            self.model.lose(pages[pages_of(length, self.settings.page_size) // 2])
        sequence = self.model.sequence(pages, length)
        tokens, second = generate(self.model, sequence, first, request.new_tokens)
        digest = self.model.digest(pages, length)
        # Pages that a request left behind must not be able to help the next: they hold no numbers until they are filled.
        # `poison` waits for its kernels; a page that is given back may be granted, and written to by a peer, at once.
        self.model.poison(pages)
        self.book.give(pages)
        self.rows.free.give([slot])
        self.tell(Received(request.room, tokens, granted, arrived, second, outcome.waited_s, outcome.moving_s, digest))


def generate(model: Model, sequence: Any, first: int, count: int) -> tuple[list[int], float]:
    """`count` greedy tokens of which the first is known already, and when the second was."""
    answer, tokens, second = [first], model.tokens(np.array([first])), 0.0
    while len(answer) < count:
        step = model.extend(sequence, tokens)
        step.wait()
        answer.append(step.token())
        tokens = step.tokens
        second = second or time.monotonic()
    return answer, second


def run_prefill(connection: Connection, settings: Settings) -> None:
    """The prefill process, to its end."""
    _run(connection, lambda: Prefill(connection, settings), _pair_handlers)


def run_decode(connection: Connection, settings: Settings) -> None:
    """The decode process, to its end."""
    _run(connection, lambda: Decode(connection, settings), _pair_handlers)


def _pair_handlers(worker: Any) -> dict[type, Callable[[Any], None]]:
    return {Open: worker.start, Request: worker.request, Close: worker.close}


def run_single(connection: Connection, settings: Settings) -> None:
    """One process that computes and goes on by itself, in the same chunks, without kvtransfer: what the pair must equal."""

    def answer(worker: Worker, request: Request) -> None:
        started, length = time.monotonic(), len(request.tokens)
        pages = worker.book.take(pages_of(length + request.new_tokens, settings.page_size), settings.timeout)
        sequence = worker.model.sequence(pages)
        tokens = worker.model.tokens(request.tokens)
        for at in range(0, length, settings.chunk):
            step = worker.model.extend(sequence, tokens[at : at + settings.chunk])
        step.wait()
        first, known = step.token(), time.monotonic()
        answered, second = generate(worker.model, sequence, first, request.new_tokens)
        worker.book.give(pages)
        worker.tell(Generated(request.room, answered, started, known, second))

    _run(
        connection,
        lambda: Worker(connection, settings, settings.prefill_gpu),
        lambda worker: {Request: lambda request: answer(worker, request)},
    )


def _run(connection: Connection, make: Callable[[], Any], handlers: Callable[[Any], dict[type, Callable[[Any], None]]]) -> None:
    logging.basicConfig(format="%(processName)s: %(name)s: %(message)s")
    log.forward()
    try:
        worker = make()
        worker.serve(handlers(worker))
    except Exception:
        # To the driver, which ends everything; a traceback on three processes' stderr would be hard to read.
        with contextlib.suppress(OSError):
            connection.send(Failed(traceback.format_exc()))
