"""The playground in a real browser, over the real server; only the model is staged."""

import json
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from rllib_arpo.errors import ToolError
from rllib_arpo.serving.access import hash_key
from rllib_arpo.serving.engine_client import EngineLostError
from tests.browser import Visit, opened_chromium, opened_page
from tests.envs.fake_tools import FakeTool
from tests.serving.live_server import CHAT, PATIENCE_S, LiveServer
from tests.serving.scripted_agents import call, final
from tests.serving.staged_engine import Pause, StagedEngine, Turn

KEY = "a-secret-key"
ANSWERS = [Turn(call("tags", "height of vifel")), Turn(final("tags", "44"))]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with opened_chromium() as browser:
        yield browser


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Visit]:
    with opened_page(chromium, permissions=["clipboard-read", "clipboard-write"]) as it:
        yield it


def open_playground(page: Page, server: LiveServer) -> None:
    page.goto(server.url)
    expect(page.get_by_label("Model", exact=True)).to_have_value("m")


def ask(page: Page, question: str) -> None:
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()


def answered(page: Page, text: str) -> None:
    expect(page.locator(".answer").last).to_have_text(f"Answer{text}")
    expect(page.get_by_role("status")).to_contain_text("Answered in")


def asked(page: Page, question: str) -> dict[str, Any]:
    """Ask, and what the page sent."""
    with page.expect_request(lambda request: request.url.endswith(CHAT)) as sent:
        ask(page, question)
    body = sent.value.post_data_json
    assert isinstance(body, dict)
    return body


# Asking


def test_an_answer_is_shown_while_it_is_written(visit: Visit) -> None:
    pause = Pause()
    turn = Turn("<think>The height is</think><answer> \\boxed{44} </answer>", pause)
    engine, page = StagedEngine([ANSWERS[0], turn]), visit.page
    with engine.server(FakeTool("vifel 44")) as server:
        open_playground(page, server)
        ask(page, "How high is vifel?")
        expect(page.get_by_role("heading", name="How high is vifel?")).to_be_visible()
        second = page.locator(".turn").nth(1)
        expect(second.locator(".model")).to_contain_text("<think>The height")
        expect(second.locator(".badge")).to_have_text("writing")
        expect(page.get_by_role("status")).to_have_text("Turn 2: writing…")
        expect(page.locator(".answer")).to_be_empty()
        engine.go_on(pause)
        answered(page, "44")


def test_a_turn_unfolds_to_its_text_its_tool_call_and_its_numbers(
    visit: Visit,
) -> None:
    page = visit.page
    with StagedEngine(ANSWERS).server(FakeTool("vifel 44")) as server:
        open_playground(page, server)
        ask(page, "How high is vifel?")
        answered(page, "44")
        turn = page.locator(".turn").first
        summary = turn.locator("summary").first
        expect(summary).to_contain_text("✓ ok")
        expect(summary).to_contain_text("search: height of vifel")
        expect(turn.locator(".model")).to_be_hidden()
        summary.click()
        expect(turn.locator(".model")).to_contain_text("<search>")
        result = turn.get_by_text("vifel 44", exact=True)
        expect(result).to_be_hidden()
        turn.get_by_text("Tool call").click()
        expect(result).to_be_visible()
        expect(turn.get_by_text("height of vifel", exact=True)).to_be_visible()
        expect(turn.locator(".facts")).to_contain_text("0.25 nats per token")
        facts = page.locator(".after .totals")
        expect(facts).to_contain_text("2 turns · 1 tool call")
        page.get_by_text("Thinking").click()
        expect(page.locator(".thinking p")).to_contain_text("t")


def test_a_failed_tool_is_named_in_words(visit: Visit) -> None:
    page = visit.page
    with StagedEngine(ANSWERS).server(FakeTool(ToolError("no such page"))) as server:
        open_playground(page, server)
        ask(page, "How high is vifel?")
        answered(page, "44")
        badge = page.locator(".turn").first.locator("summary .badge").first
        expect(badge).to_have_text("✕ error")


def test_what_a_tool_and_the_model_write_stays_text(visit: Visit) -> None:
    page = visit.page
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    turns = [ANSWERS[0], Turn(f"<think>{evil}</think><answer>\\boxed{{<b>4}}</answer>")]
    with StagedEngine(turns).server(FakeTool(evil)) as server:
        open_playground(page, server)
        ask(page, evil)
        answered(page, "<b>4")
        expect(page.locator("article pre", has_text=evil)).not_to_have_count(0)
        assert page.locator("article :is(img, script, b)").count() == 0


def test_an_answer_that_never_came_is_said_so(visit: Visit) -> None:
    page = visit.page
    with StagedEngine([Turn("<think>I do not know.</think>")]).server() as server:
        open_playground(page, server)
        ask(page, "Why?")
        expect(page.get_by_text("ended without an answer.").first).to_be_visible()
        expect(page.locator(".answer")).to_be_empty()


# Stopping


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_ends_the_answer_on_the_server_too(visit: Visit, how: str) -> None:
    engine, page = (
        StagedEngine([Turn(final("tags", "44"), Pause()), *ANSWERS]),
        visit.page,
    )
    with engine.server() as server:
        open_playground(page, server)
        ask(page, "How high is vifel?")
        expect(page.locator(".model")).not_to_be_empty()
        if how == "button":
            page.get_by_role("button", name="Stop").click()
        else:
            page.keyboard.press(how)
        expect(page.get_by_role("status")).to_have_text("Stopped.")
        expect(page.locator(".turn .badge")).to_have_text("stopped")
        assert engine.left.wait(PATIENCE_S)
        expect(page.get_by_label("Question")).to_have_value("How high is vifel?")
        again = asked(page, "How high is zepen?")
        answered(page, "44")
    assert [message["content"] for message in again["messages"]] == [
        "How high is zepen?"
    ]


# Errors


def test_a_refused_request_is_shown_with_its_field(visit: Visit) -> None:
    page = visit.page
    with StagedEngine([]).server(max_tokens=100) as server:
        open_playground(page, server)
        page.get_by_label("Max tokens").fill("1000")
        ask(page, "How high is vifel?")
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text("`max_tokens` (1000) must be <= 100")
        expect(alert).to_contain_text("invalid_request_error, field max_tokens")
        expect(page.get_by_label("Question")).to_have_value("How high is vifel?")
    visit.expect_problem("status of 400")


def test_an_error_behind_the_first_words_is_shown(visit: Visit) -> None:
    page = visit.page
    turn = Turn(final("tags", "44"), EngineLostError("the replica is gone"))
    with StagedEngine([turn]).server() as server:
        open_playground(page, server)
        ask(page, "How high is vifel?")
        expect(page.get_by_role("alert")).to_contain_text("ask again")
        expect(page.locator(".turn .badge")).to_have_text("failed")
        expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()


def test_a_server_that_is_gone_is_said_so(visit: Visit) -> None:
    page = visit.page
    with StagedEngine([]).server() as server:
        open_playground(page, server)
    ask(page, "How high is vifel?")
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    visit.expect_problem("ERR_CONNECTION_REFUSED")


# Settings, history, key, curl


def test_settings_are_sent_and_empty_ones_are_not(visit: Visit) -> None:
    page = visit.page
    with StagedEngine(ANSWERS * 2).server() as server:
        open_playground(page, server)
        plain = asked(page, "How high is vifel?")
        answered(page, "44")
        page.get_by_role("button", name="New conversation").click()
        page.get_by_label("Model", exact=True).select_option("other")
        page.get_by_label("System message").fill("Be brief.")
        page.get_by_label("Temperature").fill("0.5")
        page.get_by_label("Max tokens").fill("200")
        page.get_by_label("Seed").fill("7")
        full = asked(page, "How high is zepen?")
        answered(page, "44")
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    question = {"role": "user", "content": "How high is vifel?"}
    assert plain == {"model": "m", "messages": [question], **stream}
    assert full == {
        "model": "other",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "How high is zepen?"},
        ],
        "temperature": 0.5,
        "max_tokens": 200,
        "seed": 7,
        **stream,
    }


def test_a_follow_up_goes_on_with_the_conversation(visit: Visit) -> None:
    engine, page = StagedEngine(ANSWERS * 2), visit.page
    with engine.server() as server:
        open_playground(page, server)
        ask(page, "How high is vifel?")
        answered(page, "44")
        ask(page, "And in feet?")
        expect(page.get_by_role("article")).to_have_count(2)
        answered(page, "44")
        expect(page.locator("header .totals")).to_contain_text("2 questions")
        page.get_by_role("button", name="New conversation").click()
        expect(page.get_by_role("article")).to_have_count(0)
    follow_up = engine.prompts[2]
    for part in ("How high is vifel?", "44", "And in feet?"):
        assert part in follow_up


def test_the_key_is_asked_for_and_kept_in_the_tab(visit: Visit) -> None:
    page = visit.page
    with StagedEngine(ANSWERS).server(api_key_hashes=(hash_key(KEY),)) as server:
        page.goto(server.url)
        expect(page.get_by_role("alert")).to_contain_text("asks for an API key")
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        field.fill("wrong")
        field.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("authentication_error")
        field.fill(KEY)
        field.press("Enter")
        expect(page.get_by_role("status")).to_have_text("Key accepted.")
        expect(page.get_by_role("alert")).to_be_empty()
        ask(page, "How high is vifel?")
        answered(page, "44")
        assert KEY in page.evaluate("Object.values(sessionStorage)")
        assert page.evaluate("localStorage.length + document.cookie.length") == 0
        assert KEY not in page.content()
    visit.expect_problem("status of 401")


@pytest.mark.parametrize("key", [None, KEY])
def test_curl_is_the_request_that_was_sent(visit: Visit, key: str | None) -> None:
    page = visit.page
    question = 'What\'s "$HOME" & `id`?\n\\ é'
    hashes = () if key is None else (hash_key(key),)
    with StagedEngine(ANSWERS).server(api_key_hashes=hashes) as server:
        page.goto(server.url)
        if key is not None:
            page.get_by_label("API key").fill(key)
            page.get_by_role("button", name="Use").click()
            visit.expect_problem("status of 401")
        expect(page.get_by_label("Model", exact=True)).to_have_value("m")
        page.get_by_label("Question").fill(question)
        page.locator("#curl").click()
        expect(page.get_by_role("status")).to_contain_text("Copied.")
        before = page.evaluate("navigator.clipboard.readText()")
        body = asked(page, question)
        answered(page, "44")
        page.get_by_role("article").get_by_role("button", name="Copy as curl").click()
        expect(page.get_by_role("status")).to_contain_text("Copied.")
        after = page.evaluate("navigator.clipboard.readText()")
    assert before == after
    assert KEY not in after
    words = shlex.split(after)
    assert words[:3] == ["curl", "-N", f"{server.url}{CHAT}"]
    assert json.loads(words[-1]) == body
    assert body["messages"][0]["content"] == question
    assert ('"Authorization: Bearer $RLLIB_ARPO_API_KEY"' in after) == (key is not None)
