"""Golden databases: `v1.db` is what the story `v1.txt` leaves on disk under schema 1, and the story says what stands
in it. Every later version must open it, show the same, and know all of its points again.

`python -m tests.databases` writes the one of the current schema anew. Once a version is released, its database stays
as it is.
"""

import shutil
from pathlib import Path

from bridge.database import DATABASE, SCHEMA_VERSION
from tests.test_cases import Telling, lines_of, read_story, rig_in

HERE = Path(__file__).parent


def write(directory: Path) -> Path:
    """Tell the current schema's story in a new state and keep its database."""
    story = read_story(HERE / f"v{SCHEMA_VERSION}.txt")
    golden = HERE / f"v{SCHEMA_VERSION}.db"
    with rig_in(directory, story.settings) as rig:
        Telling(rig, story, "as written").tell()
        assert (lines_of(rig), rig.totals) == (story.out, story.totals)
        rig.stop()
        shutil.copy(rig.directory / DATABASE, golden)
    return golden
