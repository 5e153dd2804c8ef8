"""One request after the other over TCP on loopback: SGLang's real managers for Mooncake, NIXL and this engine, in turns.

Each engine is a pair of processes with SGLang's own manager, sender and receiver classes over host memory, as a scheduler
drives them: handshake, granted pages, one send() of the whole request, polls until Success. All of them move the same two
pools. Before the timings every byte of every case is compared once per engine, and untouched pages are checked as well.
A plain program beside them moves the same ranges over bare sockets: the limit of the machine in the same minutes.

    KVTRANSFER_LIBRARY=.../libkvtransfer.so python rivals.py mla|mha [--rounds N] [--engines A,B] [--json FILE]

The environment is the one of tests/sglang_env.sh and for NIXL `pip install --no-deps nixl nixl-cu12` besides. The figures:
time from prefill's send() to Success at decode, and processor seconds of both processes per GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import numpy as np  # noqa: E402
from pools import Shape  # noqa: E402
from ranks import SUCCESS, WAITING, Rank, environment, free_port  # noqa: E402

PAGE = 64
LONGEST = 32_768
# Pages at random need more room than the request has.
LEAST = 16_384
# DeepSeek-V3 and Llama 3.1 8B in bfloat16: 2.1 GiB and 4 GiB for 32K tokens.
MODELS = {
    "mla": Shape(layers=61, heads=0, latent_bytes=1152, page_size=PAGE),
    "mha": Shape(layers=32, heads=8, head_bytes=256, page_size=PAGE),
}
MEANING = {"mla": "DeepSeek-V3: 61 layers of 1152 B per token", "mha": "Llama 3.1 8B: 32 layers, K and V of 8 heads of 256 B"}
# What each engine needs so that it moves all of this over TCP. Mooncake's own limits refuse a batch of 31 232 blocks.
SETTINGS = {
    "kvtransfer": {"KVTRANSFER_SAME_HOST": "off"},
    "mooncake": {
        "MC_FORCE_TCP": "1",
        "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
        "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": "65535",
        "MC_TCP_ADMISSION_TIMEOUT_MS": "600000",
    },
    "nixl": {"UCX_TLS": "tcp"},
}
PLAIN = {"plain 1": 1, "plain 2": 2}
SLOTS = (1, 2)


@dataclass(frozen=True)
class Case:
    tokens: int
    fragmented: bool

    @property
    def name(self) -> str:
        return f"{self.tokens // 1024}K {'fragmented' if self.fragmented else 'contiguous'}"

    def lists(self) -> tuple[list[int], list[int]]:
        """Source and target pages: in order, or both at random over the whole pool."""
        count = self.tokens // PAGE
        if not self.fragmented:
            return list(range(count)), list(range(count))
        random = np.random.default_rng(11)
        pool = max(LEAST, self.tokens) // PAGE
        return random.permutation(pool)[:count].tolist(), random.permutation(pool)[:count].tolist()


CASES = [Case(tokens, fragmented) for tokens in (8192, LONGEST) for fragmented in (False, True)]


class Engine:
    """A pair of ranks and its registry."""

    def __init__(self, name: str, shape: Shape, pools: tuple[str, str], stack: ExitStack) -> None:
        self.name = name
        self.room = 0
        port = free_port()
        extra = {**SETTINGS[name], "PYTHONPATH": os.pathsep.join(_paths())}
        self.registry, self.prefill, self.decode = (
            Rank(f"{name}-{role}", extra, HERE / "rival_process.py") for role in ("registry", "prefill", "decode")
        )
        for rank in (self.registry, self.prefill, self.decode):
            stack.callback(rank.stop)
        common = {"backend": name, "bootstrap_port": port}
        self.registry.start(role="registry", **common)
        self.registry.finish()
        self.prefill.start(role="prefill", shape=asdict(shape), pool=pools[0], **common)
        self.decode.start(role="decode", shape=asdict(shape), pool=pools[1], **common)
        self.prefill.finish()
        self.decode.finish()

    def move(self, source: list[int], target: list[int]) -> dict[str, float]:
        """One request."""
        self.room += 1
        room, prefill, decode = self.room, self.prefill, self.decode
        prefill.ask("open", room=room)
        decode.call("open", room=room)
        prefill.finish()
        decode.until(room, WAITING)
        decode.call("grant", room=room, pages=target, slot=SLOTS[1])
        prefill.until(room, WAITING)
        prefill.call("begin", room=room, pages=len(source), slot=SLOTS[0])
        decode.ask("arrive", room=room, slot=SLOTS[1])
        prefill.ask("go", room=room, pages=source, slot=SLOTS[0])
        sent, arrived = prefill.finish(120), decode.finish(120)
        if sent["state"] != SUCCESS or arrived["state"] != SUCCESS or not arrived["aux"]:
            why = [rank.call("failure", room=room) for rank in (prefill, decode)]
            raise AssertionError(f"{self.name}: {sent}, {arrived}: {why}\n{prefill.tail()}\n{decode.tail()}")
        for rank in (prefill, decode):
            rank.call("clear", room=room)
        return {"s": arrived["ended"] - sent["started"], "cpu_s": sent["cpu_s"] + arrived["cpu_s"],
                "prefill_cpu_s": sent["cpu_s"], "send_s": sent["send_s"]}  # fmt: skip


class Plain:
    """The plain program."""

    def __init__(self, name: str, shape: Shape, pools: tuple[str, str], stack: ExitStack) -> None:
        self.name = name
        port = free_port()
        self.prefill, self.decode = (Rank(f"plain-{role}", {}, HERE / "rival_process.py") for role in ("prefill", "decode"))
        for rank in (self.prefill, self.decode):
            stack.callback(rank.stop)
        common = {"backend": "plain", "port": port, "shape": asdict(shape), "connections": PLAIN[name]}
        self.prefill.start(role="prefill", pool=pools[0], **common)
        self.prefill.finish()
        self.decode.start(role="decode", pool=pools[1], **common)
        self.decode.finish()
        self.prefill.call("accept", connections=PLAIN[name])

    def move(self, source: list[int], target: list[int]) -> dict[str, float]:
        for rank in (self.prefill, self.decode):
            rank.call("prepare", source=source, target=target)
        self.decode.ask("arrive")
        self.prefill.ask("go")
        sent, arrived = self.prefill.finish(120), self.decode.finish(120)
        return {"s": arrived["ended"] - sent["started"], "cpu_s": sent["cpu_s"] + arrived["cpu_s"],
                "prefill_cpu_s": sent["cpu_s"], "send_s": 0.0}  # fmt: skip


def _paths() -> list[str]:
    """Where the processes find modules: as the tests do, and what this process was given."""
    return [part for part in (environment({})["PYTHONPATH"], os.environ.get("PYTHONPATH", "")) if part]


def shared_memory(size: int, stack: ExitStack) -> str:
    """A file without a name that children can open."""
    file = os.memfd_create("pool")
    stack.callback(os.close, file)
    os.ftruncate(file, size)
    return f"/proc/{os.getpid()}/fd/{file}"


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def request_bytes(shape: Shape, tokens: int) -> int:
    return tokens * shape.layers * (shape.latent_bytes or 2 * shape.heads * shape.head_bytes)


def verify(engine: Any, case: Case) -> None:
    """Moves the case into poisoned pages and compares all of them."""
    source, target = case.lists()
    engine.decode.call("poison")
    engine.move(source, target)
    engine.decode.ask("differing", source=source, target=target)
    wrong = engine.decode.finish(120)["pages"]
    if wrong:
        raise AssertionError(f"{engine.name}: {wrong} pages of {case.name} are wrong")


def compare(model: str, names: list[str], cases: list[Case], rounds: int, seconds: float = 3600.0) -> list[dict[str, Any]]:
    """All engines of one model in turns; the first of a round changes every time. No round begins after `seconds`."""
    begun = time.monotonic()
    tokens = max(LEAST, *(case.tokens for case in cases), 0)
    shape = replace(MODELS[model], pages=tokens // PAGE)
    size = request_bytes(shape, tokens)
    with ExitStack() as stack:
        pools = (shared_memory(size, stack), shared_memory(size, stack))
        made = [(Plain if name in PLAIN else Engine)(name, shape, pools, stack) for name in names]
        made[0].prefill.ask("fill")
        made[0].prefill.finish(120)
        for case in cases:
            for engine in made:
                started = time.monotonic()
                verify(engine, case)
                print(f"{model} {case.name} {engine.name}: every byte is right ({time.monotonic() - started:.1f} s)", file=sys.stderr)
        found: dict[tuple[str, str], list[dict[str, float]]] = {}
        for number in range(rounds):
            if number and time.monotonic() - begun > seconds:
                break
            for case in cases:
                source, target = case.lists()
                for place in range(len(made)):
                    engine = made[(place + number) % len(made)]
                    sample = engine.move(source, target)
                    found.setdefault((case.name, engine.name), []).append(sample)
                    print(f"{number} {case.name} {engine.name}: {sample['s'] * 1e3:.0f} ms, {sample['cpu_s']:.2f} CPU-s", file=sys.stderr)
    rows = []
    for case in cases:
        gib = request_bytes(shape, case.tokens) / 2**30
        for name in names:
            samples = found[(case.name, name)]
            times = [sample["s"] for sample in samples]
            rows.append({
                "model": model, "case": case.name, "engine": name, "gib": gib, "rounds": len(samples),
                "p50_ms": median(times) * 1e3, "p99_ms": percentile(times, 0.99) * 1e3,
                "gb_per_s": gib * 2**30 / median(times) / 1e9,
                "cpu_s_per_gib": median(sample["cpu_s"] for sample in samples) / gib,
                "prefill_cpu_s_per_gib": median(sample["prefill_cpu_s"] for sample in samples) / gib,
                "send_us": median(sample["send_s"] for sample in samples) * 1e6,
            })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> None:
    print("| model | request | engine | p50 ms | p99 ms | GB/s | CPU-s per GiB (prefill) |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['model']} | {row['case']}, {row['gib']:.2f} GiB | {row['engine']} | {row['p50_ms']:.0f} | {row['p99_ms']:.0f} "
              f"| {row['gb_per_s']:.2f} | {row['cpu_s_per_gib']:.2f} ({row['prefill_cpu_s_per_gib']:.2f}) |")  # fmt: skip
    for case in dict.fromkeys(row["case"] for row in rows):
        of = {row["engine"]: row for row in rows if row["case"] == case}
        others = [row for name, row in of.items() if name not in PLAIN and name != "kvtransfer"]
        if "kvtransfer" in of and others:
            time_ratio = min(row["p50_ms"] for row in others) / of["kvtransfer"]["p50_ms"]
            cpu_ratio = of["kvtransfer"]["cpu_s_per_gib"] / min(row["cpu_s_per_gib"] for row in others)
            print(f"{case}: {time_ratio:.2f} times as fast as the faster rival, {cpu_ratio:.2f} of the thriftier one's processor time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3600.0, help="no round begins later than this")
    parser.add_argument("--engines", default="kvtransfer,mooncake,nixl,plain 1,plain 2")
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--json", type=Path, help="one object per line")
    chosen = parser.parse_args()
    cases = [case for case in CASES if case.name in chosen.cases.split(",")]
    rows = compare(chosen.model, chosen.engines.split(","), cases, chosen.rounds, chosen.seconds)
    table(rows)
    if chosen.json:
        chosen.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
