"""Small stand-ins for the APIs of OpenAI, Anthropic and Gemini on loopback, which book every token that they hand out.

Text is always the same; counts differ from request to request, so that no two can be mistaken for each other.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, NamedTuple


class Billed(NamedTuple):
    """A request as its API would bill it; tokens are disjoint, `output` includes thoughts."""

    model: str
    input: int
    output: int
    read: int = 0
    written: int = 0


class ModelAPIs:
    """What was handed out so far, in order."""

    def __init__(self) -> None:
        self.billed: list[Billed] = []
        self.url = ""
        self._lock = threading.Lock()
        self._count = 0

    def number(self) -> int:
        with self._lock:
            self._count += 1
            return self._count

    def tokens(self) -> dict[str, Counter[str]]:
        """By model."""
        found: dict[str, Counter[str]] = {}
        for one in self.billed:
            counts = {"input": one.input, "output": one.output, "cache_read": one.read, "cache_write": one.written}
            found.setdefault(one.model, Counter()).update(counts)
        return found


@contextmanager
def model_apis() -> Iterator[ModelAPIs]:
    """Serve until the block ends."""
    apis = ModelAPIs()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Answers,), {"apis": apis}))
    apis.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield apis
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    apis: ClassVar[ModelAPIs]

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:  # the name that http.server looks for
        self._send(b"{}", status=404)

    def do_POST(self) -> None:  # the name that http.server looks for
        size = int(self.headers.get("Content-Length") or 0)
        request = json.loads(self.rfile.read(size) or b"{}")
        path = self.path.partition("?")[0]
        if path.endswith("/chat/completions"):
            self._chat(request)
        elif path.endswith("/embeddings"):
            self._embeddings(request)
        elif path.endswith("/messages"):
            self._messages(request)
        elif "/models/" in path:
            model, _, method = path.rpartition("/models/")[2].partition(":")
            self._generate(model, method, request)
        else:
            self._send(b"{}", status=404)

    def _bill(self, billed: Billed) -> None:
        self.apis.billed.append(billed)

    def _chat(self, request: dict[str, Any]) -> None:
        number = self.apis.number()
        model = f"{request['model']}-2024-08-06"
        usage = {
            "prompt_tokens": 1000 + number, "completion_tokens": 50 + number, "total_tokens": 1050 + 2 * number,
            "prompt_tokens_details": {"cached_tokens": 256, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 16},
        }  # fmt: skip
        self._bill(Billed(request["model"], 1000 + number - 256, 50 + number, 256))
        common = {"id": f"chatcmpl-{number}", "created": 1_790_000_000, "model": model}
        if not request.get("stream"):
            said = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hello"}}
            self._json({**common, "object": "chat.completion", "choices": [said], "usage": usage})
            return
        delta = {"index": 0, "delta": {"role": "assistant", "content": "hello"}, "finish_reason": None}
        last = {"index": 0, "delta": {}, "finish_reason": "stop"}
        chunk = {**common, "object": "chat.completion.chunk"}
        chunks = [{**chunk, "choices": [delta]}, {**chunk, "choices": [last]}]
        if (request.get("stream_options") or {}).get("include_usage"):
            chunks.append({**chunk, "choices": [], "usage": usage})
        self._events([("", one) for one in chunks], "data: [DONE]\n\n")

    def _embeddings(self, request: dict[str, Any]) -> None:
        number = self.apis.number()
        self._bill(Billed(request["model"], 30 + number, 0))
        usage = {"prompt_tokens": 30 + number, "total_tokens": 30 + number}
        vector = {"object": "embedding", "index": 0, "embedding": [0.1, 0.2]}
        self._json({"object": "list", "data": [vector], "model": request["model"], "usage": usage})

    def _messages(self, request: dict[str, Any]) -> None:
        number = self.apis.number()
        usage = {
            "input_tokens": 100 + number, "output_tokens": 40 + number, "cache_read_input_tokens": 2000 + number,
            "cache_creation_input_tokens": 300 + number,
        }  # fmt: skip
        self._bill(Billed(request["model"], 100 + number, 40 + number, 2000 + number, 300 + number))
        common = {
            "id": f"msg_{number}", "type": "message", "role": "assistant", "model": request["model"],
            "stop_sequence": None,
        }  # fmt: skip
        if not request.get("stream"):
            content = [{"type": "text", "text": "hello"}]
            self._json({**common, "content": content, "stop_reason": "end_turn", "usage": usage})
            return
        begun = {**common, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
        ended = {"stop_reason": "end_turn", "stop_sequence": None}
        self._events(
            [
                ("message_start", {"message": begun}),
                ("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}),
                ("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": "hello"}}),
                ("content_block_stop", {"index": 0}),
                ("message_delta", {"delta": ended, "usage": {"output_tokens": usage["output_tokens"]}}),
                ("message_stop", {}),
            ]
        )

    def _generate(self, model: str, method: str, request: dict[str, Any]) -> None:
        if method == "countTokens":
            self._json({"totalTokens": 5})
            return
        number = self.apis.number()
        self._bill(Billed(model, 600 + number + 3, 20 + number + 7, 400))
        usage = {
            "promptTokenCount": 1000 + number, "candidatesTokenCount": 20 + number, "cachedContentTokenCount": 400,
            "thoughtsTokenCount": 7, "toolUsePromptTokenCount": 3, "totalTokenCount": 1030 + 2 * number,
        }  # fmt: skip
        asked = request.get("contents", [{}])[-1].get("parts", [])
        part: dict[str, Any] = {"text": "done"}
        if request.get("tools") and not any("functionResponse" in one for one in asked):
            part = {"functionCall": {"name": "list_directory", "args": {"dir_path": "."}}}
        said = {"content": {"role": "model", "parts": [part]}, "finishReason": "STOP", "index": 0}
        answer = {
            "responseId": f"resp-{number}", "modelVersion": model, "candidates": [said], "usageMetadata": usage,
        }  # fmt: skip
        if method == "streamGenerateContent":
            self._events([("", answer)])
        else:
            self._json(answer)

    def _json(self, answer: dict[str, Any]) -> None:
        self._send(json.dumps(answer).encode())

    def _events(self, events: list[tuple[str, dict[str, Any]]], end: str = "") -> None:
        """Server-sent events."""
        text = ""
        for name, data in events:
            text += f"event: {name}\n" if name else ""
            text += f"data: {json.dumps({'type': name, **data} if name else data)}\n\n"
        self._send((text + end).encode(), "text/event-stream")

    def _send(self, body: bytes, kind: str = "application/json", status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
