"""A judge: another model says whether an answer means what an accepted one means.

Any endpoint of OpenAI's chat completions will do (OpenAI, vLLM, Ray Serve, ...).

    judge = Judge("Qwen/Qwen3-32B", base_url="http://judge:8000/v1")
    reward_fn = JudgeReward(judge=judge)

One event loop in a thread of its own makes all requests of a process, so that the
bound on concurrent ones holds however many threads and loops ask. The openai client
retries what is worth it (429, 5xx, time-outs) with backoff and obeys `Retry-After`.
A reply without a verdict is asked for again; verdicts, and nothing else, are cached.
The API key is read from the environment when the first request is made, and is in no
log, error or pickle.
"""

import asyncio
import dataclasses
import hashlib
import importlib.util
import json
import os
import threading
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from rllib_arpo.errors import ConfigError, RewardError, ToolError
from rllib_arpo.rewards.judge_prompt import (
    AGAIN,
    INSTRUCTIONS,
    JudgeCase,
    Verdict,
    read_verdict,
    user_message,
)
from rllib_arpo.rewards.judge_session import JudgeSession

if TYPE_CHECKING:
    from rllib_arpo.tools.cache import ToolCache

T = TypeVar("T")

NO_VERDICT = "no reply of the judge held a verdict"
OPTIONS: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 1024}


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeUsage:
    """What a judge has cost so far in this process.

    Attributes:
        num_cases: answers that were put to it.
        num_cached: of these, answered from the cache.
        num_requests: replies of the model, unreadable ones included.
        num_unreadable: replies without a verdict.
        prompt_tokens: as the endpoint counts them.
        completion_tokens: as the endpoint counts them.
        cost_usd: by the prices that the judge was given.
    """

    num_cases: int = 0
    num_cached: int = 0
    num_requests: int = 0
    num_unreadable: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0


class Judge:
    """Asks a model for verdicts; may be shared by threads, and pickled.

    Args:
        model: name at the endpoint.
        base_url: of the endpoint, None for OpenAI's.
        api_key_env: environment variable that holds the key, None when the endpoint
            wants none.
        options: further fields of the request, in place of `OPTIONS`.
        max_concurrent: requests at once, of this process.
        timeout_s: seconds for one request.
        max_retries: further attempts after a failure that may pass.
        max_asks: replies asked for before a case counts as unjudged.
        max_answer_chars: a longer answer is incorrect without a request.
        cache: keeps verdicts; a copy of the judge in another process shares it.
        prompt_price: dollars for a million prompt tokens.
        completion_price: dollars for a million completion tokens.

    Raises:
        ConfigError: the package `openai` is missing, or a number cannot work.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str | None = "OPENAI_API_KEY",
        options: Mapping[str, Any] = OPTIONS,
        max_concurrent: int = 16,
        timeout_s: float = 60.0,
        max_retries: int = 4,
        max_asks: int = 3,
        max_answer_chars: int = 2000,
        cache: "ToolCache | None" = None,
        prompt_price: float = 0.0,
        completion_price: float = 0.0,
    ) -> None:
        if importlib.util.find_spec("openai") is None:
            raise ConfigError(
                "a judge needs the package openai: pip install 'rllib_arpo[judge]'"
            )
        for name, value in (("max_concurrent", max_concurrent), ("max_asks", max_asks)):
            if value < 1:
                raise ConfigError(f"`{name}` ({value}) must be at least 1")
        self.model = model
        self.base_url = base_url
        self.api_key_env = api_key_env
        self.options = dict(options)
        self.max_concurrent = max_concurrent
        self.timeout_s = timeout_s
        self.max_retries = max_retries
        self.max_asks = max_asks
        self.max_answer_chars = max_answer_chars
        self.cache = cache
        self.prompt_price = prompt_price
        self.completion_price = completion_price
        self._start()

    def _start(self) -> None:
        self._usage = JudgeUsage()
        self._session: JudgeSession | None = None
        self._opening = threading.Lock()
        _judges.add(self)

    @property
    def usage(self) -> JudgeUsage:
        """Counts and cost since this object was made, or unpickled."""
        return self._usage

    def ask(self, case: JudgeCase) -> Verdict | None:
        """The verdict on one answer; blocks, so not for an event loop's thread.

        Returns:
            None when none of `max_asks` replies held a verdict.

        Raises:
            ConfigError: the environment holds no key.
            RewardError: the endpoint refused the request, or stayed out of reach.
        """
        return self._submit(self._verdict(case)).result()

    async def ask_async(self, case: JudgeCase) -> Verdict | None:
        """`ask` for event loops."""
        return await asyncio.wrap_future(self._submit(self._verdict(case)))

    def ask_all(self, cases: Sequence[JudgeCase]) -> list[Verdict | None]:
        """`ask` for many answers at once, `max_concurrent` of them at a time."""
        return self._submit(self._verdicts(cases)).result()

    def close(self) -> None:
        """End the connections; the next question opens them again."""
        with self._opening:
            session, self._session = self._session, None
        if session is not None:
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Judge({self.model!r}, base_url={self.base_url!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        try:
            with self._opening:
                if self._session is None:
                    self._session = JudgeSession(
                        base_url=self.base_url,
                        api_key_env=self.api_key_env,
                        max_concurrent=self.max_concurrent,
                        timeout_s=self.timeout_s,
                        max_retries=self.max_retries,
                    )
                return asyncio.run_coroutine_threadsafe(coroutine, self._session.loop)
        except ConfigError:
            coroutine.close()
            raise

    # In the session's loop from here on.

    async def _verdicts(self, cases: Sequence[JudgeCase]) -> list[Verdict | None]:
        tasks = [asyncio.create_task(self._verdict(case)) for case in cases]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # after a failure the others are not worth paying for
                task.cancel()

    async def _verdict(self, case: JudgeCase) -> Verdict | None:
        self._count(num_cases=1)
        if not case.answer.strip():
            return Verdict(correct=False, reason="no answer")
        if len(case.answer) > self.max_answer_chars:
            return Verdict(
                correct=False, reason=f"longer than {self.max_answer_chars} characters"
            )
        try:
            return (
                await self._request(case)
                if self.cache is None
                else await self._cached(self.cache, case)
            )
        except ToolError as error:
            if str(error) == NO_VERDICT:
                return None
            # Replaying, and this was never recorded.
            raise RewardError(f"judge {self.model}: {error}") from error

    async def _cached(self, cache: "ToolCache", case: JudgeCase) -> Verdict:
        asked = False

        async def call() -> str:
            nonlocal asked
            asked = True
            return json.dumps(dataclasses.asdict(await self._request(case)))

        stored = await cache.fetch(
            backend=f"judge {self.model} at {self.base_url}",
            version=self._version(),
            arguments=dataclasses.asdict(case),
            call=call,
        )
        self._count(num_cached=int(not asked))
        return Verdict(**json.loads(stored))

    def _version(self) -> str:
        asked = json.dumps([INSTRUCTIONS, self.options], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()[:16]

    async def _request(self, case: JudgeCase) -> Verdict:
        session = self._session
        assert session is not None
        messages = [
            {"role": "system", "content": INSTRUCTIONS},
            {"role": "user", "content": user_message(case)},
        ]
        for _ in range(self.max_asks):
            async with session.slots:
                reply, whole = await self._complete(session, messages)
            verdict = read_verdict(reply) if whole else None
            if verdict is not None:
                return verdict
            self._count(num_unreadable=1)
            messages = [
                *messages[:2],
                {"role": "assistant", "content": reply or "(nothing)"},
                {"role": "user", "content": AGAIN},
            ]
        raise ToolError(NO_VERDICT)

    async def _complete(
        self, session: JudgeSession, messages: list[dict[str, str]]
    ) -> tuple[str, bool]:
        """The reply, and whether it was not cut off."""
        from openai import OpenAIError
        from openai.types.chat import ChatCompletion

        try:
            completion = await session.client.chat.completions.create(
                model=self.model, messages=cast(Any, messages), **self.options
            )
        except (OpenAIError, ValueError) as error:
            # Without its cause: an endpoint may quote the key in its refusal.
            raise RewardError(
                f"judge {self.model} at {session.client.base_url}: "
                f"{type(error).__name__}: {session.without_key(str(error))[:300]}"
            ) from None
        if not isinstance(completion, ChatCompletion):
            raise RewardError(
                f"judge {self.model} at {session.client.base_url} did not answer with "
                "a chat completion; `base_url` usually ends in /v1"
            )
        usage = completion.usage
        self._count(
            num_requests=1,
            prompt_tokens=(usage and usage.prompt_tokens) or 0,
            completion_tokens=(usage and usage.completion_tokens) or 0,
        )
        if not completion.choices:
            return "", False
        choice = completion.choices[0]
        return choice.message.content or "", choice.finish_reason != "length"

    def _count(self, **more: int) -> None:
        sums = {name: getattr(self._usage, name) + n for name, n in more.items()}
        usage = dataclasses.replace(self._usage, **sums)
        cost = (
            usage.prompt_tokens * self.prompt_price
            + usage.completion_tokens * self.completion_price
        ) / 1e6
        self._usage = dataclasses.replace(usage, cost_usd=cost)


_judges: "weakref.WeakSet[Judge]" = weakref.WeakSet()
_of_parents: list[object] = []


def _after_fork() -> None:
    """A forked child has the parent's loop, but not the thread that runs it."""
    for judge in list(_judges):
        _of_parents.append(judge._session)
        judge._start()


os.register_at_fork(after_in_child=_after_fork)
