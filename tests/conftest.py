"""Fixtures shared by all tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--campaign", action="store_true", help="run the rigs at full size, for minutes; -n 0 -s shows their progress"
    )


@pytest.fixture(scope="session")
def campaign(pytestconfig: pytest.Config) -> bool:
    """Whether a rig runs at full size."""
    return bool(pytestconfig.getoption("--campaign"))


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
