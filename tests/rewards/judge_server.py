"""A local endpoint that speaks OpenAI's chat completions, for tests."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """One answer of the endpoint; `text` None sends `body` as it is."""

    text: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""
    content_type: str = "application/json"
    finish_reason: str = "stop"

    def encoded(self) -> bytes:
        if self.text is None:
            return self.body.encode()
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self.text},
            "finish_reason": self.finish_reason,
        }
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        completion = {
            "id": "c",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }
        return json.dumps(completion).encode()


class Endpoint:
    """Answers with what `reply_to` says of each request, and remembers them all."""

    def __init__(self, reply_to: Callable[[dict[str, Any]], Reply]) -> None:
        self.reply_to = reply_to
        self.base_url = ""
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []


def verdicts(*replies: Reply | str) -> Callable[[dict[str, Any]], Reply]:
    """The given replies in order, the last one for ever."""
    left = [Reply(reply) if isinstance(reply, str) else reply for reply in replies]
    lock = threading.Lock()

    def reply_to(_: dict[str, Any]) -> Reply:
        with lock:
            return left.pop(0) if len(left) > 1 else left[0]

    return reply_to


@contextmanager
def endpoint(reply_to: Callable[[dict[str, Any]], Reply]) -> Iterator[Endpoint]:
    """The endpoint at a free port of this machine."""
    served = Endpoint(reply_to)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            request = json.loads(self.rfile.read(length))
            served.requests.append(request | {"path": self.path})
            served.keys.append(self.headers["Authorization"])
            reply = served.reply_to(request)
            body = reply.encoded()
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.content_type)
            self.send_header("Content-Length", str(len(body)))
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    served.base_url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
