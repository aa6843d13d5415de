"""What a person sees in the terminal: stages, progress with time left, tables."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from rllib_arpo.metrics import (
    ACCURACY,
    BRANCHES_PER_TREE,
    ENTROPY_AFTER_TOOL,
    ENTROPY_ELSEWHERE,
    FORMAT_ERROR_SHARE,
    RESPONSE_TOKENS,
    REWARD_MEAN,
    SOMETIMES,
    TOOL_CALLS_PER_TRAJECTORY,
)
from rllib_arpo.tree import RolloutTree, path

# Key of the record, heading, format: the columns of the live line of an iteration.
LIVE = (
    (REWARD_MEAN, "reward", "{:+.2f}"),
    (ACCURACY, "accuracy", "{:.2f}"),
    ("negative_log_likelihood", "nll", "{:.3f}"),
    (TOOL_CALLS_PER_TRAJECTORY, "calls", "{:.2f}"),
    (BRANCHES_PER_TREE, "branches", "{:.1f}"),
    (ENTROPY_AFTER_TOOL, "H after tool", "{:.3f}"),
    (ENTROPY_ELSEWHERE, "H else", "{:.3f}"),
    ("tokens_per_s", "tokens/s", "{:,.0f}"),
)
TIMES = ("generate", "tools", "learn", "sync")


class Console:
    """A terminal, or a log file when there is none."""

    def __init__(self, rich: RichConsole | None = None) -> None:
        self.rich = rich or RichConsole(highlight=False)

    def stage(self, title: str) -> None:
        """Say what begins."""
        self.rich.print(f"[bold]» {escape(title)}[/bold]")

    def say(self, text: str) -> None:
        """One plain line, not broken: it may hold a path or a command."""
        self.rich.print(escape(text), soft_wrap=True)

    def alarm(self, alarm: Mapping[str, Any]) -> None:
        """What goes wrong, from which iteration on, and what to try."""
        self.rich.print(
            f"[bold]Alarm[/bold] (iteration {alarm['iteration']}, {alarm['name']}): "
            f"{escape(alarm['message'])} Try: {escape(alarm['advice'])}"
        )

    @contextmanager
    def progress(
        self, total: int, name: str, *, done: int = 0
    ) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """A bar with time left; call it with each iteration's record.

        A line of figures is printed for each, under a line of headings: tool calls per
        trajectory, branches per tree, and the mean entropy H of a token, in nats,
        right after a tool result and elsewhere.
        """
        with self._bar() as bar:
            task = bar.add_task(name, total=total, completed=done)
            headings = ""

            def advance(record: Mapping[str, Any]) -> None:
                nonlocal headings
                if headings != live_headings(record):
                    headings = live_headings(record)
                    bar.console.print(headings, style="dim")
                bar.console.print(live_line(record))
                bar.advance(task)

            yield advance

    @contextmanager
    def count(
        self, total: int, name: str, *, done: int = 0
    ) -> Iterator[Callable[[int], None]]:
        """A bar with time left; call it with how many more are done."""
        with self._bar() as bar:
            task = bar.add_task(name, total=total, completed=done)
            yield lambda more: bar.advance(task, more)

    @contextmanager
    def waiting(self, title: str) -> Iterator[None]:
        """Seconds that pass meanwhile, and at the end a line that says how many."""
        start = time.monotonic()
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self.rich,
            transient=True,
        ) as bar:
            bar.add_task(escape(title), total=None)
            yield
        self.say(f"{title}: {time.monotonic() - start:.0f} s")

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.rich,
        )

    def before_and_after(
        self,
        before: Mapping[str, Mapping[str, float]],
        after: Mapping[str, Mapping[str, float]],
    ) -> None:
        """Two evaluations side by side."""
        table = Table(title="Held-out questions")
        for column in ("", "cold start", "after ARPO"):
            table.add_column(column, justify="left" if not column else "right")
        rows = (
            ("accuracy, sampled (temperature 1)", "sampled", ACCURACY, "{:.1%}"),
            ("accuracy, greedy", "greedy", ACCURACY, "{:.1%}"),
            ("reward", "sampled", REWARD_MEAN, "{:+.2f}"),
            ("badly formed", "sampled", FORMAT_ERROR_SHARE, "{:.1%}"),
            (
                "tool calls per trajectory",
                "sampled",
                TOOL_CALLS_PER_TRAJECTORY,
                "{:.2f}",
            ),
            ("response tokens", "sampled", RESPONSE_TOKENS, "{:.0f}"),
            (
                "entropy after tools, nats",
                "sampled",
                ENTROPY_AFTER_TOOL,
                "{:.3f}",
            ),
            ("entropy elsewhere, nats", "sampled", ENTROPY_ELSEWHERE, "{:.3f}"),
        )
        for label, kind, key, form in rows:
            figures = [
                form.format(values[kind][key]) if key in values[kind] else "-"
                for values in (before, after)
            ]
            table.add_row(label, *figures)
        self.rich.print(table)

    def examples(self, trees: Sequence[RolloutTree]) -> None:
        """The first trajectory of each tree."""
        for tree in trees:
            leaf = tree.leaves[0]
            question = tree.task.messages[-1].content
            turns = "".join(
                f"[dim]{escape(s.text)}[/dim]\n"
                if s.role == "tool"
                else escape(s.text) + "\n"
                for s in (tree.segments[i] for i in path(tree, leaf)[1:])
            )
            right = " or ".join(tree.task.answers)
            self.rich.print(
                Panel(
                    turns.rstrip("\n"),
                    title=escape(question),
                    subtitle=f"reward {leaf.reward:+.1f}, the answer is "
                    f"{escape(right)}",
                )
            )

    def table(self, title: str, values: Mapping[str, float]) -> None:
        """Names and numbers."""
        table = Table(title=escape(title))
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name, value in sorted(values.items()):
            table.add_row(name, f"{value:.4g}")
        self.rich.print(table)

    def times(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Where the time went, over all iterations."""
        totals = {
            name: sum(float(r.get(f"time_{name}_s", 0.0)) for r in records)
            for name in TIMES
        }
        everything = sum(totals.values()) or 1.0
        table = Table(title="Where the time went")
        for column in ("", "seconds", "share"):
            table.add_column(column, justify="left" if not column else "right")
        for name, seconds in totals.items():
            table.add_row(name, f"{seconds:.1f}", f"{seconds / everything:.0%}")
        self.rich.print(table)


def live_headings(record: Mapping[str, Any]) -> str:
    """What stands over the figures of `live_line`."""
    names = [heading for _, heading, _ in _columns(record)]
    return "  ".join(["iter", *(name.rjust(6) for name in names)])


def live_line(record: Mapping[str, Any]) -> str:
    """One line about an iteration: what was measured of it, in a fixed order."""
    figures = [
        (form.format(record[key]) if key in record else "-").rjust(max(len(heading), 6))
        for key, heading, form in _columns(record)
    ]
    return "  ".join([f"{record['iteration']:>4}", *figures])


def _columns(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The same for all iterations of a kind, also where one had no tool call."""
    has_trees = BRANCHES_PER_TREE in record
    return [
        column
        for column in LIVE
        if column[0] in record or (has_trees and column[0] in SOMETIMES)
    ]
