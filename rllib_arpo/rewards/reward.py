"""What a reward is: a function from a finished trajectory to named parts.

    paper_reward    -1                      the format is broken
                     0                      the answer is wrong
                     acc + 0.1 or acc       right; 0.1 when both tools were used

Differences from the released code of ARPO:

1. Computed on turns: tags inside tool results count for nothing, and a tool counts
   as used only when a call of it succeeded.
2. Mathematics is compared by value, not by token F1 (see `answers.py`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rllib_arpo.errors import RewardError
from rllib_arpo.rewards.answers import accuracy
from rllib_arpo.tree import Trajectory

# One that waits for something (a judge) has the attribute `in_thread`, true.
RewardFn = Callable[[Trajectory], float | Mapping[str, float]]


def score(
    reward_fn: RewardFn, trajectory: Trajectory
) -> tuple[float, dict[str, float]]:
    """Call a reward function and check what it returns.

    Returns:
        The reward and its named parts, whose sum it is; a function that returns a
        number has the one part "reward".

    Raises:
        RewardError: the function raised, or returned no finite number.
    """
    name = getattr(reward_fn, "__qualname__", type(reward_fn).__qualname__)
    task_id = trajectory.task.task_id
    try:
        returned = reward_fn(trajectory)
    except Exception as error:  # boundary: reward functions are users' code
        raise RewardError(
            f"reward function `{name}` raised {type(error).__name__} on task "
            f"{task_id!r}: {error}"
        ) from error
    try:
        if isinstance(returned, Mapping):
            parts = {str(part): float(value) for part, value in returned.items()}
        else:
            parts = {"reward": float(returned)}
    except (TypeError, ValueError):
        parts = {}
    if not parts or not all(map(math.isfinite, parts.values())):
        raise RewardError(
            f"reward function `{name}` returned {returned!r} on task {task_id!r}: "
            "expected a finite number, or a mapping of names to finite numbers"
        )
    return math.fsum(parts.values()), parts


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperReward:
    """The reward of ARPO (arXiv:2507.19849, section 3.3), with DAPO's length penalty.

        R = max(acc + r_M, acc)   format right, acc > 0; r_M when all `tools` were used
            0                     format right, acc = 0
            -1                    format broken

        R_length = clip(((L_max - L_buffer) - |y|) / L_buffer, -1, 0)
                                  DAPO, arXiv:2503.14476, eq. 13

    A path that was cut is punished in full (|y| > L_max), however long what is left
    of it: a tool result that did not fit does not stand in the response.

    Attributes:
        multi_tool_bonus: r_M.
        format_penalty: reward of a broken format.
        tools: each must have answered at least one call for the bonus.
        overlong_buffer_tokens: L_buffer, the last tokens of the response budget in
            which the penalty grows from 0 to -1; 0 for no penalty.
        math_timeout_s: a symbolic comparison that takes longer counts as unequal.
        numeric_rel_tol: of answers of ability "numeric", a share of the gold answer.
        numeric_abs_tol: the same in absolute terms; the larger of both counts.
    """

    multi_tool_bonus: float = 0.1
    format_penalty: float = -1.0
    tools: tuple[str, ...] = ("search", "python")
    overlong_buffer_tokens: int = 0
    math_timeout_s: float = 2.0
    numeric_rel_tol: float = 1e-6
    numeric_abs_tol: float = 0.0

    def __call__(self, trajectory: Trajectory) -> dict[str, float]:
        """Parts "accuracy", "format", "multi_tool_bonus", and "overlong" if asked."""
        answer = None if trajectory.format_errors else trajectory.answer
        correct = 0.0 if answer is None else self.correctness(trajectory, answer)
        used = {
            turn.tool_call.name
            for turn in trajectory.turns
            if turn.tool_call is not None and turn.tool_call.status == "ok"
        }
        earned = correct > 0 and used.issuperset(self.tools)
        parts = {
            "accuracy": correct,
            "format": self.format_penalty if answer is None else 0.0,
            # max(acc + r_M, acc): a negative bonus is no punishment.
            "multi_tool_bonus": max(self.multi_tool_bonus, 0.0) if earned else 0.0,
        }
        if self.overlong_buffer_tokens > 0:
            parts["overlong"] = (
                -1.0
                if trajectory.end == "length"
                else overlong_penalty(
                    trajectory.num_response_tokens,
                    max_response_tokens=trajectory.max_response_tokens,
                    buffer_tokens=self.overlong_buffer_tokens,
                )
            )
        return parts

    def correctness(self, trajectory: Trajectory, answer: str) -> float:
        """How right the answer of a well-formed trajectory is, acc in [0, 1]."""
        return accuracy(
            answer,
            trajectory.task.answers,
            ability=trajectory.task.ability,
            timeout_s=self.math_timeout_s,
            rel_tol=self.numeric_rel_tol,
            abs_tol=self.numeric_abs_tol,
        )


def overlong_penalty(
    num_tokens: int, *, max_response_tokens: int, buffer_tokens: int
) -> float:
    """Punish long responses softly before the limit cuts them.

    clip(((L_max - L_buffer) - |y|) / L_buffer, -1, 0)
                              DAPO, arXiv:2503.14476, eq. 13
    """
    over = max_response_tokens - buffer_tokens - num_tokens
    return min(max(over / buffer_tokens, -1.0), 0.0)


paper_reward: RewardFn = PaperReward()
