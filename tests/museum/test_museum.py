"""The exhibits of the museum fit the tree, and at full size every one of them is caught."""

from pathlib import Path

import pytest

from tests.museum import ROOT, Exhibit, run
from tests.museum.exhibits import EXHIBITS


@pytest.mark.parametrize("name", EXHIBITS)
def test_the_exhibit_fits_and_its_guards_are_there(name: str) -> None:
    exhibit: Exhibit = EXHIBITS[name]
    for file, old, new in exhibit.edits:
        assert (ROOT / file).read_text().count(old) == 1, f"{file}: {old!r}: bring the exhibit up to date"
        assert old != new
    for guard in exhibit.guards:
        file, _, test = guard.partition("::")
        assert not test or f"def {test.partition('[')[0]}(" in Path(ROOT / file).read_text(), guard


def test_there_are_exhibits() -> None:
    assert len(EXHIBITS) >= 25


def test_every_exhibit_is_caught(campaign: bool) -> None:
    if not campaign:
        pytest.skip("takes minutes; runs with --campaign")
    assert run(EXHIBITS) == []
