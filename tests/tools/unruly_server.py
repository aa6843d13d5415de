"""A web server on loopback that answers each path with bytes of the test's choice."""

import socket
import ssl
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Self

# What a path sends, piece by piece; it ends when the client hangs up.
Answer = Callable[["UnrulyServer"], Iterator[bytes]]


class UnrulyServer:
    """Serves `answers`, path to what is sent, until the `with` block ends.

    `requests` holds the heads of all requests so far, `names` the server names that
    TLS clients asked for.
    """

    def __init__(
        self,
        answers: Mapping[str, Answer],
        *,
        host: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.answers = dict(answers)
        self.requests: list[str] = []
        self.names: list[str | None] = []
        self.stopped = threading.Event()
        self._tls = tls
        if tls is not None:
            tls.sni_callback = lambda _, name, __: self.names.append(name)
        self._listener = socket.create_server((host, 0))
        self.host, self.port = self._listener.getsockname()[:2]
        self._threads = [threading.Thread(target=self._accept)]

    def url(self, path: str, host: str | None = None) -> str:
        scheme = "https" if self._tls else "http"
        return f"{scheme}://{host or self.host}:{self.port}{path}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self.stopped.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(10)
            try:
                if self._tls is not None:
                    connection = self._tls.wrap_socket(connection, server_side=True)
                self._answer(connection)
            except OSError:
                pass  # the client hung up, as it should
            finally:
                connection.close()

    def _answer(self, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = connection.recv(65536)
            if not data:
                return
            head += data
        self.requests.append(head.decode("latin-1"))
        path = head.split()[1].decode("ascii")
        for piece in self.answers[path](self):
            if piece is RESET:
                # Closing with a zero linger sends a reset instead of an end.
                linger = b"\1\0\0\0\0\0\0\0"
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                return
            connection.sendall(piece)


RESET = b"(reset)"


def head(status: str = "200 OK", **headers: str) -> bytes:
    """A status line and headers; `content_type` is written Content-Type."""
    lines = [f"HTTP/1.1 {status}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def sends(*pieces: bytes) -> Answer:
    return lambda server: iter(pieces)


def page(body: bytes, content_type: str = "text/html", **headers: str) -> Answer:
    length = str(len(body))
    return sends(
        head(content_type=content_type, content_length=length, **headers), body
    )


def redirect(location: str, status: str = "302 Found") -> Answer:
    return sends(head(status, location=location, content_length="0"))


def slow_drip(server: UnrulyServer) -> Iterator[bytes]:
    """A byte now and then, so that no single read is slow."""
    yield head(content_type="text/html")
    while not server.stopped.wait(0.02):
        yield b"x"


def slow_head(server: UnrulyServer) -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\nX: "
    while not server.stopped.wait(0.02):
        yield b"x"


def silence(server: UnrulyServer) -> Iterator[bytes]:
    server.stopped.wait()
    yield b""


def endless(server: UnrulyServer) -> Iterator[bytes]:
    yield head(content_type="text/html")
    while not server.stopped.is_set():
        yield b"<p>more</p>" * 1000


def endless_head(server: UnrulyServer) -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\n"
    while not server.stopped.is_set():
        yield b"X-More: " + b"x" * 1000 + b"\r\n"


def bomb(num_bytes: int, coding: str = "gzip", wbits: int = 31) -> Answer:
    """Zeros in a thousandth of their size; 31 is gzip, 15 zlib, -15 bare deflate."""

    def answer(server: UnrulyServer) -> Iterator[bytes]:
        yield head(content_type="text/html", content_encoding=coding)
        packer = zlib.compressobj(9, wbits=wbits)
        zeros = bytes(1 << 16)
        for _ in range(num_bytes // len(zeros)):
            yield packer.compress(zeros)
        yield packer.flush()

    return answer


def endless_after_gzip(server: UnrulyServer) -> Iterator[bytes]:
    """A small gzip file and then bytes that belong to nothing."""
    yield head(content_type="text/html", content_encoding="gzip")
    packer = zlib.compressobj(wbits=31)
    yield packer.compress(b"<p>small</p>") + packer.flush()
    while not server.stopped.is_set():
        yield bytes(10_000)
