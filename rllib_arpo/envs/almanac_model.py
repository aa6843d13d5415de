"""Tokenizer and model of the almanac, both built from scratch in a second.

The tokenizer keeps what has to be copied in one piece: a number below 100 is one
token, a name too. Tags are single tokens but not special ones, so they decode as
text. It is an ordinary Qwen2 tokenizer, and the model an ordinary Qwen2, only small.

One thing is not ordinary, and is said here openly: to copy a value that stands behind
a name, a transformer must form a head that looks back and a head that looks up. A
model this small finds them by itself only after minutes on two cores (a minute of cold
start alone leaves it at half the accuracy, and reinforcement learning cannot repair
it), so `build_model` starts three heads near that solution. All weights stay trainable,
and nothing about the questions, the tools or the answers is put in.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from rllib_arpo.envs.almanac import FIELDS, OPERATORS, AlmanacWorld

TAGS = tuple(
    f"<{slash}{tag}>"
    for tag in ("think", "search", "python", "result", "answer")
    for slash in ("", "/")
)
BOX = "\\boxed{"
PAD, EOS = "<|pad|>", "<|end|>"
MAX_POSITIONS = 512
HIDDEN_SIZE = 64
NUM_HEADS = 2
HEAD_DIM = HIDDEN_SIZE // NUM_HEADS
ROPE_THETA = 1e6
# RoPE pairs from this one on turn by less than a radian over a whole trajectory.
FIRST_STILL_PAIR = 6
LOOK_SCALE = 40.0
EMBEDDING_STD = 0.1
WRITE_SCALE = 0.15
MATCH_SCALE = 1.6
COPY_SCALE = 0.6


def build_tokenizer(world: AlmanacWorld, folder: str | Path) -> Qwen2Tokenizer:
    """Train a byte-level BPE on the world's words and save it to `folder`."""
    backend = Tokenizer(models.BPE())
    qwen2 = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    backend.pre_tokenizer = qwen2.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_words(world), trainer)
    trained = json.loads(backend.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=cast(Any, [tuple(pair) for pair in trained["merges"]]),
        unk_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
    )
    # Qwen2 splits numbers into digits; as added tokens they stay whole.
    numbers = [
        *(f" {number}" for number in range(100)),
        *(f"{number:02d}" for number in range(100)),
        *(str(number) for number in range(10)),
    ]
    whole = (*TAGS, BOX, *numbers)
    added: Any = [AddedToken(text, normalized=False) for text in whole]
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_model(
    tokenizer: Qwen2Tokenizer, folder: str | Path, *, seed: int = 0
) -> Qwen2ForCausalLM:
    """Draw a Qwen2 of about 125,000 parameters and save it to `folder`.

    Embeddings are drawn wider than the rest, so that a token outweighs the noise of
    the heads that have not learned anything.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=0.02,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(EOS),
        pad_token_id=cast(int, tokenizer.convert_tokens_to_ids(PAD)),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=EMBEDDING_STD)
        _start_copying_heads(model)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def _start_copying_heads(model: Qwen2ForCausalLM) -> None:
    """Start three heads where "name = value" can be copied.

    In `depth vifel = 44 ... vifel =`, the last token must find 44:

    1. layer 0, head 0 writes what stood one token back: at `=`, vifel;
    2. layer 0, head 1 writes what stood two tokens back: at 44, vifel;
    3. layer 1, head 0 looks from the first to the second, and copies 44.
    """
    first, second = (
        cast(Qwen2Attention, layer.self_attn) for layer in model.model.layers
    )
    still = _still_dims()
    # Two directions of the residual stream that do not overlap, one for each head.
    frame = torch.linalg.qr(torch.randn(HIDDEN_SIZE, HIDDEN_SIZE)).Q
    one_back, two_back = frame[:, : len(still)], frame[:, -len(still) :]
    code = torch.linalg.qr(torch.randn(HIDDEN_SIZE, len(still))).Q.T
    for head, (distance, target) in enumerate(((1, one_back), (2, two_back))):
        rows = torch.arange(HEAD_DIM) + head * HEAD_DIM
        _look_back(first, rows, distance)
        first.v_proj.weight[rows] = 0.0
        first.v_proj.weight[rows[: len(still)]] = code
        first.o_proj.weight[:, rows] = 0.0
        first.o_proj.weight[:, rows[: len(still)]] = WRITE_SCALE * target
    rows = torch.arange(HEAD_DIM)
    for projection, source in ((second.q_proj, one_back), (second.k_proj, two_back)):
        projection.weight[rows] = 0.0
        projection.weight[rows[still]] = MATCH_SCALE * source.T
    copied = torch.linalg.qr(torch.randn(HIDDEN_SIZE, HEAD_DIM)).Q
    second.v_proj.weight[rows] = copied.T
    second.o_proj.weight[:, rows] = COPY_SCALE * copied


def _look_back(attention: Qwen2Attention, rows: Tensor, distance: int) -> None:
    """Make a head attend `distance` tokens back, by RoPE and the biases alone.

    A constant query and key give Σᵢ aᵢ cos((t - s - distance)·θᵢ), highest at
    t - s = distance.
    """
    pairs = torch.arange(HEAD_DIM // 2)
    angles = distance * ROPE_THETA ** (-2.0 * pairs / HEAD_DIM)
    amplitudes = LOOK_SCALE * 0.7**pairs
    attention.q_proj.weight[rows] = 0.0
    attention.k_proj.weight[rows] = 0.0
    query = torch.cat([amplitudes * angles.cos(), -amplitudes * angles.sin()])
    attention.q_proj.bias[rows] = query
    attention.k_proj.bias[rows] = torch.cat([torch.ones(len(pairs)), 0.0 * pairs])


def _still_dims() -> Tensor:
    """Dimensions of a head that RoPE hardly turns: both halves of the slow pairs."""
    slow = torch.arange(FIRST_STILL_PAIR, HEAD_DIM // 2)
    return torch.cat([slow, slow + HEAD_DIM // 2])


def _words(world: AlmanacWorld) -> Iterator[str]:
    """Every word and sign of the world, as questions and results spell them."""
    yield from (f" {name}" for name in world.names)
    for word in (*FIELDS, *OPERATORS, "What", "is", "of", "no", "hits"):
        yield f" {word}"
    yield "What"
    yield from (f" {sign}" for sign in ("=", *OPERATORS.values()))
