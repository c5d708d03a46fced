"""Packed files come out as they went in, in small blocks, and what is damaged says so."""

import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.packed import BLOCK, Damaged, NoUnpacker, unpacked

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def unpack(packed: bytes, piece: int = 1 << 20) -> list[bytes]:
    pieces = iter([packed[at : at + piece] for at in range(0, len(packed), piece)])
    return [*unpacked(lambda _: next(pieces, b""))]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=2000), max_size=4), st.integers(1, 700))
def test_frames_are_one_file_however_they_are_read(frames: list[bytes], piece: int) -> None:
    assert b"".join(unpack(b"".join(map(zstd.compress, frames)), piece)) == b"".join(frames)


def test_blocks_are_small_however_well_it_packs() -> None:
    packed = zstd.compress(bytes(40 * BLOCK))
    assert len(packed) < BLOCK // 10
    assert {len(block) for block in unpack(packed)} == {BLOCK}


def test_what_stands_before_damage_comes_out() -> None:
    content = random.Random(1).randbytes(4 * BLOCK)
    packed = zstd.compress(content)
    pieces, found = iter([packed[: len(packed) // 2]]), list[bytes]()
    with pytest.raises(Damaged, match="middle"):
        found.extend(unpacked(lambda _: next(pieces, b"")))
    assert content.startswith(b"".join(found))
    assert len(found) > 1


@pytest.mark.parametrize(
    "packed",
    [b"plain text", zstd.compress(b"x") + b"plain text", zstd.compress(b"x" * 99)[:-1]],
    ids=["no frame", "text behind a frame", "cut"],
)
def test_damage(packed: bytes) -> None:
    with pytest.raises(Damaged):
        unpack(packed)


def test_a_window_that_would_need_much_memory_is_refused() -> None:
    options = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.compression_level: 3}
    compressor = zstd.ZstdCompressor(options={int(key): value for key, value in options.items()})
    with pytest.raises(Damaged):
        unpack(compressor.compress(bytes(2**20)) + compressor.flush())


def test_without_the_library_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "backports" if sys.version_info < (3, 14) else "compression", None)
    with pytest.raises(NoUnpacker):
        unpack(b"")
