"""One answer of an agent: the loop of `rollouts.sampler` without branches, as events.

    env.reset -> engine.generate -> env.step_async -> engine.generate -> ... -> Finished

A lost engine, other weights and a deadline are dealt with in `turn_sampling`. Closing
the generator, or cancelling the task that waits for it, ends generation and tool at
once.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rllib_arpo.engines.engine import GenerationRequest
from rllib_arpo.envs.dialogue import Dialogue, ParsedTurn
from rllib_arpo.envs.tool_use_env import ToolUseEnv
from rllib_arpo.errors import ConfigError
from rllib_arpo.rollouts.branching import derive_seed
from rllib_arpo.serving.agent import Agent, AnswerLimits, AnswerOptions
from rllib_arpo.serving.client_tools import call_arguments
from rllib_arpo.serving.conversation import Question
from rllib_arpo.serving.engine_client import TurnEngine
from rllib_arpo.serving.events import (
    AnswerReason,
    ClientCall,
    ClientToolCalls,
    Event,
    Finished,
    TokenUsage,
    ToolFinished,
    ToolStarted,
    TurnFinished,
    TurnReport,
)
from rllib_arpo.serving.openai_api import InvalidRequestError
from rllib_arpo.serving.scrub import scrub
from rllib_arpo.serving.turn_sampling import (
    Deadline,
    RequestTimeoutError,
    TurnSampler,
)
from rllib_arpo.tree import Task, Turn

__all__ = [
    "Agent",
    "AnswerLimits",
    "AnswerOptions",
    "RequestTimeoutError",
    "answer",
]


async def answer(
    question: Question, agent: Agent, engine: TurnEngine, options: AnswerOptions
) -> AsyncGenerator[Event, None]:
    """Answer a question, event by event; the last one is `Finished`.

    Raises:
        InvalidRequestError: the prompt fills the model's context, or the agent cannot
            work with the client's metadata.
        EngineLostError: the engine is lost, or holds other weights by now.
        RequestTimeoutError: `max_request_s` are over.
    """
    run = _begin(question, agent, engine, options)
    if run.room == 0:
        run.finish(None, "length", "length")
    while (finished := run.finished) is None:
        for part in (run.generate, run.act):
            async with aclosing(part()) as events:
                async for event in events:
                    yield event
    yield finished


def _begin(
    question: Question, agent: Agent, engine: TurnEngine, options: AnswerOptions
) -> "_Run":
    limits, open_ids = agent.limits, question.open_ids
    env = agent.env.fork()
    env.dialogue = question.dialogue
    # The open answer is a part of this one that the environment has not seen.
    most_tokens = _least(env.max_response_tokens, limits.max_response_tokens)
    env.max_response_tokens = max(most_tokens - len(open_ids), 0)
    most_calls = _least(env.max_tool_calls, limits.max_tool_calls)
    env.max_tool_calls = max(most_calls - question.num_tool_calls, 0)
    prompt_ids = _reset(env, question.task)
    sampler = TurnSampler(
        engine,
        question.dialogue,
        stop=options.sampling.stop,
        live=options.live,
        deadline=Deadline(
            at=asyncio.get_running_loop().time() + limits.max_request_s,
            max_request_s=limits.max_request_s,
        ),
    )
    return _Run(
        question=question,
        agent=agent,
        env=env,
        sampler=sampler,
        options=options,
        token_ids=np.concatenate([prompt_ids, open_ids]),
        num_prompt_tokens=len(prompt_ids) + len(open_ids),
    )


def _reset(env: ToolUseEnv, task: Task) -> NDArray[np.int32]:
    """Start the dialogue; its tools may be made from what the client wrote."""
    try:
        return env.reset(options={"task": task})[0]
    except (KeyError, ValueError) as error:
        if isinstance(error, ConfigError) and not task.metadata:
            raise  # of the server's own settings
        reason = str(error) if isinstance(error, ConfigError) else repr(error)
        raise InvalidRequestError(
            f"the agent's tools cannot work with this metadata: {reason}",
            param="metadata",
        ) from error


def _least(value: int, cap: int | None) -> int:
    return value if cap is None else min(value, cap)


@dataclass(slots=True, kw_only=True)
class _Run:
    """An answer that is growing; `token_ids` is the whole path so far."""

    question: Question
    agent: Agent
    env: ToolUseEnv
    sampler: TurnSampler
    options: AnswerOptions
    token_ids: NDArray[np.int32]
    num_prompt_tokens: int
    num_turns: int = 0
    num_written: int = 0
    finished: Finished | None = None

    @property
    def room(self) -> int:
        """How many more tokens the model may write."""
        left = self.env.remaining_tokens
        cap = self.options.max_tokens
        return left if cap is None else max(min(left, cap - self.num_written), 0)

    @property
    def place(self) -> int:
        """Number of the turn, those of the open answer counted."""
        return self.question.num_turns + self.num_turns

    async def generate(self) -> AsyncGenerator[Event, None]:
        """Sample one turn."""
        options = self.options
        stop = tuple(dict.fromkeys((*self.env.stop, *options.sampling.stop)))
        request = GenerationRequest(
            request_id=f"{options.request_id}/{options.choice}/{self.place}",
            prompt_token_ids=self.token_ids,
            max_tokens=self.room,
            seed=derive_seed(options.seed, options.choice, self.place),
            sampling=replace(options.sampling, stop=stop),
            stream_interval=self.agent.stream_interval if options.live else self.room,
        )
        turns = self.sampler.sample(request, number=self.num_turns)
        async with aclosing(turns) as events:
            async for event in events:
                yield event
        if self.num_turns == 0 and not self.sampler.turn.reader.token_ids:
            raise InvalidRequestError(
                f"the {len(self.token_ids)} tokens of the messages fill the model's "
                "context: send fewer",
                param="messages",
                code="context_length_exceeded",
            )

    async def act(self) -> AsyncGenerator[Event, None]:
        """Do what the turn says: run a tool, leave a call to the client, or end."""
        dialogue, reader = self.question.dialogue, self.sampler.turn.reader
        ids = np.array(reader.token_ids, np.int32)
        left = self.room - len(ids)
        report = self._report()
        self.num_written += len(ids)
        parsed = dialogue.parse(reader.text, ended=reader.ended_by_token)
        if reader.cut is not None:
            yield TurnFinished(report=report)
            found = _answer_of_cut(dialogue, reader.text)
            self.finish(found, "stop", "no_answer" if found is None else "answer")
        elif parsed.tool in self.question.client_tools and parsed.refusal is None:
            yield TurnFinished(report=report)
            yield ClientToolCalls(calls=(self._client_call(parsed),))
            self.finish(None, "tool_calls", "tool_calls")
        elif parsed.tool is not None and left <= 0:
            # Nobody could read what the tool gives.
            yield TurnFinished(report=report)
            self.finish(None, "length", "length")
        else:
            if parsed.tool is not None and parsed.refusal is None:
                yield ToolStarted(
                    turn=self.num_turns, name=parsed.tool, arguments=parsed.arguments
                )
            async with self.sampler.in_time():
                step = await self.env.step_async(ids)
            for event in self._after_step(ids, step, report):
                yield event
        self.num_turns += 1

    def _after_step(
        self, ids: NDArray[np.int32], step: Any, report: TurnReport
    ) -> list[Event]:
        result_ids, _, terminated, truncated, info = step
        done: Turn = info["turn"]
        events: list[Event] = []
        if done.tool_call is not None:
            result = done.tool_result or ""
            shown = result if done.tool_call.status == "ok" else scrub(result)
            if shown != result:
                # The model could repeat what it reads.
                result_ids = self._result_ids(shown)
            report = replace(report, tool_call=done.tool_call, tool_result=shown)
            events.append(
                ToolFinished(turn=self.num_turns, call=done.tool_call, result=shown)
            )
        events.append(TurnFinished(report=report))
        if terminated or truncated:
            path = info["trajectory"]
            self.finish(path.answer, "length" if truncated else "stop", path.end)
        else:
            self.token_ids = np.concatenate([self.token_ids, ids, result_ids])
        return events

    def _result_ids(self, text: str) -> NDArray[np.int32]:
        """What the model reads of a call in place of what the environment gave it."""
        return self.question.dialogue.result_ids(
            text,
            self.env.max_result_tokens,
            turn_ended=self.sampler.turn.reader.ended_by_token,
        ).ids

    def finish(self, found: str | None, reason: AnswerReason, end: str) -> None:
        """The answer is over."""
        usage = TokenUsage(
            prompt_tokens=self.num_prompt_tokens, completion_tokens=self.num_written
        )
        self.finished = Finished(
            answer=found,
            reason=reason,
            end=end,
            usage=usage,
            version=self.sampler.version or "",
        )

    def _report(self) -> TurnReport:
        turn = self.sampler.turn
        return TurnReport(
            turn=self.num_turns,
            text=turn.reader.text,
            prompt_tokens=len(self.token_ids),
            completion_tokens=len(turn.reader.token_ids),
            entropy=turn.entropy,
            latency_s=turn.latency_s,
        )

    def _client_call(self, parsed: ParsedTurn) -> ClientCall:
        spec = self.question.client_tools[parsed.tool or ""]
        # Not random: the same seed gives the same answer, ids included.
        number = derive_seed(self.options.seed, self.options.choice, self.place, "call")
        return ClientCall(
            id=f"call_{number:016x}",
            name=spec.name,
            arguments=call_arguments(spec, parsed.arguments),
        )


def _answer_of_cut(dialogue: Dialogue, text: str) -> str | None:
    """The answer in a turn that a stop text of the client has cut.

    What ends a turn of this dialogue is put back, for the cut may have taken it.
    """
    for ending in ("", *dialogue.stop):
        parsed = dialogue.parse(text + ending)
        if parsed.ended and parsed.answer is not None:
            return parsed.answer
    return None
