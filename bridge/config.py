"""Settings: what there is, what it may be, and how flags, environment and file are laid over each other.

Pure: the caller reads the file and hands over the environment. Flags win over environment over file over
defaults. Unknown keys are errors with a hint, in the file and in the environment.
"""

import difflib
import ipaddress
import re
import tomllib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta, Struct

ENVIRONMENT_PREFIX = "BRIDGE_"
NOT_SETTINGS = ("BRIDGE_TEST_",)
"""Environment variables of this prefix that are not settings of the bridge."""


TOKEN_VARIABLES = ("BRIDGE_TOKEN", "BRIDGE_TOKENS")
"""Environment variables that hold tokens, which never stand among the settings."""
COUNTED_BY = frozenset(
    {
        "model",
        "type",
        "input_tokens",
        "output_tokens",
        "cache_read_tokens",
        "cache_creation_tokens",
        "cache_creation_5m_tokens",
        "cache_creation_1h_tokens",
    }
)
"""Attributes without which usage cannot be counted once, so that they cannot be denied."""


class ConfigError(ValueError):
    """A setting is wrong: says which, where it stands and what is expected."""


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds on what clients can make the bridge do."""

    max_body_mib: Annotated[int, Meta(ge=1, le=64)] = 4
    body_seconds: Annotated[float, Meta(gt=0, le=600)] = 10.0
    connections: Annotated[int, Meta(ge=8, le=100_000)] = 512
    connections_per_address: Annotated[int, Meta(ge=1, le=100_000)] = 64
    requests_per_second: Annotated[float, Meta(ge=0.1, le=100_000)] = 100.0
    series: Annotated[int, Meta(ge=1, le=1_000_000)] = 10_000
    series_per_metric: Annotated[int, Meta(ge=1, le=1_000_000)] = 5_000
    series_per_source: Annotated[int, Meta(ge=1, le=1_000_000)] = 5_000
    metrics: Annotated[int, Meta(ge=1, le=100_000)] = 1_000
    attributes: Annotated[int, Meta(ge=1, le=1_000)] = 40
    label_length: Annotated[int, Meta(ge=32, le=65_536)] = 512


class Tls(Struct, frozen=True, forbid_unknown_fields=True):
    """Files in PEM form for TLS on addresses beyond loopback; with `client_ca` clients need a certificate of it."""

    cert: str = ""
    key: str = ""
    client_ca: str = ""


class Labels(Struct, frozen=True, forbid_unknown_fields=True):
    """Which attributes become labels on /metrics, in OTLP's spelling (`user.email`)."""

    promote: tuple[str, ...] = ("service.version",)
    drop: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    hash: tuple[str, ...] = ()
    scope: bool = False


Names = Literal[
    "UnderscoreEscapingWithSuffixes",
    "UnderscoreEscapingWithoutSuffixes",
    "NoUTF8EscapingWithSuffixes",
    "NoTranslation",
]


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """All settings with their defaults. An empty `state_dir` means the platform's place for state."""

    listen: tuple[str, ...] = ("localhost:4318",)
    listen_ingest: tuple[str, ...] = ()
    listen_read: tuple[str, ...] = ()
    token_file: str = ""
    loopback_token: bool = False
    insecure_no_auth: bool = False
    trusted_proxies: tuple[str, ...] = ()
    state_dir: str = ""
    hosts: tuple[str, ...] = ()
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_file: str = ""
    retention_days: Annotated[float, Meta(ge=1, le=90)] = 7.0
    series_expiry_hours: Annotated[float, Meta(gt=0, le=24 * 3660)] = 24.0
    names: Names = "UnderscoreEscapingWithSuffixes"
    created_series: bool = False
    source: Literal["auto", "otlp", "transcripts"] = "auto"
    transcripts: bool = True
    history_days: Annotated[float, Meta(ge=1, le=36_500)] = 90.0
    allow_network_fs: bool = False
    prices: dict[str, dict[str, float]] = {}
    tls: Tls = Tls()
    labels: Labels = Labels()
    limits: Limits = Limits()


DESCRIPTIONS = {
    "listen": "addresses to listen on; localhost means 127.0.0.1 and ::1",
    "listen_ingest": "further addresses that take exports alone",
    "listen_read": "further addresses that show the counters alone",
    "token_file": "tokens of network clients; without it `tokens` in the state directory",
    "loopback_token": "ask for a token on loopback addresses too",
    "insecure_no_auth": "listen beyond loopback without tokens: whoever reaches the bridge may write to it",
    "trusted_proxies": "addresses or networks of proxies whose X-Forwarded-For is believed",
    "state_dir": "where the counters are kept",
    "hosts": "more names that clients may use in the Host header",
    "log_format": "text or json",
    "log_level": "debug, info, warning or error",
    "log_file": "write the log to this file and rotate it (10 MiB, three old ones) instead of standard error",
    "retention_days": "how long a silent session's points are remembered, so that repeats do not count",
    "series_expiry_hours": "when a session's series leave /metrics after its last point",
    "names": "how OTLP names become Prometheus names: UnderscoreEscapingWithSuffixes,"
    " UnderscoreEscapingWithoutSuffixes, NoUTF8EscapingWithSuffixes or NoTranslation",
    "created_series": "add _created samples to OpenMetrics; Prometheus stores each as a series of its own",
    "source": "what is counted: auto joins metrics, events and transcripts; otlp and transcripts take one alone",
    "transcripts": "follow the transcripts of tools",
    "history_days": "how long single API requests are kept; sums by quarter of an hour stay for ever",
    "allow_network_fs": "keep the state on a network file system or in a synchronised folder all the same",
    "prices": "your own prices by model, in US dollars per million tokens",
    "tls.cert": "certificate chain (PEM) for TLS on addresses beyond loopback",
    "tls.key": "private key (PEM) of tls.cert",
    "tls.client_ca": "authorities (PEM) one of which must have signed a client's certificate",
    "labels.promote": "resource attributes that become labels of every series",
    "labels.drop": "attributes that are no labels; the values of series that become one are added up",
    "labels.deny": "attributes of metrics, events and resources that are not even stored",
    "labels.hash": "attributes whose values are replaced by a digest",
    "labels.scope": "add otel_scope_name and otel_scope_version",
    "limits.max_body_mib": "largest request body, before and after decompression",
    "limits.body_seconds": "time for a request body to arrive",
    "limits.connections": "open connections",
    "limits.connections_per_address": "open connections of one address beyond loopback",
    "limits.requests_per_second": "requests of one token, or of one address beyond loopback; twice as many at once",
    "limits.series": "series on /metrics; more go to one series a metric with otel_metric_overflow",
    "limits.series_per_metric": "the same for one metric",
    "limits.series_per_source": "the same for what comes with one token",
    "limits.metrics": "metric names; points of further ones are refused",
    "limits.attributes": "attributes of a point that become labels",
    "limits.label_length": "characters of a label's name or value; longer ones end in a digest",
}
"""One line for each setting, for `config show`, `--help` and the README."""


def load(file_text: str, environment: Mapping[str, str], flags: Mapping[str, Any], file_name: str) -> Config:
    """The settings in force. `flags` holds the ones that were given. Raises ConfigError."""
    try:
        from_file = tomllib.loads(file_text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file_name}: {error}") from None
    _check(from_file, Config, file_name)
    layered: dict[str, Any] = from_file
    for name, path in _variables(environment).items():
        _set(layered, path, environment[name])
        _check(layered, Config, name)
    layered.update(flags)
    _check(layered, Config, "command line")
    config = msgspec.convert(layered, Config, strict=False)
    _check_sense(config)
    return config


def listened(config: Config) -> tuple[str, ...]:
    """All addresses that the bridge listens on."""
    return (*config.listen, *config.listen_ingest, *config.listen_read)


_ADDRESS = re.compile(r"(localhost|[0-9.]+|\[[0-9a-fA-F:.]+\]):(\d{1,5})")

_HOST = re.compile(r"[^\s/:\[\]]+|\[[0-9a-fA-F:.]+\]")


def _check_sense(config: Config) -> None:
    """What no type says. Raises ConfigError."""
    if not config.listen:
        raise ConfigError("listen: at least one address is needed, as in localhost:4318")
    for name in ("listen", "listen_ingest", "listen_read"):
        for address in getattr(config, name):
            _check_address(name, address)
    addresses = listened(config)
    if double := next((address for address in addresses if addresses.count(address) > 1), None):
        raise ConfigError(f"listen: {double} stands there twice")
    for host in config.hosts:
        if not _HOST.fullmatch(host):
            raise ConfigError(f"hosts: {host}: expected the name alone, without http:// and port, as in nas.example")
    for network in config.trusted_proxies:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            raise ConfigError(f"trusted_proxies: {error}; expected an address or a network, as in 10.0.0.0/8") from None
    if bool(config.tls.cert) != bool(config.tls.key) or (config.tls.client_ca and not config.tls.cert):
        raise ConfigError("tls: cert and key belong together, and client_ca needs both")
    for key in sorted(COUNTED_BY.intersection(config.labels.deny)):
        raise ConfigError(f"labels.deny: {key}: usage is counted by it; labels.drop keeps it off /metrics")
    if config.source == "transcripts" and not config.transcripts:
        raise ConfigError(
            "source: transcripts alone cannot be counted while `transcripts` is false; change one of them"
        )


def _check_address(name: str, address: str) -> None:
    found = _ADDRESS.fullmatch(address)
    try:
        if found is None:
            raise ValueError
        if found[1] != "localhost":
            ipaddress.ip_address(found[1].strip("[]"))
    except ValueError:
        raise ConfigError(
            f"{name}: {address}: expected HOST:PORT with localhost or an IP address, as in localhost:4318,"
            " 192.168.1.5:4318 or [::1]:4318"
        ) from None
    if not 0 < int(found[2]) < 65_536:
        raise ConfigError(f"{name}: {address}: the port must be between 1 and 65535")


def to_toml(config: Config) -> str:
    """The settings as a config.toml with a comment a line; reading it back gives the same settings."""
    plain = msgspec.to_builtins(config)
    tables = {key: value for key, value in plain.items() if isinstance(value, dict)}
    lines = [_toml_line(key, value, key) for key, value in plain.items() if key not in tables]
    for model, prices in tables.pop("prices").items():
        lines += ["", f"[prices.{msgspec.json.encode(model).decode()}]"]
        lines += [f"{key} = {price}" for key, price in prices.items()]
    for table, members in tables.items():
        lines += ["", f"[{table}]"]
        lines += [_toml_line(key, value, f"{table}.{key}") for key, value in members.items()]
    return "\n".join(lines) + "\n"


def _toml_line(key: str, value: Any, path: str) -> str:
    # JSON's strings, numbers, booleans and arrays of them are TOML as well.
    return f"{key} = {msgspec.json.encode(value).decode()}  # {DESCRIPTIONS[path]}"


def _paths() -> dict[str, tuple[str, ...]]:
    """`BRIDGE_LIMITS_SERIES` -> ("limits", "series"), for every setting."""
    paths: dict[str, tuple[str, ...]] = {}
    for key, kind in get_type_hints(Config).items():
        if isinstance(kind, type) and issubclass(kind, Struct):
            for member in get_type_hints(kind):
                paths[f"{ENVIRONMENT_PREFIX}{key}_{member}".upper()] = (key, member)
        elif key != "prices":  # a table of tables stands in the file alone
            paths[f"{ENVIRONMENT_PREFIX}{key}".upper()] = (key,)
    return paths


def _variables(environment: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    known = _paths()
    found = {}
    for name in sorted(environment):
        if not name.startswith(ENVIRONMENT_PREFIX) or name.startswith(NOT_SETTINGS) or name == "BRIDGE_CONFIG":
            continue
        if name in TOKEN_VARIABLES:
            continue
        if name not in known:
            raise ConfigError(f"environment: unknown variable {name}{_hint(name, known)}")
        found[name] = known[name]
    return found


def _set(layered: dict[str, Any], path: tuple[str, ...], text: str) -> None:
    *tables, key = path
    for table in tables:
        layered = layered.setdefault(table, {})
    default: Any = Config()
    for part in path:
        default = getattr(default, part)
    is_list = isinstance(default, tuple)
    layered[key] = [part.strip() for part in text.split(",") if part.strip()] if is_list else text


def _check(layered: Mapping[str, Any], kind: type[Struct], where: str) -> None:
    _refuse_unknown(layered, kind, where, "")
    try:
        msgspec.convert(layered, kind, strict=False)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$.")
        key = path.rstrip("`")
        if reason.startswith("Invalid enum value"):
            expected = ", ".join(get_args(get_type_hints(kind)[key]))
            reason = f"expected one of {expected}, got {layered[key]!r}"
        raise ConfigError(f"{where}: {f'{key}: ' if key else ''}{reason[0].lower()}{reason[1:]}") from None


def _refuse_unknown(layered: Mapping[str, Any], kind: type[Struct], where: str, prefix: str) -> None:
    hints = get_type_hints(kind)
    for key, value in layered.items():
        if key not in hints:
            raise ConfigError(f"{where}: unknown setting {prefix}{key}{_hint(key, hints)}")
        member = hints[key]
        if isinstance(value, Mapping) and isinstance(member, type) and issubclass(member, Struct):
            _refuse_unknown(value, member, where, f"{prefix}{key}.")


def _hint(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"
