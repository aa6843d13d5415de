"""Files of commands that cannot be written: one line, and what was there stays."""

import json
import sys
from pathlib import Path

import pytest

from rllib_arpo.cli import main
from rllib_arpo.data.tree_files import write_trees
from rllib_arpo.errors import CheckpointError
from rllib_arpo.sweep_table import SweepTable, write_table
from tests.tracking.view_trees import a_tree

# Words of the command, and the file that its one line must name.
COMMANDS = {
    "plot run --out file/x.png": "file/x.png",
    "plot run --out folder.png": "folder.png",
    "export-traces run --out file/x.jsonl --min-reward 0": "file/x.jsonl",
    "view run --out file": "file/iteration_000003.html",
    "data check rows.jsonl --json file/x.json": "file/x.json",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of one iteration with its trees, rows, a file and a folder."""
    (tmp_path / "run" / "trees").mkdir(parents=True)
    write_trees(tmp_path / "run" / "trees" / "iteration_000003.parquet", [a_tree()])
    metrics = {"iteration": 3, "accuracy": 0.5}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    row = {"question": "1 + 1?", "answer": "2"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "file").write_text("before")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(words: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code."""
    monkeypatch.setattr(sys, "argv", ["rllib-arpo", *words.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.parametrize("words", COMMANDS)
def test_an_output_that_cannot_be_written_is_one_line_and_code_2(
    words, place, monkeypatch, capsys
):
    before = sorted(place.rglob("*"))
    code = command(words, monkeypatch)
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert line.startswith("Error: ")
    assert COMMANDS[words] in line
    assert sorted(place.rglob("*")) == before
    assert (place / "file").read_text() == "before"


def test_outputs_get_their_folders_and_leave_nothing_aside(place, monkeypatch, capsys):
    before = {*place.rglob("*")}
    for words in (
        "plot run --out new/x.png",
        "export-traces run --out new/x.jsonl",
        "view run --out new",
        "data check rows.jsonl --json new/x.json",
    ):
        assert command(words, monkeypatch) == 0, capsys.readouterr().err
    names = {path.name for path in {*place.rglob("*")} - before}
    assert names == {
        *("new", "x.png", "x.svg", "x.jsonl", "x.json"),
        "iteration_000003.html",
    }


def test_the_table_of_a_sweep_that_cannot_be_written_is_named(place):
    table = SweepTable(rows=[{"trial": "a"}], varied=[], metric=None)
    with pytest.raises(CheckpointError, match=r"cannot write file/trials\.csv"):
        write_table(Path("file"), table)
