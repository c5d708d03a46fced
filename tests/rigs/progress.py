"""How a long campaign gets on: one line every ten seconds, on standard error (`pytest -n 0 -s` lets it through)."""

import sys
import time

EVERY_SECONDS = 10.0


class Progress:
    """Prints `done of total` and what else there is to say; a short run prints nothing but its last line."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self._began = self._printed = time.monotonic()

    def tell(self, done: int, what: object = "") -> None:
        now = time.monotonic()
        if now - self._printed >= EVERY_SECONDS:
            self._printed = now
            left = (now - self._began) / max(done, 1) * (self.total - done)
            self._print(f"{done} of {self.total}, about {left:.0f} s left; {what}")

    def end(self, what: object) -> None:
        self._print(f"done in {time.monotonic() - self._began:.0f} s: {what}")

    def _print(self, text: str) -> None:
        sys.stderr.write(f"{self.name}: {text}\n")
        sys.stderr.flush()
