"""Stores of Codex rollouts whose true totals are known, because each request is booked when it is decided.

A thread remembers which of its lines tell of which request, so that whatever copies them, and whichever files are left,
the truth is the set of requests that still stand somewhere. Nothing here knows how a reader tells copies apart. Same
arguments, same bytes.

    python -m tests.codex_tree DIRECTORY --threads 300 --megabytes 1000

writes DIRECTORY/sessions and prints the truth as JSON.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from uuid import UUID

START_MS = 1_790_000_000_000
MODELS = ("gpt-5.5", "gpt-5.6-sol", "gpt-5.3-codex")
FIELDS = ("input_tokens", "cached_input_tokens", "cache_write_input_tokens", "output_tokens")


class Request(NamedTuple):
    """A response as decided; the prompt holds what was cached and written. `serial` tells equal ones apart."""

    serial: int
    model: str
    prompt: int
    cached: int
    written: int
    output: int

    @property
    def counts(self) -> tuple[int, int, int, int]:
        return self.prompt, self.cached, self.written, self.output


class Line(NamedTuple):
    """A line of a rollout, the request that it tells of, and whether the file says of which model."""

    kind: str
    payload: dict[str, Any]
    time_ms: int
    request: Request | None = None
    has_model: bool = True

    @property
    def text(self) -> str:
        stamp = datetime.fromtimestamp(self.time_ms / 1000, UTC).isoformat(timespec="milliseconds")
        line = {"timestamp": stamp.replace("+00:00", "Z"), "type": self.kind, "payload": self.payload}
        return json.dumps(line, separators=(",", ":")) + "\n"


def tokens(requests: Iterable[Request]) -> dict[str, Counter[str]]:
    """Model -> type -> tokens of distinct requests, and how many."""
    sums: dict[str, Counter[str]] = {}
    for request in set(requests):
        new = request.prompt - request.cached - request.written
        counts = {"input": new, "output": request.output, "read": request.cached, "written": request.written}
        sums.setdefault(request.model, Counter()).update({**counts, "requests": 1})
    return sums


def truth(threads: "Iterable[Thread]") -> dict[str, Counter[str]]:
    """What these rollouts tell of; the model is unknown where none of them says it."""
    told: dict[Request, bool] = {}
    for line in (line for thread in threads for line in thread.lines):
        if line.request is not None:
            told[line.request] = told.get(line.request, False) or line.has_model
    return tokens(one if has_model else one._replace(model="unknown") for one, has_model in told.items())


class Style(NamedTuple):
    """How a version writes: whether turns have ids, ids tell the time, and what tells of a request."""

    has_turns: bool = True
    is_timed: bool = True
    tells: str = "counts"
    """`counts`, `totals` (no last counts) or `records` (a record with the response's id before the counts)."""


class World:
    """What all threads of a store share: a clock, ids, and the requests decided so far."""

    def __init__(self, seed: int, style: Style = Style()) -> None:  # noqa: B008  # immutable
        self.chance = Random(seed)
        self.style = style
        self.now = START_MS + seed * 10**9
        self.serial = 0

    def tick(self) -> int:
        self.now += self.chance.randint(20, 90_000)
        return self.now

    def name(self) -> str:
        """A UUID: of version 7 with the time in it, or of version 4."""
        noise = self.chance.getrandbits(74)
        if self.style.is_timed:
            return str(UUID(int=self.now << 80 | 7 << 76 | (noise >> 62) << 64 | 2 << 62 | noise & (1 << 62) - 1))
        return str(UUID(int=self.chance.getrandbits(128), version=4))

    def decide(self, like: Request | None = None) -> Request:
        """A new request, with the counts of another one if wanted."""
        self.serial += 1
        if like is not None:
            return like._replace(serial=self.serial)
        prompt = self.chance.randint(100, 90_000)
        cached, written = self.chance.randint(0, prompt // 2), self.chance.randint(0, prompt // 4)
        return Request(
            self.serial, self.chance.choice(MODELS), prompt, cached, written, self.chance.randint(1, 9_000)
        )  # fmt: skip


class Thread:
    """One rollout: its lines, and the totals that the next count goes on from."""

    def __init__(self, world: World, **meta: Any) -> None:
        world.tick()
        self.world = world
        self.name = world.name()
        self.lines: list[Line] = []
        self.totals = [0, 0, 0, 0]
        self.turn = ""
        self.add("session_meta", id=self.name, cwd="/home/u/work", cli_version="0.171.0", source="cli", **meta)

    def add(self, kind: str, *, request: Request | None = None, **payload: Any) -> None:
        self.lines.append(Line(kind, payload, self.world.now, request))

    def begin_turn(self, model: str) -> None:
        self.world.tick()
        self.turn = self.world.name() if self.world.style.has_turns else ""
        named: dict[str, Any] = {"turn_id": self.turn} if self.turn else {}
        self.add("turn_context", **named, cwd="/home/u/work", approval_policy="never", model=model)

    def tell(self, request: Request, *, repeats: int = 0) -> Request:
        """Write a request down, and its counts again where only rate limits changed."""
        self.world.tick()
        self.totals = [total + count for total, count in zip(self.totals, request.counts, strict=True)]
        said: dict[str, Any] = {"total_token_usage": _usage(self.totals)}
        if self.world.style.tells != "totals":
            said["last_token_usage"] = _usage(request.counts)
        if self.world.style.tells == "records":
            self.add(
                "token_usage_record", request=request, thread_id=self.name, turn_id=self.turn,
                response_id=f"resp_{self.name}_{request.serial}", usage=_usage(request.counts),
                thread_token_usage=_usage(self.totals),
            )  # fmt: skip
        for used in range(repeats + 1):
            window = {"used_percent": used, "window_minutes": 300, "resets_at": self.world.now // 1000}
            limits = {"limit_id": "codex", "primary": window, "secondary": None}
            self.add("event_msg", request=request, type="token_count", info=said, rate_limits=limits)
        return request

    def work(self, requests: Iterable[Request], *, repeats: int = 0) -> "Thread":
        """A turn with these requests, and noise between them."""
        for number, request in enumerate(requests):
            if not number or request.model != self.lines[-1].payload.get("model"):
                self.begin_turn(request.model)
            self.add("response_item", type="message", role="assistant", content='{"input_tokens":99}')
            self.tell(request, repeats=repeats)
        return self

    @property
    def file(self) -> str:
        day = datetime.fromtimestamp(self.lines[0].time_ms / 1000, UTC)
        return f"{day:%Y/%m/%d}/rollout-{day:%Y-%m-%dT%H-%M-%S}-{self.name}.jsonl"

    @property
    def content(self) -> bytes:
        return "".join(line.text for line in self.lines).encode()


def _usage(counts: Iterable[int]) -> dict[str, int]:
    prompt, cached, written, output = counts
    return {**dict(zip(FIELDS, (prompt, cached, written, output), strict=True)), "total_tokens": prompt + output}


# --- how history gets into other files ---------------------------------------------------------------------------


def _child(parent: Thread, history: Iterable[Line], *, restamped: bool = False, **meta: Any) -> Thread:
    child = Thread(parent.world, **meta)
    now = child.world.now
    child.lines += (line._replace(time_ms=now) if restamped else line for line in history)
    child.totals = [*parent.totals]
    return child


def restamped(parent: Thread) -> Thread:
    """The parent's `session_meta` behind the child's, and all its history in one second."""
    return _child(parent, parent.lines, restamped=True, forked_from_id=parent.name)


def with_times(parent: Thread) -> Thread:
    """The history behind the child's `session_meta`, with its own times."""
    return _child(parent, parent.lines[1:], forked_from_id=parent.name)


def without_turns(parent: Thread) -> Thread:
    """Of the history the counts alone, before the child's first turn."""
    counts = (line._replace(has_model=False) for line in parent.lines if line.payload.get("type") == "token_count")
    return _child(parent, counts, restamped=True, forked_from_id=parent.name)


def resumed_elsewhere(parent: Thread) -> Thread:
    """A new file that names no ancestor: the old thread's `session_meta` and everything again."""
    return _child(parent, parent.lines)


def with_ordinals(parent: Thread) -> Thread:
    """A subagent that says where its own history begins."""
    history = parent.lines[1:]
    spawn = {"subagent": {"thread_spawn": {"parent_thread_id": parent.name, "depth": 1}}}
    return _child(parent, history, subagent_history_start_ordinal=str(len(history) + 1), parent_thread_id=parent.name,
                  origin=spawn)  # fmt: skip


def by_reference(parent: Thread) -> Thread:
    """As today: totals go on, and nothing is copied."""
    return _child(parent, (), forked_from_id=parent.name, history_base={"thread_id": parent.name})


def subagent(parent: Thread) -> Thread:
    """A subagent that begins with nothing."""
    child = _child(parent, (), parent_thread_id=parent.name)
    child.totals = [0, 0, 0, 0]
    return child


SHAPES = (restamped, with_times, without_turns, resumed_elsewhere, with_ordinals, by_reference, subagent)


# --- large stores ------------------------------------------------------------------------------------------------


def write_store(directory: Path, threads: int, size: int, seed: int = 0) -> dict[str, Counter[str]]:
    """Threads of about `size` bytes in all, some of them forks and subagents of others; what they add up to."""
    world = World(seed, Style(tells="counts"))
    done: list[Thread] = []
    families: list[Thread] = []
    each = size // threads
    for number in range(threads):
        world.style = Style(tells="records" if number % 2 else "counts")
        is_child = number % 8 == 7 and families
        thread = world.chance.choice(SHAPES)(world.chance.choice(families)) if is_child else Thread(world)
        written = len(thread.content)
        path = directory / "sessions" / thread.file
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(thread.content)
            while written < each:
                for line in _padded_turn(thread):
                    written += file.write(line)
        done.append(thread)
        families = [*families[-3:], thread] if written < 2**20 or not families else families
    return truth(done)


def _padded_turn(thread: Thread) -> Iterator[bytes]:
    """A turn as clients write it: much content, a response for each step."""
    begun = len(thread.lines)
    first = thread.world.decide()
    thread.work([first, *(thread.world.decide()._replace(model=first.model) for _ in range(5))], repeats=1)
    for line in thread.lines[begun:]:
        if line.kind == "response_item":
            text = thread.world.chance.randbytes(1500).hex() * thread.world.chance.randint(1, 6)
            line = line._replace(payload={**line.payload, "content": [{"type": "output_text", "text": text}]})
        yield line.text.encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--threads", type=int, default=300)
    parser.add_argument("--megabytes", type=int, default=1000)
    arguments = parser.parse_args()
    json.dump(write_store(arguments.directory, arguments.threads, arguments.megabytes * 10**6), sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
