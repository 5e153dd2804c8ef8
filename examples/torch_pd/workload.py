"""The prompts: random tokens, lengths from one token to the longest, the awkward ones among them."""

from __future__ import annotations

import numpy as np

from .settings import Settings


def lengths(count: int, longest: int, page: int, chunk: int, seed: int) -> list[int]:
    """`count` lengths in random order: the longest, those around a page's and a chunk's end, and a geometric series."""
    awkward = [longest, chunk + 1, page, page + 1, chunk, page - 1, 1, 2 * chunk]
    wanted = [length for length in dict.fromkeys(awkward) if 1 <= length <= longest][:count]
    rest = count - len(wanted)
    wanted += [int(round(length)) for length in np.geomspace(min(2 * page, longest), longest, rest + 2)[1:-1]]
    return [int(length) for length in np.random.default_rng(seed).permutation(wanted)]


def prompt(settings: Settings, number: int, length: int) -> np.ndarray:
    """The tokens of one prompt, which every process could draw again."""
    draw = np.random.default_rng([settings.seed, number])
    return draw.integers(0, settings.shape.vocab, length, dtype=np.int64)
