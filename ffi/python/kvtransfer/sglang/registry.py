"""The bootstrap registry that SGLang starts on a prefill server, run by our library; and asking any registry for a rank."""

from __future__ import annotations

import logging
import threading
from typing import Any

import requests
from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer
from sglang.srt.environ import envs

from ..bootstrap import BootstrapServer
from .peers import Target

logger = logging.getLogger("kvtransfer.sglang")

# SGLang's own patience with its registry (`common/conn.py` _get_bootstrap_info_from_server).
ANSWER_TIMEOUT = 5.0

_sessions = threading.local()


class KvtransferKVBootstrapServer(CommonKVBootstrapServer):
    """Answers as SGLang's own, byte for byte, from native threads, and in the keys that the ranks' own release knows.

    A subclass, so that SGLang's Rust API server goes on standing in for it: that one answers our ranks as well.
    """

    def __init__(self, host: str, port: int) -> None:
        # The base class would start its own server here; nothing else of it is used.
        self.host = host
        self.port = port
        listen = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        settings: dict[str, Any] = {
            "listen": listen,
            "room_ttl_ms": int(envs.SGLANG_DISAGGREGATION_BOOTSTRAP_ENTRY_CLEANUP_INTERVAL.get() * 1000),
        }
        self._server = BootstrapServer(settings)
        logger.info("kvtransfer bootstrap registry listens on %s port %d", host, self._server.port)

    def close(self) -> None:
        """Ends the registry."""
        self._server.close()


def fetch_row(server: str, target: Target) -> dict[str, Any] | str:
    """A prefill rank's row from its server's registry, ours or SGLang's own; or the sentence that says why there is none."""
    place = (
        f"prefill_dp_rank: {target.dp} prefill_cp_rank: {target.cp} target_tp_rank: {target.tp} and target_pp_rank {target.pp}"
    )
    query = {
        "prefill_dp_rank": target.dp,
        "prefill_cp_rank": target.cp,
        "target_tp_rank": target.tp,
        "target_pp_rank": target.pp,
    }
    try:
        answer = _session().get(f"http://{server}/route", params=query, timeout=ANSWER_TIMEOUT)
    except requests.RequestException as error:
        return f"Could not fetch bootstrap info for: {place}: {error}"
    if answer.status_code != 200:
        return f"Could not fetch bootstrap info for: {place}: {answer.status_code} {answer.text[:200]}"
    try:
        row = answer.json()
        return {"rank_ip": str(row["rank_ip"]), "rank_port": int(row["rank_port"])}
    except (KeyError, TypeError, ValueError) as error:
        return f"The registry at {server} answered for {place} with something that is no row: {error}"


def _session() -> requests.Session:
    session = getattr(_sessions, "session", None)
    if session is None:
        session = _sessions.session = requests.Session()
    return session
