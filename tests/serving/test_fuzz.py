"""Whatever the server's own document allows, and what it does not, is tried on it."""

import warnings
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from rllib_arpo.serving.access import hash_key
from rllib_arpo.serving.http import make_http_app
from rllib_arpo.serving.http_settings import HttpSettings
from tests.serving.live_server import CHAT, LiveServer
from tests.serving.scripted_agents import call, final, make_env, service

EXAMPLES = settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
CONFORMANCE = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
KEY = "key"
OPERATIONS = [
    ("POST", CHAT),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id}"),
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("POST", "/admin/reload"),
]


async def reload(model: str | None, checkpoint: str | None) -> dict[str, str]:
    return {"m": "v1"}


def fuzzed_app():
    chat, _ = service(make_env(), [call("tags", "height"), final("tags", "44")] * 8)
    allowed = HttpSettings(
        api_key_hashes=(hash_key(KEY),), admin_key_hash=hash_key(KEY)
    )
    return make_http_app(chat, allowed, reload=reload)


def named_model(document: dict[str, Any]) -> dict[str, Any]:
    """The document for half of the requests to name the model that there is.

    As one of two names: a name beside any text would count as any text.
    """
    fields = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    fields["model"] = names = {"type": "string", "enum": ["m", "nobody"]}
    fields["messages"]["maxItems"] = 2
    (path,) = document["paths"]["/v1/models/{model_id}"]["get"]["parameters"]
    path["schema"] = names
    return document


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_are_those_of_the_document(method: str, path: str):
    with LiveServer(fuzzed_app()) as live:
        document = named_model(live.client.get("/openapi.json").json())
        schema = schemathesis.openapi.from_dict(document)
        schema.config.update(base_url=live.url)
        cases = schema[path][method]
        seen: list[int] = []

        @EXAMPLES
        @given(case=cases.as_strategy())
        def explore(case) -> None:
            answer = case.call(headers={"Authorization": f"Bearer {KEY}"})
            seen.append(answer.status_code)
            case.validate_response(answer, checks=CONFORMANCE)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            explore()
    assert any(status < 300 for status in seen)


@EXAMPLES
@given(body=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def every_body_is_refused(live: LiveServer, body: bytes) -> None:
    answer = live.post_raw(body, Authorization=f"Bearer {KEY}")
    assert 400 <= answer.status_code < 500
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_bytes_that_are_no_request_are_refused():
    with LiveServer(fuzzed_app()) as live:
        every_body_is_refused(live)
