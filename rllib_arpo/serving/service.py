"""Requests in, answers out: what every transport of the server calls."""

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace

from rllib_arpo.serving.agent_loop import Agent, AnswerOptions, answer
from rllib_arpo.serving.answer_log import AnswerLog, AnswerSink, logged
from rllib_arpo.serving.conversation import Question, read_question
from rllib_arpo.serving.engine_client import TurnEngine
from rllib_arpo.serving.events import Event, Finished, TokenUsage
from rllib_arpo.serving.openai_api import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    UnknownModelError,
)
from rllib_arpo.serving.replies import ChunkWriter, collect, total_usage

# Reading a longer request, tools and earlier turns included, would hold up the other
# answers.
LONG_REQUEST_CHARS = 20_000
# Events that a slow client may be behind of an answer before the answer waits for it.
MAX_WAITING_EVENTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A request that can be answered."""

    request: ChatCompletionRequest
    question: Question
    agent: Agent
    engine: TurnEngine
    options: AnswerOptions
    num_answers: int
    created: int
    sink: AnswerSink | None

    def answer(self, choice: int) -> AsyncGenerator[Event, None]:
        options = replace(self.options, choice=choice)
        events = answer(self.question, self.agent, self.engine, options)
        if self.sink is None or not self.sink.wants():
            return events
        log = AnswerLog(
            request_id=options.request_id,
            choice=choice,
            model=self.request.model,
            messages=self.request.messages,
        )
        return logged(events, log, self.sink)


class ChatService:
    """Answers chat requests with agents.

    Args:
        agents: model name -> the agent and the engine that writes for it.
        sink: gets answers that are over; None: nobody does.
    """

    def __init__(
        self,
        agents: Mapping[str, tuple[Agent, TurnEngine]],
        *,
        sink: AnswerSink | None = None,
    ) -> None:
        self._agents = dict(agents)
        self._sink = sink

    def models(self) -> list[str]:
        """Names of the models, in the order in which they were given."""
        return list(self._agents)

    async def complete(self, request: ChatCompletionRequest) -> ChatCompletion:
        """Answer in one piece; cancelling the task ends generation and tools.

        Raises:
            UnknownModelError: no such model.
            InvalidRequestError: the request cannot be answered; names the field.
            EngineLostError: the engine is lost, or has new weights; ask again.
            RequestTimeoutError: it took too long.
        """
        asked = await self._read(request, live=False)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(_all_events(asked, choice))
                    for choice in range(asked.num_answers)
                ]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        answers = [collect(task.result(), index=i) for i, task in enumerate(tasks)]
        return ChatCompletion(
            id=asked.options.request_id,
            created=asked.created,
            model=request.model,
            choices=[choice for choice, _ in answers],
            usage=total_usage([usage for _, usage in answers]),
        )

    async def stream(
        self, request: ChatCompletionRequest
    ) -> AsyncGenerator[ChatCompletionChunk, None]:
        """Answer piece by piece; closing the iterator ends generation and tools.

        What is wrong with a request, or with the engine from the start, is raised
        before the first chunk.

        Raises:
            UnknownModelError: no such model.
            InvalidRequestError: the request cannot be answered; names the field.
            EngineLostError: the engine is lost, or has new weights; ask again.
            RequestTimeoutError: it took too long.
        """
        asked = await self._read(request, live=True)
        writer = ChunkWriter(
            id=asked.options.request_id, created=asked.created, model=request.model
        )
        usages: list[TokenUsage] = []
        async with aclosing(_merged(asked)) as events:
            async for index, event in events:
                if isinstance(event, Finished):
                    usages.append(event.usage)
                for chunk in writer.chunks(event, index=index):
                    yield chunk
        if request.stream_options and request.stream_options.include_usage:
            yield writer.usage(usages)

    async def _read(self, request: ChatCompletionRequest, *, live: bool) -> _Asked:
        if request.model not in self._agents:
            raise UnknownModelError(
                f"there is no model {request.model!r}; there is {self.models()}",
                param="model",
                code="model_not_found",
            )
        agent, engine = self._agents[request.model]
        task_id = f"chatcmpl-{uuid.uuid4().hex}"
        size = len(request.model_dump_json(exclude_unset=True))
        if size > LONG_REQUEST_CHARS:
            question = await asyncio.to_thread(
                read_question, request, agent.env, task_id=task_id
            )
        else:
            question = read_question(request, agent.env, task_id=task_id)
        return _Asked(
            request=request,
            question=question,
            agent=agent,
            engine=engine,
            options=_options(request, agent, task_id, live=live),
            num_answers=request.n or 1,
            created=int(time.time()),
            sink=self._sink,
        )


def _options(
    request: ChatCompletionRequest, agent: Agent, request_id: str, *, live: bool
) -> AnswerOptions:
    sampling = agent.sampling
    stop = request.stop or ()
    if request.temperature is not None:
        sampling = replace(sampling, temperature=request.temperature)
    if request.top_p is not None:
        sampling = replace(sampling, top_p=request.top_p)
    return AnswerOptions(
        request_id=request_id,
        seed=secrets.randbits(63) if request.seed is None else request.seed,
        sampling=replace(sampling, stop=(stop,) if isinstance(stop, str) else (*stop,)),
        max_tokens=request.max_completion_tokens or request.max_tokens,
        live=live,
    )


async def _all_events(asked: _Asked, choice: int) -> list[Event]:
    return [event async for event in asked.answer(choice)]


async def _merged(asked: _Asked) -> AsyncGenerator[tuple[int, Event], None]:
    """Events of all answers, each with the number of its answer.

    Every answer runs in a task of its own, so that closing this ends a tool that is
    at work.
    """
    queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue(
        MAX_WAITING_EVENTS
    )

    async def pump(choice: int) -> None:
        try:
            async with aclosing(asked.answer(choice)) as events:
                async for event in events:
                    await queue.put((choice, event))
        except Exception as error:  # boundary: raised again by whoever reads
            await queue.put((choice, error))

    tasks = [asyncio.create_task(pump(i)) for i in range(asked.num_answers)]
    try:
        running = len(tasks)
        while running:
            choice, event = await queue.get()
            if isinstance(event, Exception):
                raise event
            running -= isinstance(event, Finished)
            yield choice, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
