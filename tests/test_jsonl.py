"""Splitting of blocks into lines, against a reader that holds everything at once."""

import re
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bridge.jsonl import BYTE_ORDER_MARK, Lines

KEY = b'tokens"'
LINE = b'{"tokens":1}'
LAWS = settings(derandomize=True, deadline=None, max_examples=300)


def read(content: bytes, *cuts: int, offset: int = 0, limit: int = 100) -> tuple[list[bytes], int, int]:
    """Lines, offset and number of lines too long, of content cut at these places."""
    lines = Lines((KEY,), offset=offset, limit=limit)
    places = [0, *sorted(cut for cut in cuts if cut < len(content)), len(content)]
    found = [line for start, end in pairwise(places) for line in lines.feed(content[start:end])]
    return found, lines.offset, lines.too_long


def read_at_once(content: bytes, limit: int) -> tuple[list[bytes], int, int]:
    *complete, rest = content.split(b"\n")
    short = [line for line in complete if len(line) <= limit]
    found = [line for line in short if re.search(re.escape(KEY) + rb"[ \t\r]*:", line)]
    clean = [line.replace(b"\0", b"").removeprefix(BYTE_ORDER_MARK) for line in found]
    return clean, len(content) - len(rest), len(complete) - len(short)


@pytest.mark.parametrize(
    ("content", "lines", "offset"),
    [
        (b"", [], 0),
        (b"\n\n\n", [], 3),
        (LINE, [], 0),
        (LINE + b"\n", [LINE], 13),
        (LINE + b"\n" + LINE, [LINE], 13),
        (b"other\n" + LINE + b"\nother\n", [LINE], 25),
        (LINE + b"\n" + LINE + b"\n", [LINE, LINE], 26),
        (b'{"tokens" \t:1}\n', [b'{"tokens" \t:1}'], 15),
        (b'{"tokens"}\n', [], 11),
        (b'{"a":"tokens","tokens":1}\n', [b'{"a":"tokens","tokens":1}'], 26),
        (b'{"a":"{\\"tokens\\":1}"}\n', [], 23),
        (b'"tokens"\n:\n', [], 11),
        (LINE + b"\r\n", [LINE + b"\r"], 14),
        (BYTE_ORDER_MARK + LINE + b"\n", [LINE], 16),
        (b"\0\0\0" + LINE + b"\n", [LINE], 16),
        (b"\0" + BYTE_ORDER_MARK + LINE + b"\n", [LINE], 17),
    ],
)
def test_lines(content: bytes, lines: list[bytes], offset: int) -> None:
    assert read(content) == (lines, offset, 0)


def test_an_unfinished_line_is_left_for_later() -> None:
    content = LINE + b"\n" + LINE[:5]
    found, offset, _ = read(content)
    assert found == [LINE]
    assert read(content[offset:] + LINE[5:] + b"\n", offset=offset) == ([LINE], 26, 0)


@pytest.mark.parametrize("cut", range(1, 40))
def test_long_lines_are_counted_wherever_the_blocks_end(cut: int) -> None:
    content = b'{"tokens":1234567890}\n' + LINE + b"\n" + b"x" * 13 + b"\n"
    assert read(content, cut, limit=12) == ([LINE], len(content), 2)


PIECES = st.sampled_from([b"\n", KEY, b":", b" ", b'"', LINE, BYTE_ORDER_MARK, b"\0", b"x" * 30, b"\r", b"\xff"])
CONTENT = st.lists(PIECES | st.binary(max_size=3), max_size=40).map(b"".join)


@LAWS
@given(CONTENT, st.lists(st.integers(0, 300), max_size=10), st.integers(1, 60))
@example(LINE + b"\n", [5], 12)
def test_neither_lines_nor_offset_depend_on_the_blocks(content: bytes, cuts: list[int], limit: int) -> None:
    assert read(content, *cuts, limit=limit) == read_at_once(content, limit)


@LAWS
@given(CONTENT, st.integers(0, 300))
def test_reading_goes_on_at_the_offset(content: bytes, cut: int) -> None:
    before, offset, _ = read(content[:cut])
    after, end, _ = read(content[offset:], offset=offset)
    assert (before + after, end) == read(content)[:2]


def test_a_line_of_any_length_takes_bounded_memory() -> None:
    block = b"x" * 65536
    lines = Lines((KEY,), limit=1_000_000)
    tracemalloc.start()
    for _ in range(1000):
        assert not lines.feed(block)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_500_000
    assert lines.feed(b"\n" + LINE + b"\n") == [LINE]
    assert (lines.too_long, lines.offset) == (1, 65_536_000 + 14)


@pytest.mark.parametrize(
    ("line", "is_wanted"),
    [
        (b'{"type":"a","tokens":1}', True),
        (b'{"id":1,"type":"b","in":{"tokens":1}}', True),
        (b'{"id":1,"type":"c","in":{"tokens":1}}', False),
        (b'{"type":"ab","tokens":1}', False),
        (b'{"type" : "c","tokens":1}', True),
        (b'{"in":{"type":"c"},"tokens":1}', True),
        (b'{"in":{"tokens":1},"type":"c"}', True),
        (b'{"text":"\\"type\\":\\"c\\"","tokens":1}', True),
        (b'{"tokens":1}', True),
        (BYTE_ORDER_MARK + b'{"type":"c","tokens":1}', True),
        (b'{"type":"a"}', False),
    ],
)
def test_only_lines_of_the_wanted_types_come_out(line: bytes, is_wanted: bool) -> None:
    for cut in range(len(line)):
        lines = Lines((KEY,), (b'a"', b'b"'))
        assert bool(lines.feed(line[:cut]) + lines.feed(line[cut:] + b"\n")) is is_wanted


@LAWS
@given(st.lists(st.sampled_from([b'{"tokens":1}', b'{"other":2}', b'{"turn":3}', b'{"turn":{"tokens":1}}', b""])))
def test_several_keys_find_the_lines_of_each_in_their_order(parts: list[bytes]) -> None:
    lines = Lines((KEY, b'turn"'))
    assert lines.feed(b"".join(part + b"\n" for part in parts)) == [part for part in parts if part[2:3] == b"t"]
