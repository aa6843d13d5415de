"""Bodies of requests: JSON and nothing else, read by one strict parser.

Python's own parser takes NaN, infinities and halves of surrogate pairs, and fails in
other ways on deep nesting and on long integers.
"""

import json
import math
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.responses import Response

from rllib_arpo.serving.api_errors import HttpError


class JsonRoute(APIRoute):
    """A route whose body, if it takes one, is JSON.

    Raises:
        HttpError: 415, the body is declared as something else.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            strict = _StrictRequest(request.scope, request.receive)
            if self.body_field is not None:
                _check_content_type(request)
                # FastAPI would hide why it cannot be read.
                await strict.body()
            return await handle(strict)

        return handler


class _StrictRequest(Request):
    async def json(self) -> Any:
        try:
            value = from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            # The one that FastAPI answers with the place.
            raise json.JSONDecodeError(str(error), "", 0) from error
        if not _finite(value):
            raise json.JSONDecodeError("a number is out of range", "", 0)
        return value


def _finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(_finite(one) for one in value.values())
    return all(_finite(one) for one in value) if isinstance(value, list) else True


def _check_content_type(request: Request) -> None:
    declared = request.headers.get("content-type", "")
    kind = declared.partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpError(
            415,
            f"the header `Content-Type` is {declared[:80]!r}; send application/json",
            code="unsupported_media_type",
        )
