import asyncio
from typing import Any

import pytest

from rllib_arpo.errors import ConfigError
from rllib_arpo.serving.access import (
    CLIENT,
    Guard,
    hash_key,
    keys_from_environment,
)
from rllib_arpo.serving.api_errors import HttpError
from rllib_arpo.serving.http_settings import HttpSettings

NO_KEYS = HttpSettings()
KEYS = HttpSettings(api_key_hashes=(hash_key("one"), hash_key("two")))
ADMIN = HttpSettings(admin_key_hash=hash_key("admin"))


def passes(
    settings: HttpSettings,
    path: str = "/v1/models",
    *,
    client: Any = ("127.0.0.1", 5000),
    root_path: str = "",
    **headers: str,
) -> str:
    """Who the guard says that the client is; raises what it raises."""
    reached: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope[CLIENT])

    headers = {"host": "127.0.0.1:8000", **headers}
    scope = {
        "type": "http",
        "path": root_path + path,
        "root_path": root_path,
        "client": client,
        "headers": [
            (name.replace("_", "-").encode(), value.encode("latin-1"))
            for name, value in headers.items()
        ],
    }
    unused: Any = None
    asyncio.run(Guard(app, settings)(scope, unused, unused))
    (found,) = reached
    return found


def refusal(*args: Any, **fields: Any) -> HttpError:
    with pytest.raises(HttpError) as caught:
        passes(*args, **fields)
    return caught.value


# Keys


def test_the_holder_of_a_key_is_known_by_its_hash_wherever_it_is():
    far = ("203.0.113.9", 5000)
    for key in ("one", "two"):
        found = passes(KEYS, client=far, authorization=f"bearer {key}", host="x.org")
        assert found == hash_key(key)


@pytest.mark.parametrize(
    "shown", ["", "Bearer", "Bearer ", "Bearer three", "Basic one", "one", "Bearer ö"]
)
def test_without_a_right_key_nobody_is_answered_not_even_locally(shown: str):
    error = refusal(KEYS, authorization=shown)
    assert (error.status, error.headers["WWW-Authenticate"]) == (401, "Bearer")


def test_a_hash_is_no_key():
    assert refusal(KEYS, authorization=f"Bearer {hash_key('one')}").status == 401


def test_the_admin_s_key_and_the_others_are_not_the_same():
    both = HttpSettings(
        api_key_hashes=KEYS.api_key_hashes, admin_key_hash=ADMIN.admin_key_hash
    )
    assert refusal(both, "/admin/reload", authorization="Bearer one").status == 401
    assert refusal(both, authorization="Bearer admin").status == 401
    assert passes(both, "/admin/reload", authorization="Bearer admin")


def test_admin_paths_are_off_without_an_admin_key():
    error = refusal(NO_KEYS, "/admin/reload", authorization="Bearer one")
    assert (error.status, error.code) == (403, "admin_disabled")


@pytest.mark.parametrize("path", ["/", "/health", "/openapi.json", "/playground/a.js"])
def test_the_page_and_the_health_are_open_to_all(path: str):
    assert passes(KEYS, path, client=("203.0.113.9", 1), host="x.org") == ""


@pytest.mark.parametrize("path", ["/metrics", "/v1/models", "/health/x", "/playground"])
def test_all_else_is_not(path: str):
    assert refusal(KEYS, path).status == 401


def test_paths_count_from_where_the_app_is_mounted():
    assert passes(KEYS, "/health", root_path="/agents") == ""
    assert refusal(KEYS, "/metrics", root_path="/health").status == 401


# Without keys


@pytest.mark.parametrize(
    "client", [("127.0.0.1", 1), ("127.9.9.9", 1), ("::1", 1), ("::ffff:127.0.0.1", 1)]
)
def test_without_keys_clients_of_the_machine_are_answered(client: Any):
    assert passes(NO_KEYS, client=client) == ""


@pytest.mark.parametrize(
    "client", [None, ("203.0.113.9", 1), ("::ffff:10.0.0.1", 1), ("", 0), ("unix", 0)]
)
def test_without_keys_nobody_else_is(client: Any):
    error = refusal(NO_KEYS, client=client)
    assert (error.status, error.code) == (403, "local_only")
    assert "RLLIB_ARPO_API_KEYS" in str(error)


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "[::1]:80", "127.0.0.2"]
)
def test_the_machine_has_several_names(host: str):
    assert passes(NO_KEYS, host=host) == ""


@pytest.mark.parametrize(
    "host",
    [
        *("", "evil.org", "127.0.0.1.evil.org", "localhost.evil.org:80"),
        *("127.0.0.1@evil.org", "evil.org@127.0.0.1", "[::1", "0.0.0.0"),
    ],
)
def test_a_name_that_somebody_lets_point_here_is_refused(host: str):
    error = refusal(NO_KEYS, host=host)
    assert (error.status, "`Host`" in str(error)) == (403, True)


def test_the_server_s_own_page_may_ask():
    assert passes(NO_KEYS, origin="http://127.0.0.1:8000") == ""
    assert passes(NO_KEYS, host="localhost", origin="https://localhost") == ""


@pytest.mark.parametrize(
    "origin",
    [
        *("null", "", "http://evil.org", "http://127.0.0.1:9000", "127.0.0.1:8000"),
        *("http://localhost:8000", "file://127.0.0.1:8000"),
    ],
)
def test_a_page_of_another_origin_may_not(origin: str):
    error = refusal(NO_KEYS, origin=origin)
    assert (error.status, "origin" in str(error)) == (403, True)


@pytest.mark.parametrize("header", ["x_forwarded_for", "forwarded", "x_real_ip"])
def test_a_client_behind_a_proxy_of_the_machine_is_not_known(header: str):
    assert refusal(NO_KEYS, **{header: "203.0.113.9"}).status == 403


# Settings


def test_keys_come_from_the_environment_and_only_as_hashes():
    hashes, admin = keys_from_environment(
        {"RLLIB_ARPO_API_KEYS": " one,, two ", "RLLIB_ARPO_ADMIN_KEY": "admin"}
    )
    assert hashes == KEYS.api_key_hashes
    assert admin == ADMIN.admin_key_hash
    assert keys_from_environment({}) == ((), None)


def test_an_empty_key_is_no_key():
    nothing = hash_key("")
    with pytest.raises(ConfigError, match="empty"):
        HttpSettings(api_key_hashes=(nothing,))
    with pytest.raises(ConfigError, match="empty"):
        HttpSettings(admin_key_hash=nothing)


@pytest.mark.parametrize(
    "wrong",
    [
        {"api_key_hashes": ("plain-key",)},
        {"admin_key_hash": "plain-key"},
        {"max_body_bytes": 0},
        {"max_tokens": 0},
        {"max_request_s": float("nan")},
        {"max_concurrent": -1},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]):
    (name,) = wrong
    with pytest.raises(ConfigError) as caught:
        HttpSettings(**wrong)
    assert name in str(caught.value) or "hash" in str(caught.value)
    assert "plain-key" not in str(caught.value)
