"""Checkpoints are whole or not there: saves, copies, full disks."""

import json
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from ray import tune

from rllib_arpo import ARPO
from rllib_arpo.errors import CheckpointError
from rllib_arpo.storage import (
    fault_of,
    merged_aside,
    readable,
    write_contents,
    write_whole,
    written_aside,
)
from tests.scripts import run_script
from tests.tiny_runs import arpo_config, learner_weights, running, same

LOCAL = LocalFileSystem()
INTACT = "The one before is intact."


def save(target: Path, text: str) -> None:
    with written_aside(target, intact=INTACT) as aside:
        aside.mkdir()
        (aside / "state").write_text(text)
        write_contents(str(aside), LOCAL)


def test_a_folder_is_replaced_as_a_whole(tmp_path) -> None:
    target = tmp_path / "checkpoint"
    save(target, "one")
    (target / "stale").touch()
    save(target, "two")
    assert (target / "state").read_text() == "two"
    assert {entry.name for entry in target.iterdir()} == {"state", "contents.json"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_an_error_while_writing_leaves_what_was_there(tmp_path) -> None:
    target = tmp_path / "checkpoint"
    save(target, "one")
    with (
        pytest.raises(CheckpointError, match=r"No space left.*MB are free.*before is"),
        written_aside(target, intact=INTACT) as aside,
    ):
        aside.mkdir()
        (aside / "state").write_text("two")
        raise OSError(28, "No space left on device")
    assert (target / "state").read_text() == "one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_a_folder_that_was_set_aside_is_read_and_put_back(tmp_path) -> None:
    # What a kill between the two renamings leaves.
    target = tmp_path / "checkpoint"
    save(target, "one")
    target.rename(tmp_path / "checkpoint.before")
    assert readable(target) == tmp_path / "checkpoint.before"
    save(target, "two")
    assert readable(target) == target
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_a_shorter_or_missing_file_is_found(tmp_path) -> None:
    target = tmp_path / "checkpoint"
    save(target, "one")
    assert fault_of(str(target), LOCAL) is None
    (target / "state").write_text("on")
    assert fault_of(str(target), LOCAL) == "state has 2 bytes of 3"
    (target / "state").unlink()
    assert fault_of(str(target), LOCAL) == "it lacks state"
    (target / "contents.json").write_text("{")
    assert "cannot be read" in str(fault_of(str(target), LOCAL))
    (target / "contents.json").unlink()
    assert fault_of(str(target), LOCAL) == "there is no contents.json in it"


def test_a_model_folder_keeps_its_other_files(tmp_path) -> None:
    folder = tmp_path / "model"
    for text in ("one", "two"):
        with merged_aside(folder) as aside:
            aside.mkdir()
            (aside / "weights").write_text(text)
        (folder / "notes").touch()
        (folder / "pictures").mkdir(exist_ok=True)
        (folder / "pictures" / "one").write_text(text)
    with (
        pytest.raises(CheckpointError, match="is intact"),
        merged_aside(folder) as aside,
    ):
        aside.mkdir()
        (aside / "weights").write_text("thr")
        raise OSError(28, "No space left on device")
    assert (folder / "weights").read_text() == "two"
    assert (folder / "pictures" / "one").read_text() == "two"
    names = {entry.name for entry in folder.iterdir()}
    assert names == {"weights", "notes", "pictures"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_file_that_cannot_be_written_is_named(tmp_path) -> None:
    file = tmp_path / "summary.json"
    write_whole(file, "{}\n")
    assert file.read_text() == "{}\n"
    with pytest.raises(CheckpointError, match=r"cannot write .*nowhere/summary"):
        write_whole(tmp_path / "nowhere" / "summary.json", "{}\n")


@pytest.fixture(scope="module")
def algorithm(almanac_model, ray_session):
    with running(arpo_config(almanac_model)) as algorithm:
        yield algorithm


def test_a_checkpoint_goes_to_a_new_an_empty_or_an_old_folder(
    algorithm, tmp_path
) -> None:
    target = tmp_path / "checkpoint"
    assert algorithm.save_to_path(target) == str(target)
    # Tune makes the folder that it wants a checkpoint in.
    (tmp_path / "empty").mkdir()
    algorithm.save_checkpoint(str(tmp_path / "empty"))
    (target / "stale").touch()
    algorithm.save_to_path(f"file://{target}")
    assert not (target / "stale").exists()
    for folder in (target, tmp_path / "empty"):
        assert fault_of(str(folder), LOCAL) is None
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint", "empty"}
    # Without a path RLlib makes one up.
    assert fault_of(algorithm.save_to_path(), LOCAL) is None


def test_a_folder_with_other_files_is_not_replaced(algorithm, tmp_path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match="holds other files"):
        algorithm.save_to_path(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_checkpoint_that_is_not_whole_is_refused_before_anything_starts(
    algorithm, tmp_path
) -> None:
    target = tmp_path / "checkpoint"
    algorithm.save_to_path(target)
    state = next(target.glob("learner_group/learner/rl_module/*/module_state.pkl"))
    state.write_bytes(state.read_bytes()[:-1])
    for path in (target, f"file://{target}", tune.Checkpoint(str(target))):
        with pytest.raises(CheckpointError, match=r"module_state\.pkl has \d+ bytes"):
            ARPO.from_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"module_state\.pkl has \d+ bytes"):
        algorithm.restore_from_path(str(target))
    with pytest.raises(CheckpointError, match=r"there is no contents\.json"):
        ARPO.from_checkpoint(tmp_path / "nowhere")


def test_where_nothing_can_be_renamed_the_list_of_files_is_written_last(
    algorithm, tmp_path
) -> None:
    store = SubTreeFileSystem(str(tmp_path), LOCAL)
    algorithm.save_to_path("checkpoint", filesystem=store)
    saved = learner_weights(algorithm)
    algorithm.train()
    algorithm.restore_from_path("checkpoint", filesystem=store)
    assert same(saved, learner_weights(algorithm))
    # A save that is killed leaves no list.
    assert fault_of("checkpoint", store) is None
    with pytest.raises(TypeError):
        algorithm.save_to_path("checkpoint", filesystem=store, state=3)  # type: ignore[arg-type]
    assert fault_of("checkpoint", store) == "there is no contents.json in it"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_a_full_disk_the_checkpoint_before_stays(almanac_model, tmp_path) -> None:
    """Saves, exports and records on a disk of a few MB that is filled up."""
    said = json.loads(
        run_script("disk_full", almanac_model, tmp_path, small_disk=tmp_path / "disk")
    )
    print(f"disk: {said['disk']}")
    for learner in ("local", "remote"):
        seen = said[learner]
        assert "cannot write" in seen["checkpoint"], seen
        assert "is intact" in seen["checkpoint"]
        assert "MB are free" in seen["checkpoint"]
        assert seen["before_is_whole_and_loads"]
        assert "cannot write" in seen["model"]
        assert "cannot write" in seen["summary"]
        assert seen["left_over"] == []
        assert seen["saved_again"]
