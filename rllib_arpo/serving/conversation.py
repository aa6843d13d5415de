"""A request's messages, as the question that an agent answers.

    system, user, assistant, user          the prompt; earlier answers as they were seen
    user, assistant (tool_calls), tool     an open answer: the model goes on behind it

The open answer is put together from the turns that `assistant.agent` brings back, with
their results; without it from what is visible. It counts as part of the answer: its
tokens and calls are taken from the agent's limits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rllib_arpo.envs.dialogue import Dialogue
from rllib_arpo.envs.tool_use_env import NO_TOKENS, ToolUseEnv
from rllib_arpo.serving.client_tools import (
    ClientTool,
    client_tools,
    dialogue_with,
    write_call,
)
from rllib_arpo.serving.openai_api import (
    AssistantMessage,
    ChatCompletionRequest,
    ChatMessage,
    ClientToolCall,
    InvalidRequestError,
    SystemMessage,
    TextPart,
    ToolMessage,
    UserMessage,
)
from rllib_arpo.serving.turn_text import THINK, THINK_END, starts_thinking
from rllib_arpo.tools.tool import ToolSpec
from rllib_arpo.tree import Message, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What an agent answers; read once for all answers to a request.

    Attributes:
        task: the prompt and the client's metadata.
        dialogue: the agent's, with the client's tools if there are any.
        client_tools: by name.
        open_ids: [T] int32, the answer so far, results included; often empty.
        num_turns: of the model in `open_ids`.
        num_tool_calls: of the agent's tools in `open_ids`.
    """

    task: Task
    dialogue: Dialogue
    client_tools: dict[str, ToolSpec] = field(default_factory=dict)
    open_ids: NDArray[np.int32] = field(default_factory=lambda: NO_TOKENS)
    num_turns: int = 0
    num_tool_calls: int = 0


@dataclass(slots=True)
class _Said:
    """A message of the assistant, and what its calls of the client's tools gave."""

    place: int
    message: AssistantMessage
    results: list[tuple[ClientToolCall, str]] = field(default_factory=list)

    @property
    def calls(self) -> list[ClientToolCall]:
        return self.message.tool_calls or []


_Step = _Said | SystemMessage | UserMessage


def read_question(
    request: ChatCompletionRequest, env: ToolUseEnv, *, task_id: str
) -> Question:
    """Read a request's messages and tools.

    Args:
        request: as it was sent.
        env: the agent's; only read.
        task_id: unique.

    Raises:
        InvalidRequestError: they make no conversation; names the field.
    """
    tools: tuple[ClientTool, ...] = ()
    if request.tools and request.tool_choice != "none":
        tools = client_tools(request.tools, server_tools=env.tool_names)
    dialogue = dialogue_with(env.dialogue, tools) if tools else env.dialogue
    reader = _Reader(
        dialogue=dialogue,
        specs={tool.name: tool.spec for tool in tools},
        max_result_tokens=env.max_result_tokens,
    )
    steps = _steps(request.messages)
    asked = [i for i, step in enumerate(steps) if isinstance(step, UserMessage)]
    if not asked:
        raise InvalidRequestError(
            "there must be a message whose `role` is user", param="messages"
        )
    open_answer = [step for step in steps[asked[-1] + 1 :] if isinstance(step, _Said)]
    _check_order(request.messages, steps[asked[-1] + 1 :])
    task = Task(
        task_id=task_id,
        messages=tuple(reader.prompt(steps[: asked[-1] + 1])),
        answers=("",),
        source="serving",
        metadata=dict(request.metadata or {}),
    )
    _check_template(dialogue, task)
    return reader.question(task, open_answer)


def _check_template(dialogue: Dialogue, task: Task) -> None:
    """Refuse what the chat template refuses, as a second message of a system.

    The dialogue remembers the prompt, so it is not rendered again.
    """
    # With transformers, which is at work here already.
    from jinja2 import TemplateError

    try:
        dialogue.prompt_ids(task.messages)
    except TemplateError as error:
        raise InvalidRequestError(
            f"the model's chat template cannot render these messages: {error}",
            param="messages",
        ) from error


def _steps(
    messages: Sequence[ChatMessage],
) -> list[_Step]:
    """The messages, each tool's put behind the call that it answers."""
    steps: list[_Step] = []
    for place, message in enumerate(messages):
        last = steps[-1] if steps else None
        if isinstance(message, ToolMessage):
            _answer_call(last, message, place)
            continue
        if isinstance(last, _Said):
            _check_answered(last)
        if isinstance(message, AssistantMessage):
            steps.append(_Said(place, message))
        else:
            steps.append(message)
    if steps and isinstance(steps[-1], _Said):
        _check_answered(steps[-1])
    return steps


def _answer_call(last: object, message: ToolMessage, place: int) -> None:
    calls = last.calls if isinstance(last, _Said) else []
    by_id = {call.id: call for call in calls}
    call = by_id.get(message.tool_call_id)
    answered = isinstance(last, _Said) and call in [one for one, _ in last.results]
    if not isinstance(last, _Said) or call is None or answered:
        raise InvalidRequestError(
            f"{message.tool_call_id!r} must be the id of a call of the assistant's "
            f"message before it that has no answer yet; its calls are {list(by_id)}",
            param=f"messages.{place}.tool_call_id",
        )
    last.results.append((call, text_of(message.content)))


def _check_answered(said: _Said) -> None:
    answered = {call.id for call, _ in said.results}
    missing = [call.id for call in said.calls if call.id not in answered]
    if missing:
        raise InvalidRequestError(
            f"no message of a tool follows that answers the calls {missing}",
            param=f"messages.{said.place}.tool_calls",
        )


def _check_order(messages: Sequence[ChatMessage], after: Sequence[object]) -> None:
    """What follows the last user's message must be an open answer."""
    if not after:
        return
    for step in after:
        if not isinstance(step, _Said):
            raise InvalidRequestError(
                "instructions must stand before the last message of the user",
                param="messages",
            )
        if not step.calls:
            raise InvalidRequestError(
                "the last message must be the user's or a tool's: an answer of the "
                "assistant cannot be gone on with",
                param=f"messages.{len(messages) - 1}.role",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    dialogue: Dialogue
    specs: dict[str, ToolSpec]
    max_result_tokens: int

    def prompt(self, steps: Sequence[_Step]) -> list[Message]:
        """The conversation up to the last question, as the template reads it.

        An earlier exchange with tools is one message of the assistant: its calls and
        their framed results are part of the text.
        """
        messages: list[Message] = []
        open_text = ""
        for step in steps:
            if isinstance(step, _Said) and step.calls:
                turns = self._visible_turns(step, thoughts=False)
                for turn, (_, result) in zip(turns, step.results, strict=True):
                    open_text += turn + self._framed(result)
                continue
            if isinstance(step, _Said):
                open_text += text_of(step.message.content or "")
            if open_text:
                messages.append(Message(role="assistant", content=open_text))
                open_text = ""
            if not isinstance(step, _Said):
                role = "user" if isinstance(step, UserMessage) else "system"
                messages.append(Message(role=role, content=text_of(step.content)))
        return messages

    def question(self, task: Task, open_answer: Sequence[_Said]) -> Question:
        """The question, with the open answer as tokens."""
        pieces: list[NDArray[np.int32]] = []
        turns = calls = 0
        for said in open_answer:
            trace = said.message.agent
            results = [result for _, result in said.results]
            if trace is None or not trace.turns:
                for text, result in zip(
                    self._visible_turns(said, thoughts=True), results, strict=True
                ):
                    pieces += self._turn(text, [result])
                    turns += 1
                continue
            for number, turn in enumerate(trace.turns):
                call = turn.tool_call
                after = [] if call is None else [call.result]
                if number == len(trace.turns) - 1:
                    after += results
                pieces += self._turn(turn.text, after)
                turns += 1
                calls += call is not None and call.status != "refused"
        return Question(
            task=task,
            dialogue=self.dialogue,
            client_tools=self.specs,
            open_ids=np.concatenate(pieces) if pieces else NO_TOKENS,
            num_turns=turns,
            num_tool_calls=calls,
        )

    def _turn(self, text: str, results: Sequence[str]) -> list[NDArray[np.int32]]:
        """Tokens of a turn and of what it was given."""
        pieces = [self.dialogue.model_ids(text)]
        for result in results:
            _, ended = self.dialogue.decode(pieces[-1])
            pieces.append(
                self.dialogue.result_ids(
                    result, self.max_result_tokens, turn_ended=ended
                ).ids
            )
        return pieces

    def _framed(self, result: str) -> str:
        ids = self.dialogue.result_ids(result, self.max_result_tokens).ids
        return self.dialogue.decode(ids)[0]

    def _visible_turns(self, said: _Said, *, thoughts: bool) -> list[str]:
        """The turns that made the calls of a message, one each."""
        head = text_of(said.message.content or "")
        opened = starts_thinking(self.dialogue)
        thought = said.message.reasoning_content or ""
        if thoughts and (thought or opened):
            begin = "" if opened else f"{THINK}\n"
            head = f"{begin}{thought}\n{THINK_END}\n{head}"
        turns: list[str] = []
        for call, _ in said.results:
            function = call.function
            try:
                text = write_call(
                    self.dialogue, self.specs, function.name, function.arguments
                )
            except ValueError as error:
                place = f"messages.{said.place}.tool_calls.{said.calls.index(call)}"
                raise InvalidRequestError(
                    str(error), param=f"{place}.function.arguments"
                ) from error
            turns.append(f"{head}\n{text}" if head else text)
            head = ""
        return turns


def text_of(content: str | Sequence[TextPart]) -> str:
    """A message's text; its parts stand on lines of their own."""
    if isinstance(content, str):
        return content
    return "\n".join(part.text for part in content)
