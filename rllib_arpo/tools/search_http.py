"""Search by a service over HTTP, in the wire formats of `search_apis.py`.

1. Every failure of the service (no answer, 429, 5xx, a refused key, an answer of
   another shape) counts as the tool's, not as the model's: `ToolError(retryable=True)`.
   The environment retries; nothing is retried here.
2. A service that says when to come back (Retry-After) is left alone until then.
3. Keys come from environment variables, are read where they are used, and stand in no
   setting, pickle, log or message.
"""

import asyncio
import json
import logging
import os
import ssl
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import httpx2

from rllib_arpo.errors import ConfigError, ToolError
from rllib_arpo.tools.search import Document
from rllib_arpo.tools.search_apis import APIS, Locale

MAX_RESPONSE_BYTES = 4 << 20
# A service that asks for more is asked again all the same, and refuses again.
MAX_PAUSE_S = 60.0

logger = logging.getLogger(__name__)


def search_backend(name: str, **settings: Any) -> "HTTPSearch":
    """A backend by its name; `settings` are those of `HTTPSearch`.

    Raises:
        ConfigError: there is no such backend or setting, or its key is missing.
    """
    try:
        return HTTPSearch(name, **settings)
    except TypeError as error:
        raise ConfigError(f"settings of search backend {name!r}: {error}") from error


class HTTPSearch:
    """A `SearchBackend` that asks a service; picklable, without its key.

    Args:
        name: one of `APIS`.
        endpoint: address of the service, in place of its usual one.
        country: two letters, for services that know countries.
        language: two letters.
        key_from: environment variable with the key, in place of the usual one.
        timeout_s: seconds for one request.
        max_concurrent: requests at once, of one event loop.
        max_per_s: requests a second, of one event loop; None for no limit.
        trust_env: whether proxies of the environment are used.

    Raises:
        ConfigError: there is no such service, a value cannot work, or the variable
            with the key is not set.
    """

    def __init__(
        self,
        name: str,
        *,
        endpoint: str | None = None,
        country: str | None = None,
        language: str | None = None,
        key_from: str | None = None,
        timeout_s: float = 10.0,
        max_concurrent: int = 16,
        max_per_s: float | None = None,
        trust_env: bool = False,
    ) -> None:
        if name not in APIS:
            raise ConfigError(f"`search` ({name!r}) must be one of {list(APIS)}")
        self.name = name
        self.endpoint = endpoint or APIS[name].endpoint or ""
        if urlsplit(self.endpoint).scheme not in ("http", "https"):
            raise ConfigError(
                f"search backend {name!r} needs `endpoint`, an address that begins "
                f"with http:// or https:// ({self.endpoint!r})"
            )
        for setting, value in (
            ("timeout_s", timeout_s),
            ("max_concurrent", max_concurrent),
            ("max_per_s", max_per_s),
        ):
            if value is not None and value <= 0:
                raise ConfigError(f"`{setting}` ({value}) must be above 0")
        self.locale = Locale(country=country, language=language)
        self.key_variable = key_from or APIS[name].key_variable
        self.timeout_s = timeout_s
        self.max_concurrent = max_concurrent
        self.max_per_s = max_per_s
        self.trust_env = trust_env
        self._connections: WeakKeyDictionary[Any, _Connection] = WeakKeyDictionary()
        self._headers()  # a missing key is told before work starts

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_connections": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._connections = WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"HTTPSearch({self.name!r}, version={self.version!r})"

    @property
    def version(self) -> str:
        """Of whatever changes the results: where is asked, and for which place."""
        address = urlsplit(self.endpoint)
        return json.dumps(
            [
                f"{address.hostname}:{address.port}{address.path}",
                self.locale.country,
                self.locale.language,
            ]
        )

    async def search(self, query: str, top_k: int) -> list[Document]:
        """The service's first documents.

        Raises:
            ToolError: the service failed (retryable), or refused the query.
        """
        api = APIS[self.name]
        request = api.request(query, top_k, self.locale)
        answer = await self._connection().send(
            request.method,
            self.endpoint,
            params=dict(request.params),
            json=request.body,
            headers=self._headers(),
        )
        try:
            return list(api.documents(answer))[:top_k]
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise self._outage("its answer has another shape") from error

    def _headers(self) -> dict[str, str]:
        header = APIS[self.name].key_header
        if header is None or self.key_variable is None:
            return {}
        key = os.environ.get(self.key_variable, "")
        if not key:
            raise ConfigError(
                f"search backend {self.name!r} needs a key: set the environment "
                f"variable {self.key_variable}, on every machine that samples"
            )
        return {header: key}

    def _connection(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        connection = self._connections.get(loop)
        if connection is None or connection.pid != os.getpid():
            connection = self._connections[loop] = _Connection(self)
        return connection

    def _outage(self, reason: str) -> ToolError:
        return ToolError(f"the search service failed: {reason}", retryable=True)


class _Connection:
    """The client of one event loop, and when it may ask again."""

    def __init__(self, backend: HTTPSearch) -> None:
        self.pid = os.getpid()
        self._backend = backend
        self._slots = asyncio.Semaphore(backend.max_concurrent)
        self._interval_s = 1 / backend.max_per_s if backend.max_per_s else 0.0
        self._next_at = 0.0

    async def send(self, method: str, url: str, **request: Any) -> Any:
        """The parsed answer.

        Raises:
            ToolError: as `HTTPSearch.search`.
        """
        async with self._slots:
            await self._turn()
            try:
                async with (
                    asyncio.timeout(self._backend.timeout_s),
                    httpx2.AsyncClient(
                        timeout=None,
                        trust_env=self._backend.trust_env,
                        verify=_certificates(),
                    ) as client,
                    client.stream(method, url, **request) as response,
                ):
                    self._check(response)
                    content = await _body(response)
            except TimeoutError as error:
                raise self._backend._outage("it took too long") from error
            except httpx2.HTTPError as error:
                raise self._backend._outage("it cannot be reached") from error
            except _TooLargeError as error:
                raise self._backend._outage("its answer is too large") from error
        try:
            return json.loads(content)
        except ValueError as error:
            raise self._backend._outage("its answer is no JSON") from error

    async def _turn(self) -> None:
        """Wait until this request may go; the next one may a moment later."""
        at = max(time.monotonic(), self._next_at)
        self._next_at = at + self._interval_s
        await asyncio.sleep(at - time.monotonic())

    def _check(self, response: httpx2.Response) -> None:
        status = response.status_code
        if status == 429:
            pause_s = _seconds(response.headers.get("Retry-After"))
            self._next_at = max(self._next_at, time.monotonic() + pause_s)
            raise self._backend._outage("it is busy")
        if status in (401, 403):
            _log_once(
                "the search service %r refuses the key (%d): check the environment "
                "variable %s",
                self._backend.name,
                status,
                self._backend.key_variable,
            )
            raise self._backend._outage("it cannot be used")
        if status >= 500 or 300 <= status < 400:
            raise self._backend._outage(f"status {status}")
        if status >= 400:
            raise ToolError(f"the search service refuses the query (status {status})")


@lru_cache(maxsize=1)
def _certificates() -> ssl.SSLContext:
    """Read once: that takes longer than a request."""
    return httpx2.create_ssl_context()


class _TooLargeError(Exception):
    """The body is larger than `MAX_RESPONSE_BYTES`."""


async def _body(response: httpx2.Response) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > MAX_RESPONSE_BYTES:
            raise _TooLargeError
    return bytes(content)


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After header; a date, which no search service sends, is a second."""
    try:
        return min(max(float(retry_after or 1), 0.0), MAX_PAUSE_S)
    except ValueError:
        return 1.0


_logged: set[Sequence[object]] = set()


def _log_once(message: str, *values: object) -> None:
    if values not in _logged:
        _logged.add(values)
        logger.warning(message, *values)
