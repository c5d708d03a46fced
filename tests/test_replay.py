"""What the real client sent, sent again to a real bridge: in order, out of order, re-encoded, and across kills."""

import http.client
import random
import re
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from gzip import compress
from threading import Event

import pytest

from tests.daemon import PROTOBUF, Daemon
from tests.recordings import (
    ALL_REQUESTS,
    EXPECTED,
    RUNS,
    XRG_SAMPLES,
    Request,
    assert_shows,
    delta_body,
    joined_totals,
    shown_to_prometheus,
    shown_to_xrg,
    true_totals,
    xrg_samples,
)
from tests.xrg_reader import XRG

TOKENS, COST = "claude_code.token.usage", "claude_code.cost.usage"
SESSION = {"session.id": "session-00"}
INPUT = 'claude_code_token_usage{type="input"}'


def posted(daemon: Daemon, request: Request) -> None:
    reply = request.post(daemon)
    assert reply.status == 200, reply.text


@pytest.mark.parametrize("run", RUNS)
def test_the_true_totals_of_a_run_are_what_the_client_knew(run: str) -> None:
    totals = true_totals(RUNS[run])
    kinds = ("input", "output", "cacheRead", "cacheCreation")
    tokens = {(kind, model): by[kind] for model, by in EXPECTED[run]["tokens"].items() for kind in kinds}
    assert {(kind, model): value for (name, kind, model), value in totals.items() if name == TOKENS} == tokens
    assert {model: value for (name, _, model), value in totals.items() if name == COST} == EXPECTED[run]["cost_usd"]


def test_every_run_adds_its_true_totals(daemon: Daemon) -> None:
    sent: list[Request] = []
    for requests in RUNS.values():
        for request in requests:
            posted(daemon, request)
        sent += requests
        assert_shows(daemon, true_totals(sent), joined_totals(sent))


@pytest.mark.parametrize(("run", "truth"), [("v329-f503long", 2210), ("v329-resume-cumulative", 306)])
def test_input_tokens_of_runs_that_others_miscount(daemon: Daemon, run: str, truth: int) -> None:
    """The first is sent 5995 in all, bodies again and again; a reader of last values takes the second for 103."""
    for request in RUNS[run]:
        posted(daemon, request)
    assert shown_to_xrg(daemon)[INPUT] == truth
    shown = shown_to_prometheus(daemon)
    assert shown[TOKENS, "input", "claude-sonnet-4-5-20250929"] == truth


def test_every_body_three_times_in_any_order_counts_once(daemon: Daemon) -> None:
    requests = random.Random(1).sample(ALL_REQUESTS * 3, len(ALL_REQUESTS) * 3)
    with xrg_polls(daemon) as polls:
        for request in requests:
            posted(daemon, request)
    assert_shows(daemon, true_totals(ALL_REQUESTS), joined_totals(ALL_REQUESTS))
    assert_rises_to_truth(polls)


def test_every_body_in_every_encoding_in_any_order_counts_once(daemon: Daemon) -> None:
    requests = [variant for request in ALL_REQUESTS for variant in encodings(request)]
    random.Random(2).shuffle(requests)
    for request in requests:
        posted(daemon, request)
    assert_shows(daemon, true_totals(ALL_REQUESTS), joined_totals(ALL_REQUESTS))


def encodings(request: Request) -> Iterator[Request]:
    """The same request as sent and as other clients might send it."""
    data = request.decoded
    yield request
    yield request._replace(body=compress(data), encoding="gzip", chunked=True)
    yield Request(request.path, PROTOBUF, request.message.SerializeToString(), chunked=True)
    yield Request(request.path, PROTOBUF, zlib.compress(request.message.SerializeToString()), "deflate")


@pytest.mark.parametrize("seed", [3, 4])
def test_sigkill_at_any_moment_loses_and_doubles_nothing(daemon: Daemon, seed: int) -> None:
    """Three senders repeat each request until it is acknowledged, while the bridge is killed and started again."""
    choose = random.Random(seed)
    requests = choose.sample(ALL_REQUESTS, len(ALL_REQUESTS))
    kill_after = sorted(choose.sample(range(len(requests)), 6))
    with xrg_polls(daemon) as polls, ThreadPoolExecutor(3) as senders:
        acknowledged = [senders.submit(post_until_acknowledged, daemon, request) for request in requests]
        for position in kill_after:
            acknowledged[position].result()
            time.sleep(choose.uniform(0, 0.01))
            daemon.kill()
            daemon.start()
        for answer in acknowledged:
            answer.result()
    assert_shows(daemon, true_totals(ALL_REQUESTS), joined_totals(ALL_REQUESTS))
    assert_rises_to_truth(polls)
    daemon.restart()
    for request in requests:
        posted(daemon, request)
    assert_shows(daemon, true_totals(ALL_REQUESTS), joined_totals(ALL_REQUESTS))


def post_until_acknowledged(daemon: Daemon, request: Request) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            reply = request.post(daemon)
        except (OSError, http.client.HTTPException):
            time.sleep(0.01)
            continue
        if reply.status == 200:
            return
        assert reply.status == 503, reply.text
    raise AssertionError("not acknowledged within a minute")


@contextmanager
def xrg_polls(daemon: Daemon) -> Iterator[list[XRG]]:
    """What XRG shows, polling while the block runs and once after it; where no bridge is ready it shows nothing new."""
    xrg, polls, ended = XRG(), list[XRG](), Event()

    def poll() -> None:
        try:
            reply = daemon.get("/v1/metrics")
        except (OSError, http.client.HTTPException):
            return
        if reply.status == 200:
            assert len(re.findall("^claude_code_", reply.text, re.MULTILINE)) == len(XRG_SAMPLES)
            polls.append(replace(xrg.poll(reply.text)))

    def poll_until_ended() -> None:
        while not ended.wait(0.005):
            poll()

    with ThreadPoolExecutor(1) as reader:
        polling = reader.submit(poll_until_ended)
        try:
            yield polls
        finally:
            ended.set()
        polling.result()
        poll()


def assert_rises_to_truth(polls: list[XRG]) -> None:
    """The tokens that XRG showed never fell, never jumped by more than was sent, and ended at the truth."""
    tokens = [poll.tokens for poll in polls]
    samples = xrg_samples(joined_totals(ALL_REQUESTS))
    truth = [value for name, value in samples.items() if "token_usage" in name]
    assert tokens == sorted(tokens)
    assert len(set(tokens)) > 3, "the polls saw no movement"
    assert max(poll.rate for poll in polls) <= sum(truth)
    assert [*polls[-1].by_kind.values()] == truth


def test_large_counters_are_plain_digits(daemon: Daemon) -> None:
    xrg = XRG()
    total = 0
    for at, tokens in enumerate([1_000_001, *[999_999_999] * 5]):
        body = delta_body(TOKENS, [tokens], {"type": "input", "model": "m", **SESSION}, start=(at + 1) * 10**10)
        assert daemon.post("/v1/metrics", body, PROTOBUF).status == 200
        total += tokens
        assert daemon.samples()[INPUT] == str(total)
        assert xrg.poll(daemon.get("/v1/metrics").text).by_kind["input"] == total
        assert xrg.rate == tokens
    assert total > 2**32
    values = [value for name, value in daemon.samples("/metrics").items() if name.startswith("claude_code_token_usage")]
    assert values == [str(total)]


SESSION = {"session.id": "session-00"}


def test_many_small_costs_add_up_to_the_nano_dollar(daemon: Daemon, campaign: bool) -> None:
    """A hundred thousand; in a campaign a million."""
    sessions = 50 if campaign else 5
    nano_dollars = [1 + at * 7919 % 4999 for at in range(20_000)]
    body = delta_body(COST, [nano / 1e9 for nano in nano_dollars], {"model": "m", **SESSION})
    one = delta_body(COST, [0.00000123], {"model": "m", "session.id": "one"})
    assert daemon.post("/v1/metrics", one, PROTOBUF).status == 200
    assert daemon.samples()["claude_code_cost_usage"] == "0.00000123"
    for session in range(sessions):
        data = body.replace(b"session-00", b"session-%02d" % session)
        assert daemon.post("/v1/metrics", data, PROTOBUF).status == 200
    truth = Decimal(sessions * sum(nano_dollars) + 1230).scaleb(-9)
    shown = daemon.samples()["claude_code_cost_usage"]
    assert re.fullmatch(r"\d+\.\d{1,9}", shown)
    assert Decimal(shown) == truth
    assert shown_to_prometheus(daemon) == {(COST, "", "m"): truth}
    assert XRG().poll(daemon.get("/v1/metrics").text).cost == float(truth)
