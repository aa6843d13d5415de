"""Keys and values: a slot for each running sequence, a prefix tree for the rest.

Running sequences hold the slots 0..B-1 without holes, so that a decode step reads
one slice of the pool and gathers nothing; new keys are scattered into place.
Finished sequences go to a radix tree of tokens, where a shared prefix is stored
once and the least recently used ends are dropped first. A continuation or a fork
copies the longest known prefix, from the tree or from a running slot.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

KeysValues = tuple[Tensor, Tensor]


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two sequences share at their start."""
    size = min(len(one), len(other))
    if size == 0:
        return 0
    differs = one[:size] != other[:size]
    first = int(differs.argmax())
    return first if differs[first] else size


class SlotPool(Cache):
    """Preallocated keys and values, handed to a model as its cache.

    keys, values: [layers, slots, length, heads, head_dim]. Before a forward pass
    `aim` says which slots the batch rows are and where each token goes.

    Args:
        like: keys and values of one token, [1, heads, 1, head_dim] per layer.
    """

    def __init__(self, like: list[KeysValues]) -> None:
        super().__init__(layers=[])
        self._like = like
        self.num_slots = self.length = 0
        self.reset()

    @torch.inference_mode()
    def reset(self) -> None:
        """Give the memory back."""
        self.num_slots = self.length = 0
        self.keys, self.values = (
            torch.zeros(
                len(self._like),
                0,
                0,
                self._like[0][i].shape[1],
                self._like[0][i].shape[3],
                dtype=self._like[0][i].dtype,
                device=self._like[0][i].device,
            )
            for i in (0, 1)
        )

    @torch.inference_mode()
    def reserve(self, num_slots: int, length: int) -> None:
        """Make room for at least so many slots and tokens, and some to spare."""
        if num_slots <= self.num_slots and length < self.length:
            return
        slots = max(self.num_slots, 1 << (num_slots - 1).bit_length())
        # One position more than the longest sequence: padding is written there.
        tokens = max(self.length, -(-(length + 1 + length // 4) // 64) * 64)
        self.keys = self._grown(self.keys, slots, tokens)
        self.values = self._grown(self.values, slots, tokens)
        self.num_slots, self.length = slots, tokens

    def _grown(self, old: Tensor, slots: int, tokens: int) -> Tensor:
        # Zeros, because a masked NaN would still poison the attention.
        shape = (old.shape[0], slots, tokens, *old.shape[3:])
        new = torch.zeros(shape, dtype=old.dtype, device=old.device)
        new[:, : self.num_slots, : self.length] = old
        return new

    @torch.inference_mode()
    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` tokens of a slot to another one."""
        for pool in (self.keys, self.values):
            pool[:, target, :count] = pool[:, source, :count]

    @torch.inference_mode()
    def load(self, slot: int, start: int, stored: KeysValues, count: int) -> None:
        """Write the first `count` tokens of `stored` to a slot from `start` on."""
        for pool, tensor in zip((self.keys, self.values), stored, strict=True):
            pool[:, slot, start : start + count] = tensor[:, :count]

    @torch.inference_mode()
    def save(self, slot: int, start: int, end: int) -> KeysValues:
        """Copies of a slot's tokens, [layers, end - start, heads, head_dim]."""
        return (
            self.keys[:, slot, start:end].clone(),
            self.values[:, slot, start:end].clone(),
        )

    def aim(self, rows: slice | Tensor, places: Tensor, length: int) -> None:
        """Set the slots of the next forward pass.

        Args:
            rows: the slots of the batch rows.
            places: [B·T] where each new token goes, slot·self.length + position.
            length: how many positions the attention reads.
        """
        self._rows, self._places, self._read = rows, places, length

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> KeysValues:
        """Store [B, heads, T, head_dim] and return what the rows attend to."""
        return (
            self._write(self.keys[layer_idx], key_states),
            self._write(self.values[layer_idx], value_states),
        )

    def _write(self, layer: Tensor, new: Tensor) -> Tensor:
        flat = new.transpose(1, 2).flatten(0, 1)
        layer.flatten(0, 1).index_copy_(0, self._places, flat)
        return layer[self._rows, : self._read].transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0: positions and masks are passed to the model explicitly."""
        return 0


@dataclass(eq=False, slots=True)
class _Node:
    """An edge of the tree: some tokens, their keys and values, what follows."""

    tokens: np.ndarray
    stored: KeysValues
    parent: "_Node | None"
    children: dict[int, "_Node"] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix of some tokens: the edges to load, in order."""

    length: int
    edges: tuple[tuple[KeysValues, int], ...]


class PrefixTree:
    """Finished sequences, each shared prefix once, at most `max_tokens` tokens.

    Using a path marks its nodes from the end to the root, so a child is always
    marked before its parent and the least recently used node has no children.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._first: dict[int, _Node] = {}
        self._by_use: OrderedDict[_Node, None] = OrderedDict()
        self.num_tokens = 0

    def match(self, tokens: np.ndarray) -> Match:
        """Find the longest stored prefix of `tokens`."""
        found, path = self._walk(tokens)
        self._mark([node for node, _ in path])
        return Match(found, tuple((node.stored, count) for node, count in path))

    def insert(
        self, tokens: np.ndarray, save: Callable[[int, int], KeysValues]
    ) -> None:
        """Store a sequence; `save(start, end)` is asked for what is new only."""
        if not 0 < len(tokens) <= self.max_tokens:
            return
        found, path = self._walk(tokens)
        nodes = [node for node, _ in path]
        if path and path[-1][1] < len(nodes[-1].tokens):
            nodes[-1] = self._split(nodes[-1], path[-1][1])
        if found < len(tokens):
            parent = nodes[-1] if nodes else None
            stored = save(found, len(tokens))
            node = _Node(tokens[found:].copy(), stored, parent)
            self._children(parent)[int(tokens[found])] = node
            nodes.append(node)
            self.num_tokens += len(node.tokens)
        self._mark(nodes)
        while self.num_tokens > self.max_tokens:
            oldest, _ = self._by_use.popitem(last=False)
            del self._children(oldest.parent)[int(oldest.tokens[0])]
            self.num_tokens -= len(oldest.tokens)

    def _children(self, node: _Node | None) -> dict[int, _Node]:
        return self._first if node is None else node.children

    def _walk(self, tokens: np.ndarray) -> tuple[int, list[tuple[_Node, int]]]:
        """Tokens matched, and the nodes on the way with how much of each."""
        found, path, children = 0, [], self._first
        while found < len(tokens):
            node = children.get(int(tokens[found]))
            if node is None:
                break
            count = common_prefix(node.tokens, tokens[found:])
            path.append((node, count))
            found += count
            if count < len(node.tokens):
                break
            children = node.children
        return found, path

    def _split(self, node: _Node, count: int) -> _Node:
        """Cut an edge in two and return the upper part."""
        keys, values = node.stored
        upper = _Node(
            node.tokens[:count], (keys[:, :count], values[:, :count]), node.parent
        )
        # Copies, so that dropping the lower part gives its memory back.
        upper.stored = (upper.stored[0].clone(), upper.stored[1].clone())
        node.stored = (keys[:, count:].clone(), values[:, count:].clone())
        self._children(node.parent)[int(node.tokens[0])] = upper
        node.tokens, node.parent = node.tokens[count:], upper
        upper.children[int(node.tokens[0])] = node
        return upper

    def _mark(self, nodes: list[_Node]) -> None:
        for node in reversed(nodes):
            self._by_use[node] = None
            self._by_use.move_to_end(node)
