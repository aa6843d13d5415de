"""A toy environment and script: one token says what a turn does.

Vocabulary of 100: a turn that ends with CALL runs a tool, one that ends with ANSWER
ends the episode. The tool's result is one token that depends on the call.
"""

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rllib_arpo.engines.engine import GenerationRequest
from rllib_arpo.engines.scripted_engine import ScriptedReply
from rllib_arpo.envs.spaces import TokenSequence
from rllib_arpo.tree import ToolCall, Turn

VOCAB_SIZE = 100
PROMPT = np.array([3, 4, 5], np.int32)
CALL, ANSWER = 1, 2


@dataclass
class Ledger:
    """What all forks of one environment did together."""

    calls: list[tuple[int, ...]] = field(default_factory=list)
    finish_times: dict[tuple[int, ...], float] = field(default_factory=dict)


class ToyEnv:
    """Records every tool call with the history that it was made from."""

    stop = ("stop",)

    def __init__(
        self,
        ledger: Ledger | None = None,
        *,
        max_tokens: int = 60,
        latency: Any = lambda history: 0.0,
    ) -> None:
        self.ledger = ledger or Ledger()
        self.action_space = self.observation_space = TokenSequence(VOCAB_SIZE)
        self.max_tokens = max_tokens
        self.latency = latency
        self.history: tuple[int, ...] = ()

    @property
    def remaining_tokens(self) -> int:
        return self.max_tokens - len(self.history)

    def reset(self, *, seed=None, options=None):
        self.history = ()
        return PROMPT, {}

    def fork(self) -> "ToyEnv":
        other = ToyEnv(self.ledger, max_tokens=self.max_tokens, latency=self.latency)
        other.history = self.history
        return other

    async def step_async(self, action):
        self.history += tuple(action.tolist())
        turn = Turn(text="turn")
        last = action[-1] if len(action) else None
        if self.remaining_tokens <= 1 or last != CALL:
            done = bool(last == ANSWER)
            self.ledger.finish_times[self.history] = asyncio.get_running_loop().time()
            return np.zeros(0, np.int32), float(done), done, not done, {"turn": turn}
        self.ledger.calls.append(self.history)
        await asyncio.sleep(self.latency(self.history))
        result = np.array([10 + sum(self.history) % 80], np.int32)
        self.history += tuple(result.tolist())
        call = ToolCall(name="tool", arguments="", status="ok")
        turn = Turn(text="turn", tool_call=call, tool_result="result")
        return result, 0.0, False, False, {"turn": turn}

    def step(self, action):
        raise AssertionError("step_async is used where there is one")


class StepOnlyEnv(ToyEnv):
    """As a user's own gymnasium environment: `step`, no `fork`, no `step_async`."""

    fork = None  # type: ignore[assignment]
    step_async = None  # type: ignore[assignment]

    def step(self, action):
        return asyncio.run(ToyEnv.step_async(self, action))


def random_script(call_rate: float, max_turn_tokens: int = 6):
    """A model that writes random turns; all randomness from the request's seed."""

    def script(request: GenerationRequest) -> ScriptedReply:
        rng = random.Random(request.seed)
        length = rng.randint(1, max_turn_tokens)
        last = CALL if rng.random() < call_rate else ANSWER
        ids = [rng.randrange(10, VOCAB_SIZE) for _ in range(length - 1)] + [last]
        return ScriptedReply(
            token_ids=ids,
            entropies=[rng.uniform(0.0, 4.0) for _ in ids],
            logprobs=[-rng.uniform(0.0, 4.0) for _ in ids],
            delay_s=rng.uniform(0.0, 0.2),
        )

    return script
