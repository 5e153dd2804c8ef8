"""Prometheus series beside SGLang's own: what this rank moved, how its transfers ended, whom it is connected to.

SGLang's schedulers publish through prometheus_client's files (multi-process mode), where only plain series work. Transfers are
counted when they end; a thread looks at the engine for the rest. Nothing runs without `--enable-metrics`.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from ..errors import KvtError
from ..transfer import Outcome

logger = logging.getLogger("kvtransfer.sglang")

# The label `outcome` of a status.
OUTCOMES = {
    0: "success", 302: "incompatible", 303: "peer_failed", 304: "peer_lost", 305: "peer_misbehaved", 306: "no_path",
    400: "cancelled", 401: "timeout", 402: "memory", 900: "shutdown",
}  # fmt: skip


class RankMetrics:
    """The series of one rank."""

    def __init__(self, manager: Any, period: float) -> None:
        from prometheus_client import Counter, Gauge

        role = str(manager.disaggregation_mode.value)
        self._labels = {"role": role, "tp_rank": str(manager.attn_tp_rank), "pp_rank": str(manager.pp_rank)}
        names = list(self._labels)
        self._engine = manager.engine
        self._bytes = Counter("kvtransfer_bytes_total", "KV bytes of transfers that succeeded.", names)
        self._ended = Counter("kvtransfer_transfers_total", "Transfers that ended, by outcome.", [*names, "outcome"])
        self._moving = Counter("kvtransfer_moving_seconds_total", "Time from first batch to end, of those that succeeded.", names)
        self._peers = Gauge("kvtransfer_peers", "Connected peers.", names, multiprocess_mode="mostrecent")
        self._malformed = Gauge(
            "kvtransfer_malformed", "Connections and frames so far that were not the protocol.", names, multiprocess_mode="mostrecent"
        )
        self._period = period
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvt-metrics", daemon=True)
        self._thread.start()

    @staticmethod
    def start(manager: Any) -> RankMetrics | NoMetrics:
        """The series, if this server publishes any."""
        if not _is_wanted(manager):
            return NoMetrics()
        try:
            return RankMetrics(manager, manager.options["metrics_period"])
        except (ImportError, ValueError) as error:
            logger.warning("no Prometheus series of kvtransfer: %s", error)
            return NoMetrics()

    def ended(self, outcome: Outcome) -> None:
        """Counts a transfer that is over."""
        self._ended.labels(**self._labels, outcome=OUTCOMES.get(outcome.status, "other")).inc()
        if outcome.status == 0:
            self._bytes.labels(**self._labels).inc(outcome.bytes)
            self._moving.labels(**self._labels).inc(outcome.moving_s)

    def close(self) -> None:
        """Ends the thread."""
        self._end.set()
        self._thread.join(self._period)

    def _run(self) -> None:
        while not self._end.wait(self._period):
            try:
                info = self._engine.info()
            except KvtError as error:
                logger.debug("no counters from the engine: %s", error)
                return
            self._peers.labels(**self._labels).set(len(info.get("peers", [])))
            self._malformed.labels(**self._labels).set(info.get("counters", {}).get("malformed", 0))


def _is_wanted(manager: Any) -> bool:
    """Whether the server was started with `--enable-metrics`; newer releases answer from a place of their own."""
    try:
        from sglang.srt.runtime_context import get_observability
    except ImportError:
        return bool(getattr(manager.server_args, "enable_metrics", False))
    return bool(get_observability().enable_metrics)


class NoMetrics:
    """A rank that publishes nothing."""

    def ended(self, outcome: Outcome) -> None:
        """Nothing to count."""

    def close(self) -> None:
        """Nothing to end."""
