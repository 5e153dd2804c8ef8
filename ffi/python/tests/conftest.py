"""One rule for the whole suite: nothing waits without a bound."""

from __future__ import annotations

import pytest

# Far above the slowest test on two busy cores (eight processes that each import SGLang), far below a CI's patience.
TEST_S = 120


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_S))
