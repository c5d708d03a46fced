"""Chats of Gemini CLI whose true totals are known, because each request is booked when it is decided.

`edge_cases` has a case for each rule of the format; `write_store` makes a store of any size. What is written of a
request afterwards (updates of its message, `$set` of all messages, the other file of a migrated pair) is never counted
here. Same arguments, same bytes.

    python -m tests.gemini_tree DIRECTORY --files 400 --megabytes 1000

writes DIRECTORY/.gemini/tmp and prints the truth as JSON.
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

START_MS = 1_790_000_000_000
FLASH, PRO = "gemini-2.5-flash", "gemini-2.5-pro"
FOLDER = "0f3a/chats"


class Request(NamedTuple):
    """An API request as decided: tokens are disjoint, `output` includes thoughts."""

    session: str
    model: str
    input: int
    output: int
    read: int


class Step(NamedTuple):
    """Something done to a file below the store: bytes are appended, or replace all of it."""

    path: str
    content: bytes
    replaces: bool = False

    def do(self, root: Path) -> None:
        path = root / self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.replaces:
            path.write_bytes(self.content)
        else:
            with path.open("ab") as file:
                file.write(self.content)


class Case(NamedTuple):
    """What a client wrote, one thing after the other, what it was billed, and how many lines must be refused."""

    name: str
    steps: list[Step]
    requests: list[Request]
    refused: int = 0


def moment(at: int) -> str:
    return datetime.fromtimestamp((START_MS + at) / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def tokens(prompt: int, output: int, cached: int = 0, thoughts: int = 0, tool: int = 0) -> dict[str, int]:
    """The `tokens` member as the client writes it."""
    total = prompt + output + thoughts + tool
    counts = {"input": prompt, "output": output, "cached": cached, "thoughts": thoughts, "tool": tool}
    return {**counts, "total": total}


def message(name: str, at: int, counts: Any, model: str = FLASH, **members: Any) -> dict[str, Any]:
    return {
        "id": name, "timestamp": moment(at), "type": "gemini", "content": "an answer", "thoughts": [],
        "tokens": counts, "model": model, **members,
    }  # fmt: skip


def user(name: str, at: int, text: str = "a question") -> dict[str, Any]:
    return {"id": name, "timestamp": moment(at), "type": "user", "content": [{"text": text}]}


def members(session: str, **more: Any) -> dict[str, Any]:
    """A session's own members: the first line of a chat."""
    times = {"startTime": moment(0), "lastUpdated": moment(0)}
    return {"sessionId": session, "projectHash": "0f3a", **times, "kind": "main", **more}


def lines(*records: dict[str, Any]) -> bytes:
    """Lines as the client appends them."""
    return b"".join(json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in records)


def document(session: str, *messages: dict[str, Any]) -> bytes:
    """A chat as old clients rewrote it."""
    return json.dumps({**members(session), "messages": messages}, indent=2).encode()


def path_of(session: str, suffix: str = ".jsonl") -> str:
    return f"{FOLDER}/session-2026-09-21T14-13-{session[:8]}{suffix}"


def edge_cases() -> Iterator[Case]:
    """A case for each rule; each has a session of its own, named as the case."""
    for name, make in _CASES.items():
        session = name
        steps, requests, *refused = make(session, path_of(f"{len(name):02}{name[:3]}{name[-3:]}"))
        yield Case(name, steps, requests, *refused)


def _plain(session: str, path: str) -> Any:
    first, second = message("m1", 2, tokens(100, 20)), message("m2", 4, tokens(300, 30, 200), PRO)
    steps = [
        Step(path, lines(members(session))),
        Step(path, lines(user("u1", 1), first, {"$set": {"lastUpdated": moment(3)}})),
        Step(path, lines(user("u2", 3), second)),
    ]
    return steps, [Request(session, FLASH, 100, 20, 0), Request(session, PRO, 100, 30, 200)]


def _thoughts_and_tool_tokens(session: str, path: str) -> Any:
    counts = tokens(1000, 50, 600, 70, 9)
    return [Step(path, lines(members(session), message("m1", 2, counts)))], [Request(session, FLASH, 409, 120, 600)]


def _an_update_of_a_message(session: str, path: str) -> Any:
    """Tokens come with the end of the stream, tool calls after that; each time the whole message is written again."""
    called = message("m1", 2, tokens(100, 20), toolCalls=[{"id": "t", "name": "shell", "result": "x" * 5000}])
    steps = [
        Step(path, lines(members(session), message("m1", 2, None))),
        Step(path, lines(message("m1", 2, tokens(100, 20)))),
        Step(path, lines(called)),
    ]
    return steps, [Request(session, FLASH, 100, 20, 0)]


def _the_last_of_several_updates(session: str, path: str) -> Any:
    steps = [Step(path, lines(members(session), message("m1", 2, tokens(100, 90))))]
    steps.append(Step(path, lines(message("m1", 2, tokens(110, 30, 10)))))
    return steps, [Request(session, FLASH, 100, 30, 10)]


def _set_of_all_messages(session: str, path: str) -> Any:
    said = [message(f"m{at}", at, tokens(100 + at, 20)) for at in range(3)]
    extra = message("m9", 9, tokens(7, 8))
    steps = [
        Step(path, lines(members(session), *said)),
        Step(path, lines({"$set": {"messages": [user("u", 1), *said[:2], extra]}}, {"$set": {"summary": "x"}})),
    ]
    billed = [Request(session, FLASH, 100 + at, 20, 0) for at in range(3)]
    return steps, [*billed, Request(session, FLASH, 7, 8, 0)]


def _a_rewind_was_billed(session: str, path: str) -> Any:
    said = [message(f"m{at}", at, tokens(100, 20 + at)) for at in range(3)]
    steps = [Step(path, lines(members(session), said[0], said[1], {"$rewindTo": "m0"}, said[2]))]
    return steps, [Request(session, FLASH, 100, 20 + at, 0) for at in range(3)]


def _messages_among_the_members(session: str, path: str) -> Any:
    said = message("m1", 2, tokens(100, 20))
    return [Step(path, lines(members(session, messages=[said]), said))], [Request(session, FLASH, 100, 20, 0)]


def _a_document_that_is_rewritten(session: str, path: str) -> Any:
    path = path.removesuffix("l")
    said = [message(f"m{at}", at, tokens(100 + at, 20)) for at in range(3)]
    steps = [Step(path, document(session, user("u", 0), *said[: at + 1]), replaces=True) for at in range(3)]
    return steps, [Request(session, FLASH, 100 + at, 20, 0) for at in range(3)]


def _a_document_that_is_cut(session: str, path: str) -> Any:
    """A client that died while it wrote, and one that wrote again."""
    path = path.removesuffix("l")
    whole = document(session, message("m1", 1, tokens(100, 20)), message("m2", 2, tokens(200, 20)))
    steps = [
        Step(path, document(session, message("m1", 1, tokens(100, 20))), replaces=True),
        Step(path, whole[: len(whole) // 2], replaces=True),
        Step(path, whole, replaces=True),
    ]
    return steps, [Request(session, FLASH, 100, 20, 0), Request(session, FLASH, 200, 20, 0)]


def _a_migrated_pair(session: str, path: str) -> Any:
    said = [message(f"m{at}", at, tokens(100 + at, 20)) for at in range(3)]
    steps = [
        Step(path.removesuffix("l"), document(session, *said[:2]), replaces=True),
        Step(path, lines(members(session), *said[:2], {"$set": {"sessionId": session}}, said[2])),
    ]
    return steps, [Request(session, FLASH, 100 + at, 20, 0) for at in range(3)]


def _a_subagent(session: str, path: str) -> Any:
    """Its usage belongs to the session of its parent, whose events and metrics have it as well."""
    del path
    below = f"{FOLDER}/{session}/agent-7.jsonl"
    steps = [Step(below, lines(members("agent-7", kind="subagent"), message("m1", 2, tokens(100, 20))))]
    return steps, [Request(session, FLASH, 100, 20, 0)]


def _an_unreadable_file(session: str, path: str) -> Any:
    """The client could not read it, put it aside and wrote all of the conversation anew."""
    said = [message(f"m{at}", at, tokens(100 + at, 20)) for at in range(2)]
    steps = [
        Step(f"{path}.unreadable-1790000000000", lines(*said[:1])),
        Step(path, lines(members(session), *said), replaces=True),
    ]
    return steps, [Request(session, FLASH, 100 + at, 20, 0) for at in range(2)]


def _equal_ids_in_two_sessions(session: str, path: str) -> Any:
    said = message("m1", 2, tokens(100, 20))
    other = path.replace("session-2026-09-21T14-13", "session-2026-09-21T14-14")
    steps = [Step(path, lines(members(session), said)), Step(other, lines(members(session), said))]
    return steps, [Request(session, FLASH, 100, 20, 0)] * 2


def _a_message_without_an_id(session: str, path: str) -> Any:
    said = {key: value for key, value in message("", 2, tokens(100, 20)).items() if key != "id"}
    return [Step(path, lines(members(session), said, said))], [Request(session, FLASH, 100, 20, 0)]


def _text_that_looks_like_usage(session: str, path: str) -> Any:
    quoted = json.dumps(message("m8", 2, tokens(9, 9)))
    said = [user("u1", 1, quoted), message("m1", 2, None, content=quoted), message("m2", 3, tokens(1, 2))]
    return [Step(path, lines(members(session), *said))], [Request(session, FLASH, 1, 2, 0)]


def _more_cached_than_asked(session: str, path: str) -> Any:
    return (
        [Step(path, lines(members(session), message("m1", 2, tokens(100, 20, 150))))],
        [Request(session, FLASH, 0, 20, 100)],
    )


def _counts_that_cannot_be(session: str, path: str) -> Any:
    bad = [
        message("m1", 1, tokens(-1, 20)), message("m2", 2, {**tokens(1, 1), "output": 1.5}),
        message("m3", 3, tokens(10**13, 1)), message("m4", 4, {**tokens(1, 1), "input": "many"}),
    ]  # fmt: skip
    steps = [
        Step(path, lines(members(session), *bad, message("m5", 5, tokens(100, 20)))),
        Step(path, b'{"tokens":[}\n'),
    ]
    return steps, [Request(session, FLASH, 100, 20, 0)], 5


def _half_a_line(session: str, path: str) -> Any:
    whole = lines(message("m1", 2, tokens(100, 20)))
    steps = [Step(path, lines(members(session)) + whole[:40]), Step(path, whole[40:])]
    return steps, [Request(session, FLASH, 100, 20, 0)]


def _bytes_that_are_no_text(session: str, path: str) -> Any:
    said = lines(message("m1", 2, tokens(100, 20), content="CUT")).replace(b"CUT", b"\xff\xfe")
    return [Step(path, lines(members(session)) + said)], [Request(session, FLASH, 100, 20, 0)]


def _what_is_no_chat(session: str, path: str) -> Any:
    said = document(session, message("m1", 2, tokens(1, 2)))
    steps = [
        Step("0f3a/logs.json", said),
        Step("0f3a/checkpoint-x.json", said),
        Step(path.replace("/chats/", "/tool-outputs/"), lines(members(session), message("m2", 3, tokens(1, 2)))),
        Step(path, lines(members(session), message("m3", 4, tokens(5, 6)))),
    ]
    return steps, [Request(session, FLASH, 5, 6, 0)]


_CASES = {
    name.removeprefix("_"): make
    for name, make in list(globals().items())
    if name.startswith("_") and callable(make) and getattr(make, "__module__", "") == __name__
}


def sums(requests: Iterable[Request]) -> dict[tuple[str, str], Counter[str]]:
    """By session and model: tokens by type, and requests."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for one in requests:
        counts = {"input": one.input, "output": one.output, "read": one.read, "requests": 1}
        found.setdefault((one.session, one.model), Counter()).update(counts)
    return found


# --- a store of any size -------------------------------------------------------------------------------------------


def write_store(root: Path, *, files: int, size: int, seed: int = 1) -> list[Request]:
    """About `size` bytes in so many sessions below `root`: each third as a document, each ninth as a migrated pair."""
    choose = Random(seed)
    billed: list[Request] = []
    text = "".join(choose.choices("abcdefghijklmnopqrstuvwxyz     \n", k=200_000))
    for number in range(files):
        session = f"{choose.getrandbits(128):032x}"
        name = f"{number % 40:04x}/chats/session-2026-09-{1 + number % 28:02}T10-{number % 60:02}-{session[:8]}"
        records: list[dict[str, Any]] = []
        written, at, prompt = 0, number * 60_000, choose.randint(2_000, 9_000)
        budget = choose.uniform(0.4, 1.6) * size / files
        while written < budget:
            at += choose.randint(1_000, 30_000)
            cached = choose.choice((0, prompt * 3 // 4))
            output, thoughts, tool = choose.randint(5, 900), choose.choice((0, 0, 120)), choose.choice((0, 0, 0, 40))
            model = choose.choice((FLASH, FLASH, PRO))
            billed.append(Request(session, model, prompt - cached + tool, output + thoughts, cached))
            start = choose.randrange(len(text) // 2)
            counts = tokens(prompt, output, cached, thoughts, tool)
            result = text[start : start + choose.choice((200, 2_000, 20_000, 60_000))]
            call = {"id": f"c{at}", "name": "read_file", "args": {"path": "a.py"}, "result": result}
            mid = f"{session[:6]}-{at}"
            asked = user(f"u{mid}", at - 500, text[start : start + 300])
            whole = message(mid, at, counts, model, content=text[start : start + 400], toolCalls=[call])
            records += [asked, message(mid, at, counts, model, content=whole["content"]), whole]
            written += 2 * len(result) // (2 if number % 3 == 0 else 1) + 2_500
            prompt += choose.randint(100, 3_000)
            if prompt > 900_000:
                prompt = 5_000
        finals = [record for index, record in enumerate(records) if index % 3 != 1]
        if number % 3 == 0:
            Step(f"{name}.json", document(session, *finals), replaces=True).do(root)
        if number % 3 or number % 9 == 0:
            Step(f"{name}.jsonl", lines(members(session), *(finals if number % 9 == 0 else records))).do(root)
    return billed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--files", type=int, default=400)
    parser.add_argument("--megabytes", type=float, default=1000)
    options = parser.parse_args()
    billed = write_store(options.directory / ".gemini" / "tmp", files=options.files, size=int(options.megabytes * 1e6))
    by_model: dict[str, Counter[str]] = {}
    for (_, model), counts in sums(billed).items():
        by_model.setdefault(model, Counter()).update(counts)
    sys.stdout.write(json.dumps(by_model, indent=2) + "\n")


if __name__ == "__main__":
    main()
