"""Structure-aware mutation of recorded exports: mutants that are almost OTLP, as many as are asked for.

A chain begins at a recorded request and changes one thing at each step: a value, a member, the place of a subtree, the
type of something, or bytes of what is sent. Every step is one mutant. One seed is one sequence of mutants.
"""

import json
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from typing import Any, NamedTuple

import msgspec
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from bridge import otlp
from bridge.model import Batch, Drop, Typed
from bridge.otlp import MAX_INT64, MAX_POINTS, DecodeError, Encoding, Records, TooLarge
from bridge.tools import known as tools
from tests.recordings import ALL_REQUESTS, MESSAGES, Request

CHAIN = 6
"""Changes of one recorded request before the next one is taken."""
MAX_BODY = 256 * 2**10
"""A body of more bytes ends its chain: doubled again and again it would be larger than a receiver takes."""
SHARES = {"/v1/metrics": 6, "/v1/logs": 2, "/v1/traces": 2}
"""Of ten mutants so many of each signal, however many of its requests were recorded."""
MEMBERS = 4
"""Members that are left of each list of a recorded request, but in one chain of twenty."""
SLOW_SECONDS = 1.0


SPAN_KEYS = tools.span_keys(frozenset())


class Mutant(NamedTuple):
    path: str
    encoding: Encoding
    body: bytes


class Outcome(NamedTuple):
    """How many mutants were taken or refused for what; the longest time of one in seconds; memory in bytes."""

    counts: Counter[str]
    longest: float
    memory: int


VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**400, 0.0, -0.0, 0.5,
    1e308, -1e308, 5e-324, "", "NaN", "Infinity", "-Infinity", "1e999", "0x10", "1_000", " 1", "1.0", "-1",
    "9223372036854775808", "9" * 5000, "\ud83d", "\0", "\n", "é", "\U0001f600" * 3, "x" * 70_000, "event.name",
    "claude_code.api_request", "session.id", "service.name", "__proto__", [], {}, [[]], [{}], {"": {}}, [None],
    {"stringValue": None}, {"intValue": "1"}, {"doubleValue": "NaN"}, {"arrayValue": {"values": [{}] * 50}},
    {"kvlistValue": {"values": [{"key": "prompt", "value": {"stringValue": "x"}}]}}, {"bytesValue": "=="},
    *sorted(SPAN_KEYS),
]  # fmt: skip
PIECES = [
    b"", b"\0", b"\xff" * 4, b"\xff" * 11, b"\x0a\x00" * 40, b"{}", b"[]", b"[" * 2000, b'{"a":' * 500, b'"', b"\\",
    b"\\ud83d", b"\xed\xa0\x80", b"\xc3", b"null", b"1e400", b"-", b",", b"}", b"]", b"\x80" * 9 + b"\x01",
    b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x0b", b"\x0c", b"\x0d", b"\x0f", b"\xef\xbb\xbf",
]  # fmt: skip


def mutants(seed: int) -> Iterator[Mutant]:
    """Mutants for ever."""
    chance = random.Random(seed)
    while True:
        (path,) = chance.choices([*SHARES], [*SHARES.values()])
        recorded = chance.choice([request for request in ALL_REQUESTS if request.path == path])
        most = 1000 if chance.random() < 0.05 else MEMBERS
        if chance.random() < 0.5 and recorded.content_type == Encoding.JSON.value:
            root = msgspec.json.decode(recorded.decoded)
            _thin(root, most, chance)
            yield from _in_json(recorded.path, root, chance)
        else:
            message = MESSAGES[recorded.path]()
            message.CopyFrom(_message(recorded))
            _thin_message(message, most, chance)
            yield from _in_protobuf(recorded.path, message, chance)


@cache
def _message(recorded: Request) -> Message:
    return recorded.message


def _thin(node: Any, most: int, chance: random.Random) -> None:
    """Leave at most so many members of every list: where less stands, more of what matters is hit."""
    if isinstance(node, list) and len(node) > most:
        node[:] = chance.sample(node, most)
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, dict | list):
            _thin(child, most, chance)


def _thin_message(message: Any, most: int, chance: random.Random) -> None:
    for field, value in message.ListFields():
        if field.type != FieldDescriptor.TYPE_MESSAGE:
            continue
        if field.is_repeated and len(value) > most:
            at = chance.randint(0, len(value) - most)
            del value[at + most :]
            del value[:at]
        for child in value if field.is_repeated else [value]:
            _thin_message(child, most, chance)


def _in_json(path: str, root: Any, chance: random.Random) -> Iterator[Mutant]:
    for _ in range(CHAIN):
        _change(root, chance)
        try:
            body = msgspec.json.encode(root)
        except (UnicodeEncodeError, OverflowError):  # half a surrogate pair, or an integer of 400 digits
            body = json.dumps(root).encode()
        yield Mutant(path, Encoding.JSON, body if chance.random() < 0.7 else _injured(body, chance))
        if len(body) > MAX_BODY:
            return


def _change(root: Any, chance: random.Random) -> None:
    """One change somewhere in a tree of dicts and lists."""
    node = root
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        if not keys:
            _add(node, chance)
            return
        key: Any = chance.choice(keys)
        child = node[key]
        if not isinstance(child, dict | list) or chance.random() < 0.15:
            break
        node = child
    match chance.randrange(7):
        case 0 | 1:
            node[key] = deepcopy(chance.choice(VALUES))
        case 2:
            del node[key]
        case 3:
            _add(node, chance)
        case 4 if isinstance(node, list):
            node.extend([child] * chance.choice([1, 2, 30]))
        case 5 if isinstance(node, dict):
            node[chance.choice([*node, "value", "asInt", "asDouble", "time_unix_nano", ""])] = node.pop(key)
        case _:
            node[key] = [child] if chance.random() < 0.5 else {"values": [child]}


def _add(node: Any, chance: random.Random) -> None:
    value = deepcopy(chance.choice(VALUES))
    if isinstance(node, list):
        node.insert(chance.randint(0, len(node)), value)
    else:
        names = ["asInt", "flags", "exemplars", "attributes", "isMonotonic", "timeUnixNano", "gauge", "eventName", "x"]
        node[chance.choice(names)] = value


def _in_protobuf(path: str, message: Message, chance: random.Random) -> Iterator[Mutant]:
    for _ in range(CHAIN):
        _change_message(message, chance)
        body = message.SerializeToString()
        yield Mutant(path, Encoding.PROTOBUF, body if chance.random() < 0.6 else _injured(body, chance))
        if len(body) > MAX_BODY:
            return


def _change_message(message: Any, chance: random.Random) -> None:
    """One change of a field somewhere in a message."""
    while True:
        inner = [field for field, _ in message.ListFields() if field.type == FieldDescriptor.TYPE_MESSAGE]
        if not inner or chance.random() < 0.2:
            break
        field = chance.choice(inner)
        value = getattr(message, field.name)
        if field.is_repeated:
            if chance.random() < 0.1:
                _change_members(value, chance)
                return
            value = chance.choice(value)
        message = value
    field = chance.choice(message.DESCRIPTOR.fields)
    if chance.random() < 0.3:
        message.ClearField(field.name)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        value = getattr(message, field.name)
        if field.is_repeated:
            value.add()
        else:
            value.SetInParent()
    else:
        scalar = chance.choice(_FIELD_VALUES[field.cpp_type])
        if field.is_repeated:
            getattr(message, field.name).extend([scalar] * chance.choice([1, 2, 200]))
        else:
            setattr(message, field.name, b"\xff" * 20 if field.type == FieldDescriptor.TYPE_BYTES else scalar)


def _change_members(members: Any, chance: random.Random) -> None:
    at = chance.randrange(len(members))
    if chance.random() < 0.5:
        del members[at]
    else:
        copies = [members[at]] * chance.choice([1, 2, 30])
        members.extend(copies)


_DOUBLES = [0.0, -1.0, 1e308, float("inf"), float("-inf"), float("nan"), 0.5]
_FIELD_VALUES: dict[int, list[Any]] = {
    FieldDescriptor.CPPTYPE_INT32: [0, -1, 2**31 - 1, -(2**31)],
    FieldDescriptor.CPPTYPE_INT64: [0, -1, 1, 2**53, 2**63 - 1, -(2**63)],
    FieldDescriptor.CPPTYPE_UINT32: [0, 1, 2**32 - 1],
    FieldDescriptor.CPPTYPE_UINT64: [0, 1, 2**53, 2**63, 2**64 - 1],
    FieldDescriptor.CPPTYPE_DOUBLE: _DOUBLES,
    FieldDescriptor.CPPTYPE_FLOAT: _DOUBLES,
    FieldDescriptor.CPPTYPE_BOOL: [True, False],
    FieldDescriptor.CPPTYPE_ENUM: [0, 1, 2, 7],
    FieldDescriptor.CPPTYPE_STRING: [
        "",
        "\0",
        "\n",
        "é",
        "x" * 70_000,
        "event.name",
        "api_request",
        "session.id",
        *sorted(SPAN_KEYS),
    ],
}


def _injured(body: bytes, chance: random.Random) -> bytes:
    """The body with bytes changed, left out, doubled or put in."""
    at = chance.randrange(len(body) + 1)
    end = min(len(body), at + chance.choice([0, 1, 1, 2, 8, 200]))
    match chance.randrange(6):
        case 0:
            return body[:at]
        case 1:
            return body[:at] + body[end:]
        case 2:
            return body[:end] + body[at:]
        case 3 if at < len(body):
            return body[:at] + bytes([body[at] ^ (1 << chance.randrange(8))]) + body[at + 1 :]
        case 4:
            return body[:at] + body[at:end][::-1] + body[end:]
        case _:
            return body[:at] + chance.choice(PIECES) + body[end:]


# --- what must hold for each -----------------------------------------------------------------------------------


def attempt(mutant: Mutant, known: otlp.Known | None = None) -> str:
    """Decode one mutant as the receiver does; what became of it. Any other error than the decoder's own is raised."""
    path, encoding, body = mutant
    try:
        match path:
            case "/v1/metrics":
                _check_batch(otlp.decode_metrics(body, encoding, known=known))
            case "/v1/logs":
                records = otlp.decode_logs(body, encoding, tools.EVENT_KEYS)
                _check_records(records)
                usages, points, refused = tools.read_events(records.events)
                _check_batch(Batch(points, refused, tuple(usages)))
            case _:
                records = otlp.decode_traces(body, encoding, SPAN_KEYS)
                _check_records(records, SPAN_KEYS)
                usages, refused = tools.read_spans(records.events)
                _check_batch(Batch([], refused, tuple(usages)))
    except DecodeError:
        return "refused"
    except TooLarge:
        return "too large"
    return "taken"


def _check_memory_changes_nothing(mutant: Mutant, known: otlp.Known) -> None:
    """What a decoder remembers of other bodies must not show in what it makes of this one."""
    if mutant.path == "/v1/metrics":
        assert _metrics(mutant, known) == _metrics(mutant, None)


def _metrics(mutant: Mutant, known: otlp.Known | None) -> str:
    try:
        return repr(otlp.decode_metrics(mutant.body, mutant.encoding, known=known))  # NaN equals itself as text
    except (DecodeError, TooLarge) as error:
        return repr(error)


def _check_batch(batch: Batch) -> None:
    assert len(batch.points) + len(batch.refused) <= MAX_POINTS
    for point in batch.points:
        assert 0 <= point.start <= MAX_INT64
        assert 0 <= point.time <= MAX_INT64
        assert not isinstance(point.value, Drop | str | bool)
        keys = [key for key, _ in point.attributes]
        assert keys == sorted(set(keys))
        for key, value in point.attributes:
            assert isinstance(value, str | Typed)
            # A half surrogate pair would be an error at the first write.
            (key if isinstance(value, Typed) else key + value).encode()
    for refusal in batch.refused:
        assert isinstance(refusal.reason, Drop)
    for usage in batch.usages:
        assert len(usage.key) == 16
        assert min(usage.input, usage.output, usage.cache_read, usage.cache_write) >= 0


def _check_records(records: Records, keys: frozenset[str] | None = None) -> None:
    assert 0 <= records.counts.total() <= MAX_POINTS
    assert len(records.events) <= records.counts.total()
    for event in records.events:
        assert set(event.attributes) <= (keys or tools.EVENT_KEYS[event.name])
        assert 0 <= min(event.start, event.time) <= max(event.start, event.time) <= MAX_INT64


def run(seed: int, count: int) -> Outcome:
    """Attempt `count` mutants of a seed. Whatever is raised names the mutant that did it."""
    counts: Counter[str] = Counter()
    longest = 0.0
    known = otlp.Known()
    for number, mutant in zip(range(count), mutants(seed), strict=False):
        began = time.thread_time()
        try:
            outcome = attempt(mutant, known)
            if number % 8 == 0:
                _check_memory_changes_nothing(mutant, known)
        except Exception as error:
            error.add_note(f"seed {seed}, mutant {number}: {mutant.path} {mutant.encoding} {mutant.body[:2000]!r}")
            raise
        counts[outcome] += 1
        longest = max(longest, time.thread_time() - began)
    unit = 1 if sys.platform == "darwin" else 1024
    return Outcome(counts, longest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
