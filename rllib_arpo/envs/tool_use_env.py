"""The environment of a tool-using model: tokens in, tokens out, one turn a step.

    prompt_ids, info = env.reset(options={"task": task})
    obs, reward, terminated, truncated, info = await env.step_async(turn_ids)

One object is one path; `fork` makes a branch its own copy, tool state included.
Where a rollout can break, and what happens:

1. A tool raises, hangs or floods: the model reads a short error or a cut result; it
   is never an empty text and never an exception here. `ToolCall.status` tells the
   call's own fault from the tool's.
2. A call after the limit, of a tool that is not there, or one that cannot be read is
   not executed; the model is told so and goes on.
3. The reward function raises: `RewardError`, for training on wrong rewards is worse
   than no training.
"""

import asyncio
import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import gymnasium
import numpy as np
from numpy.typing import NDArray

from rllib_arpo.envs.dialogue import ParsedTurn
from rllib_arpo.envs.env_config import (
    at_least,
    load_reward_fn,
    load_tokenizer,
    load_tool_specs,
    load_tools,
    make_dialogue,
    with_defaults,
)
from rllib_arpo.envs.spaces import TokenSequence
from rllib_arpo.errors import ConfigError, ToolError, ToolTimeoutError
from rllib_arpo.rewards.reward import score
from rllib_arpo.tools.tool import Tool
from rllib_arpo.tree import LeafEnd, Task, ToolCall, ToolStatus, Trajectory, Turn

TokenIds = NDArray[np.int32]
StepReturn = tuple[TokenIds, float, bool, bool, dict[str, Any]]

NO_TOKENS: TokenIds = np.zeros(0, np.int32)
NO_OUTPUT = "(no output)"
MAX_ERROR_CHARS = 300

logger = logging.getLogger(__name__)
# (tool, exception type) of failures whose traceback is in the log already.
_logged_failures: set[tuple[str, type[Exception]]] = set()


class ToolUseEnv(gymnasium.Env[TokenIds, TokenIds]):
    """A dialogue between a model and its tools about one task.

    An action is the tokens of one turn of the model; an observation the tokens of
    the tool result that follows, tags included, empty when the episode ended.
    `info["turn"]` is the `Turn`. The last step also gives `info["trajectory"]` and
    `info["reward_parts"]`, whose sum is its reward; earlier rewards are 0.

    Subclasses that need tools of their own override `make_tools`; mutable state of
    their own must be copied in `fork`.

    Args:
        config: RLlib's `env_config`:

            - tokenizer: a folder or name, or a `PreTrainedTokenizerFast`.
            - tools: a list of tools, a mapping of names to tools, or a function from
              a task to a list of tools. Tools are forked for every episode.
            - tool_names: tags of the tools, needed only when they depend on the
              task, since the engine must know the tags before.
            - tool_specs: the same with description and parameters, for
              "chat_template": a list of `ToolSpec` or of mappings. The function
              that makes the tools may have it as an attribute instead.
            - dialogue: "tags" (`TagDialogue`), "chat_template"
              (`ChatTemplateDialogue`), a mapping of their options with one of these
              as "type", or a `Dialogue`.
            - reward_fn: a `RewardFn`, or "module:function".
            - reward_in_thread: None runs it in a thread when its attribute
              `in_thread` says so, or without one for tasks of ability "math", whose
              symbolic checks may take a second.
            - max_response_tokens: most tokens after the prompt, tool results
              included.
            - max_tool_calls: later calls are refused.
            - max_result_tokens: most tokens of a tool result, tags included.
            - tool_timeout_s: seconds for a call, its retries included.
            - tool_retries: further attempts after a `ToolError` that is retryable.
            - tool_retry_delay_s: seconds before the first one, doubled each time.

    Raises:
        ConfigError: a key is unknown or a value cannot work.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        settings = with_defaults(config or {})
        self.tokenizer = load_tokenizer(settings["tokenizer"])
        self._tool_source = load_tools(settings["tools"])
        # What a subclass's `make_tools` gives is not known before a task is.
        makes_own = type(self).make_tools != _MAKE_TOOLS
        specs = load_tool_specs(
            settings["tool_specs"], None if makes_own else self._tool_source
        )
        self.tool_names: tuple[str, ...] = (
            tuple(settings["tool_names"])
            if specs is None
            else tuple(spec.name for spec in specs)
        )
        self.dialogue = make_dialogue(
            settings["dialogue"],
            self.tokenizer,
            tool_names=self.tool_names,
            tool_specs=specs,
        )
        self.reward_fn = load_reward_fn(settings["reward_fn"])
        self._reward_in_thread: bool | None = settings["reward_in_thread"]
        self.max_response_tokens = at_least(settings, "max_response_tokens", 1)
        self.max_tool_calls = at_least(settings, "max_tool_calls", 0)
        self.max_result_tokens = at_least(settings, "max_result_tokens", 1)
        self.tool_timeout_s = float(settings["tool_timeout_s"])
        if self.tool_timeout_s <= 0:
            raise ConfigError(
                f"`tool_timeout_s` ({self.tool_timeout_s}) must be above 0 seconds"
            )
        self.tool_retries = at_least(settings, "tool_retries", 0)
        self.tool_retry_delay_s = float(settings["tool_retry_delay_s"])
        try:
            self.dialogue.result_ids("", self.max_result_tokens)
        except ValueError as error:
            raise ConfigError(f"`max_result_tokens`: {error}") from error
        space = TokenSequence(len(self.tokenizer))
        self.observation_space = self.action_space = space
        self._task: Task | None = None
        self._tools: dict[str, Tool] = {}
        self._turns: list[Turn] = []
        self._parsed: list[ParsedTurn] = []
        self._num_response_tokens = 0
        self._num_tool_calls = 0

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a turn."""
        return self.dialogue.stop

    @property
    def remaining_tokens(self) -> int:
        """How many more tokens, of model and tools together, the path may hold."""
        return max(self.max_response_tokens - self._num_response_tokens, 0)

    def make_tools(self, task: Task) -> Sequence[Tool]:
        """Fresh tools for one episode; worlds override this."""
        source = self._tool_source
        if callable(source):
            return source(task)
        return [tool.fork() for tool in source.values()]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[TokenIds, dict[str, Any]]:
        """Start a dialogue about `options["task"]`.

        Returns:
            [T] int32 prompt tokens, and an empty info.
        """
        super().reset(seed=seed)
        task = (options or {}).get("task")
        if not isinstance(task, Task):
            raise ConfigError(
                f"reset needs options={{'task': Task(...)}}, got {options!r}"
            )
        tools = {tool.name: tool for tool in self.make_tools(task)}
        extra = tools.keys() - set(self.tool_names)
        if extra:
            raise ConfigError(
                f"tools {sorted(extra)} are unknown to the dialogue: name them in "
                f"`tool_names` ({list(self.tool_names)}) or `tool_specs`"
            )
        self._task = task
        self._tools = tools
        self._turns = []
        self._parsed = []
        self._num_response_tokens = 0
        self._num_tool_calls = 0
        return self.dialogue.prompt_ids(task.messages), {}

    def fork(self) -> Self:
        """A copy with its own turns, counters and tool state, as at a branch."""
        other = copy.copy(self)
        other._turns = list(self._turns)
        other._parsed = list(self._parsed)
        other._tools = {name: tool.fork() for name, tool in self._tools.items()}
        return other

    def step(self, action: TokenIds) -> StepReturn:
        """`step_async` for callers without an event loop."""
        return asyncio.run(self.step_async(action))

    async def step_async(self, action: TokenIds) -> StepReturn:
        """Read one turn of the model, and answer with a tool result or the end.

        Args:
            action: [n] int32, what the model sampled, stop tag or end-of-text token
                included.

        Returns:
            [m] int32 tool result, reward, terminated, truncated, info.
        """
        if self._task is None:
            raise ConfigError("call `reset` before `step`")
        text, ended_by_token = self.dialogue.decode(action)
        parsed = self.dialogue.parse(text, ended=ended_by_token)
        self._num_response_tokens += len(action)
        self._parsed.append(parsed)
        turn = Turn(text=text)
        end: LeafEnd
        if parsed.ended:
            end = "no_answer" if parsed.answer is None else "answer"
        elif parsed.tool is None:
            # Neither a call nor an end-of-text token: the engine ran out of context.
            end = "no_answer" if ended_by_token else "length"
        elif self.remaining_tokens == 0:
            end = "length"
        else:
            call, output = await self._use_tool(parsed.tool, parsed)
            result = self.dialogue.result_ids(
                output, self.max_result_tokens, turn_ended=ended_by_token
            )
            call = replace(call, truncated=result.truncated)
            turn = replace(turn, tool_call=call, tool_result=result.text)
            if len(result.ids) < self.remaining_tokens:
                self._num_response_tokens += len(result.ids)
                self._turns.append(turn)
                return result.ids, 0.0, False, False, {"turn": turn}
            end = "length"  # the model could not say a word about the result
        self._turns.append(turn)
        return await self._finish(end, parsed)

    async def _use_tool(self, name: str, parsed: ParsedTurn) -> tuple[ToolCall, str]:
        """Run the tool or refuse to; the call and what the model will read."""
        call = ToolCall(
            name=name, arguments=parsed.arguments, status="refused", num_attempts=0
        )
        if parsed.refusal is not None:
            text = f"Error: {parsed.refusal}"
        elif name not in self._tools:
            text = f"Error: there is no tool named {name}."
        elif self._num_tool_calls >= self.max_tool_calls:
            text = (
                f"Error: no tool calls left, all {self.max_tool_calls} are used. "
                "Give the answer."
            )
        else:
            self._num_tool_calls += 1
            return await self._call(self._tools[name], parsed.arguments)
        return call, text

    async def _call(self, tool: Tool, arguments: str) -> tuple[ToolCall, str]:
        """Run a tool within its deadline; every failure becomes a text."""
        start = time.monotonic()
        deadline = start + self.tool_timeout_s
        status: ToolStatus = "ok"
        attempts = 0
        while True:
            attempts += 1
            delay = self.tool_retry_delay_s * 2 ** (attempts - 1)
            try:
                output = await _before(deadline, tool, arguments)
                text = output if output.strip() else NO_OUTPUT
            except ToolTimeoutError as error:
                status, text = "timeout", _one_line(error)
            except ToolError as error:
                in_time = time.monotonic() + delay < deadline
                if error.retryable and attempts <= self.tool_retries and in_time:
                    await asyncio.sleep(delay)
                    continue
                status = "unavailable" if error.retryable else "error"
                text = _one_line(error)
            except Exception as error:  # boundary: tools are users' code
                _log_failure(tool.name, error)
                status = "unavailable"
                text = f"Error: the {tool.name} tool failed ({type(error).__name__})."
            break
        call = ToolCall(
            name=tool.name,
            arguments=arguments,
            status=status,
            latency_s=time.monotonic() - start,
            num_attempts=attempts,
        )
        return call, text

    async def _finish(self, end: LeafEnd, parsed: ParsedTurn) -> StepReturn:
        assert self._task is not None
        trajectory = Trajectory(
            task=self._task,
            turns=tuple(self._turns),
            answer=parsed.answer,
            format_errors=self.dialogue.format_errors(self._parsed),
            num_response_tokens=self._num_response_tokens,
            max_response_tokens=self.max_response_tokens,
            end=end,
        )
        in_thread = self._reward_in_thread
        if in_thread is None:
            in_thread = getattr(
                self.reward_fn, "in_thread", self._task.ability == "math"
            )
        reward, parts = (
            await asyncio.to_thread(score, self.reward_fn, trajectory)
            if in_thread
            else score(self.reward_fn, trajectory)
        )
        info = {
            "turn": self._turns[-1],
            "trajectory": trajectory,
            "reward_parts": parts,
        }
        truncated = end == "length"
        return NO_TOKENS, reward, not truncated, truncated, info


_MAKE_TOOLS = ToolUseEnv.make_tools


async def _before(deadline: float, tool: Tool, arguments: str) -> str:
    """The tool's output, or `ToolTimeoutError` at the deadline.

    `asyncio.wait_for` would wait until a cancelled call has ended, which a call that
    swallows the cancellation never does; here it is left behind.
    """
    task = asyncio.ensure_future(tool.call(arguments))
    try:
        done, _ = await asyncio.wait({task}, timeout=deadline - time.monotonic())
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not done:
        task.cancel()
        task.add_done_callback(_forget)
        raise ToolTimeoutError(f"the {tool.name} tool took too long and was stopped")
    return task.result()


def _forget(task: "asyncio.Future[str]") -> None:
    """Read the exception of an abandoned call, or asyncio reports it as lost."""
    if not task.cancelled():
        task.exception()


def _log_failure(tool: str, error: Exception) -> None:
    """Warn with the traceback once for each kind of failure, not for every call."""
    kind = (tool, type(error))
    level = logging.DEBUG if kind in _logged_failures else logging.WARNING
    _logged_failures.add(kind)
    logger.log(level, "tool %s raised", tool, exc_info=error)


def _one_line(error: ToolError) -> str:
    text = " ".join(str(error).split())
    if len(text) > MAX_ERROR_CHARS:
        text = text[:MAX_ERROR_CHARS] + "..."
    return f"Error: {text}"
