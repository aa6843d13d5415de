import asyncio
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from rllib_arpo.errors import ConfigError, DataError
from rllib_arpo.tools.search import SearchBackend
from rllib_arpo.tools.search_dense import DenseIndex

pytest.importorskip("faiss")
sentence_transformers = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

WORDS = [*"abcdefghijklmnopqrstuvwxyz", "query", "passage", ":"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
RNG = np.random.default_rng(0)
TEXTS = [" ".join(RNG.choice(WORDS[:26], RNG.integers(3, 12))) for _ in range(40)]
QUERIES = ["a b c", "z y x w", TEXTS[7]]


def save_model(folder: Path, *, seed: int = 0, prompts: dict[str, str]) -> None:
    """A BERT of random weights with a word tokenizer and mean pooling."""
    vocab = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.5,
    )
    bert = folder.with_name(f"{folder.name}_bert")
    BertModel(config).save_pretrained(bert)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(bert)
    body = modules.Transformer(str(bert))
    pooling = modules.Pooling(16, "mean")
    sentence_transformers.SentenceTransformer(
        modules=[body, pooling], device="cpu", prompts=prompts
    ).save(str(folder))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    save_model(folder, prompts={})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    rows = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "a.jsonl").write_text("\n".join(rows))
    return folder


def open_index(folder: Path, model: Path, **settings) -> DenseIndex:
    return DenseIndex.from_folder(folder, model, device="cpu", **settings)


def found(index: DenseIndex, query: str, top_k: int = 5) -> list[str]:
    return [hit.text for hit in asyncio.run(index.search(query, top_k))]


def by_cosine(model: Path, query: str, *, of_query="", of_text="") -> list[str]:
    """All texts, by the cosine of plain embeddings."""
    encoder = sentence_transformers.SentenceTransformer(str(model), device="cpu")
    texts = encoder.encode([of_text + text for text in TEXTS])
    asked = encoder.encode(of_query + query)
    cosines = texts @ asked / np.linalg.norm(texts, axis=1) / np.linalg.norm(asked)
    return [TEXTS[i] for i in np.argsort(-cosines, kind="stable")]


def vector_files(folder: Path) -> dict[Path, int]:
    files = [*folder.rglob("vectors.npy"), *folder.rglob("index.faiss")]
    return {file: file.stat().st_mtime_ns for file in files}


@pytest.mark.parametrize("index", ["numpy", "Flat"])
def test_the_closest_by_cosine_come_first(folder, model, index):
    backend = open_index(folder, model, index=index)
    for query in QUERIES:
        assert found(backend, query) == by_cosine(model, query)[:5]
    assert found(backend, TEXTS[7], 1) == [TEXTS[7]]
    assert isinstance(backend, SearchBackend)


@pytest.mark.parametrize("index", ["numpy", "Flat"])
def test_no_more_documents_are_found_than_there_are(folder, model, index):
    assert len(found(open_index(folder, model, index=index), "a", 100)) == len(TEXTS)


def test_an_approximate_index_that_looks_everywhere_is_exact(folder, model):
    exact = open_index(folder, model)
    every = open_index(folder, model, index="IVF2,Flat", search_parameters="nprobe=2")
    for query in QUERIES:
        assert found(every, query) == found(exact, query)
    assert every.version != exact.version


def test_prefixes_are_put_before_queries_and_documents(folder, model):
    prefixes = {"query_prefix": "query: ", "passage_prefix": "passage: "}
    index = open_index(folder, model, **prefixes)
    expected = by_cosine(model, "a b c", of_query="query: ", of_text="passage: ")
    assert found(index, "a b c") == expected[:5]
    assert expected[:5] != by_cosine(model, "a b c")[:5]
    plain = open_index(folder, model)
    assert found(plain, "a b c") == by_cosine(model, "a b c")[:5]
    assert index.version != plain.version


def test_without_prefixes_the_models_own_prompts_count(folder, model, tmp_path):
    prompted = tmp_path / "prompted"
    save_model(prompted, prompts={"query": "query: ", "document": "passage: "})
    expected = by_cosine(model, "a b c", of_query="query: ", of_text="passage: ")
    assert found(open_index(folder, prompted), "a b c") == expected[:5]


def test_vectors_are_computed_once(folder, model):
    first = open_index(folder, model, index="Flat")
    stored = vector_files(folder)
    assert len(stored) == 2
    again = open_index(folder, model, index="Flat", query_prefix="query: ")
    assert vector_files(folder) == stored
    open_index(folder, model, index="HNSW8")  # another index of the same vectors
    assert vector_files(folder).items() > stored.items()
    assert len(vector_files(folder)) == 3
    assert first.version != again.version


def test_stored_vectors_are_what_is_searched(folder, model):
    open_index(folder, model)
    (file,) = vector_files(folder)
    vectors = np.load(file, mmap_mode="r+")
    vectors[:] = np.roll(vectors, 1, axis=0)
    vectors.flush()
    # The vector of text 7 stands at the place of text 8.
    assert found(open_index(folder, model), TEXTS[7], 1) == [TEXTS[8]]


def test_another_model_or_other_documents_are_encoded_anew(folder, model, tmp_path):
    trained = tmp_path / "trained"
    shutil.copytree(model, trained)
    old = open_index(folder, trained)
    shutil.rmtree(trained)
    save_model(trained, seed=1, prompts={})
    new = open_index(folder, trained)
    assert new.version != old.version
    assert found(new, "a b c") == by_cosine(trained, "a b c")[:5]
    assert len(vector_files(folder)) == 2
    with (folder / "a.jsonl").open("a") as file:
        file.write('\n{"text": "q q q q"}')
    longer = open_index(folder, trained)
    assert found(longer, "q q q q", 1) == ["q q q q"]
    assert longer.version != new.version


def test_what_travels_are_the_settings(folder, model):
    index = open_index(folder, model)
    pickled = pickle.dumps(index)
    assert len(pickled) < 2000
    arrived = pickle.loads(pickled)
    assert found(arrived, "a b c") == found(index, "a b c")
    assert arrived.version == index.version


def test_queries_of_many_callers_at_once_are_answered(folder, model):
    index = open_index(folder, model)

    async def all_at_once() -> list[str]:
        hits = await asyncio.gather(*[index.search(text, 1) for text in TEXTS])
        return [hit.text for (hit,) in hits]

    assert asyncio.run(all_at_once()) == TEXTS


def test_wrong_settings_are_refused_with_a_cure(folder, model):
    with pytest.raises(ConfigError, match=r"`model`.*none.*cannot be loaded"):
        open_index(folder, folder.parent / "none")
    with pytest.raises(ConfigError, match=r'`index` \("Bogus"\) must be "numpy"'):
        open_index(folder, model, index="Bogus")
    with pytest.raises(ConfigError, match=r"`search_parameters`.*nprobe"):
        open_index(folder, model, index="Flat", search_parameters="nprobe=3")
    with pytest.raises(ConfigError, match="batch_size"):
        open_index(folder, model, batch_size=0)
    with pytest.raises(DataError, match="not a folder"):
        open_index(folder / "none", model)
