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
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from aiohttp import web

from bridge import __version__, exposition, naming
from bridge.config import Config
from bridge.exposition import Format, SampleStyle
from bridge.ledger import Ledger, Series
from bridge.model import ExponentialHistogram, Histogram, Kind, Summary, Value
from bridge.naming import Escaping, MetricType, NamingError, Strategy
from bridge.store import MetricRow, StoreUnavailable
from bridge.telemetry import Telemetry
from bridge.tools.claude_code import XRG_PROFILE
from bridge.values import add, subtract
from bridge.web.server import Refused, Routes, response

_TYPES = {
    Kind.COUNTER: (MetricType.COUNTER, "counter"),
    Kind.UPDOWN: (MetricType.UPDOWN, "gauge"),
    Kind.GAUGE: (MetricType.GAUGE, "gauge"),
    Kind.HISTOGRAM: (MetricType.HISTOGRAM, "histogram"),
    Kind.EXPONENTIAL: (MetricType.HISTOGRAM, "histogram"),
    Kind.SUMMARY: (MetricType.SUMMARY, "summary"),
}
_BORN_AT_ZERO = frozenset({Kind.COUNTER, Kind.HISTOGRAM, Kind.EXPONENTIAL})
_OURS = ("bridge_", "process_", "target_info")
"""Families that a client must not write to; its metric of such a name gets `exported_` in front."""
_RESERVED = frozenset({"job", "instance"})
_RESERVED_OF = {"histogram": _RESERVED | {"le"}, "summary": _RESERVED | {"quantile"}}
COMPRESS_FROM = 16 * 2**10
"""Larger answers are compressed in a thread, so that exports are taken meanwhile."""

log = logging.getLogger("bridge")


class _Exposed(NamedTuple):
    """A family as it is shown: what several metrics of one name and type have in common, and their members."""

    kind: str
    text: str
    members: list[tuple[MetricRow, Iterable[Series]]]


class Views:
    """Answers scrapes from the ledger's projection."""

    def __init__(self, ledger: Ledger, config: Config, telemetry: Telemetry, clock_ms: Callable[[], int]) -> None:
        self._ledger = ledger
        self._strategy = Strategy(config.names)
        self._has_created = config.created_series
        self._telemetry = telemetry
        self._clock_ms = clock_ms
        self._last_ms = 0

    @property
    def routes(self) -> Routes:
        return {
            "/": {"GET": self._landing},
            "/v1/metrics": {"GET": self._xrg},
            "/metrics": {"GET": self._prometheus},
            "/-/healthy": {"GET": self._healthy},
            "/-/ready": {"GET": self._ready},
        }

    def _require_ready(self) -> None:
        if not self._ledger.ready:
            raise Refused(503, "the state is being loaded; try again")

    async def _xrg(self, request: web.BaseRequest) -> web.Response:
        del request
        self._require_ready()
        # The clock may be set back; a poller must not see time run backwards.
        self._last_ms = max(self._last_ms, self._clock_ms())
        body = exposition.xrg_profile(XRG_PROFILE, self._ledger.totals, self._last_ms)
        return response(body, exposition.XRG_CONTENT_TYPE)

    async def _healthy(self, request: web.BaseRequest) -> web.Response:
        del request
        return response(b"healthy\n", "text/plain; charset=utf-8")

    async def _ready(self, request: web.BaseRequest) -> web.Response:
        del request
        self._require_ready()
        return response(b"ready\n", "text/plain; charset=utf-8")

    async def _landing(self, request: web.BaseRequest) -> web.Response:
        page = _LANDING.format(version=__version__, host=html.escape(request.headers.get("Host") or "localhost:4318"))
        return response(page.encode(), "text/html; charset=utf-8")

    # --- /metrics ---

    async def _prometheus(self, request: web.BaseRequest) -> web.Response:
        self._require_ready()
        wanted = exposition.negotiate(request.headers.get("Accept", ""))
        names = frozenset(request.rel_url.query.getall("name[]", ()))
        self._telemetry.series.set(self._ledger.count)
        self._telemetry.storage_ok.set(self._ledger.healthy)
        scraper = _scraper(request)
        shown = self._ledger.scrapers.get(scraper) if scraper else None
        commits = self._ledger.commits
        has_zeros, text = self._render(wanted, names, commits if shown is None else shown)
        if scraper:
            await self._note(scraper, commits, must_commit=has_zeros or shown is None)
        body = text.encode() + self._telemetry.render(wanted, names)
        return await _compressed(body, wanted.content_type, request.headers.get("Accept-Encoding", ""))

    async def _note(self, scraper: str, commits: int, *, must_commit: bool) -> None:
        if not must_commit:
            self._ledger.scrapers[scraper] = commits
            return
        try:
            await self._ledger.note_scraper(scraper, commits)
        except StoreUnavailable as error:
            # A full disk must not end the scrapes; at worst this scraper sees a 0 a second time after a restart.
            log.warning("cannot note what a scraper was shown", extra={"error": error})
            self._ledger.scrapers[scraper] = commits

    def _render(self, wanted: Format, names: frozenset[str], shown: int) -> tuple[bool, str]:
        """Whether a counter stands at 0 because it was born after commit `shown`, and the families."""
        escaping = None if self._strategy.is_escaping else Escaping(wanted.escaping or "underscores")
        has_zeros = False
        lines: list[str] = []
        for name, exposed in self._exposed(escaping).items():
            if names and not _is_wanted(name, names):
                continue
            style = SampleStyle(name, 0, wanted.openmetrics, self._has_created)
            lines.append(exposition.header(name, exposed.kind, exposed.text, openmetrics=wanted.openmetrics))
            for labels, (scale, value, series, is_zero) in self._merged(exposed, shown, escaping).items():
                has_zeros |= is_zero
                scaled = style._replace(scale=scale)
                lines.append(exposition.sample_lines(scaled, labels, value, series.exemplar, series.row.birth))
        if not names or "target_info" in names:
            lines += self._target_info(wanted, escaping)
        return has_zeros, "".join(lines)

    def _exposed(self, escaping: Escaping | None) -> dict[str, _Exposed]:
        """The families by their final name. Of two types under one name the later gets its type as a suffix."""
        families: dict[str, _Exposed] = {}
        for metric_id, members in self._ledger.families.items():
            if not members:
                continue
            metric = self._ledger.metrics[metric_id]
            metric_type, kind = _TYPES[Kind(metric.kind)]
            try:
                name = naming.metric_name(metric.name, metric.unit, metric_type, strategy=self._strategy)
            except NamingError:
                name = naming.escape_name(metric.name or "unnamed", Escaping.VALUES)
            if name.startswith(_OURS):
                name = f"exported_{name}"
            if escaping is not None:
                name = naming.escape_name(name, escaping)
            if name in families and families[name].kind != kind:
                name = f"{name}_{kind}"
            text = f"{metric.description} (OTLP {metric.name})" if metric.description else f"OTLP {metric.name}"
            families.setdefault(name, _Exposed(kind, text, [])).members.append((metric, members.values()))
        return families

    def _merged(
        self, exposed: _Exposed, shown: int, escaping: Escaping | None
    ) -> dict[str, tuple[int, Value, Series, bool]]:
        """Labels -> scale, value, a series, and whether it is a newborn's 0.

        Two attribute sets can become one label set; what counts is then added up, of gauges the later one stands.
        """
        merged: dict[str, tuple[int, Value, Series, bool]] = {}
        for metric, members in exposed.members:
            starts_at_zero = Kind(metric.kind) in _BORN_AT_ZERO
            for series in members:
                row = series.row
                if row.value is None:
                    continue
                labels = series.labels if escaping is None else ""
                if not labels:
                    labels = self._labels(series, exposed.kind, escaping)
                is_zero = starts_at_zero and row.born > shown
                value = _zero(row.value) if is_zero else subtract(row.value, row.base)
                if labels in merged:
                    scale, other, neighbour, was_zero = merged[labels]
                    if starts_at_zero and scale == metric.scale:
                        value = add(other, value)
                    elif neighbour.row.time > row.time:
                        value, series = other, neighbour  # the later gauge stands for both
                    is_zero |= was_zero
                merged[labels] = (metric.scale, value, series, is_zero)
        return merged

    def _labels(self, series: Series, kind: str, escaping: Escaping | None) -> str:
        row = series.row
        reserved = _RESERVED_OF.get(kind, _RESERVED)
        pairs = naming.labels(row.labels, strategy=self._strategy, reserved=reserved)
        if escaping is not None:
            pairs = naming.labels(
                [(naming.escape_name(label, escaping, is_label=True), value) for label, value in pairs],
                strategy=Strategy.NO_TRANSLATION,
                reserved=reserved,
            )
        overflow = not row.job and not row.instance
        text = exposition.labels_text(pairs if overflow else (*pairs, ("job", row.job), ("instance", row.instance)))
        if escaping is None:
            series.labels = text
        return text

    def _target_info(self, wanted: Format, escaping: Escaping | None) -> Iterator[str]:
        """The other resource attributes, one series a job and instance, for joins."""
        style = SampleStyle("target_info", 0, wanted.openmetrics, has_created=False)
        for number, target in enumerate(self._ledger.targets.values()):
            if not number:
                text = "Attributes of what sent the metrics of this job and instance."
                yield exposition.header("target_info", "info", text, openmetrics=wanted.openmetrics)
            pairs = naming.labels(target.attributes, strategy=self._strategy, reserved=_RESERVED)
            if escaping is not None:
                pairs = tuple((naming.escape_name(label, escaping, is_label=True), value) for label, value in pairs)
            labels = exposition.labels_text((*pairs, ("job", target.job), ("instance", target.instance)))
            yield exposition.sample_lines(style, labels, 1, None, 0)


def _zero(value: Value) -> Value:
    match value:
        case Histogram():
            return Histogram(value.bounds, (0,) * len(value.counts), 0, None if value.sum is None else 0.0)
        case ExponentialHistogram():
            empty = (0,) * len(value.positive), (0,) * len(value.negative)
            return ExponentialHistogram(
                value.scale, 0, value.zero_threshold, value.positive_offset, empty[0], value.negative_offset, empty[1],
                0, None if value.sum is None else 0.0,
            )  # fmt: skip
        case Summary():
            return value
        case _:
            return 0


_SUFFIXES = ("_bucket", "_sum", "_count", "_total", "_created")


def _is_wanted(name: str, names: frozenset[str]) -> bool:
    """Whether `name[]` asks for a family: by its name or by that of one of its samples."""
    return name in names or any(f"{name}{suffix}" in names for suffix in _SUFFIXES)


def _scraper(request: web.BaseRequest) -> str:
    """Who scrapes: Prometheus sends its timeout; address, product and the query parameter tell scrapers apart."""
    if "X-Prometheus-Scrape-Timeout-Seconds" not in request.headers:
        return ""
    product = request.headers.get("User-Agent", "").partition("/")[0]
    return f"{request.remote}|{product}|{request.rel_url.query.get('scraper', '')}"[:256]


async def _compressed(body: bytes, content_type: str, accept_encoding: str) -> web.Response:
    """The body in gzip when the scraper takes it."""
    headers = {"Vary": "Accept, Accept-Encoding"}
    if not _accepts_gzip(accept_encoding):
        return response(body, content_type, headers=headers)
    if len(body) < COMPRESS_FROM:
        packed = gzip.compress(body, 1)
    else:
        packed = await asyncio.get_running_loop().run_in_executor(None, gzip.compress, body, 1)
    return response(packed, content_type, headers={**headers, "Content-Encoding": "gzip"})


def _accepts_gzip(accept_encoding: str) -> bool:
    for offer in accept_encoding.lower().split(","):
        name, *parameters = (part.strip() for part in offer.split(";"))
        if name in ("gzip", "*"):
            return not any(parameter.replace(" ", "") in _NO for parameter in parameters)
    return False


_NO = frozenset({"q=0", "q=0.0", "q=0.00", "q=0.000"})

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
<pre>export CLAUDE_CODE_ENABLE_TELEMETRY=1
export OTEL_METRICS_EXPORTER=otlp
export OTEL_LOGS_EXPORTER=otlp
export OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf
export OTEL_EXPORTER_OTLP_ENDPOINT=http://{host}
export OTEL_METRIC_EXPORT_INTERVAL=10000</pre>
<p>Or put the same names under <code>env</code> in <code>~/.claude/settings.json</code>. Then run <code>claude</code>
and watch <a href="/v1/metrics">/v1/metrics</a> move within ten seconds of its first answer.</p>
</body></html>
"""
