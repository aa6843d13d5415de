import json
import math

import numpy as np
import pytest

from rllib_arpo.errors import DataError
from rllib_arpo.tracking.curves import lone_points, plot_run, plot_runs, read_metrics

PANEL_TITLES = {
    "Reward and accuracy",
    "Tool calls",
    "Entropy of the policy",
    "Branches",
    "Tokens shared",
    "Response length",
    "Time per iteration",
    "Throughput",
}


def full_row(iteration, shift=0.0):
    return {
        "iteration": iteration,
        "stage": "arpo",
        "reward_mean": -0.5 + iteration / 10 + shift,
        "accuracy": 0.2 + iteration / 20 + shift,
        "tool_calls_per_trajectory": 1.0 + iteration / 10 + shift,
        "entropy_after_tool": 0.9 - iteration / 40 + shift,
        "entropy_elsewhere": 0.4 - iteration / 40 + shift,
        "branches_per_tree": 4.0 - iteration / 5 + shift,
        "tokens_paths": 1500.0 + shift,
        "tokens_unique": 1000.0,
        "response_tokens": 54.0 + shift,
        "time_generate_s": 1.2 + shift,
        "time_tools_s": 0.3,
        "time_learn_s": 0.9,
        "time_sync_s": 0.1,
        "tokens_per_s": 2000.0 + 100 * iteration + shift,
    }


def write_run(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def titles_in(png):
    """Titles in the SVG beside a PNG, where matplotlib writes each as a comment."""
    svg = png.with_suffix(".svg").read_text()
    return {title for title in PANEL_TITLES if f"<!-- {title} -->" in svg}


def test_a_run_is_drawn_as_png_and_svg_beside_its_metrics(tmp_path):
    run = write_run(tmp_path / "run", [full_row(i) for i in range(12)])
    png = plot_run(run)
    assert png == run / "curves.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    assert titles_in(png) == PANEL_TITLES


def test_a_key_that_was_not_logged_is_not_drawn(tmp_path):
    rows = [{"iteration": i, "accuracy": 0.5, "tokens_per_s": 9.0} for i in range(3)]
    png = plot_run(write_run(tmp_path, rows))
    assert titles_in(png) == {"Reward and accuracy", "Throughput"}
    assert "<!-- reward -->" not in png.with_suffix(".svg").read_text()


def test_nan_and_null_are_gaps_and_a_key_of_nothing_else_is_not_drawn(tmp_path):
    rows = [full_row(i) for i in range(4)]
    rows[1]["accuracy"] = math.nan
    rows[2]["accuracy"] = None
    for row in rows:
        row["branches_per_tree"] = math.nan
    run = write_run(tmp_path, rows)
    # 0.2 + iteration / 20: 0.2 and 0.35 at both ends
    np.testing.assert_allclose(
        read_metrics(run / "metrics.jsonl")["accuracy"], [0.2, np.nan, np.nan, 0.35]
    )
    assert titles_in(plot_run(run)) == PANEL_TITLES - {"Branches"}


def test_a_value_between_gaps_is_found_to_be_drawn_as_a_point():
    nan = math.nan
    assert lone_points(np.array([1.0, nan, 2.0, nan, 3.0, 4.0])) == [0, 2]
    assert lone_points(np.array([1.0])) == [0]
    assert lone_points(np.array([1.0, 2.0, nan])) == []


def test_the_picture_of_several_runs_says_what_its_band_is(tmp_path):
    runs = [write_run(tmp_path / name, [full_row(0)]) for name in "ab"]
    svg = plot_runs(runs, tmp_path / "both").with_suffix(".svg").read_text()
    assert "<!-- line: mean of 2 runs, band: from the least to the greatest -->" in svg


def test_a_key_that_starts_late_is_nan_before(tmp_path):
    run = write_run(tmp_path, [{"iteration": 0}, {"iteration": 1, "accuracy": 0.5}])
    metrics = read_metrics(run / "metrics.jsonl")
    np.testing.assert_array_equal(metrics["iteration"], [0, 1])
    np.testing.assert_array_equal(metrics["accuracy"], [np.nan, 0.5])


@pytest.mark.parametrize("torn", ['{"iterat', '{"iteration": 2}', "{é"])
def test_a_last_line_without_an_end_is_left_out(torn, tmp_path):
    """A kill or a full disk left it, perhaps in the middle of a character."""
    run = write_run(tmp_path, [{"iteration": 0}, {"iteration": 1}])
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(torn.encode()[:-1])
    np.testing.assert_array_equal(
        read_metrics(run / "metrics.jsonl")["iteration"], [0, 1]
    )


def test_a_stage_that_counts_anew_goes_on_after_the_one_before(tmp_path):
    stages = [("sft", 1), ("sft", 2), ("arpo", 1), ("arpo", 2)]
    rows = [{"stage": stage, "iteration": i} for stage, i in stages]
    run = write_run(tmp_path, rows)
    # sft ends at 2; arpo's 1 and 2 follow as 3 and 4
    np.testing.assert_array_equal(
        read_metrics(run / "metrics.jsonl")["iteration"], [1, 2, 3, 4]
    )


def test_an_iteration_repeated_after_a_resume_takes_the_last(tmp_path):
    values = [(1, 0.1), (2, 0.2), (3, 0.3), (2, 0.6), (3, 0.7)]
    rows = [{"iteration": i, "accuracy": value} for i, value in values]
    metrics = read_metrics(write_run(tmp_path, rows) / "metrics.jsonl")
    np.testing.assert_array_equal(metrics["iteration"], [1, 2, 3])
    np.testing.assert_array_equal(metrics["accuracy"], [0.1, 0.6, 0.7])


def test_runs_of_different_length_are_drawn_together(tmp_path):
    folders = [
        write_run(tmp_path / str(seed), [full_row(i, seed / 10) for i in range(n)])
        for seed, n in enumerate((5, 8, 3))
    ]
    png = plot_runs(folders, tmp_path / "figures" / "seeds.png")
    assert png == tmp_path / "figures" / "seeds.png"
    assert titles_in(png) == PANEL_TITLES
    # One band per line: reward, accuracy, calls, 2 entropies, branches, token ratio,
    # response length, throughput = 9, and 4 stacked areas.
    assert png.with_suffix(".svg").read_text().count('id="FillBetween') == 9 + 4


def test_the_token_ratio_is_of_each_iteration(tmp_path):
    rows = [
        {"iteration": 1, "tokens_paths": 1500.0, "tokens_unique": 1000.0},
        {"iteration": 2, "tokens_paths": 3000.0, "tokens_unique": 1000.0},
        {"iteration": 3, "tokens_unique": 1000.0},
    ]
    metrics = read_metrics(write_run(tmp_path, rows) / "metrics.jsonl")
    np.testing.assert_array_equal(metrics["token_ratio"], [1.5, 3.0, np.nan])


def test_a_dot_in_the_name_of_the_picture_is_kept(tmp_path):
    run = write_run(tmp_path / "run", [full_row(0)])
    assert plot_runs([run], tmp_path / "lr0.01").name == "lr0.01.png"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"metrics\.jsonl: empty"),
        ("\n\n", r"metrics\.jsonl: empty"),
        (
            '{"iteration": 0}\n{"iteration": 1, "acc\n',
            r"metrics\.jsonl, line 2: not JSON",
        ),
        ("[1, 2]\n", r"metrics\.jsonl, line 1: expected a JSON object, got '\[1, 2\]'"),
        (
            '{"accuracy": 1}\n',
            r"line 1: field 'iteration' must be an integer, got None",
        ),
        ('{"iteration": true}\n', r"line 1: field 'iteration' must be .* got True"),
    ],
)
def test_broken_metrics_are_refused_with_file_and_line(tmp_path, text, message):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        plot_run(tmp_path)
    assert not (tmp_path / "curves.png").exists()


def test_bytes_that_are_not_text_are_refused_with_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\x00\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl: not UTF-8"):
        plot_run(tmp_path)


def test_a_folder_without_metrics_is_refused_with_the_file(tmp_path):
    with pytest.raises(DataError, match=r"metrics\.jsonl: no such file"):
        plot_run(tmp_path)


def test_no_runs_are_refused(tmp_path):
    with pytest.raises(DataError, match="at least one folder"):
        plot_runs([], tmp_path / "curves.png")
