"""An object store on loopback that speaks as much of S3 as reading takes."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bucket"


@contextmanager
def s3_server(objects: Mapping[str, bytes]) -> Iterator[str]:
    """Serve `objects` by their keys; yields the query of a URI that leads there."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            url = urlsplit(self.path)
            _, bucket, *key = url.path.split("/", 2)
            query = parse_qs(url.query)
            if bucket != BUCKET:
                self.reply(404, b"", with_body)
            elif not key or not key[0]:
                prefix = query.get("prefix", [""])[0]
                self.reply(200, listing(objects, prefix), with_body)
            elif key[0] not in objects:
                self.reply(404, b"", with_body)
            else:
                self.reply(200, objects[key[0]], with_body)

        def reply(self, status: int, body: bytes, with_body: bool) -> None:
            span = self.headers.get("Range", "")
            whole = len(body)
            first, last = 0, whole - 1
            if span:
                start, _, end = span.removeprefix("bytes=").partition("-")
                first, last = int(start), min(int(end or last), last)
                body, status = body[first : last + 1], 206
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            if span:
                self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        host, port = server.server_address[:2]
        try:
            yield f"?scheme=http&region=us-east-1&endpoint_override={host}:{port}"
        finally:
            server.shutdown()
            thread.join()


def listing(objects: Mapping[str, bytes], prefix: str) -> bytes:
    contents = "".join(
        f"<Contents><Key>{escape(key)}</Key><Size>{len(body)}</Size>"
        "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
        for key, body in sorted(objects.items())
        if key.startswith(prefix)
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult>'
        f"<Name>{BUCKET}</Name><IsTruncated>false</IsTruncated>{contents}"
        "</ListBucketResult>"
    ).encode()
