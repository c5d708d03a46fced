"""Who a request is from, and whether it may come in now.

Law: a connection to a loopback address is of this machine and free, unless `loopback_token` is set or a proxy has
forwarded it; any other needs a token, before its body is read. What a request says about where it comes from counts
only if a trusted proxy says it. A token, or an address without one, has its own allowance, so that nobody who floods
takes that of others.
"""

import asyncio
import ipaddress
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import NamedTuple

from bridge.config import Config
from bridge.tokens import Tokens

FAILURES = 10
"""Wrong tokens of an address in a minute."""
MAX_CALLERS = 1_000
"""Addresses or tokens whose allowance is remembered; the one that came longest ago is forgotten."""
FORWARDED = ("X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP", "Forwarded")


class Caller(NamedTuple):
    """Who is asking: the address, and the name of the token; empty where none is needed. `is_local`: this machine."""

    address: str
    source: str
    is_local: bool

    @property
    def name(self) -> str:
        """What fairness is about: the token, without one the address."""
        return self.source or self.address


class Denial(NamedTuple):
    """Why a request may not come in: an HTTP status, what to do, and what it lacks: a `token` or `allowance`."""

    code: int
    message: str
    reason: str


class Allowances:
    """So many a second for each of a bounded number of names, and `burst` at once."""

    def __init__(self, per_second: float, burst: float, clock: Callable[[], float]) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str) -> bool:
        """Take one, if there is one."""
        now = self._clock()
        left, at = self._left.pop(name, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._per_second)
        is_left = left >= 1
        self._left[name] = (left - is_left, now)
        if len(self._left) > MAX_CALLERS:
            self._left.popitem(last=False)
        return is_left


class Turns:
    """So many at a time for each name; the others of this name wait, and those of other names do not notice."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._counted: dict[str, tuple[int, asyncio.Semaphore]] = {}

    @asynccontextmanager
    async def turn(self, name: str, seconds: float) -> AsyncIterator[None]:
        """Wait for a turn, but not longer than `seconds`: TimeoutError."""
        count, turns = self._counted.get(name) or (0, asyncio.Semaphore(self._most))
        self._counted[name] = (count + 1, turns)
        try:
            async with asyncio.timeout(seconds):
                await turns.acquire()
            try:
                yield
            finally:
                turns.release()
        finally:
            count, _ = self._counted.pop(name)
            if count > 1:
                self._counted[name] = (count - 1, turns)


class Access:
    """Decides who comes in. `clock` gives seconds."""

    def __init__(self, config: Config, tokens: Tokens, clock: Callable[[], float]) -> None:
        self._tokens = tokens
        self._takes_all = config.insecure_no_auth
        self._needs_token_locally = config.loopback_token
        self._proxies = tuple(ipaddress.ip_network(text) for text in config.trusted_proxies)
        rate = config.limits.requests_per_second
        self._requests = Allowances(rate, 2 * rate, clock)
        self._failures = Allowances(FAILURES / 60, FAILURES, clock)

    @property
    def names_sources(self) -> bool:
        """Whether there are tokens, so that `source` is ours to set."""
        return bool(self._tokens)

    def is_proxy(self, address: str) -> bool:
        """Whether a peer's word about whom it speaks for counts."""
        if not self._proxies:
            return False
        try:
            found = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return False
        return any(found in network for network in self._proxies)

    def caller(self, peer: str, local: str, headers: Mapping[str, str], *, is_open: bool) -> Caller | Denial:
        """Who asks from the address `peer` on our address `local`, or why it may not. `is_open`: no token is needed
        for what is asked."""
        is_forwarded = any(name in headers for name in FORWARDED)
        is_local = is_loopback(local) and not is_forwarded
        address = self._origin(peer, headers.get("X-Forwarded-For", "")) if self.is_proxy(peer) else peer
        scheme, _, secret = headers.get("Authorization", "").strip().partition(" ")
        source = (self._tokens and scheme.lower() == "bearer" and self._tokens.find(secret.strip())) or ""
        needs_token = self._needs_token_locally if is_local else bool(self._tokens) or not is_loopback(local)
        if needs_token and not source and not is_open and not self._takes_all:
            return self._denied(address, is_absent=not secret)
        caller = Caller(address, source, is_local)
        if (source or not is_local) and not self._requests.take(caller.name):
            return Denial(429, "too many requests; slow down, or have limits.requests_per_second raised", "allowance")
        return caller

    def _denied(self, address: str, *, is_absent: bool) -> Denial:
        if not self._failures.take(address):
            return Denial(429, "too many requests with a wrong token; try again in a minute", "token")
        what = "a token is needed" if is_absent else "this token is not known"
        return Denial(
            401, f"{what}; set OTEL_EXPORTER_OTLP_HEADERS=Authorization=Bearer%20TOKEN in the client, and ask whoever"
            " runs this bridge for one (claude-otel-bridge token NAME)", "token",
        )  # fmt: skip

    def _origin(self, peer: str, forwarded: str) -> str:
        """The last address of X-Forwarded-For that is no trusted proxy; what stands before it may be made up."""
        for address in reversed([part.strip() for part in forwarded.split(",") if part.strip()]):
            if not self.is_proxy(address):
                return address[:64]
        return peer


@lru_cache(1024)
def is_loopback(address: str) -> bool:
    """Whether an address is one of this machine's own, which nobody else can reach."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return found.is_loopback or bool(getattr(found, "ipv4_mapped", None) and found.ipv4_mapped.is_loopback)  # type: ignore[union-attr]  # only IPv6 has it
