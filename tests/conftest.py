"""Fixtures shared by all tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon


@pytest.fixture
def make_daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Makes bridges that end with the test: `make_daemon(*flags, env=...)`, each with a directory of its own."""
    made: list[Daemon] = []

    def make(*arguments: str, env: dict[str, str] | None = None) -> Daemon:
        directory = tmp_path / f"bridge-{len(made)}"
        directory.mkdir()
        made.append(Daemon(directory, *arguments, env=env))
        return made[-1]

    yield make
    for daemon in made:
        daemon.close()


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon]) -> Daemon:
    """A bridge with default settings, ready."""
    return make_daemon().start()
