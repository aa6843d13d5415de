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
from tests.commands import finish, run, start
from tests.tracking.view_trees import a_tree, big_tree, shown

MAX_BYTES = 2_000_000


def data_of(page):
    found = re.search(
        r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S
    )
    assert found is not None
    return json.loads(found[1])


def a_run(folder, *iterations):
    (folder / "trees").mkdir(parents=True)
    for iteration in iterations:
        file = folder / "trees" / f"iteration_{iteration:06d}.parquet"
        write_trees(file, [a_tree()])
    return folder


def test_advantages_of_both_attributions_are_shown():
    tree = data_of(render_trees(shown(a_tree())))["runs"][0]["trees"][0]
    # Rewards 1, 0, 0: mean 1/3, sample standard deviation 1/sqrt(3).
    right, wrong = 2 / 3 * 3**0.5, -1 / 3 * 3**0.5
    shared = tree["segments"][1]
    assert tree["leaves"][0]["advantage"] == pytest.approx(right, rel=1e-4)
    assert shared["plus"] == pytest.approx(right, rel=1e-4)
    assert shared["minus"] == pytest.approx(wrong, rel=1e-4)
    assert shared["hard"] == pytest.approx((right + wrong) / 2, rel=1e-4)
    assert shared["paths"] == 2


def test_advantages_follow_the_settings_of_the_run(tmp_path):
    run = a_run(tmp_path / "run", 3)
    trees = [a_tree(), rewarded(a_tree(task_id="t2"), 1.0)]
    write_trees(run / "trees" / "iteration_000003.parquet", trees)
    config = {"normalize_by_std": False, "advantage_attribution": "hard", "lr": 1e-6}
    (run / "config.json").write_text(json.dumps(config))
    # Rewards 1, 0, 0 of the tree: mean 1/3.
    shown_run = first_run(run)
    assert (shown_run["attribution"], shown_run["by_std"]) == ("hard", False)
    leaves = shown_run["trees"][0]["leaves"]
    assert [leaf["advantage"] for leaf in leaves] == pytest.approx(
        [2 / 3, -1 / 3, -1 / 3], rel=1e-4
    )
    # Rewards 1, 0, 0, 1, 1, 1 of both trees: mean 2/3.
    config["advantage_normalization"] = "batch"
    (run / "config.json").write_text(json.dumps(config))
    trees = first_run(run)["trees"]
    assert [leaf["advantage"] for tree in trees for leaf in tree["leaves"]] == (
        pytest.approx([1 / 3, -2 / 3, -2 / 3, 1 / 3, 1 / 3, 1 / 3], rel=1e-4)
    )


def rewarded(tree, reward):
    leaves = [dataclasses.replace(leaf, reward=reward) for leaf in tree.leaves]
    return dataclasses.replace(tree, leaves=tuple(leaves))


def first_run(folder):
    (file,) = write_view(folder)
    return data_of(file.read_text(encoding="utf-8"))["runs"][0]


def test_tokens_keep_their_entropy_and_text():
    page = render_trees(shown(a_tree(), decode=lambda token: f"<{token}>"))
    data = data_of(page)
    segment = data["runs"][0]["trees"][0]["segments"][1]
    entropies = np.frombuffer(base64.b64decode(segment["entropies"]), "<f2")
    pieces = np.frombuffer(base64.b64decode(segment["pieces"]), "<u2")
    assert entropies.tolist() == [0.25, 0.75]
    assert [data["pieces"][i] for i in pieces] == ["<7>", "<9>"]


def test_text_cannot_break_out_of_the_page():
    evil = "</script><script>document.title='evil'</script><!-- @data@ \u2028 \ud800"
    page = render_trees(shown(a_tree(result=evil), name="</title><b>"))
    assert page.count("</script>") == 2
    assert "<title>&lt;/title&gt;&lt;b&gt;</title>" in page
    assert "<h1>&lt;/title&gt;&lt;b&gt;</h1>" in page
    text = data_of(page)["runs"][0]["trees"][0]["segments"][2]["text"]
    assert text == evil.replace("\ud800", "?")


def test_numbers_that_json_lacks_are_left_out():
    tree = a_tree()
    bad = dataclasses.replace(tree.leaves[0], reward=float("nan"))
    tree = dataclasses.replace(tree, leaves=(bad, *tree.leaves[1:]))
    leaf = data_of(render_trees(shown(tree)))["runs"][0]["trees"][0]["leaves"][0]
    assert leaf["reward"] is None


def test_a_tree_of_64_leaves_and_20_turns_is_small():
    page = render_trees(shown(big_tree(), decode=lambda token: f" word{token}"))
    assert len(page.encode()) < MAX_BYTES
    assert data_of(page)["limit"] is None


def test_long_texts_lose_their_middle_and_the_tree_nothing_else():
    # 1280 turns and 1216 results of 16,000 characters and 4000 tokens: 40 MB of text.
    text = "a" * 8000 + "é" * 8000
    tree = with_texts(big_tree(), text, num_tokens=4000)
    page = render_trees(shown(tree, decode=lambda token: f" word{token}"))
    assert len(page.encode()) < MAX_BYTES
    data = data_of(page)
    (drawn,) = data["runs"][0]["trees"]
    assert [s["parent"] for s in drawn["segments"]] == [s.parent for s in tree.segments]
    assert len(drawn["leaves"]) == 64
    turn = drawn["segments"][1]
    left = len(text) - data["limit"]
    note = f" […{left:,} characters left out…] "
    head, tail = turn["text"].split(note)
    assert head == "a" * len(head) and tail == "é" * len(tail)
    assert len(head) + len(tail) == data["limit"]
    # Of all tokens, not of those that are shown: 0, 1, ... 3999 thousandths.
    assert turn["n"] == 4000
    assert turn["entropy"] == pytest.approx(1.9995, rel=1e-4)
    shown_tokens = np.frombuffer(base64.b64decode(turn["entropies"]), "<f2")
    place, number = turn["gap"]
    assert number == 4000 - len(shown_tokens)
    assert shown_tokens[place] == pytest.approx((place + number) / 1000, rel=1e-3)


def test_a_short_text_beside_long_ones_is_whole():
    tree = with_texts(big_tree(), "b" * 4000, num_tokens=32)
    last = dataclasses.replace(tree.segments[-1], text="a short one")
    tree = dataclasses.replace(tree, segments=(*tree.segments[:-1], last))
    data = data_of(render_trees(shown(tree)))
    segments = data["runs"][0]["trees"][0]["segments"]
    assert segments[-1]["text"] == "a short one"
    assert "gap" not in segments[-1]


def with_texts(tree, text, *, num_tokens):
    """The tree with this text in every turn and result."""
    ids = np.arange(num_tokens, dtype=np.int32)
    segments = [
        dataclasses.replace(
            segment,
            text=text,
            token_ids=ids,
            entropies=(ids / 1000).astype(np.float32)
            if segment.role == "model"
            else segment.entropies,
        )
        for segment in tree.segments[1:]
    ]
    return dataclasses.replace(tree, segments=(tree.segments[0], *segments))


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


def test_a_run_is_compared_by_task_with_the_nearest_iteration(tmp_path):
    run = a_run(tmp_path / "run", 3)
    write_trees(
        run / "trees" / "iteration_000003.parquet", [a_tree(task_id="t0"), a_tree()]
    )
    other = a_run(tmp_path / "other", 1, 4, 9)
    (file,) = write_view(run, 3, compare=other, out=tmp_path / "out")
    runs = data_of(file.read_text(encoding="utf-8"))["runs"]
    assert [one["name"] for one in runs] == ["run · iteration 3", "other"]
    # What both have comes first.
    assert [tree["id"] for tree in runs[0]["trees"]] == ["t1", "t0"]
    assert [(tree["id"], tree["iteration"]) for tree in runs[1]["trees"]] == [("t1", 4)]


def test_runs_of_equal_names_are_told_apart(tmp_path):
    run, other = a_run(tmp_path / "a" / "train", 3), a_run(tmp_path / "b" / "train", 3)
    (file,) = write_view(run, compare=other)
    runs = data_of(file.read_text(encoding="utf-8"))["runs"]
    assert [one["name"] for one in runs] == [f"{run} · iteration 3", str(other)]


def test_the_command_writes_the_page_and_says_where(tmp_path):
    folder, other = a_run(tmp_path / "run", 3, 12), a_run(tmp_path / "other", 3)
    words = ("view", folder, "--iteration", 12, "--compare", other, "--out", "x")
    (page,) = run(*words, folder=tmp_path).splitlines()
    assert page == "x/iteration_000012.html"
    runs = data_of((tmp_path / page).read_text(encoding="utf-8"))["runs"]
    assert [tree["id"] for one in runs for tree in one["trees"]] == ["t1", "t1"]
    code, _, err = finish(start("view", tmp_path / "none", folder=tmp_path))
    assert code == 2
    assert "keeps no trees" in err


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ConfigError, match="keeps no trees"):
        write_view(tmp_path)
    with pytest.raises(ConfigError, match="of iteration 4: it has those of 3"):
        write_view(a_run(tmp_path / "run", 3), 4)
