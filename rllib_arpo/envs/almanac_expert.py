"""An expert of the almanac that writes traces for the cold start.

Clean traces answer right. Imperfect ones corrupt every decision on its own (the
query, the line that is read, a second search, the second look-up, Python, the
operator, the format), so that supervised learning teaches the moves and leaves
reinforcement learning to find out when each of them pays.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rllib_arpo.data.traces import Part, trace_tree
from rllib_arpo.envs.almanac import (
    ATTRIBUTES,
    OPERATORS,
    AlmanacWorld,
    Question,
    Split,
    calculate,
    search_result,
)
from rllib_arpo.envs.tag_dialogue import TagDialogue
from rllib_arpo.tree import RolloutTree, Task

# Other words for the same query draw other noise, so each is a new chance.
PHRASINGS = (
    "{field} {name}",
    "{name} {field}",
    "{field} {field} {name}",
    "{name} {name} {field}",
    "{field} {name} {name}",
    "{name} {field} {field}",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skill:
    """Chance of making each decision right.

    Attributes:
        full_query: asks for field and name, else for the name alone.
        right_line: reads the line that was asked for when it is among the hits.
        search_again: asks in other words when it is not.
        no_needless_search: does not ask again when it is.
        second_hop: makes the second look-up.
        python: computes with Python, else answers with the first number read.
        operator: takes the operator that the question names.
        box: puts the answer into a box.
    """

    full_query: float = 0.85
    right_line: float = 0.55
    search_again: float = 0.4
    no_needless_search: float = 0.9
    second_hop: float = 0.4
    python: float = 0.75
    operator: float = 0.9
    box: float = 0.94


IMPERFECT = Skill()
CLEAN = Skill(
    full_query=1.0,
    right_line=1.0,
    search_again=1.0,
    no_needless_search=1.0,
    second_hop=1.0,
    python=1.0,
    operator=1.0,
    box=1.0,
)


class AlmanacExpert:
    """Writes traces by running the real search.

    Args:
        world: the almanac to search.
        skill: the faults of the imperfect traces.
    """

    def __init__(self, world: AlmanacWorld, skill: Skill = IMPERFECT) -> None:
        self._world = world
        self._skill = skill

    def traces(
        self,
        num: int,
        *,
        dialogue: TagDialogue,
        seed: int = 0,
        clean_fraction: float = 0.4,
        split: Split = "train",
    ) -> list[RolloutTree]:
        """Trees of one leaf each, tokens as `AlmanacEnv` with `dialogue` makes them.

        Leaves have reward 0: the cold start learns from all traces alike.
        """
        rng = np.random.default_rng((seed, num))
        trees: list[RolloutTree] = []
        for task in self._world.tasks(split, num, seed):
            clean = bool(rng.random() < clean_fraction)
            parts = self.write_trace(task, rng, clean=clean)
            trees.append(trace_tree(task, parts, dialogue, seed=seed))
        return trees

    def write_trace(
        self, task: Task, rng: np.random.Generator, *, clean: bool
    ) -> list[Part]:
        """The turns of one answer: ("model", its text) and ("tool", a result).

        A line that is read is written down first, as
        `<think> depth vifel north 44</think>`: the decision is then one token, the
        part of the place, and the value follows from it.
        """
        question: Question = task.metadata["question"]
        skill = CLEAN if clean else self._skill
        draft = _Draft()
        read = self._look_up_operands(question, skill, rng, draft)
        answer = int(read[0].value)
        if rng.random() < skill.python:
            operator = question.operator
            if rng.random() >= skill.operator:
                operator = str(rng.choice([op for op in OPERATORS if op != operator]))
            constant = question.constant
            right = int(read[-1].value) if constant is None else constant
            named = read[-1].name if constant is None else str(constant)
            answer = calculate(answer, operator, right)
            facts = "".join(f" {fact.name} = {fact.value};" for fact in read)
            draft.say(
                f"<python>{facts} {read[0].name} {OPERATORS[operator]} {named}</python>"
            )
            draft.hear(str(answer))
        boxed = f"\\boxed{{{answer}}}" if rng.random() < skill.box else str(answer)
        draft.say(f"<answer>{boxed}</answer>")
        return draft.parts

    def _look_up_operands(
        self,
        question: Question,
        skill: Skill,
        rng: np.random.Generator,
        draft: "_Draft",
    ) -> list["_Fact"]:
        """The numbers read: one, or two for a question of two look-ups."""
        world_id, first = question.world_id, question.lookups[0]
        if question.kind == "one_hop":
            return [self._look_up(world_id, first, skill, rng, draft)]
        hop = rng.random() < skill.second_hop
        if question.kind == "two_lookups":
            wanted = question.lookups if hop else (first,)
            return [self._look_up(world_id, fact, skill, rng, draft) for fact in wanted]
        name = first[0]
        if hop:
            name = self._look_up(world_id, first, skill, rng, draft).value
            draft.note(f"{first[0]} = {name}")
        fact = (name, question.lookups[1][1])
        return [self._look_up(world_id, fact, skill, rng, draft)]

    def _look_up(
        self,
        world_id: int,
        fact: tuple[str, str],
        skill: Skill,
        rng: np.random.Generator,
        draft: "_Draft",
    ) -> "_Fact":
        """Search until satisfied, and read a line as if it were the right one."""
        name, field = fact
        full = rng.random() < skill.full_query
        right: list[str] = []
        readable: list[str] = []
        for number, phrasing in enumerate(PHRASINGS):
            words = phrasing if full or number else "{name}"
            query = words.format(field=field, name=name)
            hits = self._world.search(world_id, query)
            draft.say(f"<search> {query}</search>")
            draft.hear(search_result(hits))
            right = [hit for hit in hits if hit.startswith(f"{field} {name} ")]
            readable = [hit for hit in hits if _same_type(hit, field)] or readable
            stop = skill.no_needless_search if right else 1 - skill.search_again
            if readable and rng.random() < stop:
                break
        others = [hit for hit in readable if hit not in right]
        take_right = right and (not others or rng.random() < skill.right_line)
        line = right[0] if take_right else others[int(rng.integers(len(others)))]
        return _Fact(name, line.split()[-1])


class _Fact(NamedTuple):
    """What the expert takes for the value of a field of `name`."""

    name: str
    value: str


class _Draft:
    """Turns so far, and the thought that the next one opens with."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._thought = ""

    def note(self, line: str) -> None:
        self._thought = f"<think> {line}</think>"

    def say(self, text: str) -> None:
        self.parts.append(("model", self._thought + text))
        self._thought = ""

    def hear(self, text: str) -> None:
        self.parts.append(("tool", text))


def _same_type(hit: str, field: str) -> bool:
    """Whether the line holds a number when a number is asked for, a name else."""
    return (hit.split()[0] in ATTRIBUTES) == (field in ATTRIBUTES)
