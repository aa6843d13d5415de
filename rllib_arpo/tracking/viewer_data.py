"""Rollout trees as compact JSON for the viewer's page.

Numbers of every token (entropies as float16, pieces as indices) are base64, texts of
tokens stand once in a table: a tree of 64 leaves and 20 turns stays below 2 MB. Where
texts are long, their middle is left out; no segment, leaf or number of one ever is.
"""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rllib_arpo.learner.advantages import (
    Attribution,
    Normalization,
    batch_advantages,
    group_advantages,
    sample_std,
)
from rllib_arpo.tree import Leaf, RolloutTree, Segment, leaves_below, question

MAX_PIECES = 65_536  # indices are 16 bits
CHARS_PER_TOKEN = 4

# Text of one token id.
Decode = Callable[[int], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageSettings:
    """How a run makes advantages of rewards, named as in its config."""

    advantage_attribution: Attribution = "soft"
    advantage_normalization: Normalization = "group"
    normalize_by_std: bool = True


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
    trees: Sequence[RolloutTree],
    *,
    name: str,
    iterations: Sequence[int] = (),
    pieces: Pieces,
    decode: Decode | None,
    settings: AdvantageSettings,
    limit: int | None,
) -> dict[str, Any]:
    """One run's trees of an iteration, for `json.dumps`.

    Args:
        trees: whole trees; "batch" normalisation takes them for the batch.
        name: of the run.
        iterations: of each tree, or empty.
        pieces: filled with the texts of the tokens.
        decode: text of one token, None when there is no tokenizer.
        settings: of the run.
        limit: characters that a text keeps, and four times its tokens; None: all.
    """
    advantages = _leaf_advantages(trees, settings)
    shown = [
        _tree(tree, leaf_advantages, pieces=pieces, decode=decode, limit=limit)
        for tree, leaf_advantages in zip(trees, advantages, strict=True)
    ]
    for tree, iteration in zip(shown, iterations, strict=False):
        tree["iteration"] = iteration
    return {
        "name": name,
        "attribution": settings.advantage_attribution,
        "normalization": settings.advantage_normalization,
        "by_std": settings.normalize_by_std,
        "trees": shown,
    }


def shortened(text: str, limit: int | None) -> str:
    """The text's two ends, and between them a note of how much is left out."""
    if limit is None or len(text) <= limit:
        return text
    head, tail = _ends(limit)
    note = f" […{len(text) - head - tail:,} characters left out…] "
    return text[:head] + note + text[len(text) - tail :]


def embedded(data: Any) -> str:
    """JSON that is safe inside a `<script>` element, whatever its texts hold."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # Half a surrogate pair cannot be written as UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


def _leaf_advantages(
    trees: Sequence[RolloutTree], settings: AdvantageSettings
) -> list[np.ndarray]:
    """[num_leaves] per tree."""
    by_std = settings.normalize_by_std
    if settings.advantage_normalization == "group":
        return [group_advantages(t.rewards, normalize_by_std=by_std) for t in trees]
    if not trees:
        return []
    rewards = np.concatenate([tree.rewards for tree in trees]).astype(np.float64)
    mean, std = float(rewards.mean()), sample_std(rewards)
    return [
        batch_advantages(tree.rewards, mean=mean, std=std, normalize_by_std=by_std)
        for tree in trees
    ]


def _tree(
    tree: RolloutTree,
    advantages: np.ndarray,
    *,
    pieces: Pieces,
    decode: Decode | None,
    limit: int | None,
) -> dict[str, Any]:
    below = leaves_below(tree)
    return {
        "id": tree.task.task_id,
        "question": shortened(question_of(tree), limit),
        "answers": [shortened(answer, limit) for answer in tree.task.answers],
        "source": tree.task.source,
        "segments": [
            _segment(segment, pieces=pieces, decode=decode, limit=limit)
            | _advantages(advantages[below[index]])
            for index, segment in enumerate(tree.segments)
        ],
        "leaves": [
            _leaf(leaf, advantage, limit=limit)
            for leaf, advantage in zip(tree.leaves, advantages.tolist(), strict=True)
        ],
    }


def question_of(tree: RolloutTree) -> str:
    """The prompt's last message, else the row's own question."""
    messages = tree.task.messages
    return messages[-1].content if messages else question(tree.task)


def _segment(
    segment: Segment, *, pieces: Pieces, decode: Decode | None, limit: int | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "parent": segment.parent,
        "role": segment.role,
        "n": len(segment.token_ids),
        "text": shortened(segment.text, limit),
    }
    if len(segment.entropies):
        row["entropy"] = _number(segment.entropies.mean(dtype=np.float64))
        kept, gap = _kept_tokens(len(segment.entropies), limit)
        if gap is not None:
            row["gap"] = gap
        row["entropies"] = _base64(segment.entropies[kept].astype("<f2"))
        if decode is not None:
            row["pieces"] = pieces.add(segment.token_ids[kept], decode)
    if segment.finish_reason is not None:
        row["finish"] = segment.finish_reason
    if len(segment.policy_versions):
        row["versions"] = sorted(set(segment.policy_versions.tolist()))
    if segment.tool_call is not None:
        call = segment.tool_call
        row["call"] = {
            "name": call.name,
            "arguments": shortened(call.arguments, limit),
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


def _kept_tokens(
    count: int, limit: int | None
) -> tuple[slice | np.ndarray, list[int] | None]:
    """Which tokens to show; and [place, number] of those that are left out, if any."""
    if limit is None or count <= limit // CHARS_PER_TOKEN:
        return slice(None), None
    head, tail = _ends(limit // CHARS_PER_TOKEN)
    kept = np.r_[0:head, count - tail : count]
    return kept, [head, count - len(kept)]


def _ends(limit: int) -> tuple[int, int]:
    return limit - limit // 2, limit // 2


def _advantages(below: np.ndarray) -> dict[str, Any]:
    """What soft (gains, losses) and hard attribution put on a segment."""
    return {
        "plus": _number(below[below > 0].sum(dtype=np.float64)),
        "minus": _number(below[below < 0].sum(dtype=np.float64)),
        "hard": _number(below.mean(dtype=np.float64)) if len(below) else 0.0,
        "paths": len(below),
    }


def _leaf(leaf: Leaf, advantage: float, *, limit: int | None) -> dict[str, Any]:
    return {
        "segment": leaf.segment,
        "reward": _number(leaf.reward),
        "parts": {name: _number(value) for name, value in leaf.reward_parts.items()},
        "origin": leaf.origin,
        "end": leaf.end,
        "answer": None if leaf.answer is None else shortened(leaf.answer, limit),
        "advantage": _number(advantage),
    }


def _number(value: Any) -> float | None:
    """Rounded for JSON; None for NaN and infinity, which it does not have."""
    value = float(value)
    return float(f"{value:.5g}") if np.isfinite(value) else None


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")
