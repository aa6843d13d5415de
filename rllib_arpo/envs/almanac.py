"""The embedded world: questions that need look-ups and arithmetic, on any laptop.

An almanac lists made-up places in families of names one letter apart, with numeric
attributes and a neighbor each, one fact a line: `depth vifel = 44`. Every question
has its own edition (`world_id`) in which all values are drawn anew, so a fact can
never be memorised, only looked up; retrieval is noisy, so a hit has to be read.

    What is depth of vifel minus 57?                    one look-up
    What is depth of vifel times width of zepen?        two look-ups
    What is depth of neighbor of fozul plus 12?         bridge

To write a world of your own, keep this shape:

1. a class that draws tasks with checkable answers from disjoint splits and puts
   what its tools need into `Task.metadata` (here `AlmanacWorld.tasks`);
2. tools over it that follow `rllib_arpo.tools.tool.Tool` (here `AlmanacSearch`);
3. a `ToolUseEnv` whose `make_tools` hands them out (here `AlmanacEnv`);
4. for a model from scratch, an expert that writes traces for the cold start and a
   tokenizer (`almanac_expert.py`, `almanac_model.py`). A pretrained model needs
   neither.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Self

import bm25s
import numpy as np
from numpy.typing import NDArray

from rllib_arpo.envs.tool_use_env import ToolUseEnv
from rllib_arpo.errors import ConfigError
from rllib_arpo.tools.python import PythonTool
from rllib_arpo.tools.tool import Tool
from rllib_arpo.tree import Message, Task

Split = Literal["train", "validation", "test"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
ATTRIBUTES = ("area", "depth", "height", "length", "weight", "width")
RELATION = "neighbor"
FIELDS = (*ATTRIBUTES, RELATION)
OPERATORS = {"plus": "+", "minus": "-", "times": "*"}
KINDS = ("one_hop", "two_lookups", "bridge")

DEFAULT_WORLD_ID = 0

NUM_FAMILIES = 16
FAMILY_SIZE = 4
NUM_HITS = 3
FIELD_BOOST = 12
CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"

ENV_DEFAULTS: dict[str, Any] = {
    "dialogue": {"require_think": False, "result_template": "<result>{}</result>"},
    "max_response_tokens": 192,
    "max_tool_calls": 8,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a question asks, for tools, experts and tests; stored as metadata.

    Attributes:
        world_id: the edition of the almanac that answers it.
        kind: "one_hop", "two_lookups" or "bridge".
        lookups: (name, field) in the order to look them up. In a bridge the first
            is the relation and the second is asked of its value.
        operator: "plus", "minus" or "times".
        constant: right operand, None when the second look-up is.
    """

    world_id: int
    kind: str
    lookups: tuple[tuple[str, str], ...]
    operator: str
    constant: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Edition:
    """All values of one world id.

    Attributes:
        values: [num_names, num_attributes] int, 10 to 99.
        neighbors: [num_names] int, index of each name's neighbor; one cycle through
            all names, so every name is exactly one other's neighbor.
    """

    values: NDArray[np.int64]
    neighbors: NDArray[np.int64]


class AlmanacWorld:
    """Names, facts, search and questions; a pure function of its seed.

    Args:
        seed: draws the names and which facts belong to which split.
        search_noise: standard deviation of the noise added to a hit's score, in
            units of the score of a perfect match. Larger hides the right line more
            often.
    """

    def __init__(self, seed: int = 0, search_noise: float = 0.065) -> None:
        self.seed = seed
        self.search_noise = search_noise
        self.names = _draw_names(np.random.default_rng((seed, 0)))
        self._facts = [
            (number, field)
            for number in range(len(self.names))
            for field in range(len(FIELDS))
        ]
        pairs = [(n, f) for n, f in self._facts if FIELDS[f] != RELATION]
        order = np.random.default_rng((seed, 1)).permutation(len(pairs))
        held_out = len(pairs) // 6
        self._pairs: dict[Split, list[tuple[int, int]]] = {
            "test": [pairs[i] for i in order[:held_out]],
            "validation": [pairs[i] for i in order[held_out : 2 * held_out]],
            "train": [pairs[i] for i in order[2 * held_out :]],
        }
        self._index = bm25s.BM25(backend="numpy")
        self._index.index(
            [
                _grams(f"{FIELDS[field]} {self.names[number]}")
                for number, field in self._facts
            ],
            show_progress=False,
        )
        self._vocabulary = frozenset(self._index.vocab_dict)
        self._edition = lru_cache(maxsize=1024)(self._draw_edition)
        self._hits = lru_cache(maxsize=65536)(self._rank)

    def fact_pairs(self, split: Split) -> list[tuple[str, str]]:
        """(name, attribute) that questions of `split` ask about."""
        return [(self.names[n], FIELDS[f]) for n, f in self._pairs[split]]

    def value(self, world_id: int, name: str, field: str) -> str:
        """A fact as text: a number, or a name for the relation."""
        return self._value(world_id, self.names.index(name), FIELDS.index(field))

    def search(self, world_id: int, query: str) -> list[str]:
        """The best lines for `query`, best first; same edition and query, same hits.

        BM25 over letter pairs, so names one letter apart score alike; the noise
        depends on the edition and the words of the query, so the right line stands
        first, lower or is missing, and asking in another order of words draws anew.
        """
        hits = self._hits(world_id, " ".join(query.split()))
        return [
            f"{FIELDS[field]} {self.names[number]} = "
            f"{self._value(world_id, number, field)}"
            for number, field in hits
        ]

    def tasks(self, split: Split, num: int, seed: int = 0) -> list[Task]:
        """Draw questions: 40 % one look-up, 30 % two, 30 % over a neighbor.

        Splits share neither (name, attribute) pairs nor world ids.

        Raises:
            ConfigError: no such split.
        """
        if split not in SPLITS:
            raise ConfigError(f"`split` ({split!r}) must be one of {SPLITS}")
        place = SPLITS.index(split)
        rng = np.random.default_rng((self.seed, 2, place, seed))
        return [
            self._draw_task(
                split, (seed * 10**6 + number) * len(SPLITS) + place, number, rng
            )
            for number in range(num)
        ]

    def answer(self, question: Question) -> str:
        """The right answer, computed from the facts themselves."""
        read = [
            self.value(question.world_id, name, field)
            for name, field in question.lookups
        ]
        if question.kind == "bridge":
            read = read[1:]
        right = question.constant if question.constant is not None else int(read[1])
        return str(calculate(int(read[0]), question.operator, right))

    def _value(self, world_id: int, number: int, field: int) -> str:
        edition = self._edition(world_id)
        if FIELDS[field] == RELATION:
            return self.names[edition.neighbors[number]]
        return str(edition.values[number, field])

    def _draw_edition(self, world_id: int) -> Edition:
        rng = np.random.default_rng((self.seed, 3, world_id))
        values = rng.integers(10, 100, (len(self.names), len(ATTRIBUTES)))
        cycle = rng.permutation(len(self.names))
        neighbors = np.empty_like(cycle)
        neighbors[cycle] = np.roll(cycle, -1)
        return Edition(values=values, neighbors=neighbors)

    def _rank(self, world_id: int, query: str) -> list[tuple[int, int]]:
        grams = [gram for gram in _grams(query) if gram in self._vocabulary]
        if not grams:
            return []
        scores = self._index.get_scores(grams)
        noise = np.random.default_rng((self.seed, world_id, zlib.crc32(query.encode())))
        scores = scores + noise.normal(
            0.0, self.search_noise * scores.max(), len(scores)
        ) * (scores > 0.5 * scores.max())
        best = np.argpartition(-scores, NUM_HITS)[:NUM_HITS]
        return [self._facts[i] for i in best[np.argsort(-scores[best])]]

    def _draw_task(
        self, split: Split, world_id: int, number: int, rng: np.random.Generator
    ) -> Task:
        pairs = self._pairs[split]
        kind = KINDS[rng.choice(len(KINDS), p=(0.4, 0.3, 0.3))]
        operator = tuple(OPERATORS)[rng.integers(len(OPERATORS))]
        first = second = pairs[rng.integers(len(pairs))]
        while second[0] == first[0]:
            second = pairs[rng.integers(len(pairs))]
        constant: int | None = int(rng.integers(10, 100))
        name, attribute = self.names[first[0]], FIELDS[first[1]]
        lookups: tuple[tuple[str, str], ...] = ((name, attribute),)
        asked = f"{attribute} of {name} {operator}"
        if kind == "two_lookups":
            other = (self.names[second[0]], FIELDS[second[1]])
            lookups, constant = (*lookups, other), None
            asked += f" {other[1]} of {other[0]}"
        elif kind == "bridge":
            neighbors = self._edition(world_id).neighbors
            start = self.names[int(np.flatnonzero(neighbors == first[0])[0])]
            lookups = ((start, RELATION), *lookups)
            asked = f"{attribute} of {RELATION} of {start} {operator}"
        if constant is not None:
            asked += f" {constant}"
        question = Question(
            world_id=world_id,
            kind=kind,
            lookups=lookups,
            operator=operator,
            constant=constant,
        )
        return Task(
            task_id=f"almanac-{split}-{world_id}-{number}",
            messages=(Message(role="user", content=f"What is {asked}?"),),
            answers=(self.answer(question),),
            ability="math",
            source=f"almanac_{kind}",
            metadata={"world_id": world_id, "question": question},
        )


class AlmanacSearch:
    """Search in one edition of the almanac; holds no state."""

    name = "search"
    description = (
        "Looks up facts. Write a field and a name, for example: depth vifel. "
        f"Gives the {NUM_HITS} lines that match best, one fact a line."
    )

    def __init__(self, world: AlmanacWorld, world_id: int) -> None:
        self._world = world
        self._world_id = world_id

    async def call(self, arguments: str) -> str:
        return search_result(self._world.search(self._world_id, arguments))

    def fork(self) -> Self:
        return self


def search_result(hits: Sequence[str]) -> str:
    """What the model reads: a line per hit, `field name value`, best first.

    The space before each keeps the tokens of a line the same wherever it stands.
    """
    return "\n".join(f" {hit}" for hit in hits) or " no hits"


class AlmanacEnv(ToolUseEnv):
    """Questions about an almanac, with its search and Python as tools.

    Args:
        config: keys of `ToolUseEnv`, and `world_seed` for another almanac. Turns
            need no think block and episodes are short unless the config says so.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        settings = dict(config or {})
        self.world = shared_world(int(settings.pop("world_seed", 0)))
        super().__init__(ENV_DEFAULTS | settings)

    def make_tools(self, task: Task) -> Sequence[Tool]:
        """Search in the question's own edition, and a fresh Python.

        A question of a visitor names no edition and is answered from
        `DEFAULT_WORLD_ID`.

        Raises:
            ConfigError: the metadata hold another `world_id` than a number from 0 on,
                or a text with one.
        """
        named = str(task.metadata.get("world_id", DEFAULT_WORLD_ID))
        if not (named.isascii() and named.isdigit()):
            raise ConfigError(
                f"`world_id` ({named!r}) must be a whole number >= 0: leave it out for "
                f"edition {DEFAULT_WORLD_ID}"
            )
        return [AlmanacSearch(self.world, int(named)), PythonTool()]


@lru_cache(maxsize=8)
def shared_world(seed: int) -> AlmanacWorld:
    """One world per process and seed: it is never changed, only read."""
    return AlmanacWorld(seed)


def calculate(left: int, operator: str, right: int) -> int:
    """`left operator right` for the operators that questions name."""
    if operator == "plus":
        return left + right
    return left - right if operator == "minus" else left * right


def _grams(text: str) -> list[str]:
    """Letter pairs of each word; the words that name a field count as a whole too.

    The whole word, repeated, is the boost that makes a wrong field a rarer confusion
    than a wrong name.
    """
    grams: list[str] = []
    for word in text.lower().split():
        if word in FIELDS:
            grams += [word] * FIELD_BOOST
            continue
        marked = f"^{word}$"
        grams += [marked[i : i + 2] for i in range(len(marked) - 1)]
    return grams


def _draw_names(rng: np.random.Generator) -> tuple[str, ...]:
    """Families that differ from each other in two letters or more."""
    names: list[str] = []
    while len(names) < NUM_FAMILIES * FAMILY_SIZE:
        letters = [
            str(rng.choice(list(alphabet)))
            for alphabet in (CONSONANTS, VOWELS, CONSONANTS, VOWELS, CONSONANTS)
        ]
        place = int(rng.integers(5))
        alphabet = VOWELS if place % 2 else CONSONANTS
        swaps = rng.choice(list(alphabet), FAMILY_SIZE, replace=False)
        family = [
            "".join([*letters[:place], str(swap), *letters[place + 1 :]])
            for swap in swaps
        ]
        if all(_distance(new, old) > 1 for new in family for old in names):
            names += family
    return tuple(names)


def _distance(left: Sequence[str], right: Sequence[str]) -> int:
    return sum(a != b for a, b in zip(left, right, strict=True))
