"""What can be set from outside: environment variables `KVTRANSFER_*`, each with its default and unit.

SGLang has no place for a backend's own command-line arguments, so the environment it is. `OPTIONS` is the one list: the
reader below, `python -m kvtransfer.doctor` and the table in ffi/docs/sglang.md all come from it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, Callable, Mapping


class OptionError(ValueError):
    """An environment variable has a value that makes no sense; the sentence names it and what it may be."""


@dataclass(frozen=True)
class Option:
    """One environment variable."""

    name: str
    default: str
    unit: str
    meaning: str
    read: Callable[[str], Any]


def _whole(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise OptionError(f"it must be a whole number from {least} to {most}") from None
        if not least <= value <= most:
            raise OptionError(f"it must be from {least} to {most}")
        return value

    return read


def _seconds(least: float, most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise OptionError(f"it must be a number of seconds from {least} to {most}") from None
        if not least <= value <= most:
            raise OptionError(f"it must be from {least} to {most} seconds")
        return value

    return read


def _one_of(*values: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in values:
            raise OptionError(f"it must be one of {', '.join(values)}")
        return text

    return read


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise OptionError("it must be 0 or 1")
    return text == "1"


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise OptionError(f"it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise OptionError("it must be a JSON object")
    return value


OPTIONS: tuple[Option, ...] = (
    Option("KVTRANSFER_LISTEN_PORT", "0", "port", "First port of the ranks' own listeners (rank r of the host's first engine "
           "takes port + r); 0 lets the system choose.", _whole(0, 65535)),
    Option("KVTRANSFER_TOKEN", "", "text", "Secret that prefill and decode must share; empty: whoever can connect may talk.", str),
    Option("KVTRANSFER_LANES", "2", "connections", "Data connections per peer, 1 to 16; each costs two threads on both sides.",
           _whole(1, 16)),
    Option("KVTRANSFER_SAME_HOST", "auto", "auto, pull, ring or off", "Which paths past TCP are used between processes of one "
           "host.", _one_of("auto", "pull", "ring", "off")),
    Option("KVTRANSFER_RDMA", "auto", "off, auto or required", "Whether RDMA devices are used. auto falls back to TCP and says "
           "why; required does not start without a device. All KV memory is pinned when it is used.",
           _one_of("off", "auto", "required")),
    Option("KVTRANSFER_RDMA_DEVICES", "", "device names", "Devices instead of --disaggregation-ib-device; same forms.", str),
    Option("KVTRANSFER_CONNECT_TIMEOUT", "10", "seconds", "How long a decode rank tries to reach a prefill rank before the "
           "request fails.", _seconds(0.1, 300)),
    Option("KVTRANSFER_PEER_SILENCE", "10", "seconds", "A peer that has been silent for so long is taken for dead, and its "
           "transfers fail.", _seconds(0.5, 300)),
    Option("KVTRANSFER_TELEMETRY_PORT", "0", "port", "Rank r serves its telemetry stream on this port + r; 0: off.",
           _whole(0, 65535)),
    Option("KVTRANSFER_METRICS_PERIOD", "2", "seconds", "How often the Prometheus series beside SGLang's own are brought up to "
           "date (only with --enable-metrics).", _seconds(0.1, 60)),
    Option("KVTRANSFER_LOG", "warning", "error, warning, info or debug", "Which of the library's log lines appear in SGLang's "
           "log.", _one_of("error", "warning", "info", "debug")),
    Option("KVTRANSFER_UNTESTED_SGLANG", "0", "0 or 1", "1 lets the backend register itself in SGLang releases outside the "
           "tested range.", _flag),
    Option("KVTRANSFER_REPLACE_MOONCAKE", "0", "0 or 1", "1 puts this engine under the name mooncake instead of registering "
           "the name kvtransfer.", _flag),
    Option("KVTRANSFER_ENGINE", "{}", "JSON object", "Further fields of the engine's configuration, by the names that the "
           "library uses; they win over everything above.", _object),
)  # fmt: skip


def unknown(environment: Mapping[str, str] | None = None) -> list[str]:
    """`KVTRANSFER_*` variables that are no options: perhaps misspelt ones, which would silently do nothing.

    What Kubernetes injects for a Service called kvtransfer-something is left out.
    """
    environment = os.environ if environment is None else environment
    known = {option.name for option in OPTIONS} | {"KVTRANSFER_LIBRARY"}
    names = [name for name in environment if name.startswith("KVTRANSFER_") and name not in known]
    return sorted(name for name in names if "_SERVICE_" not in name and "_PORT" not in name)


def read_all(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Every option's value by its name without the prefix, in lower case.

    Raises `OptionError` naming the variable, its value and what it may be.
    """
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    for option in OPTIONS:
        text = environment.get(option.name, option.default)
        try:
            values[option.name.removeprefix("KVTRANSFER_").lower()] = option.read(text)
        except OptionError as error:
            raise OptionError(f"{option.name}={text!r}: {error}") from None
    return values


def table() -> str:
    """The options as a Markdown table."""
    rows = [f"| `{option.name}` | `{option.default or '(empty)'}` | {option.unit} | {option.meaning} |" for option in OPTIONS]
    return "\n".join(["| variable | default | unit | meaning |", "| --- | --- | --- | --- |", *rows])


if __name__ == "__main__":
    import sys

    sys.stdout.write(table() + "\n")
