import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rllib_arpo.engines.sampling import (
    StopTokens,
    sample,
    token_bytes,
    truncate,
    uniforms,
)
from tests.tokenizers import qwen_like


def draw(
    logits: list[list[float]] | torch.Tensor,
    uniform: list[float],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    count = len(uniform)
    return sample(
        torch.as_tensor(logits, dtype=torch.float32),
        np.array(uniform),
        temperature=np.full(count, temperature),
        top_p=np.full(count, top_p),
        top_k=np.full(count, top_k),
    )


def log(probabilities: list[float]) -> list[float]:
    return [math.log(p) for p in probabilities]


def test_a_token_is_drawn_by_inverting_the_cumulative_distribution() -> None:
    # cumulative .5, .75, 1: [0, .5) -> 0, [.5, .75) -> 1, [.75, 1) -> 2
    logits = [log([0.5, 0.25, 0.25])] * 5
    tokens, logprobs, entropies = draw(logits, [0.0, 0.49, 0.51, 0.74, 0.76])
    assert tokens.tolist() == [0, 0, 1, 1, 2]
    assert logprobs == pytest.approx(log([0.5, 0.5, 0.25, 0.25, 0.25]), abs=1e-6)
    # .5 ln 2 + 2 · .25 ln 4 = 1.5 ln 2
    assert entropies == pytest.approx([1.5 * math.log(2)] * 5, abs=1e-6)


def test_temperature_changes_the_distribution_that_is_reported() -> None:
    # temperature .5 squares: 4/9, 1/9 of .5, .25, .25 -> 4/6, 1/6, 1/6
    _, logprobs, entropies = draw([log([0.5, 0.25, 0.25])], [0.0], temperature=0.5)
    assert logprobs == pytest.approx([math.log(4 / 6)], abs=1e-6)
    assert entropies == pytest.approx(
        [4 / 6 * math.log(6 / 4) + 2 / 6 * math.log(6)], abs=1e-6
    )


def test_temperature_zero_takes_the_most_likely_token_for_certain() -> None:
    tokens, logprobs, entropies = draw([[0.0, 2.0, 1.0]], [0.99], temperature=0.0)
    assert (tokens.tolist(), logprobs.tolist(), entropies.tolist()) == ([1], [0], [0])


@pytest.mark.parametrize("temperature", [9e-6, 1e-40, 5e-324])
def test_a_temperature_that_float32_cannot_divide_by_is_zero(temperature) -> None:
    drawn = draw([[0.0, 200.0, 1.0]], [0.99], temperature=temperature)
    assert [array.tolist() for array in drawn] == [[1], [0], [0]]


def test_the_smallest_temperature_is_finite_for_large_logits() -> None:
    tokens, logprobs, entropies = draw([[-1e6, 1e6, 0.0]], [0.99], temperature=1e-5)
    assert [array.tolist() for array in (tokens, logprobs, entropies)] == [
        [1],
        [0],
        [0],
    ]


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]] * 2)
    tokens, logprobs, _ = sample(
        logits,
        np.array([0.99, 0.99]),
        temperature=np.array([0.0, 1.0]),
        top_p=np.ones(2),
        top_k=np.zeros(2, int),
    )
    assert tokens.tolist() == [1, 2]
    assert logprobs[0] == 0
    # ln(e / (1 + e² + e))
    expected = 1 - math.log(1 + math.e**2 + math.e)
    assert logprobs[1] == pytest.approx(expected, abs=1e-6)


def test_top_k_keeps_the_k_most_likely_and_renormalises() -> None:
    # .4, .3 of .4, .3, .2, .1 -> 4/7, 3/7
    logits = [log([0.1, 0.4, 0.2, 0.3])] * 2
    tokens, logprobs, entropies = draw(logits, [0.5, 0.99], top_k=2)
    assert tokens.tolist() == [1, 3]
    assert logprobs == pytest.approx(log([4 / 7, 3 / 7]), abs=1e-6)
    entropy = -4 / 7 * math.log(4 / 7) - 3 / 7 * math.log(3 / 7)
    assert entropies == pytest.approx([entropy] * 2, abs=1e-6)


def test_top_p_keeps_the_token_that_reaches_the_mass() -> None:
    # .4 + .3 reaches .6; .2 and .1 go
    kept = truncate(
        torch.tensor([log([0.1, 0.4, 0.2, 0.3])]), np.array([0.6]), np.array([0])
    )
    assert torch.isfinite(kept).tolist() == [[False, True, False, True]]


def test_top_p_is_measured_after_top_k() -> None:
    # top-3: 4/9, 3/9, 2/9; 4/9 + 3/9 = .78 reaches .75. Before top-k .7 would not.
    logits = torch.tensor([log([0.1, 0.4, 0.2, 0.3])])
    kept = truncate(logits, np.array([0.75]), np.array([3]))
    assert torch.isfinite(kept).tolist() == [[False, True, False, True]]


def test_a_nucleus_wider_than_the_first_window_is_found() -> None:
    # 3000 equal tokens: 1500 of them reach half of the mass.
    kept = truncate(torch.zeros(1, 3000), np.array([0.5]), np.array([0]))
    assert torch.isfinite(kept).sum().item() == pytest.approx(1500, abs=1)


@given(seed=st.integers(0, 2**32), size=st.integers(1, 700))
def test_blocks_find_the_same_token_as_one_float64_sum(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, size, generator=generator) * 3
    uniform = torch.rand(4, generator=generator, dtype=torch.float64).numpy()
    tokens, logprobs, entropies = draw(logits, uniform.tolist())
    reference = logits.double().log_softmax(-1)
    cumulated = reference.exp().cumsum(-1).numpy()
    for row, token in enumerate(tokens):
        below = cumulated[row, token - 1] if token else 0.0
        assert below - 1e-6 <= uniform[row] <= cumulated[row, token] + 1e-6
    assert logprobs == pytest.approx(
        reference.numpy()[np.arange(4), tokens], abs=2e-6, rel=1e-6
    )
    assert entropies == pytest.approx(
        torch.distributions.Categorical(logits=logits.double()).entropy(), abs=1e-5
    )


def test_the_largest_uniform_never_draws_an_impossible_token() -> None:
    logits = torch.full((1, 700), -torch.inf)
    logits[0, [3, 400]] = 0.0
    tokens, _, entropies = draw(logits, [1 - 2.0**-53])
    assert tokens.tolist() == [400]
    assert entropies == pytest.approx([math.log(2)], abs=1e-6)


def test_logits_that_are_not_finite_give_a_nan_entropy() -> None:
    for temperature in (0.0, 1.0):
        _, _, entropies = draw([[0.0, math.nan]], [0.5], temperature=temperature)
        assert np.isnan(entropies).all()


def test_uniforms_depend_on_seed_and_index_only_and_fill_the_unit_interval() -> None:
    seeds = np.repeat(np.arange(100, dtype=np.uint64), 100)
    indices = np.tile(np.arange(100, dtype=np.uint64), 100)
    values = uniforms(seeds, indices)
    assert values[4217] == uniforms(seeds[4217:4218], indices[4217:4218])[0]
    assert values.min() >= 0 and values.max() < 1
    assert len(np.unique(values)) == 10_000
    # 10 cells of 1000 ± 5 standard deviations of sqrt(10_000 · .1 · .9) = 30
    assert np.histogram(values, 10, (0, 1))[0] == pytest.approx([1000] * 10, abs=150)


def test_byte_level_tokens_stand_for_their_bytes() -> None:
    tokenizer = qwen_like(added_tokens=("</search>",))
    table = token_bytes(tokenizer, 410)
    text = "naïve </search> 44 <|im_end|> é"
    ids = tokenizer.encode(text)
    assert tokenizer.convert_tokens_to_ids("</search>") in ids
    assert b"".join(table[i] for i in ids).decode() == text
    assert table[405:] == [b""] * 5  # beyond the tokenizer


def test_sentencepiece_like_tokens_stand_for_their_bytes() -> None:
    vocabulary = {"<unk>": 0, "▁a": 1, "b": 2, "<0xC3>": 3, "<0xA9>": 4}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    expected = [b"<unk>", b" a", b"b", b"\xc3", b"\xa9"]
    assert token_bytes(tokenizer, 5) == expected


def test_tokens_of_other_tokenizers_stand_for_what_they_add_to_a_text() -> None:
    vocabulary = {"[UNK]": 0, "play": 1, "##ing": 2}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    assert token_bytes(tokenizer, 3) == [b"[UNK]", b" play", b"ing"]


def test_only_tokens_that_hold_or_end_a_stop_string_are_candidates() -> None:
    table = [b"</a>", b"</", b"a>", b"a", b">", b"> b", b"x</a>y", b"", b"b>"]
    expected = [True, False, True, False, True, True, True, False, False]
    assert StopTokens(table).of([b"</a>"]).tolist() == expected
    assert not StopTokens(table).of([]).any()


@given(
    st.lists(st.binary(max_size=4), min_size=1, max_size=30),
    st.lists(st.binary(min_size=1, max_size=4), max_size=3),
)
def test_candidates_are_those_that_a_look_at_every_token_finds(table, stop) -> None:
    assert StopTokens(table).of(stop).tolist() == [
        any(
            string in piece
            or any(piece.startswith(string[i:]) for i in range(len(string)))
            for string in stop
        )
        for piece in table
    ]
