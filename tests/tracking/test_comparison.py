"""Settings side by side, from files to the command."""

import itertools
import re

import pytest

from rllib_arpo.errors import DataError
from rllib_arpo.tracking.comparison import PANELS, group_runs, plot, plot_groups, style
from tests.commands import finish, run, start
from tests.tracking.test_curves import full_row, write_run

TITLES = {title for _, title, *_ in PANELS}


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(tmp_path / name, [full_row(i, shift) for i in range(5)])
        for name, shift in (("arpo_0", 0.0), ("arpo_1", 0.1), ("grpo_0", 0.2))
    ]


def comments(png):
    """Every text in the SVG, where matplotlib writes each as a comment."""
    return re.findall(r"<!-- (.*?) -->", png.with_suffix(".svg").read_text())


def test_each_setting_is_in_the_legend_and_every_axis_has_a_unit(runs, tmp_path):
    png = plot(runs, names=["ARPO", "ARPO", "GRPO"], out=tmp_path / "both")
    assert png == tmp_path / "both.png"
    texts = comments(png)
    assert {*texts} >= TITLES | {"ARPO (mean of 2 runs)", "GRPO"}
    assert texts.count("nats per token") == 2
    # A band in each panel for the setting of two seeds, none for the single run.
    bands = png.with_suffix(".svg").read_text().count('id="FillBetween')
    assert bands == len(PANELS)


def test_no_two_settings_look_the_same_without_colour():
    looks = [(style(i)["linestyle"], style(i)["marker"]) for i in range(16)]
    assert all(a != b for a, b in itertools.combinations(looks, 2))


def test_a_metric_that_one_setting_lacks_is_drawn_for_the_other(tmp_path):
    groups = {
        "all": [write_run(tmp_path / "a", [full_row(i) for i in range(3)])],
        "few": [write_run(tmp_path / "b", [{"iteration": 1, "accuracy": 0.5}])],
    }
    assert {*comments(plot_groups(groups, tmp_path / "out.png"))} >= TITLES
    del groups["all"]
    drawn = {*comments(plot_groups(groups, tmp_path / "few.png"))} & TITLES
    assert drawn == {"Accuracy"}


def test_runs_of_one_name_are_seeds_and_folders_name_the_rest(runs):
    assert group_runs(runs, ["a", "b", "a"]) == {
        "a": [runs[0], runs[2]],
        "b": [runs[1]],
    }
    assert list(group_runs(runs)) == ["arpo_0", "arpo_1", "grpo_0"]
    same = [runs[0] / "x", runs[1] / "x"]
    assert list(group_runs(same)) == [str(folder) for folder in same]


def test_a_number_of_names_that_is_not_that_of_the_runs_is_refused(runs):
    with pytest.raises(DataError, match=r"2 names \(a, b\) for 3 runs"):
        plot(runs, names=["a", "b"])
    with pytest.raises(DataError, match="at least one folder"):
        plot([])


def test_the_command_draws_one_run_beside_it_and_several_where_it_is_told(
    runs, tmp_path
):
    assert run("plot", runs[0], folder=tmp_path) == f"Wrote {runs[0]}/curves.png\n"
    assert (runs[0] / "curves.svg").is_file()
    run("plot", *runs, "--names", "ARPO, ARPO, GRPO", "--out", "x.png", folder=tmp_path)
    assert "ARPO (mean of 2 runs)" in comments(tmp_path / "x.png")
    code, _, err = finish(start("plot", tmp_path / "none", folder=tmp_path))
    assert code == 2
    assert "no such file" in err
