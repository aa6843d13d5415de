"""Attention in rows of trees: a token sees its ancestors and nothing else.

A row is a depth-first walk, so the descendants of a token stand right behind it, up
to the end of its segment's subtree. One number per token says everything:

    token q sees token k   ⇔   k <= q < subtree_ends[k]

On a CPU this becomes a dense additive mask for scaled dot product attention, on a GPU
a FlexAttention block mask, of which nothing has the size T×T: whole blocks of 128×128
tokens are skipped, taken in full, or masked inside the kernel.
"""

from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from rllib_arpo.errors import ConfigError

FLEX = "flex_attention"
BLOCK = 128

# Time of attention on a CPU per multiplication, against that of a matrix product.
CPU_ATTENTION_COST = 1.5


def uses_flex_attention(model: PreTrainedModel) -> bool:
    """Whether masks are block masks, and rows a multiple of 128 tokens long."""
    return model.config._attn_implementation == FLEX


def attention_mask(
    model: PreTrainedModel, subtree_ends: Tensor, dtype: torch.dtype
) -> Any:
    """The mask in the form that the model's attention takes.

    Args:
        model: its attention implementation decides.
        subtree_ends: [B, T] int64; T a multiple of 128 for FlexAttention.
        dtype: of the queries.

    Returns:
        A `BlockMask`, or [B, 1, T, T] with 0 where attention is and -inf elsewhere.
    """
    if uses_flex_attention(model):
        return block_mask(subtree_ends)
    return dense_mask(subtree_ends, dtype)


def dense_mask(subtree_ends: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, T]: 0 where query q (second last) sees key k, else -inf."""
    place = torch.arange(subtree_ends.shape[1], device=subtree_ends.device)
    below = place[:, None] < subtree_ends[:, None, :]
    seen = below & (place <= place[:, None])
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, -torch.inf)[:, None]


def block_mask(subtree_ends: Tensor) -> BlockMask:
    """The same for FlexAttention, from the least and greatest end of each block.

    Below the diagonal a block of keys is seen by some query of a block if its greatest
    end lies behind the first query, and by all if its least end lies behind the last.
    """
    rows, length = subtree_ends.shape
    blocks = length // BLOCK
    ends = subtree_ends.view(rows, 1, blocks, BLOCK)
    first = torch.arange(blocks, device=ends.device)[:, None] * BLOCK
    below = first > first.T
    full = below & (ends.amin(-1) >= first + BLOCK)
    some = (below & (ends.amax(-1) > first)) | (first == first.T)

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < subtree_ends[row, key])

    return BlockMask.from_kv_blocks(
        *_indices(some & ~full),
        *_indices(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(length, length),
    )


def _indices(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 1, Q] counts and [B, 1, Q, K] indices of the blocks chosen for a query."""
    chosen = chosen[:, None]
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.int()


def attention_cost(model: PreTrainedModel) -> float:
    """What one pair of query and key costs, in units of one token's matrix products.

    A row of T tokens takes time in proportion to T + cost·T² with a dense mask.
    FlexAttention skips what the mask hides, so the layout of rows costs it nothing.
    """
    config = model.config.get_text_config()
    if uses_flex_attention(model):
        return 0.0
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    pair = 2 * heads * head_dim * config.num_hidden_layers
    token = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    if not config.tie_word_embeddings:
        embeddings = cast(nn.Embedding, model.get_input_embeddings())
        token -= embeddings.weight.numel()  # looked up, not multiplied
    return CPU_ATTENTION_COST * pair / token


def use_tree_attention(model: PreTrainedModel, device: torch.device) -> None:
    """Choose how `model` attends in rows of trees, and see that it does so rightly.

    Args:
        model: its attention is FlexAttention afterwards if `device` is a GPU.
        device: where it will train; the check runs where the weights are.

    Raises:
        ConfigError: the model cannot attend to ancestors only.
    """
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if layers or getattr(config, "sliding_window", None):
        _refuse(model, f"has layers of other kinds ({', '.join(layers) or 'sliding'})")
    # Boundary: models answer a mask that they do not know with any error, or with none.
    try:
        apart, difference = _probe(model)
    except Exception as error:
        _refuse(model, f"does not take a mask of its own ({type(error).__name__})")
    if not difference <= 1e-3 * apart:
        _refuse(model, "does not heed a mask of its own")
    if device.type == "cuda":
        model.set_attn_implementation(FLEX)


def _refuse(model: PreTrainedModel, reason: str) -> NoReturn:
    raise ConfigError(
        f'packing="tree" needs attention to ancestors only, but {type(model).__name__} '
        f'{reason}. Set `.training(packing="paths")`.'
    )


@torch.no_grad()
def _probe(model: PreTrainedModel) -> tuple[float, float]:
    """How far hidden states differ from path to path, and from paths to tree.

    The tree is two tokens with two branches of two; the second branch is read behind
    the first, and alone.
    """
    device = next(model.parameters()).device
    vocab_size = model.config.get_text_config().vocab_size

    def hidden(tokens: list[int], positions: list[int], mask: Tensor | None) -> Tensor:
        return model.base_model(
            input_ids=torch.tensor([tokens], device=device) % vocab_size,
            position_ids=torch.tensor([positions], device=device),
            attention_mask=mask,
            use_cache=False,
        ).last_hidden_state[0, -2:]

    ends = torch.tensor([[6, 6, 4, 4, 6, 6]], device=device)
    mask = dense_mask(ends, next(model.parameters()).dtype)
    first = hidden([3, 4, 5, 6], [0, 1, 2, 3], None)
    second = hidden([3, 4, 7, 8], [0, 1, 2, 3], None)
    packed = hidden([3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 2, 3], mask)
    return float((first - second).abs().max()), float((packed - second).abs().max())
