"""What our engine costs over bare vLLM: tokens, entropies, weights, the start.

    traffic   trees grown by an EnvRunner; the requests that this made are then sent
              to an unmodified `AsyncLLM` by a minimal loop, each when the request
              that it continues has ended
    entropy   one batch through two `AsyncLLM`s: exact entropies, and vLLM's own
              log-probability of the most likely token
    update    new weights for a running engine, against the same bytes copied into
              shared memory by one process and out of it by another
    start     of the engine in a fresh process

The models are random, but their heads favor the tags that end a turn, so the traffic
has turns of about twenty tokens, tool calls (refused at once) and answers. Bare vLLM
has the same arguments and compiles what it compiles by default; the sides alternate,
and the best round of each counts. Needs vLLM; takes a GPU where there is one.

    OMP_NUM_THREADS=1 python benchmarks/vllm_engine.py --json vllm_engine.json
"""

import argparse
import asyncio
import contextlib
import gc
import importlib.util
import json
import logging
import math
import mmap
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import print_table_and_write
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from rllib_arpo.config import ARPOConfig
from rllib_arpo.engines.engine import GenerationRequest, TokenChunk
from rllib_arpo.engines.vllm_engine import VLLMEngine
from rllib_arpo.engines.vllm_setup import (
    ON_CPU,
    QUIET,
    WORKER_EXTENSION,
    start_environment,
)
from rllib_arpo.envs.almanac import AlmanacEnv, AlmanacWorld
from rllib_arpo.envs.almanac_model import build_tokenizer
from rllib_arpo.rollouts.env_runner import ARPOEnvRunner

ON_GPU = torch.cuda.is_available()
NUM_TREES = 8
NUM_SEQUENCES = 64
ARGUMENTS = {"max_model_len": 2048, "max_num_seqs": 128}
# Chance of a tag at each token: turns of about 20 tokens, 3 calls a path.
TAGS = {"</search>": 1 / 25, "</answer>": 1 / 75}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a Qwen2."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    tied: bool = False


SHAPES = {
    "wide": Shape(vocab=8192, hidden=256, layers=4, heads=8),
    "quick": Shape(vocab=700, hidden=64, layers=2, heads=2),
    # Far less work beside the vocabulary than in any model that has so large a one.
    "vocabulary": Shape(vocab=151_936, hidden=256, layers=4, heads=8),
    "untied": Shape(vocab=2048, hidden=768, layers=6, heads=12),
    "tied": Shape(vocab=2048, hidden=768, layers=6, heads=12, tied=True),
}
if ON_GPU:
    SHAPES["wide"] = Shape(vocab=151_936, hidden=896, layers=24, heads=14)


def save_model(name: str, folder: Path) -> str:
    """A random model and the almanac's tokenizer, filled up to its vocabulary."""
    shape = SHAPES[name]
    tokenizer = build_tokenizer(AlmanacWorld(), folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    fillers = range(len(tokenizer), shape.vocab)
    content["model"]["vocab"] |= {f"filler{number}": number for number in fillers}
    file.write_text(json.dumps(content))
    # Added tokens come after all others, so tags have new ids.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == shape.vocab
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 11 // 4,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=ARGUMENTS["max_model_len"],
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    if not shape.tied:
        _favor_tags(model, tokenizer.convert_tokens_to_ids)
    model.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def _favor_tags(model: Qwen2ForCausalLM, token_id: Any) -> None:
    """Give tags their chances by a number that all embeddings have in common."""
    vocab = model.config.vocab_size
    model.model.embed_tokens.weight[:, 0] = 1.0
    tokens = torch.randint(vocab, (1, 256))
    # What is left of it after all layers and the last norm.
    common = model.model(tokens).last_hidden_state[..., 0].mean().item()
    model.lm_head.weight[:, 0] = 0.0
    for tag, chance in TAGS.items():
        model.lm_head.weight[token_id(tag), 0] = math.log(chance * vocab) / common


@dataclass(slots=True)
class Sent:
    """A request that a tree made, its tokens, and the requests that came before."""

    request: GenerationRequest
    token_ids: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)


class Recorder:
    """An engine that remembers what it was asked."""

    def __init__(self, engine: VLLMEngine) -> None:
        self._engine = engine
        self.sent: list[Sent] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        sent = Sent(request)
        self.sent.append(sent)
        async for chunk in self._engine.generate(request):
            sent.token_ids += chunk.token_ids.tolist()
            yield chunk


def link(sent: Sequence[Sent], num_initial: int) -> None:
    """Find what each request waited for.

    A continuation or a branch repeats the prompt and the tokens of an earlier one. Of
    those that start at the prompt, a tree's later ones waited for all that it had.
    """
    trees: dict[str, list[int]] = {}
    whole = [[*one.request.prompt_token_ids.tolist(), *one.token_ids] for one in sent]
    roots: dict[str, int] = {}
    for number, one in enumerate(sent):
        tree = one.request.request_id.rsplit("/", 1)[0]
        earlier = trees.setdefault(tree, [])
        prompt = one.request.prompt_token_ids.tolist()
        parents = [i for i in earlier if prompt[: len(whole[i])] == whole[i]]
        if parents:
            one.after = [max(parents, key=lambda i: len(whole[i]))]
        else:
            roots[tree] = roots.get(tree, 0) + 1
            one.after = list(earlier) if roots[tree] > num_initial else []
        earlier.append(number)


class Bare:
    """An `AsyncLLM` and the smallest loop that keeps it busy.

    Args:
        model: folder.
        log_file: gets vLLM's log.
        **arguments: of the engine, besides those that both sides have.
    """

    def __init__(self, model: str, log_file: Path, **arguments: Any) -> None:
        self.loop = asyncio.Runner()
        self.loop.run(self._start(model, log_file, arguments))
        self._rounds = 0

    async def _start(
        self, model: str, log_file: Path, arguments: dict[str, Any]
    ) -> None:
        with start_environment(log_file, on_cpu=not ON_GPU):
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            common = ({} if ON_GPU else ON_CPU) | QUIET | ARGUMENTS
            self.llm = AsyncLLM.from_engine_args(
                AsyncEngineArgs(
                    model=model,
                    dtype="float32",
                    logprobs_mode="processed_logprobs",
                    **(common | arguments),
                )
            )

    def replay(self, sent: Sequence[Sent], logprobs: int | None) -> list[list[int]]:
        """Send requests in their order of dependency; the tokens of each."""
        return self.loop.run(self._replay(sent, logprobs))

    async def _replay(
        self, sent: Sequence[Sent], logprobs: int | None
    ) -> list[list[int]]:
        self._rounds += 1
        ended = [asyncio.Event() for _ in sent]

        async def one(number: int) -> list[int]:
            for before in sent[number].after:
                await ended[before].wait()
            request = sent[number].request
            outputs = self.llm.generate(
                {"prompt_token_ids": request.prompt_token_ids.tolist()},
                self._params(request, logprobs),
                f"{self._rounds}/{number}",
            )
            answer = [output async for output in outputs][-1]
            ended[number].set()
            return list(answer.outputs[0].token_ids)

        return await asyncio.gather(*map(one, range(len(sent))))

    def _params(self, request: GenerationRequest, logprobs: int | None) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.sampling.temperature,
            seed=request.seed & (2**63 - 1),
            stop=list(request.sampling.stop),
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            logprobs=logprobs,
            flat_logprobs=logprobs is not None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def forget_prompts(self) -> None:
        """Empty the prefix cache."""
        self.loop.run(self.llm.reset_prefix_cache())

    def close(self) -> None:
        self.llm.shutdown()
        del self.llm
        self.loop.close()


@contextlib.contextmanager
def stock_compilation() -> Iterator[None]:
    """vLLM starts as it does by itself; we leave `torch.compile` out."""
    os.environ["TORCHDYNAMO_DISABLE"] = "0"
    try:
        yield
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]


def measure_traffic(
    name: str, folder: Path, *, num_trees: int, rounds: int
) -> dict[str, Any]:
    """Trees through an EnvRunner, and their requests through bare vLLM."""
    model = save_model(name, folder / name)
    config = (
        ARPOConfig()
        .environment(env=AlmanacEnv, env_config={"max_response_tokens": 512})
        .rl_module(model_config={"model": model})
        .env_runners(num_env_runners=0)
        .engine(engine="vllm", engine_kwargs=ARGUMENTS, log_dir=str(folder))
    )
    runner = ARPOEnvRunner(config=config, worker_index=0)
    runner.engine = recorder = Recorder(runner.engine)
    with stock_compilation():
        bare = Bare(model, folder / "bare.log")
    # Fresh tasks for each round: no prefix cache holds their prompts.
    tasks = AlmanacWorld().tasks("train", num_trees * (rounds + 1))
    speeds: dict[str, list[float]] = {"ours": [], "bare": [], "no logprobs": []}
    same, total, requests = 0, 0, 0
    for number in range(rounds + 1):
        recorder.sent = []
        start = time.perf_counter()
        runner.sample(tasks=tasks[number * num_trees : (number + 1) * num_trees])
        seconds = {"ours": time.perf_counter() - start}
        sent = recorder.sent
        tokens = {"ours": sum(len(one.token_ids) for one in sent)}
        link(sent, config.tree_settings().num_initial_rollouts)
        for side, logprobs in (("bare", 1), ("no logprobs", None)):
            bare.forget_prompts()
            gc.collect()
            start = time.perf_counter()
            answers = bare.replay(sent, logprobs)
            seconds[side] = time.perf_counter() - start
            tokens[side] = sum(map(len, answers))
            if side == "bare":
                pairs = zip(sent, answers, strict=True)
                same += sum(one.token_ids == answer for one, answer in pairs)
                requests += len(sent)
        total += tokens["ours"]
        if number:  # the first round warms up
            for side, times in seconds.items():
                speeds[side].append(tokens[side] / times)
    counted = recorder.metrics()
    runner.stop()
    bare.close()
    return {
        **{side: max(rates) for side, rates in speeds.items()},
        "same": same / requests,
        "requests": requests // (rounds + 1),
        "tokens": total // (rounds + 1),
        "hits": counted["num_cached_prompt_tokens"] / counted["num_prompt_tokens"],
    }


def measure_entropy(
    name: str, folder: Path, *, tokens: int, rounds: int
) -> dict[str, float]:
    """Best tokens per second, with vLLM's own log-probabilities and with entropies."""
    model = save_model(name, folder / name)
    with stock_compilation():
        stock = Bare(model, folder / "stock.log")
    exact = Bare(model, folder / "exact.log", worker_extension_cls=WORKER_EXTENSION)
    rng = np.random.default_rng(0)
    shape = (rounds + 1, NUM_SEQUENCES, 32)
    prompts = rng.integers(SHAPES[name].vocab, size=shape, dtype=np.int32)
    best = {"stock": 0.0, "exact": 0.0}
    for number, group in enumerate(prompts):
        sent = [
            Sent(
                GenerationRequest(
                    request_id=str(i), prompt_token_ids=ids, max_tokens=tokens, seed=i
                )
            )
            for i, ids in enumerate(group)
        ]
        for side, bare in (("stock", stock), ("exact", exact)):
            start = time.perf_counter()
            answers = bare.replay(sent, 1)
            seconds = time.perf_counter() - start
            if number:
                speed = sum(map(len, answers)) / seconds
                best[side] = max(best[side], speed)
    stock.close()
    exact.close()
    return best


def measure_update(name: str, folder: Path, *, rounds: int) -> dict[str, float]:
    """Best milliseconds of an update, of two copies through shared memory, of one."""
    model = save_model(name, folder / name)
    with torch.device("cpu"):
        module = Qwen2ForCausalLM.from_pretrained(model)
    arrays = {n: p.detach().numpy() for n, p in module.named_parameters()}
    best = {"update": math.inf, "two copies": math.inf, "one copy": math.inf}
    with asyncio.Runner() as loop, CopyingProcess(arrays) as copying:
        engine = loop.run(
            VLLMEngine.start(model, log_file=folder / "update.log", **ARGUMENTS)
        )
        for number in range(rounds + 1):
            for what in best:
                start = time.perf_counter()
                if what == "update":
                    loop.run(engine.update_weights(number + 1, arrays))
                elif what == "two copies":
                    copying.pass_on(arrays)
                else:
                    copy_once(arrays)
                if number:
                    best[what] = min(best[what], time.perf_counter() - start)
        engine.close()
    size = sum(array.nbytes for array in arrays.values())
    return {what: 1e3 * s for what, s in best.items()} | {"MB": size / 1e6}


def copy_once(arrays: dict[str, np.ndarray]) -> None:
    """Copy arrays into memory that the process did not have before."""
    size = sum(array.size for array in arrays.values())
    fresh = np.frombuffer(mmap.mmap(-1, 4 * size), np.float32)
    offset = 0
    for array in arrays.values():
        fresh[offset : offset + array.size] = array.reshape(-1)
        offset += array.size


class CopyingProcess:
    """A process that copies arrays out of shared memory into fresh tensors.

    Args:
        arrays: what will be passed on.
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        shared = Path("/dev/shm")
        folder = shared if shared.is_dir() else None
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(sum(array.nbytes for array in arrays.values()))
            self._memory = mmap.mmap(file.fileno(), 0)
            self._pipe, other = multiprocessing.Pipe()
            path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
            shapes = [array.shape for array in arrays.values()]
            self._process = multiprocessing.get_context("spawn").Process(
                target=_copy_when_told, args=(other, path, shapes), daemon=True
            )
            self._process.start()
            self._pipe.recv()

    def pass_on(self, arrays: dict[str, np.ndarray]) -> None:
        """Copy the arrays into the shared memory, and wait for the other copy."""
        window = np.frombuffer(self._memory, np.float32)
        offset = 0
        for array in arrays.values():
            window[offset : offset + array.size] = array.reshape(-1)
            offset += array.size
        self._pipe.send(True)
        self._pipe.recv()

    def __enter__(self) -> "CopyingProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send(False)
        self._process.join()


def _copy_when_told(
    pipe: Connection, path: str, shapes: Sequence[tuple[int, ...]]
) -> None:
    with open(path, "r+b") as file:
        window = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.float32)
    pipe.send(True)
    while pipe.recv():
        fresh, offset = [], 0
        for shape in shapes:
            tensor = torch.empty(shape)
            size = tensor.numel()
            fresh.append(tensor.copy_(window[offset : offset + size].view(shape)))
            offset += size
        pipe.send(True)


START = """
import asyncio, json, sys, time
if __name__ == "__main__":
    begin = time.perf_counter()
    import vllm.v1.engine.async_llm
    from rllib_arpo.engines.vllm_engine import VLLMEngine
    imported = time.perf_counter()
    async def start():
        engine = await VLLMEngine.start(sys.argv[1])
        print(json.dumps([imported - begin, time.perf_counter() - begin]))
        engine.close()
    asyncio.run(start())
"""


def measure_start(folder: Path) -> tuple[float, float]:
    """Seconds of the import of vLLM, and of the engine's start with it."""
    script = folder / "start.py"
    script.write_text(START)
    command = [sys.executable, str(script), save_model("quick", folder / "start")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    import_s, start_s = json.loads(done.stdout.splitlines()[-1])
    return import_s, start_s


class Results:
    """Rows of the table, and figures by name."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self.figures: dict[str, float] = {}

    def add(
        self, figure: str, what: str, unit: str, ours: float, reference: float
    ) -> None:
        ratio = ours / reference
        self.figures[figure] = ratio
        self.rows.append(
            {
                "measured": what,
                "unit": unit,
                "ours": ours,
                "reference": reference,
                "ratio": ratio,
                "figure": figure,
            }
        )


def measure_all(folder: Path, rounds: int) -> Results:
    """Everything; each part takes about a minute."""
    results = Results()
    import_s, start_s = measure_start(folder)
    results.add("import_share", "import in the start", "s", import_s, start_s)
    results.figures = {"import_s": import_s, "start_s": start_s}
    for name, suffix in (("wide", ""), ("quick", "_quick")):
        found = measure_traffic(name, folder, num_trees=NUM_TREES, rounds=rounds)
        for side, figure in (
            ("bare", "ratio_vs_bare"),
            ("no logprobs", "ratio_vs_bare_no_logprobs"),
        ):
            what = f"traffic, {name}, bare" + ", no logprobs" * (side != "bare")
            results.add(figure + suffix, what, "tokens/s", found["ours"], found[side])
        results.figures[f"same_tokens{suffix}"] = found["same"]
        results.figures[f"prefix_cache_hit_rate{suffix}"] = found["hits"]
        print(
            f"{name}: {found['requests']:.0f} requests and {found['tokens']:.0f} "
            f"tokens a round; {found['same']:.2%} of the requests have the same tokens "
            "on both sides"
        )
    for name, figure, tokens in (
        ("wide", "entropy_cost_8k", 64),
        ("vocabulary", "entropy_cost_152k", 12),
    ):
        speeds = measure_entropy(name, folder, tokens=tokens, rounds=rounds)
        what = f"exact entropies, V = {SHAPES[name].vocab:,}"
        results.add(figure, what, "tokens/s", speeds["exact"], speeds["stock"])
    for name, suffix in (("untied", ""), ("tied", "_tied")):
        ms = measure_update(name, folder, rounds=3 * rounds)
        for figure, copies in (
            ("update_vs_copy", "two copies"),
            ("update_vs_one_copy", "one copy"),
        ):
            what = f"update of {ms['MB']:.0f} MB, {name}, {copies}"
            results.add(figure + suffix, what, "ms", ms["update"], ms[copies])
        results.figures[f"update_ms{suffix}"] = ms["update"]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed: nothing is measured, CONTRIBUTING.md says how")
        return
    logging.disable(logging.WARNING)
    start = time.monotonic()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        results = measure_all(Path(folder), args.rounds)
    device = torch.cuda.get_device_name() if ON_GPU else "CPU"
    print(
        f"vLLM on {device}, {torch.get_num_threads()} thread(s), "
        f"{time.monotonic() - start:.0f} s in all\n"
    )
    print_table_and_write(results.rows, results.figures, args.json)


if __name__ == "__main__":
    main()
