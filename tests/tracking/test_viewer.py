"""The viewer's files and data; the page itself is tested in test_viewer_page."""

import base64
import dataclasses
import json
import re

import numpy as np
import pytest

from rllib_arpo.data.tree_files import write_trees
from rllib_arpo.errors import ConfigError
from rllib_arpo.tracking.viewer import render_trees, write_view
from tests.tracking.view_trees import a_tree, big_tree

MAX_BYTES = 2_000_000


def data_of(page):
    found = re.search(
        r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S
    )
    return json.loads(found[1])


def a_run(folder, *iterations):
    (folder / "trees").mkdir(parents=True)
    for iteration in iterations:
        file = folder / "trees" / f"iteration_{iteration:06d}.parquet"
        write_trees(file, [a_tree()])
    return folder


def test_advantages_of_both_attributions_are_shown():
    tree = data_of(render_trees([a_tree()], title="x"))["runs"][0]["trees"][0]
    # Rewards 1, 0, 0: mean 1/3, sample standard deviation 1/sqrt(3).
    right, wrong = 2 / 3 * 3**0.5, -1 / 3 * 3**0.5
    shared = tree["segments"][1]
    assert shared["plus"] == pytest.approx(right, rel=1e-4)
    assert shared["minus"] == pytest.approx(wrong, rel=1e-4)
    assert shared["hard"] == pytest.approx((right + wrong) / 2, rel=1e-4)
    assert shared["paths"] == 2


def test_tokens_keep_their_entropy_and_text():
    page = render_trees([a_tree()], title="x", decode=lambda token: f"<{token}>")
    data = data_of(page)
    segment = data["runs"][0]["trees"][0]["segments"][1]
    entropies = np.frombuffer(base64.b64decode(segment["entropies"]), "<f2")
    pieces = np.frombuffer(base64.b64decode(segment["pieces"]), "<u2")
    assert entropies.tolist() == [0.25, 0.75]
    assert [data["pieces"][i] for i in pieces] == ["<7>", "<9>"]


def test_text_cannot_break_out_of_the_page():
    evil = "</script><script>document.title='evil'</script><!-- @data@ \u2028 \ud800"
    page = render_trees([a_tree(result=evil)], title="</title><b>")
    assert page.count("</script>") == 2
    assert "<title>&lt;/title&gt;&lt;b&gt;</title>" in page
    assert "<h1>&lt;/title&gt;&lt;b&gt;</h1>" in page
    text = data_of(page)["runs"][0]["trees"][0]["segments"][2]["text"]
    assert text == evil.replace("\ud800", "?")


def test_numbers_that_json_lacks_are_left_out():
    tree = a_tree()
    bad = dataclasses.replace(tree.leaves[0], reward=float("nan"))
    tree = dataclasses.replace(tree, leaves=(bad, *tree.leaves[1:]))
    leaf = data_of(render_trees([tree], title="x"))["runs"][0]["trees"][0]["leaves"][0]
    assert leaf["reward"] is None


def test_a_tree_of_64_leaves_and_20_turns_is_small():
    page = render_trees([big_tree()], title="x", decode=lambda token: f" word{token}")
    assert len(page.encode()) < MAX_BYTES


def test_one_file_per_iteration(tmp_path):
    run = a_run(tmp_path / "run", 3, 12)
    alarm = {"iteration": 12, "name": "zero", "message": "M.", "advice": "A."}
    (run / "alarms.jsonl").write_text(json.dumps(alarm) + '\n{"iterat')
    written = write_view(run)
    assert [file.name for file in written] == [
        "iteration_000003.html",
        "iteration_000012.html",
    ]
    alarms = [data_of(file.read_text(encoding="utf-8"))["alarms"] for file in written]
    assert alarms == [[], [{"name": "zero", "message": "M.", "advice": "A."}]]


def test_a_run_is_compared_by_task(tmp_path):
    run, other = a_run(tmp_path / "run", 3), a_run(tmp_path / "other", 2)
    (file,) = write_view(run, 3, compare=other, out=tmp_path / "out")
    runs = data_of(file.read_text(encoding="utf-8"))["runs"]
    assert [one["name"] for one in runs] == ["run · iteration 3", "other · 2"]
    assert [tree["id"] for tree in runs[1]["trees"]] == ["t1"]


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ConfigError, match="keeps no trees"):
        write_view(tmp_path)
    with pytest.raises(ConfigError, match="of iteration 4: it has those of 3"):
        write_view(a_run(tmp_path / "run", 3), 4)
