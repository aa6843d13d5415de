import asyncio
import json
import pickle
import sqlite3
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest

from rllib_arpo.errors import ConfigError, ToolError, ToolTimeoutError
from rllib_arpo.tools.cache import CachedSearch, CacheStats, ToolCache
from rllib_arpo.tools.cache_file import CacheFile, check_file, pragma
from rllib_arpo.tools.cache_store import (
    LEASE_S,
    CacheStore,
    Claimed,
    Keeping,
    Key,
    Outcome,
)
from rllib_arpo.tools.search import Document
from tests.http_server import HttpServer, Reply, Request

CHILD = Path(__file__).with_name("cache_child.py")
KEY = Key.of("web", "1", {"query": "q"})
FOUND = Outcome(kind="found", text="text")
FAILURE = Outcome(kind="error", text="down", retryable=True)


class Clock:
    """Seconds since the epoch, as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Calls:
    """Makes calls that end as given, one after the other, the last one for ever."""

    def __init__(self, *endings: str | Exception) -> None:
        self.endings = list(endings)
        self.num = 0

    async def __call__(self) -> str:
        self.num += 1
        ending = self.endings.pop(0) if len(self.endings) > 1 else self.endings[0]
        if isinstance(ending, Exception):
            raise ending
        return ending


class GatedServer(HttpServer):
    """Answers with the number of the request, once its gate is open."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.gate = threading.Event()
        self.asked = threading.Event()

    def _answer(self, request: Request) -> Reply:
        self.asked.set()
        assert self.gate.wait(60)
        return Reply(body=b"answer to %s" % request.params["q"].encode())


async def fetch(
    cache: ToolCache,
    call: Callable[[], Awaitable[str]],
    *,
    backend: str = "web",
    version: str = "1",
    **arguments: Any,
) -> str:
    return await cache.fetch(
        backend=backend,
        version=version,
        arguments=arguments or {"query": "q"},
        call=call,
    )


def get(cache: ToolCache, call: Callable[[], Awaitable[str]], **asked: Any) -> str:
    return asyncio.run(fetch(cache, call, **asked))


def failure(cache: ToolCache, call: Callable[[], Awaitable[str]], **asked: Any):
    with pytest.raises(ToolError) as raised:
        get(cache, call, **asked)
    return raised.value


def asking(server: HttpServer) -> Callable[[], Awaitable[str]]:
    async def call() -> str:
        async with httpx2.AsyncClient(trust_env=False, timeout=60) as client:
            return (await client.get(server.url(), params={"q": "same"})).text

    return call


def child(**settings: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(CHILD), json.dumps(settings)],
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """What a child says at its end."""
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return json.loads(output.splitlines()[-1])


def wait_until_asking(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "asking\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache.sqlite"


def test_the_same_call_is_made_once(file):
    cache, calls = ToolCache(file), Calls("one", "two")
    assert [get(cache, calls) for _ in range(3)] == ["one"] * 3
    assert calls.num == 1
    assert cache.stats == CacheStats(hits=2, misses=1)


@pytest.mark.parametrize(
    "other",
    [
        {"backend": "other"},
        {"version": "2"},
        {"query": "Q"},
        {"query": "q", "top_k": 3},
        {"query": ["q"]},
    ],
)
def test_a_call_that_differs_in_anything_is_another(file, other):
    cache = ToolCache(file)
    assert get(cache, Calls("one"), query="q") == "one"
    assert get(cache, Calls("two"), **{"query": "q", **other}) == "two"


def test_the_order_of_arguments_does_not_count_and_they_can_be_read(file):
    with closing(ToolCache(file)) as cache:
        get(cache, Calls("one"), query="café", top_k=3)
        assert get(cache, Calls("two"), top_k=3, query="café") == "one"
    with closing(sqlite3.connect(file)) as db:
        row = db.execute("SELECT backend, version, arguments FROM entries").fetchone()
    assert row == ("web", "1", '{"query": "café", "top_k": 3}')


@pytest.mark.parametrize("text", ["", "a\0b", "\ud800", "日本語", "x" * 100_000])
def test_any_text_comes_back_as_it_was(file, text):
    cache = ToolCache(file)
    get(cache, Calls(text), query=text)
    assert get(cache, Calls("other"), query=text) == text


def test_64_equal_calls_of_a_loop_make_one_request(file):
    async def all_at_once(cache: ToolCache, server: GatedServer) -> list[str]:
        asked = [asyncio.create_task(fetch(cache, asking(server))) for _ in range(64)]
        await asyncio.to_thread(server.asked.wait)
        server.gate.set()
        return await asyncio.gather(*asked)

    cache = ToolCache(file)
    with GatedServer() as server:
        texts = asyncio.run(all_at_once(cache, server))
    assert texts == ["answer to same"] * 64
    assert len(server.requests) == 1
    assert cache.stats == CacheStats(misses=1, shared=63)


def test_64_equal_calls_of_threads_make_one_request(file):
    cache = ToolCache(file)
    texts: list[str] = []
    begun = threading.Barrier(5)

    async def some(server: GatedServer) -> None:
        asked = [asyncio.create_task(fetch(cache, asking(server))) for _ in range(16)]
        await asyncio.sleep(0)
        begun.wait(60)
        texts.extend(await asyncio.gather(*asked))

    with GatedServer() as server:
        threads = [
            threading.Thread(target=lambda: asyncio.run(some(server))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        begun.wait(60)
        server.gate.set()
        for thread in threads:
            thread.join()
    assert texts == ["answer to same"] * 64
    assert len(server.requests) == 1
    stats = cache.stats
    assert (stats.misses, stats.hits + stats.shared) == (1, 63)


def test_64_equal_calls_of_processes_make_one_request(file):
    with GatedServer() as server:
        settings = {"file": str(file), "url": server.url(), "calls": 16}
        children = [child(**settings) for _ in range(4)]
        for process in children:
            wait_until_asking(process)
        server.gate.set()
        seen = [said(process) for process in children]
    assert [text for one in seen for text in one["texts"]] == ["answer to same"] * 64
    assert len(server.requests) == 1
    assert sum(one["stats"]["misses"] for one in seen) == 1


def test_a_call_whose_owner_was_killed_is_made_by_another(file):
    with GatedServer() as server:
        process = child(file=str(file), url=server.url())
        wait_until_asking(process)
        assert server.asked.wait(60)
        process.kill()
        process.communicate()
        server.gate.set()
        cache = ToolCache(file)
        assert get(cache, asking(server), query="same") == "answer to same"
    assert len(server.requests) == 2


def test_a_claim_ends_with_its_lease_unless_it_is_renewed(file):
    clock = Clock()
    store = CacheStore(file, Keeping(), clock=clock)
    assert store.ask(KEY, "a", clock.now) is None
    assert store.ask(KEY, "b", clock.now) == Claimed()
    clock.now += LEASE_S / 2
    store.renew(KEY, "a")
    clock.now += LEASE_S - 1
    assert store.ask(KEY, "b", clock.now) == Claimed()
    clock.now += 2
    assert store.ask(KEY, "b", clock.now) is None
    store.release(KEY, "a")  # too late: the claim is b's
    assert store.ask(KEY, "c", clock.now) == Claimed()
    store.close()


def test_who_waits_in_another_process_shares_a_failure_and_who_comes_later_tries(file):
    clock = Clock()
    store = CacheStore(file, Keeping(), clock=clock)
    asked_s = clock.now
    store.ask(KEY, "owner", asked_s)
    clock.now += 1
    store.finish(KEY, "owner", FAILURE)
    clock.now += 1
    assert store.ask(KEY, "waiter", asked_s) == FAILURE
    assert store.ask(KEY, "later", clock.now) is None
    store.close()


def test_who_waits_gets_a_result_that_has_no_time_to_live(file):
    clock = Clock()
    store = CacheStore(file, Keeping(life_s=0), clock=clock)
    asked_s = clock.now
    store.ask(KEY, "owner", asked_s)
    clock.now += 1
    store.finish(KEY, "owner", FOUND)
    clock.now += 1
    assert store.ask(KEY, "waiter", asked_s) == FOUND
    assert store.ask(KEY, "later", clock.now) is None
    store.close()


def test_who_waits_in_a_loop_shares_a_failure_and_failures_are_not_kept(file):
    async def all_at_once() -> list[Any]:
        asked = [fetch(cache, calls) for _ in range(8)]
        return await asyncio.gather(*asked, return_exceptions=True)

    cache, calls = ToolCache(file), Calls(ToolError("down"), "up")
    assert [str(error) for error in asyncio.run(all_at_once())] == ["down"] * 8
    assert calls.num == 1
    assert get(cache, calls) == "up"
    assert cache.stats == CacheStats(misses=2, shared=7, errors=8)


def test_the_error_of_a_call_reaches_its_callers_as_it_is(file):
    class OwnError(ToolError):
        pass

    assert type(failure(ToolCache(file), Calls(OwnError("own")))) is OwnError
    with pytest.raises(KeyError):
        get(ToolCache(file), Calls(KeyError("a fault of the tool")))
    assert get(ToolCache(file), Calls("up")) == "up"


def test_empty_results_live_for_a_while_and_others_for_ever(file):
    clock = Clock()
    cache = ToolCache(file, empty_life_s=60, clock=clock)
    empty, full = Calls(" ", "found"), Calls("old", "new")
    for later_s, texts in (
        (0, [" ", "old"]),
        (59, [" ", "old"]),
        (2, ["found", "old"]),
    ):
        clock.now += later_s
        assert [get(cache, empty, q=1), get(cache, full, q=2)] == texts
    assert cache.stats.empty == 2


def test_results_live_as_long_as_they_are_allowed_to(file):
    clock = Clock()
    cache, calls = ToolCache(file, life_s=60, clock=clock), Calls("old", "new")
    assert get(cache, calls) == "old"
    clock.now += 59
    assert get(cache, calls) == "old"
    clock.now += 1
    assert get(cache, calls) == "new"


def test_the_least_recently_used_go_when_the_file_is_full(file):
    clock = Clock()
    cache = ToolCache(file, max_mb=1, clock=clock)
    favourite = Calls("x" * 20_000)
    for number in range(150):  # 3 MB
        clock.now += 1
        get(cache, favourite, query="favourite")
        get(cache, Calls("y" * 20_000), query=number)
    assert favourite.num == 1
    assert get(cache, Calls("again"), query=149) == "y" * 20_000
    assert get(cache, Calls("again"), query=0) == "again"
    cache.close()
    assert 0.8 * 2**20 < file.stat().st_size < 1.1 * 2**20


def test_a_result_larger_than_the_limit_is_not_kept_and_pushes_nothing_out(file):
    cache = ToolCache(file, max_mb=0.1)
    get(cache, Calls("small"), query="small")
    large = Calls("x" * 200_000)
    get(cache, large, query="large")
    get(cache, large, query="large")
    assert large.num == 2
    assert get(cache, Calls("again"), query="small") == "small"


def test_a_cancelled_waiter_leaves_the_call_to_the_others(file):
    async def scenario() -> str:
        gate = asyncio.Event()
        started = asyncio.Event()

        async def call() -> str:
            started.set()
            await gate.wait()
            return "text"

        first = asyncio.create_task(fetch(cache, call))
        second = asyncio.create_task(fetch(cache, Calls("own")))
        await started.wait()
        first.cancel()
        await asyncio.wait({first})
        assert first.cancelled()
        gate.set()
        return await second

    cache = ToolCache(file)
    assert asyncio.run(scenario()) == "text"


def test_a_call_that_nobody_waits_for_is_cancelled_and_free(file):
    async def scenario() -> str:
        started, ended = asyncio.Event(), asyncio.Event()

        async def call() -> str:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
            return "never"

        first = asyncio.create_task(fetch(cache, call))
        await started.wait()
        first.cancel()
        await asyncio.wait({first})
        text = await fetch(cache, Calls("text"))
        await ended.wait()
        return text

    cache = ToolCache(file)
    assert asyncio.run(scenario()) == "text"


def test_a_broken_file_is_set_aside_and_begun_anew(file, caplog):
    file.write_bytes(b"this is no database, and never was one" * 100)
    cache = ToolCache(file)
    assert [get(cache, Calls("one", "two")) for _ in range(2)] == ["one"] * 2
    assert cache.stats == CacheStats(hits=1, misses=1)
    (aside,) = file.parent.glob("cache.sqlite.broken-*")
    assert aside.read_bytes().startswith(b"this is no database")
    assert "is broken" in caplog.text


def test_a_file_that_breaks_later_is_set_aside_too(file, caplog):
    cache = ToolCache(file)
    for number in range(200):
        get(cache, Calls("x" * 2000), query=number)
    cache.close()
    whole = file.read_bytes()
    file.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    texts = [get(cache, Calls("new"), query=number) for number in range(5)]
    assert texts == ["new"] * 5
    assert len(list(file.parent.glob("cache.sqlite.broken-*"))) == 1
    assert caplog.text.count("is broken") == 1


def test_a_file_is_checked_while_another_process_makes_it(tmp_path):
    def make(path: Path) -> None:
        made = CacheFile(path, read_only=False)
        made.run(lambda db: pragma(db, "user_version"))
        made.close()

    # Read in three statements, a file half made was refused in one of three rounds.
    for number in range(60):
        path = tmp_path / f"{number}.sqlite"
        maker = threading.Thread(target=make, args=(path,))
        maker.start()
        while maker.is_alive():
            check_file(path, to_replay=False)
        maker.join()
        check_file(path, to_replay=False)


def test_a_file_that_is_set_aside_while_it_is_checked_is_no_mistake(
    tmp_path, monkeypatch
):
    path = tmp_path / "cache.sqlite"
    path.write_bytes(b"broken")
    exists = Path.exists

    def exists_no_longer(self: Path) -> bool:
        found = exists(self)
        if found and self == path:
            self.rename(tmp_path / "cache.sqlite.broken")
        return found

    monkeypatch.setattr(Path, "exists", exists_no_longer)
    check_file(path, to_replay=False)
    assert not path.is_file()
    with pytest.raises(ConfigError, match="record one first"):
        check_file(path, to_replay=True)
    with pytest.raises(ConfigError):
        check_file(tmp_path, to_replay=False)


def test_a_file_of_another_kind_is_refused_and_left_alone(file):
    with closing(sqlite3.connect(file)) as db:
        db.execute("CREATE TABLE precious (x)")
    with pytest.raises(ConfigError, match="no tool cache of this version"):
        ToolCache(file)
    newer = file.with_name("newer.sqlite")
    with closing(ToolCache(newer)) as cache:
        get(cache, Calls("one"))
    with closing(sqlite3.connect(newer)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="version 99"):
        ToolCache(newer)


def test_a_folder_that_cannot_be_written_costs_calls_but_no_result(file, caplog):
    file.write_text("a file, not a folder")
    cache, calls = ToolCache(file / "cache.sqlite"), Calls("one", "two")
    assert [get(cache, calls) for _ in range(2)] == ["one", "two"]
    assert cache.stats.misses == 2
    assert cache.stats.file_errors > 0
    assert caplog.text.count("cannot be used") == 1


def test_equal_calls_of_a_loop_are_one_without_a_file_too(file):
    async def all_at_once() -> list[str]:
        return await asyncio.gather(*(fetch(cache, calls) for _ in range(8)))

    file.write_text("a file, not a folder")
    cache, calls = ToolCache(file / "cache.sqlite"), Calls("one", "two")
    assert asyncio.run(all_at_once()) == ["one"] * 8


def test_a_full_disk_costs_calls_but_no_result(file):
    reply = Reply(body=b"x" * 500_000)
    with HttpServer(lambda request: reply) as server:
        process = child(
            file=str(file), url=server.url(), calls=2, max_file_bytes=200_000
        )
        seen = said(process)
    assert [len(text) for text in seen["texts"]] == [500_000] * 2
    assert seen["stats"]["file_errors"] > 0


OUTCOMES = {
    "found": "text",
    "empty": "",
    "error": ToolError("no such page"),
    "down": ToolError("down", retryable=True),
    "slow": ToolTimeoutError("too slow"),
}


def seen_by(cache: ToolCache, query: str, call: Callable[[], Awaitable[str]]) -> Any:
    try:
        return get(cache, call, query=query)
    except ToolError as error:
        return type(error), str(error), error.retryable


def test_a_replay_gives_what_was_recorded_without_a_call(file):
    recording = ToolCache(file, mode="record")
    recorded = {
        query: seen_by(recording, query, Calls(ending))
        for query, ending in OUTCOMES.items()
    }
    recording.close()
    assert recorded["slow"] == (ToolTimeoutError, "too slow", False)
    assert recorded["down"] == (ToolError, "down", True)
    calls = Calls("must not be made")
    replay = ToolCache(file, mode="replay")
    for query in reversed(OUTCOMES):
        assert seen_by(replay, query, calls) == recorded[query]
    assert calls.num == 0
    assert replay.stats == CacheStats(hits=5, empty=1, errors=3)


def test_what_was_not_recorded_cannot_be_replayed(file, caplog):
    with closing(ToolCache(file, mode="record")) as recording:
        get(recording, Calls("text"))
    replay, calls = ToolCache(file, mode="replay"), Calls("must not be made")
    error = failure(replay, calls, query="other")
    assert "not recorded" in str(error)
    assert not error.retryable
    assert calls.num == 0
    assert replay.stats == CacheStats(unrecorded=1, errors=1)
    assert '{"query": "other"}' in caplog.text


def test_in_a_recording_the_first_outcome_of_a_call_stands(file):
    clock = Clock()
    recording = ToolCache(file, mode="record", empty_life_s=1, life_s=1, clock=clock)
    for query in ("empty", "found", "error"):
        first = seen_by(recording, query, Calls(OUTCOMES[query]))
        clock.now += 1e6
        assert seen_by(recording, query, Calls("later")) == first
    assert asyncio.run(recording.forget_failures()) == 1
    assert get(recording, Calls("later"), query="error") == "later"
    assert get(recording, Calls("later"), query="empty") == ""


def test_a_recording_tries_again_before_it_lets_a_failure_stand(file):
    recording = ToolCache(file, mode="record")
    calls = Calls(ToolError("down", retryable=True), "up")
    assert get(recording, calls) == "up"
    assert calls.num == 2


def test_a_failure_that_was_recorded_is_no_result_elsewhere(file):
    with closing(ToolCache(file, mode="record")) as recording:
        failure(recording, Calls(ToolError("gone")))
    assert get(ToolCache(file), Calls("found")) == "found"


@pytest.mark.parametrize("content", [None, b"", b"no database" * 1000])
def test_a_recording_that_is_missing_empty_or_broken_is_refused(file, content):
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cache\.sqlite"):
        ToolCache(file, mode="replay")
    assert (file.read_bytes() if content is not None else None) == content


def test_a_replay_leaves_the_file_as_it_is(file):
    with closing(ToolCache(file, mode="record")) as recording:
        get(recording, Calls("text"))
    before = file.read_bytes()
    with closing(ToolCache(file, mode="replay")) as replay:
        assert get(replay, Calls("other")) == "text"
    assert file.read_bytes() == before


def test_a_copy_in_another_place_shares_the_file(file):
    cache = ToolCache(file, empty_life_s=7)
    get(cache, Calls("one"))
    copy = pickle.loads(pickle.dumps(cache))
    assert get(copy, Calls("two")) == "one"
    assert (copy.file, copy.empty_life_s) == (file, 7)
    assert copy.stats == CacheStats(hits=1)


def test_a_process_can_be_forked_while_it_has_a_cache(file):
    with HttpServer(lambda request: Reply(body=request.params["q"].encode())) as server:
        seen = said(child(file=str(file), url=server.url(), fork=True))
    texts, stats = seen["fork"]
    assert texts == ["same", "child's"]
    assert (stats["hits"], stats["misses"], stats["file_errors"]) == (1, 1, 0)
    assert seen["after"] == "child's"
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "read"}, "`mode`"),
        ({"max_mb": 0}, "`max_mb`"),
        ({"life_s": -1}, "`life_s`"),
        ({"empty_life_s": -1}, "`empty_life_s`"),
    ],
)
def test_settings_that_cannot_work_are_refused(file, settings, message):
    with pytest.raises(ConfigError, match=message):
        ToolCache(file, **settings)


class Shelf:
    """A search backend that finds what it is told to."""

    name = "shelf"
    version = "7"

    def __init__(self, *documents: Document) -> None:
        self.documents = documents
        self.queries: list[tuple[str, int]] = []

    async def search(self, query: str, top_k: int) -> Sequence[Document]:
        self.queries.append((query, top_k))
        return self.documents[:top_k]


def test_a_cached_search_gives_the_documents_of_its_backend(file):
    documents = (Document("text", "title", "https://x.org/a"), Document("日本"))
    shelf = Shelf(*documents)
    search = CachedSearch(shelf, ToolCache(file))
    assert (search.name, search.version) == ("shelf", "7")
    for _ in range(2):
        assert tuple(asyncio.run(search.search("q", 2))) == documents
    assert len(asyncio.run(search.search("q", 1))) == 1
    assert shelf.queries == [("q", 2), ("q", 1)]


def test_queries_that_differ_in_spaces_around_or_encoding_are_one(file):
    shelf = Shelf(Document("text"))
    search = CachedSearch(shelf, ToolCache(file))
    for query in ("café", " café\n", unicodedata.normalize("NFD", "café")):
        asyncio.run(search.search(query, 3))
    assert shelf.queries == [("café", 3)]


def test_a_search_that_finds_nothing_is_made_again_later(file):
    clock = Clock()
    shelf = Shelf()
    cache = ToolCache(file, empty_life_s=60, clock=clock)
    search = CachedSearch(shelf, cache)
    for later_s in (0, 30, 31):
        clock.now += later_s
        assert asyncio.run(search.search("q", 3)) == []
    assert len(shelf.queries) == 2
    assert cache.stats.empty == 3
