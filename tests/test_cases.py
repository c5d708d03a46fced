"""Golden stories: what senders do, and what the counters say afterwards.

Each file of tests/cases is one behaviour in sections; `#` begins a comment.

  -- settings --      `name value` lines for LedgerSettings
  -- every point --   what all points of the story share, in the notation of a point
  -- in --            one point or one step a line
  -- out --           every series, `metric{labels} value`, in the metric's own unit
  -- totals --        every lifetime total that is not 0
  -- duplicate --     how many points were repeats; 0 where the section is left out
  -- dropped --       `reason count` lines

A point is `{key: value, ...}`. `start` and `time` are seconds, left out where the sender gave none. One of `delta`,
`cumulative`, `untyped` (a sum without temporality), `updown_delta`, `updown_cumulative` and `gauge` gives the value:
`4` is an integer, `4.0` a double, `none` nothing. `metric`, `scope` and `session` (`none`: no session.id) are what
they say, `resource.x` is an attribute of the resource, any other key one of the point: text, or a bare integer.

Points are gathered until a step. `post` sends them as one body, as do the end and every other step. `again` sends
the last body once more, byte for byte, `again 1` the first. `restart` stops and starts the bridge, `kill` takes the
files as they are, as after SIGKILL. `wait 3 days` moves the clock. `forget` and `expire` do the bridge's housekeeping.
`shown 7` says what all series show together at this moment.

Every story is told in ways that must end alike: as written, killed after every body, with the bodies between two
other steps in one commit, and by a bookkeeper that remembers nothing from one commit to the next.
"""

import asyncio
import json
import re
import shutil
import sqlite3
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import closing, contextmanager
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import pytest

from bridge import bookkeeper
from bridge.bookkeeper import LedgerSettings
from bridge.database import DATABASE
from bridge.ledger import Ledger
from bridge.model import Batch, Receipt
from bridge.otlp import Encoding, decode_metrics
from bridge.rows import SeriesRow
from bridge.state import StoreUnavailable
from bridge.store import Connect, Store

CASES = Path(__file__).parent / "cases"
WAYS = ("as written", "killed after every body", "in one commit", "without a cache")
SECOND = 10**9
HOURS = {"hours": 1, "days": 24}

T = TypeVar("T")


# --- a ledger that tests drive step by step --------------------------------------------------------------------


class Body(NamedTuple):
    """One request body, decoded."""

    batch: Batch
    data: bytes


class Unsynced(sqlite3.Connection):
    """A connection that does not wait for the disk: what is tested here is not power loss."""

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        return super().execute("pragma synchronous = off" if sql.startswith("pragma synchronous") else sql, parameters)


def unsynced(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5, factory=Unsynced)


class Rig:
    """A ledger with a directory and a clock of its own. Calls return when the ledger has answered.

    `start` comes first and `close` last; `rig_in` does both. `name` begins the names of its directories.
    """

    def __init__(
        self, directory: Path, settings: LedgerSettings | None = None, *, connect: Connect = unsynced, name: str = ""
    ) -> None:
        self.settings = settings or LedgerSettings()
        self.now_ms = 1_800_000_000_000
        self._connect = connect
        self._directories = (directory / f"{name}-{number}" for number in count())
        self.directory = next(self._directories)
        self.directory.mkdir()
        self._runner = asyncio.Runner()
        self._broken: list[object] = []
        self.given_up: list[StoreUnavailable] = []

    def start(self) -> None:
        """Load the state. Raises what Ledger.start raises."""
        self._runner.run(self._start())

    async def _start(self) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self._broken.append(context))
        self.ledger = Ledger(
            Store(self.directory, self._connect),
            self.settings,
            lambda: self.now_ms,
            self.failed,
        )
        await self.ledger.start()

    def failed(self, error: BaseException) -> None:
        """What the daemon ends for: a disk that fails again and again, or a ledger that broke."""
        if isinstance(error, StoreUnavailable):
            self.given_up.append(error)
        else:
            self._broken.append(error)

    def post(self, body: Body) -> Receipt:
        """Post one body. Raises StoreUnavailable as the ledger does."""
        return self.call(self.ledger.post(body.batch, body.data))

    def post_together(self, bodies: list[Body]) -> list[Receipt]:
        """Post bodies so that they share one commit: the writer waits until all of them stand in its queue."""
        return self.call(self._post_together(bodies))

    async def _post_together(self, bodies: list[Body]) -> list[Receipt]:
        loop, holding, queued = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

        def hold() -> None:
            loop.call_soon_threadsafe(holding.set)
            queued.wait(10)

        held = asyncio.ensure_future(self.ledger.run(hold))
        await holding.wait()
        answers = [asyncio.ensure_future(self.ledger.post(body.batch, body.data)) for body in bodies]
        await asyncio.sleep(0)
        queued.set()
        await held
        return [await answer for answer in answers]

    def call(self, request: Coroutine[Any, Any, T]) -> T:
        """Wait for the ledger, but not for one that broke."""
        return self._runner.run(self._answer(request))

    async def _answer(self, request: Coroutine[Any, Any, T]) -> T:
        task = asyncio.ensure_future(request)
        for _ in range(2000):
            done, _ = await asyncio.wait({task}, timeout=0.005)
            if done:
                return task.result()
            assert not self._broken, f"the ledger broke: {self._broken}"
        raise AssertionError("the ledger did not answer within 10 seconds")

    def forget(self) -> int:
        return self.call(self.ledger.forget())

    def stop(self) -> None:
        self.call(self.ledger.stop())

    def restart(self) -> None:
        self.stop()
        self.start()

    def image(self) -> Path:
        """A copy of the files as they are at this moment: what SIGKILL would leave."""
        image = next(self._directories)
        image.mkdir()
        for name in (DATABASE, f"{DATABASE}-wal"):
            if (self.directory / name).exists():
                shutil.copy(self.directory / name, image / name)
        return image

    def kill(self, image: Path | None = None) -> None:
        """Go on with the files as they are now, or as they were when `image` was taken."""
        image = image or self.image()
        self.stop()
        self.directory = image
        self.start()

    def close(self) -> None:
        self._broken.clear()  # said already
        with self._runner:
            self.stop()

    @property
    def totals(self) -> dict[str, int]:
        """The lifetime totals that are not 0."""
        return {name: value for name, value in self.ledger.totals.items() if value}

    @property
    def shown(self) -> dict[str, int | float]:
        """What every series shows, in 1/scale of its unit, by `metric{labels}`."""
        return {self.name_of(row): value_of(row) for row in self.ledger.rows()}

    def name_of(self, row: SeriesRow) -> str:
        """The series as the stories write it; job and instance where they are not the usual ones."""
        labels = dict(row.labels)
        if row.job not in ("", "claude-code"):
            labels["job"] = row.job
        if row.instance:
            labels["instance"] = row.instance
        pairs = ",".join(f'{key}="{text}"' for key, text in sorted(labels.items()))
        name = self.ledger.metrics[row.metric].name
        return f"{name}{{{pairs}}}" if pairs else name

    def scale_of(self, row: SeriesRow) -> int:
        return self.ledger.metrics[row.metric].scale or 1

    def is_counter(self, row: SeriesRow) -> bool:
        return self.ledger.metrics[row.metric].kind == "counter"


def value_of(row: SeriesRow) -> int | float:
    """What the series shows, in 1/scale of its unit."""
    assert isinstance(row.value, int | float)
    assert isinstance(row.base, int | float)
    return row.value - row.base


@contextmanager
def rig_in(
    directory: Path, settings: LedgerSettings | None = None, connect: Connect = unsynced
) -> Iterator[Rig]:  # fmt: skip
    """A rig that runs in the block."""
    with closing(Rig(directory, settings, connect=connect)) as rig:
        rig.start()
        yield rig


# --- reading stories -------------------------------------------------------------------------------------------


class Story(NamedTuple):
    """One file of tests/cases."""

    settings: LedgerSettings
    every_point: dict[str, str]
    steps: list[str]
    out: list[str]
    totals: dict[str, int]
    duplicate: int
    dropped: dict[str, int]


SECTIONS = {"settings", "every point", "in", "out", "totals", "duplicate", "dropped"}


def read_story(path: Path) -> Story:
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in path.read_text().splitlines():
        text = re.sub(r"(^|\s+)#.*", "", line).strip()
        if heading := re.fullmatch(r"-- ([a-z ]+) --\s*(.*)", text):
            assert heading[1] in SECTIONS, f"{path.name}: no section is called {heading[1]!r}"
            assert heading[1] not in sections, f"{path.name}: section {heading[1]!r} stands twice"
            lines = sections[heading[1]] = []
            text = heading[2]
        if text:
            lines.append(text)
    every_point = {key: value for text in sections.get("every point", ()) for key, value in read_point(text).items()}
    return Story(
        msgspec.convert(dict(map(str.split, sections.get("settings", ()))), LedgerSettings, strict=False),
        every_point,
        sections["in"],
        sorted(sections["out"]),
        {name: int(value) for name, value in map(str.split, sections.get("totals", ()))},
        sum(map(int, sections.get("duplicate", ()))),
        {reason: int(count) for reason, count in map(str.split, sections.get("dropped", ()))},
    )


def read_point(text: str) -> dict[str, str]:
    assert re.fullmatch(r"\{.*\}", text), f"not a point: {text}"
    return dict(re.findall(r"([\w.]+): ([^,}]+)", text))


# Of OTLP: the member that holds the points, and what it says about them.
FORMS: dict[str, tuple[str, dict[str, object]]] = {
    "delta": ("sum", {"aggregationTemporality": 1, "isMonotonic": True}),
    "cumulative": ("sum", {"aggregationTemporality": 2, "isMonotonic": True}),
    "untyped": ("sum", {"isMonotonic": True}),
    "updown_delta": ("sum", {"aggregationTemporality": 1}),
    "updown_cumulative": ("sum", {"aggregationTemporality": 2}),
    "gauge": ("gauge", {}),
}


def body_of(points: list[dict[str, str]]) -> Body:
    """The OTLP request in JSON that brings these points, and what the decoder makes of it."""
    data = json.dumps({"resourceMetrics": [resource_metrics_of(point) for point in points]}).encode()
    return Body(decode_metrics(data, Encoding.JSON), data)


def resource_metrics_of(point: dict[str, str]) -> dict[str, object]:
    point = dict(point)
    (form,) = FORMS.keys() & point.keys()
    member, description = FORMS[form]
    number = number_of(point.pop(form))
    times = {
        "startTimeUnixNano": str(int(point.pop("start", 0)) * SECOND),
        "timeUnixNano": str(int(point.pop("time", 0)) * SECOND),
    }
    name, scope = point.pop("metric", "claude_code.token.usage"), point.pop("scope", "com.anthropic.claude_code")
    session = point.pop("session", "none")
    if session != "none":
        point["session.id"] = session
    resource = {"service.name": "claude-code"}
    for key in [key for key in point if key.startswith("resource.")]:
        resource[key.removeprefix("resource.")] = point.pop(key)
    data = {"dataPoints": [{**times, **number, "attributes": attributes_of(point)}], **description}
    metrics = [{"name": name, member: data}]
    return {
        "resource": {"attributes": attributes_of(resource)},
        "scopeMetrics": [{"scope": {"name": scope}, "metrics": metrics}],
    }


def number_of(text: str) -> dict[str, object]:
    if text == "none":
        return {}
    return {"asInt": text} if re.fullmatch(r"-?\d+", text) else {"asDouble": text}


def attributes_of(attributes: dict[str, str]) -> list[dict[str, object]]:
    return [
        {"key": key, "value": {"intValue": text} if text.isdigit() else {"stringValue": text.strip('"')}}
        for key, text in attributes.items()
    ]


# --- telling them ----------------------------------------------------------------------------------------------


class Telling:
    """One story told to one ledger. Between any two answers no counter and no total may fall."""

    def __init__(self, rig: Rig, story: Story, way: str) -> None:
        self.rig, self.story, self.way = rig, story, way
        self.points: list[dict[str, str]] = []
        self.bodies: list[Body] = []
        self.waiting: list[Body] = []
        self.accepted, self.duplicate, self.dropped = 0, 0, Counter[str]()
        self.counters: dict[tuple[int, int], int | float] = {}
        self.totals: dict[str, int] = {}

    def tell(self) -> None:
        for step in self.story.steps:
            if step.startswith("{"):
                self.points.append({**self.story.every_point, **read_point(step)})
            else:
                self.take(*step.split())
        self.send_points()
        self.flush()

    def take(self, verb: str, *words: str) -> None:
        self.send_points()
        if verb == "again":
            self.send(self.bodies[int(words[0]) - 1 if words else -1])
        elif verb != "post":
            self.flush()
            self.do(verb, *words)

    def do(self, verb: str, *words: str) -> None:
        match verb, words:
            case "restart", ():
                self.rig.restart()
            case "kill", ():
                self.rig.kill()
            case "wait", (number, unit):
                self.rig.now_ms += int(number) * HOURS[unit] * 3_600_000
            case "forget", ():
                self.rig.forget()
            case "expire", ():
                self.rig.ledger.expire()
            case "shown", (value,):
                assert Decimal(value) == sum(Decimal(line.split()[-1]) for line in lines_of(self.rig))
            case _:
                raise AssertionError(f"no such step: {verb} {words}")

    def send_points(self) -> None:
        if self.points:
            body = body_of(self.points)
            self.points = []
            self.bodies.append(body)
            self.send(body)

    def send(self, body: Body) -> None:
        self.waiting.append(body)
        if self.way != "in one commit":
            self.flush()

    def flush(self) -> None:
        bodies, self.waiting = self.waiting, []
        if not bodies:
            return
        for body, receipt in zip(bodies, self.rig.post_together(bodies), strict=True):
            self.accepted += receipt.accepted
            self.duplicate += receipt.duplicate
            self.dropped.update(refusal.reason.value for refusal in receipt.refused)
            sent = len(body.batch.points) + len(body.batch.refused)
            assert receipt.accepted + receipt.duplicate + len(receipt.refused) == sent
        self.assert_nothing_fell()
        if self.way == "killed after every body":
            self.rig.kill()
            self.assert_nothing_fell()

    def assert_nothing_fell(self) -> None:
        rig = self.rig
        for name, total in self.totals.items():
            assert rig.ledger.totals[name] >= total, f"the total {name} fell"
        self.totals = dict(rig.ledger.totals)
        for row in filter(rig.is_counter, rig.ledger.rows()):
            life = (row.id, row.born)  # one that comes back is a new counter
            assert value_of(row) >= self.counters.get(life, 0), f"{rig.name_of(row)} fell"
            self.counters[life] = value_of(row)


def lines_of(rig: Rig) -> list[str]:
    """What the rig shows, as lines of a story."""
    rows = rig.ledger.rows()
    return sorted(f"{rig.name_of(row)} {digits(value_of(row), rig.scale_of(row))}" for row in rows)


def digits(value: int | float, scale: int) -> str:
    """The value in its unit, without an exponent."""
    number = Decimal(str(value)) / scale
    return f"{number:f}" if number.is_finite() else str(number)


STORIES = sorted(CASES.glob("*.txt"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", STORIES, ids=[path.stem for path in STORIES])
def test_story(path: Path, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    story = read_story(path)
    if way == "without a cache":
        monkeypatch.setattr(bookkeeper, "MAX_CACHED", 0)
    with rig_in(tmp_path, story.settings) as rig:
        telling = Telling(rig, story, way)
        telling.tell()
        assert lines_of(rig) == story.out
        assert rig.totals == story.totals
        assert telling.dropped == story.dropped
        assert telling.duplicate == story.duplicate
        rig.restart()
        assert lines_of(rig) == story.out
        assert rig.totals == story.totals


def test_there_are_stories() -> None:
    assert len(STORIES) > 30
