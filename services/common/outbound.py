"""Requests to URLs that users name, and where those may not lead.

A user's URL must not reach what only this machine can: the loopback, private networks, the cloud's metadata. So each
URL is read once, here; its host is looked up once; every address found must be public (or in a network that a setting
allows), and the connection goes to an address that was looked at, not to the name again. Redirects are followed by
hand, each hop anew. Proxy variables play no part, and nothing is ever unpacked: a compressed answer is refused.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import httpcore
import structlog

from services.common.errors import InvalidArgument, Unavailable

log = structlog.get_logger()

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
# Of their own: where nobody answers for names, each waits for a minute, and would hold up whatever else uses threads.
_LOOK_UPS = ThreadPoolExecutor(8, thread_name_prefix="look-up")

MAX_URL_LENGTH = 4096
MAX_REDIRECTS = 10
CONNECT_SECONDS = 10.0
HEAD_SECONDS = 30.0  # for all of an answer's head, however slowly it drips
READ_SECONDS = 30.0  # between two pieces of a body
SLOW_SECONDS = 60.0  # of waiting for a body, in which it must have brought SLOW_BYTES
SLOW_BYTES = 1_000_000
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*\.?")
_SAFE = "".join(chr(code) for code in range(0x21, 0x7F))
# Special networks that `is_global` of some Python versions lets pass, and the public address of a metadata server.
_SPECIAL = [
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "240.0.0.0/4"),
        *("168.63.129.16/32", "2001::/23", "2001:db8::/32", "3fff::/20"),
    )
]
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_IPV4_COMPATIBLE = ipaddress.ip_network("::/96")


class UrlRefused(InvalidArgument):
    """The URL, or what it leads to, is none that may be fetched."""


class Unreachable(Unavailable):
    """The other side does not answer as it should, which may pass."""


@dataclass(frozen=True)
class Url:
    """A URL that was read once. `host` is ASCII, IPv6 without brackets; `target` is path and query."""

    scheme: str
    host: str
    port: int
    target: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.target}"

    @property
    def path(self) -> str:
        """The path alone, still percent-encoded."""
        return self.target.partition("?")[0]

    @property
    def shown(self) -> str:
        """The URL without its query, which may hold a key."""
        return str(self).partition("?")[0]


def parse_url(text: str) -> Url:
    """Reads a URL.

    Raises:
        UrlRefused: it is not one of http or https, or names a user, or is not sound.
    """
    text = text.strip()
    if len(text) > MAX_URL_LENGTH:
        raise UrlRefused(f"a URL of {len(text)} characters is too long, {MAX_URL_LENGTH} are allowed")
    if re.search(r"[\x00-\x1f\x7f\\]", text):
        raise UrlRefused("a URL cannot have control characters or backslashes")
    try:
        parts = urlsplit(text)
        scheme, port, host = parts.scheme.lower(), parts.port, parts.hostname or ""
    except ValueError as error:
        raise UrlRefused(f"{text[:80]} is no URL: {error}") from None
    if scheme not in _PORTS:
        raise UrlRefused(f'only http and https URLs can be fetched, not "{text[:80]}"')
    if "@" in parts.netloc:
        raise UrlRefused("a URL with a user's name or password is not fetched")
    if port == 0:
        raise UrlRefused("there is no port 0")
    path = quote(parts.path or "/", safe=_SAFE)
    target = path + (f"?{quote(parts.query, safe=_SAFE)}" if parts.query else "")
    return Url(scheme, _host(host, in_brackets="[" in parts.netloc), port or _PORTS[scheme], target)


def check_address(address: Address, allowed: Sequence[Network] = ()) -> None:
    """Lets public unicast addresses pass, and those in the allowed networks.

    Raises:
        UrlRefused.
    """
    for one in _embedded(address) or [address]:
        is_allowed = any(one.version == network.version and one in network for network in allowed)
        if not is_allowed and not _is_public(one):
            raise UrlRefused(f"{address} is not a public address")


class Outbound:
    """Fetches what users name. `resolve(host, port)` answers the addresses of a host."""

    def __init__(self, allowed: Iterable[Network] = (), resolve: Resolve | None = None) -> None:
        self._guard = _Guard(list(allowed), resolve or _look_up)
        self._ssl = ssl.create_default_context()

    @asynccontextmanager
    async def open(
        self,
        url: str,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        max_redirects: int = MAX_REDIRECTS,
    ) -> AsyncIterator[Answer]:
        """Sends a request and answers the head of what comes back; its body is read during the block.

        Raises:
            UrlRefused: the URL or one that it redirects to. Unreachable: the other side does not answer.
        """
        sent = {"Accept-Encoding": "identity", "User-Agent": "esd", **(headers or {})}
        at = parse_url(url)
        hops = [at]
        async with AsyncExitStack() as stack:
            with _worded(at):
                pool = await stack.enter_async_context(
                    httpcore.AsyncConnectionPool(self._ssl, network_backend=self._guard, max_keepalive_connections=0)
                )
            while True:
                hop = await stack.enter_async_context(AsyncExitStack())
                with _worded(at):
                    async with asyncio.timeout(HEAD_SECONDS):
                        response = await hop.enter_async_context(_stream(pool, method, at, sent, content))
                if response.status not in _REDIRECTS:
                    break
                await hop.aclose()
                if len(hops) > max_redirects:
                    raise UrlRefused(f"{hops[0].shown} redirects more than {max_redirects} times")
                location = dict(_named(response)).get("location")
                if not location:
                    raise UrlRefused(f"{at.shown} redirects to nowhere")
                at = _next(at, location)
                hops.append(at)
            answer = Answer(response.status, dict(_named(response)), hops, response)
            if answer.headers.get("content-encoding", "identity").lower() != "identity":
                raise UrlRefused(f"{at.shown} sends compressed content, which is not unpacked here")
            yield answer


@dataclass(frozen=True)
class Answer:
    """What came back. The names of `headers` are in lower case; `hops` are the URLs asked, the last one answered."""

    status: int
    headers: dict[str, str]
    hops: list[Url]
    _response: httpcore.Response

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body in pieces, as they come.

        Raises:
            Unreachable: it ended too early, paused too long or only drips.
        """
        pieces = self._response.aiter_stream().__aiter__()
        waited_seconds, num_bytes = 0.0, 0
        while True:
            began = time.monotonic()
            with _worded(self.hops[-1]):
                try:
                    piece = await pieces.__anext__()
                except StopAsyncIteration:
                    return
            waited_seconds, num_bytes = waited_seconds + time.monotonic() - began, num_bytes + len(piece)
            if waited_seconds > SLOW_SECONDS:
                if num_bytes < SLOW_BYTES:
                    raise Unreachable(f"{self.hops[-1].shown} sends {num_bytes} bytes in {waited_seconds:.0f} seconds")
                waited_seconds, num_bytes = 0.0, 0
            yield piece


class _Guard(httpcore.AsyncNetworkBackend):
    """Looks a host up once, checks all its addresses and connects to one of those."""

    def __init__(self, allowed: list[Network], resolve: Resolve) -> None:
        self._allowed = allowed
        self._resolve = resolve
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connects to a host that may be reached."""
        addresses = [ipaddress.ip_address(text) for text in await self._resolve(host, port)]
        try:
            for address in addresses:
                check_address(address, self._allowed)
        except UrlRefused as refusal:  # nobody is to learn here which address a name has inside
            log.warning("a URL is refused", host=host, reason=str(refusal))
            raise UrlRefused(f"{host} is not a public address") from None
        for address in dict.fromkeys(addresses):
            try:
                return await self._backend.connect_tcp(str(address), port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        raise httpcore.ConnectError(f"no address of {host} answers")

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.AsyncNetworkStream:
        """Never."""
        raise UrlRefused("a URL cannot lead to a socket of this machine")

    async def sleep(self, seconds: float) -> None:
        """Waits."""
        await asyncio.sleep(seconds)


class _worded:  # noqa: N801 - reads as the word it is: `with _worded(url):`
    """Turns what goes wrong below into words about the URL."""

    def __init__(self, url: Url) -> None:
        self._url = url

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, httpcore.TimeoutException | TimeoutError):
            raise Unreachable(f"{self._url.shown} does not answer in time") from None
        if isinstance(error, httpcore.NetworkError | httpcore.ProtocolError | OSError):
            raise Unreachable(f"{self._url.shown} does not answer as it should: {error}") from None


def _stream(pool: httpcore.AsyncConnectionPool, method: str, url: Url, headers: dict[str, str], body: Any) -> Any:
    known = httpcore.URL(scheme=url.scheme.encode(), host=url.host.encode(), port=url.port, target=url.target.encode())
    seconds = {"connect": CONNECT_SECONDS, "read": READ_SECONDS, "write": READ_SECONDS, "pool": CONNECT_SECONDS}
    host = str(url).removeprefix(f"{url.scheme}://").partition("/")[0]
    named = [("Host", host), *headers.items()]
    return pool.stream(method, known, headers=named, content=body, extensions={"timeout": seconds})


def _named(response: httpcore.Response) -> list[tuple[str, str]]:
    return [(name.decode("ascii").lower(), value.decode("latin-1")) for name, value in response.headers]


def _next(at: Url, location: str) -> Url:
    """Where a redirect leads.

    Raises:
        UrlRefused: to nothing that is a URL.
    """
    try:
        return parse_url(urljoin(str(at), location))
    except ValueError:
        raise UrlRefused(f"{at.shown} redirects to what is no URL") from None


async def _look_up(host: str, port: int) -> list[str]:
    try:
        look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(_LOOK_UPS, look_up)
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise
        raise UrlRefused(f"there is no host {host}") from None
    except UnicodeError:  # of Python's own reading of names
        raise UrlRefused(f"there is no host {host}") from None
    return [str(address[0]) for *_, address in found]


def _host(host: str, in_brackets: bool) -> str:
    if in_brackets:
        try:
            if "%" in host:
                raise ValueError
            return str(ipaddress.IPv6Address(host))
        except ValueError:
            raise UrlRefused(f"[{host[:80]}] is no address") from None
    try:
        encoded = host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        encoded = ""
    if not _HOST.fullmatch(encoded):
        raise UrlRefused(f'"{host[:80]}" is no host')
    return encoded


def _embedded(address: Address) -> list[Address]:
    """The IPv4 addresses that an IPv6 one leads to."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    if address.ipv4_mapped:
        return [address.ipv4_mapped]
    if address.sixtofour:
        return [address.sixtofour]
    if address.teredo:
        return list(address.teredo)
    if address in _NAT64 or (address in _IPV4_COMPATIBLE and int(address) > 1):
        return [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)]
    return []


def _is_public(address: Address) -> bool:
    if any(one.version == address.version and address in one for one in _SPECIAL):
        return False
    if isinstance(address, ipaddress.IPv6Address) and address not in _GLOBAL_UNICAST:
        return False
    return address.is_global and not address.is_multicast
