"""Rollout trees as compact JSON for the viewer's page.

Numbers of every token (entropies as float16, pieces as indices) are base64, texts of
tokens stand once in a table: a tree of 64 leaves and 20 turns stays below 2 MB.
"""

import base64
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rllib_arpo.learner.advantages import group_advantages
from rllib_arpo.tree import Leaf, RolloutTree, Segment, leaves_below, question

MAX_PIECES = 65_536  # indices are 16 bits

# Text of one token id.
Decode = Callable[[int], str]


class Pieces:
    """The texts of the tokens of a page, each once."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._index: dict[str, int] = {}

    def add(self, token_ids: np.ndarray, decode: Decode) -> str | None:
        """Indices of tokens, [T] uint16 as base64; None when the table is full."""
        indices: list[int] = []
        for token_id in token_ids.tolist():
            text = decode(token_id)
            index = self._index.setdefault(text, len(self.texts))
            if index == MAX_PIECES:
                del self._index[text]
                return None
            if index == len(self.texts):
                self.texts.append(text)
            indices.append(index)
        return _base64(np.array(indices, "<u2"))


def run_data(
    trees: Sequence[RolloutTree], *, name: str, pieces: Pieces, decode: Decode | None
) -> dict[str, Any]:
    """One run's trees of an iteration, for `json.dumps`.

    Args:
        trees: whole trees.
        name: of the run.
        pieces: filled with the texts of the tokens.
        decode: text of one token, None when there is no tokenizer.
    """
    return {
        "name": name,
        "trees": [_tree(tree, pieces=pieces, decode=decode) for tree in trees],
    }


def embedded(data: Any) -> str:
    """JSON that is safe inside a `<script>` element, whatever its texts hold."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # Half a surrogate pair cannot be written as UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


def _tree(
    tree: RolloutTree, *, pieces: Pieces, decode: Decode | None
) -> dict[str, Any]:
    advantages = group_advantages(tree.rewards, normalize_by_std=True)
    below = leaves_below(tree)
    return {
        "id": tree.task.task_id,
        "question": question_of(tree),
        "answers": list(tree.task.answers),
        "source": tree.task.source,
        "segments": [
            _segment(segment, pieces=pieces, decode=decode)
            | _advantages(advantages[below[index]])
            for index, segment in enumerate(tree.segments)
        ],
        "leaves": [
            _leaf(leaf, advantage)
            for leaf, advantage in zip(tree.leaves, advantages.tolist(), strict=True)
        ],
    }


def question_of(tree: RolloutTree) -> str:
    """The prompt's last message, else the row's own question."""
    messages = tree.task.messages
    return messages[-1].content if messages else question(tree.task)


def _segment(
    segment: Segment, *, pieces: Pieces, decode: Decode | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "parent": segment.parent,
        "role": segment.role,
        "n": len(segment.token_ids),
        "text": segment.text,
    }
    if len(segment.entropies):
        row["entropy"] = _number(segment.entropies.mean(dtype=np.float64))
        row["entropies"] = _base64(segment.entropies.astype("<f2"))
        if decode is not None:
            row["pieces"] = pieces.add(segment.token_ids, decode)
    if segment.finish_reason is not None:
        row["finish"] = segment.finish_reason
    if len(segment.policy_versions):
        row["versions"] = sorted(set(segment.policy_versions.tolist()))
    if segment.tool_call is not None:
        call = segment.tool_call
        row["call"] = {
            "name": call.name,
            "arguments": call.arguments,
            "status": call.status,
            "latency": _number(call.latency_s),
            "attempts": call.num_attempts,
            "truncated": call.truncated,
        }
    if segment.branch is not None:
        branch = segment.branch
        row["branch"] = {
            "h": _number(branch.entropy),
            "dh": _number(branch.entropy_change),
            "p": _number(branch.probability),
            "drawn": _number(branch.drawn),
            "wanted": branch.wanted,
            "taken": branch.taken,
        }
    return row


def _advantages(below: np.ndarray) -> dict[str, Any]:
    """What soft (gains, losses) and hard attribution put on a segment."""
    return {
        "plus": _number(below[below > 0].sum(dtype=np.float64)),
        "minus": _number(below[below < 0].sum(dtype=np.float64)),
        "hard": _number(below.mean(dtype=np.float64)) if len(below) else 0.0,
        "paths": len(below),
    }


def _leaf(leaf: Leaf, advantage: float) -> dict[str, Any]:
    return {
        "segment": leaf.segment,
        "reward": _number(leaf.reward),
        "parts": {name: _number(value) for name, value in leaf.reward_parts.items()},
        "origin": leaf.origin,
        "end": leaf.end,
        "answer": leaf.answer,
        "advantage": _number(advantage),
    }


def _number(value: Any) -> float | None:
    """Rounded for JSON; None for NaN and infinity, which it does not have."""
    value = float(value)
    return float(f"{value:.5g}") if np.isfinite(value) else None


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")
