"""Settings: layers, types, errors that say what to do, and a file that reads back as it was shown."""

import os
import ssl
import tomllib
from typing import Any

import pytest

from bridge import cli
from bridge.config import DESCRIPTIONS, Config, ConfigError, Limits, load, to_toml


def settings(file: str = "", environment: dict[str, str] | None = None, **flags: Any) -> Config:
    return load(file, environment or {}, flags, "config.toml")


def test_defaults() -> None:
    assert settings() == Config()


def test_flags_win_over_environment_over_file() -> None:
    file = 'listen = ["localhost:1"]\nlog_level = "debug"\nlog_format = "json"'
    environment = {"BRIDGE_LISTEN": "localhost:2, 127.0.0.1:3", "BRIDGE_LOG_LEVEL": "error"}
    config = settings(file, environment, listen=["localhost:4"])
    assert (config.listen, config.log_level, config.log_format) == (("localhost:4",), "error", "json")
    assert settings(file, environment).listen == ("localhost:2", "127.0.0.1:3")


def test_members_of_tables_by_environment() -> None:
    environment = {
        "BRIDGE_LIMITS_SERIES": "77",
        "BRIDGE_LIMITS_BODY_SECONDS": "2.5",
        "BRIDGE_LABELS_DROP": "session.id,user.id",
        "BRIDGE_LABELS_SCOPE": "true",
    }
    config = settings("[limits]\nseries = 5\nconnections = 64", environment)
    assert config.limits == Limits(series=77, body_seconds=2.5, connections=64)
    assert config.labels.drop == ("session.id", "user.id")
    assert config.labels.scope


@pytest.mark.parametrize(
    ("file", "environment", "words"),
    [
        ("listn = 1", {}, ["config.toml: unknown setting listn", "did you mean listen?"]),
        ("[limits]\nserie = 1", {}, ["unknown setting limits.serie", "did you mean series?"]),
        ("[limits]\nseries = 0", {}, ["config.toml: limits.series: expected `int` >= 1"]),
        ('log_level = "loud"', {}, ["log_level: expected one of debug, info, warning, error, got 'loud'"]),
        ("", {"BRIDGE_SOURCE": "all"}, ["BRIDGE_SOURCE: source: expected one of auto, otlp, transcripts, got 'all'"]),
        ('names = "x"', {}, ["config.toml: names: expected one of UnderscoreEscapingWithSuffixes, "]),
        ("retention_days = [1]", {}, ["config.toml: retention_days: expected `float`, got `array`"]),
        ("listen = ", {}, ["config.toml: Invalid value (at "]),
        ("", {"BRIDGE_LISTNE": "x"}, ["environment: unknown variable BRIDGE_LISTNE", "did you mean BRIDGE_LISTEN?"]),
        ("", {"BRIDGE_LIMITS_SERIES": "many"}, ["BRIDGE_LIMITS_SERIES: limits.series: expected `int`, got `str`"]),
        ("zzz = 1", {}, ["unknown setting zzz", "known are"]),
        ("listen = []", {}, ["listen: at least one address"]),
        ("", {"BRIDGE_LISTEN": "foo"}, ["listen: foo: expected HOST:PORT with localhost or an IP"]),
        ('listen = ["bridge.example:4318"]', {}, ["listen: bridge.example:4318", "192.168.1.5:4318"]),
        ('listen_ingest = ["1.2.3:4318"]', {}, ["listen_ingest: 1.2.3:4318: expected"]),
        ('listen_read = ["localhost:4318"]', {}, ["listen: localhost:4318 stands there twice"]),
        ('trusted_proxies = ["10.0.0.1/8"]', {}, ["trusted_proxies: 10.0.0.1/8 has host bits set"]),
        ('[tls]\ncert = "a.pem"', {}, ["tls: cert and key belong together"]),
        ("", {"BRIDGE_TOKEN_FIEL": "x"}, ["unknown variable BRIDGE_TOKEN_FIEL", "BRIDGE_TOKEN_FILE?"]),
        ('hosts = ["http://x/"]', {}, ["hosts: http://x/: expected the name alone"]),
        ('hosts = ["x:4318"]', {}, ["hosts: x:4318: expected the name alone"]),
        ('listen = ["localhost:99999"]', {}, ["listen: localhost:99999: the port must be between"]),
        ('labels.deny = ["user.id", "model"]', {}, ["labels.deny: model: usage is counted by it", "labels.drop"]),
        ('source = "transcripts"\ntranscripts = false', {}, ["source: transcripts alone", "change one of them"]),
    ],
)
def test_errors_say_where_and_what(file: str, environment: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        settings(file, environment)
    for word in words:
        assert word in str(error.value)


def test_what_is_shown_reads_back_equal() -> None:
    config = settings(
        'listen = ["[::1]:5"]\nhosts = ["a.example"]\n[labels]\nhash = ["user.email"]\n[limits]\nseries = 9'
    )
    shown = to_toml(config)
    assert load(shown, {}, {}, "shown") == config
    names = {"labels", "limits", "tls"} | {key for key in DESCRIPTIONS if "." not in key}
    assert set(tomllib.loads(shown)) == names - {"prices"}
    priced = settings('[prices."my-model"]\ninput = 1.5\noutput = 3')
    assert load(to_toml(priced), {}, {}, "shown") == priced


def test_no_authority_is_trusted_while_the_daemon_is_loaded_and_the_environment_is_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "mine.pem")
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    before = dict(os.environ)
    with cli._trusting_nobody():
        assert ssl.create_default_context().cert_store_stats()["x509"] == 0
    assert dict(os.environ) == before
