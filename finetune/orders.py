"""What the supervisor tells a running trainer: to stop, and to wait while people are answered. Knows no training."""

from __future__ import annotations

import threading

from core.job import GO_ON, WAIT

LONGEST_WAIT_S = 4.0  # then one micro-batch is worked on: a chat that never rests makes a job slow, but not endless


class Orders(threading.Event):
    """Set: stop. It is asked between two micro-batches, and then waits, at most so long, while it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self._room = threading.Event()
        self._room.set()

    def is_set(self) -> bool:
        if not super().is_set():
            self._room.wait(LONGEST_WAIT_S)
        return super().is_set()

    def set(self) -> None:
        super().set()
        self._room.set()

    def hear(self, said: bytes) -> None:
        """Bytes of standard input, each an order of its own: the last one counts."""
        for one in said:
            if one == WAIT[0]:
                self._room.clear()
            elif one == GO_ON[0]:
                self._room.set()
