"""A Hugging Face causal LM run on the slots of a `SlotPool`.

Positions and a ready 4D mask are passed in, so the model builds neither, and a
batch row may stand at any position. Attention differs from the library's only in
how grouped queries are laid out: in a decode step the queries that share a
key-value head become query positions of that head, and no key is repeated.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rllib_arpo.engines.kv_cache import KeysValues, SlotPool
from rllib_arpo.engines.weights import check_arrays
from rllib_arpo.errors import ConfigError

ATTENTION = "arpo_slots"
_PREFILL_TOKENS = 2048


def _slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    batch, heads, count, _ = query.shape
    if attention_mask is None or count > 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], -1)
    out = functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return out.reshape(batch, 1, heads, -1), None


AttentionInterface.register(ATTENTION, _slot_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def context_length(model: PreTrainedModel) -> int:
    """Most tokens that full causal attention can treat exactly.

    Raises:
        ConfigError: a layer is not a softmax attention over all tokens.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"the torch engine serves models whose layers attend to all tokens; "
            f"{type(model).__name__} has the layer types {sorted(kinds)}"
        )
    longest = getattr(config, "max_position_embeddings", None) or 1 << 20
    # Within its window a sliding layer attends to all tokens.
    window = getattr(config, "sliding_window", None)
    uses_window = "sliding_attention" in kinds or not hasattr(config, "layer_types")
    return min(longest, window) if window and uses_window else longest


class ModelRunner:
    """Forward passes over slots, and the model's weights.

    Args:
        model: a causal LM; it is put in evaluation mode, and its attention is
            replaced by an equivalent one if it is "sdpa".
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.device = model.device
        if model.config.get_text_config()._attn_implementation == "sdpa":
            model.set_attn_implementation(ATTENTION)
        parameters = inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self.vocab_size, like = self._probe()
        self.pool = SlotPool(like)

    @torch.inference_mode()
    def _probe(self) -> tuple[int, list[KeysValues]]:
        """Vocabulary size, and keys and values of one token for each layer."""
        cache = DynamicCache()
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        layers = cast(list[DynamicLayer], cache.layers)
        output = self.model(token, past_key_values=cache, use_cache=True)
        like = [cast(KeysValues, (one.keys, one.values)) for one in layers]
        shapes = {(keys.shape, values.shape) for keys, values in like}
        if len(shapes) != 1:
            raise ConfigError(
                f"the torch engine needs layers of equal shape; those of "
                f"{type(self.model).__name__} differ: {sorted(map(str, shapes))}"
            )
        return output.logits.shape[-1], like

    def decode(self, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
        """Run one token in each of the slots 0..B-1.

        Args:
            tokens: [B] token ids.
            positions: [B] their positions.

        Returns:
            [B, V] float32 logits.
        """
        rows = slice(0, len(tokens))
        return self._forward(rows, tokens[:, None], positions[:, None])

    def prefill(
        self,
        slots: Sequence[int],
        tokens: Sequence[np.ndarray],
        starts: Sequence[int],
    ) -> None:
        """Compute keys and values of `tokens[i]` in `slots[i]` from `starts[i]` on.

        Rows of like length run together, padded on the left.
        """
        order = sorted(range(len(slots)), key=lambda i: len(tokens[i]))
        group: list[int] = []
        for i in order:
            if group and (len(group) + 1) * len(tokens[i]) > _PREFILL_TOKENS:
                self._prefill_group(group, slots, tokens, starts)
                group = []
            group.append(i)
        self._prefill_group(group, slots, tokens, starts)

    def _prefill_group(
        self,
        group: Sequence[int],
        slots: Sequence[int],
        tokens: Sequence[np.ndarray],
        starts: Sequence[int],
    ) -> None:
        width = len(tokens[group[-1]])
        ids = np.zeros((len(group), width), np.int64)
        positions = np.full((len(group), width), -1, np.int64)
        for row, i in enumerate(group):
            size = len(tokens[i])
            ids[row, width - size :] = tokens[i]
            positions[row, width - size :] = np.arange(starts[i], starts[i] + size)
        chosen = [slots[i] for i in group]
        for start in range(0, width, _PREFILL_TOKENS):
            piece = slice(start, start + _PREFILL_TOKENS)
            self._forward(chosen, ids[:, piece], positions[:, piece])

    @torch.inference_mode()
    def _forward(
        self, slots: slice | list[int], ids: np.ndarray, positions: np.ndarray
    ) -> Tensor:
        """Logits [B, V] of the last column; position -1 marks padding."""
        pool = self.pool
        # A multiple of 8 keeps the fast GPU kernels; the mask hides the rest.
        length = min(pool.length, -(-(int(positions.max()) + 1) // 8) * 8)
        numbers = np.arange(len(ids)) if isinstance(slots, slice) else np.array(slots)
        places = np.where(positions < 0, pool.length - 1, positions)
        places = places + numbers[:, None] * pool.length
        packed = torch.from_numpy(np.stack([ids, positions, places]).astype(np.int64))
        ids_, positions_, places_ = packed.to(self.device).unbind()
        seen = positions_.clamp(min=0)
        hidden = torch.arange(length, device=self.device) > seen[:, :, None]
        mask = torch.zeros(hidden.shape, dtype=pool.keys.dtype, device=self.device)
        mask = mask.masked_fill_(hidden, -torch.inf)[:, None]
        rows = slots
        if not isinstance(rows, slice):
            contiguous = numbers[-1] - numbers[0] == len(numbers) - 1
            if contiguous and (np.diff(numbers) == 1).all():
                rows = slice(int(numbers[0]), int(numbers[-1]) + 1)
            else:
                rows = torch.from_numpy(numbers).to(self.device)
        pool.aim(rows, places_.flatten(), length)
        output = self.model(
            input_ids=ids_,
            attention_mask=mask,
            position_ids=seen,
            past_key_values=pool,
            use_cache=True,
            **self._options,
        )
        return output.logits[:, -1].float()

    @torch.inference_mode()
    def score(self, token_ids: np.ndarray) -> np.ndarray:
        """[T-1] float32 log-probability of each of [T] tokens but the first."""
        ids = torch.from_numpy(token_ids.astype(np.int64))[None].to(self.device)
        output = self.model(ids, past_key_values=DynamicCache(), use_cache=True)
        table = output.logits[0, :-1].float().log_softmax(-1)
        return table.gather(-1, ids[0, 1:, None])[:, 0].cpu().numpy()

    @torch.no_grad()
    def load_weights(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Copy arrays into the model; nothing changes if one is wrong.

        Raises:
            WeightSyncError: a name is unknown or missing, or a shape differs.
        """
        state = self.model.state_dict(keep_vars=True)
        # Tied weights are one object under several names.
        names: dict[int, set[str]] = {id(p): set() for p in self.model.parameters()}
        for name, tensor in state.items():
            if id(tensor) in names:
                names[id(tensor)].add(name)
        check_arrays(
            arrays,
            shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
            required=names.values(),
            model=type(self.model).__name__,
        )
        for name, array in arrays.items():
            state[name].copy_(_tensor(array))


def _tensor(array: np.ndarray) -> Tensor:
    array = np.require(array, requirements=["C", "W"])
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
