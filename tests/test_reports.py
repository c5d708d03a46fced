"""The command `report`: every grouping adds up to the same, in every time zone, whatever the source, and says how."""

import csv
import io
import json
import os
import random
import subprocess
import sys
import zoneinfo
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge import reports, tables
from bridge.cli import _main
from bridge.join import Worth, add_worth, worth
from bridge.model import Source, TranscriptRow, Usage, UsageCell
from bridge.store import Store
from bridge.tools.limits import limit_points
from bridge.usage import UsageBooks
from tests.daemon import PROTOBUF, Daemon
from tests.recordings import delta_body
from tests.test_cases import rig_in, unsynced
from tests.test_transcripts import append, eventually, follow_from_here, projects, wait_until_read
from tests.transcript_tree import MODELS, response

GOLDEN = Path(__file__).parent / "reports"
HOUR = 3600
DAY = 24 * HOUR
PERIODS = ("daily", "weekly", "monthly")
GROUPINGS = (*PERIODS, "session", "project", "model", "tool")
ZONES = (
    "UTC", "America/New_York", "Europe/Berlin", "Asia/Kolkata", "Asia/Kathmandu", "Australia/Lord_Howe",
    "Pacific/Chatham", "America/St_Johns", "Africa/Casablanca", "Pacific/Kiritimati", "Pacific/Apia",
)  # fmt: skip


# --- a state of one's own --------------------------------------------------------------------------------------


def price(usage: Usage) -> int | None:
    counts = (usage.input, usage.output, usage.cache_read, usage.cache_write)
    is_known = not usage.model.startswith("mystery")
    return sum(1000 * weight * count for weight, count in zip((3, 15, 1, 4), counts, strict=True)) if is_known else None


class State:
    """A state directory that is written as a bridge writes it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._store = Store(directory, connect=unsynced)
        self._store.open(0)
        self.books = UsageBooks(self._store, price, str, {"claude_code"})
        self.books.load()
        self._made = 0
        with self.transaction() as books:
            books.add_root("/home/ann/.claude/projects", [])

    @contextmanager
    def transaction(self) -> Iterator[UsageBooks]:
        with self._store.transaction():
            yield self.books
            self.books.flush(1, 1)

    def usage(self, at: str | int, **members: Any) -> Usage:
        """A request at a time (ISO, or Unix seconds)."""
        self._made += 1
        seconds = datetime.fromisoformat(at).timestamp() if isinstance(at, str) else at
        told: dict[str, Any] = {
            "tool": "claude_code", "source": Source.EVENT, "key": self._made.to_bytes(16, "big"), "session": "s1",
            "model": "claude-opus-5", "time_ms": int(seconds * 1000), "input": 10, "output": 20, "cache_read": 3000,
            "cache_write_5m": 0, "cache_write_1h": 400, "project": "/home/ann/app",
        }  # fmt: skip
        return Usage(**{**told, **members})

    def add(self, at: str | int, **members: Any) -> Usage:
        usage = self.usage(at, **members)
        with self.transaction() as books:
            assert books.add(usage)
        return usage

    def history(self, *usages: Usage) -> None:
        with self.transaction() as books:
            books.load_history(usages, 0)
            books.finish_history()

    def metric(self, at: str | int, session: str, model: str = "claude-opus-5", **amounts: int) -> None:
        seconds = datetime.fromisoformat(at).timestamp() if isinstance(at, str) else at
        with self.transaction() as books:
            for kind, amount in amounts.items():
                cell = UsageCell("claude_code", session, model, kind)
                books.add_metric(cell, amount, int(seconds * 1000), int(seconds * 1000) - 60_000)

    @property
    def truth(self) -> Worth:
        """What the cells are worth: what the counters show where nothing was corrected."""
        total = Worth()
        for row in self.books._store.truths().values():
            total = add_worth(total, add_worth(row.own, worth(row.pool)))
        return total

    def clear(self) -> None:
        self._store.execute("delete from rollup")

    def close(self) -> None:
        self._store.close()


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    (tmp_path / "state").mkdir()
    with closing(State(tmp_path / "state")) as state:
        yield state


class Output(NamedTuple):
    code: int
    text: str
    errors: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


Report = Callable[..., Output]


@pytest.fixture
def report(state: State, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Report:
    """The command on the state, of a user without settings."""
    monkeypatch.setenv("HOME", str(state.directory.parent))
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str, zone: str = "UTC") -> Output:
        named = ("--timezone", zone) if zone else ()
        code = _main(["--state-dir", str(state.directory), "report", *arguments, *named])
        return Output(code, *capsys.readouterr())

    return run


SUMS = ("requests", "input", "output", "cache_read", "cache_write", "tokens", "cost_usd", "unpriced_tokens")


def sums_of(amounts: dict[str, Any]) -> dict[str, Any]:
    return {name: amounts[name] for name in SUMS}


def added(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rows of a report come to."""
    sums = {name: sum(row[name] for row in rows) for name in SUMS}
    return {**sums, "cost_usd": round(sums["cost_usd"], 9)}


# --- what was used, by whatever ---------------------------------------------------------------------------------


def mixed(state: State, seed: int) -> list[Usage]:
    """Requests live and of history, and metrics of other sessions, around the days on which clocks change."""
    choose = random.Random(seed)
    days = ("2025-03-30", "2025-10-26", "2025-11-02", "2025-12-31", "2026-03-08", "2026-04-05", "2026-02-14")
    noons = [int(datetime.fromisoformat(f"{day}T12:00Z").timestamp()) for day in days]

    models = ("claude-opus-5", "claude-haiku-4-5")

    def some(count: int, prefix: str) -> list[Usage]:
        return [
            state.usage(
                choose.choice(noons) + choose.randrange(-36 * HOUR, 36 * HOUR),
                session=f"{prefix}{choose.randrange(4)}",
                tool=choose.choice(("claude_code", "claude_code", "codex")),
                model=choose.choice((*models, "gpt-6-astra", "mystery-1")),
                project=choose.choice(("/home/ann/app", "/home/ann/app/sub", "/srv/other", "")),
                input=choose.randrange(100), output=choose.randrange(1000), cache_read=choose.randrange(10**6),
            )
            for _ in range(count)
        ]  # fmt: skip

    live, history = some(60, "live"), some(60, "old")
    with state.transaction() as books:
        for usage in live:
            books.add(usage)
    state.history(*history)
    for session in ("live0", "only metrics"):
        state.metric(choose.choice(noons), session, choose.choice(models), output=9000, input=11, usd=77)
    state.metric(max(noons) + 2 * DAY, "", choose.choice(models), output=9000, input=11, usd=77)
    return [*live, *history]


@pytest.mark.parametrize("seed", range(2))
def test_every_report_has_the_same_total_in_every_zone(state: State, report: Report, seed: int) -> None:
    usages = mixed(state, seed)
    old = [usage for usage in usages if usage.session.startswith("old")]
    total = sums_of(report("--json").json["total"])
    truth = state.truth
    assert total["tokens"] == sum(truth.tokens) + sum(u.input + u.output + u.cache_read + u.cache_write for u in old)
    assert total["cost_usd"] == (truth.cost + sum(price(usage) or 0 for usage in old)) / 1e9
    assert total["requests"] == len(usages)
    for zone in ZONES[seed::3]:
        for kind in GROUPINGS:
            found = report(kind, "--json", zone=zone).json
            assert sums_of(found["total"]) == total, (zone, kind)
            assert added(found["rows"]) == total, (zone, kind)
            lines = list(csv.DictReader(io.StringIO(report(kind, "--csv", zone=zone).text)))
            assert sum(int(line["tokens"]) for line in lines) == total["tokens"]
    of_tools = [report("blocks", "--tool", tool, "--json").json["total"] for tool in ("claude_code", "codex")]
    assert added(of_tools) == total


@pytest.mark.parametrize("zone", ZONES)
def test_days_are_those_of_the_zone_to_the_quarter_of_an_hour(state: State, report: Report, zone: str) -> None:
    usages = [usage for usage in mixed(state, 7) if usage.session.startswith("old")]
    expected: Counter[str] = Counter()
    for usage in usages:
        when = datetime.fromtimestamp(usage.time_ms / 1000, ZoneInfo(zone))
        expected[when.date().isoformat()] += 1
    live: Counter[str] = Counter()
    found = report("daily", "--json", zone=zone).json["rows"]
    for at, session in select_times(state):
        live[datetime.fromtimestamp(at / 1000, ZoneInfo(zone)).date().isoformat()] += not session.startswith("old")
    assert {row["date"]: row["requests"] for row in found if row["requests"]} == dict(expected + live)
    days = sorted(expected + live)
    for since, until in ((days[1], days[-2]), (days[0], days[0])):
        chosen = {
            kind: report(kind, "--since", since, "--until", until, "--json", zone=zone).json for kind in GROUPINGS
        }
        assert chosen["daily"]["rows"] == [row for row in found if since <= row["date"] <= until]
        for kind, told in chosen.items():
            assert sums_of(told["total"]) == sums_of(chosen["daily"]["total"]), kind


def select_times(state: State) -> list[tuple[int, str]]:
    sql = "select time, session.name from usage join session on session.id = session where is_counted"
    rows: list[tuple[int, str]] = state._store.execute(sql).fetchall()
    return rows


def test_weeks_begin_on_monday_and_months_on_the_first(state: State, report: Report) -> None:
    for day in ("2026-01-31", "2026-02-01", "2026-02-02"):
        state.add(f"{day}T12:00Z")
    assert [row["week"] for row in report("weekly", "--json").json["rows"]] == ["2026-01-26", "2026-02-02"]
    assert [row["month"] for row in report("monthly", "--json").json["rows"]] == ["2026-01", "2026-02"]


@given(
    st.sampled_from(ZONES), st.integers(946_684_800 // 900, 4_102_444_800 // 900), st.integers(1, 5 * 365 * 96)
)  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_segments_have_one_offset_each_and_leave_nothing_out(zone: str, begin: int, length: int) -> None:
    def offset(at: int) -> int:
        found = datetime.fromtimestamp(at, ZoneInfo(zone)).utcoffset()
        assert found is not None
        return int(found.total_seconds())

    parts = reports.segments(begin, begin + length, offset)
    assert [part.begin for part in parts] == [begin, *(part.end for part in parts[:-1])]
    assert parts[-1].end == begin + length
    for part in parts:
        step = max(1, (part.end - part.begin) // 50)
        for quarter in (*range(part.begin, part.end, step), part.end - 1):
            assert offset(quarter * 900) == part.offset


def test_a_day_begins_where_the_zone_says_it_does() -> None:
    for zone in ZONES:
        place = ZoneInfo(zone)

        def offset(at: int, place: ZoneInfo = place) -> int:
            found = datetime.fromtimestamp(at, place).utcoffset()
            assert found is not None
            return int(found.total_seconds())

        for day in (date(2026, 3, 29), date(2026, 10, 25), date(2026, 11, 1), date(2026, 4, 5), date(2026, 7, 1)):
            first = reports.first_quarter(day, offset) * 900
            assert datetime.fromtimestamp(first, place).date() == day
            assert datetime.fromtimestamp(first - 900, place).date() == day - timedelta(days=1)


def test_times_of_broken_clocks_harm_nothing(state: State, report: Report) -> None:
    state.add("1970-01-01T00:00Z")
    state.add("9999-12-31T23:59Z")
    state.add("2026-02-14T12:00Z")
    for kind in (*GROUPINGS, "blocks"):
        assert report(kind, "--json", zone="America/New_York").json["total"]["requests"] == 3


# --- what is asked for -----------------------------------------------------------------------------------------


@pytest.fixture
def several(state: State) -> State:
    state.add("2026-02-14T12:00Z")
    state.add("2026-02-14T12:01Z", project="/home/ann/app/sub", model="claude-haiku-4-5", session="s2")
    state.add("2026-02-15T12:00Z", project="/srv/application", tool="codex", model="gpt-6-astra", session="s3")
    state.add("2026-02-16T12:00Z", project="", model="mystery-1", session="s4")
    return state


@pytest.mark.parametrize(
    ("arguments", "sessions"),
    [
        (["--model", "opus"], {"s1"}),
        (["--model", "OPUS", "--model", "mystery"], {"s1", "s4"}),
        (["--model", "*-5"], {"s1", "s2"}),
        (["--tool", "codex"], {"s3"}),
        (["--tool", "claude", "--model", "haiku"], {"s2"}),
        (["--project", "/home/ann/app"], {"s1", "s2"}),
        (["--project", "app"], {"s1", "s2"}),
        (["--project", "ann/app/sub"], {"s2"}),
        (["--project", "/srv/*"], {"s3"}),
        (["--project", ""], {"s4"}),
        (["--since", "2026-02-15"], {"s3", "s4"}),
        (["--until", "20260215"], {"s1", "s2", "s3"}),
        (["--since", "2026-02-15", "--until", "2026-02-15"], {"s3"}),
        (["--model", "nothing"], set()),
    ],
)
def test_filters(several: State, report: Report, arguments: list[str], sessions: set[str]) -> None:
    rows = report("session", *arguments, "--json").json["rows"]
    assert {row["session"] for row in rows} == sessions
    for kind in GROUPINGS:
        assert added(report(kind, *arguments, "--json").json["rows"]) == added(rows), kind


def test_a_pattern_that_nothing_matches_is_told_with_what_there_is(several: State, report: Report) -> None:
    output = report("--model", "gtp")
    assert output.code == 0
    assert "No usage is recorded there." in output.text
    known = "claude-haiku-4-5, claude-opus-5, gpt-6-astra, mystery-1"
    assert output.errors == f"--model gtp: nothing of that name was used; known are {known}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--since", "tomorrow"], "--since tomorrow: expected a day such as 2026-11-28"),
        (["--until", "2026-02-30"], "--until 2026-02-30: expected a day"),
        (["--since", "2026-02-02", "--until", "2026-02-01"], "--since 2026-02-02 is after --until 2026-02-01"),
        (["--timezone", "Mars/Olympus"], "--timezone Mars/Olympus: expected a name such as Europe/Berlin"),
        (["--timezone", "../../etc/passwd"], "--timezone ../../etc/passwd: expected a name"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_expected(report: Report, arguments: list[str], said: str) -> None:
    output = report(*arguments, zone="")
    assert output.code == 64
    assert output.errors.startswith(f"claude-otel-bridge: {said}")


@pytest.mark.parametrize("arguments", [["--since", "-3d"], ["--until"]])
def test_a_day_that_looks_like_an_option_is_refused_likewise(
    report: Report, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        report(*arguments)
    assert ended.value.code == 64
    assert "yesterday, or 7d for the last seven" in capsys.readouterr().err


def test_days_can_be_named_from_today_on(state: State, report: Report) -> None:
    now = datetime.now(UTC)
    for days in (0, 1, 6, 7):
        state.add(int((now - timedelta(days=days)).timestamp()))
    for since, count in (("today", 1), ("yesterday", 2), ("7d", 3), ("8d", 4)):
        assert report("--since", since, "--json").json["total"]["requests"] == count


def test_what_metrics_alone_saw_of_a_session_is_of_its_project(state: State, report: Report) -> None:
    state.add("2026-02-14T12:00Z", session="s1", cost=5)
    state.metric("2026-02-14T12:01Z", "s1", "claude-haiku-4-5", output=7, usd=9)
    state.metric("2026-02-14T12:01Z", "s9", "claude-haiku-4-5", output=3, usd=2)
    rows = report("project", "--json").json["rows"]
    assert {row["project"]: row["output"] for row in rows} == {"/home/ann/app": 27, "": 3}
    assert report("--project", "app", "--json").json["total"]["output"] == 27


# --- how it is shown -------------------------------------------------------------------------------------------


@pytest.fixture
def told(state: State) -> State:
    """A small story with all that a report can show."""
    state.history(
        state.usage("2026-02-13T23:50Z", session="a3f8c2d1-old", input=1200, output=34_567, cache_read=8_900_000),
        state.usage("2026-02-13T08:10Z", session="a3f8c2d1-old", model="claude-haiku-4-5", cache_write_1h=0),
    )
    state.add("2026-02-14T12:00Z", session="b7e0-live", output=123_456, cache_read=98_765_432, cache_write_5m=70_000)
    state.add("2026-02-14T19:05Z", session="c1", tool="codex", model="gpt-6-astra", project="/srv/a\x1b[31m,b")
    state.add("2026-02-15T01:00Z", session="=1+1", model="mystery-1", project="=cmd|' /C calc'!A0")
    state.metric("2026-02-15T02:00Z", "only-metrics", output=999, usd=123_456_789)
    return state


GOLDEN_CASES = [
    *((kind, form) for kind in ("daily", "session", "model") for form in ("text", "json", "csv")),
    ("project", "csv"), ("project", "text"), ("tool", "text"), ("monthly", "text"), ("blocks", "text"),
    ("blocks", "json"), ("blocks", "csv"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "form"), GOLDEN_CASES)
def test_golden_reports(told: State, report: Report, kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change that is meant, delete a file to have it written anew."""
    now = datetime.fromisoformat("2026-02-15T02:30Z").timestamp()
    monkeypatch.setattr("bridge.reporting.time.time", lambda: now)
    output = report(kind, *([f"--{form}"] if form != "text" else []), zone="Europe/Berlin")
    assert output.code == 0
    golden = GOLDEN / f"{kind}.{form.replace('text', 'txt')}"
    if not golden.exists():
        golden.write_text(output.text)
    assert output.text == golden.read_text()


@pytest.mark.parametrize("kind", [*GROUPINGS, "blocks"])
def test_tables_fit_the_terminal_and_keep_every_digit(
    told: State, report: Report, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = report(kind, "--json").json["total"]
    for width in (80, 90, 100, 110, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = report(kind).text.splitlines()
        first, last = (at for at, line in enumerate(lines) if line.startswith("─"))
        assert all(tables.display_width(line) <= width for line in lines[first - 1 : last + 2])
        assert f"{total['tokens']:,}" in lines[last + 1]
        assert f"${total['cost_usd']:,.2f}{'*' if total['unpriced_tokens'] else ''}" in lines[last + 1]
        assert not any("\x1b" in line for line in lines)


@pytest.mark.parametrize("width", ["200", ""])
def test_a_wide_terminal_and_a_file_have_all_columns(
    told: State, report: Report, width: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    header = next(line for line in report("session").text.splitlines() if line.startswith("Last used"))
    titles = ("Project", "Models", "Requests", "Input", "Output", "Cache write", "Cache read", "Tokens", "Cost")
    assert [title for title in titles if f" {title}" not in header] == []


def test_models_without_a_price_are_named(told: State, report: Report) -> None:
    text = report("daily").text
    assert "* Without a price, so not in the cost: mystery-1 (3,430 tokens)." in text
    assert "API-equivalent" in text
    assert report("daily", "--json").json["unpriced_models"] == {"mystery-1": 3430}


def test_what_has_no_price_at_all_is_never_shown_as_0_dollars(
    state: State, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.add("2026-02-14T12:00Z", model="mystery-1", cost=None)
    now = datetime.fromisoformat("2026-02-14T12:30Z").timestamp()
    monkeypatch.setattr("bridge.reporting.time.time", lambda: now)
    for kind in (*GROUPINGS, "blocks"):
        rows = [line for line in report(kind).text.splitlines() if line.endswith(" -*")]
        assert len(rows) == 2, "of the model and of the sum"
        assert "$" not in report(kind).text
    assert "If that goes on: 3" in report("blocks").text


def test_no_cell_of_a_csv_is_a_formula(told: State, report: Report) -> None:
    for kind in (*GROUPINGS, "blocks"):
        for row in csv.reader(io.StringIO(report(kind, "--csv").text)):
            assert not [cell for cell in row if cell.startswith(("=", "+", "@", "\t", "\r"))]
            assert not [cell for cell in row if cell.startswith("-") and not cell[1:].replace(".", "").isdecimal()]


def test_sessions_are_told_apart_where_their_names_begin_alike(state: State, report: Report) -> None:
    for session in ("01a2237a-bd20-7cf1-8c47-5a6fb06936a9", "01a2237a-caef-7c43-9b97-5ad5f1884488", "b1095119-x", ""):
        state.add("2026-02-14T12:00Z", session=session)
    text = report("session").text
    assert all(f" {shown} " in text for shown in ("…06936a9", "…1884488", "b1095119", "(none)"))


def test_an_empty_state_has_an_empty_report(report: Report) -> None:
    for kind in (*GROUPINGS, "blocks"):
        assert "No usage is recorded there." in report(kind).text
        assert report(kind, "--json").json["total"]["tokens"] == 0
        assert len(report(kind, "--csv").text.splitlines()) == 1


# --- blocks ----------------------------------------------------------------------------------------------------


def test_blocks_begin_with_the_hour_of_a_request_and_last_five(state: State, report: Report) -> None:
    def f(hours: list[int], want: list[tuple[int, int, bool]]) -> None:
        state.clear()
        midnight = int(datetime.fromisoformat("2026-02-14T00:00Z").timestamp())
        for hour in hours:
            state.add(midnight + hour * HOUR + 59 * 60)
        found = report("blocks", "--json", "--until", "2026-02-15").json["blocks"]
        assert [
            ((seconds(block["start"]) - midnight) // HOUR, (seconds(block["end"]) - midnight) // HOUR, block["gap"])
            for block in found[:-1]  # the last one is the gap up to now
        ] == want
        assert added(found)["requests"] == len(hours)

    def seconds(at: str) -> int:
        return int(datetime.fromisoformat(at).timestamp())

    f([10], [(10, 15, False)])
    f([14, 10], [(10, 15, False)])
    f([10, 15], [(10, 15, False), (15, 20, False)])
    f([10, 14, 15, 19, 20], [(10, 15, False), (15, 20, False), (20, 25, False)])
    f([10, 16], [(10, 15, False), (15, 16, True), (16, 21, False)])
    f([10, 13, 17, 20], [(10, 15, False), (15, 17, True), (17, 22, False)])


def test_what_is_chosen_of_a_block_does_not_move_it(state: State, report: Report) -> None:
    state.add("2026-02-14T10:00Z", project="/srv/other")
    state.add("2026-02-14T09:00Z", tool="codex")
    state.add("2026-02-14T12:00Z")
    (block, _) = report("blocks", "--project", "app", "--json").json["blocks"]
    assert (block["start"], block["requests"]) == ("2026-02-14T10:00:00Z", 1)
    (block, _) = report("blocks", "--tool", "codex", "--json").json["blocks"]
    assert (block["start"], block["tools"]) == ("2026-02-14T09:00:00Z", ["codex"])
    (block, _) = report("blocks", "--tool", "*", "--json").json["blocks"]
    assert (block["start"], block["requests"]) == ("2026-02-14T09:00:00Z", 3)


def test_blocks_follow_the_clock_of_the_vendor_not_of_the_zone(state: State, report: Report) -> None:
    state.add("2026-02-14T12:50Z")
    (block, _) = report("blocks", "--json", zone="Asia/Kolkata").json["blocks"]
    assert (block["start"], block["end"]) == ("2026-02-14T12:00:00Z", "2026-02-14T17:00:00Z")
    assert "2026-02-14 17:30" in report("blocks", zone="Asia/Kolkata").text


def test_the_active_block_tells_its_rate_and_what_it_comes_to(
    state: State, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.add("2026-02-14T03:00Z")
    state.add("2026-02-14T12:30Z", input=600, output=0, cache_read=0, cache_write_1h=0, cost=2_000_000_000)
    state.add("2026-02-14T13:10Z", input=600, output=0, cache_read=0, cache_write_1h=0, cost=2_000_000_000)
    at = datetime.fromisoformat("2026-02-14T13:30Z").timestamp()
    monkeypatch.setattr("bridge.reporting.time.time", lambda: at)
    (block,) = report("blocks", "--active", "--json").json["blocks"]
    assert block["active"]
    assert report("blocks", "--active", "--tool", "codex").text.startswith("No block is active")
    assert block["tokens"] == 1200
    assert block["burn"] == {
        "tokens_per_minute": 20.0, "cost_usd_per_hour": 4.0, "minutes_left": 210, "projected_tokens": 5400,
        "projected_cost_usd": 18.0,
    }  # fmt: skip
    text = report("blocks").text
    assert "Active until 2026-02-14 17:00, 3 h 30 min left." in text
    assert "20 tokens/min, $4.00/h" in text
    assert "5,400 tokens, $18.00" in text


# --- a running bridge ------------------------------------------------------------------------------------------


def test_a_report_is_the_same_from_a_running_a_killed_and_a_stopped_bridge(
    make_daemon: Callable[..., Daemon], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the counters show is what is reported, also of sessions that only metrics, or only transcripts saw."""
    daemon = follow_from_here(make_daemon())
    monkeypatch.setenv("HOME", str(daemon.directory))
    for session in ("s1", "only metrics"):
        attributes = {"type": "output", "model": MODELS[0], "session.id": session}
        body = delta_body("claude_code.token.usage", [17], attributes)
        assert daemon.post("/v1/metrics", body, PROTOBUF).status == 200
    append(projects(daemon) / "p" / "s.jsonl", *(response(f"msg_{at}", f"req_{at}") for at in range(5)))
    wait_until_read(daemon, projects(daemon))

    def reported(kind: str) -> dict[str, Any]:
        assert _main(["--state-dir", str(daemon.state_dir), "report", kind, "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out)["total"])

    def shown() -> dict[str, int]:
        samples = {key: value for key, value in daemon.samples().items() if "token_usage" in key}
        return dict(zip(("input", "output", "cache_read", "cache_write"), map(int, samples.values()), strict=True))

    assert eventually(lambda: shown()["output"] == 117)
    counted = shown()
    for step in (lambda: None, daemon.kill, daemon.start, daemon.stop):
        step()
        files = {path.name for path in daemon.state_dir.iterdir()}
        for kind in GROUPINGS:
            total = reported(kind)
            assert {name: total[name] for name in counted} == counted, kind
        if step == daemon.stop:
            assert {path.name for path in daemon.state_dir.iterdir()} == files, "reading left files behind"


def test_history_that_is_still_read_is_told(state: State, report: Report) -> None:
    state._store.execute("delete from root")
    assert "No transcript has been looked at yet" in report().errors
    unread = TranscriptRow(0, "/t/a.jsonl", 1, 1, b"", 4 << 20, 10 << 20, 10 << 20, 0)
    with state.transaction() as books:
        books.add_root("/t", [unread, unread._replace(path="/t/b.jsonl", history=2 << 20, history_end=2 << 20)])
        books.load_history([state.usage("2026-02-14T12:00Z")], 0)
    output = report("--json")
    assert output.errors == (
        "History is still being read: 1 of 2 files, 6 of 12 MiB; it is not in these numbers yet."
        " The bridge goes on with it when it runs.\n"
    )  # fmt: skip
    assert not output.json["complete"]
    with state.transaction() as books:
        books.finish_history()
    output = report("--json")
    assert (output.errors, output.json["complete"], output.json["total"]["requests"]) == ("", True, 1)


def test_limits_that_history_tells_of_are_not_shown_as_those_of_now(tmp_path: Path) -> None:
    row = TranscriptRow(0, "/t/rollout.jsonl", 1, 1, b"", 0, 9, 9, 0)
    points = limit_points("codex", "five_hour", 0.4, 1_800_000_900, 1_800_000_000_000)
    with rig_in(tmp_path) as rig:
        for is_history, shown in ((True, 0), (False, 2)):
            rig.call(rig.ledger.post_transcript(row, (), points, is_history=is_history))
            assert len(rig.ledger.families) == shown


def test_without_a_state_it_says_where_it_looked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["--state-dir", str(tmp_path / "none"), "report"]) == 66
    assert f"there is no state in {tmp_path / 'none'}" in capsys.readouterr().err


def test_a_database_that_nobody_has_begun_is_of_no_older_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state.db").touch()
    assert _main(["--state-dir", str(tmp_path), "report"]) == 66
    assert f"{tmp_path}/state.db is empty, or no database of this program" in capsys.readouterr().err


def test_a_state_that_may_not_be_read_is_no_broken_disk(capsys: pytest.CaptureFixture[str]) -> None:
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        (Path(name) / "state.db").touch(mode=0o600 if os.geteuid() == 0 else 0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            assert _main(["--state-dir", name, "report"]) == 77
        finally:
            os.seteuid(user)
    assert f"permission denied: {name}/state.db" in capsys.readouterr().err


def test_another_schema_and_a_damaged_database_are_refused(state: State, report: Report) -> None:
    state.add("2026-02-14T12:00Z")
    state._store.execute("pragma user_version = 99")
    output = report()
    assert output.code == 65
    assert "has schema 99, that of a newer version" in output.errors
    state.close()
    (state.directory / "state.db").write_bytes(b"not a database" * 1000)
    output = report()
    assert output.code == 74
    assert "cannot read" in output.errors
    assert "doctor" in output.errors


@pytest.mark.parametrize(("redirected", "why"), [(">/dev/full", "No space left on device"), (">&-", "it is closed")])
def test_an_output_that_takes_nothing_is_told_without_a_traceback(told: State, redirected: str, why: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    command = f"exec {sys.executable} -m bridge report --state-dir {told.directory} {redirected}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (74, f"claude-otel-bridge: cannot write to standard output: {why}\n")


@pytest.mark.parametrize("flag", ["--csv", "--help"])
def test_a_pager_may_be_left_at_once(told: State, flag: str) -> None:
    command = f"({sys.executable} -m bridge report {flag} --state-dir {told.directory}; echo $? >&2) | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == "0\n"


def test_a_machine_without_time_zones_is_told_of_as_that(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    zoneinfo.ZoneInfo.clear_cache()
    zoneinfo.reset_tzpath(to=())
    monkeypatch.setitem(sys.modules, "tzdata", None)
    try:
        output = report(zone="Europe/Berlin")
    finally:
        zoneinfo.reset_tzpath()
    assert output.code == 64
    assert output.errors == (
        "claude-otel-bridge: --timezone Europe/Berlin: this system has no time zones; install its package tzdata,"
        " or ask for UTC\n"
    )  # fmt: skip


def test_only_blocks_can_be_active(report: Report) -> None:
    output = report("daily", "--active")
    assert (output.code, output.text) == (64, "")
    assert output.errors == "claude-otel-bridge: --active is for blocks: claude-otel-bridge report blocks --active\n"


def test_the_width_of_a_name_is_that_on_a_terminal() -> None:
    def f(name: str, want: int) -> None:
        assert tables.display_width(name) == want, ascii(name)

    f("app", 3)
    f("caf\u00e9", 4)
    f("cafe\u0301", 4)
    f("\u5834\u6240", 4)
    f("\ud55c", 2)
    f("\u1112\u1161\u11ab", 2)  # the same syllable as macOS spells it in the names of files
    f("\u0e17\u0e35\u0e48", 1)  # Thai: a vowel and a tone above a consonant
    f("\u0928\u094d", 1)  # Hindi: a consonant without its vowel


def test_the_end_of_a_wide_path_takes_no_more_room_than_that_of_another(state: State, report: Report) -> None:
    state.add("2026-02-14T12:00Z", project="/home/ann/" + "プロジェクト/" * 9)
    assert " …ジェクト/プロジェクト/  opus-5" in report("session").text


def test_a_report_loads_nothing_that_starts_slowly(told: State, tmp_path: Path) -> None:
    script = (
        "import sys; from bridge.__main__ import main; import atexit;"
        "atexit.register(lambda: print(*sorted(sys.modules), file=sys.stderr)); main()"
    )
    command = [sys.executable, "-S", "-c", script, "report", "--state-dir", str(told.directory)]
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "opus-5" in done.stdout
    slow = {
        "aiohttp", "asyncio", "google", "opentelemetry", "msgspec", "prometheus_client", "uvloop", "watchfiles",
        "json", "pathlib", "shutil", "zoneinfo", "bridge.config", "bridge.daemon",
    }  # fmt: skip
    assert not slow & set(done.stderr.splitlines()[-1].split())


# --- for other readers -----------------------------------------------------------------------------------------


def test_the_views_have_what_the_reports_have(told: State, report: Report) -> None:
    total = report("--json").json["total"]
    sums = (
        "sum(requests), sum(input), sum(output), sum(cache_read), sum(cache_write), sum(tokens), sum(unpriced_tokens)"
    )
    names = ("requests", "input", "output", "cache_read", "cache_write", "tokens", "unpriced_tokens")
    assert told._store.execute(f"select {sums} from usage_sums").fetchone() == tuple(total[name] for name in names)
    ((cost,),) = told._store.execute("select sum(cost_usd) from usage_sums")
    assert cost == pytest.approx(total["cost_usd"])
    ((count, tokens),) = told._store.execute("select count(*), sum(tokens) from usage_requests")
    assert (count, tokens) == (total["requests"], total["tokens"] - 999)
    assert told._store.execute("select distinct part from usage_sums order by 1").fetchall() == [
        ("history",), ("metrics",), ("requests",),
    ]  # fmt: skip


def test_the_readme_shows_a_report_and_the_columns_of_the_views(told: State) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert (GOLDEN / "daily.txt").read_text() in readme
    for view in ("usage_sums", "usage_requests"):
        cursor = told._store.execute(f"select * from {view}")
        (line,) = (line for line in readme.splitlines() if line.startswith(f"| `{view}`"))
        named = [part for part in line.split("`")[3::2] if part != "history_days"]
        assert named == [column for column, *_ in cursor.description]
