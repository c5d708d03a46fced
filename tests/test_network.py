"""Beyond loopback: who gets in, with what token, to what; and that one source never is another's.

Some tests need an address of this machine that is no loopback address, and are skipped where there is none.
"""

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bridge import doctor, evidence, tokens
from bridge.cli import main
from bridge.config import Config, Limits, Tls
from bridge.tls import HTTP_HINT, TlsError, TlsFiles
from bridge.tokens import TokenError, Tokens
from bridge.web.access import Access, Allowances, Caller, Denial
from tests.daemon import JSON, Daemon, free_port
from tests.test_receiver import INPUT, as_json, post, request_of
from tests.test_receiver import tokens as points

SECRETS = {name: f"{name}-0123456789abcdefghijklmnopqrstuvwxyz" for name in ("alice", "bob", "carol")}
SERIES = "claude_code_token_usage_tokens_total"


def own_address() -> str:
    """An address of this machine that is no loopback address; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return ""
        address: str = probe.getsockname()[0]
        return "" if address.startswith("127.") else address


ADDRESS = own_address()
needs_network = pytest.mark.skipif(not ADDRESS, reason="this machine has no address but loopback ones")


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {SECRETS.get(name, name)}"} if name else {}


def ask(
    address: tuple[str, int], method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
) -> tuple[int, Mapping[str, str], bytes]:
    connection = HTTPConnection(*address, timeout=10)
    try:
        connection.request(method, path, body, dict(headers))
        reply = connection.getresponse()
        return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()
    finally:
        connection.close()


def token_file(directory: Path, *names: str) -> Path:
    path = directory / "token-file"
    path.write_text("# of a team\n" + "".join(f"{name} {SECRETS[name]}\n" for name in names))
    path.chmod(0o600)
    return path


@pytest.fixture
def make_team(make_daemon: Callable[..., Daemon], tmp_path: Path) -> Callable[..., Daemon]:
    """Makes bridges with the tokens of alice and bob, which ask for them on loopback too."""

    def make(*arguments: str, **env: str) -> Daemon:
        file = token_file(tmp_path, "alice", "bob")
        env = {"BRIDGE_TOKEN_FILE": str(file), "BRIDGE_LOOPBACK_TOKEN": "true", **env}
        return make_daemon(*arguments, env=env).start()

    return make


# --- who gets in -----------------------------------------------------------------------------------------------


class Doors(NamedTuple):
    daemon: Daemon
    addresses: dict[str, tuple[str, int]]


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    """One bridge with an address of each kind."""
    directory = tmp_path_factory.mktemp("doors")
    everything, ingest, read = (free_port() for _ in range(3))
    env = {"BRIDGE_LISTEN_INGEST": f"{ADDRESS}:{ingest}", "BRIDGE_LISTEN_READ": f"{ADDRESS}:{read}"}
    env["BRIDGE_TOKEN_FILE"] = str(token_file(directory, "alice", "bob"))
    daemon = Daemon(directory, "--listen", f"{ADDRESS}:{everything}", env=env).start()
    yield Doors(
        daemon,
        {
            "loopback": ("127.0.0.1", daemon.port),
            "everything": (ADDRESS, everything),
            "ingest": (ADDRESS, ingest),
            "read": (ADDRESS, read),
        },
    )
    daemon.close()


PATHS = ("GET /v1/metrics", "GET /metrics", "GET /", "POST /v1/metrics", "POST /v1/logs", "POST /v1/traces")
OPEN = ("GET /-/healthy", "GET /-/ready")


@needs_network
@pytest.mark.parametrize("request_", [*PATHS, *OPEN])
@pytest.mark.parametrize("token", ["", "alice", "carol", "Basic"])
@pytest.mark.parametrize("door", ["loopback", "everything", "ingest", "read"])
def test_what_is_reachable_by_whom(doors: Doors, door: str, token: str, request_: str) -> None:
    method, path = request_.split()
    headers = {"Authorization": f"Basic {SECRETS['alice']}"} if token == "Basic" else bearer(token)
    status, answered, _ = ask(
        doors.addresses[door], method, path, {**headers, "Content-Type": JSON}, b"{}" if method == "POST" else None
    )
    if request_ in OPEN or door == "loopback":
        assert status == 200
    elif token != "alice":
        assert status in (401, 429)  # many of the cases before this one were failures too
        assert (status == 401) == ("www-authenticate" in answered)
    elif door == "everything" or (method == "POST") == (door == "ingest"):
        assert status == 200
    else:
        assert status in (404, 405)


@needs_network
def test_a_host_of_the_network_is_its_number_or_is_configured(doors: Doors) -> None:
    address = doors.addresses["everything"]
    for host, status in ((ADDRESS, 200), (f"{ADDRESS}:{address[1]}", 200), ("192.0.2.77", 421), ("evil.example", 421)):
        assert ask(address, "GET", "/v1/metrics", {**bearer("alice"), "Host": host})[0] == status
    assert ask(doors.addresses["loopback"], "GET", "/v1/metrics", {"Host": ADDRESS})[0] == 421


def test_without_a_token_nobody_listens_beyond_loopback(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, "--listen", f"0.0.0.0:{free_port()}")
    done = subprocess.run(daemon.command, env=daemon.environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == os.EX_CONFIG
    assert "refusing to listen on 0.0.0.0:" in done.stderr
    assert "claude-otel-bridge token NAME" in done.stderr


@needs_network
def test_insecure_is_said_at_every_start(make_daemon: Callable[..., Daemon]) -> None:
    port = free_port()
    daemon = make_daemon("--listen", f"{ADDRESS}:{port}", "--insecure-no-auth").start()
    assert ask((ADDRESS, port), "GET", "/v1/metrics", {})[0] == 200
    daemon.restart()
    assert daemon.log.count("insecure_no_auth") == 2


def test_a_token_is_asked_for_before_the_body(make_team: Callable[..., Daemon]) -> None:
    daemon = make_team()
    for kind, statuses in (("", [401] * 10 + [429] * 3), ("alice", [200])):
        for status in statuses:
            with socket.create_connection(("127.0.0.1", daemon.port), timeout=5) as wire:
                head = f"POST /v1/metrics HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON}\r\n"
                head += "".join(f"{name}: {value}\r\n" for name, value in bearer(kind).items())
                length = 2 if kind else 1_000_000
                wire.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + (b"{}" if kind else b""))
                answer = wire.recv(4096).decode()
            assert int(answer.split()[1]) == status
            assert ("\r\nWWW-Authenticate: Bearer realm=" in answer) == (status == 401)
    denied = ask(("127.0.0.1", daemon.port), "GET", "/metrics", bearer("bob"))[2].decode()
    assert 'bridge_http_denied_total{code="401",reason="token"} 10.0' in denied
    assert all(secret not in daemon.log + denied for secret in SECRETS.values())


# --- whose numbers they are ------------------------------------------------------------------------------------


def series(daemon: Daemon, name: str = "bob") -> dict[str, int]:
    """The source of each series of Claude Code's tokens -> its sum."""
    found: dict[str, int] = {}
    page = ask(("127.0.0.1", daemon.port), "GET", "/metrics", bearer(name))[2].decode()
    for line in page.splitlines():
        if line.startswith(SERIES + "{"):
            labels, _, value = line.rpartition(" ")
            source = labels.partition(',source="')[2].partition('"')[0]
            found[source] = found.get(source, 0) + int(value)
    return found


def total(daemon: Daemon) -> int:
    page = ask(("127.0.0.1", daemon.port), "GET", "/v1/metrics", bearer("bob"))[2].decode()
    return int(next(line for line in page.splitlines() if line.startswith(INPUT)).split()[-2])


def send(daemon: Daemon, name: str, body: dict[str, Any]) -> int:
    headers = {**bearer(name), "Content-Type": JSON}
    return ask(("127.0.0.1", daemon.port), "POST", "/v1/metrics", headers, as_json(body))[0]


def without_session(body: dict[str, Any]) -> dict[str, Any]:
    point = body["resourceMetrics"][0]["scopeMetrics"][0]["metrics"][0]["sum"]["dataPoints"][0]
    point["attributes"] = [one for one in point["attributes"] if one["key"] != "session.id"]
    return body


def test_equal_streams_of_two_users_are_two(make_team: Callable[..., Daemon]) -> None:
    """Delta and cumulative, with and without a session, over a crash; XRG and the joined families have the sums."""
    daemon = make_team()
    bodies = [
        shape(request_of(points(5, at), aggregationTemporality=temporality))
        for at, temporality in ((1, 1), (2, 2))
        for shape in (dict, without_session)
    ]
    for number, body in enumerate(bodies, 1):
        for name in ("alice", "bob", "alice", "bob", "bob"):
            assert send(daemon, name, body) == 200
        assert series(daemon) == {"alice": 5 * number, "bob": 5 * number}
        assert total(daemon) == 10 * number
    daemon.kill()
    daemon.spawn()
    until(lambda: series(daemon) == {"alice": 20, "bob": 20})
    for body in bodies:
        assert send(daemon, "alice", body) == 200
    assert total(daemon) == 40
    page = ask(("127.0.0.1", daemon.port), "GET", "/metrics", bearer("bob"))[2].decode()
    (joined,) = (line for line in page.splitlines() if line.startswith("ai_tokens_total"))
    assert "source" not in joined
    assert joined.endswith(" 40")


def test_a_client_cannot_say_who_it_is(make_team: Callable[..., Daemon]) -> None:
    daemon = make_team(BRIDGE_LABELS_PROMOTE="source,bridge.source")
    point = points(5)
    forged = [{"key": key, "value": {"stringValue": "bob"}} for key in ("source", "bridge.source", "bridge_source")]
    body = request_of({**point, "attributes": [*point["attributes"], *forged]})
    body["resourceMetrics"][0]["resource"]["attributes"] += forged
    assert send(daemon, "alice", body) == 200
    assert series(daemon) == {"alice": 5}
    page = ask(("127.0.0.1", daemon.port), "GET", "/metrics", bearer("bob"))[2].decode()
    assert '{source="bob"' not in page
    assert ',source="bob"' not in page
    assert 'exported_source="bob"' in page


def test_a_source_has_so_many_series_and_its_sum_stays_right(make_team: Callable[..., Daemon]) -> None:
    daemon = make_team(BRIDGE_LIMITS_SERIES_PER_SOURCE="5")
    for at in range(12):
        named = points(1, at)
        next(one for one in named["attributes"] if one["key"] == "session.id")["value"]["stringValue"] = f"s-{at}"
        assert send(daemon, "alice", request_of(named)) == 200
        assert at > 3 or send(daemon, "bob", request_of(named)) == 200
    page = ask(("127.0.0.1", daemon.port), "GET", "/metrics", bearer("bob"))[2].decode()
    assert f'{SERIES}{{otel_metric_overflow="true",source="alice"}} 7' in page
    assert series(daemon) == {"alice": 12, "bob": 4}
    assert 'bridge_streams_limited_total{setting="limits.series_per_source"} 7.0' in page


def test_a_token_has_so_many_requests(make_team: Callable[..., Daemon]) -> None:
    daemon = make_team(BRIDGE_LIMITS_REQUESTS_PER_SECOND="1")
    statuses = [send(daemon, "alice", request_of(points(1, at))) for at in range(6)]
    assert statuses[:2] == [200, 200]
    assert statuses.count(429) >= 2
    assert send(daemon, "bob", request_of(points(1, 50))) == 200


# --- tokens ----------------------------------------------------------------------------------------------------


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.02)


def command(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "bridge", "--state-dir", str(daemon.state_dir), *words]
    return subprocess.run(arguments, env=daemon.environment, capture_output=True, text=True, timeout=30)


def test_tokens_come_and_go_while_the_bridge_runs(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(env={"BRIDGE_LOOPBACK_TOKEN": "true"})
    made = command(daemon, "token", "dora")
    secret, file = made.stdout.strip(), daemon.state_dir / "tokens"
    assert len(secret) > 40
    assert secret not in file.read_text() + made.stderr
    assert "setup --write --endpoint http://THIS_HOST:" in made.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    daemon.start()
    place = ("127.0.0.1", daemon.port)
    assert ask(place, "GET", "/v1/metrics", bearer(secret))[0] == 200
    with pytest.raises(TokenError, match="has a token of dora already"):
        tokens.make(file, "dora")
    other = tokens.make(file, "emil")
    until(lambda: ask(place, "GET", "/v1/metrics", bearer(other))[0] == 200)
    assert command(daemon, "token", "--remove", "dora").returncode == 0
    until(lambda: ask(place, "GET", "/v1/metrics", bearer(secret))[0] == 401)
    with pytest.raises(TokenError, match="has no token of dora"):
        tokens.remove(file, "dora")
    file.chmod(0o644)
    os.utime(file)
    until(lambda: "others may read it" in daemon.log)
    assert ask(place, "GET", "/v1/metrics", bearer(other))[0] == 200
    assert secret not in daemon.log


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("alice", "line 1: expected NAME sha256:HEX or NAME SECRET"),
        ("alice a b", "line 1: expected"),
        ("\n#\nalice short", "line 3: the token of alice is shorter than 24"),
        ("al/ice " + "x" * 40, "line 1: a name has"),
        ("x" * 65 + " " + "x" * 40, "line 1: a name has"),
        ("a sha256:12", "shorter than 24"),
        ("a " + "x" * 40 + "\na " + "y" * 40, "a stands there twice"),
    ],
)
def test_a_wrong_line_of_tokens_is_an_error_that_quotes_no_secret(text: str, words: str) -> None:
    with pytest.raises(TokenError, match="tokens") as error:
        tokens.parse(text, "tokens")
    assert words in str(error.value)
    assert "x" * 30 not in str(error.value)


def test_tokens_of_the_environment() -> None:
    known = tokens.of_environment({"BRIDGE_TOKEN": "x" * 30, "BRIDGE_TOKENS": f"a {'y' * 30}, b {'z' * 30}"})
    assert [token.name for token in known] == ["default", "a", "b"]
    assert [tokens.find(known, letter * 30) for letter in "xyzw"] == ["default", "a", "b", None]
    for given, words in (
        ({"BRIDGE_TOKEN": "short"}, "environment: BRIDGE_TOKEN: the token of default is shorter"),
        ({"BRIDGE_TOKEN": "x" * 30, "BRIDGE_TOKENS": f"default {'y' * 30}"}, "BRIDGE_TOKENS: default stands there"),
    ):
        with pytest.raises(TokenError, match=words):
            tokens.of_environment(given)
    hashed = tokens.parse(f"c sha256:{known[0].digest.hex()}", "")
    assert tokens.find(hashed, "x" * 30) == "c"
    assert tokens.find(hashed, known[0].digest.hex()) is None


def wide_open(path: Path) -> None:
    path.chmod(0o640)


def second_name(path: Path) -> None:
    path.with_name("other").hardlink_to(path)


def symbolic(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to(path.with_name("real"))


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize("spoil", [wide_open, second_name, symbolic, directory, pipe])
def test_a_file_that_others_could_read_or_exchange_is_refused(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = token_file(tmp_path, "alice")
    assert Tokens(path, ()).refresh()
    spoil(path)
    with pytest.raises(TokenError) as error:
        Tokens(path, ()).refresh()
    assert error.value.exit_code == os.EX_NOPERM


def test_settings_that_others_may_write_are_not_believed(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("")
    found = file.stat()
    of_group = 0 if found.st_gid == found.st_uid else os.EX_NOPERM
    for mode, code in ((0o644, 0), (0o664, of_group), (0o646, os.EX_NOPERM)):
        file.chmod(mode)
        with pytest.raises(SystemExit) as ended:
            main(["--config", str(file), "config", "check"])
        assert ended.value.code == code


# --- addresses and allowances ----------------------------------------------------------------------------------


def access(**settings: Any) -> Access:
    known = Tokens(Path("/nonexistent"), tokens.parse(f"alice {SECRETS['alice']}", ""))
    return Access(Config(**settings), known, lambda: 0.0)


LAN, LOCAL = "192.168.1.5", "127.0.0.1"


@pytest.mark.parametrize(
    ("settings", "peer", "local", "headers", "want"),
    [
        ({}, LOCAL, LOCAL, {}, Caller(LOCAL, "", True)),
        ({}, "::1", "::1", {}, Caller("::1", "", True)),
        ({}, LOCAL, LOCAL, bearer("alice"), Caller(LOCAL, "alice", True)),
        ({}, LOCAL, LOCAL, bearer("wrong"), Caller(LOCAL, "", True)),
        ({"loopback_token": True}, LOCAL, LOCAL, {}, 401),
        ({}, "10.0.0.9", LAN, {}, 401),
        ({}, LAN, LAN, {}, 401),
        ({}, "10.0.0.9", LAN, bearer("alice"), Caller("10.0.0.9", "alice", False)),
        ({}, "10.0.0.9", LAN, {"Authorization": f"bearer  {SECRETS['alice']} "}, Caller("10.0.0.9", "alice", False)),
        ({"insecure_no_auth": True}, "10.0.0.9", LAN, {}, Caller("10.0.0.9", "", False)),
        # A proxy on this machine that nobody told us of is not this machine.
        ({}, LOCAL, LOCAL, {"X-Forwarded-For": "10.0.0.9"}, 401),
        ({}, LOCAL, LOCAL, {"Forwarded": "for=10.0.0.9", **bearer("alice")}, Caller(LOCAL, "alice", False)),
        ({}, "10.0.0.9", LAN, {"X-Forwarded-For": LOCAL, **bearer("alice")}, Caller("10.0.0.9", "alice", False)),
        ({"trusted_proxies": ("127.0.0.0/8",)}, LOCAL, LOCAL,
         {"X-Forwarded-For": "6.6.6.6, 10.0.0.9", **bearer("alice")}, Caller("10.0.0.9", "alice", False)),
        ({"trusted_proxies": ("10.0.0.1", "::1")}, "10.0.0.1", LAN,
         {"X-Forwarded-For": "6.6.6.6, 10.0.0.9, ::1", **bearer("alice")}, Caller("10.0.0.9", "alice", False)),
        ({"trusted_proxies": ("10.0.0.1",)}, "10.0.0.1", LAN, {"X-Forwarded-For": "10.0.0.9"}, 401),
    ],
)  # fmt: skip
def test_who_asks(settings: dict[str, Any], peer: str, local: str, headers: dict[str, str], want: Caller | int) -> None:
    found = access(**settings).caller(peer, local, headers, is_open=False)
    assert (found.code if isinstance(found, Denial) else found) == want


def test_wrong_tokens_of_an_address_do_not_shut_others_out() -> None:
    door = access(limits=Limits(requests_per_second=1000))
    codes = []
    for _ in range(12):
        denied = door.caller("10.0.0.9", LAN, bearer("wrong"), is_open=False)
        codes.append(denied.code if isinstance(denied, Denial) else 200)
    assert codes == [401] * 10 + [429] * 2
    assert isinstance(door.caller("10.0.0.9", LAN, bearer("alice"), is_open=False), Caller)
    other = door.caller("10.0.0.8", LAN, bearer("wrong"), is_open=False)
    assert isinstance(other, Denial)
    assert other.code == 401


def test_an_allowance_fills_again_and_is_forgotten_in_turn() -> None:
    now = 0.0
    allowances = Allowances(2, 4, lambda: now)
    assert [allowances.take("a") for _ in range(5)] == [True] * 4 + [False]
    now = 1.0
    assert [allowances.take("a") for _ in range(3)] == [True, True, False]
    for at in range(2_000):
        allowances.take(f"b-{at}")
    assert [allowances.take("a") for _ in range(5)] == [True] * 4 + [False]


# --- TLS -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`server.pem` and `client.pem`, each signed by itself, with `.key`."""
    directory = tmp_path_factory.mktemp("certificates")
    for name in ("server", "client"):
        words = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name}"
        try:
            subprocess.run(
                [*words.split(), "-keyout", directory / f"{name}.key", "-out", directory / f"{name}.pem"],
                check=True, capture_output=True,
            )  # fmt: skip
        except FileNotFoundError:
            pytest.skip("openssl is not there")
    return directory


def in_place(certificates: Path, directory: Path, cert: str, key: str = "", client_ca: str = "client") -> Tls:
    """Put certificates in the place of those that were there, each as one step, as who renews them does."""
    names = {"cert.pem": f"{cert}.pem", "key.pem": f"{key or cert}.key", "ca.pem": f"{client_ca}.pem"}
    for name, source in names.items():
        (directory / "new").write_bytes((certificates / source).read_bytes())
        (directory / "new").replace(directory / name)
    return Tls(*(str(directory / name) for name in names))


def shake_hands(files: TlsFiles, certificates: Path, client: str) -> str:
    """Whose certificate the server shows to one with the certificate of `client`, or why it refuses."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    for name in ("server", "client"):
        context.load_verify_locations(certificates / f"{name}.pem")
    context.load_cert_chain(certificates / f"{client}.pem", certificates / f"{client}.key")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [context.wrap_bio(down, up), files.context.wrap_bio(up, down, server_side=True)]
    for side in sides * 2:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            return error.reason
    shown: Any = sides[0].getpeercert()
    return str(shown["subject"][0][0][1])


def test_certificates_are_renewed_while_the_bridge_runs(certificates: Path, tmp_path: Path) -> None:
    told: list[str] = []
    files = TlsFiles(in_place(certificates, tmp_path, "server"))
    files.tell = lambda kind, _: told.append(kind)
    assert shake_hands(files, certificates, "client") == "server"
    assert shake_hands(files, certificates, "server") == "CERTIFICATE_VERIFY_FAILED"
    assert not files.refresh()
    in_place(certificates, tmp_path, "client", key="server")
    with pytest.raises(TlsError, match=r"tls\.cert: cannot use the files"):
        files.refresh()
    assert not files.refresh(), "said once"
    (tmp_path / "key.pem").unlink()
    with pytest.raises(TlsError, match=r"tls\.key: cannot read"):
        files.refresh()
    assert shake_hands(files, certificates, "client") == "server"
    in_place(certificates, tmp_path, "client", client_ca="server")
    assert files.refresh()
    assert shake_hands(files, certificates, "server") == "client"
    assert shake_hands(files, certificates, "client") == "CERTIFICATE_VERIFY_FAILED"
    assert told == ["tls CERTIFICATE_VERIFY_FAILED"] * 2


@needs_network
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")  # an old version is what must be refused
def test_tls_beyond_loopback(
    make_daemon: Callable[..., Daemon], certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, server = free_port(), certificates / "server"
    tls = in_place(certificates, tmp_path, "server")
    env = {"BRIDGE_TLS_CERT": tls.cert, "BRIDGE_TLS_KEY": tls.key, "BRIDGE_TLS_CLIENT_CA": tls.client_ca}
    env["BRIDGE_TOKEN_FILE"] = str(token_file(tmp_path, "alice"))
    daemon = make_daemon("--listen", f"{ADDRESS}:{port}", env=env).start()  # on loopback it speaks without TLS
    assert daemon.get("/v1/metrics").status == 200

    def get(**options: Any) -> int:
        context = ssl.create_default_context(cafile=f"{server}.pem")
        context.check_hostname = False
        if options.get("has_certificate"):
            context.load_cert_chain(certificates / "client.pem", certificates / "client.key")
        if latest := options.get("latest"):
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = latest
        connection = HTTPSConnection(ADDRESS, port, timeout=5, context=context)
        try:
            connection.request("GET", "/v1/metrics", headers=bearer("alice") if options.get("has_token") else {})
            return connection.getresponse().status
        finally:
            connection.close()

    (finding,) = doctor.check_elsewhere(evidence.ask_elsewhere(f"https://{ADDRESS}:{port}", ""))
    assert "its certificate is not believed: self-signed certificate" in finding.what.replace(
        "self signed", "self-signed"
    )
    assert "SSL_CERT_FILE=chain.pem claude-otel-bridge doctor" in finding.todo
    monkeypatch.setenv("SSL_CERT_FILE", f"{server}.pem")
    (finding,) = doctor.check_elsewhere(evidence.ask_elsewhere(f"https://{ADDRESS}:{port}", ""))
    assert "its certificate bears another name: IP address mismatch" in finding.what
    assert get(has_certificate=True, has_token=True) == 200
    assert get(has_certificate=True, has_token=True, latest=ssl.TLSVersion.TLSv1_2) == 200
    assert get(has_certificate=True) == 401
    with pytest.raises((ssl.SSLError, ConnectionError)):
        get(has_token=True)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        get(has_certificate=True, has_token=True, latest=ssl.TLSVersion.TLSv1_1)
    for _ in range(3):
        with pytest.raises(OSError):
            ask((ADDRESS, port), "GET", "/v1/metrics", bearer("alice"))
    assert daemon.log.count(HTTP_HINT) == 1
    assert "error" not in daemon.log
    assert "no TLS" not in daemon.log
    in_place(certificates, tmp_path, "client")
    until(lambda: "the files of TLS changed" in daemon.log)
    server = certificates / "client"
    assert get(has_certificate=True, has_token=True) == 200


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('listen = ["192.168.1.5:4318"]', "refusing to listen on 192.168.1.5:4318 without a token"),
        ('token_file = "/nonexistent/tokens"', "token_file: /nonexistent/tokens does not exist"),
        ('[tls]\ncert = "/nonexistent/c.pem"\nkey = "/nonexistent/k.pem"', "tls.cert: cannot read /nonexistent/c.pem"),
        ('listen = ["192.168.1.5:4318"]\ninsecure_no_auth = true', ""),
    ],
)
def test_a_check_refuses_what_a_start_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    file.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit) as left:
        main(["--config", str(file), "--state-dir", str(tmp_path / "state"), "config", "check"])
    told = capsys.readouterr()
    assert left.value.code == (os.EX_CONFIG if words else os.EX_OK)
    assert told.err.startswith(f"claude-otel-bridge: {file}: {words}" if words else "")
    assert told.out == ("" if words else f"{file}: ok\n")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (("server.pem", "client.key"), "tls.cert: cannot use the files"),
        (("server.pem", "none.key"), "none.key: No such file"),
        (("server.key", "server.key"), "tls.cert: cannot use the files"),
    ],
)
def test_files_that_tls_cannot_use(tmp_path: Path, certificates: Path, files: tuple[str, str], words: str) -> None:
    cert, key = (str(certificates / name) for name in files)
    daemon = Daemon(tmp_path, env={"BRIDGE_TLS_CERT": cert, "BRIDGE_TLS_KEY": key})
    done = subprocess.run(daemon.command, env=daemon.environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == os.EX_CONFIG
    assert words in done.stderr


# --- a flood ---------------------------------------------------------------------------------------------------


def pour(port: int, seconds: float, connections: int, size: int) -> Counter[int]:
    """Post as alice `size` points a body over so many connections, each as fast as it is answered; the statuses. In a
    process of its own."""
    counts: Counter[int] = Counter()
    numbers = itertools.count(1)

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while True:
            body = as_json(request_of(*[points(1, next(numbers)) for _ in range(size)]))
            writer.write(post("/v1/metrics", body, *(f"{name}: {value}" for name, value in bearer("alice").items())))
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
            counts[int(head.split()[1])] += 1

    async def clients() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(client() for _ in range(connections)))

    asyncio.run(clients())
    return counts


@pytest.mark.parametrize("size", [5, 5_000])
def test_who_floods_makes_only_himself_wait(make_team: Callable[..., Daemon], campaign: bool, size: int) -> None:
    """Twenty clients that post once a second beside one that posts as fast as it can: over 64 connections, or over
    three, thousands of points each time."""
    if size > 5 and not campaign:
        pytest.skip("test_a_small_body_does_not_wait_for_large_ones is the short form")
    seconds, clients = (60, 20) if campaign else (2, 5)
    connections = 3 if size > 5 else 64 if campaign else 8
    names = [f"user-{at}" for at in range(clients)]
    rate = {} if campaign else {"BRIDGE_LIMITS_REQUESTS_PER_SECOND": "20"}
    daemon = make_team(BRIDGE_TOKENS=",".join(f"{name} {name}-{'x' * 30}" for name in names), **rate)
    latencies: list[float] = []
    flood = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with flood:
        flooded = flood.submit(pour, daemon.port, seconds, connections, size)
        until(lambda: series(daemon).get("alice", 0) > 0)
        end = time.monotonic() + seconds - 1

        def work(name: str) -> None:
            connection = HTTPConnection("127.0.0.1", daemon.port, timeout=30)
            headers = {"Authorization": f"Bearer {name}-{'x' * 30}", "Content-Type": JSON}
            at = 0
            while time.monotonic() < end:
                at += 1
                body = as_json(request_of(points(1, at)))
                began = time.monotonic()
                connection.request("POST", "/v1/metrics", body, headers)
                reply = connection.getresponse()
                reply.read()
                latencies.append(time.monotonic() - began)
                assert reply.status == 200
                time.sleep(1 if campaign else 0.1)
            connection.close()

        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    floods = flooded.result()
    assert set(floods) <= {200, 429}
    assert floods[429] or size > 5
    worst = sorted(latencies)[int(len(latencies) * 0.99)]
    if campaign:
        sys.stdout.write(
            f"{floods.total()} requests of the flood ({floods[429]} x 429), {len(latencies)} of {clients} others:"
            f" p50 {sorted(latencies)[len(latencies) // 2] * 1e3:.1f} ms, p99 {worst * 1e3:.1f} ms\n"
        )
    assert worst < (0.2 if campaign else 5)
