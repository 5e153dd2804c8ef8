"""The PyTorch example without torch: its processes, pages and tables over the numpy twin of its model, and the real library."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Iterator

import kvtransfer as kvt
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))

from torch_pd import driver, messages, pages, report, settings, workers, workload  # noqa: E402
from torch_pd.numpy_model import NumpyModel, NumpyStep  # noqa: E402

CPU = ["--device", "cpu", "--model", "numpy"]
PAGE = 16


def small(*more: str) -> settings.Settings:
    """Two chunks of two pages, in pools of sixteen."""
    return settings.parse([*CPU, "--chunk", str(2 * PAGE), "--longest", "64", "--pages", "16", "--timeout", "20", *more]).settings


@pytest.mark.parametrize(("path", "taken", "page"), [("auto", "shm-", 16), ("shm", "shm-ring", 1), ("tcp", "tcp", 24)])
def test_the_pair_says_what_one_process_says(
    path: str, taken: str, page: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "run.json"
    more = ["--path", path, "--page-size", str(page), "--prompts", "9", "--in-flight", "3", "--json", str(file)]
    assert driver.main([*CPU, *more]) == 0
    said = capsys.readouterr().out.splitlines()
    assert f"--path {path}: {taken}" in "\n".join(said)
    assert "11 of 11 prompts equal in tokens and KV" in said[-1] and said[-1].endswith("RIGHT")
    assert '"same_kv": true' in file.read_text() and '"same_kv": false' not in file.read_text()


def test_what_differs_fails_the_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # The single process's answers are changed on their way, as if decode had said something else.
    heard = driver.Process.hear

    def changed(self: driver.Process, kind: type, timeout: float) -> Any:
        told = heard(self, kind, timeout)
        if isinstance(told, messages.Generated) and told.room == 4:
            told.tokens[-1] ^= 1
        return told

    monkeypatch.setattr(driver.Process, "hear", changed)
    assert driver.main([*CPU, "--prompts", "4"]) == 1
    said = capsys.readouterr().out
    assert "5 of 6 prompts equal" in said and said.rstrip().endswith("WRONG") and said.count("DIFFERENT") == 1


def test_a_dead_process_ends_the_run() -> None:
    with driver.processes(small()) as (_, prefill, decode):
        for process in (prefill, decode):
            process.hear(messages.Ready, 60)
        os.kill(int(prefill._process.pid or 0), signal.SIGKILL)
        with pytest.raises(driver.RunError, match="prefill process (died|is gone)"):
            driver.open_path(prefill, decode, "auto", 20)


class GatedStep(NumpyStep):
    """A step whose kernels run until somebody says so."""

    def __init__(self, token: int) -> None:
        super().__init__(token)
        self.done = threading.Event()

    def wait(self) -> None:
        assert self.done.wait(20), "the test opens it"


class GatedModel(NumpyModel):
    """A model whose steps are launched at once and done when the test says so, as on a GPU."""

    def __init__(self, given: settings.Settings) -> None:
        super().__init__(given)
        self.steps: list[GatedStep] = []

    def extend(self, sequence: Any, tokens: np.ndarray) -> GatedStep:
        self.steps.append(GatedStep(super().extend(sequence, tokens).token()))
        return self.steps[-1]

    def warm_up(self) -> None:
        """Nothing of it is launched."""


class Target:
    """Decode's memory and engine, without a model."""

    def __init__(self, given: settings.Settings, address: str) -> None:
        self.model, self.rows = NumpyModel(given), pages.Rows()
        described = pages.layout(given, self.model.addresses(), self.model.dtype, self.model.item_bytes, None, self.rows)
        self.engine = kvt.Engine(described, pages.engine_config("tcp", 8))
        self.peer = self.engine.connect(address, 20)

    def has(self, page: int) -> bool:
        """Whether a page of every layer holds numbers and nothing else."""
        filled = np.isfinite(self.model._pool[:, :, page])
        return bool(filled.all())


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[workers.Prefill, Target, Any]]:
    given = small()
    monkeypatch.setattr(workers, "load", lambda model_settings, _gpu: GatedModel(model_settings))
    ours, theirs = Pipe()
    prefill = workers.Prefill(theirs, given)
    assert isinstance(ours.recv(), messages.Ready)
    prefill.start(messages.Open("tcp"))
    target = Target(given, ours.recv().address)
    with target.engine:
        yield prefill, target, ours
    prefill.close(messages.Close())


def test_a_chunk_leaves_when_its_kernels_are_done_and_no_sooner(gated: tuple[workers.Prefill, Target, Any]) -> None:
    prefill, target, ours = gated
    granted = np.array([9, 2, 14, 5], np.int32)
    coming = target.engine.receive(3, [kvt.Source(target.peer)], [granted, [7]], 20)
    prompt = workload.prompt(prefill.settings, 0, 3 * PAGE + 5)
    prefill.request(messages.Request(3, prompt, 4))
    first, last = prefill.model.steps
    # Granted and launched, and still nothing may move: the pages do not hold what they should.
    assert coming.wait(0.2) is None and not any(target.has(int(page)) for page in granted)
    first.done.set()
    deadline = threading.Event()
    while not all(target.has(int(page)) for page in granted[:2]):
        assert not deadline.wait(0.005) and coming.poll() != kvt.State.FAILED
    assert not target.has(14) and not target.has(5), "the second chunk is not done"
    last.done.set()
    assert coming.result(20).bytes == 4 * 2 * 3 * target.model.item_bytes + 8 * pages.ROW_WORDS
    sent = ours.recv()
    assert isinstance(sent, messages.Sent) and sent.chunks == 2
    assert sent.early_bytes <= 2 * 2 * 3 * target.model.item_bytes
    assert target.rows.read(7, 3, len(prompt)) == last.token()
    assert sent.digest == target.model.digest(granted, len(prompt))
    with pytest.raises(ValueError, match="room 4 of 3 tokens got the row of room 3"):
        target.rows.read(7, 4, 3)


def test_pages_are_given_back_when_a_transfer_has_ended(gated: tuple[workers.Prefill, Target, Any]) -> None:
    prefill, target, ours = gated
    for room in range(20, 26):
        coming = target.engine.receive(room, [kvt.Source(target.peer)], [[room - 20, 10], [0]], 20)
        prefill.request(messages.Request(room, workload.prompt(prefill.settings, room, 2 * PAGE), 4))
        with pytest.raises(TimeoutError, match="were not free"):
            prefill.book.take(15, 0.01)
        prefill.model.steps[-1].done.set()
        coming.result(20)
        assert isinstance(ours.recv(), messages.Sent)
    assert sorted(prefill.book.take(16, 1)) == list(range(16))


def test_a_digest_sees_every_bit_and_no_page_number() -> None:
    model = NumpyModel(small())
    prompt = workload.prompt(small(), 0, 40)
    one, other = np.array([3, 1, 7], np.int32), np.array([12, 4, 9], np.int32)
    for where in (one, other):
        model.extend(model.sequence(where), prompt)
    before = model.digest(one, 40)
    assert before == model.digest(other, 40) != model.digest(one[::-1].copy(), 40)
    for page, token, element in ((12, 0, 0), (4, 15, 5), (9, 7, 15)):
        bits = model._pool.view(np.uint32)[1, 2, page, token, 1]
        bits[element] ^= 1
        assert model.digest(other, 40) != before, "one bit of one value"
        bits[element] ^= 1
    model._pool[:, :, 9, 8:] = 0
    assert model.digest(other, 40) == before, "what lies behind the last token is not looked at"
    model.lose(4)
    assert model.digest(other, 40) != before


def test_controls_must_be_found_out() -> None:
    request = messages.Request(1, np.arange(5), 2, is_control=True)
    sent = messages.Sent(1, 0, 1, 1, 100, 0, digest=7)
    told = messages.Received(1, [4, 5], 0, 1, 2, 0, 0, digest=7)
    truth = {1: messages.Generated(1, [4, 5], 0, 1, 2)}

    def verdict(received: messages.Received, controls: bool) -> bool:
        one = driver.Answered(driver.Asked(request, False), 0, sent, received)
        return report.Outcome("auto", "tcp", [] if controls else [one], [one] if controls else [], truth, 1).is_right()

    other_tokens, other_kv = dataclasses.replace(told, tokens=[4, 6]), dataclasses.replace(told, digest=8)
    assert verdict(told, False) and not verdict(other_tokens, False) and not verdict(other_kv, False)
    assert not verdict(told, True) and not verdict(other_kv, True) and not verdict(other_tokens, True)
    assert verdict(dataclasses.replace(other_tokens, digest=8), True)


def test_lengths_have_the_awkward_ones() -> None:
    drawn = workload.lengths(20, 32768, 16, 2048, seed=1)
    assert len(drawn) == 20 and max(drawn) == 32768 and min(drawn) == 1
    assert {15, 16, 17, 2048, 2049, 4096} <= set(drawn)
    assert workload.lengths(3, 10, 16, 64, seed=1).count(10) >= 1
    assert all(1 <= length <= 10 for length in workload.lengths(9, 10, 16, 64, seed=1))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--chunk", "24"], "--chunk 24 must be whole pages of 16 tokens"),
        (["--path", "auto,rdma"], "each must be one of auto, tcp, shm"),
        (["--heads", "4", "--kv-heads", "3"], "--heads 4 must be a multiple of --kv-heads 3"),
        (["--pages", "3"], "--pages 3 cannot hold one prompt of 300 tokens, which needs 20"),
        (["--page-size", "0"], "--page-size must be 1 or more"),
        (["--new-tokens", "1"], "--new-tokens must be 2 or more"),
    ],
)
def test_what_cannot_work_is_refused(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        settings.parse([*CPU, *flags])
    assert sentence in capsys.readouterr().err
