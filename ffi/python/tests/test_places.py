"""What stands around a transfer: ranks that do not send, other data-parallel ranks, warm-up requests, digests, metrics, telemetry."""

from __future__ import annotations

import socket
import time

from ranks import SUCCESS, WAITING, Pair, Rank, RankError, free_port

# An HTTP/2 client's first bytes with empty settings, and the type of the frame that a server must answer with.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
SETTINGS = 4


def test_context_parallel_ranks_that_do_not_send() -> None:
    """Only rank 0 sends; the others go through the states by themselves, and decode waits for none of them."""
    places = [{"cp_size": 2, "cp_rank": rank} for rank in range(2)]
    with Pair(prefill_places=places) as pair:
        pair.transfer(1, [3, 4, 5], [8, 9, 20], chunks=[2, 1])
        assert pair.prefill[0].call("info")["peers"] and not pair.prefill[1].call("info")["peers"]
        # An abort of a request that was not sent yet ends on the idle rank too.
        for rank in pair.prefill:
            rank.call("open", room=2)
            rank.call("abort", room=2)
            assert rank.call("failure", room=2)["text"].endswith("Aborted by AbortReq.")
        pair.transfer(3, [3, 4], [8, 9])


def test_data_parallel_prefill_ranks() -> None:
    """Each room has its prefill rank; two rooms move from two ranks to one decode rank, at the same time."""
    places = [{"dp_size": 2, "dp_rank": rank} for rank in range(2)]
    with Pair(prefill_places=places) as pair:
        decode = pair.decode[0]
        for room in (10, 11):
            pair.prefill[room % 2].call("open", room=room)
            decode.call("open", room=room, dp_rank=room % 2)
            decode.until(room, WAITING)
            decode.call("grant", room=room, pages=[room, room + 10], slot=room % 2 + 1)
        for room in (11, 10):
            rank = pair.prefill[room % 2]
            rank.until(room, WAITING)
            rank.call("begin", room=room, pages=2, slot=1)
            rank.call("send", room=room, pages=[3, 4], first_token=0, last=True, slot=1)
        for room in (10, 11):
            for rank in (pair.prefill[room % 2], decode):
                rank.until(room, SUCCESS)
            found = decode.call("check", room=room, pages=[room, room + 10], first_token=0, slot=room % 2 + 1)
            assert found["wrong"] == [], (room, found)
        assert [len(rank.call("info")["peers"]) for rank in pair.prefill] == [1, 1]


def test_a_room_on_the_wrong_data_parallel_rank() -> None:
    """SGLang's own check fails the sender when it is made; ours must keep that failure and its words."""
    with Pair(prefill_places=[{"dp_size": 2, "dp_rank": 0}]) as pair:
        pair.prefill[0].call("open", room=7)
        found = pair.prefill[0].call("failure", room=7)
        assert "dp_rank" in found["text"], found


def test_warm_up_requests_move_nothing() -> None:
    """SGLang's fake sender and receiver around our manager: a server's own warm-up."""
    with Pair() as pair:
        for rank in (pair.prefill[0], pair.decode[0]):
            rank.call("open", room=0, fake=True)
        pair.prefill[0].call("begin", room=0, pages=1, slot=1)
        pair.decode[0].call("grant", room=0, pages=[3], slot=1)
        pair.prefill[0].call("send", room=0, pages=[3], first_token=0, last=True, slot=1)
        for rank in (pair.prefill[0], pair.decode[0]):
            rank.until(0, SUCCESS)
            assert rank.call("info")["peers"] == []
        pair.transfer(1, [3, 4], [8, 9])


def test_digests_are_compared_where_both_sides_are_cut_alike() -> None:
    for prefill_tp, verified in ((1, True), (2, False)):
        with Pair(prefill_tp, 1) as pair:
            assert pair.decode[0].call("checksum") == {"verified": False}, "nothing is known of that server yet"
            pair.transfer(1, [3, 4], [8, 9])
            assert pair.decode[0].call("checksum") == {"verified": verified}


def test_prometheus_series() -> None:
    with Pair(setup={"enable_metrics": True}, environment={"KVTRANSFER_METRICS_PERIOD": "0.1"}) as pair:
        pair.transfer(1, [3, 4], [8, 9])
        pair.open(2)
        pair.decode[0].call("abort", room=2)
        pair.decode[0].call("failure", room=2)
        for rank, role in ((pair.prefill[0], "prefill"), (pair.decode[0], "decode")):
            labels = f'pp_rank="0",role="{role}",tp_rank="0"'
            seen = until_series(rank, f"kvtransfer_peers{{{labels}}}", 1.0)
            assert seen[f"kvtransfer_bytes_total{{{labels}}}"] == 2 * page_bytes(pair) + 3 * 64, seen
            assert seen[f'kvtransfer_transfers_total{{outcome="success",{labels}}}'] == 1.0
            assert seen[f"kvtransfer_moving_seconds_total{{{labels}}}"] > 0.0
            assert seen[f"kvtransfer_malformed{{{labels}}}"] == 0.0
        with socket.create_connection(("127.0.0.1", pair.prefill[0].call("rank_port")["port"])) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 8)
            malformed = 'kvtransfer_malformed{pp_rank="0",role="prefill",tp_rank="0"}'
            until_series(pair.prefill[0], malformed, 1.0)


def page_bytes(pair: Pair) -> int:
    """KV bytes of one page over all layers, keys and values."""
    shape = pair.prefill_shapes[0]
    return shape.page_size * shape.layers * 2 * shape.heads * shape.head_bytes


def until_series(rank: Rank, name: str, value: float) -> dict[str, float]:
    deadline = time.monotonic() + 5
    while True:
        seen = rank.call("series")
        if seen.get(name) == value:
            return seen
        if time.monotonic() > deadline:
            raise RankError(f"{name} never became {value}: {seen}")
        time.sleep(0.05)


def test_without_the_flag_nothing_is_published() -> None:
    with Pair() as pair:
        pair.transfer(1, [3], [8])
        assert pair.prefill[0].call("series") == {}


def test_telemetry_port() -> None:
    """A rank serves its stream on the port plus its number; gRPC begins with HTTP/2's settings."""
    port = free_port(2)
    with Pair(2, 1, environment={"KVTRANSFER_TELEMETRY_PORT": str(port)}, decode_environment={"KVTRANSFER_TELEMETRY_PORT": "0"}):
        for rank in range(2):
            with socket.create_connection(("127.0.0.1", port + rank), timeout=5) as subscriber:
                subscriber.sendall(PREFACE)
                answer = subscriber.recv(9)
                assert len(answer) == 9 and answer[3] == SETTINGS, answer
