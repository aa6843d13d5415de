"""Fetching a page that a model named, from a web that owes us nothing.

1. The addresses behind a name are checked, and one of those checked is connected to:
   a name that resolves differently the second time gains nothing. Each redirect is a
   new address with the same checks.
2. Time, bytes and redirects are limited, bytes both as received and as unpacked, and
   counted while they arrive.
3. Whatever goes wrong is a `ToolError` that the model can read; it names no address
   that the model did not write itself.

No cookies, no environment proxies, no credentials; a connection serves one request.
"""

import asyncio
import re
import ssl
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import httpx2

from rllib_arpo.errors import ConfigError, ToolError, ToolTimeoutError
from rllib_arpo.tools.addresses import (
    Resolver,
    literal_address,
    may_reach,
    parse_networks,
    resolve,
)

PageKind = Literal["html", "text", "pdf"]

USER_AGENT = "Mozilla/5.0 (compatible; rllib_arpo)"
MAX_URL_CHARS = 2000
MAX_ADDRESSES = 4  # of one host, tried one after the other
BLOCK_BYTES = 4096  # received, and unpacked before the next ones count
PIECE_BYTES = 1 << 18
MAX_RATIO = 200  # of a body to what was received; text packs to a tenth or so
DEFAULT_PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
KINDS: dict[str, PageKind] = {
    "text/html": "html",
    "application/xhtml+xml": "html",
    "text/plain": "text",
    "text/markdown": "text",
    "text/csv": "text",
    "application/json": "text",
    "application/pdf": "pdf",
}
# Says nothing about the body, which then decides.
UNTYPED = ("", "application/octet-stream", "binary/octet-stream")
# Colons are in IPv6 addresses only; a zone ("%eth0") is not for the web.
_HOST = re.compile(r"[a-z0-9_.:-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchLimits:
    """What one page may take.

    Attributes:
        total_s: seconds for everything, redirects included.
        connect_s: seconds until a connection stands.
        read_s: seconds between two pieces of an answer.
        max_bytes: of the body, as received and as unpacked.
        max_redirects: followed one after the other.
    """

    total_s: float = 20.0
    connect_s: float = 5.0
    read_s: float = 10.0
    max_bytes: int = 10_000_000
    max_redirects: int = 5

    def __post_init__(self) -> None:
        for name in ("total_s", "connect_s", "read_s", "max_bytes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"`{name}` ({getattr(self, name)}) must be above 0")
        if self.max_redirects < 0:
            raise ConfigError(f"`max_redirects` ({self.max_redirects}) must be >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a server answered.

    Attributes:
        url: where it was found, after redirects.
        kind: how its text is to be read.
        charset: as the server declares it, None when it does not.
        body: unpacked bytes.
    """

    url: str
    kind: PageKind
    charset: str | None
    body: bytes


class PageFetcher:
    """Fetches public web pages; picklable, and shared by all paths.

    Args:
        limits: of one page.
        allowed_networks: networks that are not public and may be reached all the
            same, such as "10.0.0.0/8" for an intranet.
        allowed_ports: of servers.
        ca_file: PEM file of a further certificate authority, for an intranet.
        user_agent: what the fetcher calls itself.
        resolver: finds the addresses of a host.

    Raises:
        ConfigError: a network cannot be read.
    """

    def __init__(
        self,
        *,
        limits: FetchLimits = FetchLimits(),
        allowed_networks: Sequence[str] = (),
        allowed_ports: Collection[int] = (80, 443),
        ca_file: str | None = None,
        user_agent: str = USER_AGENT,
        resolver: Resolver = resolve,
    ) -> None:
        self.limits = limits
        self.allowed_networks = parse_networks(
            allowed_networks, setting="allowed_networks"
        )
        self.allowed_ports = frozenset(allowed_ports)
        self.ca_file = ca_file
        self.user_agent = user_agent
        self.resolver = resolver

    async def fetch(self, url: str) -> Page:
        """The page at an address, redirects followed.

        Raises:
            ToolError: the address is not allowed, the page is not there, not text or
                too large; retryable when its server is at fault.
            ToolTimeoutError: it took longer than the limits allow.
        """
        try:
            async with asyncio.timeout(self.limits.total_s):
                return await self._follow(url)
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise ToolTimeoutError(
                "the page took too long to load", retryable=True
            ) from error
        except httpx2.TransportError as error:
            raise ToolError(
                "the connection to the page's server broke", retryable=True
            ) from error

    async def _follow(self, address: str) -> Page:
        for hop in range(self.limits.max_redirects + 1):
            try:
                answer = await self._visit(_parse(address))
            except ToolError as error:
                if hop == 0:
                    raise
                raise ToolError(
                    f"the page redirects elsewhere: {error}", retryable=error.retryable
                ) from error
            if isinstance(answer, Page):
                return answer
            address = answer
        raise ToolError(
            f"the page redirects more than {self.limits.max_redirects} times"
        )

    async def _visit(self, url: httpx2.URL) -> Page | str:
        """The page, or the address that it redirects to."""
        for address in await self._addresses(url):
            try:
                return await self._request(url, address)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                continue
        raise ToolError("the page's server cannot be reached", retryable=True)

    async def _addresses(self, url: httpx2.URL) -> Sequence[str]:
        """Addresses of the URL's server, none of which is out of bounds."""
        port = url.port or DEFAULT_PORTS[url.scheme]
        if port not in self.allowed_ports:
            raise ToolError(f"port {port} is not allowed")
        host = _host(url)
        literal = literal_address(host)
        addresses = [literal] if literal else await self.resolver(host, port)
        for address in addresses:
            if not may_reach(address, self.allowed_networks):
                raise ToolError(
                    "the address is not allowed, only public web pages can be read"
                )
        return addresses[:MAX_ADDRESSES]

    async def _request(self, url: httpx2.URL, address: str) -> Page | str:
        limits = self.limits
        async with (
            httpx2.AsyncClient(
                verify=_tls_context(self.ca_file),
                timeout=httpx2.Timeout(limits.read_s, connect=limits.connect_s),
                trust_env=False,
            ) as client,
            client.stream(
                "GET",
                url.copy_with(host=address),
                headers={
                    "Host": url.netloc.decode("ascii"),
                    "User-Agent": self.user_agent,
                    "Accept": ", ".join(KINDS),
                    "Accept-Encoding": "gzip, deflate",
                },
                # The certificate is checked against the name, not the address.
                extensions={"sni_hostname": _host(url)},
            ) as response,
        ):
            return await self._read(url, response)

    async def _read(self, url: httpx2.URL, response: httpx2.Response) -> Page | str:
        location = response.headers.get("location")
        if response.status_code in REDIRECTS and location:
            return _join(url, location)
        if not response.is_success:
            raise _status_error(response.status_code)
        content_type = response.headers.get("content-type", "")
        media_type = content_type.partition(";")[0].strip().lower()
        if media_type not in KINDS and media_type not in UNTYPED:
            raise ToolError("the page is not text, HTML or PDF")
        body = await _read_body(response, self.limits.max_bytes)
        if not body:
            raise ToolError("the page is empty")
        return Page(
            url=str(url),
            kind=_kind(media_type, body),
            charset=response.charset_encoding,
            body=body,
        )


@lru_cache(maxsize=4)
def _tls_context(ca_file: str | None) -> ssl.SSLContext:
    """Made once: reading the authorities takes longer than many a request."""
    context = httpx2.create_ssl_context()
    if ca_file is not None:
        context.load_verify_locations(ca_file)
    return context


def _parse(address: str) -> httpx2.URL:
    text = address.strip()
    if len(text) > MAX_URL_CHARS:
        raise ToolError(f"the address is longer than {MAX_URL_CHARS} characters")
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL as error:
        raise ToolError("this is not a web address") from error
    if url.scheme not in DEFAULT_PORTS:
        raise ToolError("the address must start with http:// or https://")
    if url.userinfo:
        raise ToolError("an address with a user name or password is not allowed")
    if not _HOST.fullmatch(_host(url)):
        raise ToolError("this is not a web address")
    return url.copy_with(fragment=None)


def _host(url: httpx2.URL) -> str:
    """In ASCII, without the dot that may end a full name."""
    return url.raw_host.decode("ascii").removesuffix(".")


def _join(url: httpx2.URL, location: str) -> str:
    try:
        return str(url.join(location))
    except httpx2.InvalidURL as error:
        raise ToolError("the page redirects to what is not a web address") from error


def _status_error(status: int) -> ToolError:
    if status in (404, 410):
        return ToolError(f"there is no such page ({status})")
    phrase = httpx2.codes.get_reason_phrase(status)
    return ToolError(
        f"the page's server answered {status} {phrase}".strip(),
        retryable=status == 429 or status >= 500,
    )


async def _read_body(response: httpx2.Response, max_bytes: int) -> bytes:
    """All of the body, unpacked, given up at the first byte over the limit.

    Unpacked here rather than by the client, which counts nothing, applies several
    codings on top of each other, and goes on reading after the packed data ended. In
    blocks of one size, so that the same page is taken or refused however it arrives.
    """
    too_large = ToolError(f"the page is larger than {max_bytes:,} bytes")
    announced = response.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", "gzip", "x-gzip", "deflate", ""):
        raise ToolError("the page is packed in a way that cannot be read")
    inflate = _Inflate() if coding not in ("identity", "") else None
    body = bytearray()
    num_received = 0
    async for block in response.aiter_raw(BLOCK_BYTES):
        num_received += len(block)
        if num_received > max_bytes:
            raise too_large
        for piece in inflate(block) if inflate else (block,):
            body += piece
            if len(body) > max_bytes:
                raise too_large
            if len(body) > MAX_RATIO * num_received + PIECE_BYTES:
                raise ToolError("the page unpacks to far more than any page holds")
    return bytes(body)


class _Inflate:
    """Unpacks gzip, zlib and bare deflate, the three that servers send, in pieces."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(zlib.MAX_WBITS | 32)
        self._started = False

    def __call__(self, packed: bytes) -> Iterator[bytes]:
        while not self._stream.eof:
            piece = self._piece(packed)
            yield piece
            if len(piece) < PIECE_BYTES:
                return  # nothing is left of what was packed
            packed = self._stream.unconsumed_tail

    def _piece(self, packed: bytes) -> bytes:
        try:
            return self._stream.decompress(packed, PIECE_BYTES)
        except zlib.error as error:
            if self._started:
                raise ToolError("the page is packed wrongly") from error
            self._stream = zlib.decompressobj(-zlib.MAX_WBITS)
        finally:
            self._started = True
        return self._piece(packed)


def _kind(media_type: str, body: bytes) -> PageKind:
    """What the body is: PDF files are often sent as something else."""
    if body.startswith(b"%PDF-"):
        return "pdf"
    if media_type in KINDS:
        return KINDS[media_type]
    return "html" if body.lstrip().startswith(b"<") else "text"
