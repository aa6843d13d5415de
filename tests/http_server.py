"""A local HTTP server whose answers a test gives.

with HttpServer(lambda request: Reply(json={"n": 1})) as server:
    ... ask server.url("/path") ...
    assert len(server.requests) == 1
"""

import json as json_codec
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self, cast
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    method: str
    path: str
    params: Mapping[str, str]
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json_codec.loads(self.body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    body: bytes | None = None  # in place of `json`

    @property
    def content(self) -> bytes:
        if self.body is not None:
            return self.body
        return json_codec.dumps(self.json).encode()


class HttpServer(ThreadingHTTPServer):
    """Answers every request by `answer`, each connection in a thread of its own.

    `answer` may block; when it returns None the connection is closed without an answer.
    """

    daemon_threads = True

    def __init__(self, answer: Callable[[Request], Reply | None]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.requests: list[Request] = []
        self.num_connections = 0
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))

    def url(self, path: str = "/") -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def owner(self) -> HttpServer:
        return cast(HttpServer, self.server)

    def setup(self) -> None:
        super().setup()
        with self.owner.lock:
            self.owner.num_connections += 1

    def do_GET(self) -> None:
        request = self._request()
        with self.owner.lock:
            self.owner.requests.append(request)
        reply = self.owner.answer(request)
        if reply is None:
            self.close_connection = True
            return
        content = reply.content
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        try:
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:
            self.close_connection = True

    do_POST = do_GET

    def _request(self) -> Request:
        parts = urlsplit(self.path)
        return Request(
            method=self.command,
            path=parts.path,
            params={name: values[0] for name, values in parse_qs(parts.query).items()},
            headers={name.lower(): value for name, value in self.headers.items()},
            body=self.rfile.read(int(self.headers.get("Content-Length") or 0)),
        )

    def log_message(self, format: str, *args: object) -> None:
        pass
