"""What the driver and the workers say to each other over their pipes.

Times are those of `time.monotonic()`, one clock for all processes of a host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ready:
    """A worker's model is loaded and warm."""

    model: str
    """Which, in words."""
    weights: int
    """A sum over all weights, which must be the same everywhere."""
    loaded_s: float


@dataclass(frozen=True)
class Failed:
    """A worker cannot go on."""

    text: str


@dataclass(frozen=True)
class Open:
    """Start an engine. Decode also connects to `address`, prefill's listener."""

    path: str
    address: str = ""


@dataclass(frozen=True)
class Opened:
    """The engine runs."""

    address: str = ""
    """Prefill: where it listens."""
    path: str = ""
    """Decode: what the library chose, and why nothing better."""
    reason: str = ""


@dataclass(frozen=True)
class Close:
    """End the engine; another `Open` may follow."""


@dataclass(frozen=True)
class Closed:
    """It is ended."""


@dataclass(frozen=True)
class Request:
    """One prompt. Both workers get it, as a PD router would send it."""

    room: int
    tokens: np.ndarray
    new_tokens: int
    is_control: bool = False
    """Decode is to lose a page of it, which must show."""


@dataclass(frozen=True)
class Generated:
    """The single process's answer."""

    room: int
    tokens: list[int]
    started: float
    first: float
    """When the first token was known."""
    second: float


@dataclass(frozen=True)
class Sent:
    """Prefill's part of a request is over."""

    room: int
    started: float
    computed: float
    """When the last chunk's kernels were done."""
    chunks: int
    bytes: int
    early_bytes: int
    """Of these, how many decode had confirmed by then: what computing hid."""
    digest: int
    """Of the prompt's KV, in prefill's pages."""


@dataclass(frozen=True)
class Received:
    """Decode's part of a request is over."""

    room: int
    tokens: list[int]
    granted: float
    arrived: float
    """When every page and the first token were there."""
    second: float
    """When the first token was known that decode computed itself."""
    waited_s: float
    """The library's own: from the grant to the first bytes."""
    moving_s: float
    """The library's own: from the first bytes to the end."""
    digest: int
    """Of the prompt's KV, in decode's pages."""
