"""Every byte of a request arrives where it belongs, and no other byte changes: SGLang's real classes, real processes."""

from __future__ import annotations

import pytest
from ranks import BOOTSTRAPPING, SUCCESS, TRANSFERRING, WAITING, Pair

MHA = {"layers": 4, "heads": 8, "head_bytes": 32}
MLA = {"layers": 4, "latent_bytes": 144}


def run_kinds(pair: Pair, first_room: int = 1000) -> None:
    """The kinds of requests that a scheduler makes, on one pair."""
    contiguous = pair.transfer(first_room, range(4, 10), range(20, 26))
    fragmented = pair.transfer(first_room + 1, [9, 3, 30, 12, 31, 5, 7], [40, 2, 11, 60, 13, 59, 1], chunks=[3, 2, 2])
    cached = pair.transfer(first_room + 2, [8, 6], [50, 48], prefix_pages=3)
    all_cached = pair.transfer(first_room + 3, [], [], prefix_pages=4)
    closing = pair.transfer(first_room + 4, [14, 15, 16], [33, 34, 35], chunks=[2, 1])
    for polls in (contiguous, fragmented, cached, all_cached, closing):
        for seen in [*polls[0], *polls[1]]:
            assert seen[-1] == SUCCESS and set(seen) <= {WAITING, TRANSFERRING, SUCCESS}, polls
            assert seen == sorted(seen), "a state never goes back"
            assert BOOTSTRAPPING not in seen


@pytest.mark.parametrize("decode_tp", [1, 2, 4])
@pytest.mark.parametrize("prefill_tp", [1, 2, 4])
@pytest.mark.parametrize("model", [MHA, MLA], ids=["mha", "mla"])
def test_tensor_parallel(model: dict[str, int], prefill_tp: int, decode_tp: int) -> None:
    with Pair(prefill_tp, decode_tp, **model) as pair:
        run_kinds(pair)


def test_heads_that_are_replicated() -> None:
    """Two KV heads over four prefill ranks: each head lives twice, and is sent once."""
    with Pair(4, 2, layers=2, heads=2, head_bytes=64) as pair:
        run_kinds(pair)


@pytest.mark.parametrize("model", [MHA, MLA], ids=["mha", "mla"])
@pytest.mark.parametrize("decode_pp", [1, 2])
def test_pipeline(model: dict[str, int], decode_pp: int) -> None:
    with Pair(prefill_pp=2, decode_pp=decode_pp, **model) as pair:
        run_kinds(pair)


def test_draft_buffers_and_page_size_one() -> None:
    with Pair(layers=2, heads=4, head_bytes=64, drafts=2, page_size=1) as pair:
        run_kinds(pair)


def test_layers_by_name() -> None:
    with Pair(layers=3, heads=4, head_bytes=64, named_layers=True) as pair:
        run_kinds(pair)


def test_states() -> None:
    """State components: slots, windows of pages and rows, each with its own list; a request may have none of one."""
    states = (("mamba", 3, 96), ("swa", 4, 512), ("c128_state", 2, 40))
    with Pair(layers=2, heads=4, head_bytes=64, states=states) as pair:
        pair.transfer(1, [3, 4], [8, 9], states=([[5], [1, 2], [7, 8]], [[6], [11, 12], [3, 4]]))
        pair.transfer(2, [3, 4], [10, 12], chunks=[1, 1], states=([[9], None, []], [[7], None, []]))
        pair.transfer(3, [], [], prefix_pages=2, states=([[1], [4], [2]], [[2], [14], [5]]))


def test_pages_that_are_not_ready_are_waited_for() -> None:
    """The early send of a cached prefix names pages that a forward still writes: nothing moves before the event, nor does
    send() wait for it, and a chunk behind it keeps its place."""
    with Pair() as pair:
        page = 16
        pair.open(5)
        pair.decode[0].call("grant", room=5, pages=[20, 21, 22], slot=2)
        sender = pair.prefill[0]
        sender.until(5, WAITING)
        sender.call("begin", room=5, pages=3, slot=1)
        early = sender.call("send", room=5, pages=[3, 4], first_token=0, last=False, event_s=0.4)
        late = sender.call("send", room=5, pages=[9], first_token=2 * page, last=True, slot=1)
        assert max(early["send_s"], late["send_s"]) < 0.1
        pair.succeed(5)
        assert pair.decode[0].call("check", room=5, pages=[20, 21, 22], slot=2)["wrong"] == []


def test_the_registry_is_ours_and_theirs() -> None:
    """Our ranks work with SGLang's own registry, and ours answers to SGLang's own ranks."""
    with Pair(2, 1, registry="mooncake") as pair:
        assert pair.registry.call("what") == {"kind": "MooncakeKVBootstrapServer"}
        pair.transfer(7, [3, 4], [8, 9])
    with Pair(2, 1, backend="mooncake", registry="kvtransfer") as pair:
        assert pair.registry.call("what") == {"kind": "KvtransferKVBootstrapServer"}
        pair.transfer(8, [3, 4], [8, 9])


def test_one_call_moves_a_chunk_quickly() -> None:
    """send() copies the page list and returns; the metric says what moved."""
    with Pair(layers=8, heads=8, head_bytes=128, pages=512) as pair:
        pair.open(9)
        pair.decode[0].call("grant", room=9, pages=list(range(0, 500)), slot=2)
        pair.prefill[0].until(9, WAITING)
        pair.prefill[0].call("begin", room=9, pages=500, slot=1)
        pair.prefill[0].call("send", room=9, pages=list(range(499, -1, -1)), first_token=0, last=True, slot=1)
        pair.succeed(9)
        metric = pair.prefill[0].call("metric", room=9)
        assert metric["bytes"] == 500 * 16 * 2 * 8 * 8 * 128 + 3 * 64
        assert 0 < metric["latency"] < 10
