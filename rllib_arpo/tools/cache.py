"""A cache of tool calls that all processes of a node share, and its recordings.

1. The key is the backend, its version and all arguments; the released code's was the
   query alone, so that another engine or locale answered from the old one's results.
2. Equal calls at the same time are one call. Who waited for it shares its outcome, a
   failure too, be it in this event loop, another thread or another process.
3. Failures are not kept, and empty results only for a while; the released code kept
   "no results" for ever.
4. A cache that cannot be written costs calls, never a result.

Modes: "use" is the above. "record" keeps everything for ever and lets the first outcome
of a key, be it a failure, stand for all later calls of that run. "replay" answers from
such a file alone. So every call of the replayed run gets what it got in the recorded
run, in whatever order calls come. What has no outcome cannot be replayed: a call that
its caller gave up. Give a tool a shorter time limit of its own than the environment's.
"""

import asyncio
import json
import logging
import os
import sqlite3
import threading
import time
import unicodedata
import uuid
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from rllib_arpo.errors import ConfigError, ToolError, ToolTimeoutError
from rllib_arpo.tools.cache_file import check_file
from rllib_arpo.tools.cache_store import (
    LEASE_S,
    CacheStore,
    Keeping,
    Key,
    Outcome,
)
from rllib_arpo.tools.search import Document, SearchBackend
from rllib_arpo.tools.shared_calls import SharedCalls

CacheMode = Literal["use", "record", "replay"]
Call = Callable[[], Awaitable[str]]
T = TypeVar("T")

FIRST_PAUSE_S = 0.01  # between two looks for another process's outcome
LAST_PAUSE_S = 0.2
# Before further attempts at a call that is recorded, since its failure would stand.
RECORD_PAUSES_S = (0.5, 1.0)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """How the calls of one `ToolCache` object ended, in this process.

    Attributes:
        hits: answered from the file.
        misses: made, because nothing was kept.
        shared: answered by an equal call that was being made.
        empty: of all these, found nothing.
        errors: of all these, failed.
        unrecorded: replayed, but never recorded.
        file_errors: times that the file could not be read or written.
    """

    hits: int = 0
    misses: int = 0
    shared: int = 0
    empty: int = 0
    errors: int = 0
    unrecorded: int = 0
    file_errors: int = 0


class ToolCache:
    """Keeps what calls gave; picklable, and safe to use from any thread and loop.

    A copy in another process opens the same file. Relative names are resolved here.

    Args:
        file: SQLite file on a local disk, made when missing.
        mode: "use", "record" or "replay", see the module.
        max_mb: size of the file from which the least recently used go.
        empty_life_s: seconds that an empty result is good for.
        life_s: seconds that any result is good for; None: for ever.
        clock: seconds since the epoch, the same for all processes.

    Raises:
        ConfigError: a setting cannot work, the file is something else, or there is
            none to replay.
    """

    def __init__(
        self,
        file: str | Path,
        *,
        mode: CacheMode = "use",
        max_mb: float = 1024,
        empty_life_s: float = 3600,
        life_s: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if mode not in get_args(CacheMode):
            raise ConfigError(f"`mode` ({mode!r}) must be one of {get_args(CacheMode)}")
        if max_mb <= 0:
            raise ConfigError(f"`max_mb` ({max_mb}) must be above 0")
        for name, seconds in (("empty_life_s", empty_life_s), ("life_s", life_s)):
            if seconds is not None and seconds < 0:
                raise ConfigError(f"`{name}` ({seconds}) must be at least 0")
        self.file = Path(file).absolute()
        self.mode: CacheMode = mode
        self.max_mb = max_mb
        self.empty_life_s = empty_life_s
        self.life_s = life_s
        self._clock = clock
        check_file(self.file, to_replay=mode == "replay")
        self._start()

    async def fetch(
        self,
        *,
        backend: str,
        version: str,
        arguments: Mapping[str, Any],
        call: Call,
        is_empty: Callable[[str], bool] = lambda text: not text.strip(),
    ) -> str:
        """What the call gives, or gave before.

        A caller that is cancelled leaves the call to those who wait for it too; the
        last one ends it.

        Args:
            backend: who answers the call.
            version: of its index or settings.
            arguments: all that the result depends on besides, as JSON.
            call: makes the call; it may run in the task of another caller.
            is_empty: whether a result says that there is none.

        Raises:
            ToolError: the call failed, or it is to be replayed and was not recorded.
        """
        key = Key.of(backend, version, arguments)
        if self.mode == "replay":
            return await self._replay(key)
        landed, joined = await self._calls.join(
            key.digest, lambda: self._find_or_make(key, call, is_empty)
        )
        shared = joined and landed.source == "misses"
        self._count("shared" if shared else landed.source, *_kinds(landed.outcome))
        if landed.error is not None:
            raise landed.error
        return landed.outcome.result()

    @property
    def stats(self) -> CacheStats:
        """Counts up to here."""
        with self._lock:
            return CacheStats(**self._counts)

    async def forget_failures(self) -> int:
        """Remove recorded failures, so that a run goes on after an outage; how many."""
        return await self._on_file(self._store.forget_failures, fallback=0)

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        self._thread.submit(self._store.close).result()

    def __getstate__(self) -> dict[str, Any]:
        names = ("file", "mode", "max_mb", "empty_life_s", "life_s", "_clock")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        """What belongs to one process: nothing of it survives a pickle or a fork."""
        keeping = (
            Keeping(
                max_bytes=int(self.max_mb * 2**20),
                life_s=self.life_s,
                empty_life_s=self.empty_life_s,
            )
            if self.mode == "use"
            else Keeping(failures=True)
        )
        self._store = CacheStore(
            self.file, keeping, read_only=self.mode == "replay", clock=self._clock
        )
        # One thread: SQLite may wait for a lock, and its connection has one owner.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tool-cache")
        self._calls = SharedCalls[_Landed]()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._warned = False
        _caches.add(self)

    async def _find_or_make(
        self, key: Key, call: Call, is_empty: Callable[[str], bool]
    ) -> "_Landed":
        """Find the outcome, wait for another process's, or make the call."""
        owner = uuid.uuid4().hex
        since_s = self._clock()
        source, pause_s = "hits", FIRST_PAUSE_S
        try:
            while True:
                state = await self._on_file(
                    self._store.ask, key, owner, since_s, fallback=None
                )
                if isinstance(state, Outcome):
                    return _Landed(state, source)
                if state is None:
                    return await self._make(key, owner, call, is_empty)
                source = "shared"
                await asyncio.sleep(pause_s)
                pause_s = min(1.5 * pause_s, LAST_PAUSE_S)
        except BaseException:
            # Not awaited: this task may be cancelled, and the thread keeps the order.
            self._thread.submit(self._store.release, key, owner)
            raise

    async def _make(
        self, key: Key, owner: str, call: Call, is_empty: Callable[[str], bool]
    ) -> "_Landed":
        """Make the call and keep its outcome, unless another one stands already."""
        renewing = asyncio.create_task(self._renew(key, owner))
        error = None
        try:
            text = await (_insist(call) if self.mode == "record" else call())
            outcome = Outcome(kind="empty" if is_empty(text) else "found", text=text)
        except ToolError as failure:
            error = failure
            outcome = Outcome.of_error(failure)
        finally:
            renewing.cancel()
        stands = await self._on_file(
            self._store.finish, key, owner, outcome, fallback=outcome
        )
        return _Landed(stands, "misses", error if stands == outcome else None)

    async def _renew(self, key: Key, owner: str) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            await self._on_file(self._store.renew, key, owner, fallback=None)

    async def _replay(self, key: Key) -> str:
        outcome = await self._on_file(self._store.find, key, fallback=None)
        if outcome is None:
            logger.warning(
                "not recorded in %s: %s %s", self.file, key.backend, key.arguments
            )
            self._count("unrecorded", "errors")
            raise ToolError("this call was not recorded and cannot be replayed")
        self._count("hits", *_kinds(outcome))
        return outcome.result()

    async def _on_file(self, work: Callable[..., T], *args: Any, fallback: T) -> T:
        """`work(*args)` in the thread of the file, or `fallback` when that fails."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, work, *args)
        except (sqlite3.Error, OSError) as error:
            if self.mode == "replay":
                raise ConfigError(
                    f"the tool cache {self.file} cannot be replayed: {error}"
                ) from error
            self._count("file_errors")
            if not self._warned:
                self._warned = True
                logger.warning(
                    "the tool cache %s cannot be used and calls are made without it: "
                    "%s (logged once)",
                    self.file,
                    error,
                )
            return fallback

    def _count(self, *names: str) -> None:
        with self._lock:
            self._counts.update(names)


class CachedSearch:
    """A search backend whose answers are kept.

    Queries that differ in how they encode a letter or in outer spaces are one query.

    Args:
        backend: asked when nothing is kept.
        cache: shared with other backends and tools.
    """

    def __init__(self, backend: SearchBackend, cache: ToolCache) -> None:
        self.backend = backend
        self.cache = cache

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def version(self) -> str:
        return self.backend.version

    async def search(self, query: str, top_k: int) -> Sequence[Document]:
        query = unicodedata.normalize("NFC", query).strip()

        async def call() -> str:
            documents = await self.backend.search(query, top_k)
            return json.dumps([asdict(document) for document in documents])

        found = await self.cache.fetch(
            backend=self.name,
            version=self.version,
            arguments={"query": query, "top_k": top_k},
            call=call,
            is_empty=lambda text: text == "[]",
        )
        return [Document(**document) for document in json.loads(found)]


@dataclass(frozen=True, slots=True)
class _Landed:
    """An outcome, its source (a field of `CacheStats`) and the call's own error."""

    outcome: Outcome
    source: str
    error: ToolError | None = None


async def _insist(call: Call) -> str:
    """Make a call again while it may work, for what is recorded stays."""
    for pause_s in RECORD_PAUSES_S:
        try:
            return await call()
        except ToolTimeoutError:
            raise
        except ToolError as error:
            if not error.retryable:
                raise
        await asyncio.sleep(pause_s)
    return await call()


def _kinds(outcome: Outcome) -> list[str]:
    """Fields of `CacheStats` that count an outcome."""
    if outcome.failed:
        return ["errors"]
    return ["empty"] if outcome.kind == "empty" else []


_caches: "weakref.WeakSet[ToolCache]" = weakref.WeakSet()
# Never closed: closing a connection in a child disturbs the parent's.
_of_parents: list[object] = []


def _after_fork() -> None:
    for cache in list(_caches):
        _of_parents.append((cache._store, cache._thread))
        cache._start()


os.register_at_fork(after_in_child=_after_fork)
