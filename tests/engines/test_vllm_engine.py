import asyncio
import signal
from collections.abc import Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from rllib_arpo.engines.engine import Engine, SamplingParams, TokenChunk
from rllib_arpo.engines.sampling import token_bytes
from rllib_arpo.engines.torch_engine import TorchEngine
from rllib_arpo.envs.almanac_model import TAGS
from rllib_arpo.errors import EngineError, WeightSyncError
from rllib_arpo.rollouts.branching import TreeSettings, bernoulli
from rllib_arpo.rollouts.sampler import grow_tree
from rllib_arpo.tree import RolloutTree, Task, ToolCall, Turn
from tests.models import save_tiny_model
from tests.tokenizers import qwen_like
from tests.vllm_session import (
    VLLMSession,
    ask,
    assert_exact,
    collect,
    joined,
    load,
    log_distributions,
    moved,
    prompt_of,
    reference,
    vllm_session,
    weights_of,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
GREEDY = SamplingParams(temperature=0)
BLOCK = 32  # tokens of a block of keys and values on CPUs; GPUs have smaller ones
CONTEXT = 512


@pytest.fixture(scope="module")
def pieces(almanac_model: str) -> list[bytes]:
    """Each token's bytes."""
    tokenizer = AutoTokenizer.from_pretrained(almanac_model)
    return token_bytes(tokenizer, len(tokenizer))


@pytest.fixture(scope="module")
def model(almanac_model: str) -> PreTrainedModel:
    return load(almanac_model)


def counted(session: VLLMSession, name: str, *requests) -> float:
    """How far a counter moves while requests are answered."""
    before = session.engine.metrics()[name]
    session.collect(*requests)
    return session.engine.metrics()[name] - before


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7),
        SamplingParams(top_p=0.9),
        SamplingParams(top_k=5),
        SamplingParams(temperature=1.3, top_p=0.8, top_k=40),
    ],
    ids=str,
)
def test_logprobs_and_entropies_are_those_of_the_sampled_distribution(
    vllm: VLLMSession, model: PreTrainedModel, sampling: SamplingParams
) -> None:
    assert isinstance(vllm.engine, Engine)
    prompts = [prompt_of(length, length) for length in (1, 7, 40, 130)]
    results = vllm.collect(
        *(
            ask(str(i), prompt, 30, seed=i, sampling=sampling)
            for i, prompt in enumerate(prompts)
        )
    )
    for prompt, result in zip(prompts, results, strict=True):
        assert len(result.token_ids) > 20
        assert_exact(model, prompt, result, sampling)
    assert np.concatenate([r.entropies for r in results]).std() > 0.01


def test_logprobs_and_entropies_are_exact_where_the_consumer_lags(
    vllm: VLLMSession, model: PreTrainedModel
) -> None:
    sampling = SamplingParams(temperature=0.7)

    async def lag() -> list[TokenChunk]:
        request = ask(
            "slow", prompt_of(20, 1), 90, sampling=sampling, stream_interval=1
        )
        chunks = []
        async for chunk in vllm.engine.generate(request):
            chunks.append(chunk)
            # As long as another request takes, outputs wait, and vLLM joins them.
            await collect(vllm.engine, ask("other", prompt_of(5, 2), 20))
        return chunks

    chunks = vllm.run(lag())
    assert max(len(chunk.token_ids) for chunk in chunks) > 1
    assert_exact(model, prompt_of(20, 1), joined(chunks), sampling)


def test_greedy_takes_the_same_tokens_as_the_torch_engine_at_entropy_zero(
    vllm: VLLMSession, almanac_model: str
) -> None:
    requests = [ask(str(i), prompt_of(9 + i, i), 40, sampling=GREEDY) for i in range(6)]
    torch_engine = TorchEngine.from_pretrained(almanac_model)

    async def expected() -> list[TokenChunk]:
        return list(await asyncio.gather(*(collect(torch_engine, r) for r in requests)))

    for ours, theirs in zip(
        vllm.collect(*requests), asyncio.run(expected()), strict=True
    ):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert ours.finish_reason == theirs.finish_reason
        assert not ours.logprobs.any()
        assert not ours.entropies.any()


def test_same_seed_gives_same_tokens_alone_and_in_a_crowd(vllm: VLLMSession) -> None:
    request = ask("x", prompt_of(20, 0), 40, seed=7)
    (alone,) = vllm.collect(request)
    crowd = [ask(str(i), prompt_of(5 + i, i), 9 + i, seed=i) for i in range(32)]
    *_, crowded = vllm.collect(*crowd, request)
    (other,) = vllm.collect(ask("x", prompt_of(20, 0), 40, seed=8))
    assert alone.token_ids.tolist() == crowded.token_ids.tolist()
    assert alone.token_ids.tolist() != other.token_ids.tolist()


def test_given_tokens_are_scored_at_temperature_one(
    vllm: VLLMSession, model: PreTrainedModel
) -> None:
    text = prompt_of(64, 3, model.config.vocab_size)
    expected, _ = reference(model, text[:1], text[1:])
    for _ in range(2):  # the second time from a warm prefix cache
        scored = vllm.score(text)
        assert scored.shape == (63,)
        np.testing.assert_allclose(scored, expected, atol=1e-4)


def said_by(vllm: VLLMSession, seed: int, max_tokens: int) -> list[int]:
    (result,) = vllm.collect(ask("a", prompt_of(16, seed), max_tokens, seed=seed))
    return result.token_ids.tolist()


def first_end(tag: str, tokens: list[int], pieces: list[bytes]) -> int:
    """How many tokens there are up to the one that completes a tag."""
    text = b""
    for count, token in enumerate(tokens, start=1):
        text += pieces[token]
        if tag.encode() in text:
            return count
    raise AssertionError(f"{tag!r} is not in {text!r}")


def stopped(
    vllm: VLLMSession, tag: str, seed: int, tokens: list[int], pieces: list[bytes]
) -> None:
    """Ask the same again with a stop string, which must end it at its last token."""
    sampling = SamplingParams(stop=("</nothing>", tag))
    (result,) = vllm.collect(
        ask("a", prompt_of(16, seed), len(tokens), seed=seed, sampling=sampling)
    )
    end = first_end(tag, tokens, pieces)
    assert result.token_ids.tolist() == tokens[:end]
    assert result.finish_reason == "stop"


def test_a_stop_string_that_is_one_added_token_ends_the_turn_and_is_kept(
    vllm: VLLMSession, pieces: list[bytes]
) -> None:
    tags = {tag.encode() for tag in TAGS}
    for seed in range(10):
        tokens = said_by(vllm, seed, 400)
        found = [pieces[token] for token in tokens if pieces[token] in tags]
        if found:
            break
    else:
        raise AssertionError("no tag was sampled")
    stopped(vllm, found[0].decode(), seed, tokens, pieces)


def test_a_stop_string_ends_the_turn_however_it_is_split_over_tokens(
    vllm: VLLMSession, pieces: list[bytes]
) -> None:
    tokens = said_by(vllm, 0, 200)
    texts = [pieces[token] for token in tokens]
    # From the end of one word over the whole next into a third, which overshoots.
    at = next(
        i
        for i in range(30, len(texts) - 2)
        if all(t.isascii() and len(t) > 1 for t in texts[i : i + 3])
    )
    tag = (texts[at][-1:] + texts[at + 1] + texts[at + 2][:1]).decode()
    assert not any(tag.encode() in piece for piece in pieces)
    assert first_end(tag, tokens, pieces) == at + 3
    stopped(vllm, tag, 0, tokens, pieces)


def test_a_stop_string_that_begins_in_the_prompt_does_not_count(
    vllm: VLLMSession, pieces: list[bytes]
) -> None:
    prompt = prompt_of(16, 1)
    (whole,) = vllm.collect(ask("a", prompt, 9, sampling=GREEDY))
    texts = [pieces[token] for token in whole.token_ids]
    at = next(i for i in range(8) if texts[i].isascii() and texts[i + 1].isascii())
    tag = (texts[at] + texts[at + 1]).decode()
    sampling = SamplingParams(temperature=0, stop=(tag,))
    (rest,) = vllm.collect(
        ask("a", [*prompt, *whole.token_ids[: at + 1]], 1, sampling=sampling)
    )
    assert rest.token_ids[0] == whole.token_ids[at + 1]
    assert rest.finish_reason == "length"


def test_an_end_token_ends_the_turn_and_is_kept(
    vllm: VLLMSession, model: PreTrainedModel
) -> None:
    results = vllm.collect(
        *(ask(str(i), prompt_of(16, i), 400, seed=i) for i in range(16))
    )
    assert {"eos", "length"} == {result.finish_reason for result in results}
    for result in results:
        *others, last = result.token_ids.tolist()
        assert model.config.eos_token_id not in others
        assert (last == model.config.eos_token_id) == (result.finish_reason == "eos")


def test_the_context_ends_a_turn_and_a_full_prompt_gets_an_empty_one(
    vllm: VLLMSession,
) -> None:
    before = vllm.engine.metrics()["num_context_overflows"]
    results = vllm.collect(
        ask("own limit", prompt_of(CONTEXT - 12, 0), 12),
        ask("context", prompt_of(CONTEXT - 12, 0), 13),
        ask("one left", prompt_of(CONTEXT - 1, 0), 9),
        ask("full", prompt_of(CONTEXT, 0), 9),
        ask("beyond", prompt_of(CONTEXT + 100, 0), 9),
    )
    assert [len(result.token_ids) for result in results] == [12, 12, 1, 0, 0]
    assert {result.finish_reason for result in results} == {"length"}
    assert vllm.engine.metrics()["num_context_overflows"] - before == 4


def test_chunks_hold_the_interval_and_come_before_the_turn_ends(
    vllm: VLLMSession,
) -> None:
    intervals = (1, 2, 7, 20, 500)

    async def sizes(interval: int) -> tuple[list[int], bool]:
        # Long, for vLLM joins what a loaded machine's consumer has not taken yet; with
        # this seed it comes to no end before.
        request = ask(
            str(interval), prompt_of(4, 0), 400, seed=1, stream_interval=interval
        )
        found, running = [], False
        async for chunk in vllm.engine.generate(request):
            found.append(len(chunk.token_ids))
            running = running or chunk.finish_reason is None
        return found, running

    async def all_sizes() -> list[tuple[list[int], bool]]:
        return await asyncio.gather(*map(sizes, intervals))

    *several, (alone, _) = vllm.run(all_sizes())
    for interval, (found, before_the_end) in zip(intervals, several, strict=False):
        assert before_the_end
        assert min(found[:-1]) >= interval
        assert sum(found) == 400
    assert alone == [400]


def test_a_fork_recomputes_no_more_than_one_block(vllm: VLLMSession) -> None:
    prompt = prompt_of(70, 11)

    async def forks() -> list[tuple[int, float]]:
        parent = vllm.engine.generate(ask("parent", prompt, 200, stream_interval=100))
        found = []
        async with aclosing(parent):
            said = (await anext(parent)).token_ids
            for cut in (1, 26, 27, 58, 59, 99):
                before = vllm.engine.metrics()
                fork = [*prompt, *said[:cut]]
                await collect(vllm.engine, ask("fork", fork, 2, seed=cut))
                after = vllm.engine.metrics()
                new, cached = (
                    after[name] - before[name]
                    for name in ("num_prompt_tokens", "num_cached_prompt_tokens")
                )
                assert new == len(fork)
                found.append((cut, new - cached))
        return found

    for cut, recomputed in vllm.run(forks()):
        assert 1 <= recomputed <= BLOCK, cut


def test_requests_with_one_prompt_compute_it_once(vllm: VLLMSession) -> None:
    copies = [ask(str(i), prompt_of(150, 12), 2, seed=i) for i in range(8)]
    # 150 = 4 blocks of 32 and 22 tokens: seven requests find the four blocks.
    assert counted(vllm, "num_cached_prompt_tokens", *copies) >= 7 * 128


def test_closing_the_iterator_aborts_the_request(vllm: VLLMSession) -> None:
    async def close_early() -> list[float]:
        running = []
        async with aclosing(vllm.engine.generate(ask("a", prompt_of(9, 0), 400))) as a:
            await anext(a)
            running.append(vllm.engine.metrics()["num_running"])
        running.append(vllm.engine.metrics()["num_running"])
        task = asyncio.create_task(collect(vllm.engine, ask("b", prompt_of(9, 0), 400)))
        while not vllm.engine.metrics()["num_waiting"]:
            await asyncio.sleep(0)
        while not vllm.engine.metrics()["num_running"]:
            await asyncio.sleep(0)
        assert vllm.engine.metrics()["num_waiting"] == 0
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        running.append(vllm.engine.metrics()["num_running"])
        # vLLM itself has let go of both.
        while vllm.engine._llm.output_processor.has_unfinished_requests():
            await asyncio.sleep(0)
        return running

    assert vllm.run(close_early()) == [1, 0, 0]
    (result,) = vllm.collect(ask("a", prompt_of(9, 0), 5))
    assert len(result.token_ids) == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [1, 10**6]}, "vocabulary"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"sampling": SamplingParams(top_p=0)}, "top_p"),
    ],
)
def test_a_wrong_request_is_refused(
    vllm: VLLMSession, wrong: dict, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        vllm.collect(ask("a", **{"prompt": [1, 2], **wrong}))


def test_two_requests_in_flight_cannot_share_an_id(vllm: VLLMSession) -> None:
    with pytest.raises(EngineError, match="in flight"):
        vllm.collect(ask("a", [1, 2]), ask("a", [1, 3]))


def test_new_weights_are_scored_and_sampled_from_and_leave_no_file(
    vllm: VLLMSession, almanac_model: str
) -> None:
    prompt = prompt_of(100, 5)
    vllm.collect(ask("a", prompt, 4))  # fills the prefix cache with old keys
    for version in (3, 4):
        new = moved(almanac_model, version)
        assert new.lm_head.weight is new.model.embed_tokens.weight
        vllm.update(version, new)
        assert vllm.engine.policy_version == version
        expected, _ = reference(new, prompt[:1], prompt[1:])
        assert np.abs(vllm.score(prompt) - expected).mean() <= 1e-4
        (result,) = vllm.collect(ask("a", prompt, 40))
        assert_exact(new, prompt, result)
        assert result.policy_versions.tolist() == [version] * len(result.token_ids)
    # Of this process: the files through which weights pass are mapped, and gone.
    mapped = Path("/proc/self/maps").read_text().splitlines()
    names = [line.rpartition("/")[2] for line in mapped]
    windows = [name for name in names if name.startswith("rllib_arpo_")]
    assert windows and all(name.endswith(" (deleted)") for name in windows)


@pytest.mark.parametrize("interval", [1, 8, 500])
def test_requests_in_flight_go_on_with_new_weights(
    vllm: VLLMSession, almanac_model: str, model: PreTrainedModel, interval: int
) -> None:
    new, prompt = moved(almanac_model, 1), prompt_of(40, 6)

    async def switch() -> TokenChunk:
        arrays = weights_of(new)
        # The first update takes longer, and may not come while there is a turn.
        await vllm.engine.update_weights(0, weights_of(model))
        task = asyncio.create_task(
            collect(
                vllm.engine, ask("a", prompt, 460, seed=3, stream_interval=interval)
            )
        )
        while not vllm.engine.metrics()["num_running"]:
            await asyncio.sleep(0)
        # Where no chunk of its own tells, one beside it tells how far it has come.
        beside = vllm.engine.generate(
            ask("b", prompt_of(9, 1), 460, stream_interval=10)
        )
        async with aclosing(beside):
            await anext(beside)
        await vllm.engine.update_weights(7, arrays)
        return await task

    result = vllm.run(switch())
    switched = int((result.policy_versions == 0).sum())
    count = len(result.token_ids)
    assert 0 < switched < count
    versions = [0] * switched + [7] * (count - switched)
    assert result.policy_versions.tolist() == versions
    before, _ = reference(model, prompt, result.token_ids)
    after, _ = reference(new, prompt, result.token_ids)
    expected = np.concatenate([before[:switched], after[switched:]])
    np.testing.assert_allclose(result.logprobs, expected, atol=1e-3)
    assert np.abs(result.logprobs - expected).mean() <= 1e-4
    # The switch is where it is said to be: the other model would score otherwise.
    last, first = slice(max(switched - 8, 0), switched), slice(switched, switched + 8)
    assert np.abs(result.logprobs[first] - before[first]).max() > 1e-3
    assert np.abs(result.logprobs[last] - after[last]).max() > 1e-3


def test_weights_that_do_not_fit_are_refused_by_name_and_change_nothing(
    vllm: VLLMSession, almanac_model: str, model: PreTrainedModel
) -> None:
    wrong = weights_of(moved(almanac_model, 1))
    first, *_, last = wrong
    wrong["model.extra"] = wrong.pop(last)
    wrong[first] = wrong[first][:-1]
    with pytest.raises(WeightSyncError, match=r"unknown model\.extra") as error:
        vllm.run(vllm.engine.update_weights(1, wrong))
    assert f"missing {last}" in str(error.value)
    assert f"{first} has shape {wrong[first].shape}" in str(error.value)
    assert vllm.engine.policy_version == 0
    (result,) = vllm.collect(ask("a", prompt_of(20, 0), 20))
    assert_exact(model, prompt_of(20, 0), result)


def test_bfloat16_and_read_only_arrays_are_taken(
    vllm: VLLMSession, almanac_model: str
) -> None:
    new = moved(almanac_model, 2)
    arrays = {n: a.astype(ml_dtypes.bfloat16) for n, a in weights_of(new).items()}
    for parameter in new.parameters():
        parameter.data = parameter.data.bfloat16().float()
    for array in arrays.values():
        array.flags.writeable = False
    vllm.run(vllm.engine.update_weights(1, arrays))
    (result,) = vllm.collect(ask("a", prompt_of(20, 0), 20))
    assert_exact(new, prompt_of(20, 0), result)


def test_tied_weights_come_once_under_either_name(
    vllm: VLLMSession, almanac_model: str
) -> None:
    new = moved(almanac_model, 3)
    arrays = weights_of(new)
    arrays["lm_head.weight"] = arrays.pop("model.embed_tokens.weight")
    vllm.run(vllm.engine.update_weights(1, arrays))
    (result,) = vllm.collect(ask("a", prompt_of(20, 0), 20))
    assert_exact(new, prompt_of(20, 0), result)


class ProbingEnv:
    """A prompt from the seed, and a tool after each of two turns, short ones."""

    stop = ("a", "e", "i", "o", "u")

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.history: list[int] = []
        self.num_calls = 0

    @property
    def remaining_tokens(self) -> int:
        return 8

    def reset(self, *, seed=None, options=None):
        return prompt_of(12, seed or 0), {}

    def fork(self) -> "ProbingEnv":
        other = ProbingEnv(self.vocab_size)
        other.history, other.num_calls = [*self.history], self.num_calls
        return other

    async def step_async(self, action):
        self.history += action.tolist()
        if self.num_calls == 2:
            return np.zeros(0, np.int32), 1.0, True, False, {}
        self.num_calls += 1
        result = prompt_of(3, sum(self.history))
        self.history += result.tolist()
        call = ToolCall(name="tool", arguments="", status="ok")
        turn = Turn(text="", tool_call=call, tool_result="")
        return result, 0.0, False, False, {"turn": turn}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_torch_and_vllm_grow_the_same_tree(
    vllm: VLLMSession, almanac_model: str, seed: int
) -> None:
    torch_engine = TorchEngine.from_pretrained(almanac_model)

    def growing(engine: Engine) -> Coroutine[object, object, RolloutTree]:
        return grow_tree(
            Task(task_id="t", messages=(), answers=()),
            env=ProbingEnv(vllm.engine.vocab_size),
            engine=engine,
            # Two roots of at most four leaves each: nobody has to hurry for a leaf.
            settings=TreeSettings(
                group_size=10,
                num_initial_rollouts=2,
                branch_rule=bernoulli,
                branch_base=0.7,
                entropy_probe_tokens=5,
            ),
            sampling=GREEDY,
            vocab_size=vllm.engine.vocab_size,
            seed=seed,
        )

    ours, theirs = vllm.run(growing(vllm.engine)), asyncio.run(growing(torch_engine))
    assert any(leaf.origin == "branch" for leaf in ours.leaves)
    assert ours.leaves == theirs.leaves
    assert len(ours.segments) == len(theirs.segments)
    for one, other in zip(ours.segments, theirs.segments, strict=True):
        assert one.parent == other.parent
        assert one.role == other.role
        assert one.finish_reason == other.finish_reason
        assert one.branch == other.branch
        for name in ("token_ids", "logprobs", "entropies", "policy_versions"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_an_approximated_entropy_spreads_the_rest_evenly() -> None:
    from rllib_arpo.engines.vllm_requests import entropy_of_top_k

    table = np.log(np.array([[0.25, 0.25], [0.5, 0.25]]))
    # p = 1/4, 1/4 and 1/2 over 2 others: four quarters, H = ln 4.
    assert entropy_of_top_k(table[:1], 4)[0] == pytest.approx(np.log(4))
    # p = 1/2, 1/4 and 1/4 over 4 others:
    # H = 1/2 ln 2 + 1/4 ln 4 + 1/4 ln 16 = (1/2 + 1/2 + 1) ln 2.
    assert entropy_of_top_k(table[1:], 6)[0] == pytest.approx(2 * np.log(2))
    # One token has it all.
    assert entropy_of_top_k(np.array([[0.0, -np.inf]]), 9).tolist() == [0.0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untied model, with heads of 32, which is the least on CPUs."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = qwen_like()
    tokenizer.save_pretrained(folder)
    return save_tiny_model(
        folder, "llama", vocab_size=len(tokenizer), hidden_size=64, tied=False
    )


def test_a_window_passes_weights_in_parts_of_whole_layers() -> None:
    from rllib_arpo.engines.vllm_weights import WeightWindow

    shapes = {
        "model.embed_tokens.weight": (10, 4),
        "model.layers.0.a": (7,),
        "model.layers.0.b": (3, 5),
        "model.layers.1.a": (7,),
        "model.layers.1.b": (3, 5),
        "model.norm.weight": (4,),
    }
    arrays = {
        name: np.random.default_rng(0).normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    window = WeightWindow(arrays, limit=1)
    try:
        # The largest group, the embeddings: 10 * 4 * 4 = 160 bytes in rows of 64.
        assert window.size == window.path.stat().st_size == 192
        parts = []
        for part in window.fill(arrays):
            memory = np.fromfile(window.path, np.uint8)
            for name, shape, offset in zip(
                part["names"], part["shapes"], part["offsets"], strict=True
            ):
                count = 4 * int(np.prod(shape))
                found = memory[offset : offset + count].view(np.float32)
                np.testing.assert_array_equal(found.reshape(shape), arrays[name])
            parts.append(part["names"])
    finally:
        window.path.unlink()
    assert parts == [
        ["model.embed_tokens.weight"],
        ["model.layers.0.a", "model.layers.0.b"],
        ["model.layers.1.a", "model.layers.1.b", "model.norm.weight"],
    ]
    one = WeightWindow(arrays)
    one.path.unlink()
    assert len(list(one.fill(arrays))) == 1


@pytest.fixture(scope="module")
def keeping(
    llama: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VLLMSession]:
    """A vLLM that keeps its prefix cache, and takes weights layer by layer."""
    log_file = tmp_path_factory.mktemp("keeping") / "vllm.log"
    with vllm_session(llama, log_file, reset_prefix_cache=False) as session:
        session.engine.weights.window_bytes = 1
        yield session


def test_an_untied_model_takes_weights_of_any_dtype_layer_by_layer(
    keeping: VLLMSession, llama: str
) -> None:
    for version, dtype in enumerate((ml_dtypes.bfloat16, np.float32), start=1):
        new = moved(llama, version)
        if dtype == ml_dtypes.bfloat16:
            for parameter in new.parameters():
                parameter.data = parameter.data.bfloat16().float()
        arrays = {n: a.astype(dtype) for n, a in weights_of(new).items()}
        keeping.run(keeping.engine.update_weights(version, arrays))
        text = prompt_of(64, version)
        expected, _ = reference(new, text[:1], text[1:])
        assert np.abs(keeping.score(text) - expected).mean() <= 1e-4


def test_a_prefix_cache_that_is_kept_serves_old_keys(
    keeping: VLLMSession, llama: str
) -> None:
    prompt = prompt_of(100, 20)
    keeping.collect(ask("a", prompt, 1))
    new = moved(llama, 9)
    keeping.update(9, new)
    before = keeping.engine.metrics()["num_cached_prompt_tokens"]
    (result,) = keeping.collect(ask("a", prompt, 20))
    # 100 = 3 blocks of 32 and 4.
    assert keeping.engine.metrics()["num_cached_prompt_tokens"] - before >= 96
    expected, _ = reference(new, prompt, result.token_ids)
    assert np.abs(result.logprobs - expected).mean() > 1e-3


def test_a_closed_engine_fails_what_is_in_flight_and_what_comes(
    llama: str, keeping: VLLMSession
) -> None:
    async def close() -> None:
        async with asyncio.timeout(60):
            stream = keeping.engine.generate(ask("a", prompt_of(9, 0), 400))
            await anext(stream)
            keeping.engine.close()
            with pytest.raises(EngineError, match="'a'"):
                while True:
                    await anext(stream)
            with pytest.raises(EngineError, match="closed"):
                await collect(keeping.engine, ask("b", prompt_of(9, 0)))
            with pytest.raises(EngineError, match="closed"):
                await keeping.engine.score(prompt_of(9, 0))

    keeping.run(close())


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def adapted(
    llama: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VLLMSession]:
    """A vLLM whose updates are adapters, and whose entropies are approximations."""
    log_file = tmp_path_factory.mktemp("adapted") / "vllm.log"
    with vllm_session(llama, log_file, lora=LORA, entropy_top_k=20) as session:
        yield session


def adapter(model: PreTrainedModel, seed: int) -> dict[str, np.ndarray]:
    """An adapter's arrays; the model gets what they stand for: W + α/r · B A."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, parameter in model.named_parameters():
        if not name.endswith(("q_proj.weight", "v_proj.weight")):
            continue
        rows, columns = parameter.shape
        a, b = rng.normal(size=(4, columns)), rng.normal(size=(rows, 4))
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        arrays[f"{stem}.lora_A.weight"] = a.astype(np.float32) * 0.1
        arrays[f"{stem}.lora_B.weight"] = b.astype(np.float32) * 0.1
        change = 2.0 * 0.01 * (b @ a)  # 8 / 4 = 2
        parameter.data += torch.from_numpy(change).float()
    return arrays


def test_approximated_entropies_are_named_in_the_metrics(
    adapted: VLLMSession, vllm: VLLMSession, llama: str
) -> None:
    from rllib_arpo.engines.vllm_requests import entropy_of_top_k

    async def lag() -> TokenChunk:
        chunks = []
        request = ask("slow", prompt_of(20, 1), 60, stream_interval=1)
        async for chunk in adapted.engine.generate(request):
            chunks.append(chunk)
            await collect(adapted.engine, ask("other", prompt_of(5, 2), 9))
        assert max(len(chunk.token_ids) for chunk in chunks) > 1
        return joined(chunks)

    name = "entropy_approximated_by_top_k"
    assert adapted.engine.metrics()[name] == 20
    assert name not in vllm.engine.metrics()
    result = adapted.run(lag())
    table = log_distributions(load(llama), prompt_of(20, 1), result.token_ids)
    expected = entropy_of_top_k(table.topk(20).values.numpy(), table.shape[1])
    np.testing.assert_allclose(result.entropies, expected, atol=1e-3)


def test_adapters_are_swapped_by_request(adapted: VLLMSession, llama: str) -> None:
    first, second, prompt = load(llama), load(llama), prompt_of(40, 3)
    one, two = adapter(first, 1), adapter(second, 2)

    async def swap() -> tuple[TokenChunk, TokenChunk, bool]:
        await adapted.engine.update_weights(5, one)
        stream = adapted.engine.generate(ask("a", prompt, 300, stream_interval=30))
        async with aclosing(stream):
            chunks = [await anext(stream)]
            await adapted.engine.update_weights(6, two)
            meanwhile = adapted.engine.metrics()["num_running"] == 1
            later = await collect(adapted.engine, ask("b", prompt, 20))
            chunks += [chunk async for chunk in stream]
        return joined(chunks), later, meanwhile

    with pytest.raises(WeightSyncError, match="not an adapter's"):
        adapted.update(5, first)
    earlier, later, meanwhile = adapted.run(swap())
    assert meanwhile
    for result, model, version in ((earlier, first, 5), (later, second, 6)):
        assert set(result.policy_versions.tolist()) == {version}
        expected, _ = reference(model, prompt, result.token_ids)
        assert np.abs(result.logprobs - expected).mean() <= 1e-4
    assert len(earlier.token_ids) == 300 or earlier.finish_reason == "eos"
    expected, _ = reference(second, prompt[:1], prompt[1:])
    assert np.abs(adapted.score(prompt) - expected).mean() <= 1e-4


def test_an_adapter_for_an_engine_without_lora_is_refused(
    vllm: VLLMSession, almanac_model: str
) -> None:
    arrays = adapter(load(almanac_model), 1)
    with pytest.raises(WeightSyncError, match="give the engine `lora`"):
        vllm.run(vllm.engine.update_weights(1, arrays))


def test_a_terminals_interrupt_leaves_requests_in_flight(adapted: VLLMSession) -> None:
    async def interrupt() -> list[TokenChunk]:
        streams = [
            adapted.engine.generate(ask(str(i), prompt_of(9, i), 100)) for i in range(4)
        ]
        begun = await asyncio.gather(*map(anext, streams))
        for process in adapted.processes:
            process.send_signal(signal.SIGINT)
        rest = [[chunk async for chunk in stream] for stream in streams]
        return [joined([first, *more]) for first, more in zip(begun, rest, strict=True)]

    assert {one.finish_reason for one in adapted.run(interrupt())} <= {"length", "eos"}
    adapted.run(collect(adapted.engine, ask("b", prompt_of(9, 0))))


def test_a_killed_process_fails_requests_in_flight_at_once_and_later_ones(
    adapted: VLLMSession,
) -> None:
    async def kill() -> None:
        for process in adapted.processes:
            process.suspend()  # so that no request can end by itself
        asked = [
            asyncio.create_task(
                collect(adapted.engine, ask(str(i), prompt_of(9, i), 400))
            )
            for i in range(4)
        ]
        while adapted.engine.metrics()["num_waiting"] < 4:
            await asyncio.sleep(0)
        for process in adapted.processes:
            process.kill()
        async with asyncio.timeout(10):
            for one in asked:
                with pytest.raises(EngineError, match="is dead"):
                    await one
            with pytest.raises(EngineError, match="is dead"):
                await collect(adapted.engine, ask("b", prompt_of(9, 0)))
            with pytest.raises(EngineError, match="is dead"):
                await adapted.engine.score(prompt_of(9, 0))

    adapted.run(kill())
