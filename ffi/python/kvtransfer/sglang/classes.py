"""The classes that SGLang asks for, by its own names of their kinds (`KVClassType`)."""

from __future__ import annotations

from .rank import KvtransferKVManager
from .receiver import KvtransferKVReceiver
from .registry import KvtransferKVBootstrapServer
from .sender import KvtransferKVSender

BY_KIND = {
    "manager": KvtransferKVManager,
    "sender": KvtransferKVSender,
    "receiver": KvtransferKVReceiver,
    "bootstrap_server": KvtransferKVBootstrapServer,
}
