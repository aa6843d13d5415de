"""Tokenizer and model of the almanac, both built from scratch in a second.

The tokenizer keeps what has to be copied in one piece: a number below 100 is one
token, a name usually too. Tags are single tokens but not special ones, so they
decode as text. The model is an ordinary Qwen2, only small.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rllib_arpo.envs.almanac import FIELDS, OPERATORS, AlmanacWorld

TAGS = tuple(
    f"<{slash}{tag}>"
    for tag in ("think", "search", "python", "result", "answer")
    for slash in ("", "/")
)
BOX = "\\boxed{"
PAD, EOS = "<|pad|>", "<|end|>"
MAX_POSITIONS = 512
NUM_HEADS = 2


def build_tokenizer(world: AlmanacWorld, folder: str | Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the world's text and save it to `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r" ?\p{N}{1,2}| ?\p{L}+| ?[^\s\p{N}\p{L}]|\s"), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(world), trainer)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in (*TAGS, BOX)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )
    wrapped.save_pretrained(folder)
    return wrapped


def build_model(
    tokenizer: PreTrainedTokenizerFast, folder: str | Path, *, seed: int = 0
) -> Qwen2ForCausalLM:
    """Draw a Qwen2 of about 120,000 parameters and save it to `folder`.

    The weights are drawn wider than a large model's (0.1 against 0.02): at this
    width that is what keeps activations near 1.

    Transformers' `AutoTokenizer` takes every folder whose config says Qwen2 for one
    of Qwen's own tokenizers and replaces how text is split; load the tokenizer of
    such a folder with `PreTrainedTokenizerFast`.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    return model


def _texts(world: AlmanacWorld) -> Iterator[str]:
    """Every word and number of the world, as questions and results spell them."""
    for number in range(100):
        yield f" {number}"
        yield f"{number:02d}"
        yield f"{number}"
    for name in world.names:
        yield f" {name}"
    for word in (*FIELDS, *OPERATORS, "What", "is", "of", "the", "no", "hits"):
        yield f" {word}"
    yield "What"
    yield from (f" {sign}" for sign in OPERATORS.values())
