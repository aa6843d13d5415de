"""What an agent is, and how one answer of it is wanted."""

from dataclasses import dataclass, field

from rllib_arpo.engines.engine import SamplingParams
from rllib_arpo.envs.tool_use_env import ToolUseEnv


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerLimits:
    """Caps on one answer, besides the environment's own.

    Attributes:
        max_response_tokens: most tokens after the prompt, tool results included; None
            leaves it to the environment.
        max_tool_calls: later calls are refused; None leaves it to the environment.
        max_request_s: seconds until the answer must be complete.
    """

    max_response_tokens: int | None = None
    max_tool_calls: int | None = None
    max_request_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """What answers besides the weights.

    Attributes:
        env: a pattern: every answer has a fork of it.
        sampling: what a request does not say.
        limits: caps on one answer.
        stream_interval: tokens to a piece of a streamed answer.
    """

    env: ToolUseEnv
    sampling: SamplingParams = field(default_factory=SamplingParams)
    limits: AnswerLimits = AnswerLimits()
    stream_interval: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """How one answer is wanted.

    Attributes:
        request_id: unique among the answers in flight.
        seed: of the request.
        choice: number of the answer among those of the request.
        sampling: the agent's with what the request says; `stop` is the client's.
        max_tokens: most tokens that the model writes in all turns; None for no cap.
        live: text is given while it is written. Without it a turn's text comes in one
            piece, and a turn that was lost can always be asked for again.
    """

    request_id: str
    seed: int
    choice: int = 0
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    live: bool = False
