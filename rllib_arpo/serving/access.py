"""Who may ask: keys, or without keys the clients of this machine.

Keys are kept as SHA-256: they are long and random, so a slow hash would guard nothing
more. Without keys a page that the user's browser shows must not be able to ask, either:
neither by posting across origins (`Origin` must be the server's own) nor under a name
that its owner lets point to this machine (`Host` must be a name of loopback).
"""

import hashlib
import hmac
import os
from collections.abc import Mapping, Sequence
from ipaddress import IPv6Address, ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from rllib_arpo.serving.api_errors import HttpError
from rllib_arpo.serving.http_settings import HttpSettings

API_KEYS_VARIABLE = "RLLIB_ARPO_API_KEYS"
ADMIN_KEY_VARIABLE = "RLLIB_ARPO_ADMIN_KEY"

OPEN_PATHS = ("/", "/health", "/openapi.json")
OPEN_FOLDER = "/playground/"
ADMIN_FOLDER = "/admin/"

# In the scope of a request: the hash of its key, empty for clients without one.
CLIENT = "rllib_arpo.client"

FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")


def hash_key(key: str) -> str:
    """What is kept of a key: SHA-256 in hex."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def keys_from_environment(
    environment: Mapping[str, str] = os.environ,
) -> tuple[tuple[str, ...], str | None]:
    """Hashes of the keys that the environment holds.

    Args:
        environment: with `RLLIB_ARPO_API_KEYS` (a comma between two keys) and
            `RLLIB_ARPO_ADMIN_KEY`, or without.

    Returns:
        `api_key_hashes` and `admin_key_hash` of `HttpSettings`.
    """
    keys = [one.strip() for one in environment.get(API_KEYS_VARIABLE, "").split(",")]
    admin = environment.get(ADMIN_KEY_VARIABLE, "").strip()
    return tuple(hash_key(one) for one in keys if one), hash_key(
        admin
    ) if admin else None


def route_path(scope: Scope) -> str:
    """Path of a request below the prefix under which the app is mounted."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


class Guard:
    """ASGI middleware: refuses whoever may not ask, before the body is read.

    Raises:
        HttpError: 401 without the right key, 403 where no key could help.
    """

    def __init__(self, app: ASGIApp, settings: HttpSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            scope = {**scope, CLIENT: self._client(scope)}
        await self._app(scope, receive, send)

    def _client(self, scope: Scope) -> str:
        path = route_path(scope)
        if path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return ""
        if path.startswith(ADMIN_FOLDER):
            return _admin(scope, self._settings.admin_key_hash)
        if self._settings.api_key_hashes:
            return _holder(scope, self._settings.api_key_hashes)
        _local(scope)
        return ""


def _admin(scope: Scope, admin_key_hash: str | None) -> str:
    if admin_key_hash is None:
        raise HttpError(
            403,
            "the server was started without an admin key, so this is off: set "
            f"{ADMIN_KEY_VARIABLE}",
            code="admin_disabled",
        )
    return _holder(scope, (admin_key_hash,))


def _holder(scope: Scope, hashes: Sequence[str]) -> str:
    """Hash of the key that a request shows."""
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    shown = hashlib.sha256(key.strip().encode("latin-1")).hexdigest()
    # All are compared, in constant time: how long it takes tells nothing of the keys.
    right = [one for one in hashes if hmac.compare_digest(shown, one)]
    if scheme.lower() != "bearer" or not right:
        raise HttpError(
            401,
            "no key or a wrong one: send the header `Authorization: Bearer <key>`",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return right[0]


def _local(scope: Scope) -> None:
    """Refuse all requests that a program of this machine did not mean to make."""
    headers = Headers(scope=scope)
    client = scope.get("client")
    if client is None or not _is_loopback(client[0]):
        raise _refused("it answers only clients of its own machine")
    if any(name in headers for name in FORWARDED):
        raise _refused("a proxy sent this request, so its client is not known")
    host = headers.get("host", "")
    if not _is_loopback(_name_of(f"//{host}")):
        raise _refused(f"the header `Host` ({host[:80]!r}) is no name of this machine")
    origin = headers.get("origin")
    if origin is not None and not _same_origin(origin, host):
        raise _refused(f"a page of another origin ({origin[:80]!r}) sent this request")


def _refused(reason: str) -> HttpError:
    return HttpError(
        403,
        f"the server has no API keys, and {reason}; set {API_KEYS_VARIABLE} to serve "
        "others",
        code="local_only",
    )


def _is_loopback(name: str | None) -> bool:
    if name == "localhost":
        return True
    try:
        address = ip_address(name or "")
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.is_loopback


def _name_of(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        return None if "@" in parts.netloc else parts.hostname
    except ValueError:
        return None


def _same_origin(origin: str, host: str) -> bool:
    """Whether a page of that origin came from the address that it asks."""
    scheme, separator, netloc = origin.partition("://")
    return bool(separator) and scheme in ("http", "https") and netloc == host
