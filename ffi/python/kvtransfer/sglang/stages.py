"""Pipelines: the first stage decides for all, so the others must publish where their part of each request stands.

SGLang replicates `request_status` of every stage to the first (its PPConsensusStore, over a ZMQ socket of its own that drops
what it cannot decode). Its own backends write there from their worker threads; ours has none per request, so one thread
looks at all live requests together.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, Callable

logger = logging.getLogger("kvtransfer.sglang")

# How often the stages look: short against a chunk's computing, long against the microseconds that one look costs.
PERIOD = 0.002


class StageWatch:
    """Publishes the state of every live request of this stage."""

    def __init__(self, live: Callable[[], list[Any]]) -> None:
        self._live = live
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvt-stages", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._end.set()
        self._thread.join(PERIOD * 100)

    def _run(self) -> None:
        while not self._end.wait(PERIOD):
            for sender in self._live():
                try:
                    sender.publish(sender.own_state())
                except Exception:
                    logger.exception("the state of room %s could not be published", sender.bootstrap_room)
