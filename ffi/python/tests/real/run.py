"""SGLang's own prefill and decode servers on this machine's CPU, over this backend, with kvrouter in front.

    run.sh [VERSION]        makes the environment, builds and installs the wheel, builds kvrouter, runs this

Prints a table of what was asked and what was seen; exits with 1 if anything did not hold. Every server's log stays in --out.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from scenarios import SCENARIOS, NotHeldError, Row
from servers import BootError, Pair

HERE = Path(__file__).resolve().parent


def checksum_flag() -> str:
    """Whether this release can compare digests of the KV, and whether a CPU can."""
    package = importlib.util.find_spec("sglang")
    assert package is not None and package.origin is not None
    arguments = Path(package.origin).parent / "srt" / "server_args.py"
    if "disaggregation_enable_kv_checksum" in arguments.read_text():
        return "this release has it (--disaggregation-enable-kv-checksum), as a CUDA kernel: it cannot run on a CPU"
    return "this release has none"


async def scenarios(pair: Pair, only: list[str]) -> tuple[list[tuple[str, Row]], int]:
    """Runs them one after another; what was seen, and how many did not hold."""
    rows: list[tuple[str, Row]] = []
    failed = 0
    for name, scenario in SCENARIOS:
        if only and name not in only:
            continue
        begin = time.monotonic()
        try:
            seen = await asyncio.wait_for(scenario(pair), 600)
        except (NotHeldError, BootError, asyncio.TimeoutError) as error:
            failed += 1
            seen = [("DID NOT HOLD", f"{type(error).__name__}: {error}")]
        rows += [(name, row) for row in seen]
        for what, how in seen:
            print(f"[{name}] {what}: {how}", flush=True)
        print(f"[{name}] {time.monotonic() - begin:.1f} s", flush=True)
        for server in pair.all:
            if server.process is not None and server.process.poll() is not None:
                print(f"[{name}] {server.name} ENDED; its log:\n{server.tail()}", flush=True)
                return rows, failed + 1
    return rows, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router", type=Path, required=True, help="the kvrouter binary")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the logs")
    parser.add_argument("--no-overlap", action="store_true", help="SGLang without its overlapped schedule, and with early sends")
    parser.add_argument("--only", default="", help="scenarios, separated by commas")
    parser.add_argument("--table", type=Path, help="where the table is written, as Markdown")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    model = asked.out / "model"
    if not (model / "model.safetensors").exists():
        subprocess.run([sys.executable, str(HERE / "model.py"), str(model)], check=True)
    pair = Pair(model, asked.out, asked.router.resolve(), not asked.no_overlap)
    begin = time.monotonic()
    # The servers are in sessions of their own: whatever ends this process must go through `finally`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        asyncio.run(pair.start())
        boot = time.monotonic() - begin
        print(f"all servers are up after {boot:.0f} s", flush=True)
        rows, failed = asyncio.run(scenarios(pair, [name for name in asked.only.split(",") if name]))
    finally:
        pair.stop()
    facts = [
        f"SGLang {version('sglang')}, torch {version('torch')}, kvtransfer {version('kvtransfer')}, Python {platform.python_version()}",
        f"{os.cpu_count()} CPU cores, no GPU, page size 1, {'no overlap, early sends' if asked.no_overlap else 'overlap'}; servers up after {boot:.0f} s; "
        f"{time.monotonic() - begin:.0f} s in all",
        f"SGLang's KV checksum: {checksum_flag()}",
    ]
    print("\n".join(facts), flush=True)
    if asked.table is not None:
        asked.table.write_text(table(facts, rows))
    print(f"{len(rows)} rows, {failed} scenarios did not hold", flush=True)
    return 1 if failed else 0


def table(facts: list[str], rows: list[tuple[str, Row]]) -> str:
    lines = [*(f"* {fact}" for fact in facts), "", "| scenario | asked | seen |", "| --- | --- | --- |"]
    lines += [f"| {name} | {what} | {how.replace('|', '/')} |" for name, (what, how) in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
