"""Transcript trees of any size whose true totals are known, because each request is booked when it is decided.

What is written of a request afterwards (a line for every block, snapshots of a stream, copies in forks, progress lines,
replays as side questions) is never counted here, so the truth owes nothing to any reader. Same arguments, same bytes.

    python -m tests.transcript_tree DIRECTORY --files 2000 --megabytes 1000

writes DIRECTORY/projects and prints the truth as JSON; `--edge-cases` writes the small tree with a case for each rule.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

START_MS = 1_790_000_000_000
MODELS = ("claude-sonnet-4-5-20250929", "claude-opus-4-6", "claude-haiku-4-5-20251001", "claude-sonnet-5")
ADVISOR = "claude-opus-5"
CONSTANT_ID = "msg_gateway"


class Request(NamedTuple):
    """An API request as decided; `write_5m` and `write_1h` are cache writes, `told` the line's own nano-dollars."""

    model: str
    input: int
    output: int
    read: int = 0
    write_5m: int = 0
    write_1h: int = 0
    searches: int = 0
    speed: str = ""
    geo: str = ""
    told: int = 0


# https://platform.claude.com/docs/en/about-claude/pricing, checked 2026-11-28: USD per million tokens, so that a
# thousandfold is nano-dollars a token. Written and read cache tokens are 1.25, 2 and 0.1 times the input.
LIST_PRICES = {
    "claude-sonnet-4-5-20250929": (3, 15),
    "claude-opus-4-6": (5, 25),
    "claude-haiku-4-5-20251001": (1, 5),
    "claude-sonnet-5": (2, 10),
    "claude-opus-5": (5, 25),
}
FAST = {"claude-opus-4-6": 6, "claude-opus-5": 2}


def list_price(request: Request) -> int:
    """What a request costs in nano-dollars, worked out from the list and no code of the bridge."""
    if request.told:
        return request.told
    into, out = (1000 * price for price in LIST_PRICES[request.model])
    prompt = request.input + request.read + request.write_5m + request.write_1h
    if request.model == "claude-sonnet-4-5-20250929" and prompt > 200_000:
        into, out = 2 * into, 3 * out // 2
    cached = request.write_5m * into * 5 // 4 + request.write_1h * into * 2 + request.read * into // 10
    factor = FAST.get(request.model, 1) if request.speed == "fast" else 1
    tokens = (request.input * into + request.output * out + cached) * factor
    return (tokens * 11 // 10 if request.geo == "us" else tokens) + request.searches * 10_000_000


class Truth:
    """All requests of a tree, each once."""

    def __init__(self, requests: Iterable[Request] = ()) -> None:
        self.requests = [*requests]

    def book(self, request: Request) -> Request:
        self.requests.append(request)
        return request

    def tokens(self) -> dict[str, Counter[str]]:
        """Model -> type -> tokens, and the requests and searches beside them."""
        sums: dict[str, Counter[str]] = {}
        for request in self.requests:
            counts = request._asdict()
            numbers = {name: counts[name] for name in ("input", "output", "read", "write_5m", "write_1h", "searches")}
            sums.setdefault(request.model, Counter()).update({**numbers, "requests": 1})
        return sums

    def cost(self, price: Callable[[Request], int]) -> int:
        return sum(map(price, self.requests))


# --- lines -------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """What all lines of one file say of where they were written."""

    session: str
    cwd: str
    version: str = "2.1.329"
    is_sidechain: bool = False


class Shape(NamedTuple):
    """How a request is written down."""

    message: str
    request_id: str | None
    cache: str = "split"
    """`split`, `sum` (no split, as in old versions) or `zeros` (a split of zeros beside the sum)."""
    iterations: str = "[]"


def timestamp(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def usage_text(request: Request, shape: Shape, output: int) -> str:
    written = request.write_5m + request.write_1h
    split = (0, 0) if shape.cache == "zeros" else (request.write_5m, request.write_1h)
    parts = f'"ephemeral_1h_input_tokens":{split[1]},"ephemeral_5m_input_tokens":{split[0]}'
    creation = "" if shape.cache == "sum" else f'"cache_creation":{{{parts}}},'
    return (
        f'"usage":{{"input_tokens":{request.input},"cache_creation_input_tokens":{written},'
        f'"cache_read_input_tokens":{request.read},"output_tokens":{output},'
        f'"server_tool_use":{{"web_search_requests":{request.searches},"web_fetch_requests":0}},'
        f'"service_tier":"standard",{creation}"inference_geo":"{request.geo}","iterations":{shape.iterations},'
        f'"speed":"{request.speed}"}}'
    )


def assistant_line(
    place: Place, request: Request, shape: Shape, *, text: str, output: int, time_ms: int, number: int
) -> str:
    request_id = f'"requestId":"{shape.request_id}",' if shape.request_id else ""
    return (
        f'{{"parentUuid":"{number - 1:08x}-0000","isSidechain":{"true" if place.is_sidechain else "false"},'
        f'"message":{{"id":"{shape.message}","type":"message","role":"assistant","model":"{request.model}",'
        f'"content":[{{"type":"text","text":"{text}"}}],"stop_reason":null,"stop_sequence":null,'
        f"{usage_text(request, shape, output)}}},{request_id}"
        f'"type":"assistant","uuid":"{number:08x}-0000","timestamp":"{timestamp(time_ms)}","userType":"external",'
        f'"cwd":"{place.cwd}","sessionId":"{place.session}","version":"{place.version}","gitBranch":"main"}}\n'
    )


def plain_line(place: Place, kind: str, members: str, *, time_ms: int, number: int) -> str:
    """A line without usage of its own; `members` end in a comma."""
    return (
        f'{{"parentUuid":"{number - 1:08x}-0000","type":"{kind}",{members}"uuid":"{number:08x}-0000",'
        f'"timestamp":"{timestamp(time_ms)}","cwd":"{place.cwd}","sessionId":"{place.session}",'
        f'"version":"{place.version}"}}\n'
    )


def user_members(text: str) -> str:
    return f'"message":{{"role":"user","content":[{{"type":"tool_result","content":"{text}"}}]}},'


def progress_members(line: str) -> str:
    """A subagent's line as its parent's file repeats it."""
    return f'"data":{{"type":"agent_progress","agentId":"a1","message":{line.rstrip()}}},"toolUseID":"toolu_1",'


SYNTHETIC_MEMBERS = (
    '"isApiErrorMessage":true,"message":{"id":"f0e1","model":"<synthetic>","role":"assistant","content":[],'
    '"usage":{"input_tokens":0,"output_tokens":0,"cache_creation_input_tokens":0,"cache_read_input_tokens":0}},'
)
ROLL_UP_MEMBERS = (
    '"toolUseResult":{"status":"completed","totalTokens":91234,"usage":{"input_tokens":9,"output_tokens":1225,'
    '"cache_creation_input_tokens":5000,"cache_read_input_tokens":85000}},"message":{"role":"user","content":"done"},'
)
SUMMARY_MEMBERS = (
    '"isCompactSummary":true,"message":{"role":"user","content":"Before: {\\"type\\":\\"assistant\\",\\"message\\":'
    '{\\"id\\":\\"msg_old\\",\\"usage\\":{\\"input_tokens\\":777,\\"output_tokens\\":777}}}"},'
)
BOUNDARY_MEMBERS = '"subtype":"compact_boundary","compactMetadata":{"trigger":"auto","preTokens":155000},'


# --- a tree of any size ------------------------------------------------------------------------------------------

_WORDS = (
    "the a of to and is def return self import for in not value token usage file path line class test error "
    'function \\"name\\" \\"text\\": \\n \\n\\n \\t \\\\ { } ( ) = == + 0 1 42 é ü 日本 https://example.org/a?b=c'
)


class Writer:
    """Writes one tree; all randomness is of its seed."""

    def __init__(self, root: Path, files: int, size: int, seed: int) -> None:
        self.root = root
        self.files = files
        self.size = size
        self.random = Random(seed)
        self.truth = Truth()
        self.number = 0
        self.time_ms = START_MS
        self.gateway_prompts: set[tuple[str, int, int, int]] = set()
        self.texts = [" ".join(self.random.choices(_WORDS.split(" "), k=60)) for _ in range(4000)]

    def write(self) -> Truth:
        """All files; about one in five is a subagent's, one in twenty a fork."""
        written = 0
        forkable: tuple[Place, list[str]] | None = None
        made = 0
        while made < self.files:
            self.number += 1
            budget = int((self.size - written) / (self.files - made) * self.random.choice((0.3, 0.6, 1.0, 1.4, 1.7)))
            place = self._place()
            lines: list[str] = []
            if forkable and self.random.random() < 0.05:
                parent, copied = forkable
                kept = copied[: self.random.randint(1, len(copied))]
                lines = [line.replace(parent.session, place.session) for line in kept]
            agents = self._session(place, lines, budget, may_have_agents=made + 1 < self.files)
            path = self.root / "projects" / place.cwd.replace("/", "-") / f"{place.session}.jsonl"
            written += self._save(path, lines)
            made += 1
            if agents:
                written += self._save(path.with_suffix("") / "subagents" / f"agent-{self.number:x}.jsonl", agents)
                made += 1
            if sum(map(len, lines)) < 4_000_000:
                forkable = place, lines
        return self.truth

    def _place(self) -> Place:
        version = self.random.choice(("1.0.128", "2.0.77", "2.1.63", "2.1.197", "2.1.329", "2.1.329"))
        return Place(f"{self.random.getrandbits(128):032x}", f"/home/u/p{self.random.randrange(20)}", version)

    def _save(self, path: Path, lines: list[str]) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = "".join(lines).encode()
        path.write_bytes(content)
        return len(content)

    def _session(self, place: Place, lines: list[str], budget: int, *, may_have_agents: bool) -> list[str]:
        """Fill one session's file; returns the lines of its subagent, if it has one."""
        random = self.random
        agents: list[str] = []
        agent = place._replace(is_sidechain=True)
        has_agent = may_have_agents and random.random() < 0.25
        gateway = random.choice(("constant", "chatcmpl")) if random.random() < 0.05 else ""
        length = 0
        begin = len(lines)
        while length < budget or len(lines) == begin:
            first = len(lines)
            lines.append(self._plain(place, "user", user_members(self._text(1, 12))))
            request, shape = self._decide(place, gateway)
            self._blocks(place, request, shape, lines)
            self._noise(place, lines)
            if has_agent and random.random() < 0.2:
                self._agent(place, agent, lines, agents)
            if has_agent and shape.request_id and random.random() < 0.05:
                replay = request._replace(read=request.read + 150_000, output=max(1, request.output // 2))
                aside = shape._replace(request_id=f"req_btw{self.number:x}")
                agents.append(self._assistant(agent, replay, aside, replay.output))
            length += sum(map(len, lines[first:]))
        if random.random() < 0.02:
            half = self._assistant(place, Request(MODELS[0], 5, 5), Shape(f"msg_half{self.number:x}", "req_half"), 5)
            lines.append(half[: len(half) // 2])
        return agents

    def _decide(self, place: Place, gateway: str = "") -> tuple[Request, Shape]:
        """One request, booked here and nowhere else, and the way it is going to be written."""
        random = self.random
        self.number += 1
        written = random.choice((0, 0, random.randrange(20_000)))
        is_1h = place.version == "2.1.329" and random.random() < 0.7
        is_old = place.version == "1.0.128"
        request = self.truth.book(
            Request(
                model := random.choice(MODELS),
                self._input(model, read := random.randrange(150_000), written, gateway),
                random.randrange(1, 4000),
                read,
                0 if is_1h else written,
                written if is_1h else 0,
                random.choice((0,) * 30 + (1, 3)),
                random.choice(("standard",) * 20 + ("fast",)),
                random.choice(("",) * 20 + ("us",)),
            )
        )
        if gateway:
            cache = "zeros" if request.write_1h == 0 else "split"
            return request, Shape(CONSTANT_ID if gateway == "constant" else f"chatcmpl-{self.number}", None, cache)
        request_id = None if place.version == "2.1.63" and random.random() < 0.3 else f"req_{self.number:024x}"
        iterations = "[]"
        if place.version == "2.1.329" and random.random() < 0.02:
            asked, advised = random.randrange(1, 9000), random.randrange(1, 900)
            advice = self.truth.book(Request(ADVISOR, asked, advised, geo=request.geo))
            iterations = (
                f'[{{"type":"message","input_tokens":{request.input},"output_tokens":{request.output}}},'
                f'{{"type":"advisor_message","model":"{ADVISOR}","input_tokens":{advice.input},'
                f'"output_tokens":{advice.output},"cache_read_input_tokens":0,"cache_creation_input_tokens":0}}]'
            )
        return request, Shape(f"msg_{self.number:022x}", request_id, "sum" if is_old else "split", iterations)

    def _input(self, model: str, read: int, written: int, gateway: str) -> int:
        """Under a constant id only the numbers tell two requests apart."""
        count = self.random.randrange(1, 400)
        while gateway == "constant" and (model, count, read, written) in self.gateway_prompts:
            count += 1
        self.gateway_prompts.add((model, count, read, written))
        return count

    def _blocks(self, place: Place, request: Request, shape: Shape, lines: list[str]) -> None:
        """A line for each block of the response; old clients wrote what was known of the output at each time."""
        count = self.random.choice((1, 1, 2, 2, 3, 4))
        for block in range(count):
            is_snapshot = place.version in ("1.0.128", "2.0.77") and block < count - 1
            lines.append(self._assistant(place, request, shape, 1 if is_snapshot else request.output))
            if self.random.random() < 0.9:
                lines.append(self._plain(place, "user", user_members(self._text(1, 16))))

    def _agent(self, place: Place, agent: Place, lines: list[str], agents: list[str]) -> None:
        """A subagent's request: in its own file, in some versions also as progress of the parent, then rolled up."""
        request, shape = self._decide(agent)
        first = len(agents)
        self._blocks(agent, request, shape, agents)
        if place.version in ("2.0.77", "2.1.63"):
            nested = [line for line in agents[first:] if '"type":"assistant"' in line]
            lines += [self._plain(place, "progress", progress_members(line)) for line in nested]
        lines.append(self._plain(place, "user", ROLL_UP_MEMBERS))

    def _noise(self, place: Place, lines: list[str]) -> None:
        chance = self.random.random()
        if chance < 0.6:
            lines.append(self._plain(place, "attachment", f'"attachment":{{"text":"{self._text(1, 10)}"}},'))
        elif chance < 0.8:
            lines.append(self._plain(place, "file-history-snapshot", f'"snapshot":{{"x":"{self._text(5, 40)}"}},'))
        elif chance < 0.81:
            lines.append(self._plain(place, "assistant", SYNTHETIC_MEMBERS))
        elif chance < 0.82:
            lines.append(self._plain(place, "system", BOUNDARY_MEMBERS))
            lines.append(self._plain(place, "user", SUMMARY_MEMBERS))
        elif chance < 0.823:
            size = self.random.randrange(300, 3000)  # texts of about 350 bytes
            lines.append(self._plain(place, "user", user_members(self._text(size, size + 1))))
        elif chance < 0.824:
            request, shape = self._decide(place)
            lines.append(self._assistant(place, request, shape, request.output, self._text(300, 1000)))

    def _text(self, least: int, most: int) -> str:
        count = self.random.randrange(least, most)
        start = self.random.randrange(len(self.texts) - count)
        return "".join(self.texts[start : start + count])

    def _assistant(self, place: Place, request: Request, shape: Shape, output: int, text: str | None = None) -> str:
        number, time_ms = self._next()
        content = self._text(1, 8) if text is None else text
        return assistant_line(place, request, shape, text=content, output=output, time_ms=time_ms, number=number)

    def _plain(self, place: Place, kind: str, members: str) -> str:
        number, time_ms = self._next()
        return plain_line(place, kind, members, time_ms=time_ms, number=number)

    def _next(self) -> tuple[int, int]:
        self.number += 1
        self.time_ms += 1 + self.number % 9000
        return self.number, self.time_ms


def write_tree(root: Path, *, files: int, size: int, seed: int = 1) -> Truth:
    """About `size` bytes of transcripts in exactly `files` files under root/projects."""
    return Writer(root, files, size, seed).write()


# --- a case for each rule ----------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Files of one situation (path in the project's folder -> bytes), and the requests that really were made."""

    name: str
    files: Mapping[str, bytes]
    requests: tuple[Request, ...]
    refused: int = 0
    """Lines that look like usage and cannot be read."""


def response(message: str, request_id: str | None, usage: Mapping[str, Any] | None = None, **members: Any) -> bytes:
    """An assistant's line; `usage` adds to or replaces 10 tokens in and 20 out, `members` what stands on the line."""
    model = members.pop("model", MODELS[0])
    content = members.pop("content", "ok")
    counts = {"input_tokens": 10, "output_tokens": 20, **(usage or {})}
    line = {
        "parentUuid": None,
        "isSidechain": False,
        "message": {"id": message, "role": "assistant", "model": model, "content": content, "usage": counts},
        **({"requestId": request_id} if request_id else {}),
        "type": "assistant",
        "uuid": f"u-{message}-{request_id}",
        "timestamp": "2026-11-21T04:27:35.596Z",
        "cwd": "/home/u/case",
        "sessionId": "s1",
        **members,
    }
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def progress(line: bytes) -> bytes:
    """A subagent's line inside a line of its parent."""
    nested = json.loads(line)
    outer = {"type": "progress", "data": {"type": "agent_progress", "message": nested}}
    for key in ("cwd", "sessionId"):
        outer[key] = nested.pop(key)
    return json.dumps(outer).encode() + b"\n"


def edge_cases() -> tuple[Case, ...]:
    return tuple(_edge_cases())


def _edge_cases() -> Iterator[Case]:
    plain = Request(MODELS[0], 10, 20)

    def one(name: str, *lines: bytes, request: Request = plain, refused: int = 0) -> Case:
        return Case(name, {"s1.jsonl": b"".join(lines)}, (request,), refused)

    def none(name: str, *lines: bytes, refused: int = 0) -> Case:
        return Case(name, {"s1.jsonl": b"".join(lines)}, (), refused)

    def ids(name: str) -> tuple[str, str]:
        return f"msg_{name}", f"req_{name}"

    block = response(*ids("blocks"))
    yield one("a_line_for_each_block", block, block, b'{"type":"user"}\n', block)
    outputs = (1, 1, 260)
    snapshots = [response(*ids("stream"), {"output_tokens": output}) for output in outputs]
    yield one("snapshots_while_streaming", *snapshots, request=plain._replace(output=260))
    first = response(*ids("whole"), {"input_tokens": 500, "output_tokens": 3}, model=MODELS[1])
    last = response(*ids("whole"), {"output_tokens": 90})
    yield one("the_whole_line_with_the_highest_output", first, last, request=plain._replace(output=90))

    original = response(*ids("fork"))
    copy = original.replace(b'"s1"', b'"s2"').replace(b'"u-', b'"v-')
    yield Case("a_fork_copies_lines", {"s1.jsonl": original, "s2.jsonl": copy}, (plain,))
    parent = response(*ids("btw"), {"cache_read_input_tokens": 7})
    aside = response("msg_btw", "req_btw_other", {"cache_read_input_tokens": 90_000}, isSidechain=True)
    later, aside_later = (
        line.replace(b"msg_btw", b"msg_late").replace(b"req_btw", b"req_late") for line in (parent, aside)
    )
    yield Case("a_side_question_replays_a_response", {"a.jsonl": aside, "s1.jsonl": parent}, (plain._replace(read=7),))
    yield Case(
        "a_side_question_in_a_later_file", {"s1.jsonl": later, "z.jsonl": aside_later}, (plain._replace(read=7),)
    )
    gone = response("msg_gone", "req_gone_other", {"cache_read_input_tokens": 90_000}, isSidechain=True)
    yield one("a_side_question_whose_parent_is_gone", gone, request=plain._replace(read=90_000))
    unnamed = response("msg_unnamed", None), response("msg_unnamed", "req_unnamed", isSidechain=True)
    yield Case("a_sidechain_beside_a_response_without_request_id", {"s1.jsonl": b"".join(unnamed)}, (plain, plain))
    told_twice = [
        response(*ids("tie"), {"cache_read_input_tokens": 5}, isSidechain=True),
        response(*ids("tie"), {"cache_read_input_tokens": 7}),
    ]
    yield one("of_equal_outputs_the_original_stands", *told_twice, request=plain._replace(read=7))
    yield one("a_sidechain_in_its_parents_file", response(*ids("inside"), isSidechain=True))
    subagent = response(*ids("agent"), isSidechain=True)
    yield Case("a_subagent_has_its_own_file", {"s1/subagents/agent-1.jsonl": subagent}, (plain,))
    nested = response(*ids("workflow"), isSidechain=True)
    yield Case("a_workflow_has_files_further_down", {"s1/subagents/workflows/run-1/agent-1.jsonl": nested}, (plain,))
    files = {
        "s1.jsonl": progress(response(*ids("progress"))),
        "s1/subagents/agent-1.jsonl": response(*ids("progress"), isSidechain=True),
    }
    yield Case("progress_repeats_a_subagent", files, (plain,))
    yield one("progress_alone", progress(response(*ids("alone"))))
    aside = progress(response("msg_known", "req_known_other"))
    yield one("progress_counts_as_a_sidechain", aside, response(*ids("known")))

    gateway = [response("chatcmpl-1", None, {"output_tokens": output}) for output in (1, 20)]
    yield one("no_request_id", *gateway)
    same = [response("msg_const", None, {"input_tokens": count}) for count in (11, 12, 12)]
    requests = tuple(plain._replace(input=count) for count in (11, 12))
    yield Case("one_id_for_everything", {"s1.jsonl": b"".join(same)}, requests)

    written = {"cache_creation_input_tokens": 300}
    yield one("no_split_of_cache_writes", response(*ids("sum"), written), request=plain._replace(write_5m=300))
    split = {"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 150}
    yield one(
        "the_excess_over_the_split_is_5m",
        response(*ids("split"), {**written, "cache_creation": split}),
        request=plain._replace(write_5m=150, write_1h=150),
    )
    zeros = {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0}
    yield one(
        "zeros_beside_a_sum",
        response(*ids("zeros"), {**written, "cache_creation": zeros}),
        request=plain._replace(write_5m=300),
    )
    yield one(
        "a_split_without_a_sum",
        response(*ids("nosum"), {"cache_creation": split}),
        request=plain._replace(write_5m=100, write_1h=150),
    )
    thought = {"output_tokens_details": {"thinking_tokens": 15}}
    yield one("thinking_is_part_of_the_output", response(*ids("thought"), thought))
    advice = {"type": "advisor_message", "model": ADVISOR, "input_tokens": 70, "output_tokens": 80}
    steps = [{"type": "message", "input_tokens": 10, "output_tokens": 20}, advice, advice]
    advised = response(*ids("advised"), {"iterations": steps})
    asked = Request(ADVISOR, 70, 80)
    yield Case("advisors_are_not_in_the_totals", {"s1.jsonl": advised + advised}, (plain, asked, asked))
    searched = response(*ids("search"), {"server_tool_use": {"web_search_requests": 3, "web_fetch_requests": 9}})
    yield one("web_searches", searched, request=plain._replace(searches=3))
    fast = response(*ids("fast"), {"speed": "fast"}, model=MODELS[1])
    yield one("fast_mode", fast, request=plain._replace(model=MODELS[1], speed="fast"))
    yield one(
        "fast_mode_of_a_model_that_has_none",
        response(*ids("slow"), {"speed": "fast"}),
        request=plain._replace(speed="fast"),
    )
    dear = response(*ids("us"), {"inference_geo": "us"})
    yield one("geography", dear, request=plain._replace(geo="us"))
    yield one("cost_of_an_old_client", response(*ids("cost"), costUSD=7.5), request=plain._replace(told=7_500_000_000))
    long = {"input_tokens": 150_000, "cache_read_input_tokens": 60_000, "output_tokens": 1000}
    yield one(
        "a_long_prompt", response(*ids("long"), long), request=plain._replace(input=150_000, read=60_000, output=1000)
    )

    yield none("synthetic", response(*ids("synthetic"), model="<synthetic>"))
    yield none("api_error", response(*ids("error"), isApiErrorMessage=True))
    place = Place("s1", "/home/u/case")
    for name, kind, members in (
        ("a_tool_result_rolls_up_a_subagent", "user", ROLL_UP_MEMBERS),
        ("a_compaction_quotes_usage", "user", SUMMARY_MEMBERS),
        ("a_boundary_has_token_numbers", "system", BOUNDARY_MEMBERS),
        (
            "a_snapshot_holds_a_transcript",
            "file-history-snapshot",
            f'"snapshot":{response("m", "r").decode().strip()},',
        ),
        ("an_attachment_tells_of_usage", "attachment", '"attachment":{"usage":{"input_tokens":5,"output_tokens":5}},'),
        ("a_queue_operation", "queue-operation", '"operation":"enqueue","content":"usage: input_tokens",'),
        ("a_turn_has_a_duration", "system", '"subtype":"turn_duration","durationMs":1500,"usage":{"input_tokens":5},'),
    ):
        yield none(name, plain_line(place, kind, members, time_ms=START_MS, number=1).encode())
    yield none("usage_is_null", response(*ids("null")).replace(b'"usage":{', b'"usage":null,"was":{'))

    for name, count, refused in (
        ("negative", b"-10", 1),
        ("fractional", b"10.5", 1),
        ("above_the_limit", b"1000000000001", 1),
        ("beyond_64_bits", b"9" * 30, 1),
        ("infinite", b"1e999", 1),
        ("a_string", b'"10"', 1),
        ("true", b"true", 1),
    ):
        line = response(*ids(name)).replace(b'"input_tokens":10', b'"input_tokens":' + count)
        yield none(f"refused_{name}", line, refused=refused)
    yield one(
        "null_counts",
        response(*ids("nulls"), {"cache_read_input_tokens": None, "cache_creation": None, "server_tool_use": None}),
    )
    odd = response(*ids("odd"), {"speed": {"v": 2}, "service_tier": 5}, cwd=["/"], timestamp=17, costUSD="?")
    yield one("odd_texts", odd)

    spaced = json.dumps(json.loads(response(*ids("spaces"))), separators=(" , ", " : ")).encode() + b"\n"
    yield one("spaces_in_json", spaced)
    yield one("byte_order_mark", b"\xef\xbb\xbf" + response(*ids("bom")))
    yield one("nuls_of_a_crash", b"\0" * 300 + response(*ids("nul")))
    yield one("bad_utf8_in_content", response(*ids("utf8"), content="@@").replace(b"@@", b"\xff\xc3("))
    yield one("bad_utf8_in_a_name", response(*ids("utf8b"), cwd="@@").replace(b"@@", b"\xff\xc3("))
    yield one("half_a_surrogate_pair", response(*ids("half"), content="@@").replace(b"@@", b"\\ud83d"))
    yield one("carriage_returns", response(*ids("crlf")).replace(b"\n", b"\r\n"))
    yield one("a_line_of_a_megabyte", response(*ids("huge"), content="x" * 1_000_000))
    yield one("not_written_to_its_end", response(*ids("done")), response(*ids("undone"))[:-30])
    yield one("cut_by_a_crash", response(*ids("cut"))[:-90] + b"\n", response(*ids("after")), refused=1)
    yield one("an_empty_line", b"\n\n", response(*ids("empty")), b"\n")
    yield Case("an_empty_file", {"s1.jsonl": b""}, ())


def write_edge_cases(root: Path) -> Truth:
    """All edge cases, each in a project of its own: their ids differ, so the tree's truth is the sum of theirs."""
    cases = edge_cases()
    for case in cases:
        for name, content in case.files.items():
            path = root / "projects" / f"-{case.name}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return Truth(request for case in cases for request in case.requests)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a tree of transcripts and print its true totals.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--edge-cases", action="store_true", help="the small tree with a case for each rule")
    options = parser.parse_args()
    if options.edge_cases:
        truth = write_edge_cases(options.directory)
    else:
        size = int(options.megabytes * 1e6)
        truth = write_tree(options.directory, files=options.files, size=size, seed=options.seed)
    json.dump(truth.tokens(), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
