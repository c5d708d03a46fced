"""Compiles the prices of the package genai-prices into bridge/prices.json: `python -m tests.compile_prices`.

Kept are models of text that have a price for input and for output, of vendors whose models coding tools use, under
the names that `normalise_model` gives them. Left out are other units (audio, images, pages), free models (an empty
price there, not a zero), and models of others that a vendor resells.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

from genai_prices import types
from genai_prices.data import providers

from bridge.pricing import normalise_model, provider_of

PRICES = Path(__file__).parents[1] / "bridge" / "prices.json"
PROVIDERS = ("anthropic", "openai", "google", "x-ai", "deepseek", "moonshotai", "zai", "minimax", "mistral")
KEYS = (
    "input_mtok", "output_mtok", "cache_read_mtok", "cache_write_mtok", "cache_write_1h_mtok", "web_searches_kcount",
)  # fmt: skip
OPTIONS = {
    ("speed", "fast"): "fast",
    ("service_tier", "fast"): "fast",
    ("service_tier", "priority"): "priority",
    ("service_tier", "flex"): "flex",
    ("processing", "batch"): "batch",
}
REGIONAL = Decimal("1.1")


def table(provider_id: str) -> list[types.ModelInfo]:
    return next(provider.models for provider in providers if provider.id == provider_id)


def periods(prices: Any) -> list[tuple[Any, types.ModelPrice]]:
    """Since when, and what, from the oldest."""
    return [(None, prices)] if isinstance(prices, types.ModelPrice) else [(p.constraint, p.prices) for p in prices]


def is_priced(model: types.ModelInfo) -> bool:
    """Whether it sells text for text by the token."""
    return all(getattr(price, key) is not None for _, price in periods(model.prices) for key in KEYS[:2])


def rows(prices: types.ModelPrice) -> list[list[Decimal | int | None]]:
    """[above how many tokens, the price of each of KEYS]; the nothings at the end are cut."""
    by_key = {key: getattr(prices, key) for key in KEYS}
    tiered = [price for price in by_key.values() if isinstance(price, types.TieredPrices)]
    made: list[list[Decimal | int | None]] = []
    for above in sorted({0, *(tier.start for price in tiered for tier in price.tiers)}):
        row: list[Decimal | int | None] = [above, *(price_above(price, above) for price in by_key.values())]
        while row[-1] is None and len(row) > 1:
            row.pop()
        made.append(row)
    return made


def price_above(price: Decimal | types.TieredPrices | None, above: int) -> Decimal | None:
    if not isinstance(price, types.TieredPrices):
        return price
    return next((tier.price for tier in reversed(price.tiers) if tier.start <= above), price.base)


def condition(constraint: Any) -> str:
    match constraint:
        case None:
            return ""
        case types.StartDateConstraint():
            return str(constraint.start_date.isoformat())
        case types.TimeOfDateConstraint():
            assert constraint.start_time.tzinfo == constraint.end_time.tzinfo == UTC
            return f"{constraint.start_time:%H:%M}-{constraint.end_time:%H:%M}"
    raise AssertionError(constraint)


def clauses(match: Any) -> Iterator[tuple[str, ...]]:
    """Any of, all of."""
    match match:
        case types.ClauseOr():
            for part in match.or_:
                yield from clauses(part)
        case types.ClauseAnd():
            yield tuple(clause for part in match.and_ for (clause,) in clauses(part))
        case types.ClauseEquals():
            yield (f"={match.equals.lower()}",)
        case types.ClauseStartsWith():
            yield (f"^{match.starts_with.lower()}",)
        case types.ClauseEndsWith():
            yield (f"${match.ends_with.lower()}",)
        case types.ClauseContains():
            yield (f"~{match.contains.lower()}",)
        case types.ClauseRegex():
            yield (f"/{match.regex}",)
        case _:
            raise AssertionError(match)


def spelled(match: Any, kinds: str) -> list[str]:
    """The names that stand in clauses of these kinds."""
    return [clause[0][1:] for clause in clauses(match) if clause[0][0] in kinds]


def entry(model: types.ModelInfo) -> dict[str, Any]:
    """What is known of a model beside its names."""
    made: dict[str, Any] = {"prices": [[condition(when), rows(prices)] for when, prices in periods(model.prices)]}
    for variant in model.price_variants or ():
        option = OPTIONS.get(next(iter(variant.when.items())))
        if option and len(variant.when) == 1:
            made.setdefault(option, []).append([condition(variant.constraint), rows(variant.prices)])
    if made.get("fast") == made.get("priority"):
        made.pop("fast", None)  # one price under two names; the reader knows
    return made


def names_of(provider_id: str) -> dict[str, list[str]]:
    """The normalised names of each model by its id, the id first. Only whole names: that a name begins like another's
    says nothing of its price (deepseek-r1-distill-…). Exact ones before those that a longer name may begin with."""
    taken: dict[str, str] = {}
    for kinds in ("=", "^$~"):
        for model in filter(is_priced, table(provider_id)):
            exact = [model.id] if kinds == "=" else []
            for spelling in (*exact, *spelled(model.match, kinds)):
                name = normalise_model(spelling)
                is_whole = name == spelling and not name.endswith("-2025") if kinds != "=" else True
                if is_whole and name[-1].isalnum() and provider_of(name) == provider_id:
                    owner = taken.setdefault(name, model.id)
                    assert kinds != "=" or owner == model.id, f"{name} would be {owner} and {model.id}"
    return {owner: [name for name in taken if taken[name] == owner] for owner in taken.values()}


def regional() -> list[str]:
    """Claude models whose regional price on Bedrock is the global one and a tenth, in every kind."""
    prices = {model.id.partition("-v1")[0]: model.prices for model in table("aws")}
    return sorted(
        normalise_model(name.removeprefix("regional."))
        for name, price in prices.items()
        if name.startswith("regional.anthropic.")
        and (everywhere := prices.get(name.replace("regional.", "global."))) is not None
        and is_tenth_more(price, everywhere)
    )


def is_tenth_more(price: Any, other: Any) -> bool:
    ours, theirs = rows(price), rows(other)
    return len(ours) == len(theirs) and all(
        [value and value * REGIONAL for value in low[1:]] == high[1:] for low, high in zip(theirs, ours, strict=True)
    )


def compiled(day: str) -> str:
    """The text of prices.json; a model a line."""
    tables: dict[str, dict[str, Any]] = {}
    for provider_id in PROVIDERS:
        names = names_of(provider_id)
        models = {model.id: model for model in table(provider_id)}
        tables[provider_id] = {
            first: entry(models[owner]) | ({"names": others} if others else {})
            for owner, (first, *others) in names.items()
        }
    notice = " ".join((distribution("genai-prices").read_text("licenses/LICENSE") or "").split())
    assert "MIT" in notice
    head = {
        "source": f"genai-prices {version('genai-prices')}, https://github.com/pydantic/genai-prices",
        "date": day,
        "license": notice,
        "regional": regional(),
    }
    lines = [f"{dumped(key)}: {dumped(value)}" for key, value in head.items()]
    lines.append('"providers": {\n' + ",\n".join(provider_lines(tables)) + "\n}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def provider_lines(tables: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    for provider_id, models in tables.items():
        lines = (f"{dumped(name)}: {dumped(known)}" for name, known in models.items())
        yield f"{dumped(provider_id)}: {{\n" + ",\n".join(lines) + "\n}"


def dumped(value: Any) -> str:
    """Compact JSON with exact decimals."""
    match value:
        case Decimal():
            return f"{value.normalize():f}"
        case dict():
            return "{" + ",".join(f"{dumped(key)}:{dumped(member)}" for key, member in value.items()) + "}"
        case list() | tuple():
            return "[" + ",".join(map(dumped, value)) + "]"
        case _:
            return json.dumps(value)


if __name__ == "__main__":
    today = date.fromisoformat(sys.argv[1]) if len(sys.argv) > 1 else datetime.now(UTC).date()
    PRICES.write_text(compiled(today.isoformat()))
