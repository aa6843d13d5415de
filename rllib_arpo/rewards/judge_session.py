"""Where a judge's requests are made: one event loop of its own, in a thread.

So the bound on concurrent requests and the pool of connections hold for all threads
and loops of a process. The only file that reads the API key.
"""

import asyncio
import os
import threading

from rllib_arpo.errors import ConfigError


class JudgeSession:
    """A loop in a thread, the client that lives in it, and the slots for requests.

    Args:
        base_url: of the endpoint, None for OpenAI's.
        api_key_env: environment variable that holds the key, None for no key.
        max_concurrent: number of slots.
        timeout_s: seconds for one request.
        max_retries: further attempts after a failure that may pass.

    Raises:
        ConfigError: the environment holds no key.
    """

    def __init__(
        self,
        *,
        base_url: str | None,
        api_key_env: str | None,
        max_concurrent: int,
        timeout_s: float,
        max_retries: int,
    ) -> None:
        # Takes a second, which a driver that only configures need not.
        from openai import AsyncOpenAI

        self._key = _read_key(api_key_env)
        self.client: AsyncOpenAI = AsyncOpenAI(
            api_key=self._key,
            base_url=base_url,
            timeout=timeout_s,
            max_retries=max_retries,
        )
        self.slots = asyncio.Semaphore(max_concurrent)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self.loop.run_forever, name="judge", daemon=True
        )
        self._thread.start()

    def without_key(self, text: str) -> str:
        """The text, the key blacked out."""
        return text.replace(self._key, "***")

    def close(self) -> None:
        """Give up the requests in flight, and end the connections and the thread."""
        asyncio.run_coroutine_threadsafe(self._end(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.client.close()


def _read_key(variable: str | None) -> str:
    if variable is None:
        return "no-key"  # the client wants one; the endpoint does not read it
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(
            f"the judge's key is not in the environment: set {variable}, or "
            "`api_key_env=None` for an endpoint that wants none"
        )
    return key
