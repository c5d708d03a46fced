"""The OTLP/HTTP receiver: POST /v1/metrics, /v1/logs, /v1/traces.

Law: a 200 means that the points are in a committed transaction. Memory is bounded: a body has a limit before and
after decompression, all bodies together a budget, and one large body is decoded at a time, beside the event loop.
Logs and traces are answered fast, since they share the client's connection with the metrics: they are counted by
name, and events tell of API requests; their contents are not kept.
Source of the answers: opentelemetry-proto 1.11, `docs/specification.md`, OTLP/HTTP.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from aiohttp import HttpVersion11, web
from aiohttp.web_protocol import RequestPayloadError

from bridge import otlp
from bridge.config import Config
from bridge.ledger import Ledger, Unpostable
from bridge.model import DROP_TEXT, Batch, Drop, Event, Receipt, Refusal
from bridge.otlp import Encoding, Signal
from bridge.state import StoreUnavailable
from bridge.telemetry import Telemetry, Throttle
from bridge.tools import known
from bridge.web.access import Turns
from bridge.web.server import Refused, Routes, caller_of, response

BUDGET_BYTES = 32 * 2**20
"""All bodies that are being read and decoded, at most."""
BUDGET_POINTS = 100_000
"""All data points that wait for their commit, at most; one takes about a kilobyte."""
LOAD_SECONDS = 5.0
"""How long an export waits for the state to be loaded; the client's own timeout is ten."""
TURNS = 4
"""Exports of one token, or of one address beyond loopback, that are taken at a time."""
TURN_SECONDS = 5.0
SMALL_BODY = 128 * 2**10
"""Larger bodies are decoded in a thread, so that scrapes are answered meanwhile."""

T = TypeVar("T")


class Receiver:
    """Takes exports, has the ledger count them, and says what became of them."""

    def __init__(self, ledger: Ledger, config: Config, telemetry: Telemetry, throttle: Throttle) -> None:
        self._ledger = ledger
        self._limit = config.limits.max_body_mib * 2**20
        self._body_seconds = config.limits.body_seconds
        self._telemetry = telemetry
        self._throttle = throttle
        self._content_keys = otlp.CONTENT_KEYS.union(config.labels.deny)
        self._event_keys = known.event_keys(frozenset(config.labels.deny))
        self._span_keys = known.span_keys(frozenset(config.labels.deny))
        self._known = otlp.Known()
        self._in_flight = 0
        self._points = 0
        self._turns = Turns(TURNS)
        self._decoder = ThreadPoolExecutor(1, "decode")
        self.draining = False

    @property
    def routes(self) -> Routes:
        return {f"/v1/{signal}": {"POST": self._handler(signal)} for signal in Signal}

    def close(self) -> None:
        self._decoder.shutdown(wait=False, cancel_futures=True)

    def _handler(self, signal: Signal) -> Callable[[web.BaseRequest], "asyncio.Future[web.StreamResponse]"]:
        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            code = 500
            try:
                answer = await self._receive(request, signal)
                code = answer.status
                return answer
            except Refused as error:
                code = error.code
                raise
            finally:
                self._telemetry.count_request(signal.value, code)

        return handle  # type: ignore[return-value]  # a coroutine function is what the server awaits

    async def _receive(self, request: web.BaseRequest, signal: Signal) -> web.Response:
        encoding = _encoding(request)
        content_encoding = _content_encoding(request)
        if self.draining or not (self._ledger.ready or await self._ledger.wait_ready(LOAD_SECONDS)):
            raise Refused(503, "starting or stopping; try again")
        caller = caller_of(request)
        if caller.is_local and not caller.source:
            return await self._take_export(request, signal, encoding, content_encoding, "")
        try:
            async with self._turns.turn(caller.name, TURN_SECONDS):
                return await self._take_export(request, signal, encoding, content_encoding, caller.source)
        except TimeoutError:
            raise Refused(429, "too many exports at once; send one after the other") from None

    async def _take_export(
        self, request: web.BaseRequest, signal: Signal, encoding: Encoding, content_encoding: str, source: str
    ) -> web.Response:
        taken = 0
        try:
            wire, taken = await self._read(request)
            if content_encoding != "identity":
                # What decompression may add is taken from the budget first.
                room = min(self._limit, len(wire) * 1_100)
                self._take(room)
                taken += room
            body = await self._beside(len(wire), lambda: otlp.decompress(wire, content_encoding, self._limit))
            batch, records = await self._beside(len(body), lambda: self._decode(body, encoding, signal))
            if records is not None:
                return await self._take_records(records, batch, body, signal, encoding, source)
            receipt = await self._post(batch, body, source)
        except otlp.DecodeError as error:
            raise Refused(400, str(error)) from None
        except otlp.TooLarge as error:
            raise self._too_large(str(error)) from None
        except StoreUnavailable as error:
            self._throttle.warning("store", "cannot write the state; exports are refused until it can", error=error)
            raise Refused(503, "the state cannot be written now; try again") from None
        except Unpostable as error:
            self._throttle.warning("fault", "a fault of the bridge; please report it", fault=error, signal=signal.value)
            raise Refused(400, "this body brings out a fault of the bridge; no more of it is counted") from None
        finally:
            self._in_flight -= taken
        self._note(receipt, batch.points[0].metric.resource.get("service.name") if batch.points else "")
        rejected = len(receipt.refused)
        return response(otlp.success(signal, encoding, rejected, refusal_text(receipt.refused)), encoding.value)

    # --- the body ---

    async def _read(self, request: web.BaseRequest) -> tuple[bytes, int]:
        """The body as it came, and how much of the budget it took."""
        length = request.content_length
        if length is not None and length > self._limit:
            raise self._too_large(f"body of {length} bytes is larger than {self._limit}; {otlp.SIZE_ADVICE}")
        if request.headers.get("Expect", "").lower() == "100-continue" and request.version == HttpVersion11:
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        pieces: list[bytes] = []
        taken = 0
        try:
            # Most bodies come with their heads, and a timer costs more than taking them.
            async with asyncio.timeout(None if request.content.is_eof() else self._body_seconds):
                while piece := await request.content.readany():
                    self._take(len(piece))
                    taken += len(piece)
                    if taken > self._limit:
                        raise self._too_large(f"body is larger than {self._limit} bytes; {otlp.SIZE_ADVICE}")
                    pieces.append(piece)
        except (ConnectionError, RequestPayloadError):
            self._in_flight -= taken
            raise Refused(400, "the body ended before it was complete", _CLOSE) from None
        except TimeoutError:
            self._in_flight -= taken
            raise Refused(408, f"body did not arrive within {self._body_seconds:g} s", _CLOSE) from None
        except BaseException:
            self._in_flight -= taken
            raise
        return b"".join(pieces), taken

    def _take(self, count: int) -> None:
        if self._in_flight + count > BUDGET_BYTES:
            raise Refused(503, "too many bodies at once; try again")
        self._in_flight += count

    def _too_large(self, what: str) -> Refused:
        self._throttle.warning("too_large", f"refused an export: {what}")
        return Refused(413, what)

    async def _post(self, batch: Batch, body: bytes, source: str) -> Receipt:
        count = len(batch.points)
        if self._points and self._points + count > BUDGET_POINTS:
            raise Refused(503, "too many data points at once; try again")
        self._points += count
        try:
            return await self._ledger.post(batch, body, source)
        finally:
            self._points -= count

    async def _beside(self, size: int, work: Callable[[], T]) -> T:
        """Do small work at once, large work beside the event loop."""
        if size <= SMALL_BODY:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._decoder, work)

    def _decode(self, body: bytes, encoding: Encoding, signal: Signal) -> tuple[Batch, otlp.Records | None]:
        """What is to be posted, and the log records or spans that tell it."""
        match signal:
            case Signal.METRICS:
                batch = otlp.decode_metrics(body, encoding, self._content_keys, self._known)
                return known.without_repeats(batch, body), None
            case Signal.LOGS:
                records = otlp.decode_logs(body, encoding, self._event_keys, self._content_keys)
            case Signal.TRACES:
                records = otlp.decode_traces(body, encoding, self._span_keys, self._content_keys)
        return _batch(records.events, signal), records

    # --- what came of it ---

    async def _take_records(
        self, records: otlp.Records, batch: Batch, body: bytes, signal: Signal, encoding: Encoding, source: str
    ) -> web.Response:
        """Count log records or spans by name; what they tell of goes into the ledger."""
        counter = self._telemetry.log_records if signal is Signal.LOGS else self._telemetry.spans
        self._telemetry.count_names(counter, records.counts)
        if records.counts:
            self._telemetry.note_export(records.service, signal.value)
        refused: tuple[Refusal, ...] = ()
        if any(batch):
            refused = (await self._post(batch, body, source)).refused
            self._note_refused(refused, "what log records or spans tell")
        return response(otlp.success(signal, encoding, len(refused), refusal_text(refused)), encoding.value)

    def _note(self, receipt: Receipt, service: str) -> None:
        telemetry = self._telemetry
        telemetry.accepted.inc(receipt.accepted)
        telemetry.duplicate.inc(receipt.duplicate)
        self._note_refused(receipt.refused, "data points")
        if receipt.accepted or receipt.duplicate:
            telemetry.note_export(service, Signal.METRICS.value)

    def _note_refused(self, refused: tuple[Refusal, ...], what: str) -> None:
        for reason, count in Counter(refusal.reason for refusal in refused).items():
            self._telemetry.dropped.labels(reason.value).inc(count)
            text = refusal_text(tuple(refusal for refusal in refused if refusal.reason is reason))
            self._throttle.warning(f"refused {reason}", f"refused {what}", what=text)


def _batch(records: list[Event], signal: Signal) -> Batch:
    """What log records or spans tell."""
    if signal is Signal.LOGS:
        usages, points, refused = known.read_events(records)
        return Batch(points, refused, tuple(usages))
    usages, refused = known.read_spans(records)
    return Batch([], refused, tuple(usages))


_CLOSE = {"Connection": "close"}


def refusal_text(refused: tuple[Refusal, ...]) -> str:
    """For partialSuccess: how many points of which metrics were refused, and why."""
    if not refused:
        return ""
    counts = Counter((refusal.reason, refusal.metric) for refusal in refused)
    by_reason: dict[Drop, list[str]] = {}
    for (reason, metric), count in counts.most_common(8):
        by_reason.setdefault(reason, []).append(f"{count} of {metric[:100]}")
    parts = [f"{reason}: {', '.join(metrics)} ({DROP_TEXT[reason]})" for reason, metrics in by_reason.items()]
    if len(counts) > 8:
        parts.append(f"and {len(counts) - 8} more metrics")
    return "; ".join(parts)


def _encoding(request: web.BaseRequest) -> Encoding:
    content_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    with suppress(ValueError):
        return Encoding(content_type)
    raise Refused(415, "Content-Type must be application/x-protobuf or application/json")


def _content_encoding(request: web.BaseRequest) -> str:
    given = ",".join(request.headers.getall("Content-Encoding", []))
    name = given.strip().lower() or "identity"
    if name not in ("identity", "gzip", "deflate"):
        raise Refused(415, "Content-Encoding must be gzip, deflate or none")
    return name
