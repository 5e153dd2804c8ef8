"""How requests end when something goes wrong: which side learns what, in which words, and that the pair goes on serving."""

from __future__ import annotations

import os
import signal
import socket
import time
from typing import Iterator

import pytest
from ranks import FAILED, WAITING, Pair, Rank

SHORT = {"SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "3", "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "3"}


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """One pair for all: every test must leave it serving."""
    with Pair(environment=SHORT) as made:
        yield made


def fails(rank: Rank, room: int, *words: str, other_rank: bool = False, timeout: float = 10.0) -> str:
    """Waits for the failure of a room; its text."""
    rank.until(room, FAILED, timeout=timeout)
    found = rank.call("failure", room=room)
    assert found["kind"] == "KVTransferError" and found["room"] == room and found["other_rank"] is other_rank, found
    for word in words:
        assert word in found["text"], found
    return str(found["text"])


def serves(pair: Pair, room: int) -> None:
    """The pair still does its work. What failed requests left in their pages is not looked at."""
    for rank in pair.decode:
        rank.call("wipe")
    pair.transfer(room, [3, 4, 9], [8, 9, 20], chunks=[2, 1])


def granted(pair: Pair, room: int) -> None:
    pair.open(room)
    pair.decode[0].call("grant", room=room, pages=[1, 2, 3], slot=2)
    pair.prefill[0].until(room, WAITING)
    pair.prefill[0].call("begin", room=room, pages=3, slot=1)


def test_prefill_aborts_and_decode_hears_it_at_once(pair: Pair) -> None:
    granted(pair, 1)
    pair.prefill[0].call("abort", room=1)
    started = time.monotonic()
    fails(pair.decode[0], 1, "Aborted by AbortReq.")
    assert time.monotonic() - started < 1
    fails(pair.prefill[0], 1, "Aborted by AbortReq.")
    serves(pair, 2)


def test_decode_aborts_while_pages_move(pair: Pair) -> None:
    granted(pair, 3)
    pair.prefill[0].call("send", room=3, pages=[5, 6], first_token=0, last=False)
    pair.decode[0].call("abort", room=3)
    fails(pair.prefill[0], 3, "Aborted by AbortReq.")
    fails(pair.decode[0], 3, "Aborted by AbortReq.")
    assert pair.decode[0].call("safe", room=3)["safe"], "nothing can write any more"
    serves(pair, 4)


def test_decode_aborts_before_it_granted(pair: Pair) -> None:
    pair.open(5)
    pair.decode[0].call("abort", room=5)
    fails(pair.decode[0], 5, "Aborted by AbortReq.")
    fails(pair.prefill[0], 5, "Aborted by AbortReq.")
    serves(pair, 6)


def test_an_abort_that_comes_before_the_sender(pair: Pair) -> None:
    pair.open(7, both=False)
    pair.decode[0].call("abort", room=7)
    fails(pair.decode[0], 7, "Aborted by AbortReq.")
    pair.prefill[0].call("open", room=7)
    fails(pair.prefill[0], 7, "Aborted by AbortReq.")
    serves(pair, 8)


def test_prefill_waits_for_a_grant_only_so_long(pair: Pair) -> None:
    pair.open(9)
    text = fails(pair.prefill[0], 9, "Request 9 timed out after 3.", "in KVPoll.Bootstrapping")
    assert text.startswith("KVTransferError(bootstrap_room=9): ")
    # A grant that comes after that is answered, not left to its own timeout.
    pair.decode[0].call("grant", room=9, pages=[1], slot=2)
    fails(pair.decode[0], 9, "Bootstrapping", timeout=2.0)
    serves(pair, 10)


def test_decode_waits_for_pages_only_so_long_and_tells(pair: Pair) -> None:
    granted(pair, 11)
    fails(pair.decode[0], 11, "Request 11 timed out in KVPoll.WaitingForInput")
    fails(pair.prefill[0], 11, "timed out", timeout=2.0)
    serves(pair, 12)


def test_one_room_number_twice(pair: Pair) -> None:
    granted(pair, 13)
    for rank in (pair.prefill[0], pair.decode[0]):
        rank.call("open", room=13, key=14)
        rank.until(14, FAILED)
        found = rank.call("failure", room=14)
        assert "room 13 is already in use on this rank" in found["text"], found
    pair.prefill[0].call("send", room=13, pages=[5, 6, 7], first_token=0, last=True, slot=1)
    pair.succeed(13)
    for rank in (pair.prefill[0], pair.decode[0]):
        rank.call("clear", room=13)
    serves(pair, 13)


def test_more_pages_than_granted_fail_the_room_with_the_numbers(pair: Pair) -> None:
    granted(pair, 15)
    pair.prefill[0].call("send", room=15, pages=[5, 6, 7, 8], first_token=0, last=False)
    fails(pair.prefill[0], 15, "4 items", "granted 3")
    fails(pair.decode[0], 15, "4 items", "granted 3")
    serves(pair, 16)


def test_a_rank_whose_sibling_failed(pair: Pair) -> None:
    """The scheduler combines ranks by minimum: this one is told to fail although it did not."""
    granted(pair, 17)
    found = pair.decode[0].call("failure", room=17)
    assert found["other_rank"] is True and "another rank" in found["text"]
    fails(pair.prefill[0], 17, "another rank of the request failed")
    assert pair.decode[0].call("safe", room=17)["safe"]
    serves(pair, 18)


def test_memory_is_released_and_taken_back(pair: Pair) -> None:
    for rank in (pair.prefill[0], pair.decode[0]):
        rank.call("buffers", registered=False)
        rank.call("buffers", registered=True)
    serves(pair, 19)


def test_garbage_on_every_socket(pair: Pair) -> None:
    """Noise, half a message, a ZMQ greeting, and nothing at all: the rank and the registry go on."""
    port = pair.prefill[0].call("rank_port")["port"]
    noise = [b"\x00" * 64, b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL", b""]
    held = []
    for target in (port, pair.port):
        for bytes_ in noise:
            connection = socket.create_connection(("127.0.0.1", target), timeout=5)
            connection.sendall(bytes_)
            held.append(connection)
    serves(pair, 20)
    for connection in held:
        connection.close()
    serves(pair, 21)
    own = sockets(pair.prefill[0]) | sockets(pair.decode[0])
    assert own <= {port}, "no other socket of a rank listens"


def sockets(rank: Rank) -> set[int]:
    """The TCP ports that a process listens on."""
    inodes = set()
    for name in os.listdir(f"/proc/{rank.process.pid}/fd"):
        try:
            target = os.readlink(f"/proc/{rank.process.pid}/fd/{name}")
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    ports = set()
    for table in ("tcp", "tcp6"):
        with open(f"/proc/{rank.process.pid}/net/{table}") as file:
            for line in file.readlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    ports.add(int(fields[1].rsplit(":", 1)[1], 16))
    return ports


@pytest.mark.parametrize("patience", [0.03, 0.0], ids=["quick-registry", "slow-registry"])
def test_a_killed_prefill_rank_and_its_successor(patience: float) -> None:
    """Also if the registry answered the first request late: that answer is not one to the request after the kill."""
    with Pair(environment={"KVTRANSFER_PEER_SILENCE": "3"}, setup={"look_up_patience": patience}) as pair:
        serves(pair, 1)
        granted(pair, 2)
        pair.prefill[0].signal(signal.SIGKILL)
        started = time.monotonic()
        fails(pair.decode[0], 2, "lost the peer")
        assert time.monotonic() - started < 2
        pair.prefill[0].process.wait(10)
        pair.prefill[0] = pair.begin("prefill", pair.prefill_shapes[0])
        pair.prefill[0].finish()
        serves(pair, 3)


def test_a_successor_that_nobody_noticed() -> None:
    """The prefill rank is replaced while decode is idle: the next request finds the new one by itself."""
    with Pair() as pair:
        serves(pair, 1)
        pair.prefill[0].signal(signal.SIGKILL)
        pair.prefill[0].process.wait(10)
        pair.prefill[0] = pair.begin("prefill", pair.prefill_shapes[0])
        pair.prefill[0].finish()
        serves(pair, 2)
        serves(pair, 3)


def test_a_killed_decode_rank() -> None:
    with Pair() as pair:
        granted(pair, 1)
        pair.decode[0].signal(signal.SIGKILL)
        fails(pair.prefill[0], 1, "lost the peer")
        pair.decode[0].process.wait(10)
        pair.decode[0] = pair.begin("decode", pair.decode_shapes[0])
        pair.decode[0].finish()
        serves(pair, 2)


def test_a_frozen_prefill_rank() -> None:
    """It keeps its sockets open and says nothing: silence ends its rooms, and thawed it goes on serving."""
    with Pair(environment={"KVTRANSFER_PEER_SILENCE": "1.5"}) as pair:
        granted(pair, 1)
        pair.prefill[0].signal(signal.SIGSTOP)
        fails(pair.decode[0], 1, "lost the peer", timeout=6.0)
        pair.prefill[0].signal(signal.SIGCONT)
        fails(pair.prefill[0], 1)
        serves(pair, 2)


def test_servers_that_do_not_fit() -> None:
    """Another page size: SGLang's own sentence fails the request, and the decode rank lives."""
    with Pair(decode_model={"page_size": 32}) as pair:
        pair.decode[0].call("open", room=1)
        fails(pair.decode[0], 1, "Page size mismatch")
        pair.decode[0].call("open", room=2)
        fails(pair.decode[0], 2, "Page size mismatch")


def test_layouts_that_do_not_fit() -> None:
    """Another head size is not in SGLang's registry; the engines compare their layouts and refuse before a byte moves."""
    with Pair(decode_model={"head_bytes": 64}) as pair:
        pair.prefill[0].call("open", room=1)
        pair.decode[0].call("open", room=1)
        seen = pair.decode[0].call("until", room=1, states=[FAILED, WAITING], timeout=10.0)["seen"]
        if seen[-1] == WAITING:
            pair.decode[0].call("grant", room=1, pages=[1], slot=2)
        fails(pair.decode[0], 1, "bytes")


def test_a_role_switch_is_over_in_time(pair: Pair) -> None:
    """Teardown with a request still open; last of this file's shared pair."""
    granted(pair, 90)
    for rank in (pair.prefill[0], pair.decode[0]):
        assert rank.call("teardown")["seconds"] < 3
    assert sockets(pair.prefill[0]) == set()


def test_nobody_answers_at_the_prefill_address() -> None:
    with Pair() as pair:
        pair.registry.stop()
        assert pair.decode[0].call("open", room=1, wait=1.0) == {"info": False}
        fails(pair.decode[0], 1, "Aborted by AbortReq.")


