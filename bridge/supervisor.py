"""What a supervisor gives to the daemon and wants to hear of it: sockets that outlive it, readiness, a pulse.

Law: without a supervisor every function does nothing. The protocols are sd_notify(3), sd_watchdog_enabled(3),
sd_listen_fds(3) and launch_activate_socket(3). A socket that is passed stays open in the supervisor: who connects
while no bridge runs waits in the kernel's queue for the next one.
"""

import contextlib
import os
import socket
import sys
from typing import Any

from bridge.units import AGENT_SOCKETS

FIRST_DESCRIPTOR = 3


def notify(message: str) -> None:
    """Tell systemd (`READY=1`, `STATUS=...`, `STOPPING=1`, `WATCHDOG=1`)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):  # the abstract namespace
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1)
        sock.sendto(message.encode(), address)


def watchdog_seconds() -> float | None:
    """After how long without `WATCHDOG=1` systemd restarts this process; None if it does not watch."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(microseconds) / 1e6 or None


def passed_sockets() -> list[socket.socket]:
    """The listening sockets that the supervisor opened; none if this process was started by hand."""
    if sys.platform == "darwin":
        import ctypes  # not elsewhere: its import may want memory that is writable and executable

        descriptors = launchd_descriptors(ctypes.CDLL(None))
    else:
        descriptors = _systemd_descriptors()
    sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    for sock in sockets:
        sock.set_inheritable(False)
        sock.setblocking(False)
    return sockets


def _systemd_descriptors() -> range:
    # Taken out, so that no child believes they are meant for it.
    pid, count, _ = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    mine = pid == str(os.getpid()) and count.isdecimal()
    return range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + (int(count) if mine else 0))


def launchd_descriptors(library: Any) -> list[int]:
    """What launchd holds for this job; `library` is the C library, where launch_activate_socket lives."""
    import ctypes

    found = ctypes.POINTER(ctypes.c_int)()
    count = ctypes.c_size_t()
    name = AGENT_SOCKETS.encode()
    if library.launch_activate_socket(name, ctypes.byref(found), ctypes.byref(count)) != 0:
        return []  # ESRCH: not started by launchd; ENOENT: by an agent without these sockets
    descriptors = found[: count.value]
    library.free(found)
    return descriptors


def is_journal(descriptor: int) -> bool:
    """Whether what is written to a descriptor goes to the systemd journal."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
