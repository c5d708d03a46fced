"""What XRG makes of a scrape: an independent model of its reader, state between polls included.

- The text is split at newlines; empty lines and lines that begin with '#' are skipped.
- A line with "token_usage" or "tokens" anywhere in it is a token line. It belongs to the first of "input",
  "output", "cache_read", "cache_create" that occurs anywhere in the line, else it is ignored
  ("cache_creation" does not contain "cache_create").
- Any other line with "cost" anywhere in it is a cost line.
- The value is the second-to-last space-separated word, so a line without a timestamp reads as 0. Tokens are
  read as C integers up to the first other character ("1.2e+06" reads as 1), cost as a C double.
- The shown rate is (uint32)(total now - total before): any decrease shows as about 4.29e9.
"""

import re
from dataclasses import dataclass, field

_INTEGER = re.compile(r"\s*([+-]?\d+)")
_DOUBLE = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)")
_KINDS = ("input", "output", "cache_read", "cache_create")
_U64, _I64 = 1 << 64, 1 << 63


def _value_word(line: str) -> str:
    words = [word for word in line.split(" ") if word]
    return words[-2] if len(words) >= 2 else ""


def _integer(word: str) -> int:
    match = _INTEGER.match(word)
    return max(-_I64, min(_I64 - 1, int(match.group(1)))) % _U64 if match else 0


def _double(word: str) -> float:
    match = _DOUBLE.match(word)
    return float(match.group(1)) if match else 0.0


@dataclass
class XRG:
    """What XRG shows after its latest poll."""

    tokens: int = 0
    cost: float = 0.0
    rate: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)

    def poll(self, text: str) -> "XRG":
        """Read one scrape; the same object, moved on."""
        kinds = dict.fromkeys(_KINDS, 0)
        cost = 0.0
        for line in text.split("\n"):
            if not line or line.startswith("#"):
                continue
            if "token_usage" in line or "tokens" in line:
                if kind := next((kind for kind in _KINDS if kind in line), None):
                    kinds[kind] = (kinds[kind] + _integer(_value_word(line))) % _U64
            elif "cost" in line:
                cost += _double(_value_word(line))
        before = self.tokens
        self.by_kind, self.cost = kinds, cost
        self.tokens = sum(kinds.values()) % _U64
        self.rate = (self.tokens - before) % (1 << 32)
        return self
