"""Tables of what was asked, answered, and how long each part took."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable

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


HEAD = f"{'tokens':>7} {'chunks':>6} {'KV MiB':>8} {'TTFT':>8} {'prefill':>8} {'tail':>7} {'waited':>8} {'moving':>8} {'1st own':>8} {'early':>6} {'single':>8}  tokens, KV"


def rows(outcome: Outcome) -> list[str]:
    """A line per request; times in milliseconds."""
    lines = [HEAD]
    for one in sorted(outcome.answered, key=lambda one: (one.asked.is_warm_up, len(one.asked.request.tokens))):
        parts, sent, truth = split(one), one.sent, outcome.truth[one.asked.request.room]
        verdict = f"{'equal' if outcome.has_same_tokens(one) else 'DIFFERENT'}, {'equal' if has_same_kv(one) else 'DIFFERENT'}"
        lines.append(
            f"{len(one.asked.request.tokens):>7} {sent.chunks:>6} {sent.bytes / 2**20:>8.1f} {parts.ttft:>8.1f} {parts.prefill:>8.1f}"
            f" {parts.tail:>7.1f} {parts.waited:>8.1f} {parts.moving:>8.1f} {parts.first:>8.1f} {100 * sent.early_bytes / sent.bytes:>5.0f}%"
            f" {(truth.first - truth.started) * MS:>8.1f}  {verdict}{' (warm-up)' if one.asked.is_warm_up else ''}"
        )
    return lines


def table(outcomes: list[Outcome]) -> list[str]:
    """A line per path and third of the prompts by length; medians in milliseconds."""
    lines = [f"{'path':<18} {'prompt tokens':>15} {'n':>3} {'TTFT':>8} {'prefill':>8} {'tail':>7} {'waited':>8} {'moving':>8} {'1st own':>8} {'early':>6} {'single':>8}"]
    for outcome in outcomes:
        timed = sorted((one for one in outcome.answered if not one.asked.is_warm_up), key=lambda one: len(one.asked.request.tokens))
        cuts = [len(timed) * third // 3 for third in range(4)]
        for part in [timed[a:b] for a, b in zip(cuts, cuts[1:]) if b > a]:
            lines.append(_medians(outcome, part))
    lines.append("medians in ms; single: TTFT of one process that does both; early: bytes that decode had before prefill's last kernel ended")
    for outcome in outcomes:
        differing, found = outcome.differing(), outcome.found_out()
        count, total = len(outcome.answered), sum(one.sent.bytes for one in outcome.answered)
        lines.append(
            f"{outcome.path} ({outcome.taken}): {count - len(differing)} of {count} prompts equal in tokens and KV, {total / 2**30:.2f} GiB in {outcome.took_s:.1f} s;"
            f" of {len(outcome.controls)} that lost a page on purpose {found[0]} show it in tokens, {found[1]} in KV: {'RIGHT' if outcome.is_right() else 'WRONG'}"
        )
    return lines


def _medians(outcome: Outcome, part: list[Answered]) -> str:
    def median(value: Callable[[Split], float]) -> float:
        return statistics.median(value(split(one)) for one in part)

    lengths = [len(one.asked.request.tokens) for one in part]
    truths = [outcome.truth[one.asked.request.room] for one in part]
    single = statistics.median((truth.first - truth.started) * MS for truth in truths)
    early = sum(one.sent.early_bytes for one in part) / sum(one.sent.bytes for one in part)
    return (
        f"{outcome.taken:<18} {f'{min(lengths)}-{max(lengths)}':>15} {len(part):>3} {median(lambda s: s.ttft):>8.1f} {median(lambda s: s.prefill):>8.1f}"
        f" {median(lambda s: s.tail):>7.1f} {median(lambda s: s.waited):>8.1f} {median(lambda s: s.moving):>8.1f} {median(lambda s: s.first):>8.1f}"
        f" {100 * early:>5.0f}% {single:>8.1f}"
    )


def plain(outcome: Outcome) -> dict[str, Any]:
    """Everything, for a file."""
    return {
        "path": outcome.path,
        "taken": outcome.taken,
        "is_right": outcome.is_right(),
        "controls": outcome.found_out(),
        "requests": [
            {
                "tokens": len(one.asked.request.tokens),
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
