"""The tree viewer: the trees of an iteration as one self-contained HTML file.

Page, style and script lie in `viewer/` and are put into the file, which asks nobody
for anything: its content security policy forbids every request.
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rllib_arpo.data.tree_files import read_trees
from rllib_arpo.errors import ConfigError
from rllib_arpo.tracking.viewer_data import Decode, Pieces, embedded, run_data
from rllib_arpo.tree import RolloutTree

ALARMS_FILE = "alarms.jsonl"
VIEWS = "views"


def write_view(
    run: Path,
    iteration: int | None = None,
    *,
    compare: Path | None = None,
    out: Path | None = None,
) -> list[Path]:
    """Write one HTML file per iteration.

    Args:
        run: folder of a run.
        iteration: which one; None is all that the run keeps trees of.
        compare: another run, whose trees of the same iteration stand beside those of
            the same task; where it has none of that iteration, its newest are used.
        out: folder for the files, `views` in the run's folder when None.

    Returns:
        The files, in the order of their iterations.

    Raises:
        ConfigError: there are no trees.
        DataError: a file of trees cannot be read.
    """
    kept = _tree_files(run)
    if iteration is not None and iteration not in kept:
        raise ConfigError(
            f"{run} keeps no trees of iteration {iteration}: it has those of "
            f"{', '.join(map(str, kept))}"
        )
    others = _tree_files(compare) if compare is not None else {}
    decode = _decoder(run)
    folder = out if out is not None else run / VIEWS
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for number in kept if iteration is None else [iteration]:
        other = None
        if compare is not None:
            chosen = number if number in others else max(others)
            other = (f"{compare.name} · {chosen}", list(read_trees(others[chosen])))
        page = render_trees(
            list(read_trees(kept[number])),
            title=f"{run.name} · iteration {number}",
            other=other,
            alarms=_alarms(run, number),
            decode=decode,
        )
        file = folder / f"iteration_{number:06d}.html"
        file.write_text(page, encoding="utf-8")
        written.append(file)
    return written


def render_trees(
    trees: Sequence[RolloutTree],
    *,
    title: str,
    other: tuple[str, Sequence[RolloutTree]] | None = None,
    alarms: Sequence[Mapping[str, Any]] = (),
    decode: Decode | None = None,
) -> str:
    """The page as text.

    Args:
        trees: of one iteration.
        title: names run and iteration.
        other: name and trees of a run to compare with, matched by `task_id`.
        alarms: with "name", "message" and "advice".
        decode: text of one token id; without it a token is shown by its number.
    """
    pieces = Pieces()
    runs = [run_data(trees, name=title, pieces=pieces, decode=decode)]
    if other is not None:
        name, others = other
        tasks = {tree.task.task_id for tree in trees}
        matched = [tree for tree in others if tree.task.task_id in tasks]
        runs.append(run_data(matched, name=name, pieces=pieces, decode=decode))
    data = {
        "runs": runs,
        "pieces": pieces.texts,
        "alarms": [
            {key: str(alarm.get(key, "")) for key in ("name", "message", "advice")}
            for alarm in alarms
        ],
    }
    parts = files("rllib_arpo.tracking") / "viewer"
    page = (parts / "page.html").read_text(encoding="utf-8")
    texts = {
        "title": html.escape(title),
        "style": (parts / "viewer.css").read_text(encoding="utf-8"),
        "script": (parts / "viewer.js").read_text(encoding="utf-8"),
        "data": embedded(data),
    }
    # In one pass: a text may hold what looks like a mark.
    return re.sub(f"@({'|'.join(texts)})@", lambda mark: texts[mark[1]], page)


def _tree_files(run: Path) -> dict[int, Path]:
    found = sorted((run / "trees").glob("iteration_*.parquet"))
    if not found:
        raise ConfigError(
            f"{run} keeps no trees: give the folder of a run, trained with "
            "num_saved_trees above 0"
        )
    return {int(file.stem.removeprefix("iteration_")): file for file in found}


def _alarms(run: Path, iteration: int) -> list[dict[str, Any]]:
    file = run / ALARMS_FILE
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    # A line without an end was cut by a kill.
    alarms = [json.loads(line) for line in lines if line.endswith("\n")]
    return [alarm for alarm in alarms if alarm["iteration"] == iteration]


def _decoder(run: Path) -> Decode | None:
    """Text of a token by the tokenizer that the run saved, if it did."""
    for folder in ("model", "base"):
        file = run / folder / "tokenizer.json"
        if file.is_file():
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(file))
            return lambda token: tokenizer.decode([token], skip_special_tokens=False)
    return None
