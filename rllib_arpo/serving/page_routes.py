"""The page to try an agent in a browser, and what browsers may do with it."""

import mimetypes
from pathlib import Path

from fastapi import APIRouter
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PLAYGROUND = Path(__file__).parent / "playground"
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class SecurityHeaders:
    """ASGI middleware: tells browsers to run nothing but the server's own files."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        await self._app(scope, receive, with_headers)


def page_routes() -> APIRouter:
    """`/` and `/playground/{file}`."""
    router = APIRouter(include_in_schema=False)
    # Only what lies there at the start can be asked for: no path is put together.
    files = {one.name: one for one in PLAYGROUND.glob("*") if one.is_file()}

    @router.get("/")
    async def page() -> FileResponse:
        return await playground("index.html")

    @router.get("/playground/{file}")
    async def playground(file: str) -> FileResponse:
        if file not in files:
            raise HTTPException(404)
        kind = mimetypes.guess_type(file)[0] or "application/octet-stream"
        return FileResponse(
            files[file], media_type=kind, headers={"Cache-Control": "no-cache"}
        )

    return router
