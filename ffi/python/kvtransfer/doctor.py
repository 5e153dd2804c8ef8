"""`python -m kvtransfer.doctor`: what this host offers for KV transfers, what is wrong with it, and the fix for each.

The last line on standard output is the report as JSON with `--json`; otherwise one finding per line. Ends with 1 if something
must be mended first.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib import metadata
from typing import Any, TextIO

from ._native import ABI_VERSION, ffi, lib, taken, version
from .errors import KvtError


def report(devices: str = "", peer: str = "") -> dict[str, Any]:
    """The library's report on this host, with this package's own facts under `python`.

    `devices`: as SGLang's `--disaggregation-ib-device`; empty: all. `peer`: "host:port" of a `kvtransfer doctor --serve` on
    another host, to measure the path to it. Waits without the GIL. Raises `PeerError`, `MisuseError`.
    """
    options = {name: value for name, value in (("devices", devices), ("peer", peer)) if value}
    text = json.dumps(options).encode()
    found = dict(json.loads(taken(lambda place: lib.kvt_doctor_json(text, len(text), place, ffi.NULL))))
    found["python"] = {
        "python": platform.python_version(),
        "library": version(),
        "abi": ABI_VERSION,
        "sglang": _sglang(),
    }
    return found


def _sglang() -> dict[str, Any]:
    from .sglang import releases

    try:
        installed = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return {"installed": None}
    names = [point.value for point in metadata.entry_points(group="sglang.srt.plugins") if point.name == "kvtransfer"]
    return {"installed": installed, "refusal": releases.refusal(installed), "entry_points": names}


def show(found: dict[str, Any], out: TextIO) -> bool:
    """Writes the report for people; whether nothing must be mended."""
    python = found["python"]
    out.write(f"kvtransfer {python['library']} (ABI {python['abi']}), Python {python['python']}\n")
    sglang = python["sglang"]
    if sglang["installed"]:
        out.write(f"sglang {sglang['installed']}: {sglang['refusal'] or 'tested with this backend'}\n")
    is_well = not sglang.get("refusal")
    for finding in found.get("findings", []):
        level = str(finding.get("level", finding.get("severity", "")))
        out.write(f"{level}: {finding.get('text', finding.get('what', finding))}\n")
        if finding.get("fix"):
            out.write(f"  fix: {finding['fix']}\n")
        is_well = is_well and level not in ("error", "broken", "fail")
    return is_well


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m kvtransfer.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--devices", default="", help="RDMA devices to look at, as --disaggregation-ib-device (default: all)")
    parser.add_argument("--peer", default="", help="host:port of `kvtransfer doctor --serve` on another host")
    parser.add_argument("--json", action="store_true", help="the whole report as JSON")
    chosen = parser.parse_args(arguments)
    try:
        found = report(chosen.devices, chosen.peer)
    except KvtError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if chosen.json:
        sys.stdout.write(json.dumps(found) + "\n")
        return 0
    return 0 if show(found, sys.stdout) else 1


if __name__ == "__main__":
    sys.exit(main())
