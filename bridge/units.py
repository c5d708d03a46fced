"""The text of the files by which systemd and launchd run the bridge. Pure.

Numbers: a bridge that crashes is back within a second, for ever, as long as it lives for a second; one that dies at
once 100 times in a minute is given up, and one that cannot run as things stand (64, 65, 73, 77, 78) at once. The
supervisor holds the sockets, so nobody is refused meanwhile.
"""

import ipaddress
import plistlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath

NAME = "claude-otel-bridge"
SERVICE, SOCKET, AGENT = f"{NAME}.service", f"{NAME}.socket", f"{NAME}.plist"
MARKER = f"`{NAME} install` replaces this file and `uninstall` removes it as long as this line stands here."
AGENT_SOCKETS = "otlp"
THROTTLE_SECONDS = 10
"""Between two starts by launchd, which cannot tell a mistake in the settings from a crash and tries for ever."""

Address = tuple[str, int]

_SOCKET = """\
# {marker}
[Unit]
Description=Sockets of claude-otel-bridge

[Socket]
{listen}
BindIPv6Only=ipv6-only

[Install]
WantedBy=sockets.target
"""

_SERVICE = """\
# {marker}
[Unit]
Description=Exact counters of what AI coding tools use
Requires=claude-otel-bridge.socket
After=claude-otel-bridge.socket
StartLimitIntervalSec=60
StartLimitBurst=100

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
{environment}Restart=on-failure
RestartSec=500ms
RestartPreventExitStatus=64 65 73 77 78
TimeoutStartSec=5min
TimeoutStopSec=10
WatchdogSec=30

UMask=0077
LimitCORE=0
LimitNOFILE=4096
MemoryMax=1G
TasksMax=64
{sandbox}
[Install]
WantedBy={target}
"""

_SANDBOX = """\
NoNewPrivileges=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
"""

_SYSTEM_SANDBOX = """\
DynamicUser=yes
StateDirectory=claude-otel-bridge
StateDirectoryMode=0700
CapabilityBoundingSet=
PrivateDevices=yes
PrivateIPC=yes
PrivateTmp=yes
PrivateUsers=yes
ProcSubset=pid
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProtectSystem=strict
RemoveIPC=yes
"""

_LOOPBACK_ONLY = """\
IPAddressDeny=any
IPAddressAllow=localhost
"""

SYSTEM_STATE = "%S/claude-otel-bridge"


def systemd_units(
    command_line: str, addresses: Sequence[Address], variables: Mapping[str, str], *, system: bool
) -> dict[str, str]:
    """File name -> text of the socket and the service. `command_line` is in systemd's syntax (`command_line()`)."""
    sandbox = _SANDBOX
    if system:
        command_line = f"{command_line} --state-dir {SYSTEM_STATE}"
        variables = {"XDG_CONFIG_HOME": "/etc", "BRIDGE_TRANSCRIPTS": "false", **variables}  # it sees no home
        sandbox += _SYSTEM_SANDBOX
        if all(ipaddress.ip_address(host).is_loopback for host, _ in addresses):
            sandbox += _LOOPBACK_ONLY
    service = _SERVICE.format(
        marker=MARKER,
        command=command_line,
        environment="".join(f"Environment={_quoted(f'{name}={value}')}\n" for name, value in variables.items()),
        sandbox=sandbox,
        target="multi-user.target" if system else "default.target",
    )
    listen = "\n".join(f"ListenStream={shown(address)}" for address in addresses)
    return {SOCKET: _SOCKET.format(marker=MARKER, listen=listen), SERVICE: service}


def command_line(words: Iterable[str]) -> str:
    """A command as ExecStart takes it."""
    return " ".join(_quoted(word).replace("$", "$$") for word in words)


def _quoted(word: str) -> str:
    """A word of a unit file: in double quotes if it has to be, specifiers and escapes made literal."""
    literal = word.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"').replace("%", "%%")
    return literal if literal == word and not set(word) & set(" \t'") else f'"{literal}"'


def launchd_agent(
    command: Sequence[str], addresses: Sequence[Address], variables: Mapping[str, str], log_file: PurePath
) -> dict[str, str]:
    """File name -> text of the agent. What is printed before there is a log, and by a crash, goes to stderr.log."""
    agent = {
        "Label": NAME,
        "ProgramArguments": [*command],
        "EnvironmentVariables": {"BRIDGE_LOG_FILE": str(log_file), **variables},
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": THROTTLE_SECONDS,
        "ProcessType": "Background",
        "ExitTimeOut": 10,
        "Umask": 0o077,
        "SoftResourceLimits": {"Core": 0, "NumberOfFiles": 4096},
        "StandardErrorPath": str(log_file.with_name("stderr.log")),
        "Sockets": {AGENT_SOCKETS: [_agent_socket(*address) for address in addresses]},
    }
    head, plist, body = plistlib.dumps(agent, sort_keys=False).decode().partition("<plist")
    return {AGENT: f"{head}<!-- {MARKER} -->\n{plist}{body}"}


def _agent_socket(host: str, port: int) -> dict[str, str]:
    family = "IPv6" if ":" in host else "IPv4"
    return {"SockNodeName": host, "SockServiceName": str(port), "SockType": "stream", "SockFamily": family}


def read_back(files: Mapping[str, str]) -> tuple[list[Address], dict[str, str]]:
    """The addresses and variables that files of ours were made with."""
    if AGENT in files:
        agent = plistlib.loads(files[AGENT].encode())
        sockets = agent["Sockets"][AGENT_SOCKETS]
        return [(one["SockNodeName"], int(one["SockServiceName"])) for one in sockets], agent["EnvironmentVariables"]
    lines = [line.partition("=") for text in files.values() for line in text.splitlines()]
    listen = [value.rpartition(":") for key, _, value in lines if key == "ListenStream"]
    variables = [_unquoted(value).partition("=") for key, _, value in lines if key == "Environment"]
    return [(host.strip("[]"), int(port)) for host, _, port in listen], {name: text for name, _, text in variables}


def _unquoted(word: str) -> str:
    if not word.startswith('"'):
        return word
    literal = re.sub(r"\\(.)", lambda found: "\n" if found[1] == "n" else found[1], word[1:-1])
    return literal.replace("%%", "%")


def shown(address: Address) -> str:
    """`127.0.0.1:4318`, `[::1]:4318`."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
