"""What send() costs the scheduler: the time in Python, which is the time under the GIL, per chunk."""

from __future__ import annotations

import time
from types import SimpleNamespace

import kvtransfer.transfer as transfer_module
import numpy as np
import pytest
import stand_ins
from kvtransfer import _native

stand_ins.install()

# The promise of the project for one chunk, however many pages it has. Everything else of send() is in the library, without
# the GIL.
PROMISED_S = 50e-6


def test_the_gil_is_held_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvtransfer.sglang.sender import KvtransferKVSender

    monkeypatch.setattr(transfer_module, "lib", SimpleNamespace(kvt_transfer_push_after=lambda *_arguments: 0))
    sender = object.__new__(KvtransferKVSender)
    sender.__dict__.update(
        conclude_state=None, curr_idx=0, num_kv_indices=0, aux_index=1, bootstrap_room=1, _started=None, _dummy_state=None,
        _early_send_wait_event=None, _chunks_waiting=0, _failure=None, _owner=False, kv_mgr=SimpleNamespace(padded=lambda _: []),
    )  # fmt: skip
    going = object.__new__(transfer_module.Transfer)
    going.__dict__.update(_handle=_native.ffi.NULL, _end=None, room=1)
    sender._transfer = going
    pages = np.random.default_rng(1).permutation(131_072).astype(np.int32)
    costs = []
    for _ in range(500):
        sender.curr_idx, sender.num_kv_indices = 0, len(pages)
        started = time.perf_counter()
        sender.send(pages)
        costs.append(time.perf_counter() - started)
    median = sorted(costs)[len(costs) // 2]
    assert median < PROMISED_S, f"{median * 1e6:.1f} us per chunk"
