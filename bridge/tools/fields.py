"""Fields of telemetry and transcripts, read leniently: what is not of the wanted kind is None or empty."""

import math
from datetime import UTC, datetime, timedelta
from hashlib import blake2b

MAX_COUNT = 10**12
"""Tokens of one kind, or milliseconds, that one request can plausibly have."""
MAX_COST = 1e5
"""US dollars that one request can plausibly cost."""
MAX_TEXT = 1024

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


def digest(text: str, size: int = 16) -> bytes:
    """A name of that many bytes for a text."""
    return blake2b(text.encode(), digest_size=size).digest()


def text_of(value: object) -> str:
    """A text, cut to MAX_TEXT; empty for anything else."""
    return value[:MAX_TEXT] if isinstance(value, str) else ""


def milliseconds(timestamp: str | None) -> int | None:
    """Unix milliseconds of an ISO 8601 time after 1970, taken for UTC where it names no zone; None if it is none."""
    try:
        time = datetime.fromisoformat(timestamp or "")
    except ValueError:
        return None
    if time.tzinfo is None:
        time = time.replace(tzinfo=UTC)
    elapsed = (time - _EPOCH) // _MILLISECOND
    return elapsed if elapsed > 0 else None


def nano_dollars(value: object) -> int | None:
    """A price in dollars, as a number or its text, in whole nano-dollars; None if it is none."""
    dollars = number_of(value)
    return None if dollars is None or not 0 <= dollars <= MAX_COST else round(dollars * 1e9)


def number_of(value: object) -> float | None:
    """A finite number, or the text of one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
