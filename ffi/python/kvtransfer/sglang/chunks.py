"""Chunks whose pages are not ready yet: a thread waits for the GPU so that the scheduler's thread never does.

SGLang hands two events over with a chunk: `wait_event` (the forward that still writes these pages, for the early send of a
cached prefix) and `indices_event` (the copy that still fills the page list). A chunk without events goes straight to the
engine, unless an earlier chunk of its room waits here.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import Any, Callable

logger = logging.getLogger("kvtransfer.sglang")

# Most chunks that wait for the GPU. SGLang keeps a few per running request; beyond this the sender fails its request rather
# than hold memory without end.
WAITING_MAX = 65_536


class ChunkQueue:
    """Runs chunks in order, each after its events."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[tuple[tuple[Any, ...], Callable[[], None]] | None] = queue.Queue(WAITING_MAX)
        self._thread = threading.Thread(target=self._run, name="kvt-chunks", daemon=True)
        self._thread.start()

    def put(self, events: tuple[Any, ...], push: Callable[[], None]) -> None:
        """Runs `push` once every event has happened. Raises `queue.Full`; never waits."""
        self._jobs.put_nowait((events, push))

    def close(self, timeout: float) -> bool:
        """Ends the thread after what is queued; whether it ended in time."""
        try:
            self._jobs.put(None, timeout=timeout)
        except queue.Full:
            return False
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            events, push = job
            try:
                for event in events:
                    event.synchronize()
                push()
            except Exception:
                # `push` fails its own room; whatever is left (a CUDA error in an event) must not end the thread, because
                # every later chunk of this rank comes through here.
                logger.exception("a chunk could not be handed to the engine")
