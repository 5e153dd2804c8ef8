"""A client of SGLang's `/generate`: token numbers in, token numbers out, and the server's own words when it fails."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from model import VOCABULARY

# A request that has not ended by then has no end: the bounds set for the servers are 60 s.
ANSWER_S = 120.0


@dataclass
class Answer:
    """How a request ended."""

    tokens: list[int] = field(default_factory=list)
    # The reason, if it did not end well; None if it did.
    error: str | None = None
    seconds: float = 0.0
    first_token_s: float | None = None


def prompt(length: int, number: int) -> list[int]:
    """A prompt that no other number has."""
    dice = random.Random(f"{length}/{number}")
    return [dice.randrange(3, VOCABULARY) for _ in range(length)]


async def ask(url: str, tokens: list[int], new: int = 12, started: asyncio.Event | None = None, **more: Any) -> Answer:
    """One streamed request. `started` is set with the first token."""
    body = {
        "input_ids": tokens, "stream": True, "sampling_params": {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}, **more
    }  # fmt: skip
    begin = time.monotonic()
    answer = Answer()
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.post(f"{url}/generate", json=body) as response:
            if response.status != 200:
                answer.error = f"HTTP {response.status}: {(await response.text())[:400]}"
            async for line in response.content:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    take(answer, json.loads(line[6:]))
                    if answer.tokens and answer.first_token_s is None:
                        answer.first_token_s = time.monotonic() - begin
                        if started is not None:
                            started.set()
    except asyncio.TimeoutError:
        answer.error = f"no end within {ANSWER_S:.0f} s"
    except aiohttp.ClientError as error:
        answer.error = answer.error or f"the connection ended: {error!r}"
    answer.seconds = time.monotonic() - begin
    return answer


def take(answer: Answer, event: dict[str, Any]) -> None:
    """Adds one event of the stream; releases differ in whether each repeats the tokens before it."""
    if "error" in event:
        answer.error = str(event["error"].get("message", event["error"]))[:400]
        return
    new = event.get("output_ids") or []
    answer.tokens = new if new[: len(answer.tokens)] == answer.tokens else answer.tokens + new
    finish = (event.get("meta_info") or {}).get("finish_reason") or {}
    if finish.get("type") == "abort":
        answer.error = str(finish.get("message") or finish)[:400]


async def post(url: str, path: str, body: dict[str, Any]) -> int:
    """A control request; the status."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        async with session.post(url + path, json=body) as response:
            return response.status


async def series(url: str, name: str) -> dict[str, float]:
    """The Prometheus series of a name, by their labels."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        async with session.get(f"{url}/metrics") as response:
            lines = (await response.text()).splitlines()
    found = (line.rpartition(" ") for line in lines if line.startswith((f"{name}{{", f"{name} ")))
    return {labels: float(value) for labels, _, value in found}
