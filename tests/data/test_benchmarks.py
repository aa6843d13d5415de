import base64
import csv
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rllib_arpo.data.benchmark_files import HubFile
from rllib_arpo.data.benchmark_readers import last_boxed, xor_decrypted
from rllib_arpo.data.benchmarks import (
    BENCHMARKS,
    CHAT_INSTRUCTIONS,
    TAG_INSTRUCTIONS,
    load_benchmark,
    parse_benchmarks,
)
from rllib_arpo.errors import ConfigError, DataError, RowError
from rllib_arpo.rewards.answers import accuracy

SHARED = Path(__file__).parents[3] / "shared" / "data"
NUM_REAL_ROWS = {
    "gsm8k": 1319,
    "math500": 500,
    "aime24": 30,
    "hotpotqa": 200,
    "2wiki": 200,
    "bamboogle": 125,
}
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the published files are not beside the checkout"
)


def write_jsonl(file: Path, *rows: dict) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def tasks_of(name: str, folder: Path, *rows: dict):
    return load_benchmark(name, write_jsonl(folder / "rows.jsonl", *rows))


def answers_of(name: str, folder: Path, *rows: dict) -> list[tuple[str, ...]]:
    return [task.answers for task in tasks_of(name, folder, *rows).tasks]


def encrypted(text: str, key: str) -> str:
    data, repeated = text.encode(), key.encode()
    mixed = bytes(b ^ repeated[i % len(repeated)] for i, b in enumerate(data))
    return base64.b64encode(mixed).decode()


def test_there_are_the_thirteen_benchmarks_of_the_paper():
    assert list(BENCHMARKS) == [
        *("aime24", "aime25", "math500", "gsm8k", "math"),
        *("webwalkerqa", "hotpotqa", "2wiki", "musique", "bamboogle"),
        *("gaia", "hle", "xbench"),
    ]
    for benchmark in BENCHMARKS.values():
        assert (benchmark.sampling.temperature, benchmark.sampling.top_p) == (0.6, 0.95)
    budgets = {
        (b.sampling.max_response_tokens, b.sampling.max_tool_calls)
        for b in BENCHMARKS.values()
    }
    assert budgets == {(4096, 3), (8192, 6)}


@needs_shared
@pytest.mark.parametrize("name", NUM_REAL_ROWS)
def test_every_published_row_is_a_task(name):
    (benchmark, file), *_ = parse_benchmarks(name, SHARED / "benchmarks")
    loaded = load_benchmark(benchmark, file)
    assert len(loaded.tasks) == NUM_REAL_ROWS[name]
    assert not loaded.skipped
    for task in loaded.tasks:
        assert all(answer == answer.strip() != "" for answer in task.answers)
        assert task.ability == ("qa" if benchmark.metric == "f1" else "math")
        assert "####" not in task.answers[0]


@needs_shared
def test_the_system_message_is_that_of_the_training_rows():
    with pq.ParquetFile(SHARED / "train_10k.parquet") as file:
        row = next(file.iter_batches(batch_size=1, columns=["prompt"])).to_pylist()[0]
    assert row["prompt"][0]["role"] == "system"
    assert row["prompt"][0]["content"].replace("\boxed", "\\boxed") == TAG_INSTRUCTIONS


def test_a_task_holds_the_instructions_and_the_question(tmp_path):
    file = write_jsonl(
        tmp_path / "rows.jsonl", {"question": "1 + 1?", "answer": "It is.\n#### 2"}
    )
    (task,) = load_benchmark("gsm8k", file).tasks
    assert [m.role for m in task.messages] == ["system", "user"]
    assert task.messages[0].content == TAG_INSTRUCTIONS
    assert task.messages[1].content == task.metadata["question"] == "1 + 1?"
    assert (task.task_id, task.source) == ("gsm8k/0", "gsm8k")
    (task,) = load_benchmark("gsm8k", file, instructions=CHAT_INSTRUCTIONS).tasks
    assert task.messages[0].content == CHAT_INSTRUCTIONS
    assert "<search>" not in CHAT_INSTRUCTIONS


def test_gsm8k_answers_are_numbers_without_commas(tmp_path):
    rows = [{"question": "q", "answer": "1 + #### no\n#### 1,234,567 "}]
    assert answers_of("gsm8k", tmp_path, *rows) == [("1234567",)]
    with pytest.raises(RowError, match=r"row 0, `answer`: no answer after '####'"):
        tasks_of("gsm8k", tmp_path, {"question": "q", "answer": "eighteen"})


def test_aime_is_read_from_either_release(tmp_path):
    rows = [
        {"problem": "p", "answer": "70", "id": "0"},
        {"ID": "2025-I-1", "Problem": "p", "Solution": "s", "Answer": 588},
        {"question": "p", "answer": "016"},
    ]
    assert answers_of("aime25", tmp_path, *rows) == [("70",), ("588",), ("016",)]
    assert accuracy("16", ("016",), ability="math") == 1.0


def test_math_answers_are_what_the_solution_boxes(tmp_path):
    row = {
        "problem": "p",
        "level": "Level 5",
        "type": "Algebra",
        "solution": r"First $\boxed{1}$, so $\boxed{\frac{1}{\sqrt{2}}}$.",
    }
    (task,) = tasks_of("math", tmp_path, row).tasks
    assert task.answers == (r"\frac{1}{\sqrt{2}}",)
    assert task.metadata["group"] == "Level 5"
    with pytest.raises(RowError, match="`solution`"):
        tasks_of("math", tmp_path, {"problem": "p", "solution": "It is 3."})


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"\boxed{2}", "2"),
        (r"\boxed{\{1,2\}} units", r"\{1,2\}"),
        (r"so $\boxed 2$.", "2"),
        (r"\fbox{7}", "7"),
        (r"\boxed{1", None),
        (r"\boxed", None),
        ("none", None),
    ],
)
def test_the_last_box_of_a_solution_is_found(solution, answer):
    assert last_boxed(solution) == answer


def test_accepted_answers_may_be_a_list_or_a_list_as_text(tmp_path):
    rows = [
        {"question": "q", "answer": ["a", "b"]},
        {"question": "q", "answer": "['a', \"b's\"]"},
        {"question": "q", "answer": "a"},
        {"question": "q", "golden_answers": ["a", "a"]},
        {"question": "q", "answer": 1999},
    ]
    assert answers_of("hotpotqa", tmp_path, *rows) == [
        ("a", "b"),
        ("a", "b's"),
        ("a",),
        ("a",),
        ("1999",),
    ]


def test_musique_accepts_aliases_and_skips_what_cannot_be_answered(tmp_path):
    common = {"id": "2hop__1", "paragraphs": [], "question": "q"}
    loaded = tasks_of(
        "musique",
        tmp_path,
        common | {"answer": "a", "answer_aliases": ["b"], "answerable": True},
        common | {"answer": "c", "answer_aliases": [], "answerable": False},
        common | {"answer": "d", "answer_aliases": [], "answerable": True},
    )
    assert [task.answers for task in loaded.tasks] == [("a", "b"), ("d",)]
    assert [task.task_id for task in loaded.tasks] == ["musique/0", "musique/2"]
    assert loaded.skipped == {"cannot be answered": 1}


def test_webwalker_is_read_as_on_the_hub_and_as_in_its_paper(tmp_path):
    info = {"difficulty_level": "easy", "type": "multi_source", "lang": "en"}
    tasks = tasks_of(
        "webwalkerqa",
        tmp_path,
        {"question": "q", "answer": "a", "root_url": "https://x.org", "info": info},
        {"Question": "q", "Answer": "a", "Info": {"Difficulty_Level": "Hard"}},
        {"question": "q", "answer": "a", "info": json.dumps(info)},
    ).tasks
    assert [task.metadata["group"] for task in tasks] == ["easy", "hard", "easy"]
    assert tasks[0].metadata["root_url"] == "https://x.org"
    assert "x.org" not in tasks[0].messages[1].content


def test_gaia_skips_files_and_hidden_answers(tmp_path):
    common = {"task_id": "1", "Question": "q", "Annotator Metadata": {}}
    loaded = tasks_of(
        "gaia",
        tmp_path,
        common | {"Level": 1, "Final answer": "egalitarian", "file_name": ""},
        common | {"Level": "2", "Final answer": "17", "file_name": "17.xlsx"},
        common | {"Level": 3, "Final answer": "?", "file_name": ""},
    )
    assert [task.answers for task in loaded.tasks] == [("egalitarian",)]
    assert loaded.tasks[0].metadata["group"] == "1"
    assert loaded.skipped == {"needs a file": 1, "has no public answer": 1}


def test_hle_skips_images_and_knows_multiple_choice(tmp_path):
    common = {"id": "1", "question": "q", "category": "Math"}
    loaded = tasks_of(
        "hle",
        tmp_path,
        common | {"answer": "flat", "answer_type": "exactMatch", "image": ""},
        common | {"answer": "D", "answer_type": "multipleChoice", "image": None},
        common | {"answer": "D", "answer_type": "exactMatch", "image": "data:image/x"},
    )
    assert [task.ability for task in loaded.tasks] == ["exact", "choice"]
    assert loaded.skipped == {"needs an image": 1}


def test_xbench_is_decrypted_from_its_csv(tmp_path):
    key = "xbench-Ü"
    file = tmp_path / "DeepSearch.csv"
    with file.open("w", encoding="utf-8-sig", newline="") as lines:
        writer = csv.DictWriter(
            lines, ["id", "prompt", "answer", "reference_steps", "canary"]
        )
        writer.writeheader()
        writer.writerow(
            {
                "id": 1,
                "prompt": encrypted("长江有多长\n", key),
                "answer": encrypted("6300公里", key),
                "reference_steps": "",
                "canary": key,
            }
        )
    (task,) = load_benchmark("xbench", file).tasks
    assert task.metadata["question"] == "长江有多长"
    assert task.answers == ("6300公里",)


def test_the_cipher_is_xor_with_a_repeated_key():
    # "h" ^ "k" = 0x68 ^ 0x6b = 3; "i" ^ "e" = 0x69 ^ 0x65 = 12; "!" ^ "k" = 0x4a
    assert xor_decrypted(base64.b64encode(bytes([3, 12, 0x4A])).decode(), "ke") == "hi!"


def test_a_row_of_xbench_with_the_wrong_key_is_named(tmp_path):
    row = {"prompt": "not base64!", "answer": "Zg==", "canary": "k"}
    with pytest.raises(RowError, match=r"row 0, `prompt`: cannot be decrypted"):
        tasks_of("xbench", tmp_path, row)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_a_file_may_be_of_any_of_four_kinds(suffix, tmp_path):
    rows = [
        {"problem": "a\u2028b?", "answer": "1"},
        {"problem": 'c, "d"\n?', "answer": "2"},
    ]
    file = tmp_path / f"aime24{suffix}"
    if suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        file.write_text("\n".join(lines), encoding="utf-8")
    elif suffix == ".json":
        file.write_text(json.dumps(rows))
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        with file.open("w", encoding="utf-8", newline="") as lines:
            writer = csv.DictWriter(lines, ["problem", "answer"])
            writer.writeheader()
            writer.writerows(rows)
    tasks = load_benchmark("aime24", file).tasks
    assert [task.metadata["question"] for task in tasks] == ["a\u2028b?", 'c, "d"\n?']


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.jsonl",
            '{"question": "q"}',
            r"x\.jsonl, row 0, `answer`: missing or empty",
        ),
        ("x.jsonl", '["a"]', r"expected an object, got 'a'"),
        ("x.jsonl", "{", r"x\.jsonl cannot be read"),
        ("x.parquet", "text", r"x\.parquet cannot be read"),
        ("x.txt", "text", r"x\.txt: expected a \.jsonl, "),
        ("x.jsonl", "", r"holds no GSM8K task \(it is empty\)"),
    ],
)
def test_a_file_that_is_wrong_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_benchmark("gsm8k", tmp_path / name)


def test_a_benchmark_whose_rows_are_all_skipped_is_refused(tmp_path):
    row = {"Question": "q", "Final answer": "a", "file_name": "a.png"}
    with pytest.raises(DataError, match=r"holds no GAIA task \(1 needs a file\)"):
        tasks_of("gaia", tmp_path, row)


def test_benchmarks_are_named_with_files_folders_and_hub_names(tmp_path):
    (tmp_path / "2WikiMultihopQA.jsonl").write_text("")
    file = tmp_path / "mine.jsonl"
    file.write_text("")
    found = parse_benchmarks(
        f"2wiki, GSM8K={file},hle=some/copy,gaia=my/gaia:2023_level1:test", tmp_path
    )
    assert [benchmark.name for benchmark, _ in found] == [
        "2wiki",
        "gsm8k",
        "hle",
        "gaia",
    ]
    assert [source for _, source in found] == [
        tmp_path / "2WikiMultihopQA.jsonl",
        file,
        HubFile(repo="some/copy", split="test"),
        HubFile(repo="my/gaia", config="2023_level1", split="test"),
    ]
    ((_, source),) = parse_benchmarks("gsm8k")
    assert source == HubFile(repo="openai/gsm8k", config="main", split="test")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gsm9k", 'there is no benchmark "gsm9k": take one of aime24, aime25'),
        ("math500=a/b,math-500=a/b", 'benchmark "math500" is named twice'),
        (",", "no benchmark is named"),
        ("gsm8k=nowhere.jsonl", r"gsm8k=nowhere\.jsonl: there is no such file"),
        ("gsm8k=some/where.jsonl", "there is no such file"),
        ("gsm8k", r"must hold one file gsm8k\.jsonl\|"),
    ],
)
def test_benchmarks_that_cannot_be_found_are_refused(words, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        parse_benchmarks(words, tmp_path)


def test_a_data_set_that_the_hub_does_not_give_is_refused(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"cannot load nobody/nothing::test from the"):
        load_benchmark("hle", HubFile(repo="nobody/nothing"))


def test_the_extra_that_reads_the_hub_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r'pip install "rllib_arpo\[hub\]"'):
        load_benchmark("hle", HubFile(repo="nobody/nothing"))


def test_a_folder_that_datasets_can_load_is_read_as_from_the_hub(tmp_path, monkeypatch):
    """The real `load_dataset`, on a local repository of the layout of the Hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_jsonl(tmp_path / "test.jsonl", {"question": "1 + 1?", "answer": "#### 2"})
    loaded = load_benchmark("gsm8k", HubFile(repo=str(tmp_path)))
    assert [task.answers for task in loaded.tasks] == [("2",)]
