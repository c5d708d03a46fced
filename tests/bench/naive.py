"""The bridge that one writes in an afternoon, as a peer of the comparison: `python naive.py PORT`.

It keeps the last value of each series in a dictionary: no adding up, no identities, no disk. Every export of a delta
replaces the one before, and a restart forgets everything.
"""

import json
import sys
import time
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

Labels = tuple[tuple[str, str], ...]

values: dict[tuple[str, Labels], float] = {}


def take_protobuf(body: bytes) -> None:
    """Remember the values of a protobuf export."""
    request = ExportMetricsServiceRequest()
    request.ParseFromString(body)
    for resource in request.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                name = metric.name.replace(".", "_")
                for point in (metric.sum if metric.HasField("sum") else metric.gauge).data_points:
                    labels = tuple((item.key.replace(".", "_"), item.value.string_value) for item in point.attributes)
                    values[name, labels] = point.as_double or float(point.as_int)


def take_json(body: bytes) -> None:
    """Remember the values of a JSON export."""
    for resource in json.loads(body).get("resourceMetrics", ()):
        for scope in resource.get("scopeMetrics", ()):
            for metric in scope.get("metrics", ()):
                name = metric["name"].replace(".", "_")
                for point in (metric.get("sum") or metric.get("gauge") or {}).get("dataPoints", ()):
                    labels = tuple(
                        (item["key"].replace(".", "_"), str(item["value"].get("stringValue", "")))
                        for item in point.get("attributes", ())
                    )
                    values[name, labels] = float(point.get("asDouble", point.get("asInt", 0)))


async def receive(request: web.Request) -> web.Response:
    """POST /v1/metrics."""
    body = await request.read()
    if request.content_type == "application/json":
        take_json(body)
        return web.json_response({})
    take_protobuf(body)
    return web.Response(body=b"", content_type="application/x-protobuf")


def page(now: int) -> str:
    """The last values, as XRG reads them."""
    lines = []
    for (name, labels), value in values.items():
        shown = ",".join(f'{key}="{text}"' for key, text in labels)
        lines.append(f"{name}{{{shown}}} {value} {now}\n")
    return "".join(lines)


async def show(request: web.Request) -> web.Response:
    """GET /v1/metrics."""
    del request
    return web.Response(text=page(int(time.time() * 1000)))


def main() -> None:
    """Serve until the process is ended."""
    app = web.Application(client_max_size=2**26)
    routes: list[Any] = [web.post("/v1/metrics", receive), web.get("/v1/metrics", show)]
    app.add_routes(routes)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=lambda *_: None)


if __name__ == "__main__":
    main()
