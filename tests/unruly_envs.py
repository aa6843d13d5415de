"""Environments that wait or die where a file tells them to."""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from rllib_arpo import Trajectory
from rllib_arpo.envs.almanac import AlmanacEnv
from tests.tiny_runs import token_sum_reward


class UnrulyEnv(AlmanacEnv):
    """The almanac, with signs in the folder `env_config["signs"]`.

    - die: the first process that starts a rollout removes it, and is gone.
    - hold: turns of the task whose id it holds wait until it is removed; "*": of all.
    - closed: a process that is started waits until it is removed.
    - broken: rewards raise.
    """

    def __init__(self, config: Any = None) -> None:
        settings = dict(config or {})
        self.signs = Path(settings.pop("signs"))
        while (self.signs / "closed").exists():
            time.sleep(0.05)
        super().__init__(settings | {"reward_fn": self.reward})

    def reward(self, trajectory: Trajectory) -> float:
        if (self.signs / "broken").exists():
            raise ZeroDivisionError("by nothing")
        return token_sum_reward(trajectory)

    def reset(self, *, seed=None, options=None):
        try:
            os.remove(self.signs / "die")
        except FileNotFoundError:
            return super().reset(seed=seed, options=options)
        os._exit(1)

    async def step_async(self, action):
        assert self._task is not None
        while self.held() in ("*", self._task.task_id):
            await asyncio.sleep(0.01)
        return await super().step_async(action)

    def held(self) -> str:
        try:
            return (self.signs / "hold").read_text()
        except FileNotFoundError:
            return ""
