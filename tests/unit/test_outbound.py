"""The guard of URLs that users name: what is refused, over real sockets and a corpus of known tricks."""

import asyncio
import gzip
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common import outbound
from services.common.outbound import Outbound, Unreachable, UrlRefused, check_address, parse_url

LOCAL = [ipaddress.ip_network("127.0.0.0/8")]
Handler = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]

PRIVATE = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "192.0.2.1", "198.18.0.1",
    "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "192.88.99.1",
    "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1", "100::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "2002:7f00:1::1",
    "2002:a00:1::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2001:0:7f00:1::", "4000::1",
]  # fmt: skip
PUBLIC = ["1.1.1.1", "8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
SPELLINGS = [
    "http://127.0.0.1/", "http://127.1/", "http://2130706433/", "http://0x7f000001/", "http://0x7f.0.0.1/",
    "http://0177.0.0.1/", "http://017700000001/", "http://127.0.0.1./", "http://[::1]/", "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/", "http://[0:0:0:0:0:0:0:1]/", "http://localhost/", "http://0/", "http://0.0.0.0/",
    "http://10.1/", "http://169.254.169.254/latest/meta-data/", "http://①②⑦.⓪.⓪.①/", "http://2852039166/",
]  # fmt: skip
UNSOUND = [
    "", "x", "//example.com/", "ftp://example.com/", "file:///etc/passwd", "gopher://127.0.0.1/", "http://",
    "http:///a", "http://user@example.com/", "http://user:pw@example.com/", "http://example.com@127.0.0.1/",
    "http://example.com:0/", "http://example.com:99999/", "http://example.com:x/", "http://exa mple.com/",
    "http://example.com\\@127.0.0.1/", "http://a\r\nHost: b/", "http://example.com/\x00", "http://[::1", "http://::1/",
    "http://[fe80::1%25eth0]/", "http://[127.0.0.1]/", "http://-a.com/", "http://a,b/", "http://%6c%6f/",
    "javascript:alert(1)", "http://a..b/", "http://.a/", "http://" + "a" * 64 + ".b/", "http://" + "a." * 127 + "/",
    "http://" + "a" * 5000, "http://example.com/" + "a" * 5000, "http://[v1.a]/",
]  # fmt: skip


@asynccontextmanager
async def server(handler: Handler, host: str = "127.0.0.1") -> AsyncIterator[int]:
    """A server on the host that hands each request's head to the handler; answers its port."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(await reader.readuntil(b"\r\n\r\n"), writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(connected, host, 0)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()
        await listening.wait_closed()


def saying(head: str, body: bytes = b"") -> Handler:
    """A handler that always says the same."""

    async def handle(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        await writer.drain()

    return handle


def never(reason: str) -> Handler:
    """A handler that must not be reached."""

    async def handle(request: bytes, writer: asyncio.StreamWriter) -> None:
        pytest.fail(reason)

    return handle


async def _read(client: Outbound, url: str) -> bytes:
    async with client.open(url) as answer:
        return b"".join([piece async for piece in answer.chunks()])


@pytest.mark.parametrize("text", PRIVATE)
def test_no_address_that_only_this_machine_reaches_passes(text: str) -> None:
    with pytest.raises(UrlRefused, match="not a public address"):
        check_address(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses_pass(text: str) -> None:
    check_address(ipaddress.ip_address(text))


def test_a_setting_may_allow_a_network() -> None:
    allowed = [ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8")]
    for text in ("10.1.2.3", "::ffff:10.1.2.3", "fd00::1"):
        check_address(ipaddress.ip_address(text), allowed)
    # The last leads, by way of 10.0.0.1, to 192.168.0.1 (RFC 4380: its bits are turned over).
    for text in ("127.0.0.1", "192.168.0.1", "fe80::1", "2001:0:a00:1:0:0:3f57:fffe"):
        with pytest.raises(UrlRefused):
            check_address(ipaddress.ip_address(text), allowed)


@pytest.mark.parametrize("url", UNSOUND)
def test_an_unsound_url_is_refused(url: str) -> None:
    with pytest.raises(UrlRefused):
        parse_url(url)


@pytest.mark.parametrize("url", SPELLINGS)
async def test_no_spelling_of_an_own_address_is_fetched(url: str) -> None:
    with pytest.raises(UrlRefused):
        await _read(Outbound(), url)


@given(st.ip_addresses(v=4), st.sampled_from(["{}", "{:#x}", "{:#o}"]))
async def test_whatever_the_form_of_a_number_the_address_decides(address: ipaddress.IPv4Address, form: str) -> None:
    text = form.format(int(address)).replace("0o", "0")
    found = {ipaddress.ip_address(one) for one in await outbound._look_up(parse_url(f"http://{text}/").host, 80)}
    assert found == {address}


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_judged_alike_however_ipv6_wraps_it(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    wrapped = [(0xFFFF << 32) | number, (0x64FF9B << 96) | number, (0x2002 << 112) | (number << 80)]
    results = set()
    for one in (address, *map(ipaddress.IPv6Address, wrapped)):
        try:
            check_address(one)
            results.add(True)
        except UrlRefused:
            results.add(False)
    assert len(results) == 1


@given(st.text() | st.text().map(lambda text: f"http://{text}") | st.from_regex(r"https?://[^/]{1,30}(/.*)?"))
def test_any_text_is_a_sound_url_or_refused(text: str) -> None:
    try:
        url = parse_url(text)
    except UrlRefused:
        return
    assert url.scheme in ("http", "https")
    assert 1 <= url.port <= 65535
    assert str(url).isascii()
    assert not set(url.host) & set("@/\\?# ")
    assert parse_url(str(url)) == url, "reading it again gives the same"


async def test_a_name_is_looked_up_once_and_all_its_addresses_must_be_public() -> None:
    calls = []

    async def changing(host: str, port: int) -> list[str]:
        calls.append(host)
        return ["127.0.0.1"] if len(calls) == 1 else ["10.0.0.1"]

    async with server(saying("HTTP/1.1 200 OK\nContent-Length: 2", b"ok")) as port:
        client = Outbound(LOCAL, changing)
        assert await _read(client, f"http://changing.example:{port}/") == b"ok"
        assert calls == ["changing.example"]
        with pytest.raises(UrlRefused, match=r"changing\.example is not a public address"):
            await _read(client, f"http://changing.example:{port}/")

    async def mixed(host: str, port: int) -> list[str]:
        return ["8.8.8.8", "192.168.0.1"]

    with pytest.raises(UrlRefused) as refusal:
        await _read(Outbound(resolve=mixed), "http://mixed.example/")
    assert str(refusal.value) == "mixed.example is not a public address", "and not which address it has inside"


async def test_redirects_are_followed_and_each_hop_is_checked() -> None:
    async with server(saying("HTTP/1.1 200 OK\nContent-Length: 2", b"ok")) as port:
        good = f"http://127.0.0.1:{port}/b?c=d"
        async with (
            server(saying(f"HTTP/1.1 307 Moved\nLocation: {good}\nContent-Length: 0")) as first,
            Outbound(LOCAL).open(f"http://127.0.0.1:{first}/a") as answer,
        ):
            assert [url.target for url in answer.hops] == ["/a", "/b?c=d"]
            assert b"".join([piece async for piece in answer.chunks()]) == b"ok"
    for bad in (
        "http://10.0.0.1/",
        "file:///etc/passwd",
        "http://169.254.169.254/",
        "http://a@b/",
        "//[::1]/",
        "",
        "http://[abc",
    ):
        async with server(saying(f"HTTP/1.1 302 Found\nLocation: {bad}\nContent-Length: 0")) as port:
            with pytest.raises(UrlRefused):
                await _read(Outbound(LOCAL), f"http://127.0.0.1:{port}/")


async def test_no_spelling_of_an_own_address_is_reached_by_a_redirect() -> None:
    only = Outbound([ipaddress.ip_network("127.0.0.7/32")])
    for bad in SPELLINGS:
        location = bad.encode("ascii", "ignore").decode() if not bad.isascii() else bad
        async with server(saying(f"HTTP/1.1 307 Moved\nLocation: {location}\nContent-Length: 0"), "127.0.0.7") as port:
            with pytest.raises(UrlRefused):
                await _read(only, f"http://127.0.0.7:{port}/")


async def test_a_long_chain_of_redirects_ends() -> None:
    seen = []

    async def again(request: bytes, writer: asyncio.StreamWriter) -> None:
        seen.append(request)
        await saying(f"HTTP/1.1 302 Found\nLocation: /{len(seen)}\nContent-Length: 0")(request, writer)

    async with server(again) as port:
        with pytest.raises(UrlRefused, match="more than 10 times"):
            await _read(Outbound(LOCAL), f"http://127.0.0.1:{port}/")
    assert len(seen) == 11


async def test_proxy_variables_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        server(never("the proxy was asked")) as proxy,
        server(saying("HTTP/1.1 200 OK\nContent-Length: 2", b"ok")) as port,
    ):
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy}")
        assert await _read(Outbound(LOCAL), f"http://127.0.0.1:{port}/") == b"ok"


async def test_compressed_content_is_refused_before_it_is_read() -> None:
    bomb = gzip.compress(bytes(10_000_000))
    head = f"HTTP/1.1 200 OK\nContent-Encoding: gzip\nContent-Length: {len(bomb)}"
    async with server(saying(head, bomb)) as port:
        with pytest.raises(UrlRefused, match="compressed"):
            await _read(Outbound(LOCAL), f"http://127.0.0.1:{port}/")


async def test_what_drips_slowly_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(outbound, "READ_SECONDS", 0.3)

    async def dripping_head(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nX: ")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    async def silent_body(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab")
        await writer.drain()
        await asyncio.sleep(5)

    for handler in (dripping_head, silent_body):
        async with server(handler) as port:
            with pytest.raises(Unreachable, match="does not answer in time"):
                await _read(Outbound(LOCAL), f"http://127.0.0.1:{port}/")


async def test_a_body_that_only_drips_is_given_up_and_not_for_the_readers_slowness(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbound, "SLOW_SECONDS", 1.0)

    async def dripping_body(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with server(dripping_body) as port:
        with pytest.raises(Unreachable, match=r"sends \d+ bytes in \d+ seconds"):
            await _read(Outbound(LOCAL), f"http://127.0.0.1:{port}/")
    async with (
        server(saying("HTTP/1.1 200 OK\nContent-Length: 200000", bytes(200_000))) as port,
        Outbound(LOCAL).open(f"http://127.0.0.1:{port}/") as answer,
    ):
        num_bytes = 0
        async for chunk in answer.chunks():
            num_bytes += len(chunk)
            await asyncio.sleep(0.1)
        assert num_bytes == 200_000


async def test_what_ends_early_or_speaks_no_http_may_be_tried_again() -> None:
    bomb = gzip.compress(bytes(1000))
    for handler in (
        saying("HTTP/1.1 200 OK\nContent-Length: 5", b"ab"),
        saying("HTTP/1.1 200 OK\nTransfer-Encoding: gzip", bomb),
        saying("SSH-2.0-x"),
        saying(""),
    ):
        async with server(handler) as port:
            with pytest.raises(Unreachable):
                await _read(Outbound(LOCAL), f"http://127.0.0.1:{port}/")
    with pytest.raises(Unreachable):
        await _read(Outbound(LOCAL), f"http://127.0.0.1:{port}/")


async def test_a_body_without_a_length_is_read_to_its_end() -> None:
    chunked = saying("HTTP/1.1 200 OK\nTransfer-Encoding: chunked", b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n")
    for handler in (chunked, saying("HTTP/1.1 200 OK", b"abc")):
        async with server(handler) as port:
            assert await _read(Outbound(LOCAL), f"http://127.0.0.1:{port}/") == b"abc"


def test_what_is_shown_of_a_url_has_no_query() -> None:
    assert parse_url("HTTPS://Example.com/a b?token=x#y").shown == "https://example.com/a%20b"
    assert str(parse_url("http://example.com:8080")) == "http://example.com:8080/"
    assert parse_url("http://bücher.example/").host == "xn--bcher-kva.example"


def test_names_are_looked_up_in_threads_of_their_own() -> None:
    ended, loop = ThreadPoolExecutor(1), asyncio.new_event_loop()
    ended.shutdown()
    loop.set_default_executor(ended)
    assert loop.run_until_complete(outbound._look_up("127.0.0.1", 80)) == ["127.0.0.1"]
    loop.close()
