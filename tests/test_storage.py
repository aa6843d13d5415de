"""Files that commands are to write: whole, or as they were, and refused early."""

import os
from pathlib import Path

import pytest

from rllib_arpo.errors import CheckpointError, ConfigError
from rllib_arpo.storage import check_output, output_aside, write_output


def test_an_output_gets_its_folder_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "new" / "x.json"
    check_output(file, flag="--json")
    assert list(file.parent.iterdir()) == []
    write_output(file, "1\n")
    write_output(file, "ü\n")
    assert file.read_text(encoding="utf-8") == "ü\n"
    assert list(file.parent.iterdir()) == [file]


def test_an_output_that_breaks_off_leaves_the_file_before_it(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_output(file, "1\n")
    with (
        pytest.raises(CheckpointError, match=r"x\.json: No space left.*is intact"),
        output_aside(file) as aside,
    ):
        aside.write_text("half of")
        raise OSError(28, "No space left on device")
    assert file.read_text() == "1\n"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("place", ["file/x.json", "folder", f"{'x' * 300}.json"])
def test_what_cannot_be_written_is_refused_before_and_named_after(
    place: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*another folder\.$"):
        write_output(tmp_path / place, "")
    with pytest.raises(ConfigError, match=r"--json .*: give (a|another) file"):
        check_output(tmp_path / place, flag="--json")


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_output(pipe, flag="--json")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_output(pipe, "1\n")
        assert os.read(reader, 9) == b"1\n"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_a_link_stays_one_and_its_file_is_replaced(tmp_path: Path) -> None:
    link, file = tmp_path / "link", tmp_path / "folder" / "x.json"
    write_output(file, "1\n")
    link.symlink_to(file)
    write_output(link, "2\n")
    assert link.is_symlink()
    assert file.read_text() == "2\n"
