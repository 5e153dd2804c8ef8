"""A thread that does one thing after the other, so that the thread that launches kernels waits for none of them."""

from __future__ import annotations

import queue
import threading
from typing import Callable

# Jobs that may wait: chunks of all requests in flight. More would mean that a driver ignores its own bound.
JOBS_MAX = 65_536


class Jobs:
    """Runs jobs in order on a thread of its own. The first that raises ends it: `failed` hears of it, later jobs are dropped."""

    def __init__(self, name: str, failed: Callable[[BaseException], None]) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(JOBS_MAX)
        self._failed = failed
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], None]) -> None:
        """Runs it after those before it. Never waits; raises `queue.Full`."""
        self._jobs.put_nowait(job)

    def close(self) -> None:
        """Waits for the jobs that were put, and ends the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        is_failed = False
        while (job := self._jobs.get()) is not None:
            try:
                if not is_failed:
                    job()
            except BaseException as error:  # noqa: BLE001 - the driver gets it, whatever it is
                is_failed = True
                self._failed(error)
