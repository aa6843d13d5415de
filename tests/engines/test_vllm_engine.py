import asyncio
from contextlib import aclosing
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedModel

from rllib_arpo.engines.engine import Engine, SamplingParams, TokenChunk
from rllib_arpo.engines.sampling import token_bytes
from rllib_arpo.engines.torch_engine import TorchEngine
from rllib_arpo.envs.almanac_model import TAGS
from rllib_arpo.errors import EngineError, WeightSyncError
from tests.vllm_session import (
    VLLMSession,
    ask,
    assert_exact,
    collect,
    joined,
    load,
    moved,
    prompt_of,
    reference,
    weights_of,
)

pytestmark = pytest.mark.vllm
GREEDY = SamplingParams(temperature=0)
BLOCK = 32  # tokens of a block of keys and values on CPUs; GPUs have smaller ones
CONTEXT = 512
SHARED_MEMORY = Path("/dev/shm")


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
    async def sizes(interval: int) -> tuple[list[int], bool]:
        request = ask("a", prompt_of(4, 0), 100, stream_interval=interval)
        found, running = [], False
        async for chunk in vllm.engine.generate(request):
            found.append(len(chunk.token_ids))
            running = running or chunk.finish_reason is None
        return found, running

    for interval in (1, 2, 7, 20):
        found, before_the_end = vllm.run(sizes(interval))
        assert min(found[:-1]) >= interval
        assert sum(found) == 100
        assert before_the_end
    assert vllm.run(sizes(200))[0] == [100]


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
        while not vllm.engine.metrics()["num_running"]:
            await asyncio.sleep(0)
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
    assert not [*SHARED_MEMORY.glob("rllib_arpo_*")]


@pytest.mark.parametrize("interval", [1, 8, 500])
def test_requests_in_flight_go_on_with_new_weights(
    vllm: VLLMSession, almanac_model: str, model: PreTrainedModel, interval: int
) -> None:
    new, prompt = moved(almanac_model, 1), prompt_of(40, 6)

    async def switch() -> TokenChunk:
        task = asyncio.create_task(
            collect(
                vllm.engine, ask("a", prompt, 300, seed=3, stream_interval=interval)
            )
        )
        await collect(vllm.engine, ask("b", prompt_of(9, 1), 30))
        await vllm.engine.update_weights(7, weights_of(new))
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
    assert abs(result.logprobs[switched] - before[switched]) > 1e-3
    assert abs(result.logprobs[switched - 1] - after[switched - 1]) > 1e-3


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
