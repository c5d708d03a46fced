"""A thread that watches whether the event loop turns.

Law: it counts its own ticks, not time: while a machine sleeps or the process is stopped nothing is a stall.
"""

import asyncio
import sys
import threading
from collections.abc import Callable

TICK_SECONDS = 1.0
STALL_SECONDS = 1.0
HANG_SECONDS = 30.0


class LoopWatch:
    """Calls `stalled` once for each time that the loop has not turned for STALL_SECONDS, and `hung`, with the place in
    the code where it stands, after HANG_SECONDS; both from the thread. `scale` shortens all three times."""

    def __init__(self, stalled: Callable[[], None], hung: Callable[[str], None], *, scale: float = 1.0) -> None:
        self._stalled = stalled
        self._hung = hung
        self._scale = scale
        self._has_turned = True
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to watch the running loop, whose thread is the caller's."""
        self._loop = asyncio.get_running_loop()
        self._watched = threading.get_ident()
        self._thread.start()

    def stop(self) -> None:
        self._end.set()

    def _turn(self) -> None:
        self._has_turned = True

    def _run(self) -> None:
        silent = 0.0
        while not self._end.wait(TICK_SECONDS * self._scale):
            if self._has_turned:
                silent, self._has_turned = 0.0, False
                try:
                    self._loop.call_soon_threadsafe(self._turn)
                except RuntimeError:  # it is closed
                    return
                continue
            silent += TICK_SECONDS
            if silent == STALL_SECONDS:
                self._stalled()
            if silent >= HANG_SECONDS:
                self._hung(self._place())
                return

    def _place(self) -> str:
        frame = sys._current_frames().get(self._watched)
        return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "an unknown place"
