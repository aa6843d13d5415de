"""An expert of the almanac that writes traces for the cold start.

Clean traces answer right. Imperfect ones corrupt every decision on its own (the
query, the line that is read, a second search, the second look-up, Python, the
operator, the format), so that supervised learning teaches the moves and leaves
reinforcement learning to find out when each of them pays.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rllib_arpo.envs.almanac import (
    ATTRIBUTES,
    OPERATORS,
    AlmanacWorld,
    Question,
    Split,
    calculate,
    neighbor_name,
    search_result,
)
from rllib_arpo.envs.dialogue import TagDialogue
from rllib_arpo.tree import Leaf, RolloutTree, Segment, Task, ToolCall

Part = tuple[Literal["model", "tool"], str]

# Other words for the same query draw other noise, so each is a new chance.
PHRASINGS = (
    "{field} {name}",
    "{name} {field}",
    "{field} {field} {name}",
    "{name} {name} {field}",
    "{field} {name} {name}",
    "{name} {field} {field}",
)
MAX_RESULT_TOKENS = 256


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
            trees.append(_to_tree(task, parts, dialogue, seed))
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
        answer = read[0]
        if rng.random() < skill.python:
            operator = question.operator
            if rng.random() >= skill.operator:
                operator = str(rng.choice([op for op in OPERATORS if op != operator]))
            right = read[1] if question.constant is None else question.constant
            answer = calculate(read[0], operator, right)
            draft.say(f"<python> {read[0]} {OPERATORS[operator]} {right}</python>")
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
    ) -> list[int]:
        """The numbers read: one, or two for a question of two look-ups."""
        world_id, first = question.world_id, question.lookups[0]
        if question.kind == "one_hop":
            return [int(self._look_up(world_id, first, skill, rng, draft))]
        hop = rng.random() < skill.second_hop
        if question.kind == "two_lookups":
            wanted = question.lookups if hop else (first,)
            read = [
                int(self._look_up(world_id, fact, skill, rng, draft)) for fact in wanted
            ]
            return [read[0], read[-1]]
        name = first[0]
        if hop:
            part = self._look_up(world_id, first, skill, rng, draft)
            name = neighbor_name(name, part)
        fact = (name, question.lookups[1][1])
        return [int(self._look_up(world_id, fact, skill, rng, draft))]

    def _look_up(
        self,
        world_id: int,
        fact: tuple[str, str],
        skill: Skill,
        rng: np.random.Generator,
        draft: "_Draft",
    ) -> str:
        """Search until satisfied, note a line, and give its value."""
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
        draft.note(line)
        return line.split()[-1]


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


def _to_tree(
    task: Task, parts: list[Part], dialogue: TagDialogue, seed: int
) -> RolloutTree:
    segments = [
        Segment(
            parent=None,
            role="prompt",
            token_ids=dialogue.prompt_ids(task.messages),
            text="\n".join(message.content for message in task.messages),
        )
    ]
    call: ToolCall | None = None
    answer: str | None = None
    for role, text in parts:
        parent = len(segments) - 1
        if role == "model":
            turn = dialogue.parse(text)
            answer = turn.answer
            if turn.tool is not None:
                call = ToolCall(name=turn.tool, arguments=turn.arguments, status="ok")
            ids = dialogue.model_ids(text)
        else:
            ids = dialogue.result_ids(text, MAX_RESULT_TOKENS).ids
        segments.append(
            Segment(
                parent=parent,
                role=role,
                token_ids=ids,
                finish_reason="stop" if role == "model" else None,
                tool_call=call if role == "tool" else None,
                text=text,
            )
        )
    leaf = Leaf(
        segment=len(segments) - 1,
        reward=0.0,
        reward_parts={},
        origin="initial",
        end="answer",
        answer=answer,
    )
    return RolloutTree(task=task, segments=tuple(segments), leaves=(leaf,), seed=seed)
