"""What systemd gives to a running bridge and hears from it: pulse, sockets, journal; and its unit files."""

import contextlib
import fcntl
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bridge import units
from bridge.supervisor import passed_sockets
from tests.daemon import JSON, Daemon
from tests.test_daemon import INPUT, ONE

MakeDaemon = Callable[..., Daemon]
ROOT = Path(__file__).parent.parent
LOOPBACK = [("127.0.0.1", 4318), ("::1", 4318)]
PATIENCE_SECONDS = 20


# --- notifications and the watchdog ---


@pytest.fixture(params=["path", "abstract"])
def notify_socket(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A notify socket and the NOTIFY_SOCKET of it."""
    address = f"@bridge-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
    if request.param == "abstract" and sys.platform != "linux":
        pytest.skip("abstract sockets are Linux's")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + address[1:] if address.startswith("@") else address)
        sock.settimeout(PATIENCE_SECONDS)
        yield sock, address


def wait_for(sock: socket.socket, wanted: str) -> str:
    """The first message that has this line; the lines of other messages are thrown away."""
    while wanted not in (message := sock.recv(65_536).decode()).splitlines():
        pass
    return message


def drain(sock: socket.socket) -> None:
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.recv(65_536)
    sock.settimeout(PATIENCE_SECONDS)


def is_silent(sock: socket.socket, seconds: float) -> bool:
    sock.settimeout(seconds)
    try:
        sock.recv(65_536)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(PATIENCE_SECONDS)
    return False


def test_systemd_is_told_when_the_bridge_is_ready_and_when_it_stops(
    notify_socket: tuple[socket.socket, str], make_daemon: MakeDaemon
) -> None:
    sock, address = notify_socket
    daemon = make_daemon(env={"NOTIFY_SOCKET": address})
    daemon.spawn()
    assert sock.recv(65_536) == b"STATUS=loading the state"
    ready = wait_for(sock, "READY=1")
    assert f"127.0.0.1:{daemon.port}" in ready
    # Ready means ready: the first request is answered, not refused.
    assert daemon.get("/-/ready").status == 200
    assert is_silent(sock, 0.5)  # nobody asked for a pulse
    assert daemon.stop() == 0
    assert sock.recv(65_536).startswith(b"STOPPING=1\n")


@pytest.mark.parametrize("notify_socket", ["path"], indirect=True)
def test_a_stuck_event_loop_falls_silent(
    notify_socket: tuple[socket.socket, str], make_daemon: MakeDaemon, tmp_path: Path
) -> None:
    """The log is a pipe that nobody reads: once it is full, the next log line holds the event loop."""
    sock, address = notify_socket
    pipe = tmp_path / "log"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    daemon = make_daemon(env={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "200000"})
    log = os.open(pipe, os.O_WRONLY)
    daemon.process = subprocess.Popen(daemon.command, stderr=log, env=daemon.environment)
    wait_for(sock, "READY=1")
    for _ in range(3):
        wait_for(sock, "WATCHDOG=1")
    filler = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(filler, b"x")
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(filler, b"x" * 4096)
    with socket.create_connection(("127.0.0.1", daemon.port)) as knock:
        knock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")  # a gRPC client is worth a log line
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_silent(sock, 1.0):
            assert time.monotonic() < deadline, "a stuck event loop goes on telling that it is well"
        while os.read(reader, 1 << 20):  # somebody reads: it turns again
            with contextlib.suppress(TimeoutError):
                drain(sock)
                sock.settimeout(0.5)
                wait_for(sock, "WATCHDOG=1")
                break
    assert daemon.stop() == 0
    for descriptor in (reader, log, filler):
        os.close(descriptor)


@pytest.mark.parametrize("notify_socket", ["path"], indirect=True)
def test_the_pulse_is_for_the_watched_process_alone(
    notify_socket: tuple[socket.socket, str], make_daemon: MakeDaemon
) -> None:
    sock, address = notify_socket
    make_daemon(env={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"}).spawn()
    wait_for(sock, "READY=1")
    assert is_silent(sock, 0.5)


def test_a_supervisor_that_does_not_listen_disturbs_nobody(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    for address in (str(tmp_path / "nobody"), "vsock:2:1", "relative"):
        daemon = make_daemon(env={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"}).start()
        assert daemon.stop() == 0


# --- socket activation ---

LAUNCHER = """
import os, sys
passed, command = sys.argv[1].split(","), sys.argv[2:]
for number, descriptor in enumerate(passed, 3):
    os.dup2(int(descriptor), number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(passed)), LISTEN_FDNAMES="a:b")
os.execv(command[0], command)
"""
"""What systemd does between fork and exec."""


class Activated(Daemon):
    """A bridge whose listening sockets are the test's, on both loopback families where there are two."""

    def hold(self) -> None:
        self.sockets = [socket.create_server(("127.0.0.1", self.port), backlog=512)]
        with contextlib.suppress(OSError):
            self.sockets.append(socket.create_server(("::1", self.port), family=socket.AF_INET6, backlog=512))

    @property
    def hosts(self) -> list[str]:
        return [sock.getsockname()[0] for sock in self.sockets]

    def spawn(self) -> None:
        # High numbers, so that the launcher's 3 and 4 are free.
        descriptors = [fcntl.fcntl(sock, fcntl.F_DUPFD, 100) for sock in self.sockets]
        launcher = [sys.executable, "-S", "-E", "-c", LAUNCHER, ",".join(map(str, descriptors)), *self.command]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(launcher, stderr=log, env=self.environment, pass_fds=descriptors)
        for descriptor in descriptors:
            os.close(descriptor)

    def close(self) -> None:
        super().close()
        for sock in self.sockets:
            sock.close()


@pytest.fixture
def activated(tmp_path: Path) -> Iterator[Activated]:
    daemon = Activated(tmp_path)
    daemon.hold()
    yield daemon
    daemon.close()


def test_passed_sockets_are_served_on_both_families(activated: Activated) -> None:
    activated.start()
    for host in activated.hosts:
        connection = http.client.HTTPConnection(host, activated.port, timeout=PATIENCE_SECONDS)
        connection.request("GET", "/-/ready")
        assert connection.getresponse().status == 200
        connection.close()
    assert activated.stop() == 0
    assert "not those of the `listen` setting" not in activated.log


def test_sockets_of_another_port_win_over_the_setting_and_are_named(activated: Activated) -> None:
    activated.arguments = ("--listen", "127.0.0.1:1")
    activated.spawn()
    activated.wait_ready()
    assert "not those of the `listen` setting" in activated.log


def test_a_client_waits_for_a_bridge_that_is_not_there_yet(activated: Activated) -> None:
    with socket.create_connection(("127.0.0.1", activated.port), timeout=PATIENCE_SECONDS) as early:
        early.sendall(b"GET /v1/metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        activated.spawn()
        assert early.recv(65_536).startswith(b"HTTP/1.1 200 ")


def test_sockets_for_another_process_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for pid, count in (("1", "2"), ("", "2"), (str(os.getpid()), "two")):
        for name, value in (("LISTEN_PID", pid), ("LISTEN_FDS", count), ("LISTEN_FDNAMES", "a:b")):
            monkeypatch.setenv(name, value)
        assert passed_sockets() == []
        assert not any(name.startswith("LISTEN_") for name in os.environ)


class Load:
    """Clients of a bridge that dies again and again: they wait and repeat, and count what a user would notice."""

    def __init__(self, daemon: Activated) -> None:
        self.daemon = daemon
        self.stopping = threading.Event()
        self.posted = [0, 0]
        self.scrapes = 0
        self.cut = 0
        self.faults: list[str] = []
        work = [lambda: self._post(0), lambda: self._post(1), self._scrape]
        self.threads = [threading.Thread(target=self._guarded, args=(one,)) for one in work]

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.faults.append(repr(error))

    def ask(self, number: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """One request over a new connection; a refused connection is an error, a cut one is tried again."""
        host = self.daemon.hosts[number % len(self.daemon.hosts)]
        while True:
            connection = http.client.HTTPConnection(host, self.daemon.port, timeout=60)
            connection.connect()
            try:
                connection.request(method, path, body, {"Content-Type": JSON})
                reply = connection.getresponse()
                return reply.status, reply.read()
            except (ConnectionError, http.client.HTTPException):  # the bridge died with the request in its hands
                self.cut += 1
            finally:
                connection.close()

    def _post(self, number: int) -> None:
        text = json.dumps(ONE).replace('"stringValue": "s"', f'"stringValue": "session-{number}"')
        while not self.stopping.is_set():
            body = text.replace('"2000"', f'"{2000 + self.posted[number]}"').encode()
            status, answer = self.ask(number, "POST", "/v1/metrics", body)
            if status == 200:
                self.posted[number] += 1
            elif status != 503:
                raise AssertionError(f"{status}: {answer!r}")

    def _scrape(self) -> None:
        highest = -1
        while not self.stopping.is_set():
            status, answer = self.ask(self.scrapes, "GET", "/v1/metrics")
            assert status == 200, f"{status}: {answer!r}"
            value = int(next(line for line in answer.decode().splitlines() if line.startswith(INPUT)).split()[1])
            assert value >= highest
            highest = value
            self.scrapes += 1

    def wait_for_progress(self) -> None:
        """Until every client was served by the bridge that runs now."""
        before = [*self.posted, self.scrapes]
        deadline = time.monotonic() + 60
        while any(now < then + 3 for now, then in zip([*self.posted, self.scrapes], before, strict=True)):
            assert not self.faults, self.faults
            assert time.monotonic() < deadline, f"no progress:\n{self.daemon.log}"
            time.sleep(0.01)

    def run(self, end: Callable[[], object], times: int) -> None:
        for thread in self.threads:
            thread.start()
        try:
            for _ in range(times):
                self.wait_for_progress()
                end()
                self.daemon.spawn()
            self.wait_for_progress()
        finally:
            self.stopping.set()
            for thread in self.threads:
                thread.join(70)
        assert self.faults == []
        assert self.daemon.samples()[INPUT] == str(5 * sum(self.posted))


def test_killed_again_and_again_under_load_nobody_is_refused(activated: Activated, campaign: bool) -> None:
    load = Load(activated)
    activated.start()
    load.run(activated.kill, 100 if campaign else 6)
    sys.stdout.write(f"{sum(load.posted)} exports, {load.scrapes} scrapes, {load.cut} repeated\n")


def test_restarted_in_order_no_request_is_cut(activated: Activated) -> None:
    load = Load(activated)
    activated.start()
    load.run(activated.stop, 5)
    assert load.cut == 0


# --- the journal and the sandbox ---


def test_the_journal_gets_priorities_and_no_times(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    daemon.log_path.touch()
    status = daemon.log_path.stat()
    daemon.env["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
    daemon.start()
    with socket.create_connection(("127.0.0.1", daemon.port)) as knock:
        knock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        knock.recv(65_536)
    daemon.stop()
    lines = [line for line in daemon.log.splitlines() if "running as root" not in line]
    assert lines[0].startswith("<6>info ready version=")
    assert lines[1].startswith("<4>warning a client speaks gRPC")
    assert lines[-1] == "<6>info stopped"


def test_a_log_that_is_not_the_journal_keeps_its_times(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("--log-format", "json", env={"JOURNAL_STREAM": "1:2"}).start()
    daemon.stop()
    assert all("time" in json.loads(line) for line in daemon.log.splitlines())


def test_memory_is_never_writable_and_executable(make_daemon: MakeDaemon) -> None:
    """uvloop, protobuf and the JSON decoder under what MemoryDenyWriteExecute asks of newer kernels."""
    daemon = make_daemon()
    deny = (
        "import ctypes, os, sys; ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) and sys.exit(3);"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    allowed = subprocess.run([sys.executable, "-c", deny, "/bin/true"], capture_output=True)
    if allowed.returncode:
        pytest.skip("needs Linux 6.3 or later")
    command = [sys.executable, "-c", deny, *daemon.command]
    with daemon.log_path.open("ab") as log:
        daemon.process = subprocess.Popen(command, stderr=log, env=daemon.environment)
    daemon.wait_ready()
    assert daemon.post("/v1/metrics", ONE).status == 200
    assert daemon.post("/v1/metrics", b"", "application/x-protobuf").status == 200
    assert 'loop="uvloop"' in daemon.get("/metrics").text
    assert daemon.stop() == 0


# --- the units ---


def systemd_analyze(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run systemd-analyze; skips the test where it is not installed. It needs a runtime directory that exists."""
    tree = os.environ.get("BRIDGE_TEST_SYSTEMD", "")
    program = shutil.which("systemd-analyze", path=f"{tree}/usr/bin" if tree else None)
    if program is None:
        missing = "needs systemd-analyze: install systemd, or set BRIDGE_TEST_SYSTEMD to its unpacked package"
        if os.environ.get("BRIDGE_TEST_REQUIRE_ALL") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    libraries = [str(path.parent) for path in Path(tree).rglob("libsystemd-*.so")] if tree else []
    environment = {"PATH": os.defpath, "XDG_RUNTIME_DIR": str(cwd), "LD_LIBRARY_PATH": ":".join(libraries), "LANG": "C"}
    environment["SYSTEMD_UNIT_PATH"] = f"{cwd}:{tree}/usr/lib/systemd/user:{tree}/usr/lib/systemd/system:"
    if not tree or "--system" in arguments:
        del environment["SYSTEMD_UNIT_PATH"]
    command = [program, *(argument for argument in arguments if argument != "--system")]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("system", [True, False])
def test_systemd_has_nothing_to_say_about_the_units(system: bool, tmp_path: Path) -> None:
    command = units.command_line(["/bin/sh", "a b", '50%"', "$HOME", "back\\slash"])
    variables = {"BRIDGE_CONFIG": '/a b/"c"/50%', "BRIDGE_LOG_LEVEL": "debug"}
    files = units.systemd_units(command, LOOPBACK, variables, system=system)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    checked = systemd_analyze("verify", "--man=no", *([] if system else ["--user"]), *files, cwd=tmp_path)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@pytest.mark.parametrize(("file", "threshold"), [("", 15), ("user", 65)])
def test_exposure_of_the_services(file: str, threshold: int, tmp_path: Path) -> None:
    unit = ROOT / "systemd" / file / units.SERVICE
    options = ("security", "--offline=true", "--no-pager", f"--threshold={threshold}", str(unit))
    checked = systemd_analyze(*options, cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("folder", "command", "system"),
    [
        ("systemd", "/usr/local/bin/claude-otel-bridge", True),
        ("systemd/user", "%h/.local/bin/claude-otel-bridge", False),
    ],
)
def test_the_units_for_installation_by_hand_are_the_rendered_ones(folder: str, command: str, system: bool) -> None:
    wanted = units.systemd_units(command, LOOPBACK, {}, system=system)
    assert {path.name: path.read_text() for path in (ROOT / folder).iterdir() if path.is_file()} == wanted


def test_only_errors_that_may_pass_by_themselves_are_tried_again() -> None:
    lines = units.systemd_units("/bin/x", LOOPBACK, {}, system=False)[units.SERVICE].splitlines()
    (ends,) = [line.partition("=")[2] for line in lines if line.startswith("RestartPreventExitStatus=")]
    for_people = {os.EX_USAGE, os.EX_DATAERR, os.EX_CANTCREAT, os.EX_NOPERM, os.EX_CONFIG}
    assert set(map(int, ends.split())) == for_people
    assert for_people.isdisjoint({os.EX_UNAVAILABLE, os.EX_SOFTWARE, os.EX_IOERR, os.EX_TEMPFAIL})


def test_only_loopback_addresses_are_filtered_to_loopback() -> None:
    def service(host: str) -> str:
        return units.systemd_units("/bin/x", [(host, 1)], {}, system=True)[units.SERVICE]

    assert "IPAddressDeny=any" in service("127.0.0.1")
    assert "IPAddressDeny" not in service("0.0.0.0")


def test_what_was_rendered_can_be_read_back() -> None:
    variables = {"BRIDGE_CONFIG": '/a b/"c"/50%\\n', "BRIDGE_LISTEN": "x,y", "BRIDGE_X": "two\nlines"}
    files = units.systemd_units("/bin/x", LOOPBACK, variables, system=False)
    assert units.read_back(files) == (LOOPBACK, variables)


def test_what_is_no_listening_socket_is_refused(activated: Activated) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram, Path(os.devnull).open() as no_socket:
        for wrong in (datagram.fileno(), no_socket.fileno()):
            launcher = [sys.executable, "-S", "-E", "-c", LAUNCHER, str(wrong), *activated.command]
            refused = subprocess.run(
                launcher, env=activated.environment, capture_output=True, pass_fds=[wrong], timeout=30
            )
            assert refused.returncode == os.EX_UNAVAILABLE
            assert b"the supervisor passed" in refused.stderr


def test_signals_end_the_launcher_s_bridge(activated: Activated) -> None:
    """The launcher of these tests is the bridge's own process, as systemd's is."""
    activated.start()
    assert activated.process is not None
    activated.process.send_signal(signal.SIGINT)
    assert activated.process.wait(10) == 0
