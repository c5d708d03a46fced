"""A fault of the bridge that some request brings out: that request is refused, and nobody else notices."""

import asyncio
import errno
from pathlib import Path

import pytest

from bridge.bookkeeper import LedgerSettings
from bridge.ledger import Ledger, Unpostable
from bridge.model import Batch, Receipt, Source, TranscriptRow, Usage
from bridge.state import StoreUnavailable
from bridge.store import Store
from tests.test_cases import unsynced

ROW = TranscriptRow(0, "/t.jsonl", 1, 1, b"", 0, 0, 0, 0)


def usage(number: int, model: str) -> Usage:
    return Usage("claude_code", Source.EVENT, number.to_bytes(16, "big"), "s", model, 1, number, 0, 0, 0, 0)


def price(usage: Usage) -> int:
    if usage.model == "poison":
        raise ZeroDivisionError("secret")
    return 1


async def post_all(ledger: Ledger) -> list[Receipt | BaseException]:
    """Everything waits in the queue before the writer begins, so that it is one group."""
    posts = [Batch([], [], (usage(at, "poison" if at == 3 else "fine"),)) for at in range(1, 6)]
    answers = [asyncio.ensure_future(ledger.post(batch, b"%d" % at)) for at, batch in enumerate(posts)]
    return await asyncio.gather(*answers, return_exceptions=True)


def test_what_cannot_be_loaded_for_want_of_descriptors_can_be_later(tmp_path: Path) -> None:
    broken: list[BaseException] = []
    left = [OSError(errno.EMFILE, "Too many open files", "prices.json")]

    def price(_: Usage) -> int:
        if left:
            raise left.pop()
        return 1

    async def story() -> None:
        ledger = Ledger(Store(tmp_path, unsynced), LedgerSettings(), lambda: 1_000, broken.append, price=price)
        await ledger.start()
        batch = Batch([], [], (usage(1, "fine"),))
        with pytest.raises(StoreUnavailable, match="Too many open files"):
            await ledger.post(batch, b"1")
        assert (await ledger.post(batch, b"1")).accepted == 1
        await ledger.stop()

    asyncio.run(story())
    assert not broken


def test_one_request_is_refused_and_its_neighbours_count(tmp_path: Path) -> None:
    broken: list[BaseException] = []

    async def story() -> None:
        ledger = Ledger(Store(tmp_path, unsynced), LedgerSettings(), lambda: 1_000, broken.append, price=price)
        await ledger.start()
        first = await post_all(ledger)
        assert [isinstance(one, Unpostable) for one in first] == [False, False, True, False, False]
        assert str(first[2]).startswith("ZeroDivisionError at test_unpostable.py:")
        assert "secret" not in str(first[2])
        (served,) = (row.value for row in ledger.served.values() if row.kind == "input")
        assert served == 1 + 2 + 4 + 5
        again = await post_all(ledger)  # as a client that got no answer does
        assert [one.duplicate for one in again if not isinstance(one, BaseException)] == [1, 1, 1, 1]
        with pytest.raises(Unpostable):
            await ledger.post_transcript(ROW, (usage(7, "poison"),), (), is_history=False)
        row = await ledger.post_transcript(ROW._replace(live=9), (usage(8, "fine"),), (), is_history=False)
        assert (row.live, [one.live for one in await ledger.transcripts()]) == (9, [9])
        await ledger.stop()

    asyncio.run(story())
    assert not broken
