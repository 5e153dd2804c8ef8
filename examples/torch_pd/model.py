"""What workers want of a model, and the choice of one."""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

import numpy as np

from .settings import Settings


class Step(Protocol):
    """Kernels that were launched: a chunk of a prompt, or one more token."""

    tokens: Any
    """The next token, where the model wants it for `extend`."""

    def wait(self) -> None:
        """Until the pages hold the step's keys and values and the token is known. Any thread may."""

    def token(self) -> int:
        """The next token, greedily. After `wait`."""


class Model(Protocol):
    """A model and the pool that its keys and values live in."""

    name: str
    dtype: str
    """Of the pool, by SGLang's name."""
    item_bytes: int
    """Of one page of one layer's keys."""

    def addresses(self) -> list[int]:
        """Of the pool's buffers: K of every layer, then V of every layer."""

    def weights_sum(self) -> int:
        """The same number if the weights are the same."""

    def warm_up(self) -> None:
        """Computes something, so that no request pays for what is done once. Leaves every page without numbers, and quiet."""

    def tokens(self, numbers: np.ndarray) -> Any:
        """Tokens where the model wants them; may be sliced."""

    def sequence(self, pages: np.ndarray, length: int = 0) -> Any:
        """A sequence of `length` tokens whose keys and values are in these pages already."""

    def extend(self, sequence: Any, tokens: Any) -> Step:
        """Launches more tokens: their keys and values go to the sequence's pages. Does not wait for a GPU."""

    def digest(self, pages: np.ndarray, length: int) -> int:
        """A sum over every bit of the first `length` tokens' keys and values, by their places in the sequence, not by pages."""

    def poison(self, pages: np.ndarray) -> None:
        """Fills pages with what is not a number, and waits until that is done."""

    def lose(self, page: int) -> None:
        """Fills one page with zeros, as if it had never come."""


def choose(settings: Settings) -> str:
    """The model that "auto" means here."""
    if settings.model != "auto":
        return settings.model
    return "transformers" if importlib.util.find_spec("transformers") else "plain"


def load(settings: Settings, gpu: int) -> Model:
    """Makes the model with its seeded weights, and its pool."""
    if settings.model == "numpy":
        from .numpy_model import NumpyModel

        return NumpyModel(settings)
    from .torch_model import TorchModel

    return TorchModel(settings, gpu)
