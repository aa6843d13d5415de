"""The viewer's page in a real Chromium."""

import dataclasses

import numpy as np
import pytest

from rllib_arpo.tracking.viewer import render_trees
from tests.browser import opened_chromium, opened_page
from tests.tracking.view_trees import a_tree, big_tree, shown


@pytest.fixture(scope="module")
def browser():
    with opened_chromium() as browser:
        yield browser


@pytest.fixture
def show(browser, tmp_path):
    """Opens trees; the page must have no problem at the end."""
    visits = []

    def opened(trees, *, decode=None, **options):
        file = tmp_path / "view.html"
        page = render_trees(shown(*trees, decode=decode), **options)
        file.write_text(page, encoding="utf-8")
        visit = opened_page(browser, viewport={"width": 1400, "height": 800})
        visits.append(visit)
        page = visit.__enter__().page
        page.goto(file.as_uri())
        return page

    yield opened
    for visit in visits:
        visit.__exit__(None, None, None)


def trees():
    return [a_tree(), a_tree(task_id="t2", question="Which zoo?")]


def test_a_click_shows_a_segment(show):
    page = show(trees())
    page.get_by_role("treeitem", name="seventeen").click()
    detail = page.locator("#detail").inner_text()
    for row in ("H / ln V\t0.25", "ΔH / ln V\t0.125", "P\t0.625", "drawn\t0.5"):
        assert row in detail
    assert "accuracy\t1" in detail and "origin\tinitial" in detail
    titles = page.locator(".tokens span").evaluate_all("all => all.map(s => s.title)")
    assert titles == ["0.05 nats", "0.15 nats"]


def test_a_branch_point_shows_its_decision(show):
    page = show(trees())
    decision = page.locator(".decision.taken")
    assert decision.inner_text().split("\n") == ["ΔH +0.125", "P 0.625"]
    node = page.get_by_role("treeitem", name="seventeen").bounding_box()
    box = decision.bounding_box()
    # In the gap before the segment that it was measured on.
    assert box["x"] + box["width"] <= node["x"]
    assert abs(box["y"] - node["y"]) < node["height"]


def test_the_tokens_that_are_left_out_are_counted(show):
    tree = big_tree()
    long = dataclasses.replace(
        tree.segments[1],
        text="x" * 3_000_000,
        token_ids=np.arange(9000, dtype=np.int32),
        entropies=np.zeros(9000, np.float32),
    )
    segments = (tree.segments[0], long, *tree.segments[2:])
    page = show([dataclasses.replace(tree, segments=segments)], decode=str)
    assert "Texts over 16,000 characters lack their middle" in (
        page.locator("#count").inner_text()
    )
    page.locator("#node-0-1").click()
    detail = page.locator("#detail").inner_text()
    # 16,000 characters are left of 3,000,000, and a quarter as many tokens of 9000.
    assert "[…2,984,000 characters left out…]" in detail
    assert "[…5,000 tokens left out…]" in detail


def test_a_tool_call_folds(show):
    page = show(trees())
    page.get_by_role("treeitem", name="17 cm").click()
    result = page.locator("#detail details").get_by_text("17 cm")
    assert result.is_visible()
    page.locator("#detail summary").click()
    assert not result.is_visible()


def test_keys_walk_the_tree(show):
    page = show(trees())
    for key, node in (
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowRight", 3),
        ("ArrowDown", 4),
        ("ArrowLeft", 2),
    ):
        page.keyboard.press(key)
        active = page.locator("[role=tree]").get_attribute("aria-activedescendant")
        assert active == f"node-0-{node}"
    page.keyboard.press("j")
    assert "Which zoo?" in page.locator(".forest h2").inner_text()
    page.keyboard.press("k")
    assert "How tall?" in page.locator(".forest h2").inner_text()
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()


@pytest.mark.parametrize(
    ("box", "nodes"),
    [("wrong", [4, 6]), ("failed", [6]), ("branched", [3]), ("entropic", [4])],
)
def test_a_filter_dims_the_rest(show, box, nodes):
    page = show(trees())
    page.locator(f"#{box}").check()
    kept = page.locator(".node:not(.off)").evaluate_all(
        "all => all.map(node => Number(node.dataset.index))"
    )
    assert sorted(kept) == nodes


def test_search_keeps_the_trees_that_hold_the_text(show):
    page = show(trees())
    page.keyboard.press("/")
    page.keyboard.type("zoo")
    assert page.locator("#count").inner_text() == "1 of 2 trees"
    assert "Which zoo?" in page.locator(".forest h2").inner_text()
    page.locator("#search").fill("nothing of it")
    assert page.locator("#count").inner_text() == "0 of 2 trees"


def test_two_runs_stand_side_by_side(show):
    page = show(trees(), other=shown(a_tree(result="99 cm"), name="second"))
    boxes = [page.locator(".forest").nth(n).bounding_box() for n in (0, 1)]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"] + 1
    page.get_by_role("treeitem", name="99 cm").click()
    assert "99 cm" in page.locator("#detail").inner_text()
    page.keyboard.press("j")
    assert "no tree of this task" in page.locator(".forest").nth(1).inner_text()


def test_alarms_and_evil_text_are_shown_as_text(show):
    evil = "</script><script>document.title='evil'</script><img src=x>"
    alarm = {"name": "zero", "message": evil, "advice": "Look."}
    page = show([a_tree(result=evil)], alarms=[alarm])
    assert page.title() == "run"
    assert evil in page.locator("#alarms").inner_text()
    page.get_by_role("treeitem", name="tool search, ok").click()
    assert evil in page.locator("#detail").inner_text()
    assert page.locator("img").count() == 0


def test_a_big_tree_is_drawn_whole(show):
    page = show([big_tree()])
    assert page.locator(".node").count() == 1 + 64 * 39
    assert page.locator(".leaf").count() == 64
