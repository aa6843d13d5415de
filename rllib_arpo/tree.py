"""The carriers: a prompt's rollouts as a tree of token segments.

Every segment (the prompt, one turn of the model, one tool result) is stored once
with a link to its parent; a trajectory is the walk from a leaf to the root.

    segments    0 prompt ── 1 model ── 2 tool ─┬─ 3 model          leaf A
                                               └─ 4 model ── ...   leaf B
    a branch starts at the end of a tool result, so 3 and 4 share the parent 2

Carriers are frozen and hold numpy arrays; behaviour lives in functions over them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Role = Literal["prompt", "model", "tool"]
FinishReason = Literal["stop", "eos", "length"]
ToolStatus = Literal["ok", "error", "unavailable", "timeout", "refused"]
LeafOrigin = Literal["initial", "branch", "refill"]
LeafEnd = Literal["answer", "no_answer", "length"]

NO_INTS = np.zeros(0, np.int32)
NO_FLOATS = np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One chat message of a task's prompt."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One question to train or evaluate on.

    Attributes:
        task_id: unique within its data set.
        messages: the prompt as chat messages, rendered by the dialogue.
        answers: accepted answers, at least one.
        ability: chooses the answer check, one of `rewards.answers.ABILITIES`.
        source: name of the data set, for metrics by source.
        metadata: anything that the environment's tools need, picklable.
    """

    task_id: str
    messages: tuple[Message, ...]
    answers: tuple[str, ...]
    ability: str = "qa"
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One tool call as it happened.

    Attributes:
        name: the tool, equal to its tag.
        arguments: text between the tags, stripped.
        status: "error" is the call's own fault (the model reads why), "unavailable"
            and "timeout" are the tool's; "refused": the call limit was reached or
            there is no such tool.
        latency_s: wall time of the call, retries included.
        num_attempts: 1 without retries, 0 when refused.
        truncated: whether the result was cut to the token cap.
    """

    name: str
    arguments: str
    status: ToolStatus
    latency_s: float = 0.0
    num_attempts: int = 1
    truncated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn: what the model wrote and what its tool call answered.

    Attributes:
        text: the model's own text, tags included, tool text never.
        tool_call: None when the turn ended without one.
        tool_result: the text given back, without the result tags.
    """

    text: str
    tool_call: ToolCall | None = None
    tool_result: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    r"""A finished root-to-leaf path as text: what a reward function sees.

    Attributes:
        task: the question.
        turns: in order; the last one has no tool call unless it was cut off.
        answer: text of the final answer (inside the last `\boxed{}` when there
            is one), None when the model gave none.
        format_errors: what breaks the dialogue's format, empty when well formed.
        num_response_tokens: model and tool tokens after the prompt.
        max_response_tokens: the budget for them.
        end: why the path ended.
    """

    task: Task
    turns: tuple[Turn, ...]
    answer: str | None
    format_errors: tuple[str, ...] = ()
    num_response_tokens: int = 0
    max_response_tokens: int = 0
    end: LeafEnd = "answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchDecision:
    """What was decided after one tool result, and why (ARPO, section 3.1).

    Attributes:
        entropy: H_t, mean over the first k tokens after the tool result, / ln V.
        entropy_change: ΔH_t = H_t - H_initial, in [-1, 1].
        probability: P_t = clip(α + β·ΔH_t, 0, 1).
        drawn: the uniform number in [0, 1) that a random rule compared with.
        wanted: extra paths that the rule asked for (0 or branch_factor - 1).
        taken: extra paths that the budget granted.
    """

    entropy: float
    entropy_change: float
    probability: float
    drawn: float
    wanted: int
    taken: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run of tokens with one author.

    Attributes:
        parent: index of the parent segment, None for the prompt.
        role: who wrote it; only "model" tokens ever carry loss.
        token_ids: [T] int32.
        logprobs: [T] float32 of the distribution sampled from (T tokens for
            "model", empty otherwise).
        entropies: [T] float32, nats, full vocabulary, same distribution.
        policy_versions: [T] int32, version of the weights that sampled each token.
        finish_reason: why generation of a "model" segment ended.
        tool_call: for "tool" segments, the call that this is the result of.
        branch: for the "model" segment measured after a tool result.
        text: decoded text, for people and rewards; never encoded again.
    """

    parent: int | None
    role: Role
    token_ids: np.ndarray
    logprobs: np.ndarray = field(default_factory=lambda: NO_FLOATS)
    entropies: np.ndarray = field(default_factory=lambda: NO_FLOATS)
    policy_versions: np.ndarray = field(default_factory=lambda: NO_INTS)
    finish_reason: FinishReason | None = None
    tool_call: ToolCall | None = None
    branch: BranchDecision | None = None
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """The end of one trajectory.

    Attributes:
        segment: index of the last segment.
        reward: sum of `reward_parts`.
        reward_parts: named parts, for example accuracy, format, multi_tool_bonus.
        origin: "initial", "branch" or "refill" (a fresh root for unused budget).
        end: why the path ended.
        answer: the final answer, None when there is none.
    """

    segment: int
    reward: float
    reward_parts: Mapping[str, float]
    origin: LeafOrigin
    end: LeafEnd
    answer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutTree:
    """All rollouts of one prompt: the unit between an EnvRunner and a Learner.

    `segments[0]` is the prompt; a parent always stands before its children.
    `len(tree)` and `env_steps()` count turns of the model, each once, as RLlib
    counts environment steps.
    """

    task: Task
    segments: tuple[Segment, ...]
    leaves: tuple[Leaf, ...]
    seed: int = 0

    def __len__(self) -> int:
        return sum(segment.role == "model" for segment in self.segments)

    def env_steps(self) -> int:
        return len(self)

    def agent_steps(self) -> int:
        return len(self)

    @property
    def rewards(self) -> np.ndarray:
        """[num_leaves] float32."""
        return np.array([leaf.reward for leaf in self.leaves], np.float32)

    @property
    def num_tokens(self) -> int:
        """Unique tokens, each segment once."""
        return sum(len(segment.token_ids) for segment in self.segments)


def question(task: Task) -> str:
    """What is asked: the row's own question, else the last message of the prompt."""
    return str(task.metadata.get("question") or task.messages[-1].content)


def path(tree: RolloutTree, leaf: Leaf) -> list[int]:
    """Segment indices from the root to `leaf`."""
    indices: list[int] = []
    index: int | None = leaf.segment
    while index is not None:
        indices.append(index)
        index = tree.segments[index].parent
    return indices[::-1]


def path_token_ids(tree: RolloutTree, leaf: Leaf) -> np.ndarray:
    """[T] int32, all tokens from the root to `leaf`."""
    return np.concatenate([tree.segments[i].token_ids for i in path(tree, leaf)])


def leaves_below(tree: RolloutTree) -> list[list[int]]:
    """For each segment, the indices of the leaves whose trajectory holds it."""
    below: list[list[int]] = [[] for _ in tree.segments]
    for number, leaf in enumerate(tree.leaves):
        for index in path(tree, leaf):
            below[index].append(number)
    return below


def count_tool_calls(segments: Sequence[Segment]) -> int:
    """Tool calls that were executed (refused ones were not)."""
    return sum(
        segment.tool_call is not None and segment.tool_call.status != "refused"
        for segment in segments
    )
