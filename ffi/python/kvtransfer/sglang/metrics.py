"""Prometheus series beside SGLang's own: what the engine moved, where transfers failed and why.

SGLang's schedulers publish through prometheus_client's files (multi-process mode), where only plain series work: so a thread
brings counters up to date from the engine's own totals. Nothing runs without `--enable-metrics`.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from ..errors import KvtError

logger = logging.getLogger("kvtransfer.sglang")


class RankMetrics:
    """The series of one rank, and the thread that feeds them."""

    def __init__(self, manager: Any, period: float) -> None:
        from prometheus_client import Counter, Gauge

        labels = {"role": str(manager.disaggregation_mode.value), "tp_rank": str(manager.attn_tp_rank), "pp_rank": str(manager.pp_rank)}
        names = list(labels)
        self._engine = manager.engine
        self._labels = labels
        self._seen: dict[tuple[str, ...], float] = {}
        self._bytes = Counter("kvtransfer_bytes_total", "KV bytes moved.", [*names, "direction"])
        self._ended = Counter("kvtransfer_transfers_total", "Transfers that ended, by outcome.", [*names, "outcome"])
        self._live = Gauge("kvtransfer_live_transfers", "Transfers that are open now.", names, multiprocess_mode="mostrecent")
        self._peers = Gauge("kvtransfer_peers", "Connected peers.", names, multiprocess_mode="mostrecent")
        self._malformed = Counter("kvtransfer_malformed_total", "Connections and frames that were not the protocol.", names)
        self._period = period
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvt-metrics", daemon=True)
        self._thread.start()

    @staticmethod
    def start(manager: Any) -> "RankMetrics | NoMetrics":
        """The series, if this server publishes any."""
        if not getattr(manager.server_args, "enable_metrics", False):
            return NoMetrics()
        try:
            return RankMetrics(manager, manager.options["metrics_period"])
        except (ImportError, ValueError) as error:
            logger.warning("no Prometheus series of kvtransfer: %s", error)
            return NoMetrics()

    def close(self) -> None:
        """Ends the thread."""
        self._end.set()
        self._thread.join(self._period)

    def _run(self) -> None:
        while not self._end.wait(self._period):
            try:
                self._take(self._engine.info())
            except KvtError as error:
                logger.debug("no counters from the engine: %s", error)
                return

    def _take(self, info: dict[str, Any]) -> None:
        counters = info.get("counters", {})
        for direction in ("sent", "received"):
            self._raise_to(self._bytes, counters.get(f"bytes_{direction}", 0), direction=direction)
        for outcome, count in counters.get("ended", {}).items():
            self._raise_to(self._ended, count, outcome=outcome)
        self._raise_to(self._malformed, counters.get("malformed", 0))
        self._live.labels(**self._labels).set(counters.get("live_transfers", 0))
        self._peers.labels(**self._labels).set(len(info.get("peers", [])))

    def _raise_to(self, counter: Any, total: float, **labels: str) -> None:
        key = (counter._name, *labels.values())
        more = total - self._seen.get(key, 0)
        if more > 0:
            self._seen[key] = total
            counter.labels(**self._labels, **labels).inc(more)


class NoMetrics:
    """A rank that publishes nothing."""

    def close(self) -> None:
        """Nothing to end."""
