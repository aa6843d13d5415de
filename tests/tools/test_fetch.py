import asyncio
import datetime
import gzip
import pickle
import random
import socket
import ssl
import tracemalloc
import zlib

import pytest

from rllib_arpo.errors import ConfigError, ToolError, ToolTimeoutError
from rllib_arpo.tools.addresses import may_reach, parse_networks
from rllib_arpo.tools.fetch import FetchLimits, Page, PageFetcher
from tests.tools.unruly_server import (
    RESET,
    Answer,
    UnrulyServer,
    bomb,
    endless,
    endless_after_gzip,
    endless_head,
    head,
    page,
    redirect,
    sends,
    silence,
    slow_drip,
    slow_head,
)

HELLO = b"<p>hello</p>"
QUICK = FetchLimits(total_s=1.0, connect_s=0.5, read_s=0.5, max_bytes=1_000_000)
PATIENT = FetchLimits(max_bytes=1_000_000)


def fetcher(server: UnrulyServer, *networks: str, **settings) -> PageFetcher:
    """One that may reach only the server, or the given networks, at its port."""
    settings.setdefault("limits", PATIENT)
    return PageFetcher(
        allowed_networks=networks or (server.host,),
        allowed_ports=(server.port, 80),
        **settings,
    )


def fetch(from_fetcher: PageFetcher, url: str) -> Page:
    return asyncio.run(from_fetcher.fetch(url))


def refusal(from_fetcher: PageFetcher, url: str, message: str) -> ToolError:
    """The error that a page is refused with, whose text matches `message`."""
    with pytest.raises(ToolError, match=message) as caught:
        fetch(from_fetcher, url)
    return caught.value


def in_chunks(body: bytes, size: int) -> Answer:
    """A packed page in HTTP chunks, each of which arrives by itself."""
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    return sends(
        head(
            content_type="text/html",
            content_encoding="deflate",
            transfer_encoding="chunked",
        ),
        *(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""]),
    )


def packed(num_blank: int, num_random: int) -> tuple[bytes, bytes]:
    """A page that packs well at its start and not at all after that; and packed."""
    blank = b" " * num_blank
    body = blank + random.Random(0).randbytes(num_random)
    packer = zlib.compressobj(9)
    start = packer.compress(blank) + packer.flush(zlib.Z_FULL_FLUSH)
    return body, start + packer.compress(body[num_blank:]) + packer.flush()


@pytest.mark.parametrize("size", [100, 5000, 1 << 20])
def test_a_page_is_taken_or_refused_however_its_bytes_arrive(size):
    # 900 kB from 1 kB, which are too much for themselves, but not with the other 3 kB.
    body, good = packed(900_000, 3000)
    # 20 MB from 20 kB, which are too much whatever comes after them.
    _, bad = packed(20_000_000, 100_000)
    answers = {"/good": in_chunks(good, size), "/bad": in_chunks(bad, size)}
    with UnrulyServer(answers) as server:
        lenient = fetcher(server, limits=FetchLimits(max_bytes=40_000_000))
        assert fetch(lenient, server.url("/good")).body == body
        refusal(lenient, server.url("/bad"), "unpacks to far more")


class FakeResolver:
    """Gives its answers one after the other, the last one for ever."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append((host, port))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def test_a_page_is_its_bytes_with_kind_and_charset():
    with UnrulyServer({"/a": page(HELLO, "text/html; charset=Latin-1")}) as server:
        found = fetch(fetcher(server), server.url("/a#part"))
    assert found == Page(
        url=server.url("/a"), kind="html", charset="latin-1", body=HELLO
    )


@pytest.mark.parametrize(
    ("content_type", "body", "kind"),
    [
        ("text/plain", b"hello", "text"),
        ("application/json", b"{}", "text"),
        ("application/xhtml+xml", HELLO, "html"),
        ("application/pdf", b"%PDF-1.7", "pdf"),
        ("text/html", b"%PDF-1.7", "pdf"),
        ("application/octet-stream", b"%PDF-1.7", "pdf"),
        ("", b"\n<html>", "html"),
        ("", b"hello", "text"),
    ],
)
def test_the_kind_comes_from_the_type_and_the_first_bytes(content_type, body, kind):
    with UnrulyServer({"/": page(body, content_type)}) as server:
        assert fetch(fetcher(server), server.url("/")).kind == kind


@pytest.mark.parametrize("content_type", ["image/png", "video/mp4", "text/css", "x"])
def test_what_is_no_text_is_refused_before_it_is_read(content_type):
    def answer(server):
        yield head(content_type=content_type)
        server.stopped.wait()

    with UnrulyServer({"/": answer}) as server:
        error = refusal(fetcher(server), server.url("/"), "not text, HTML or PDF")
    assert not error.retryable


@pytest.mark.parametrize(
    ("packed", "coding"),
    [
        (gzip.compress(HELLO), "gzip"),
        (gzip.compress(HELLO), "x-gzip"),
        (zlib.compress(HELLO), "deflate"),
        (zlib.compress(HELLO)[2:-4], "deflate"),
        (HELLO, "identity"),
    ],
)
def test_packed_pages_are_unpacked(packed, coding):
    with UnrulyServer({"/": page(packed, content_encoding=coding)}) as server:
        assert fetch(fetcher(server), server.url("/")).body == HELLO


def test_a_large_page_is_unpacked_to_its_last_byte():
    text = b"".join(b"<p>line %d</p>" % i for i in range(60_000))
    packed = gzip.compress(text)
    with UnrulyServer({"/": page(packed, content_encoding="gzip")}) as server:
        limits = FetchLimits(max_bytes=len(text))
        assert fetch(fetcher(server, limits=limits), server.url("/")).body == text


@pytest.mark.parametrize(
    ("body", "coding", "message"),
    [
        (b"not packed at all", "gzip", "packed wrongly"),
        (HELLO, "br", "packed in a way"),
        (HELLO, "zstd", "packed in a way"),
        (gzip.compress(gzip.compress(HELLO)), "gzip, gzip", "packed in a way"),
    ],
)
def test_pages_packed_in_other_ways_are_refused(body, coding, message):
    with UnrulyServer({"/": page(body, content_encoding=coding)}) as server:
        refusal(fetcher(server), server.url("/"), message)


@pytest.mark.parametrize(
    ("coding", "wbits"), [("gzip", 31), ("deflate", 15), ("deflate", -15)]
)
def test_a_bomb_of_200_mb_is_refused_within_a_few_mb_of_memory(coding, wbits):
    answers = {"/": bomb(200_000_000, coding, wbits)}
    with UnrulyServer(answers) as server:
        from_fetcher = fetcher(server, limits=FetchLimits())
        tracemalloc.start()
        try:
            refusal(from_fetcher, server.url("/"), "unpacks to far more")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 4_000_000


def test_bodies_over_the_limit_are_refused_however_they_are_sent():
    answers = {
        "/announced": page(bytes(1_000_001)),
        "/endless": endless,
        "/packed": page(
            gzip.compress(b"".join(b"%d " % i for i in range(200_000))),
            content_encoding="gzip",
        ),
        "/after-gzip": endless_after_gzip,
    }
    with UnrulyServer(answers) as server:
        for path in answers:
            error = refusal(
                fetcher(server), server.url(path), "larger than 1,000,000 bytes"
            )
            assert not error.retryable


@pytest.mark.parametrize("answer", [slow_drip, slow_head, silence])
def test_a_server_that_takes_its_time_is_given_up(answer):
    with UnrulyServer({"/": answer}) as server:
        error = refusal(
            fetcher(server, limits=QUICK), server.url("/"), "too long to load"
        )
    assert error.retryable


def test_the_deadline_counts_redirects_and_the_resolver():
    async def never(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    limits = FetchLimits(total_s=0.2)
    with pytest.raises(ToolTimeoutError):
        fetch(PageFetcher(limits=limits, resolver=never), "http://example.com/")


@pytest.mark.parametrize(
    "answer",
    [
        endless_head,
        sends(head(content_type="text/html", content_length="100"), HELLO),
        sends(head(content_type="text/html", content_length="1, 2"), HELLO),
        sends(
            head(content_type="text/html", transfer_encoding="chunked"), b"zz\r\n" * 9
        ),
        sends(head(content_type="text/html", content_length="100"), HELLO, RESET),
        sends(RESET),
        sends(),
        sends(b"\x00\xffthis is not HTTP\r\n\r\n"),
        sends(b"HTTP/1.1 abc\r\n\r\n"),
    ],
    ids=[
        "head without end",
        "body shorter than announced",
        "two lengths",
        "no chunks",
        "reset in the body",
        "reset",
        "nothing",
        "not HTTP",
        "no status",
    ],
)
def test_a_broken_answer_is_a_retryable_error(answer):
    with UnrulyServer({"/": answer}) as server:
        error = refusal(
            fetcher(server), server.url("/"), "connection to the page's server"
        )
    assert error.retryable


def test_a_body_longer_than_announced_is_cut():
    answer = sends(head(content_type="text/html", content_length="5"), b"hello there")
    with UnrulyServer({"/": answer}) as server:
        assert fetch(fetcher(server), server.url("/")).body == b"hello"


@pytest.mark.parametrize(
    ("status", "message", "retryable"),
    [
        ("404 Gone fishing", r"no such page \(404\)", False),
        ("403 x", "answered 403 Forbidden", False),
        ("429 x", "answered 429 Too Many Requests", True),
        ("500 x", "answered 500 Internal Server Error", True),
        ("503 x", "answered 503 Service Unavailable", True),
        ("799 x", "answered 799$", True),
        ("302 x", "answered 302 Found", False),
    ],
)
def test_a_status_says_whether_it_may_work_later(status, message, retryable):
    with UnrulyServer({"/": sends(head(status, content_length="0"))}) as server:
        error = refusal(fetcher(server), server.url("/"), message)
    assert error.retryable == retryable
    assert "x" not in str(error).split()


def test_an_empty_page_is_an_error():
    with UnrulyServer({"/": page(b"")}) as server:
        refusal(fetcher(server), server.url("/"), "the page is empty")


def test_redirects_are_followed_to_the_end():
    answers = {
        "/1": redirect("/2?a=b"),
        "/2?a=b": redirect("3", "308 Permanent Redirect"),
        "/3": page(HELLO),
    }
    with UnrulyServer(answers) as server:
        found = fetch(fetcher(server), server.url("/1"))
        assert (found.url, found.body) == (server.url("/3"), HELLO)


def test_a_redirect_loop_ends():
    answers = {"/a": redirect("/b"), "/b": redirect("/a")}
    with UnrulyServer(answers) as server:
        error = refusal(
            fetcher(server), server.url("/a"), "redirects more than 5 times"
        )
        assert len(server.requests) == 6
    assert not error.retryable


def test_a_redirect_to_loopback_is_refused_without_a_connection():
    with UnrulyServer({"/secret": page(HELLO)}) as inner:
        answers = {"/": redirect(inner.url("/secret"))}
        with UnrulyServer(answers, host="127.0.0.2") as outer:
            from_fetcher = PageFetcher(
                allowed_networks=("127.0.0.2/32",),
                allowed_ports=(inner.port, outer.port),
            )
            error = refusal(from_fetcher, outer.url("/"), "elsewhere: the address")
        assert inner.requests == []
    assert "127.0.0.1" not in str(error)
    assert not error.retryable


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "data:text/html,hello",
        "gopher://127.0.0.1/",
        "http://[::1]/",
        "http://user:secret@example.com/",
        "http://127.0.0.1:22/",
        "http://[",
        "//169.254.169.254/latest/meta-data",
    ],
)
def test_a_redirect_is_checked_like_an_address(location):
    with UnrulyServer({"/": redirect(location)}) as server:
        error = refusal(fetcher(server), server.url("/"), r"^the page redirects")
        assert len(server.requests) == 1
    assert not error.retryable
    assert "secret" not in str(error)


def test_the_address_that_was_checked_is_connected_to():
    """A name that is public when asked first and private after that (rebinding)."""
    with UnrulyServer({"/": page(b"inner")}) as inner:
        with UnrulyServer({"/": page(b"outer")}, host="127.0.0.2") as outer:
            resolve = FakeResolver(["127.0.0.2"], ["127.0.0.1"])
            from_fetcher = fetcher(outer, resolver=resolve)
            from_fetcher.allowed_ports |= {inner.port}
            found = fetch(from_fetcher, outer.url("/", "rebound.example"))
            assert found.body == b"outer"
            assert resolve.asked == [("rebound.example", outer.port)]
            assert f"Host: rebound.example:{outer.port}" in outer.requests[0]
            refusal(from_fetcher, inner.url("/", "rebound.example"), "not allowed")
        assert inner.requests == []


def test_a_redirect_to_a_name_that_became_private_is_refused():
    with UnrulyServer({"/": redirect("/again")}, host="127.0.0.2") as server:
        resolve = FakeResolver(["127.0.0.2"], ["10.0.0.1"])
        refusal(
            fetcher(server, resolver=resolve),
            server.url("/", "a.example"),
            "redirects elsewhere: the address is not",
        )


def test_one_private_address_among_public_ones_is_enough_to_refuse():
    with UnrulyServer({"/": page(HELLO)}) as server:
        resolve = FakeResolver(["127.0.0.1", "10.0.0.1"])
        refusal(
            fetcher(server, resolver=resolve),
            server.url("/", "a.example"),
            "not allowed",
        )
        assert server.requests == []


def test_the_next_address_is_tried_where_one_does_not_answer():
    with UnrulyServer({"/": page(HELLO)}) as server:
        resolve = FakeResolver(["127.0.0.3", "127.0.0.1"])
        from_fetcher = fetcher(server, "127.0.0.0/8", resolver=resolve)
        assert fetch(from_fetcher, server.url("/", "a.example")).body == HELLO


def test_a_server_that_is_down_is_a_retryable_error():
    with UnrulyServer({}) as server:
        url, from_fetcher = server.url("/"), fetcher(server)
    error = refusal(from_fetcher, url, "server cannot be reached")
    assert error.retryable


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "127.0.0.1.",
        "localhost",
        "localhost.",
        "LOCALHOST",
        "0.0.0.0",
        "0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "224.0.0.1",
        "255.255.255.255",
        "240.0.0.1",
        "198.18.0.1",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:a9fe:a9fe]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[64:ff9b:1::1]",
        "[2002:7f00:1::]",
        "[2001:0:7f00:1::]",
        "[fe80::1]",
        "[fc00::1]",
        "[fd00:ec2::254]",
        "[fec0::1]",
        "[ff02::1]",
        "[2001:db8::1]",
        "[100::1]",
    ],
)
def test_addresses_that_are_not_public_are_refused_however_they_are_written(host):
    message = "^the address is not allowed, only public web pages can be read$"
    error = refusal(PageFetcher(), f"http://{host}/", message)
    assert not error.retryable


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"],
)
def test_public_addresses_may_be_reached(address):
    assert may_reach(address, ())


def test_an_allowed_network_may_be_reached_in_each_way_to_write_it():
    allowed = parse_networks(["10.0.0.0/8", "fd00::/8"], setting="x")
    assert may_reach("10.1.2.3", allowed)
    assert may_reach("::ffff:10.1.2.3", allowed)
    assert may_reach("fd12::1", allowed)
    assert not may_reach("192.168.0.1", allowed)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "must start with http"),
        ("ftp://example.com/", "must start with http"),
        ("gopher://example.com/", "must start with http"),
        ("data:text/html,hello", "must start with http"),
        ("javascript:alert(1)", "must start with http"),
        ("example.com/page", "must start with http"),
        ("", "must start with http"),
        ("http://user:word@example.com/", "user name or password"),
        ("http://user@example.com/", "user name or password"),
        ("http://127.0.0.1\\@example.com/", "user name or password"),
        ("http://example.com:22/", "port 22 is not allowed"),
        ("http://example.com:65616/", "port 65616 is not allowed"),
        ("http://example.com:port/", "not a web address"),
        ("http://0177.0.0.1/", "not a web address"),
        ("http://", "not a web address"),
        ("http:///page", "not a web address"),
        ("http://[::1", "not a web address"),
        ("http://[fe80::1%25eth0]/", "not a web address"),
        ("http://exa mple.com/", "not a web address"),
        ("http://exa%6dple.com/", "not a web address"),
        ("http://example.com/\r\nX: y", "not a web address"),
        ("http://①②⑦.0.0.1/", "not a web address"),
        ("http://example.com/" + "a" * 2000, "longer than 2000"),
    ],
)
def test_what_is_not_a_public_web_address_is_refused_before_any_look_up(url, message):
    resolve = FakeResolver(["127.0.0.1"])
    error = refusal(PageFetcher(resolver=resolve), url, message)
    assert resolve.asked == []
    assert not error.retryable


@pytest.mark.parametrize(
    ("problem", "message", "retryable"),
    [
        (socket.EAI_NONAME, "no server of that name", False),
        (socket.EAI_AGAIN, "cannot be looked up at present", True),
    ],
)
def test_a_host_that_is_not_found_is_an_error(monkeypatch, problem, message, retryable):
    def look_up(*asked, **how):
        raise socket.gaierror(problem, "as on a machine without a network")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    error = refusal(PageFetcher(), "http://no-such-host.invalid/", message)
    assert error.retryable == retryable


def test_a_host_that_cannot_be_asked_for_is_an_error():
    host = "a" * 70 + ".example"  # a label has 63 characters at most
    refusal(PageFetcher(), f"http://{host}/", "no server of that name")


def test_international_names_travel_in_ascii():
    with UnrulyServer({"/%C3%A4": page(HELLO)}) as server:
        resolve = FakeResolver(["127.0.0.1"])
        from_fetcher = fetcher(server, resolver=resolve)
        found = fetch(from_fetcher, server.url("/ä", "bücher.example"))
        assert found.body == HELLO
        assert resolve.asked == [("xn--bcher-kva.example", server.port)]
        assert f"Host: xn--bcher-kva.example:{server.port}" in server.requests[0]


def test_requests_carry_no_cookies_and_go_through_no_proxy(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    answers = {
        "/": sends(
            head("302 Found", location="/b", set_cookie="a=b", content_length="0")
        ),
        "/b": page(HELLO),
    }
    with UnrulyServer(answers) as server:
        assert fetch(fetcher(server), server.url("/")).body == HELLO
        assert "cookie" not in server.requests[1].lower()


def test_ipv6_servers_can_be_reached():
    with UnrulyServer({"/": page(HELLO)}) as server:
        from_fetcher = fetcher(server)
        url = f"http://[::ffff:127.0.0.1]:{server.port}/"
        assert fetch(from_fetcher, url).body == HELLO


def self_signed(folder, name: str) -> tuple[str, ssl.SSLContext]:
    """A certificate file and a server's context for it."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    today = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "certificate.pem"
    pem = serialization.Encoding.PEM
    file.write_bytes(
        key.private_bytes(
            pem,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(pem)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return str(file), context


def test_certificates_are_checked_against_the_name_not_the_address(tmp_path):
    ca_file, tls = self_signed(tmp_path, "pages.example")
    with UnrulyServer({"/": page(HELLO)}, tls=tls) as server:
        settings = {"resolver": FakeResolver(["127.0.0.1"]), "ca_file": ca_file}
        from_fetcher = fetcher(server, **settings)
        found = fetch(from_fetcher, server.url("/", "pages.example"))
        assert found.body == HELLO
        assert server.names == ["pages.example"]
        for host in ("other.example", "127.0.0.1"):
            refusal(from_fetcher, server.url("/", host), "cannot be reached")
        settings["ca_file"] = None
        refusal(
            fetcher(server, **settings),
            server.url("/", "pages.example"),
            "cannot be reached",
        )


def test_a_fetcher_travels_to_other_processes():
    with UnrulyServer({"/": page(HELLO)}) as server:
        copy = pickle.loads(pickle.dumps(fetcher(server)))
        assert fetch(copy, server.url("/")).body == HELLO


def test_many_pages_are_fetched_at_once_and_in_many_loops():
    async def fetch_all(server: UnrulyServer, from_fetcher: PageFetcher) -> list[Page]:
        calls = (from_fetcher.fetch(server.url("/")) for _ in range(20))
        return await asyncio.gather(*calls)

    with UnrulyServer({"/": page(HELLO)}) as server:
        from_fetcher = fetcher(server)
        for _ in range(2):
            pages = asyncio.run(fetch_all(server, from_fetcher))
            assert [found.body for found in pages] == [HELLO] * 20


@pytest.mark.parametrize(
    "make",
    [
        lambda: FetchLimits(total_s=0),
        lambda: FetchLimits(max_bytes=0),
        lambda: FetchLimits(max_redirects=-1),
        lambda: PageFetcher(allowed_networks=("10.0.0.1/8",)),
        lambda: PageFetcher(allowed_networks=("localhost",)),
    ],
)
def test_settings_that_cannot_work_are_refused(make):
    with pytest.raises(ConfigError):
        make()
