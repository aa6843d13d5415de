import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rllib_arpo.engines.engine import (
    Engine,
    GenerationRequest,
    SamplingParams,
    TokenChunk,
)
from rllib_arpo.engines.torch_engine import TorchEngine
from rllib_arpo.errors import ConfigError, EngineError, WeightSyncError
from tests.models import CONFIGS, Family, tiny_model
from tests.tokenizers import qwen_like

TOKENIZER, WITHOUT_EOS = qwen_like(), qwen_like()
WITHOUT_EOS.eos_token = None
VOCAB = 400


def grouped_model(family: Family, *, seed: int = 0, **settings) -> PreTrainedModel:
    """Two key-value heads for four heads, tied weights, a context of 512."""
    config = CONFIGS[family](
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        **{"max_position_embeddings": 512, **settings},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def reciting_model(script: Sequence[int]) -> PreTrainedModel:
    """A model that after script[i] says script[i + 1], nearly for certain."""
    assert len(set(script)) == len(script)
    model = tiny_model(vocab_size=VOCAB, hidden_size=64, tied=False)
    state = model.state_dict()
    with torch.no_grad():
        for name, weight in state.items():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()  # what is left is the token's own embedding
        state["lm_head.weight"].zero_()
        for said, following in pairwise(script):
            embedding = state["model.embed_tokens.weight"][said]
            state["lm_head.weight"][following] = 30 * embedding / embedding.norm()
    return model


def engine_of(model: PreTrainedModel, **settings) -> TorchEngine:
    """Without EOS, for tests that are not about it."""
    return TorchEngine(model, WITHOUT_EOS, **settings)


def prompt_of(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(VOCAB, size=length, dtype=np.int32)


def ask(
    name: str, prompt: Sequence[int] | np.ndarray, max_tokens: int = 8, **settings
) -> GenerationRequest:
    settings = {"seed": 0, "stream_interval": 3, **settings}
    return GenerationRequest(
        request_id=name,
        prompt_token_ids=np.asarray(prompt, np.int32),
        max_tokens=max_tokens,
        **settings,
    )


async def collect(engine: Engine, request: GenerationRequest) -> TokenChunk:
    chunks = [chunk async for chunk in engine.generate(request)]
    return TokenChunk(
        token_ids=np.concatenate([c.token_ids for c in chunks]),
        logprobs=np.concatenate([c.logprobs for c in chunks]),
        entropies=np.concatenate([c.entropies for c in chunks]),
        policy_versions=np.concatenate([c.policy_versions for c in chunks]),
        finish_reason=chunks[-1].finish_reason,
    )


def run(engine: Engine, *requests: GenerationRequest) -> list[TokenChunk]:
    async def everything() -> list[TokenChunk]:
        return list(await asyncio.gather(*(collect(engine, r) for r in requests)))

    return asyncio.run(everything())


def reference(
    model: PreTrainedModel, prompt: np.ndarray, tokens: np.ndarray, temperature=1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Logprobs and entropies by one plain forward pass over the whole sequence."""
    ids = torch.from_numpy(np.concatenate([prompt, tokens])).long()
    with torch.no_grad():
        logits = model(ids[None]).logits[0, len(prompt) - 1 : -1].float()
    logprobs = (logits / temperature).log_softmax(-1)
    chosen = logprobs.gather(1, ids[len(prompt) :, None])[:, 0]
    return chosen.numpy(), -(logprobs.exp() * logprobs).sum(-1).numpy()


def assert_exact(
    model: PreTrainedModel, prompt: np.ndarray, result: TokenChunk, temperature=1.0
) -> None:
    logprobs, entropies = reference(model, prompt, result.token_ids, temperature)
    np.testing.assert_allclose(result.logprobs, logprobs, atol=2e-5)
    np.testing.assert_allclose(result.entropies, entropies, atol=5e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_logprobs_and_entropies_equal_a_plain_forward_pass(family: Family) -> None:
    engine = engine_of(grouped_model(family), max_num_seqs=4)
    assert isinstance(engine, Engine)
    prompts = [prompt_of(n, n) for n in (1, 2, 7, 30, 65, 130)]
    requests = [
        ask(str(i), prompt, 5 + 3 * i, seed=i, sampling=SamplingParams(temperature=0.7))
        for i, prompt in enumerate(prompts)
    ]
    results = run(engine, *requests)
    assert [len(r.token_ids) for r in results] == [5, 8, 11, 14, 17, 20]
    for prompt, result in zip(prompts, results, strict=True):
        assert_exact(grouped_model(family), prompt, result, temperature=0.7)


def test_a_prompt_longer_than_one_prefill_pass_is_exact() -> None:
    model = grouped_model("qwen2", max_position_embeddings=4096)
    prompt = prompt_of(2500)
    (result,) = run(engine_of(model), ask("a", prompt, 3))
    assert_exact(model, prompt, result)


def test_bfloat16_weights_give_float32_logprobs_of_their_own_logits() -> None:
    model = grouped_model("qwen3")
    engine = engine_of(model, dtype=torch.bfloat16)
    (result,) = run(engine, ask("a", prompt_of(9), 12))
    logprobs, _ = reference(model, prompt_of(9), result.token_ids)
    # The cached and the plain pass round to 8 bits in another order.
    np.testing.assert_allclose(result.logprobs, logprobs, atol=0.15)
    assert result.logprobs.dtype == np.float32
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_sliding_window_bounds_the_context() -> None:
    config = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    engine = engine_of(grouped_model("qwen2", **config))
    (result,) = run(engine, ask("a", prompt_of(10), 50))
    assert (len(result.token_ids), result.finish_reason) == (6, "length")  # 16 - 10


def test_same_seed_gives_same_tokens_alone_in_a_crowd_and_joined_late() -> None:
    model, request = grouped_model("llama"), ask("x", prompt_of(20), 40, seed=7)
    (alone,) = run(engine_of(model), request)
    crowd = [ask(str(i), prompt_of(5 + i, i), 9 + i, seed=i) for i in range(20)]
    *_, crowded = run(engine_of(model, max_num_seqs=8), *crowd, request)

    async def late() -> TokenChunk:
        engine = engine_of(model)
        others = asyncio.gather(*(collect(engine, r) for r in crowd))
        while engine.metrics()["num_generated_tokens"] < 50:
            await asyncio.sleep(0)
        result = await collect(engine, request)
        await others
        return result

    joined = asyncio.run(late())
    (other,) = run(engine_of(model), ask("x", prompt_of(20), 40, seed=8))
    assert alone.token_ids.tolist() == crowded.token_ids.tolist()
    assert alone.token_ids.tolist() == joined.token_ids.tolist()
    assert alone.token_ids.tolist() != other.token_ids.tolist()


def test_chunks_come_every_stream_interval_and_at_the_end() -> None:
    async def sizes() -> list[tuple[int, str | None]]:
        engine = engine_of(grouped_model("qwen2"))
        request = ask("a", prompt_of(4), 8, stream_interval=3)
        return [
            (len(c.token_ids), c.finish_reason) async for c in engine.generate(request)
        ]

    assert asyncio.run(sizes()) == [(3, None), (3, None), (2, "length")]


def test_a_stop_string_ends_the_turn_however_it_is_split_over_tokens() -> None:
    script = TOKENIZER.encode("48</search>2 0")
    pieces = TOKENIZER.batch_decode([[i] for i in script])
    end = next(n for n in range(len(pieces)) if "</search>" in "".join(pieces[: n + 1]))
    assert "</search>" not in pieces  # it is split
    engine = engine_of(reciting_model(script))
    stopping = SamplingParams(temperature=0, stop=("</nothing>", "</search>"))
    (result,) = run(engine, ask("a", script[:1], 20, sampling=stopping))
    assert result.finish_reason == "stop"
    assert result.token_ids.tolist() == script[1 : end + 1]
    assert result.logprobs.tolist() == [0] * end


def test_each_request_ends_at_its_own_stop_string_also_when_it_moves_up() -> None:
    script = TOKENIZER.encode("48</search>2 0")
    engine = engine_of(reciting_model(script))
    stops = [("never",), ("</search>",), ("8<",)]
    results = run(
        engine,
        *(
            # The first leaves after a token, and the last takes its row.
            ask(
                str(number),
                script[:1],
                1 if number == 0 else len(script) - 1,
                sampling=SamplingParams(temperature=0, stop=stop),
            )
            for number, stop in enumerate(stops)
        ),
    )
    assert [one.finish_reason for one in results] == ["length", "stop", "stop"]
    texts = [TOKENIZER.decode(script[:1] + one.token_ids.tolist()) for one in results]
    assert texts[1].endswith("</search>")
    assert "8<" in texts[2]
    assert len(texts[2]) < len(texts[1])


def test_a_stop_string_that_begins_in_the_prompt_does_not_count() -> None:
    script = TOKENIZER.encode("48</search>2 0")
    pieces = TOKENIZER.batch_decode([[i] for i in script])
    cut = next(n for n, piece in enumerate(pieces) if "<" in piece)
    engine = engine_of(reciting_model(script))
    sampling = SamplingParams(temperature=0, stop=("</search>",))
    rest = len(script) - cut - 1
    (result,) = run(engine, ask("a", script[: cut + 1], rest, sampling=sampling))
    assert result.finish_reason == "length"
    assert result.token_ids.tolist() == script[cut + 1 :]


def test_every_eos_of_model_and_tokenizer_ends_the_turn_and_is_kept() -> None:
    script = [10, 11, 12, 13, 14, 15]
    greedy = SamplingParams(temperature=0)
    for eos in (13, [13, 399]):
        model = reciting_model(script)
        model.generation_config.eos_token_id = eos
        engine = TorchEngine(model, TOKENIZER)
        (result,) = run(engine, ask("a", [10], 9, sampling=greedy))
        assert (result.token_ids.tolist(), result.finish_reason) == (
            [11, 12, 13],
            "eos",
        )
    script[3] = TOKENIZER.eos_token_id
    (result,) = run(
        TorchEngine(reciting_model(script), TOKENIZER),
        ask("a", [10], 9, sampling=greedy),
    )
    assert (len(result.token_ids), result.finish_reason) == (3, "eos")


def test_the_context_ends_a_turn_and_a_full_prompt_gets_an_empty_one() -> None:
    engine = engine_of(grouped_model("qwen2"), max_model_len=20)
    longest, full, beyond = run(
        engine,
        ask("a", prompt_of(19), 9),
        ask("b", prompt_of(20), 9),
        ask("c", prompt_of(30), 9),
    )
    assert (len(longest.token_ids), longest.finish_reason) == (1, "length")
    for result in (full, beyond):
        assert (len(result.token_ids), result.finish_reason) == (0, "length")


def test_a_continuation_computes_only_what_is_new() -> None:
    model = grouped_model("qwen3")
    engine = engine_of(model)
    (first,) = run(engine, ask("a", prompt_of(40), 10))
    continued = np.concatenate([prompt_of(40), first.token_ids, prompt_of(6, 9)])
    before = engine.metrics()
    (second,) = run(engine, ask("b", continued, 5))
    cached = (
        engine.metrics()["num_cached_prompt_tokens"]
        - before["num_cached_prompt_tokens"]
    )
    # Of 40 + 10 + 6 tokens, the last sampled one was never computed, and the 6.
    assert cached == 49
    assert_exact(model, continued, second)


def test_requests_with_one_prompt_compute_it_once() -> None:
    model, prompt = grouped_model("qwen2"), prompt_of(50)
    engine = engine_of(model)
    results = run(engine, *(ask(str(i), prompt, 6, seed=i) for i in range(8)))
    # The first computes 49; the last token belongs to the decode step.
    assert engine.metrics()["num_prefilled_tokens"] == 49
    assert engine.metrics()["num_prompt_tokens"] == 400
    assert engine.metrics()["num_cached_prompt_tokens"] == 7 * 49
    assert len({tuple(r.token_ids) for r in results}) == 8
    for result in results:
        assert_exact(model, prompt, result)


def test_a_fork_of_a_running_parent_computes_only_its_last_token() -> None:
    model, prompt = grouped_model("llama"), prompt_of(30)
    engine = engine_of(model, prefix_cache_tokens=0)

    async def fork() -> tuple[np.ndarray, TokenChunk, TokenChunk]:
        parent = engine.generate(ask("parent", prompt, 30, stream_interval=10))
        said = (await anext(parent)).token_ids
        start = np.concatenate([prompt, said[:7]])
        rest, child = await asyncio.gather(
            asyncio.create_task(drain(parent)),
            collect(engine, ask("child", start, 12, seed=5)),
        )
        return start, child, rest

    async def drain(parent) -> TokenChunk:
        return [chunk async for chunk in parent][-1]

    start, child, rest = asyncio.run(fork())
    assert engine.metrics()["num_prefilled_tokens"] == 29  # the parent's prompt
    assert engine.metrics()["num_cached_prompt_tokens"] == 36  # of 37
    assert rest.finish_reason == "length"
    assert_exact(model, start, child)


def test_the_prefix_cache_stays_within_its_bound_and_drops_the_oldest() -> None:
    engine = engine_of(grouped_model("qwen2"), prefix_cache_tokens=100)
    for number in range(6):
        run(engine, ask("a", prompt_of(30, number), 4))
        assert engine.metrics()["prefix_cache_tokens"] <= 100
    prefilled = engine.metrics()["num_prefilled_tokens"]
    run(engine, ask("a", prompt_of(30, 5), 4))
    assert engine.metrics()["num_prefilled_tokens"] == prefilled
    run(engine, ask("a", prompt_of(30, 0), 4))
    assert engine.metrics()["num_prefilled_tokens"] == prefilled + 29


def test_closing_the_iterator_frees_the_slot() -> None:
    async def cancel() -> tuple[TokenChunk, TokenChunk]:
        engine = engine_of(grouped_model("qwen2"), max_num_seqs=1)
        async with aclosing(engine.generate(ask("a", prompt_of(5), 400))) as stream:
            await anext(stream)
            waiting = asyncio.create_task(collect(engine, ask("b", prompt_of(5, 1))))
            await asyncio.sleep(0)
            assert engine.metrics()["num_waiting"] == 1
        assert engine.metrics()["num_running"] == 0
        first = await waiting
        task = asyncio.create_task(collect(engine, ask("c", prompt_of(5), 400)))
        while engine.metrics()["num_running"] == 0:
            await asyncio.sleep(0)
        task.cancel()
        return first, await collect(engine, ask("d", prompt_of(5, 1)))

    first, second = asyncio.run(cancel())
    assert first.finish_reason == second.finish_reason == "length"
    assert first.token_ids.tolist() == second.token_ids.tolist()


def weights_of(model: PreTrainedModel) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def test_requests_in_flight_go_on_with_new_weights() -> None:
    old, new = grouped_model("qwen2", seed=1), grouped_model("qwen2", seed=2)
    engine = engine_of(grouped_model("qwen2", seed=1))
    prompts = [prompt_of(12), prompt_of(33, 1)]

    async def switch() -> list[TokenChunk]:
        tasks = [
            asyncio.create_task(collect(engine, ask(str(i), prompt, 20, seed=i)))
            for i, prompt in enumerate(prompts)
        ]
        while engine.metrics()["num_generated_tokens"] < 16:
            await asyncio.sleep(0)
        await engine.update_weights(3, weights_of(new))
        return await asyncio.gather(*tasks)

    for prompt, result in zip(prompts, asyncio.run(switch()), strict=True):
        assert result.policy_versions.tolist() == [0] * 8 + [3] * 12
        before, _ = reference(old, prompt, result.token_ids)
        after, _ = reference(new, prompt, result.token_ids)
        np.testing.assert_allclose(result.logprobs[:8], before[:8], atol=2e-5)
        np.testing.assert_allclose(result.logprobs[8:], after[8:], atol=2e-5)
    assert engine.policy_version == 3


def test_new_weights_leave_no_old_keys_in_the_prefix_cache() -> None:
    new = grouped_model("qwen2", seed=2)
    engine = engine_of(grouped_model("qwen2", seed=1))
    run(engine, ask("a", prompt_of(20)))
    asyncio.run(engine.update_weights(1, weights_of(new)))
    (result,) = run(engine, ask("a", prompt_of(20)))
    assert_exact(new, prompt_of(20), result)


def test_weights_that_do_not_fit_are_refused_by_name_and_change_nothing() -> None:
    model = grouped_model("qwen2")
    engine, good = engine_of(model), weights_of(model)
    wrong = {name: array + 1 for name, array in good.items()}
    first, *_, last = wrong
    wrong["model.extra"] = wrong.pop(last)
    wrong[first] = wrong[first][:-1]
    with pytest.raises(WeightSyncError, match=r"unknown model\.extra") as error:
        asyncio.run(engine.update_weights(1, wrong))
    assert f"missing {last}" in str(error.value)
    assert f"{first} has shape (399, 32), expected (400, 32)" in str(error.value)
    assert engine.policy_version == 0
    for name, array in weights_of(model).items():
        np.testing.assert_array_equal(array, good[name])


def test_given_tokens_are_scored_under_the_weights_in_use() -> None:
    old, new = grouped_model("qwen2", seed=1), grouped_model("qwen2", seed=2)
    engine = engine_of(grouped_model("qwen2", seed=1))
    text = np.concatenate([prompt_of(5), prompt_of(40, 1)])
    for model in (old, new):
        asyncio.run(engine.update_weights(1, weights_of(model)))
        expected, _ = reference(model, text[:1], text[1:])
        scored = asyncio.run(engine.score(text))
        np.testing.assert_allclose(scored, expected, atol=2e-5)


def test_turns_that_the_context_ends_are_counted() -> None:
    engine = engine_of(grouped_model("qwen2"), max_model_len=30)
    own_limit, context, no_room = run(
        engine,
        ask("a", prompt_of(20), 10),
        ask("b", prompt_of(20), 11),
        ask("c", prompt_of(30), 1),
    )
    assert [len(one.token_ids) for one in (own_limit, context, no_room)] == [10, 10, 0]
    assert engine.metrics()["num_context_overflows"] == 2


def test_tied_weights_come_once_under_either_name() -> None:
    new = grouped_model("llama", seed=2)
    arrays = weights_of(new)
    assert "lm_head.weight" not in arrays
    engine = engine_of(grouped_model("llama"))
    arrays["lm_head.weight"] = arrays.pop("model.embed_tokens.weight")
    asyncio.run(engine.update_weights(1, arrays))
    (result,) = run(engine, ask("a", prompt_of(20)))
    assert_exact(new, prompt_of(20), result)


def test_bfloat16_and_read_only_arrays_are_taken() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    new = grouped_model("qwen2", seed=2)
    arrays = {n: a.astype(ml_dtypes.bfloat16) for n, a in weights_of(new).items()}
    for parameter in new.parameters():
        parameter.data = parameter.data.bfloat16().float()
    for array in arrays.values():
        array.flags.writeable = False
    engine = engine_of(grouped_model("qwen2"))
    asyncio.run(engine.update_weights(1, arrays))
    (result,) = run(engine, ask("a", prompt_of(20)))
    assert_exact(new, prompt_of(20), result)


def test_a_failed_step_fails_its_requests_and_leaves_the_engine_usable() -> None:
    model = grouped_model("qwen2")
    engine, good = engine_of(model, max_num_seqs=1), weights_of(model)
    request = ask("a", prompt_of(9))
    (expected,) = run(engine, request)
    asyncio.run(
        engine.update_weights(1, {n: np.full_like(a, np.nan) for n, a in good.items()})
    )

    async def failing() -> list[BaseException | TokenChunk]:
        waiting = ask("b", prompt_of(4))
        return await asyncio.gather(
            *(collect(engine, r) for r in (request, waiting)), return_exceptions=True
        )

    for error in asyncio.run(failing()):
        assert isinstance(error, EngineError)
        assert "not finite" in str(error.__cause__)
    asyncio.run(engine.update_weights(2, good))
    (result,) = run(engine, request)
    assert result.token_ids.tolist() == expected.token_ids.tolist()


def test_close_fails_requests_in_flight_and_later_ones() -> None:
    async def close() -> None:
        engine = engine_of(grouped_model("qwen2"))
        stream = engine.generate(ask("a", prompt_of(9), 100))
        await anext(stream)
        engine.close()
        with pytest.raises(EngineError, match="closed"):
            while True:
                await anext(stream)
        with pytest.raises(EngineError, match="closed"):
            await collect(engine, ask("b", prompt_of(9)))

    asyncio.run(close())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [3, 400]}, "vocabulary of 400"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"sampling": SamplingParams(temperature=-1)}, "temperature"),
        ({"sampling": SamplingParams(top_p=0)}, "top_p"),
        ({"sampling": SamplingParams(stop=("",))}, "stop"),
    ],
)
def test_a_wrong_request_is_refused(wrong: dict, message: str) -> None:
    engine = engine_of(grouped_model("qwen2"))
    request = ask("a", **{"prompt": [1, 2], **wrong})
    with pytest.raises(EngineError, match=message):
        run(engine, request)


def test_two_requests_in_flight_cannot_share_an_id() -> None:
    engine = engine_of(grouped_model("qwen2"))
    with pytest.raises(EngineError, match="in flight"):
        run(engine, ask("a", [1, 2]), ask("a", [1, 3]))


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_seqs"):
        engine_of(grouped_model("qwen2"), max_num_seqs=0)
    with pytest.raises(ConfigError, match="context of 512"):
        engine_of(grouped_model("qwen2"), max_model_len=513)


def test_a_folder_is_loaded_with_its_tokenizer(tmp_path) -> None:
    model = grouped_model("qwen2")
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="lacks the tokenizer"):
        TorchEngine.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot load"):
        TorchEngine.from_pretrained(tmp_path / "nothing")
    TOKENIZER.save_pretrained(tmp_path)
    engine = TorchEngine.from_pretrained(tmp_path, max_num_seqs=2)
    (result,) = run(engine, ask("a", prompt_of(9)))
    assert_exact(model, prompt_of(9), result)


def play(
    engine: TorchEngine, tool_turns: Sequence[int]
) -> tuple[list[list[TokenChunk]], float]:
    """Four paths of three turns; the tool of path i takes so many loop turns."""

    async def path(number: int) -> list[TokenChunk]:
        tokens, turns = prompt_of(10 + number, number), []
        for turn in range(3):
            name = f"{number}-{turn}"
            request = ask(name, tokens, 4 + number, seed=10 * number + turn)
            turns.append(await collect(engine, request))
            with engine.hold():
                for _ in range(tool_turns[number] * (turn + 1)):
                    await asyncio.sleep(0)
            tokens = np.concatenate([tokens, turns[-1].token_ids, prompt_of(3, turn)])
        return turns

    async def everything() -> list[list[TokenChunk]]:
        return list(await asyncio.gather(*map(path, range(4))))

    return asyncio.run(everything()), engine.metrics()["num_steps"]


def test_in_deterministic_mode_batches_do_not_depend_on_tool_timing() -> None:
    model = grouped_model("qwen2")
    timings = [(0, 0, 0, 0), (40, 0, 7, 2), (1, 90, 0, 33)]
    plays = [play(engine_of(model, deterministic=True), t) for t in timings]
    (expected, steps), *others = plays
    for turns, other_steps in others:
        assert other_steps == steps
        for one, other in zip(chain(*expected), chain(*turns), strict=True):
            np.testing.assert_array_equal(one.token_ids, other.token_ids)
            np.testing.assert_array_equal(one.logprobs, other.logprobs)
            np.testing.assert_array_equal(one.entropies, other.entropies)
    # Without it the engine goes on while a tool runs.
    assert len({play(engine_of(model), t)[1] for t in timings}) > 1


def test_in_deterministic_mode_requests_are_taken_in_by_id() -> None:
    async def order() -> list[str]:
        engine = engine_of(grouped_model("qwen2"), max_num_seqs=1, deterministic=True)
        done: list[str] = []

        async def one(name: str) -> None:
            await collect(engine, ask(name, prompt_of(5)))
            done.append(name)

        await asyncio.gather(*map(one, ("c", "a", "b")))
        return done

    assert asyncio.run(order()) == ["a", "b", "c"]
