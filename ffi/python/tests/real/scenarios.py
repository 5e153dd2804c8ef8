"""What is asked of the pair. Every scenario returns rows for the table; one that does not hold raises."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from typing import Awaitable, Callable

from client import Answer, ask, post, prompt, series
from servers import CHUNK, HOST, Pair

# What was asked and what was seen, in a sentence each.
Row = tuple[str, str]
# Longest that a request may outlive a peer that says nothing: the bound on silence (5 s) and the heartbeats before it.
SILENCE_S = 12.0
CONCURRENT = 8


class NotHeldError(AssertionError):
    """A scenario did not hold."""


def holds(condition: bool, sentence: str) -> None:
    if not condition:
        raise NotHeldError(sentence)


def leg(pair: Pair) -> dict[str, object]:
    """The fields by which a router couples the two legs of a request."""
    return {"bootstrap_host": HOST, "bootstrap_port": pair.bootstrap_port, "bootstrap_room": random.randrange(1 << 62)}


async def plainly(pair: Pair, tokens: list[int], new: int = 12) -> Answer:
    """The plain server's answer, which must be one."""
    with pair.plain.thawed():
        answer = await ask(pair.plain.url, tokens, new)
    holds(answer.error is None and len(answer.tokens) == new, f"the plain server failed: {answer}")
    return answer


async def both(pair: Pair, tokens: list[int], new: int = 12) -> tuple[Answer, Answer]:
    """The plain server's answer and the pair's."""
    plain = await plainly(pair, tokens, new)
    moved = await ask(pair.router.url, tokens, new)
    holds(moved.error is None, f"{len(tokens)} tokens through the pair: {moved.error}")
    holds(plain.tokens == moved.tokens, f"{len(tokens)} tokens: {moved.tokens} instead of {plain.tokens}")
    return plain, moved


async def serves(pair: Pair, number: int, patience: float = 0.0) -> str:
    """The pair answers as the plain server does, a short and a chunked prompt."""
    deadline = time.monotonic() + patience
    while True:
        try:
            for length in (33, 2 * CHUNK + 44):
                await both(pair, prompt(length, 1000 + number))
            return "the pair serves: equal tokens, short and chunked"
        except NotHeldError:
            # Until the router has noticed that a server is back, it may refuse.
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.5)


async def short(pair: Pair) -> list[Row]:
    seen = [await both(pair, prompt(length, number)) for number, length in enumerate((1, 2, 7, 31, 64, CHUNK))]
    slowest = max(moved.seconds for _, moved in seen)
    return [("prompts of 1, 2, 7, 31, 64 and 128 tokens", f"equal tokens, 6 of 6; slowest {slowest * 1e3:.0f} ms")]


async def chunked(pair: Pair) -> list[Row]:
    lengths = (CHUNK + 1, 300, 1000, 3000)
    seen = [await both(pair, prompt(length, number)) for number, length in enumerate(lengths)]
    counts = ", ".join(str(-(-length // CHUNK)) for length in lengths)
    slowest = max(moved.seconds for _, moved in seen)
    return [(f"prompts of 129, 300, 1000 and 3000 tokens ({counts} chunks)", f"equal tokens, 4 of 4; slowest {slowest * 1e3:.0f} ms")]


async def depends(pair: Pair) -> list[Row]:
    """The comparison sees lost KV: another first quarter of the prompt, computed in an earlier chunk, gives other tokens."""
    differing = 0
    for number in range(4):
        tokens = prompt(300, 50 + number)
        other = prompt(75, 90 + number) + tokens[75:]
        differing += (await plainly(pair, tokens)).tokens != (await plainly(pair, other)).tokens
    holds(differing == 4, f"the tokens depend on the whole prompt in {differing} of 4 cases only")
    return [("control: another first quarter of a 300-token prompt", "other tokens, 4 of 4: the comparison sees KV of every chunk")]


async def concurrent(pair: Pair) -> list[Row]:
    lengths = [random.Random(number).randrange(5, 700) for number in range(3 * CONCURRENT)]
    wanted = [await plainly(pair, prompt(length, 200 + at)) for at, length in enumerate(lengths)]
    begin = time.monotonic()
    answers: list[Answer] = []
    for first in range(0, len(lengths), CONCURRENT):
        places = range(first, first + CONCURRENT)
        answers += await asyncio.gather(*(ask(pair.router.url, prompt(lengths[at], 200 + at)) for at in places))
    seconds = time.monotonic() - begin
    for plain, moved, length in zip(wanted, answers, lengths):
        holds(moved.error is None, f"{length} tokens, 8 at a time: {moved.error}")
        holds(plain.tokens == moved.tokens, f"{length} tokens, 8 at a time: {moved.tokens} instead of {plain.tokens}")
    return [("8 requests at a time, 5 to 700 tokens, three times", f"equal tokens, 24 of 24; {len(answers) / seconds:.1f} requests/s")]


async def aborted(pair: Pair) -> list[Row]:
    rows = []
    # In the middle of its answer, by its client's own word.
    started = asyncio.Event()
    running = asyncio.create_task(ask(pair.router.url, prompt(200, 300), 4000, started, rid="aborted-late"))
    await asyncio.wait_for(started.wait(), 30)
    holds(await post(pair.decode.url, "/abort_request", {"rid": "aborted-late"}) == 200, "decode refused the abort")
    answer = await asyncio.wait_for(running, 30)
    holds(answer.error is not None, "an aborted request ended as if it had not been")
    rows.append(("aborted while it answers", f"{answer.error!r}"))
    # On decode, which has granted its pages and waits for a prefill that never comes.
    rows.append(("aborted on decode, which waits for prefill", await abort_one(pair.decode.url, leg(pair), "aborted-decode")))
    # On prefill, which waits for pages that decode never grants.
    rows.append(("aborted on prefill, which waits for decode", await abort_one(pair.prefill.url, leg(pair), "aborted-prefill")))
    # On decode, with prefill's leg there but its server stopped: prefill learns of it when it goes on.
    room = leg(pair)
    pair.prefill.signal(signal.SIGSTOP)
    other = asyncio.create_task(ask(pair.prefill.url, prompt(200, 303), rid="other-leg", **room))
    text = await abort_one(pair.decode.url, room, "aborted-first")
    pair.prefill.signal(signal.SIGCONT)
    answer = await asyncio.wait_for(other, 40)
    holds(answer.error is not None, "prefill's leg of an aborted request ended well")
    rows.append(("aborted on decode before prefill saw it", f"decode: {text}; prefill: {answer.error!r} after {answer.seconds:.1f} s"))
    rows.append(("after the aborts", await serves(pair, 1, 10)))
    return rows


async def abort_one(url: str, room: dict[str, object], name: str) -> str:
    running = asyncio.create_task(ask(url, prompt(150, 302), rid=name, **room))
    await asyncio.sleep(1.5)
    holds(not running.done(), f"{name} ended by itself")
    begin = time.monotonic()
    await post(url, "/abort_request", {"rid": name})
    answer = await asyncio.wait_for(running, 20)
    holds(answer.error is not None, f"{name} ended as if it had not been aborted")
    return f"{answer.error!r}, {(time.monotonic() - begin) * 1e3:.0f} ms after the abort"


async def killed(pair: Pair) -> list[Row]:
    granted = asyncio.create_task(ask(pair.decode.url, prompt(150, 310), **leg(pair)))
    await asyncio.sleep(1.5)
    pair.prefill.signal(signal.SIGSTOP)
    routed = asyncio.create_task(ask(pair.router.url, prompt(500, 311)))
    await asyncio.sleep(0.3)
    holds(not granted.done() and not routed.done(), "the requests in flight ended before the kill")
    begin = time.monotonic()
    pair.prefill.kill()
    lost = await asyncio.wait_for(granted, SILENCE_S)
    rows = [("prefill killed, a request waits on decode", f"{lost.error!r} after {time.monotonic() - begin:.1f} s")]
    holds(lost.error is not None and "lost the peer" in lost.error, f"it ended with {lost.error!r}")
    answer = await asyncio.wait_for(routed, 60)
    holds(answer.error is not None, "a request to a killed prefill server ended well")
    rows.append(("prefill killed, a request on its way to it", f"{answer.error!r} after {time.monotonic() - begin:.1f} s"))
    begin = time.monotonic()
    pair.prefill.start()
    await pair.prefill.up()
    up = time.monotonic() - begin
    rows.append(("prefill started again on its port", f"{await serves(pair, 2, 20)}; it took {up:.0f} s to start"))
    return rows


async def frozen(pair: Pair) -> list[Row]:
    granted = asyncio.create_task(ask(pair.decode.url, prompt(150, 320), **leg(pair)))
    await asyncio.sleep(1.5)
    begin = time.monotonic()
    pair.prefill.signal(signal.SIGSTOP)
    try:
        answer = await asyncio.wait_for(granted, SILENCE_S)
        seconds = time.monotonic() - begin
    finally:
        pair.prefill.signal(signal.SIGCONT)
    holds(answer.error is not None and "lost the peer" in answer.error, f"it ended with {answer.error!r}")
    rows = [("prefill frozen, a request waits on decode", f"{answer.error!r} after {seconds:.1f} s")]
    rows.append(("prefill thawed", await serves(pair, 3, 20)))
    pair.decode.signal(signal.SIGSTOP)
    running = asyncio.create_task(ask(pair.router.url, prompt(400, 321)))
    await asyncio.sleep(7)
    pair.decode.signal(signal.SIGCONT)
    answer = await asyncio.wait_for(running, 60)
    ended = f"{answer.error!r}" if answer.error else f"{len(answer.tokens)} tokens"
    rows.append(("decode frozen for 7 s under a request", f"it ended after {answer.seconds:.1f} s: {ended}"))
    rows.append(("decode thawed", await serves(pair, 4, 20)))
    return rows


async def counted(pair: Pair) -> list[Row]:
    """What the backend says of itself: Prometheus series beside SGLang's own, and the telemetry ports."""
    rows = []
    # The series are published once in 2 s.
    await asyncio.sleep(2.5)
    for server in (pair.prefill, pair.decode):
        ended = await series(server.url, "kvtransfer_transfers_total")
        moved = sum((await series(server.url, "kvtransfer_bytes_total")).values())
        by = {labels.split('outcome="')[1].split('"')[0]: int(value) for labels, value in ended.items()}
        holds(by.get("success", 0) > 0 and moved > 0, f"{server.name} counts {by} and {moved} bytes")
        rows.append((f"{server.name}'s Prometheus series", f"transfers {by}, {moved / 2**20:.1f} MiB"))
    for name, port in zip(("prefill", "decode"), pair.telemetry):
        reader, writer = await asyncio.wait_for(asyncio.open_connection(HOST, port), 5)
        # HTTP/2's preface and empty settings; a gRPC server answers with its own settings, a frame of type 4.
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
        head = await asyncio.wait_for(reader.readexactly(9), 5)
        writer.close()
        holds(head[3] == 4, f"{name}'s telemetry port answered {head!r}")
        rows.append((f"{name}'s telemetry port", "answers as a gRPC server does"))
    return rows


SCENARIOS: tuple[tuple[str, Callable[[Pair], Awaitable[list[Row]]]], ...] = (
    ("control", depends), ("short", short), ("chunked", chunked), ("concurrent", concurrent), ("aborted", aborted),
    ("frozen", frozen), ("counted", counted), ("killed", killed), ("afterwards", concurrent),
)  # fmt: skip
