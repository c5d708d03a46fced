"""What transcript lines and events of Claude Code say, and that deduplicated lines meet the truth of whole trees."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from bridge.jsonl import Lines
from bridge.model import Drop, Event, Resource, Source, Usage
from bridge.otlp import CONTENT_KEYS
from bridge.tools.claude_code import EVENT_KEYS, read_event
from bridge.tools.claude_code_lines import TRANSCRIPTS
from bridge.tools.claude_code_lines import Lines as LineReader
from tests.recordings import EXPECTED, RUNS
from tests.transcript_tree import Case, Request, Truth, edge_cases, progress, response, write_edge_cases, write_tree

RECORDED = Path(__file__).parent / "recordings" / "transcripts"
LAWS = settings(derandomize=True, deadline=None, max_examples=300)


def usages(content: bytes, order: int = 0) -> tuple[list[Usage], list[Drop]]:
    """All that a file says, repeats included, and why lines of it were refused."""
    lines = Lines(TRANSCRIPTS.keys, TRANSCRIPTS.types)
    reader = TRANSCRIPTS.reader("", order, b"")
    read = [one for line in lines.feed(content) for one in all_of(reader.read(line))]
    return [one for one in read if isinstance(one, Usage)], [one for one in read if isinstance(one, Drop)]


def all_of(said: tuple[Usage | Drop, ...] | Drop) -> tuple[Usage | Drop, ...]:
    return (said,) if isinstance(said, Drop) else said


def settled(found: Iterable[Usage]) -> list[Usage]:
    """Each request once: of copies the one with the highest output, and no replay of a known response."""
    best: dict[bytes, Usage] = {}
    for usage in found:
        other = best.get(usage.key)
        if other is None or (usage.output, not usage.is_sidechain) > (other.output, not other.is_sidechain):
            best[usage.key] = usage
    known = {usage.message for usage in best.values() if usage.request_id and not usage.is_sidechain}
    return [usage for usage in best.values() if not (usage.is_sidechain and usage.message in known)]


def requests(found: Iterable[Usage]) -> list[Request]:
    return sorted(
        Request(
            usage.model, usage.input, usage.output, usage.cache_read, usage.cache_write_5m, usage.cache_write_1h,
            usage.web_searches, usage.speed, usage.geo, usage.cost or 0,
        )
        for usage in settled(found)
    )  # fmt: skip


def usages_under(root: Path, *, is_reversed: bool = False) -> list[Usage]:
    paths = sorted(root.rglob("*.jsonl"), reverse=is_reversed)
    return [usage for path in paths for usage in usages(path.read_bytes())[0]]


def read_line(line: bytes, order: int) -> tuple[Usage, ...] | Drop:
    """What one line says by itself."""
    return LineReader("", order, b"").read(line)


def one(line: bytes, order: int = 7) -> Usage:
    result = read_line(line, order)
    assert not isinstance(result, Drop)
    (usage,) = result
    return usage


# --- the rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_reversed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", edge_cases(), ids=lambda case: case.name)
def test_rule(case: Case, is_reversed: bool) -> None:
    read = [usages(content) for content in case.files.values()]
    found = [usage for file_usages, _ in read for usage in file_usages]
    assert requests(reversed(found) if is_reversed else found) == sorted(case.requests)
    assert sum(len(refused) for _, refused in read) == case.refused


@pytest.mark.parametrize(
    ("members", "want"),
    [
        ({}, {"session": "s1", "project": "/home/u/case", "time_ms": 1795235255596, "request_id": "r", "order": 7}),
        ({"sessionId": "s2", "cwd": None}, {"session": "s2", "project": ""}),
        ({"timestamp": "2026-11-21T04:27:35Z"}, {"time_ms": 1795235255000}),
        ({"timestamp": "2026-11-21T05:27:35.5+01:00"}, {"time_ms": 1795235255500}),
        ({"timestamp": "2026-11-21T04:27:35.123456Z"}, {"time_ms": 1795235255123}),
        ({"timestamp": "2026-11-21T04:27:35"}, {"time_ms": 1795235255000}),
        ({"timestamp": "yesterday"}, {"time_ms": 7}),
        ({"timestamp": "0001-01-01T00:00:00Z"}, {"time_ms": 7}),
        ({"timestamp": None}, {"time_ms": 7}),
        ({"isSidechain": True}, {"is_sidechain": True}),
        ({"isSidechain": None}, {"is_sidechain": False}),
        ({"costUSD": 0.0123456789}, {"cost": 12345679}),
        ({"costUSD": 3}, {"cost": 3_000_000_000}),
        ({"costUSD": -1}, {"cost": None}),
        ({"costUSD": 1e300}, {"cost": None}),
        ({"cwd": "x" * 2000}, {"project": "x" * 1024}),
        ({"type": None}, {"input": 10}),
        ({"type": None, "cwd": 5}, {"input": 10, "project": ""}),
        ({}, {"cost": None, "duration_ms": None, "user": "", "tool": "claude_code", "source": Source.TRANSCRIPT}),
    ],
)
def test_members_of_a_line(members: dict[str, Any], want: dict[str, Any]) -> None:
    usage = one(response("m", "r", **members))
    assert {name: getattr(usage, name) for name in want} == want


OFTEN = response("m", "r", {"service_tier": "standard"}, content=[{"type": "text", "text": "a"}])
QUOTING = [{"type": "tool_use", "input": {"usage": {"input_tokens": 10, "output_tokens": 20}}}]


@pytest.mark.parametrize(
    ("line", "is_repeat"),
    [
        (OFTEN, True),
        (OFTEN.replace(b'"text":"a"', b'"text":"another block"').replace(b'"u-m', b'"v-m'), True),
        (OFTEN.replace(b'"parentUuid":null', b'"parentUuid":"0-1"'), True),
        (OFTEN.replace(b'"requestId"', b'"apiBlockIndex":1,"requestId"'), True),
        (OFTEN.replace(b'"output_tokens":20', b'"output_tokens":201'), False),
        (OFTEN.replace(b'"output_tokens":20', b'"output_tokens":2'), False),
        (OFTEN.replace(b'"isSidechain":false', b'"isSidechain":true'), False),
        (OFTEN.replace(b'"requestId":"r"', b'"requestId":"r2"'), False),
        (OFTEN.replace(b'"requestId":"r",', b""), False),
        (OFTEN.replace(b'"id":"m"', b'"id":"m2"'), False),
        (OFTEN.replace(b'"claude-', b'"other-'), False),
        (response("m", "r", {"output_tokens": 30}, content=QUOTING), False),
        (OFTEN.replace(b'"content":[', b'"content":[' + json.dumps(QUOTING[0]).encode() + b","), True),
    ],
)
def test_a_line_that_repeats_the_one_before_says_nothing_new(line: bytes, is_repeat: bool) -> None:
    reader = TRANSCRIPTS.reader("", 7, b"")
    first, alone = one(OFTEN), one(line)
    assert reader.read(OFTEN) == (first,)
    assert reader.read(line) == (() if is_repeat else (alone,))
    assert not is_repeat or settled([first, alone]) == [first]
    assert reader.read(OFTEN) == (() if is_repeat else (first,))


def test_repeats_of_a_refused_line_are_refused() -> None:
    reader = LineReader("", 7, b"")
    wrong = OFTEN.replace(b'"output_tokens":20', b'"output_tokens":-20')
    assert [reader.read(line) for line in (wrong, wrong)] == [Drop.NEGATIVE] * 2


def test_a_key_is_the_same_in_copies_and_differs_elsewhere() -> None:
    line = response("m", "r")
    copies = [line, line.replace(b'"s1"', b'"s2"'), response("m", "r", {"output_tokens": 9}), progress(line)]
    assert len({one(copy).key for copy in copies}) == 1
    others = [line, response("m", "r2"), response("m2", "r"), response("m", None), response("m", None, model="x")]
    counts = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    others += [response("m", None, {name: 77}) for name in counts]
    assert len({one(other).key for other in others}) == len(others)
    assert len({one(response("m", None, {"output_tokens": count})).key for count in (1, 20)}) == 1
    assert {len(one(other).key) for other in others} == {16}


def test_copies_of_a_response_are_named_by_its_message() -> None:
    assert one(response("m", "r")).message == one(response("m", "other")).message
    assert len(one(response("m", "r")).message) == 8
    assert one(response("", "r")).message == b""


def test_without_any_id_the_line_is_its_own() -> None:
    first, second = (one(response("", None, uuid=uuid)) for uuid in ("u1", "u2"))
    assert first.key != second.key
    assert one(response("", "r", uuid="u1")).key == one(response("", "r", uuid="u2")).key


def test_advisors_keep_their_place_and_have_no_request_id() -> None:
    step = {"type": "advisor_message", "model": "claude-opus-5", "input_tokens": 5, "cache_creation_input_tokens": 3}
    result = read_line(response("m", "r", {"iterations": [step, step]}, isSidechain=True), 7)
    assert not isinstance(result, Drop)
    main, first, second = result
    assert len({main.key, first.key, second.key}) == 3
    assert (first.request_id, first.message, first.session) == ("", main.message, main.session)
    assert (main.part_of, first.part_of) == ("", "r")
    assert (first.model, first.input, first.cache_write_5m, first.is_sidechain) == ("claude-opus-5", 5, 3, True)


@pytest.mark.parametrize(
    ("usage", "reason"),
    [
        ({"output_tokens": -1}, Drop.NEGATIVE),
        ({"output_tokens": 10**12}, None),
        ({"output_tokens": 10**12 + 1}, Drop.IMPLAUSIBLE),
        ({"output_tokens": 2**40 - 1}, Drop.IMPLAUSIBLE),
        ({"input_tokens": 10**12, "output_tokens": 2**39 - 1}, None),
        ({"cache_read_input_tokens": 1.5}, Drop.MALFORMED),
        ({"cache_read_input_tokens": [1]}, Drop.MALFORMED),
        ({"cache_creation": {"ephemeral_1h_input_tokens": -5}}, Drop.NEGATIVE),
        ({"cache_creation": 5}, Drop.MALFORMED),
        ({"server_tool_use": {"web_search_requests": -1}}, Drop.NEGATIVE),
        ({"server_tool_use": {"web_search_requests": 10**13}}, Drop.IMPLAUSIBLE),
        ({"iterations": [{"type": "advisor_message", "input_tokens": -1}]}, Drop.NEGATIVE),
        ({"iterations": [{"type": "advisor_message", "input_tokens": "1"}]}, Drop.MALFORMED),
        ({"iterations": "none"}, None),
        ({"iterations": [1, None, {"type": "message"}]}, None),
    ],
)
def test_refusals_have_a_reason(usage: dict[str, Any], reason: Drop | None) -> None:
    result = read_line(response("m", "r", usage), 0)
    assert (result if isinstance(result, Drop) else None) == reason


@pytest.mark.parametrize(
    "line",
    [
        b'{"type":"user","message":"text","input_tokens":1}',
        b'{"type":"system","data":[1],"message":{"usage":[]}}',
        b'{"type":"progress","data":{"type":"hook_progress"}}',
        b'{"type":"progress","data":{"message":{"type":"user","message":{"content":"x"}}}}',
        b'{"type":"assistant"}',
        b'{"type":"assistant","message":{"id":"m"}}',
        b"{}",
    ],
)
def test_lines_without_a_request_say_nothing(line: bytes) -> None:
    assert read_line(line, 0) == ()


# --- no bytes are too bad ----------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PATHS = [
    *[(name,) for name in json.loads(response("m", "r", costUSD=1))],
    *[("message", name) for name in ("id", "model", "usage")],
    *[("message", "usage", name) for name in ("input_tokens", "cache_creation", "server_tool_use")],
    *[("message", "usage", name) for name in ("iterations", "speed")],
]


@LAWS
@given(st.binary(max_size=60))
def test_any_bytes_are_refused_or_say_nothing(line: bytes) -> None:
    assert read_line(line, 0) in ((), Drop.MALFORMED)


@LAWS
@given(st.sampled_from(PATHS), JSON, st.booleans())
def test_any_value_anywhere_is_read_or_refused(path: tuple[str, ...], value: Any, is_nested: bool) -> None:
    line = json.loads(response("m", "r", costUSD=1, isApiErrorMessage=False))
    place = line
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    outer = {"type": "progress", "data": {"message": line}} if is_nested else line
    result = read_line(json.dumps(outer).encode(), 0)
    assert isinstance(result, Drop) or all(usage.session.encode() is not None for usage in result)


@LAWS
@given(st.integers(0, 400), st.binary(max_size=4), st.integers(0, 10))
def test_a_damaged_line_never_raises(at: int, damage: bytes, gap: int) -> None:
    line = response("m", "r")
    read_line(line[:at] + damage + line[at + gap :], 0)


@pytest.mark.parametrize("bracket", [b"[", b'{"a":'])
def test_deep_nesting_is_refused(bracket: bytes) -> None:
    assert read_line(b'{"type":"assistant","x":' + bracket * 100_000, 0) is Drop.MALFORMED


def test_a_broken_line_above_the_limit_is_not_taken_apart() -> None:
    assert read_line(response("m", "r", content="x" * 2**20, cwd=["/"]), 0) is Drop.MALFORMED


# --- whole trees -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", sorted(path.name for path in RECORDED.iterdir() if path.is_dir()))
def test_recorded_transcripts_add_up(run: str) -> None:
    sums: dict[str, Counter[str]] = {}
    for usage in settled(usages_under(RECORDED / run)):
        tokens = {"input": usage.input, "output": usage.output}
        tokens |= {"cacheRead": usage.cache_read, "cacheCreation": usage.cache_write}
        sums.setdefault(usage.model, Counter()).update(tokens)
    assert sums == json.loads((RECORDED / "expected.json").read_text())[run]


def price(request: Request) -> int:
    per_token = {"input": 3000, "output": 15000, "read": 300, "write_5m": 3750, "write_1h": 6000, "searches": 10**7}
    counts = request._asdict()
    cost = sum(int(counts[name]) * each for name, each in per_token.items())
    return cost * (6 if request.speed == "fast" else 1) * (11 if request.geo == "us" else 10) * len(request.model)


@pytest.mark.parametrize("is_reversed", [False, True], ids=["forward", "backward"])
def test_a_generated_tree_meets_its_truth(tmp_path: Path, is_reversed: bool) -> None:
    truth = write_tree(tmp_path, files=60, size=8_000_000, seed=5)
    assert len(list(tmp_path.rglob("*.jsonl"))) == 60
    assert 7_000_000 < sum(path.stat().st_size for path in tmp_path.rglob("*.jsonl")) < 12_000_000
    found = requests(usages_under(tmp_path, is_reversed=is_reversed))
    assert found == sorted(truth.requests)
    assert Truth(found).tokens() == truth.tokens()
    assert Truth(found).cost(price) == truth.cost(price)


def test_a_generated_tree_is_the_same_again(tmp_path: Path) -> None:
    trees = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        truth = write_tree(tmp_path / name, files=6, size=200_000, seed=seed)
        paths = sorted((tmp_path / name).rglob("*.jsonl"))
        trees.append((truth.requests, [(path.relative_to(tmp_path / name), path.read_bytes()) for path in paths]))
    assert trees[0] == trees[1] != trees[2]


def test_the_edge_cases_add_up_in_one_tree(tmp_path: Path) -> None:
    truth = write_edge_cases(tmp_path)
    assert requests(usages_under(tmp_path)) == sorted(truth.requests)


@pytest.mark.parametrize(
    ("variables", "roots"),
    [
        ({}, ("/h/.claude/projects", "/h/.config/claude/projects")),
        ({"XDG_CONFIG_HOME": "/x"}, ("/h/.claude/projects", "/x/claude/projects")),
        ({"CLAUDE_CONFIG_DIR": "/a"}, ("/a/projects",)),
        ({"CLAUDE_CONFIG_DIR": " /a/ ,~/b,,/a"}, ("/a/projects", "/h/b/projects")),
        ({"CLAUDE_CONFIG_DIR": " , "}, ("/h/.claude/projects", "/h/.config/claude/projects")),
    ],
)
def test_roots(variables: dict[str, str], roots: tuple[str, ...]) -> None:
    assert TRANSCRIPTS.roots(variables, "/h") == roots


# --- events ------------------------------------------------------------------------------------------------------

EVENT: dict[str, Any] = {
    "model": "claude-sonnet-4-5",
    "input_tokens": 10,
    "output_tokens": 20,
    "cache_read_tokens": 30,
    "cache_creation_tokens": 40,
    "cost_usd": 0.0123456789,
    "cost_usd_micros": 12346,
    "duration_ms": 1500,
    "request_id": "req_1",
    "speed": "normal",
}


def told(name: str, attributes: dict[str, Any], time_ms: int = 0) -> Event:
    return Event(name, attributes, time_ms * 10**6, Resource())


def event(**changes: Any) -> Usage:
    given = {**EVENT, "session.id": "s1", "user.id": "u1", **changes}
    usage = read_event(told("api_request", {key: value for key, value in given.items() if value is not None}, 99))
    assert isinstance(usage, Usage)
    return usage


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, {"input": 10, "output": 20, "cache_read": 30, "cache_write_5m": 40, "cache_write_1h": 0, "time_ms": 99}),
        ({}, {"session": "s1", "user": "u1", "request_id": "req_1", "duration_ms": 1500, "source": Source.EVENT}),
        ({"input_tokens": "12", "duration_ms": "12.6"}, {"input": 12, "duration_ms": 13}),
        ({"cache_creation_1h_tokens": 25}, {"cache_write_5m": 15, "cache_write_1h": 25}),
        ({"cache_creation_5m_tokens": 40, "cache_creation_1h_tokens": 0}, {"cache_write_5m": 40, "cache_write_1h": 0}),
        ({}, {"cost": 12345679, "speed": "standard"}),
        ({"cost_usd": "0.00043680000000000005", "speed": "fast"}, {"cost": 436800, "speed": "fast"}),
        ({"cost_usd": None}, {"cost": 12346000}),
        ({"cost_usd": None, "cost_usd_micros": None}, {"cost": None}),
        ({"cost_usd": "nan", "cost_usd_micros": None}, {"cost": None}),
        ({"duration_ms": -1}, {"duration_ms": None}),
        ({"duration_ms": "soon"}, {"duration_ms": None}),
    ],
)
def test_members_of_an_event(changes: dict[str, Any], want: dict[str, Any]) -> None:
    usage = event(**changes)
    assert {name: getattr(usage, name) for name in want} == want


def test_an_event_is_known_by_the_best_that_it_has() -> None:
    where: dict[str, Any] = {"event.timestamp": "2026-11-21T04:27:35Z"}
    bare: dict[str, Any] = {"request_id": None}
    assert event().key == event(output_tokens=9, **where).key != event(request_id="req_2").key
    assert event(**bare, client_request_id="c").key == event(**bare, client_request_id="c", output_tokens=9).key
    numbered = event(**bare, **where, **{"event.sequence": 5})
    assert numbered.key == event(**bare, **where, **{"event.sequence": "5"}).key
    assert numbered.key != event(**bare, **where, **{"event.sequence": 6}).key
    assert event(**bare, **where).key == event(**bare, **where, input_tokens="10").key
    assert event(**bare, **where).key != event(**bare, **where, input_tokens=11).key
    assert event(**bare, **where).key != event(**bare, **where, duration_ms=11).key


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (-1, Drop.NEGATIVE),
        ("-1", Drop.NEGATIVE),
        (1.5, Drop.MALFORMED),
        ("many", Drop.MALFORMED),
        (True, Drop.MALFORMED),
        ("inf", Drop.MALFORMED),
        (10**400, Drop.MALFORMED),
        (10**12 + 1, Drop.IMPLAUSIBLE),
    ],
)
def test_events_are_refused_as_lines_are(value: Any, reason: Drop) -> None:
    assert read_event(told("api_request", {**EVENT, "output_tokens": value})) is reason


@LAWS
@given(st.dictionaries(st.sampled_from(sorted(EVENT_KEYS["api_request"])), st.text() | st.integers() | st.floats()))
def test_any_event_is_read_or_refused(attributes: dict[str, Any]) -> None:
    assert isinstance(read_event(told("api_request", attributes)), Usage | Drop)


def test_other_events_are_no_requests() -> None:
    assert read_event(told("api_error", EVENT)) is None


def test_no_attribute_with_content_may_leave_the_decoder() -> None:
    written = {"prompt_text", "prompt_length", "command_name", "full_command", "error_message", "file_path", "cwd"}
    assert not (CONTENT_KEYS | written) & frozenset[str]().union(*EVENT_KEYS.values())


def recorded_events(run: str) -> list[Usage]:
    found = []
    for message in (request.message for request in RUNS[run]):
        if not isinstance(message, ExportLogsServiceRequest):
            continue
        for resource in message.resource_logs:
            for record in (record for scope in resource.scope_logs for record in scope.log_records):
                values = {item.key: item.value for item in record.attributes}
                fields = {key: getattr(value, value.WhichOneof("value") or "") for key, value in values.items()}
                name = fields["event.name"]
                kept = {key: fields[key] for key in EVENT_KEYS.get(name, ()) if key in fields}
                usage = read_event(Event(name, kept, record.time_unix_nano, Resource()))
                found += [usage] if isinstance(usage, Usage) else []
    return found


@pytest.mark.parametrize("run", ["v329-json", "v329-agent", "v329-slowstream", "v197-json", "v2077-json", "v1128-json"])
def test_recorded_events_add_up(run: str) -> None:
    tokens: dict[str, Counter[str]] = {}
    cost: Counter[str] = Counter()
    for usage in {usage.key: usage for usage in recorded_events(run)}.values():
        counts = {"input": usage.input, "output": usage.output}
        counts |= {"cacheRead": usage.cache_read, "cacheCreation": usage.cache_write}
        tokens.setdefault(usage.model, Counter()).update(counts)
        cost[usage.model] += usage.cost or 0
    assert tokens == EXPECTED[run]["tokens"]
    assert cost == {model: round(dollars * 10**9) for model, dollars in EXPECTED[run]["cost_usd"].items()}
