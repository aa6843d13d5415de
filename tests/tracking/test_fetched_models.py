"""The cache of fetched models, by files on this disk."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rllib_arpo.tracking.fetched_models import IN_USE_S, KEPT, fetched_model
from rllib_arpo.user_cache import user_cache


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return user_cache("models") / "tiny"


def writes(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "weights").write_text(text)


def refuses(folder: Path) -> None:
    raise AssertionError(f"{folder} is fetched again")


def grow_old(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder, (then, then))


def test_a_version_is_fetched_once() -> None:
    folder = fetched_model("tiny", "store /1", writes("one"))
    assert (folder / "weights").read_text() == "one"
    assert fetched_model("tiny", "store /1", refuses) == folder
    other = fetched_model("tiny", "another store /1", writes("other"))
    assert (other / "weights").read_text() == "other"


def test_two_that_ask_at_once_fetch_once() -> None:
    began, go_on, found = threading.Event(), threading.Event(), []

    def slow(folder: Path) -> None:
        began.set()
        assert go_on.wait(30)
        (folder / "weights").write_text("one")

    def ask(fetch: Callable[[Path], object]) -> None:
        found.append(fetched_model("tiny", "/1", fetch))

    first = threading.Thread(target=ask, args=(slow,))
    first.start()
    assert began.wait(30)
    second = threading.Thread(target=ask, args=(refuses,))
    second.start()
    go_on.set()
    first.join(30)
    second.join(30)
    assert len(found) == 2
    assert found[0] == found[1]


def test_what_broke_off_is_fetched_again(home: Path) -> None:
    def breaks(folder: Path) -> None:
        (folder / "weights").write_text("o")
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        fetched_model("tiny", "/1", breaks)
    assert [one.name for one in home.iterdir()] == ["lock"]
    folder = fetched_model("tiny", "/1", writes("one"))
    # As a process leaves it that was killed.
    aside = folder.rename(folder.with_name(f"{folder.name}.part"))
    (aside / "more").touch()
    assert fetched_model("tiny", "/1", writes("one")) == folder
    assert {one.name for one in home.iterdir()} == {"lock", folder.name}
    assert [one.name for one in folder.iterdir()] == ["weights"]


def test_versions_that_nobody_asks_for_go(home: Path) -> None:
    folders = [fetched_model("tiny", f"/{one}", writes(str(one))) for one in range(4)]
    assert all(folder.exists() for folder in folders)
    for number, folder in enumerate(folders):
        grow_old(folder, 2 * IN_USE_S - number)
    newest = fetched_model("tiny", "/0", refuses)
    assert newest == folders[0]
    left = {one for one in home.iterdir() if one.is_dir()}
    assert left == {folders[0], folders[3]}
    assert len(left) == KEPT
