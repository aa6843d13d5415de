"""Search by services on the web or in the cluster, as backends of `SearchTool`.

    backend = search_backend("serper", country="us", max_per_s=5)

1. A key is read from its environment variable for each request and kept nowhere: not
   in an object, a pickle, a checkpoint, a log or an error.
2. A service in trouble is a `ToolError` that is retryable; the environment retries. A
   key that is missing or refused is a `ConfigError`: no retry mends it, and the model
   is not to blame. The released code gave the model an empty text for both.
3. A limit on requests holds for all backends of a process that ask the same service,
   and a service that says when to come back is left alone until then.
"""

import asyncio
import json
import logging
import os
import ssl
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any

import httpx2

from rllib_arpo.errors import ConfigError, ToolError
from rllib_arpo.tools.pace import Pace, pace_of
from rllib_arpo.tools.search import Document
from rllib_arpo.tools.search_apis import (
    ApiRequest,
    Bing,
    Brave,
    RetrievalServer,
    SearchApi,
    SearXNG,
    Serper,
)

APIS: dict[str, type[Any]] = {
    api.name: api for api in (Serper, Brave, Bing, SearXNG, RetrievalServer)
}
# Changes when the same answer is read differently.
READING = 1
USER_AGENT = "rllib_arpo"
MAX_PAUSE_S = 30.0  # that a service may ask for; a tool call has a deadline
MAX_REASON_CHARS = 200
REFUSED_KEY = (401, 402, 403)
WRONG_ADDRESS = (301, 302, 303, 307, 308, 404, 405, 410)

logger = logging.getLogger(__name__)
# (service, status) of refusals that are in the log already.
_logged: set[tuple[str, int]] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """How a service is used.

    Attributes:
        timeout_s: seconds for a request, not counting the wait for its turn.
        max_per_s: requests a second of this process, evenly spaced; None: no limit.
        max_concurrent: requests at once, of one backend and event loop.
        max_bytes: of an answer, unpacked.
    """

    timeout_s: float = 15.0
    max_per_s: float | None = None
    max_concurrent: int = 16
    max_bytes: int = 4_000_000

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if value is not None and value <= 0:
                raise ConfigError(f"`{limit.name}` ({value}) must be above 0")


def search_backend(
    name: str, *, require_key: bool = True, **settings: Any
) -> "HttpSearch":
    """A backend by the name of its service.

    Args:
        name: "serper", "brave", "bing", "searxng" or "retrieval".
        require_key: see `HttpSearch`.
        settings: of the service, see `search_apis.py`, and of `HttpLimits`.

    Raises:
        ConfigError: there is no such service or setting, one is missing, or the key.
    """
    if name not in APIS:
        raise ConfigError(f"there is no search backend {name!r}; one of {list(APIS)}")
    api = APIS[name]
    of_api = {setting.name: setting.default for setting in fields(api)}
    of_limits = {limit.name for limit in fields(HttpLimits)}
    unknown = settings.keys() - of_api.keys() - of_limits
    if unknown:
        raise ConfigError(
            f"the search backend {name!r} has no setting {sorted(unknown)}; it has "
            f"{[*of_api, *sorted(of_limits)]}"
        )
    for setting, default in of_api.items():
        if default is MISSING and setting not in settings:
            raise ConfigError(f"the search backend {name!r} needs `{setting}`")
    return HttpSearch(
        api(**{key: settings[key] for key in settings.keys() & of_api.keys()}),
        HttpLimits(**{key: settings[key] for key in settings.keys() & of_limits}),
        require_key=require_key,
    )


class HttpSearch:
    """A search service as a `SearchBackend`; picklable.

    Each event loop has connections of its own, which close with it: `asyncio.run`
    does that, and who runs a loop by hand calls `loop.shutdown_asyncgens()`.

    Args:
        api: the service and its settings.
        limits: on its use.
        require_key: whether a missing key is an error here already. A run that is
            replayed from a cache needs none.

    Raises:
        ConfigError: the endpoint cannot be asked, or there is no key.
    """

    def __init__(
        self,
        api: SearchApi,
        limits: HttpLimits = HttpLimits(),
        *,
        require_key: bool = True,
    ) -> None:
        _check_endpoint(api.endpoint)
        self.api = api
        self.limits = limits
        if require_key:
            self._key()
        self._sessions: dict[asyncio.AbstractEventLoop, _Session] = {}

    @property
    def name(self) -> str:
        return self.api.name

    @property
    def version(self) -> str:
        api: Any = self.api
        settings = [
            f"{setting.name}={getattr(api, setting.name)}"
            for setting in fields(api)
            if setting.name != "key_variable"
        ]
        return " ".join([str(READING), *settings])

    async def search(self, query: str, top_k: int) -> Sequence[Document]:
        key = self._key()
        request = self.api.request(query, top_k, key)
        session = await self._session()
        pace = pace_of(self.api.endpoint, self.limits.max_per_s)
        try:
            async with session.slots:
                await pace.turn()
                async with asyncio.timeout(self.limits.timeout_s):
                    response, body = await self._send(session.client, request)
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise ToolError(
                "the search service took too long to answer", retryable=True
            ) from error
        except httpx2.RequestError as error:
            raise ToolError(
                f"the search service cannot be reached ({type(error).__name__})",
                retryable=True,
            ) from error
        self._check(response, body.decode(errors="replace"), key, pace)
        found = self.api.documents(_decoded(body))
        return [hit for hit in found if hit.text or hit.title][:top_k]

    async def aclose(self) -> None:
        """Close the connections of this event loop; the next search opens others."""
        session = self._sessions.get(asyncio.get_running_loop())
        if session is not None:
            await session.lifetime.aclose()

    def __repr__(self) -> str:
        return f"HttpSearch({self.api!r}, {self.limits!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"api": self.api, "limits": self.limits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _sessions={})

    def _key(self) -> str:
        variable = self.api.key_variable
        if not variable:
            return ""
        key = os.environ.get(variable, "").strip()
        if not key:
            raise ConfigError(
                f"the search backend {self.name!r} needs a key: set the environment "
                f"variable {variable} on every node"
            )
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(
                f"the environment variable {variable} holds characters that no key has"
            )
        return key

    async def _session(self) -> "_Session":
        loop = asyncio.get_running_loop()
        if loop not in self._sessions:
            lifetime = self._live(loop)
            self._sessions[loop] = _Session(
                client=await anext(lifetime),
                slots=asyncio.Semaphore(self.limits.max_concurrent),
                lifetime=lifetime,
            )
        return self._sessions[loop]

    async def _live(
        self, loop: asyncio.AbstractEventLoop
    ) -> AsyncGenerator[httpx2.AsyncClient, None]:
        """A client that a loop closes when it shuts its generators down."""
        client = httpx2.AsyncClient(
            verify=_tls_context(),
            timeout=self.limits.timeout_s,
            headers={"User-Agent": USER_AGENT, "Accept": "application/json"},
            limits=httpx2.Limits(max_connections=self.limits.max_concurrent),
        )
        try:
            yield client
        finally:
            self._sessions.pop(loop, None)
            await client.aclose()

    async def _send(
        self, client: httpx2.AsyncClient, request: ApiRequest
    ) -> tuple[httpx2.Response, bytes]:
        body = bytearray()
        async with client.stream(
            request.method,
            self.api.endpoint,
            params=request.params,
            json=request.content if request.method == "POST" else None,
            headers=request.headers,
        ) as response:
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > self.limits.max_bytes:
                    raise ToolError(
                        "the search service's answer is too large", retryable=True
                    )
        return response, bytes(body)

    def _check(
        self, response: httpx2.Response, text: str, key: str, pace: "Pace"
    ) -> None:
        """Raise what a refusal means."""
        status = response.status_code
        if response.is_success:
            return
        if status in (408, 429) or status >= 500:
            pace.pause(_retry_after_s(response.headers.get("Retry-After", "")))
            busy = "is asked too often" if status == 429 else "is in trouble"
            raise ToolError(
                f"the search service {busy} (HTTP {status})", retryable=True
            )
        if status in REFUSED_KEY or any(sign in text for sign in self.api.key_problems):
            raise ConfigError(
                f"{self.name} at {self.api.endpoint} refuses to answer (HTTP {status})"
                f": {self.api.refusal}; the key comes from the environment variable "
                f"that `key_variable` names ({self.api.key_variable or 'none'})"
            )
        if status in WRONG_ADDRESS:
            raise ConfigError(
                f"{self.name}: nothing answers at `endpoint` {self.api.endpoint} "
                f"(HTTP {status})"
            )
        if (self.name, status) not in _logged:
            _logged.add((self.name, status))
            reason = " ".join(text.split())
            reason = reason.replace(key, "***") if key else reason
            logger.warning(
                "%s refused a query (HTTP %d, logged once): %s",
                self.name,
                status,
                reason[:MAX_REASON_CHARS],
            )
        raise ToolError(f"the search service refused the query (HTTP {status})")


@dataclass(frozen=True, slots=True)
class _Session:
    """What belongs to one event loop."""

    client: httpx2.AsyncClient
    slots: asyncio.Semaphore
    lifetime: AsyncGenerator[httpx2.AsyncClient, None]


def _check_endpoint(endpoint: str) -> None:
    try:
        url = httpx2.URL(endpoint)
        fits = url.scheme in ("http", "https") and bool(url.host)
        fits = fits and "%" not in url.host  # what no host name has is escaped
    except httpx2.InvalidURL:
        fits = False
        url = httpx2.URL("")
    # Not quoted: it may hold a password.
    if not fits or url.userinfo or url.query or url.fragment:
        raise ConfigError(
            "`endpoint` must be an address like https://host/path, without a user, a "
            "password or parameters: keys come from environment variables"
        )


def _retry_after_s(value: str) -> float:
    """Seconds that a service wants to be left alone, within limits."""
    seconds = 0.0
    if value.isascii() and value.isdigit():
        seconds = float(value)
    elif value:
        with suppress(ValueError):
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
    return min(max(seconds, 0.0), MAX_PAUSE_S)


def _decoded(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ToolError(
            "the search service's answer cannot be read", retryable=True
        ) from error


@cache
def _tls_context() -> ssl.SSLContext:
    """Made once: reading the authorities takes longer than many a request."""
    return httpx2.create_ssl_context()
