"""The views of the counters: GET /v1/metrics for XRG, GET /metrics for Prometheus, health, and the landing page.

Law: only what is committed is shown, and nothing before the state is loaded: a 503 then, never an empty 200.

`increase()` ignores the first value of a series. So a scraper sees a counter that was born after the scraper's
last answer at 0 once, before it sees the value; the commit that an answer showed is kept for each scraper, on disk
before an answer with such a 0 goes out. A scraper that is not known sees everything as it stands, else history
would count as growth. Anybody else, such as curl, sees the values at once.
"""

import asyncio
import gzip
import html
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from hashlib import blake2b

from aiohttp import web

from bridge import __version__, exposition, pricing
from bridge.config import Config
from bridge.exposition import Format, SampleStyle
from bridge.join import KINDS
from bridge.ledger import Ledger
from bridge.naming import Escaping, Strategy
from bridge.state import StoreUnavailable
from bridge.telemetry import Telemetry
from bridge.tools.claude_code import XRG_PROFILE, environment
from bridge.usage_store import ModelRow
from bridge.web.families import Families, Family, Shown
from bridge.web.server import Refused, Routes, caller_of, response

INSTANCE_HEADER = "X-Bridge-Instance"
"""What this run of the bridge calls itself, so that `doctor` knows it from a stranger on the port."""
_JOINED = (
    ("ai_tokens_total", "Tokens of all sources joined, in disjoint types.", KINDS, 1),
    ("ai_cost_usd_total", "US dollars of all sources joined; API-equivalent for subscriptions.", ("usd",), 10**9),
    ("ai_requests_total", "API requests that events or transcripts tell of.", ("requests",), 1),
)
LOAD_SECONDS = 1.0
"""How long a scrape waits for the state to be loaded, rather than fail; XRG gives up after two seconds."""
COMPRESS_FROM = 16 * 2**10
"""Larger answers are compressed in a thread, so that exports are taken meanwhile."""

log = logging.getLogger("bridge")


class Views:
    """Answers scrapes from the ledger's projection."""

    def __init__(
        self,
        ledger: Ledger,
        config: Config,
        telemetry: Telemetry,
        clock_ms: Callable[[], int],
        instance: str = "",
        has_sources: Callable[[], bool] = bool,
    ) -> None:
        self._ledger = ledger
        self._instance = {INSTANCE_HEADER: instance} if instance else None
        self._strategy = Strategy(config.names)
        self._families = Families(ledger, self._strategy, has_sources)
        self._has_created = config.created_series
        self._telemetry = telemetry
        self._clock_ms = clock_ms
        self._last_ms = 0
        self.progress: Callable[[], str] = str
        """What /-/ready says besides: how far something long has got."""

    @property
    def routes(self) -> Routes:
        return {
            "/": {"GET": self._landing},
            "/v1/metrics": {"GET": self._xrg},
            "/metrics": {"GET": self._prometheus},
            "/-/healthy": {"GET": self._healthy},
            "/-/ready": {"GET": self._ready},
        }

    async def _require_ready(self, *, waits: bool = True) -> None:
        if not self._ledger.ready and not await self._ledger.wait_ready(LOAD_SECONDS if waits else 0):
            raise Refused(503, "the state is being loaded; try again")

    async def _xrg(self, request: web.BaseRequest) -> web.Response:
        del request
        await self._require_ready()
        # The clock may be set back; a poller must not see time run backwards.
        self._last_ms = max(self._last_ms, self._clock_ms())
        body = exposition.xrg_profile(XRG_PROFILE, self._ledger.shown_totals, self._last_ms)
        return response(body, exposition.XRG_CONTENT_TYPE)

    async def _healthy(self, request: web.BaseRequest) -> web.Response:
        del request
        return response(b"healthy\n", "text/plain; charset=utf-8", headers=self._instance)

    async def _ready(self, request: web.BaseRequest) -> web.Response:
        del request
        await self._require_ready(waits=False)
        text = "\n".join(["ready", *filter(None, [self.progress()])])
        return response(f"{text}\n".encode(), "text/plain; charset=utf-8", headers=self._instance)

    async def _landing(self, request: web.BaseRequest) -> web.Response:
        host = request.headers.get("Host") or "localhost:4318"
        variables = "\n".join(f"export {name}={value}" for name, value in environment(f"http://{host}").items())
        page = _LANDING.format(version=__version__, environment=html.escape(variables))
        return response(page.encode(), "text/html; charset=utf-8")

    # --- /metrics ---

    async def _prometheus(self, request: web.BaseRequest) -> web.Response:
        await self._require_ready()
        wanted = exposition.negotiate(request.headers.get("Accept", ""))
        names = frozenset(request.rel_url.query.getall("name[]", ()))
        self._telemetry.series.set(self._ledger.count)
        self._telemetry.held.set(len(self._ledger.floors))
        self._telemetry.storage_ok.set(self._ledger.healthy)
        scraper = _scraper(request, names)
        shown = self._ledger.shown_to(scraper) if scraper else None
        commits = self._ledger.commits
        has_zeros, lines = self._render(wanted, names, commits if shown is None else shown)
        if scraper and request.method == "GET":  # an answer without a body has shown nothing
            await self._note(scraper, commits, must_commit=has_zeros or shown is None)
        body = b"".join([*lines, self._telemetry.render(wanted, names)])
        return await _compressed(body, wanted.content_type, request.headers.get("Accept-Encoding", ""))

    async def _note(self, scraper: str, commits: int, *, must_commit: bool) -> None:
        if not must_commit:
            self._ledger.note_shown(scraper, commits)
            return
        try:
            await self._ledger.commit_shown(scraper, commits)
        except StoreUnavailable as error:
            # A full disk must not end the scrapes; at worst this scraper sees a 0 a second time after a restart.
            log.warning("cannot note what a scraper was shown", extra={"error": error})

    def _render(self, wanted: Format, names: frozenset[str], scraper: int) -> tuple[bool, list[bytes]]:
        """Whether a counter stands at 0 because it was born after commit `scraper`, and the lines of the families."""
        escaping = None if self._strategy.is_escaping else Escaping(wanted.escaping or "underscores")
        has_zeros = False
        lines: list[bytes] = []
        for family in self._families.families(escaping):
            if names and not _is_wanted(family.name, names):
                continue
            styles = {
                metric.scale: SampleStyle(family.name, family.kind, metric.scale, wanted.openmetrics, self._has_created)
                for metric in family.metrics
            }
            styles[0] = SampleStyle(family.name, family.kind, 0, wanted.openmetrics, self._has_created)
            if escaping is None and self._families.is_distinct(family):
                zeros, samples = self._kept(family, styles, scraper, openmetrics=wanted.openmetrics)
            else:
                shown = list(self._families.shown(family, scraper, escaping))
                zeros, samples = any(one.is_newborn for one in shown), [_line(styles, one) for one in shown]
            has_zeros |= zeros
            if any(samples):
                header = exposition.header(family.name, family.kind, family.text, openmetrics=wanted.openmetrics)
                lines += [header.encode(), *samples]
        joined_zeros, joined = self._joined(wanted, names, scraper)
        lines.append("".join(joined).encode())
        if not names or "target_info" in names:
            lines.append("".join(self._target_info(wanted, escaping)).encode())
        return has_zeros or joined_zeros, lines

    def _kept(
        self, family: Family, styles: Mapping[int, SampleStyle], scraper: int, *, openmetrics: bool
    ) -> tuple[bool, list[bytes]]:
        """The lines of a family without merged series: kept from scrape to scrape where nothing changed."""
        has_zeros = False
        lines: list[bytes] = []
        for metric in family.metrics:
            for series in self._ledger.families.get(metric.id, {}).values():
                line = series.openmetrics if openmetrics else series.text
                if not line or series.row.born > scraper or series.floor is not None:
                    one = self._families.shown_one(family, metric, series, scraper, None)
                    line = b"" if one is None else _line(styles, one)
                    if one is not None and one.is_newborn:
                        has_zeros = True
                    elif openmetrics:
                        series.openmetrics = line
                    else:
                        series.text = line
                lines.append(line)
        return has_zeros, lines

    def _joined(self, wanted: Format, names: frozenset[str], shown: int) -> tuple[bool, list[str]]:
        """The families that are joined of all sources: labels are functions of tool and model alone."""
        has_zeros = False
        lines: list[str] = []
        for name, text, kinds, scale in _JOINED:
            if names and not _is_wanted(name, names):
                continue
            style = SampleStyle(name, "counter", scale, wanted.openmetrics, self._has_created)
            samples: list[str] = []
            for (model_id, kind), row in self._ledger.served.items():
                if kind not in kinds:
                    continue
                model = self._ledger.models[model_id]
                labels = _model_labels(model)
                if len(kinds) > 1:
                    labels.append(("type", kind))
                is_zero = row.born > shown
                has_zeros |= is_zero
                value = 0 if is_zero else row.value
                samples.append(exposition.sample_lines(style, exposition.labels_text(labels), value, None, row.birth))
            if samples:
                lines += [exposition.header(name, "counter", text, openmetrics=wanted.openmetrics), *samples]
        return has_zeros, lines + self._unpriced(wanted, names)

    def _unpriced(self, wanted: Format, names: frozenset[str]) -> list[str]:
        name = "ai_unpriced_tokens"
        if not self._ledger.unpriced or (names and name not in names):
            return []
        style = SampleStyle(name, "gauge", 1, wanted.openmetrics, has_created=False)
        lines = [exposition.header(name, "gauge", "Tokens whose cost nobody knows.", openmetrics=wanted.openmetrics)]
        for model_id, tokens in self._ledger.unpriced.items():
            labels = exposition.labels_text(_model_labels(self._ledger.models[model_id]))
            lines.append(exposition.sample_lines(style, labels, tokens, None, 0))
        return lines

    def _target_info(self, wanted: Format, escaping: Escaping | None) -> Iterator[str]:
        """The other resource attributes, one series a job and instance, for joins."""
        style = SampleStyle("target_info", "info", 0, wanted.openmetrics, has_created=False)
        for number, target in enumerate(self._ledger.targets.values()):
            if not number:
                text = "Attributes of what sent the metrics of this job and instance."
                yield exposition.header("target_info", "info", text, openmetrics=wanted.openmetrics)
            pairs = self._families.pairs(target.attributes, self._families.reserved, escaping)
            labels = exposition.labels_text((*pairs, ("job", target.job), ("instance", target.instance)))
            yield exposition.sample_lines(style, labels, 1, None, 0)


def _line(styles: Mapping[int, SampleStyle], one: Shown) -> bytes:
    """The lines of one series."""
    series = one.series
    return exposition.sample_lines(styles[one.scale], one.labels, one.value, series.exemplar, series.row.birth).encode()


def _model_labels(model: ModelRow) -> list[tuple[str, str]]:
    return [("tool", model.tool), ("provider", pricing.provider_of(model.name)), ("model", model.name)]


_SUFFIXES = ("_bucket", "_sum", "_count", "_total", "_created")


def _is_wanted(name: str, names: frozenset[str]) -> bool:
    """Whether `name[]` asks for a family: by its name or by that of one of its samples."""
    return name in names or any(f"{name}{suffix}" in names for suffix in _SUFFIXES)


def _scraper(request: web.BaseRequest, names: frozenset[str]) -> str:
    """Who scrapes: Prometheus sends its timeout. Address, product, the query parameter `scraper` and the families
    asked for tell scrapers apart."""
    if "X-Prometheus-Scrape-Timeout-Seconds" not in request.headers:
        return ""
    product = request.headers.get("User-Agent", "").partition("/")[0]
    asked = ",".join(sorted(names))
    key = f"{caller_of(request).address}|{product}|{request.rel_url.query.get('scraper', '')}|{asked}"
    return key if len(key) <= 256 else f"{key[:200]}~{blake2b(key.encode(), digest_size=16).hexdigest()}"


def _packers() -> dict[str, Callable[[bytes], bytes]]:
    """Content codings by preference; zstd where Python has it (3.14 and later)."""
    packers: dict[str, Callable[[bytes], bytes]] = {}
    if importlib.util.find_spec("compression") is not None:
        packers["zstd"] = importlib.import_module("compression.zstd").compress
    packers["gzip"] = partial(gzip.compress, compresslevel=1)
    return packers


_PACKERS = _packers()


async def _compressed(body: bytes, content_type: str, accept_encoding: str) -> web.Response:
    """The body in the best coding that the scraper takes."""
    headers = {"Vary": "Accept, Accept-Encoding"}
    offers = _offers(accept_encoding)
    coding = next((name for name in _PACKERS if offers.get(name, offers.get("*", 0.0)) > 0), None)
    if coding is None:
        return response(body, content_type, headers=headers)
    pack = _PACKERS[coding]
    if len(body) < COMPRESS_FROM:
        packed = pack(body)
    else:
        packed = await asyncio.get_running_loop().run_in_executor(None, pack, body)
    return response(packed, content_type, headers={**headers, "Content-Encoding": coding})


def _offers(accept_encoding: str) -> dict[str, float]:
    """Content codings with their quality. RFC 9110, 12.5.3."""
    offers: dict[str, float] = {}
    for offer in accept_encoding.lower().split(","):
        name, *parameters = (part.strip() for part in offer.split(";"))
        weights = [part.partition("=")[2] for part in parameters if part.replace(" ", "").startswith("q=")]
        offers[name] = exposition.quality(weights[0]) if weights else 1.0
    return offers


_LANDING = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>claude-otel-bridge</title>
<meta name="viewport" content="width=device-width">
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:44rem;margin:2rem auto;padding:0 1rem;
color-scheme:light dark}}pre{{background:#8882;padding:.8rem;overflow:auto}}</style></head><body>
<h1>claude-otel-bridge {version}</h1>
<p>Exact counters of tokens and cost from Claude Code and other tools that speak OpenTelemetry.</p>
<ul>
<li><a href="/v1/metrics">/v1/metrics</a>: lifetime totals for XRG and simple pollers</li>
<li><a href="/metrics">/metrics</a>: all series for Prometheus, and the bridge's own</li>
<li><a href="/-/ready">/-/ready</a>, <a href="/-/healthy">/-/healthy</a>: for supervisors</li>
</ul>
<h2>Point Claude Code here</h2>
<pre>{environment}</pre>
<p>Or let <code>claude-otel-bridge setup --write</code> put the same names under <code>env</code> in
<code>~/.claude/settings.json</code>. Then run <code>claude</code>
and watch <a href="/v1/metrics">/v1/metrics</a> move within a second of its first answer, or within ten where
its transcripts are not followed.</p>
</body></html>
"""
