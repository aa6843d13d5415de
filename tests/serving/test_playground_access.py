"""The playground for everybody: keyboard, screen reader, both themes, small screens."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from rllib_arpo.errors import ToolError
from tests.browser import opened_chromium, opened_page
from tests.envs.fake_tools import FakeTool
from tests.serving.live_server import LiveServer
from tests.serving.scripted_agents import call, final
from tests.serving.staged_engine import Pause, StagedEngine, Turn

LONG = "height-of-vifel" * 12
ENOUGH = 4.5  # WCAG 2.2, 1.4.3, level AA, text of any size

# Every text with its colour and the colours of the boxes behind it, nearest first.
TEXTS = """() => {
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility({visibilityProperty: true}))
      continue;
    const behind = [];
    for (let one = element; one; one = one.parentElement)
      behind.push(getComputedStyle(one).backgroundColor);
    const color = getComputedStyle(element).color;
    found.push({text: node.data.trim(), color, behind});
  }
  for (const field of document.querySelectorAll("input, textarea")) {
    if (!field.placeholder || !field.checkVisibility()) continue;
    const color = getComputedStyle(field, "::placeholder").color;
    const behind = [getComputedStyle(field).backgroundColor];
    found.push({text: field.placeholder, color, behind});
  }
  return found;
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with opened_chromium() as browser:
        yield browser


def open_full_page(page: Page, server: LiveServer) -> None:
    """Everything at once: a tool that failed, an answer, an error, all unfolded."""
    page.goto(server.url)
    expect(page.get_by_label("Model", exact=True)).to_have_value("m")
    page.get_by_label("Question").fill("How high is vifel?")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status")).to_contain_text("Answered in")
    page.get_by_label("Question").fill("And zepen?")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert")).to_contain_text("server failed")
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")


def full_server() -> LiveServer:
    error = RuntimeError("a fault of the server")
    turns = [
        Turn(call("tags", LONG)),
        Turn(call("tags", "zepen")),
        Turn(final("tags", "44")),
        Turn(final("tags", "4"), error),
    ]
    return StagedEngine(turns).server(FakeTool(ToolError(LONG), LONG))


# Keyboard


def test_all_of_it_can_be_done_with_the_keyboard(chromium: Browser) -> None:
    pause = Pause()
    engine = StagedEngine(
        [Turn(call("tags", "height")), Turn(final("tags", "44")), Turn("a b", pause)]
    )
    with engine.server(FakeTool("vifel 44")) as server, opened_page(chromium) as visit:
        page = visit.page
        page.goto(server.url)
        expect(page.get_by_label("Question")).to_be_focused()
        page.keyboard.type("How high is vifel?")
        page.keyboard.press("Control+Enter")
        expect(page.locator(".answer")).to_have_text("Answer44")
        expect(page.get_by_role("status")).to_contain_text("Answered in")
        expect(page.get_by_label("Question")).to_be_focused()
        # Back from the question: copy, turn 2, turn 1.
        for _ in range(3):
            page.keyboard.press("Shift+Tab")
        page.keyboard.press("Enter")
        expect(page.locator(".turn .model").first).to_be_visible()
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        expect(page.get_by_text("vifel 44", exact=True)).to_be_visible()
        page.get_by_role("button", name="Ask", exact=True).focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_have_text("Write a question first.")
        expect(page.get_by_label("Question")).to_be_focused()
        page.keyboard.type("Again?")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Stop")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_have_text("Stopped.")
        expect(page.get_by_label("Question")).to_be_focused()


def test_the_order_of_the_keyboard_is_that_of_the_page(chromium: Browser) -> None:
    with full_server() as server, opened_page(chromium) as visit:
        page = visit.page
        open_full_page(page, server)
        visit.problems.clear()
        page.locator(".skip").focus()
        names = []
        for _ in range(40):
            name = page.evaluate(
                "(e => e === document.body ? '' : e.id || e.textContent.trim())"
                "(document.activeElement)"
            )
            if not name or name in ("send", "stop"):
                names.append(name)
                break
            names.append(re.sub(r"\s+", " ", name)[:12])
            page.keyboard.press("Tab")
    assert names[:4] == ["Skip to the ", "new", "model", "Sampling and"]
    assert names[4:8] == ["system", "temperature", "max-tokens", "seed"]
    assert names[8:10] == ["Thinking", "Turn 1✕ erro"]
    assert names[-4:] == ["Copy as curl", "question", "curl", "send"]


# Screen readers


def test_every_control_has_a_name_and_the_page_has_landmarks(
    chromium: Browser,
) -> None:
    with full_server() as server, opened_page(chromium) as visit:
        page = visit.page
        open_full_page(page, server)
        visit.problems.clear()
        unnamed = page.evaluate(
            "() => [...document.querySelectorAll('input, select, textarea')]"
            ".filter(e => !e.labels.length || !e.labels[0].textContent.trim())"
            ".map(e => e.id)"
        )
        snapshot = page.locator("body").aria_snapshot()
        assert page.evaluate("document.documentElement.lang") == "en"
        levels = page.evaluate(
            "() => [...document.querySelectorAll('h1, h2, h3, h4')]"
            ".filter(h => h.checkVisibility()).map(h => h.tagName)"
        )
    assert unnamed == []
    for part in (
        "- banner:",
        '- complementary "Settings":',
        "- main:",
        '- region "Conversation":',
        '- article "How high is vifel?":',
        '- form "Ask":',
        "- alert:",
        "- status:",
        '- textbox "Question":',
        '- combobox "Model":',
        '- spinbutton "Temperature"',
    ):
        assert part in snapshot, f"{part} is not in\n{snapshot}"
    assert levels == ["H1", "H2", "H3", "H2"]
    assert not re.search(r"- (button|textbox|spinbutton|combobox|link)(:|$)", snapshot)


# Themes and sizes


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(
    chromium: Browser, theme: Any
) -> None:
    with full_server() as server, opened_page(chromium, color_scheme=theme) as visit:
        open_full_page(visit.page, server)
        visit.problems.clear()
        texts = visit.page.evaluate(TEXTS)
        ground = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert len(texts) > 50
    assert (luminance(rgba(ground)[:3]) < 0.1) == (theme == "dark")
    weak = {
        one["text"][:40]: round(ratio, 2)
        for one in texts
        if (ratio := contrast(one["color"], one["behind"])) < ENOUGH
    }
    assert weak == {}


@pytest.mark.parametrize("size", [(360, 740), (320, 256), (1280, 800)])
def test_nothing_sticks_out_of_the_page(
    chromium: Browser, size: tuple[int, int]
) -> None:
    viewport: Any = {"width": size[0], "height": size[1]}
    with full_server() as server, opened_page(chromium, viewport=viewport) as visit:
        open_full_page(visit.page, server)
        visit.problems.clear()
        width = visit.page.evaluate("document.documentElement.scrollWidth")
    assert width == size[0]


def test_motion_stops_for_those_who_ask_for_that(chromium: Browser) -> None:
    engine = StagedEngine([Turn(final("tags", "44"), Pause())])
    with (
        engine.server() as server,
        opened_page(chromium, reduced_motion="reduce") as visit,
    ):
        page = visit.page
        page.goto(server.url)
        page.get_by_label("Question").fill("How high?")
        page.keyboard.press("Control+Enter")
        expect(page.locator(".badge.running")).to_be_visible()
        assert page.evaluate("document.getAnimations().length") == 0
        page.emulate_media(reduced_motion="no-preference")
        assert page.evaluate("document.getAnimations().length") > 0
        page.keyboard.press("Escape")
        expect(page.get_by_role("status")).to_have_text("Stopped.")


def contrast(color: str, behind: list[str]) -> float:
    """(L1 + 0.05) / (L2 + 0.05) of a text and the first box behind it with a colour."""
    box = next(rgba(one) for one in behind if rgba(one)[3] == 1)
    lights = sorted((luminance(rgba(color)[:3]), luminance(box[:3])))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def rgba(color: str) -> list[float]:
    """`rgb(r, g, b)` or `rgba(r, g, b, a)` as four numbers."""
    assert color.startswith("rgb")
    return [*map(float, re.findall(r"[\d.]+", color)), 1.0][:4]


def luminance(channels: list[float]) -> float:
    parts = [one / 255 for one in channels]
    red, green, blue = (
        one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4
        for one in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
