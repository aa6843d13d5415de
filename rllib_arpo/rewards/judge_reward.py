"""The paper's reward with a judge in the place of the answer check (deep search)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from rllib_arpo.errors import RewardError
from rllib_arpo.rewards.judge import Judge
from rllib_arpo.rewards.judge_prompt import JudgeCase
from rllib_arpo.rewards.reward import PaperReward
from rllib_arpo.tree import Trajectory, question


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeReward(PaperReward):
    """`PaperReward` whose accuracy is a judge's verdict, 0 or 1.

    It waits for the judge, so the environment runs it in a thread. An endpoint out of
    reach is a `RewardError`, for an outage must not train the model.

    Attributes:
        judge: gives the verdicts.
        abilities: tasks of others are checked by rule.
        on_unjudged: what follows when no reply of the judge can be read: "error"
            raises `RewardError`, "rule" checks this answer by rule.
    """

    judge: Judge
    abilities: tuple[str, ...] = ("qa",)
    on_unjudged: Literal["error", "rule"] = "error"
    in_thread: ClassVar[bool] = True

    def correctness(self, trajectory: Trajectory, answer: str) -> float:
        task = trajectory.task
        if task.ability in self.abilities:
            case = JudgeCase(
                question=question(task), accepted=task.answers, answer=answer
            )
            verdict = self.judge.ask(case)
            if verdict is not None:
                return float(verdict.correct)
            if self.on_unjudged == "error":
                raise RewardError(
                    f"{self.judge!r} gave no verdict that can be read in "
                    f"{self.judge.max_asks} replies; `on_unjudged='rule'` checks such "
                    "answers by rule"
                )
        return PaperReward.correctness(self, trajectory, answer)
