"""The engine under SGLang's unmodified Mooncake manager, sender and receiver."""

from __future__ import annotations

import pytest
from ranks import Pair
from test_bytes import MHA, MLA

OURS = {"KVTRANSFER_REPLACE_MOONCAKE": "1"}


@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("model", [MHA, MLA], ids=["mha", "mla"])
def test_bytes(model: dict[str, int], prefill_tp: int, decode_tp: int) -> None:
    with Pair(prefill_tp, decode_tp, backend="mooncake", environment=OURS, **model) as pair:
        pair.transfer(1, range(4, 10), range(20, 26))
        pair.transfer(2, [9, 3, 30, 12, 31], [40, 2, 11, 60, 13], chunks=[3, 2])
        assert "the transfer backend named mooncake is kvtransfer" in pair.prefill[0].tail()


def test_memory_comes_and_goes() -> None:
    with Pair(backend="mooncake", environment=OURS) as pair:
        pair.transfer(1, [3, 4], [8, 9])
        for rank in (pair.prefill[0], pair.decode[0]):
            rank.call("buffers", registered=False)
            rank.call("buffers", registered=True)
        pair.transfer(2, [3, 4], [8, 9])
