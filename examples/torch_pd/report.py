"""Tables of what was asked, answered, and how long each part took."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Sequence

from .messages import Generated

if TYPE_CHECKING:
    from .driver import Answered

MS = 1000.0


@dataclass(frozen=True)
class Outcome:
    """One path's requests."""

    path: str
    taken: str
    """What the library chose for it."""
    answered: list[Answered]
    controls: list[Answered]
    truth: dict[int, Generated]
    took_s: float

    def differing(self) -> list[int]:
        """Rooms whose tokens are not the single process's, or whose KV is not prefill's bit for bit."""
        return [one.asked.request.room for one in self.answered if not (self.has_same_tokens(one) and has_same_kv(one))]

    def has_same_tokens(self, one: Answered) -> bool:
        """Whether decode said what the single process said."""
        return one.received.tokens == self.truth[one.asked.request.room].tokens

    def found_out(self) -> tuple[int, int]:
        """Of the controls, how many show the lost page in their tokens, and how many in their KV."""
        return sum(not self.has_same_tokens(one) for one in self.controls), sum(not has_same_kv(one) for one in self.controls)

    def is_right(self) -> bool:
        """Nothing differs that should not, and a lost page does show: in every digest, and in some request's tokens."""
        tokens, kv = self.found_out()
        return not self.differing() and kv == len(self.controls) and (tokens > 0 or not self.controls)


def has_same_kv(one: Answered) -> bool:
    """Whether decode's pages held what prefill's did."""
    return one.sent.digest == one.received.digest


@dataclass(frozen=True)
class Split:
    """A request's times in milliseconds. `prefill` + `tail` + the way of the request to prefill = `ttft`."""

    ttft: float
    """From the driver's send to the moment when decode has every page and the first token."""
    prefill: float
    """From prefill's start on it to the end of its last kernel."""
    tail: float
    """From that to `ttft`'s end: the part of the transfer that computing did not hide."""
    waited: float
    """The transfer, as the library counts it: from decode's grant to the first bytes."""
    moving: float
    """From the first bytes to the end."""
    first: float
    """From `ttft`'s end to the first token that decode has computed itself."""


def split(one: Answered) -> Split:
    """A request's times."""
    sent, received = one.sent, one.received
    parts = (
        received.arrived - one.at,
        sent.computed - sent.started,
        received.arrived - sent.computed,
        received.waited_s,
        received.moving_s,
        received.second - received.arrived,
    )
    return Split(*(part * MS for part in parts))


# A request's parts, as the tables name and order them.
PARTS = ("ttft", "prefill", "tail", "waited", "moving", "first")
TITLES = ("TTFT", "prefill", "tail", "waited", "moving", "1st own")


def rows(outcome: Outcome) -> list[str]:
    """A line per request; times in milliseconds."""
    lines = [f"{'tokens':>7} {'chunks':>6} {'KV MiB':>8} {_cells(TITLES)} {'early':>6} {'single':>8}  tokens, KV"]
    for one in sorted(outcome.answered, key=lambda one: (one.asked.is_warm_up, _tokens(one))):
        same = [("DIFFERENT", "equal")[is_same] for is_same in (outcome.has_same_tokens(one), has_same_kv(one))]
        lines.append(
            f"{_tokens(one):>7} {one.sent.chunks:>6} {one.sent.bytes / 2**20:>8.1f} {_times(outcome, [one])}"
            f"  {', '.join(same)}{' (warm-up)' if one.asked.is_warm_up else ''}"
        )
    return lines


def table(outcomes: list[Outcome]) -> list[str]:
    """A line per path and third of the prompts by length; medians in milliseconds; then a verdict per path."""
    lines = [f"{'path':<12} {'prompt tokens':>14} {'n':>3} {_cells(TITLES)} {'early':>6} {'single':>8}"]
    for outcome in outcomes:
        timed = sorted((one for one in outcome.answered if not one.asked.is_warm_up), key=_tokens)
        cuts = [len(timed) * third // 3 for third in range(4)]
        for part in [timed[cuts[third] : cuts[third + 1]] for third in range(3)]:
            if part:
                between = f"{_tokens(part[0])}-{_tokens(part[-1])}"
                lines.append(f"{outcome.taken:<12} {between:>14} {len(part):>3} {_times(outcome, part)}")
    lines.append(
        "medians in ms; early: bytes that decode had before prefill's last kernel ended; single: TTFT of one process alone"
    )
    return lines + [_verdict(outcome) for outcome in outcomes]


def _verdict(outcome: Outcome) -> str:
    count, total = len(outcome.answered), sum(one.sent.bytes for one in outcome.answered)
    in_tokens, in_kv = outcome.found_out()
    return (
        f"{outcome.path} ({outcome.taken}): {count - len(outcome.differing())} of {count} prompts equal in tokens and KV, "
        f"{total / 2**30:.2f} GiB in {outcome.took_s:.1f} s; of {len(outcome.controls)} that lost a page on purpose "
        f"{in_tokens} show it in tokens, {in_kv} in KV: {'RIGHT' if outcome.is_right() else 'WRONG'}"
    )


def _times(outcome: Outcome, part: list[Answered]) -> str:
    """Medians over requests; of one, its own."""
    splits = [split(one) for one in part]
    medians = [f"{statistics.median(getattr(parts, name) for parts in splits):.1f}" for name in PARTS]
    truths = [outcome.truth[one.asked.request.room] for one in part]
    single = statistics.median((truth.first - truth.started) * MS for truth in truths)
    early = sum(one.sent.early_bytes for one in part) / sum(one.sent.bytes for one in part)
    return f"{_cells(medians)} {100 * early:>5.0f}% {single:>8.1f}"


def _cells(texts: Sequence[str]) -> str:
    return " ".join(f"{text:>8}" for text in texts)


def _tokens(one: Answered) -> int:
    return len(one.asked.request.tokens)


def plain(outcome: Outcome) -> dict[str, Any]:
    """Everything, for a file."""
    return {
        "path": outcome.path,
        "taken": outcome.taken,
        "is_right": outcome.is_right(),
        "controls": outcome.found_out(),
        "requests": [
            {
                "tokens": _tokens(one),
                "is_warm_up": one.asked.is_warm_up,
                "chunks": one.sent.chunks,
                "bytes": one.sent.bytes,
                "early_bytes": one.sent.early_bytes,
                "same_tokens": outcome.has_same_tokens(one),
                "same_kv": has_same_kv(one),
                "ms": vars(split(one)),
            }
            for one in outcome.answered
        ],
    }
