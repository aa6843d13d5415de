"""From logits to a token, its log-probability and the entropy; and stop strings.

The distribution is the one really sampled from: after temperature, top-k and
top-p, in that order. A token is drawn by inverting the cumulative distribution at
a uniform number that is a hash of (request seed, token index), so a request's
tokens depend on nothing else in flight. Sums over the vocabulary run in blocks,
and over the blocks in float64, which keeps the inversion exact for any vocabulary.
"""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

# Below it the most likely token is taken: logits divided by less leave float32.
MIN_TEMPERATURE = 1e-5
_BLOCK = 128
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """One uniform number per (seed, token index), by SplitMix64.

    Args:
        seeds: [B] uint64, one per request.
        indices: [B] uint64, how many tokens the request has generated before.

    Returns:
        [B] float64 in [0, 1), multiples of 2⁻⁵³.
    """
    state = _mix(seeds + _GOLDEN) + indices * _GOLDEN
    return (_mix(state) >> np.uint64(11)) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def sample(
    logits: Tensor,
    uniform: np.ndarray,
    *,
    temperature: np.ndarray,
    top_p: np.ndarray,
    top_k: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one token per row.

    Args:
        logits: [B, V] float32.
        uniform: [B] float64 in [0, 1).
        temperature: [B]; below `MIN_TEMPERATURE` the most likely token is taken.
        top_p: [B] in (0, 1]; 1 keeps all tokens.
        top_k: [B]; 0 keeps all tokens.

    Returns:
        Tokens [B] int64, their log-probabilities [B] float32 and the entropies [B]
        float32 in nats. Where the logits are not finite the entropy is NaN.
    """
    greedy = temperature < MIN_TEMPERATURE
    if greedy.all():
        tokens = logits.argmax(-1)
        zeros = np.zeros(len(greedy), np.float32)
        broken = ~torch.isfinite(logits.amax(-1)).cpu().numpy()
        return tokens.cpu().numpy(), zeros, np.where(broken, np.float32(np.nan), zeros)
    most_likely = logits.argmax(-1) if greedy.any() else None
    if (temperature != 1).any():
        scale = np.where(greedy, 1.0, temperature).astype(np.float32)
        logits = logits / torch.from_numpy(scale).to(logits.device)[:, None]
    narrow = ~greedy & (((top_k > 0) & (top_k < logits.shape[1])) | (top_p < 1))
    if narrow.any():
        rows = torch.from_numpy(np.flatnonzero(narrow)).to(logits.device)
        kept = truncate(logits[rows], top_p[narrow], top_k[narrow])
        logits = logits.index_copy(0, rows, kept)
    tokens, logprobs, entropies = _draw(logits, torch.from_numpy(uniform))
    packed = torch.stack([tokens.double(), logprobs, entropies])
    if most_likely is not None:
        packed = torch.where(
            torch.from_numpy(greedy).to(logits.device),
            torch.stack([most_likely.double(), logprobs * 0, entropies * 0]),
            packed,
        )
    host = packed.cpu().numpy()
    return (
        host[0].astype(np.int64),
        host[1].astype(np.float32),
        host[2].astype(np.float32),
    )


def _draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Invert the cumulative distribution: tokens, logprobs and entropies, [B]."""
    rows, size = logits.shape
    padded = -(-size // _BLOCK) * _BLOCK
    shifted = logits - logits.amax(-1, keepdim=True)
    weights = shifted.new_zeros(rows, padded)
    torch.exp(shifted, out=weights[:, :size])
    blocks = weights.view(rows, -1, _BLOCK)
    cumulated = blocks.sum(-1).double().cumsum(-1)
    total = cumulated[:, -1]
    # Rounding may lift u·total to total itself, beyond the last token.
    target = uniform.to(logits.device) * total
    target = torch.minimum(target, total.nextafter(total.new_zeros(())))
    block = (cumulated <= target[:, None]).sum(-1, keepdim=True)
    block.clamp_(max=cumulated.shape[1] - 1)  # only NaN rows get there
    before = torch.where(
        block > 0, cumulated.gather(1, (block - 1).clamp(min=0)), total.new_zeros(())
    )
    chosen = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0]
    inner = chosen.double().cumsum(-1) + before
    offset = (inner <= target[:, None]).sum(-1, keepdim=True)
    # The block's float32 sum may exceed its float64 sum by a rounding.
    positions = torch.arange(_BLOCK, device=logits.device)
    last = torch.where(chosen > 0, positions, 0).amax(-1, keepdim=True)
    tokens = block * _BLOCK + torch.minimum(offset, last)
    log_total = total.log()
    logprobs = shifted.gather(1, tokens.clamp(max=size - 1))[:, 0] - log_total
    # exp(-104) is 0 in float32: the clamp turns 0·(-inf) into 0.
    weighted = torch.linalg.vecdot(weights[:, :size], shifted.clamp_(min=-104.0))
    return tokens[:, 0], logprobs, log_total - weighted / total


def truncate(logits: Tensor, top_p: np.ndarray, top_k: np.ndarray) -> Tensor:
    """Set the logits outside top-k, then outside the nucleus, to -inf.

    The nucleus holds the most likely tokens until their probability, after top-k,
    reaches `top_p`; the token that reaches it is kept.

    Args:
        logits: [R, V].
        top_p: [R] in (0, 1].
        top_k: [R]; 0 keeps all.
    """
    size, device = logits.shape[1], logits.device
    limit = torch.from_numpy(np.where(top_k > 0, np.minimum(top_k, size), size))
    limit = limit.to(device)[:, None]
    # Above 1, so that rounding of the sum cannot drop a token when top_p is 1.
    mass = torch.from_numpy(np.where(top_p < 1, top_p, 2.0)).to(device)[:, None]
    everything = logits.logsumexp(-1, keepdim=True)
    width = min(size, max(256, int(top_k.max())))
    while True:
        values, order = logits.topk(width)
        inside = torch.arange(width, device=device) < limit
        values = values.masked_fill(~inside, -torch.inf)
        norm = torch.where(limit < size, values.logsumexp(-1, keepdim=True), everything)
        probabilities = (values - norm).exp().double()
        keep = inside & (probabilities.cumsum(-1) - probabilities < mass)
        done = (limit[:, 0] <= width) | ~keep[:, -1]
        if width == size or bool(done.all()):
            break
        width = min(size, 8 * width)
    kept = values.masked_fill(~keep, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter_(1, order, kept)


def token_bytes(tokenizer: PreTrainedTokenizerBase, size: int) -> list[bytes]:
    """The bytes that each token adds to a text.

    Byte-level BPE and sentencepiece-like vocabularies are read exactly; special
    and added tokens stand for their own text; for any other tokenizer a token's
    bytes are what it adds when decoded after another one.

    Args:
        tokenizer: any Hugging Face tokenizer.
        size: the model's vocabulary; ids that the tokenizer lacks get b"".

    Returns:
        `size` byte strings.
    """
    known = min(size, len(tokenizer))
    pieces = [*tokenizer.convert_ids_to_tokens(list(range(known)))]
    added = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items()}
    kind = _decoder_kind(tokenizer, pieces)
    from_char = {char: byte for byte, char in _byte_level_alphabet().items()}
    table = [b""] * size
    for index, piece in enumerate(pieces):
        if index in added:
            table[index] = added[index].encode()
        elif piece is None:
            continue
        elif kind == "byte_level":
            table[index] = b"".join(
                bytes([from_char[c]]) if c in from_char else c.encode() for c in piece
            )
        elif kind == "sentencepiece":
            table[index] = _sentencepiece_bytes(piece)
        else:
            table[index] = _decoded_bytes(tokenizer, index)
    return table


def _decoder_kind(tokenizer: PreTrainedTokenizerBase, pieces: list[str]) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
    described = json.dumps(decoder, ensure_ascii=False)
    if '"ByteLevel"' in described:
        return "byte_level"
    marked = any(piece and piece.startswith("▁") for piece in pieces)
    if "▁" in described or "ByteFallback" in described or (backend is None and marked):
        return "sentencepiece"
    return "other"


def _sentencepiece_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def _decoded_bytes(tokenizer: PreTrainedTokenizerBase, index: int) -> bytes:
    # Decoded after itself, so that a leading space or a "##" is treated as inside
    # a text.
    once, twice = tokenizer.batch_decode([[index], [index, index]])
    return twice[len(once) :].encode()


def _byte_level_alphabet() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {byte: chr(byte) for byte in printable}
    return alphabet | {byte: chr(256 + n) for n, byte in enumerate(others)}


class StopTokens:
    """Which tokens can be the last one of a stop string.

    A token qualifies when it holds a stop string, or begins with the end of one.
    The few that qualify are then compared with the bytes before them.

    Args:
        table: the bytes of every token.
    """

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._lengths = np.array([len(piece) for piece in table])
        self._order = sorted(range(len(table)), key=table.__getitem__)
        self._sorted = [table[index] for index in self._order]

    def of(self, stop: Sequence[bytes]) -> np.ndarray:
        """[V] bool, in tens of milliseconds for a vocabulary of 150,000."""
        found = np.zeros(len(self._table), bool)
        for string in stop:
            long_enough = np.flatnonzero(self._lengths >= len(string)).tolist()
            found[[i for i in long_enough if string in self._table[i]]] = True
        for end in {string[-n:] for string in stop for n in range(1, len(string) + 1)}:

            def start(piece: bytes, length: int = len(end)) -> bytes:
                return piece[:length]

            first = bisect_left(self._sorted, end, key=start)
            last = bisect_right(self._sorted, end, key=start)
            found[self._order[first:last]] = True
        return found


def eos_ids(*holders: object) -> list[int]:
    """The ids that end a turn: of a generation or model config, of a tokenizer."""
    ids: list[object] = []
    for holder in holders:
        found = getattr(holder, "eos_token_id", None)
        ids += found if isinstance(found, list) else [found]
    return sorted({i for i in ids if isinstance(i, int)})
