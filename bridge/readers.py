"""Processes that read history, so that the bridge answers meanwhile and all of a machine's cores are used.

Law: they know nothing and write nothing; what they have read counts when the bridge has committed it. A process ends
when the bridge does, however that ends, since its input ends then. It takes about 25 MB.
"""

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import cast

from bridge.reading import LENGTH_BYTES, Chunk, Wanted, answer, request

MOST = 2
"""Processes at once: more would read faster than rows can be committed."""


class Readers:
    """Running processes, as many as are of use here; made by `start`, ended by `close`."""

    def __init__(self) -> None:
        self.count = 0
        self._processes: list[Process] = []
        self._idle: asyncio.Queue[Process] = asyncio.Queue()

    @classmethod
    async def start(cls) -> "Readers":
        """Start the processes. Raises OSError."""
        readers = cls()
        try:
            for _ in range(min(MOST, os.cpu_count() or 1)):
                readers._add(await _process())
        except OSError:
            await readers.close()
            raise
        return readers

    def _add(self, process: Process) -> None:
        self._processes.append(process)
        self._idle.put_nowait(process)
        self.count += 1

    async def read(self, wanted: list[Wanted]) -> list[Chunk]:
        """Pieces of files, in order; may be called by several tasks. Raises OSError, EOFError and ValueError."""
        process = await self._idle.get()
        try:
            cast("asyncio.StreamWriter", process.stdin).write(request(wanted))
            answers = cast("asyncio.StreamReader", process.stdout)
            length = await answers.readexactly(LENGTH_BYTES)
            return answer(await answers.readexactly(int.from_bytes(length, "big")))
        finally:
            self._idle.put_nowait(process)  # also one that has failed: it will fail for whoever waits for it

    async def close(self) -> None:
        """End the processes; who waits for one gets an error."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await asyncio.gather(*(process.wait() for process in self._processes))


async def _process() -> Process:
    # The same code as runs here, from wherever it is run; without a look for what else is installed.
    code = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((code, *filter(None, sys.path)))}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-S", "-P", "-m", "bridge.reading", stdin=PIPE, stdout=PIPE, env=environment
    )
