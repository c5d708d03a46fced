"""What a start does about a damaged database: it keeps the evidence, and goes on from the newest whole copy.

Law: nothing is deleted, and nothing begins at 0 by itself. The damaged files are moved to `state.corrupt-<time>/`; a
copy takes their place, synced before it gets the name; what was served since is the floor (bridge/mark.py), and what
transcripts say since is read again, because how far they were read stands in the copy. A crash leaves a database that
is damaged or gone, and the next start does the same once more.
"""

import os
import shutil
from pathlib import Path

from bridge.copies import time_in_names, whole_copies
from bridge.database import DATABASE
from bridge.state import SERVED, Damaged, StateError, sync

_RESTORING = f".{DATABASE}.restoring"


def quarantine(directory: Path, now: int) -> str:
    """Move the database to a directory of its own, the WAL first: it must never meet another database. What was done
    about it, for the log; empty where there was nothing to move."""
    names = [f"{DATABASE}{end}" for end in ("-wal", "-shm", "") if (directory / f"{DATABASE}{end}").exists()]
    if not names:
        return ""
    target = directory / f"state.corrupt-{time_in_names(now)}Z"
    while target.exists():
        now += 1
        target = directory / f"state.corrupt-{time_in_names(now)}Z"
    target.mkdir(mode=0o700)
    for name in names:
        (directory / name).rename(target / name)
    sync(target)
    sync(directory)
    return f"the database is in {target.name} now, "


def recover(directory: Path, damage: Damaged, version: int, now: int, *, accept_data_loss: bool) -> tuple[str, bool]:
    """Replace a damaged database: what was done, for the log, and whether the state begins at 0 now.

    Raises the damage again when there is no whole copy and nobody accepted the loss; StateError 74 when the disk fails.
    """
    copy = next(whole_copies(directory, version), None)
    if copy is None and not accept_data_loss:
        raise Damaged(str(damage), f"there is no whole copy; --accept-data-loss begins with what {SERVED} says")
    try:
        if copy is not None:
            shutil.copyfile(copy.path, directory / _RESTORING)
            sync(directory / _RESTORING)
        evidence = quarantine(directory, now)
        if copy is None:
            return f"{damage.finding}; {evidence}the state begins anew", True
        (directory / _RESTORING).rename(directory / DATABASE)
        sync(directory)
    except OSError as error:
        raise StateError(f"cannot restore {directory / DATABASE}: {error.strerror}", os.EX_IOERR) from None
    return f"{damage.finding}; {evidence}going on from {copy.path.name}, as of transaction {copy.commits}", False
