"""The package by itself, without SGLang: what a wrong call says, what goes in without copying, what closes when."""

from __future__ import annotations

import threading
import time
from array import array
from pathlib import Path
from typing import Any, Iterator

import kvtransfer as kvt
import numpy as np
import pytest
from kvtransfer import _native, doctor, errors
from kvtransfer.sglang import options, releases


class Side:
    """One engine over two small buffers and an aux row."""

    def __init__(self, listens: bool) -> None:
        self.kv = [np.full((16, 64), 7 if listens else 0, np.uint8) for _ in range(2)]
        self.aux = np.full((4, 64), 7 if listens else 0, np.uint8)
        parts = [
            kvt.Component(kvt.Kind.KV, [kvt.Entry(buffer.ctypes.data, buffer.nbytes, 64) for buffer in self.kv]),
            kvt.Component(kvt.Kind.AUX, [kvt.Entry(self.aux.ctypes.data, self.aux.nbytes, 64)]),
        ]
        layout = kvt.Layout(page_size=1, kv_dtype="bfloat16", components=parts, total_kv_heads=1, rank_kv_heads=1)
        self.engine = kvt.Engine(layout, {"listen": "127.0.0.1:0"} if listens else {})


@pytest.fixture
def sides() -> Iterator[tuple[Side, Side, int]]:
    source, target = Side(True), Side(False)
    with source.engine, target.engine:
        yield source, target, target.engine.connect(f"127.0.0.1:{source.engine.listen_port}", 5)


def test_pages_move(sides: tuple[Side, Side, int]) -> None:
    source, target, peer = sides
    with target.engine.receive(5, [kvt.Source(peer)], [[1, 2, 3], [0]], 5, prefix_tokens=4) as coming:
        with source.engine.send(5, 5) as going:
            assert going.wait_ready(5) and going.prefix_tokens() == 4 and going.poll() is kvt.State.WAITING_FOR_INPUT
            going.push([array("i", [4, 5])])
            going.push([np.array([6], np.int32), [1]], last=True)
            assert going.result(5).bytes == coming.result(5).bytes == 3 * 2 * 64 + 64
    assert (target.kv[0][1:4] == 7).all() and not target.kv[0][0].any() and (target.aux[0] == 7).all()


def test_a_reason_reaches_the_other_side(sides: tuple[Side, Side, int]) -> None:
    source, target, peer = sides
    coming = target.engine.receive(6, [kvt.Source(peer)], [[1], [0]], 5)
    going = source.engine.send(6, 5)
    going.wait_ready(5)
    going.cancel("the model is gone")
    with pytest.raises(kvt.PeerError, match="the model is gone") as caught:
        coming.result(5)
    assert caught.value.code == errors.PEER_FAILED


def test_wrong_calls_say_what_is_wrong(sides: tuple[Side, Side, int]) -> None:
    source, target, peer = sides
    with pytest.raises(kvt.MisuseError, match="room"):
        source.engine.send(0, 1)
    kept = source.engine.send(7, 5)
    with pytest.raises(kvt.DuplicateRoomError, match="room 7"):
        source.engine.send(7, 1)
    with pytest.raises(kvt.UnknownPeerError):
        target.engine.receive(8, [kvt.Source(99)], [[1]], 1)
    with pytest.raises(kvt.MisuseError, match="not format"):
        kept.push([np.array([1], np.float32)])
    with pytest.raises(kvt.MisuseError, match="32-bit"):
        kept.push([np.array([1, 2], np.int64)])
    with pytest.raises(kvt.MisuseError, match="contiguous"):
        kept.push([np.arange(6, dtype=np.int32)[::2]])
    with pytest.raises(kvt.PeerError):
        target.engine.connect("127.0.0.1:1", 1)
    with pytest.raises(kvt.MisuseError, match="no_such_field"):
        kvt.Engine(source.engine.layout, {"no_such_field": 1})


def test_waiting_leaves_the_gil(sides: tuple[Side, Side, int]) -> None:
    source, _, _ = sides
    turns = 0
    with source.engine.send(9, 5) as going:
        waiter = threading.Thread(target=going.wait_ready, args=(0.3,))
        waiter.start()
        while waiter.is_alive():
            turns += 1
            time.sleep(0.001)
    assert turns > 20


def test_a_sweep_of_polls_is_one_call(sides: tuple[Side, Side, int], monkeypatch: pytest.MonkeyPatch) -> None:
    source, _, _ = sides
    going = [source.engine.send(room, 5) for room in range(20, 40)]
    polled = kvt.PollSet()
    for transfer in going:
        polled.add(transfer)
    calls = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(_native.lib, name)

    monkeypatch.setattr("kvtransfer.engine.lib", Counting())
    monkeypatch.setattr("kvtransfer.engine.POLL_FRESH", 10.0)
    for _ in range(3):
        assert {polled.state(transfer) for transfer in going} == {kvt.State.BOOTSTRAPPING}
    assert calls == ["kvt_transfer_poll_many"] * 3
    going[0].cancel()
    assert polled.state(going[0]) is kvt.State.FAILED
    polled.remove(going[0])
    assert polled.state(going[0]) is kvt.State.FAILED, "outside of the set it is asked by itself"


def test_a_closed_engine_ends_its_transfers(sides: tuple[Side, Side, int]) -> None:
    source, _, _ = sides
    going = source.engine.send(11, 5)
    source.engine.close()
    assert going.has_ended() and going.outcome().status == errors.SHUTDOWN
    with pytest.raises(kvt.ShutDownError):
        source.engine.send(12, 1)


def test_a_registry() -> None:
    from kvtransfer.bootstrap import call

    with kvt.BootstrapServer({"listen": "127.0.0.1:0"}) as server:
        call({"address": f"127.0.0.1:{server.port}", "call": "health"})
        with pytest.raises(kvt.HostError, match="in use"):
            kvt.BootstrapServer({"listen": f"127.0.0.1:{server.port}"})


def test_the_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    assert '"python"' in capsys.readouterr().out
    assert doctor.main([]) in (0, 1)
    assert capsys.readouterr().out.startswith("kvtransfer ")


def test_options_say_what_is_wrong() -> None:
    assert options.read_all({})["connect_timeout"] == 10
    with pytest.raises(options.OptionError, match="KVTRANSFER_LANES='many': it must be a whole number from 1 to 16"):
        options.read_all({"KVTRANSFER_LANES": "many"})
    with pytest.raises(options.OptionError, match="KVTRANSFER_RDMA='maybe': it must be one of off, auto, required"):
        options.read_all({"KVTRANSFER_RDMA": "maybe"})
    with pytest.raises(options.OptionError, match="KVTRANSFER_ENGINE"):
        options.read_all({"KVTRANSFER_ENGINE": "[]"})
    names = {"KVTRANSFER_LANE": "3", "KVTRANSFER_PREFILL_SERVICE_HOST": "10.0.0.1", "OTHER": ""}
    assert options.unknown(names) == ["KVTRANSFER_LANE"]


def test_releases() -> None:
    for release in releases.TESTED:
        assert releases.refusal(".".join(map(str, release))) is None
    assert "was tested with SGLang" in str(releases.refusal("0.5.18"))
    assert "was tested with SGLang" in str(releases.refusal("0.4.9"))
    assert releases.refusal("9.0.0") is not None
    with pytest.raises(ValueError):
        releases.parse("main")


def test_headers_are_read_as_c_compilers_do() -> None:
    text = '#ifdef __cplusplus\nextern "C" {\n#endif\n#define KVT_X 3\n/* int gone; */\nint kept(void);\n#ifdef __cplusplus\n}\n#endif\n'
    read = _native.declarations(text)
    assert "gone" not in read and "int kept(void);" in read and "#define KVT_X 3" in read
    assert read.count("{") == read.count("}")


def test_the_documents_have_every_option() -> None:
    assert options.table() in (Path(__file__).parents[2] / "docs" / "sglang.md").read_text()
