"""Mixtures: several sources, each with its share of the tasks that are drawn.

Every source is walked over in shuffled epochs of its own, so that a small one with a
large share comes round again while a large one is still in its first epoch. Whose
turn it is follows from the weights and the counts alone (R. Tijdeman, "The chairman
assignment problem", 1980): after any number of draws each source has had its share,
to less than one task, so no batch is short of one by chance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from rllib_arpo.data.cursor import CursorState, TaskCursor
from rllib_arpo.errors import ConfigError, DataError
from rllib_arpo.tree import Task

ROUNDING = 1e-9


@dataclass(frozen=True)
class Mixture:
    """Sources to train on together.

        Mixture([DataFile("math.parquet"), "qa.jsonl"], weights=[2, 1])

    Args:
        sources: files, functions or lists of tasks; no mixtures.
        weights: one per source, positive: its share of the drawn tasks, up to a
            common factor. None: as many as each holds, so all end together.

    Raises:
        ConfigError: there is no source, or the weights do not fit.
    """

    sources: Sequence[Any]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("a mixture needs at least one source")
        if any(isinstance(source, Mixture) for source in self.sources):
            raise ConfigError("a mixture cannot hold another: name the sources in one")
        if self.weights is None:
            return
        if len(self.weights) != len(self.sources):
            raise ConfigError(
                f"`weights` has {len(self.weights)} numbers for {len(self.sources)} "
                "sources: give one for each"
            )
        if not all(math.isfinite(w) and w > 0 for w in self.weights):
            raise ConfigError(f"`weights` ({list(self.weights)}) must be positive")


class MixtureState(TypedDict):
    """Where a `MixtureCursor` stands; plain numbers, for a checkpoint."""

    shares: list[float]
    cursors: list[CursorState]


class MixtureCursor:
    """Walks over several sequences of tasks, each with its share.

    Args:
        sources: at least one sequence, with at least one task each.
        weights: as in `Mixture`.
        seed: of the orders.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Task]],
        *,
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        sizes = [len(tasks) for tasks in sources]
        total = math.fsum(weights or sizes)
        self._shares = [weight / total for weight in weights or sizes]
        # Sources of the same size must not be walked over in step.
        seeds = np.random.SeedSequence(seed).generate_state(len(sources)).tolist()
        self._cursors = [
            TaskCursor(tasks, seed=own)
            for tasks, own in zip(sources, seeds, strict=True)
        ]
        self._drawn = [0] * len(sources)

    def next(self, n: int) -> list[Task]:
        """The next `n` tasks."""
        turns: list[int] = []
        for _ in range(n):
            turn = next_turn(self._shares, self._drawn)
            self._drawn[turn] += 1
            turns.append(turn)
        drawn = [
            iter(cursor.next(turns.count(number)))
            for number, cursor in enumerate(self._cursors)
        ]
        return [next(drawn[turn]) for turn in turns]

    def get_state(self) -> MixtureState:
        """What `set_state` needs to go on here."""
        return MixtureState(
            shares=list(self._shares),
            cursors=[cursor.get_state() for cursor in self._cursors],
        )

    def set_state(self, state: MixtureState) -> None:
        """Go on where `state` was taken.

        Raises:
            DataError: it was taken over other sources or shares.
        """
        if state.get("shares") != self._shares:
            raise DataError(
                f"the cursor's state is of a mixture with the shares "
                f"{state.get('shares')}, this one's are {self._shares}: resume with "
                "the sources and weights that the run began with"
            )
        for cursor, own in zip(self._cursors, state["cursors"], strict=True):
            cursor.set_state(own)
        self._drawn = [
            own["epoch"] * own["num_tasks"] + own["position"]
            for own in state["cursors"]
        ]


def next_turn(shares: Sequence[float], drawn: Sequence[int]) -> int:
    """Whose turn it is: of those that may be ahead, who must be served first.

        source i may be drawn at draw t if    λ_i·t − x_i ≥ 1/(2k−2)
        and must be, at the latest, at        (x_i + 1 − 1/(2k−2)) / λ_i

    Args:
        shares: [k] λ, positive, sum 1.
        drawn: [k] x, how often each has been drawn; t = sum + 1.

    Returns:
        Its index; |x_i − λ_i·t| stays below 1 for every i and t.
    """
    slack = 1 / (2 * len(shares) - 2) if len(shares) > 1 else 0.0
    draw = sum(drawn) + 1
    ready = [
        i
        for i, share in enumerate(shares)
        if share * draw - drawn[i] >= slack - ROUNDING
    ]
    return min(ready, key=lambda i: (drawn[i] + 1 - slack) / shares[i])
