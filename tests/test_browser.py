"""A real browser shows a page of another site, which tries to read the counters and to write to them.

`.venv/bin/pytest --campaign -n 0 tests/test_browser.py`. Chromium's own defence (it asks before a page may reach a
local address) is switched off: ours has to do.
"""

import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.test_receiver import INPUT, request_of, tokens

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not there")

PAGE = """<!doctype html><meta charset="utf-8"><pre id="log"></pre><iframe name="frame"></iframe><script>
const bridge = "http://HOST:PORT", body = BODY, log = [];
const tries = {
  read: () => fetch(bridge + "/v1/metrics").then(r => r.text()),
  "read without cors": () => fetch(bridge + "/metrics", {mode: "no-cors"}).then(r => r.text()),
  "post json": () => fetch(bridge + "/v1/metrics",
    {method: "POST", headers: {"content-type": "application/json"}, body}).then(r => r.text()),
  "post text": () => fetch(bridge + "/v1/metrics", {method: "POST", mode: "no-cors", body}).then(r => r.text()),
  "post a typed blob": () => fetch(bridge + "/v1/metrics", {method: "POST", mode: "no-cors",
    body: new Blob([body], {type: "application/json"})}).then(r => r.text()),
  beacon: async () => String(navigator.sendBeacon(bridge + "/v1/metrics", body)) && "",
  form: async () => { const form = document.createElement("form");
    Object.assign(form, {method: "POST", action: bridge + "/v1/metrics", enctype: "text/plain", target: "frame"});
    const field = document.createElement("input"); field.name = body; form.append(field);
    document.body.append(form); form.submit(); return ""; },
  "event source": () => new Promise(done => { const source = new EventSource(bridge + "/metrics");
    source.onmessage = event => done(event.data); source.onerror = () => done(""); }),
  "web socket": () => new Promise(done => { const socket = new WebSocket("ws://HOST:PORT/metrics");
    socket.onopen = () => done("open"); socket.onerror = () => done(""); }),
  script: () => new Promise(done => { const script = document.createElement("script");
    script.src = bridge + "/v1/metrics"; script.onload = () => done("ran"); script.onerror = () => done("");
    document.body.append(script); }),
  image: () => new Promise(done => { const image = new Image();
    image.onload = () => done("seen"); image.onerror = () => done(""); image.src = bridge + "/"; }),
};
(async () => {
  const found = {};
  for (const [name, attempt] of Object.entries(tries)) {
    try { found[name] = await attempt(); } catch (error) { found[name] = ""; }
  }
  document.getElementById("log").textContent = JSON.stringify(found);
})();
</script>"""


@pytest.fixture(autouse=True)
def _in_a_campaign(campaign: bool) -> None:
    if not campaign:
        pytest.skip("a browser takes seconds to start; --campaign does")


@pytest.fixture
def site(daemon: Daemon) -> Iterator[Callable[[str], int]]:
    """Serves the page, which talks to the bridge under a name of it; its port."""
    servers = []

    def serve(host: str) -> int:
        body = json.dumps(json.dumps(request_of(tokens(5))))
        page = PAGE.replace("HOST", host).replace("PORT", str(daemon.port)).replace("BODY", body).encode()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the library's name
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server.server_port

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def show(url: str, profile: Path) -> str:
    """What the page at a URL has become after a few seconds; every name but localhost means this machine."""
    assert CHROMIUM is not None
    words = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--host-resolver-rules=MAP * 127.0.0.1, EXCLUDE localhost",
        "--disable-features=LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests,PrivateNetworkAccessSendPreflights",
        f"--user-data-dir={profile}", "--virtual-time-budget=10000", "--dump-dom", url,
    ]  # fmt: skip
    return subprocess.run(words, capture_output=True, text=True, timeout=90).stdout


def refusals(daemon: Daemon) -> float:
    samples = daemon.samples("/metrics")
    return sum(float(value) for name, value in samples.items() if name.startswith("bridge_http_refused_total"))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "rebound.example"])
def test_a_page_can_neither_read_nor_write(
    daemon: Daemon, site: Callable[[str], int], tmp_path: Path, host: str
) -> None:
    page = show(f"http://evil.example:{site(host)}/", tmp_path / "profile")
    found = json.loads(page.partition('<pre id="log">')[2].partition("</pre>")[0])
    assert len(found) == 11
    assert found == dict.fromkeys(found, "")
    assert refusals(daemon) >= 9  # the tries came as far as the bridge
    assert int(daemon.samples()[INPUT]) == 0
    assert daemon.post("/v1/metrics", request_of(tokens(5))).status == 200
    assert int(daemon.samples()[INPUT]) == 5


def test_a_rebound_name_shows_nothing_and_our_own_page_is_shown(daemon: Daemon, tmp_path: Path) -> None:
    rebound = show(f"http://rebound.example:{daemon.port}/v1/metrics", tmp_path / "profile")
    assert "claude_code_token_usage" not in rebound
    assert "this Host is not served here" in rebound
    own = show(f"http://localhost:{daemon.port}/", tmp_path / "profile")
    assert "Point Claude Code here" in own
