"""The tree viewer: the trees of an iteration as one self-contained HTML file.

Page, style and script lie in `viewer/` and are put into the file, which asks nobody
for anything: its content security policy forbids every request. A file that would be
too big to open at once shows long texts without their middle.
"""

import html
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from rllib_arpo.data.tree_files import read_trees
from rllib_arpo.errors import ConfigError
from rllib_arpo.storage import write_output
from rllib_arpo.tracking.viewer_data import (
    CHARS_PER_TOKEN,
    AdvantageSettings,
    Decode,
    Pieces,
    embedded,
    run_data,
)
from rllib_arpo.tracking.viewer_files import (
    TreesByTask,
    advantage_settings,
    alarms,
    decoder,
    tree_files,
)
from rllib_arpo.tree import RolloutTree

VIEWS = "views"

MAX_PAGE_BYTES = 2_000_000
# Characters that a text keeps, the first that makes the page small enough. Segments
# cost about 300 bytes each without any text, so thousands of them have their size.
TEXT_LIMITS = (None, 16_000, 8000, 4000, 2000, 1000, 500, 250, 120, 60)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownRun:
    """What one side of the page shows.

    Attributes:
        name: of the run, and of the iteration that all trees are of.
        trees: of the iteration, or of several.
        iterations: of each tree where they differ, else empty.
        settings: how the run makes advantages of rewards.
        decode: text of one token id; without it a token is shown by its number.
    """

    name: str
    trees: Sequence[RolloutTree]
    iterations: Sequence[int] = ()
    settings: AdvantageSettings = field(default_factory=AdvantageSettings)
    decode: Decode | None = None


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
        compare: another run; beside each tree stands its tree of the same task, of
            the same iteration or else of the nearest that has one.
        out: folder for the files, `views` in the run's folder when None.

    Returns:
        The files, in the order of their iterations.

    Raises:
        ConfigError: there are no trees.
        DataError: a file of trees cannot be read.
        CheckpointError: a page cannot be written.
    """
    kept = tree_files(run)
    if iteration is not None and iteration not in kept:
        raise ConfigError(
            f"{run} keeps no trees of iteration {iteration}: it has those of "
            f"{', '.join(map(str, kept))}"
        )
    name, other_name = _names(run, compare)
    settings, decode = advantage_settings(run), decoder(run)
    other_trees = None if compare is None else TreesByTask(tree_files(compare))
    folder = out if out is not None else run / VIEWS
    written: list[Path] = []
    for number in kept if iteration is None else [iteration]:
        shown = ShownRun(
            name=f"{name} · iteration {number}",
            trees=list(read_trees(kept[number])),
            settings=settings,
            decode=decode,
        )
        other = None
        if compare is not None and other_trees is not None:
            nearest = [
                other_trees.nearest(tree.task.task_id, number) for tree in shown.trees
            ]
            found = [pair for pair in nearest if pair is not None]
            other = ShownRun(
                name=other_name,
                trees=[tree for _, tree in found],
                iterations=[at for at, _ in found],
                settings=advantage_settings(compare),
                decode=decoder(compare),
            )
        page = render_trees(shown, other=other, alarms=alarms(run, number))
        file = folder / f"iteration_{number:06d}.html"
        write_output(file, page)
        written.append(file)
    return written


def render_trees(
    run: ShownRun,
    *,
    other: ShownRun | None = None,
    alarms: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page as text.

    Args:
        run: whose trees are listed.
        other: a run to compare with, its trees matched by `task_id`; tasks that both
            have come first.
        alarms: with "name", "message" and "advice".

    Returns:
        At most 2 MB of UTF-8, unless the segments are too many for that even with
        all their texts at the shortest.
    """
    runs = [run]
    if other is not None:
        both = {tree.task.task_id for tree in other.trees}
        first = sorted(run.trees, key=lambda tree: tree.task.task_id not in both)
        runs = [replace(run, trees=first), other]
    page = ""
    for limit in TEXT_LIMITS:
        if limit != TEXT_LIMITS[-1] and _least_bytes(runs, limit) > MAX_PAGE_BYTES:
            continue
        page = _page(runs, alarms, limit)
        if len(page.encode()) <= MAX_PAGE_BYTES:
            break
    return page


def _least_bytes(runs: Sequence[ShownRun], limit: int | None) -> int:
    """What texts and entropies take at least; far quicker than to make the page."""
    most = sys.maxsize if limit is None else limit
    return sum(
        min(len(segment.text), most)
        + 2 * min(len(segment.entropies), most // CHARS_PER_TOKEN)
        for run in runs
        for tree in run.trees
        for segment in tree.segments
    )


def _page(
    runs: Sequence[ShownRun], alarms: Sequence[Mapping[str, Any]], limit: int | None
) -> str:
    pieces = Pieces()
    data = {
        "runs": [
            run_data(
                run.trees,
                name=run.name,
                iterations=run.iterations,
                pieces=pieces,
                decode=run.decode,
                settings=run.settings,
                limit=limit,
            )
            for run in runs
        ],
        "pieces": pieces.texts,
        "limit": limit,
        "alarms": [
            {key: str(alarm.get(key, "")) for key in ("name", "message", "advice")}
            for alarm in alarms
        ],
    }
    parts = files("rllib_arpo.tracking") / "viewer"
    page = (parts / "page.html").read_text(encoding="utf-8")
    texts = {
        "title": html.escape(runs[0].name),
        "style": (parts / "viewer.css").read_text(encoding="utf-8"),
        "script": (parts / "viewer.js").read_text(encoding="utf-8"),
        "data": embedded(data),
    }
    # In one pass: a text may hold what looks like a mark.
    return re.sub(f"@({'|'.join(texts)})@", lambda mark: texts[mark[1]], page)


def _names(run: Path, compare: Path | None) -> tuple[str, str]:
    """Short names of both runs that differ."""
    if compare is None:
        return run.absolute().name, ""
    short = run.absolute().name, compare.absolute().name
    return short if short[0] != short[1] else (str(run), str(compare))
