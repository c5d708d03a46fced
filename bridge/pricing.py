"""Usage x model x time -> nano-dollars, and the names of models under which prices and labels are kept.

Law: exact integers, rounded once, half to even, at the end; the parts add up to the total. The price is that of the
request's own time. A model nobody has a price for is None, never 0 and never a neighbour's price.

The prices are `prices.json`, compiled from the package genai-prices by tests/compile_prices.py, in USD per million
tokens. What that table lacks stands here as MODIFIERS and ADDITIONS, each with its source. They are API list prices:
for a subscription they say what the same use would cost. The file is read by `load()`, never at import.

A request of a flat price takes 0.4 microseconds, with tiers or dates 1, by the hour 4; the table 0.9 MB and 1.3 ms.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from decimal import Decimal
from difflib import get_close_matches
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b
from importlib.resources import files
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

from bridge.model import Usage

CACHED_NAMES: Final = 4096
CACHED_LENGTH: Final = 256
READ_LENGTH: Final = 512
NAME_LENGTH: Final = 128

UNKNOWN: Final = "unknown"


# --- Names -----------------------------------------------------------------------------------------------------------

# Ways to a model that are no part of its name: who routes the request, and who made the model where nobody else sells
# it at another price. `deepseek/…`, `fireworks/…` and the like stay: hosts of open models set their own prices.
_ROUTE = re.compile(
    r"""^(?:
      arn:aws[a-z-]*:bedrock:[^/]*/
    | (?:projects/[^/]+/locations/[^/]+/)?publishers/[^/]+/models/
    | (?:amazon-)?bedrock/(?:converse/|invoke/)?
    | (?:google-)?vertex(?:[_-]ai|[_-]anthropic)?/
    | (?:openrouter|azure|models|anthropic|openai|google|x-ai|xai)/
    | (?:[a-z]{2,6}(?:-gov)?\.)?anthropic\.
    )(?=.)""",
    re.VERBOSE,
)
_REGIONAL = re.compile(r"(?:^|/)(?!global\.)(?:[a-z]{2,6}(?:-gov)?\.)?anthropic\.")
_DATE = r"20\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])|20\d\d-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])"
_SUFFIX = re.compile(
    rf"""(?<=.)(?:
      \[\d+[km]\]                                 # the window of context: claude-opus-4-6[1m]
    | [-@:](?:{_DATE})                            # a snapshot
    | @(?:default|latest)                         # Vertex
    | (?<=\d)-v\d+(?::\d+){{0,2}}(?::\d+k)?$      # Bedrock: claude-…-20250929-v1:0
    )$""",
    re.VERBOSE,
)
# Without a version, `-latest` is the name: gemini-flash-latest. Where `-fast` is a model, it stays: grok-4-fast.
_HAS_LATEST = re.compile(r"(?:claude|gpt|chatgpt|gemini|grok)-\D*\d")
_HAS_FAST = re.compile(r"(?:claude|gpt(?!-oss))-\D*\d")
_CLAUDE_VERSION_FIRST = re.compile(r"^claude-(\d{1,2})(?:[-.](\d{1,2})(?!\d))?-([a-z]+)(?![a-z0-9.])")
_CLAUDE_FAMILY_FIRST = re.compile(r"^claude-(?!instant)([a-z]+)-(\d{1,2})(?:[-.](\d{1,2}))?(?![\d.])")

_DATED_NAMES: Final = frozenset({"gpt-4o-2024-05-13"})
"""Snapshots that cost something else than the name without the date."""

_SAME_PRICE: Final = re.compile(
    r"(?<=.)-(?:preview|exp|thinking|customtools|00\d|(?:(?<=-preview-)|(?<=-exp-))\d\d-\d{2,4})$"
)
"""What may follow a name in the table without another price: previews with their dates, revisions of Gemini's."""


class _Name(NamedTuple):
    """What a model's name says: the normalised name, and what has a price of its own but is no part of it."""

    text: str
    is_fast: bool
    is_regional: bool


def normalise_model(model: str) -> str:
    """The name of a model without route, snapshot and options: a label value for ever.

    `us.anthropic.claude-sonnet-4-5-20250929-v1:0` -> `claude-sonnet-4-5`, `gpt-5-2025-08-07` -> `gpt-5`. Idempotent.
    Names of unlike prices stay apart, but for what `Usage` tells beside the name (fast mode, a region's premium).
    """
    return _read_name(model).text


def _read_name(model: str) -> _Name:
    return _cached_name(model) if len(model) <= CACHED_LENGTH else _parsed_name(model)


def _parsed_name(model: str) -> _Name:
    text = "-".join(_shortened(model, READ_LENGTH).lower().split())
    text = "".join(character for character in text if character.isprintable())
    is_regional, is_fast = _REGIONAL.search(text) is not None, False
    before = ""
    while text != before:
        before = text
        text = _ROUTE.sub("", text)
        if text not in _DATED_NAMES:
            text = _SUFFIX.sub("", text)
        if text.endswith("-latest") and _HAS_LATEST.match(text):
            text = text.removesuffix("-latest")
        if text.endswith("-fast") and _HAS_FAST.match(text):
            text, is_fast = text.removesuffix("-fast"), True
        text = _claude_name(text)
    return _Name(_shortened(text, NAME_LENGTH) or UNKNOWN, is_fast, is_regional)


def _shortened(text: str, most: int) -> str:
    """A name longer than `most` ends in a digest, which keeps it apart from others."""
    if len(text) <= most:
        return text
    return f"{text[: NAME_LENGTH - 17]}~{blake2b(text.encode(errors='surrogatepass'), digest_size=8).hexdigest()}"


_cached_name: Callable[[str], _Name] = lru_cache(CACHED_NAMES)(_parsed_name)


def _claude_name(text: str) -> str:
    """As the vendor writes it: `claude-3-5-haiku` up to version 3, `claude-haiku-4-5` since, 4.0 without the 0."""
    if match := _CLAUDE_VERSION_FIRST.match(text):
        major, minor, family = match.groups()
    elif match := _CLAUDE_FAMILY_FIRST.match(text):
        family, major, minor = match.groups()
    else:
        return text
    version = f"{major}-{minor}" if minor and int(minor) else major
    name = f"claude-{version}-{family}" if int(major) <= 3 else f"claude-{family}-{version}"
    return name + text[match.end() :]


_PROVIDERS: Final = (
    ("anthropic", re.compile(r"claude")),
    ("openai", re.compile(r"gpt-|chatgpt|o\d+(?![\d.a-z])|codex|computer-use|text-|davinci|babbage|ft:(?:gpt-|o\d)")),
    ("google", re.compile(r"gemini|gemma|palm-")),
    ("x-ai", re.compile(r"grok")),
    ("deepseek", re.compile(r"deepseek")),
    ("moonshotai", re.compile(r"kimi|moonshot")),
    ("zai", re.compile(r"glm-|z-?ai/")),
    ("minimax", re.compile(r"minimax|abab")),
    ("mistral", re.compile(r"(?:open-)?mi[sx]tral|codestral|devstral|magistral|ministral|pixtral|voxtral")),
    ("alibaba", re.compile(r"qwen|qwq")),
    ("meta", re.compile(r"(?:meta-)?llama|muse-")),
    ("amazon", re.compile(r"(?:[a-z]{2,6}\.)?amazon\.|nova-")),
    ("cohere", re.compile(r"command-|cohere")),
)


@lru_cache(CACHED_NAMES)
def _provider_of_name(name: str) -> str:
    return next((provider for provider, pattern in _PROVIDERS if pattern.match(name)), UNKNOWN)


def provider_of(model: str) -> str:
    """Who made the model, a function of its normalised name alone: anthropic, openai, google, ..., or unknown."""
    return _provider_of_name(normalise_model(model))


# --- What the table lacks --------------------------------------------------------------------------------------------

_HALF, _TENTH_MORE = Fraction(1, 2), Fraction(11, 10)

MODIFIERS: Final[Mapping[tuple[str, str], Fraction]] = {
    # https://platform.claude.com/docs/en/build-with-claude/fast-mode: 6x for opus-4-6, checked 2026-11-21. opus-4-7 had
    # it until 2026-07-24 and is taken to have cost the same. For opus-4-8 and later the table has it, 2x.
    ("claude-opus-4-6", "fast"): Fraction(6),
    ("claude-opus-4-7", "fast"): Fraction(6),
    # https://platform.claude.com/docs/en/about-claude/pricing (Batch API: 50 % off), checked 2026-11-21
    ("anthropic", "batch"): _HALF,
    # As in the table for nearly all models that have these prices there (genai-prices 0.2.3), checked 2026-11-21.
    ("openai", "batch"): _HALF,
    ("openai", "flex"): _HALF,
    ("openai", "priority"): Fraction(2),
    ("openai", "fast"): Fraction(2),
    ("google", "batch"): _HALF,
}
"""What a model or a provider's models cost, times the standard price of every kind of token, where the table names no
such price. Anthropic's priority tier is a contract; it counts at the list price."""

GEO_US: Final = _TENTH_MORE
"""Claude with `inference_geo: us`, tokens of every kind: the formula of Claude Code since 2.1.239, checked 2026-11-21
in 2.1.329. https://platform.claude.com/docs/en/manage-claude/data-residency"""

REGIONAL: Final = _TENTH_MORE
"""Claude on a regional endpoint of Bedrock (`us.anthropic.…`, not `global.`), of the models that the table lists as
such. By genai-prices 0.2.3, checked 2026-11-21"""

WEB_SEARCHES: Final = 10
"""USD per thousand where the table does not say: what it says for Claude, and the client's catalogue too. Checked
2026-11-21"""

_CACHE_OF_ANTHROPIC: Final = (Fraction(1, 10), Fraction(5, 4), Fraction(2))
"""Read, write for 5 minutes, write for 1 hour, times input.
https://platform.claude.com/docs/en/build-with-claude/prompt-caching#pricing, checked 2026-11-21"""

ADDITIONS: Final[bytes] = b"""{
"claude-mythos-5": {"prices": [["", [[0, 10, 50, 1, 12.5, 20]]]]},
"claude-mythos-5-1": {"prices": [["", [[0, 10, 50, 0.25, 12.5, 20]]]]},
"claude-sonnet-4": {"prices": [["", [[0, 3, 15, 0.3, 3.75, 6], [200000, 6, 22.5, 0.6, 7.5, 12]]]]}
}"""
"""Models that the table lacks or has without their tiers, in the table's form; they win over it.
mythos: https://platform.claude.com/docs/en/about-claude/pricing and the catalogue of Claude Code 2.1.329.
sonnet-4: the premium of its 1M window, https://eonsr.com/en/claude-sonnet-4-1m-context-pricing-switch, which is what
the table has for sonnet-4-5.
Both checked 2026-11-21."""


# --- The table -------------------------------------------------------------------------------------------------------

_KINDS: Final = ("input", "output", "cache_read", "cache_write_5m", "cache_write_1h", "web_searches")
_TOKEN_KINDS: Final = 5

_Row = tuple[Decimal | None, ...]
"""Above how many tokens of prompt these prices hold, then USD per million (per thousand web searches) by kind."""
_Dated = tuple[tuple[str, tuple[_Row, ...]], ...]
"""From the oldest: since when (a date, hours of the day in UTC, or always), and the rows, least prompt first."""


class _Entry(Struct, frozen=True, gc=False):
    """A model in the table. `names` are other normalised names of it. The options hold prices that differ from the
    standard `prices`, None where they do not."""

    prices: _Dated
    names: tuple[str, ...] = ()
    fast: _Dated = ()
    batch: _Dated = ()
    flex: _Dated = ()
    priority: _Dated = ()


class _Table(Struct, frozen=True):
    source: str
    date: str
    license: str
    regional: tuple[str, ...]
    providers: dict[str, dict[str, _Entry]]


class _Rates(NamedTuple):
    """Prices as integers: 1/unit nano-dollars per token and per web search."""

    unit: int
    input: int
    output: int
    cache_read: int
    cache_write_5m: int
    cache_write_1h: int
    web_searches: int


_Prices = tuple[Fraction | None, ...]
_Steps = tuple[tuple[int, _Prices], ...]
_Key = tuple[str, str, str, str]


class _Plan:
    """How one model is priced with one speed, place and tier: rates by prompt length, for each state of the dates."""

    __slots__ = ("build", "conditions", "rates")

    def __init__(self, conditions: tuple[str, ...], build: Callable[[int], tuple[tuple[int, _Rates], ...]]) -> None:
        self.conditions = conditions
        self.build = build
        self.rates: dict[tuple[bool, ...], tuple[tuple[int, _Rates], ...]] = {}

    def steps(self, time_ms: int) -> tuple[tuple[int, _Rates], ...]:
        state = tuple([_holds(condition, time_ms) for condition in self.conditions]) if self.conditions else ()
        steps = self.rates.get(state)
        if steps is None:
            steps = self.rates[state] = self.build(time_ms)
        return steps


class Prices:
    """A table of prices with the user's own over it. `source` names the table; make it with `from_json` or `load`."""

    def __init__(self, table: _Table, overrides: Mapping[str, _Prices]) -> None:
        self.source: Final = f"{table.source}, {table.date}"
        self._entries = {name: entry for models in table.providers.values() for name, entry in models.items()}
        self._entries |= {alias: entry for entry in self._entries.values() for alias in entry.names}
        self._entries |= msgspec.json.decode(ADDITIONS, type=dict[str, _Entry])
        self._regional = frozenset(table.regional)
        self._overrides = overrides
        self._flat: dict[_Key, _Rates] = {}
        self._plans: dict[_Key, _Plan | None] = {}

    @classmethod
    def from_json(cls, text: str | bytes, overrides: Mapping[str, Mapping[str, object]] | None = None) -> "Prices":
        """The table of a JSON text, and the user's prices over it. Raises ValueError naming the key that is wrong."""
        return cls(msgspec.json.decode(text, type=_Table), _checked_overrides(overrides or {}))

    def cost(self, usage: Usage) -> int | None:
        """Nano-dollars of the request by the table, whatever the tool says; None if nobody knows the model."""
        rates = self._flat.get((usage.model, usage.speed, usage.geo, usage.tier)) or self._rates(usage)
        if rates is None:
            return None
        unit, per_input, per_output, per_read, per_write_5m, per_write_1h, per_search = rates
        cost = (
            usage.input * per_input
            + usage.output * per_output
            + usage.cache_read * per_read
            + usage.cache_write_5m * per_write_5m
            + usage.cache_write_1h * per_write_1h
            + usage.web_searches * per_search
        )
        return cost if unit == 1 else round(Fraction(cost, unit))  # half to even

    def _rates(self, usage: Usage) -> _Rates | None:
        key = (usage.model, usage.speed, usage.geo, usage.tier)
        try:
            plan = self._plans[key]
        except KeyError:
            plan = self._remember(key)
        if plan is None:
            return None
        steps = plan.steps(usage.time_ms)
        if len(steps) > 1:
            prompt = usage.input + usage.cache_read + usage.cache_write_5m + usage.cache_write_1h
            for above, rates in reversed(steps):
                if prompt > above:
                    return rates
        rates = steps[0][1]
        if len(steps) == 1 and not plan.conditions and key in self._plans:
            self._flat[key] = rates
        return rates

    def _remember(self, key: _Key) -> _Plan | None:
        """The plan, kept unless its key is larger than any that a tool makes."""
        plan = self._plan(key)
        if sum(map(len, key)) <= CACHED_LENGTH:
            if len(self._plans) >= CACHED_NAMES:
                self._plans.clear()
                self._flat.clear()
            self._plans[key] = plan
        return plan

    def _plan(self, key: _Key) -> _Plan | None:
        model, speed, geo, tier = key
        name = _read_name(model)
        known, provider = self._known(name.text), _provider_of_name(name.text)
        if known is None:
            return None
        entry, override = self._entries.get(known, _Entry(())), self._overrides.get(known)
        option = _option(speed, tier, name.is_fast)
        variants = _variants(entry, option)
        factor = Fraction(1)
        if not variants:
            factor = MODIFIERS.get((known, option), MODIFIERS.get((provider, option), factor))
        if provider == "anthropic" and geo == "us":
            factor *= GEO_US
        if name.is_regional and known in self._regional and override is None:
            factor *= REGIONAL

        def build(time_ms: int) -> tuple[tuple[int, _Rates], ...]:
            steps = _steps_at(entry, override, variants, time_ms)
            return tuple((above, _rates_of(prices, factor, provider)) for above, prices in steps)

        return _Plan(tuple(when for when, _ in (*entry.prices, *variants) if when), build)

    def _known(self, name: str) -> str | None:
        """The name, or the one that it is a variant of at the same price."""
        while name not in self._entries and name not in self._overrides:
            if (tail := _SAME_PRICE.search(name)) is None:
                return None
            name = name[: tail.start()]
        return name


def load(overrides: Mapping[str, Mapping[str, object]] | None = None) -> Prices:
    """The prices that come with the bridge, and the user's over them."""
    return Prices.from_json(files("bridge").joinpath("prices.json").read_bytes(), overrides)


def _option(speed: str, tier: str, is_fast: bool) -> str:
    """The one option with a price of its own; what we do not know is standard."""
    if is_fast or speed.lower() == "fast" or tier.lower() == "fast":
        return "fast"
    return tier.lower() if tier.lower() in ("batch", "flex", "priority") else ""


def _variants(entry: _Entry, option: str) -> _Dated:
    match option:
        case "fast":
            return entry.fast or entry.priority  # OpenAI's fast is its priority under a newer name
        case "batch":
            return entry.batch
        case "flex":
            return entry.flex
        case "priority":
            return entry.priority
        case _:
            return ()


def _holds(condition: str, time_ms: int) -> bool:
    """`2026-03-13`: since that day began in UTC. `00:30-16:30`: daily, in UTC, may pass midnight. Empty: always."""
    if not condition:
        return True
    if len(condition) == len("2026-03-13"):
        return time_ms >= _start_ms(condition)
    start, end = (int(text[:2]) * 60 + int(text[3:]) for text in condition.split("-"))
    minute = time_ms // 60_000 % 1440
    return start <= minute < end if start <= end else minute >= start or minute < end


@lru_cache(1024)
def _start_ms(day: str) -> int:
    return (date.fromisoformat(day).toordinal() - date(1970, 1, 1).toordinal()) * 86_400_000


def _rows_at(dated: _Dated, time_ms: int) -> tuple[_Row, ...]:
    """The last that hold; before all dates the first."""
    return next((rows for when, rows in reversed(dated) if _holds(when, time_ms)), dated[0][1])


def _steps(rows: tuple[_Row, ...]) -> _Steps:
    return tuple((int(row[0] or 0), _exact(row[1:])) for row in rows)


def _exact(prices: _Row) -> _Prices:
    """All kinds, as exact fractions."""
    padded = (*prices, *(None,) * (len(_KINDS) - len(prices)))
    return tuple(None if price is None else Fraction(price) for price in padded)


def _at(steps: _Steps, prompt: int) -> _Prices:
    """The prices of the highest step that begins at or below."""
    return next(prices for above, prices in reversed(steps) if above <= prompt)


def _steps_at(entry: _Entry, override: _Prices | None, variants: _Dated, time_ms: int) -> _Steps:
    """Prices by prompt length at a time. A variant is laid over the standard. Where the user gave the standard, or
    before the day since which the variant is known, the standard is scaled as the variant scales the table's."""
    standard = ((0, override),) if override is not None else _steps(_rows_at(entry.prices, time_ms))
    if not variants:
        return standard
    # The newest stand first, as in the source.
    when, rows = next((variant for variant in variants if _holds(variant[0], time_ms)), variants[-1])
    variant = _steps(rows)
    if override is None and _holds(when, time_ms):
        thresholds = sorted({above for above, _ in (*standard, *variant)})
        return tuple((above, _overlaid(_at(variant, above), _at(standard, above))) for above in thresholds)
    reference = _steps(_rows_at(entry.prices, _start_ms(when) if when else time_ms))
    ratios = tuple(
        new / old if new is not None and old else Fraction(1)
        for new, old in zip(_at(variant, 0), _at(reference, 0), strict=True)
    )
    return tuple(
        (above, tuple(price and price * ratio for price, ratio in zip(prices, ratios, strict=True)))
        for above, prices in standard
    )


def _overlaid(over: _Prices, under: _Prices) -> _Prices:
    return tuple(below if above is None else above for above, below in zip(over, under, strict=True))


def _rates_of(prices: _Prices, factor: Fraction, provider: str) -> _Rates:
    """Exact integers of the largest unit that holds them all. Kinds without a price: by the vendor's rule."""
    given_input, given_output, read, write_5m, write_1h, searches = prices
    input_price, output_price = given_input or Fraction(0), given_output or Fraction(0)
    if provider == "anthropic":
        by_rule = [input_price * multiple for multiple in _CACHE_OF_ANTHROPIC]
    else:  # what is read from or written to a cache is input, and is written once, for however long
        by_rule = [input_price, input_price, input_price if write_5m is None else write_5m]
    read, write_5m, write_1h = _overlaid((read, write_5m, write_1h), tuple(by_rule))
    # A USD per million tokens is a thousand nano-dollars a token; one per thousand searches, a million a search.
    tokens = [1000 * factor * (price or 0) for price in (input_price, output_price, read, write_5m, write_1h)]
    rates = [*tokens, 1_000_000 * (WEB_SEARCHES if searches is None else searches)]
    unit = math.lcm(*(Fraction(rate).denominator for rate in rates))
    return _Rates(unit, *(int(rate * unit) for rate in rates))


# --- The user's prices -----------------------------------------------------------------------------------------------

_OVERRIDE_KEYS: Final = _KINDS[:_TOKEN_KINDS]
_HIGHEST_PRICE: Final = 1_000_000


def _checked_overrides(overrides: Mapping[str, Mapping[str, object]]) -> dict[str, _Prices]:
    checked: dict[str, _Prices] = {}
    spelled: dict[str, str] = {}
    for name, prices in overrides.items():
        where = f"prices.{name}"
        model = _read_name(name)
        if not name.strip():
            raise ValueError("prices: a model's name is empty; write [prices.NAME] with a name such as claude-opus-5")
        if model.is_fast:
            raise ValueError(f"{where}: fast mode follows from the model's price; give that as [prices.{model.text}]")
        if model.text in spelled:
            raise ValueError(f"{where}: the same model as prices.{spelled[model.text]}; keep one of them")
        if not isinstance(prices, Mapping):
            raise ValueError(f"{where}: expected a table with input and output, got {prices!r}")
        spelled[model.text] = name
        checked[model.text] = (*_checked_prices(where, prices), None)
    return checked


def _checked_prices(where: str, prices: Mapping[str, object]) -> Iterator[Fraction | None]:
    for key in prices:
        if key not in _OVERRIDE_KEYS:
            close = get_close_matches(str(key), _OVERRIDE_KEYS, 1)
            remedy = f"did you mean {close[0]}?" if close else f"known are {', '.join(_OVERRIDE_KEYS)}"
            raise ValueError(f"{where}.{key}: unknown key; {remedy}")
    for key in _OVERRIDE_KEYS:
        if key in prices:
            yield _checked_price(f"{where}.{key}", prices[key])
        elif key in ("input", "output"):
            raise ValueError(f"{where}.{key}: missing; give it in USD per million tokens, 0 if it is free")
        else:
            yield None


def _checked_price(where: str, value: object) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError(f"{where}: expected a number of USD per million tokens, got {value!r}")
    price = Decimal(str(value))  # 0.1 is a tenth
    if not price.is_finite() or not 0 <= price <= _HIGHEST_PRICE:
        raise ValueError(f"{where}: expected USD per million tokens from 0 to {_HIGHEST_PRICE}, got {value!r}")
    return Fraction(price)
