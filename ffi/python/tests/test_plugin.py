"""The way in: SGLang's plug-in loader, command line and class lookup, as a real server uses them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from ranks import HERE, environment

# Run in a process of its own: plug-ins and hooks are the whole process's.
PROGRAM = """
import stand_ins; stand_ins.install()
import argparse, logging
logging.basicConfig(level=logging.ERROR, format="%(message)s")
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs
from sglang.srt.disaggregation import utils
from sglang.srt.managers import disagg_service
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
action = next(a for a in parser._actions if "--disaggregation-transfer-backend" in a.option_strings)
print("choices", "kvtransfer" in action.choices, "mooncake" in action.choices, "nonsense" in action.choices)
try:
    backend = utils.TransferBackend("kvtransfer")
except ValueError:
    raise SystemExit("no member")
print("member", backend is utils.TransferBackend("kvtransfer"), backend in list(utils.TransferBackend), backend.name)
for kind in utils.KVClassType:
    print(kind.value, disagg_service.get_kv_class(backend, kind).__name__)
print("mooncake", utils.get_kv_class(utils.TransferBackend.MOONCAKE, utils.KVClassType.SENDER).__name__)
print("fake", utils.get_kv_class(utils.TransferBackend.FAKE, utils.KVClassType.RECEIVER).__name__)
rust = getattr(disagg_service, "rust_server_serves_kv_bootstrap", lambda _name: True)  # 0.5.22 has no such server
print("rust", rust("kvtransfer"))
"""


def run(**settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, check=False, env=environment(settings), cwd=HERE, capture_output=True, text=True, timeout=60)


def test_the_name_becomes_known_and_the_others_stay() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "choices True True False",
        "member True True KVTRANSFER",
        "kvargs KVArgs",
        "manager KvtransferKVManager",
        "sender KvtransferKVSender",
        "receiver KvtransferKVReceiver",
        "bootstrap_server KvtransferKVBootstrapServer",
        "mooncake MooncakeKVSender",
        "fake FakeKVReceiver",
        "rust True",
    ]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"KVTRANSFER_LANES": "99"}, "KVTRANSFER_LANES='99': it must be from 1 to 16"),
        ({"KVTRANSFER_LIBRARY": "/nowhere.so"}, "kvtransfer's library cannot be opened"),
    ],
)
def test_what_cannot_work_is_not_registered(settings: dict[str, str], sentence: str) -> None:
    done = run(**settings)
    assert done.returncode != 0 and sentence in done.stderr
    assert "choices False True False" in done.stdout
