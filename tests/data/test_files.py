import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem, _MockFileSystem

from rllib_arpo.data.data_file import DEFAULT_COLUMNS, DataFile
from rllib_arpo.data.datasets import load_tasks
from rllib_arpo.data.files import RowsOnDisk, rows_of
from rllib_arpo.data.rows import Row
from rllib_arpo.errors import DataError
from tests.data.s3_server import BUCKET, s3_server

ROWS = [{"question": f"{number} + 1?", "answer": number + 1} for number in range(5)]


def jsonl(rows=ROWS) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_parquet(path: Path, rows=ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def answers(tasks) -> list[str]:
    return [task.answers[0] for task in tasks]


def ids(tasks) -> list[str]:
    return [task.task_id for task in tasks]


def test_a_shuffled_data_set_is_read_as_hugging_face_reads_it(tmp_path):
    data = datasets.Dataset.from_list(ROWS).shuffle(seed=3).select(range(4))
    data.save_to_disk(tmp_path / "sums", num_shards=2)
    tasks = load_tasks(tmp_path / "sums")
    read = datasets.Dataset.load_from_disk(str(tmp_path / "sums"))
    assert answers(tasks) == [str(answer) for answer in read["answer"]]
    assert ids(tasks) == ["sums/0", "sums/1", "sums/2", "sums/3"]
    assert len(list((tmp_path / "sums").glob("*.arrow"))) == 2


def test_chat_messages_of_hugging_face_become_the_prompt(tmp_path):
    chat = [{"role": "user", "content": "1 + 1?"}]
    rows = [{"prompt": chat, "reward_model": {"ground_truth": "2"}}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "chats")
    (task,) = load_tasks(tmp_path / "chats")
    assert (task.messages[0].content, task.answers) == ("1 + 1?", ("2",))


def test_a_split_of_a_saved_dict_is_chosen(tmp_path):
    splits = datasets.DatasetDict()
    splits["train"] = datasets.Dataset.from_list(ROWS[:3])
    splits["test"] = datasets.Dataset.from_list(ROWS[3:])
    splits.save_to_disk(tmp_path / "sums")
    tasks = load_tasks(DataFile(tmp_path / "sums", split="test"))
    assert answers(tasks) == ["4", "5"]
    assert ids(tasks) == ["sums/test/0", "sums/test/1"]
    for split in None, "valid":
        with pytest.raises(DataError, match=r"must be one of \['train', 'test'\]"):
            load_tasks(DataFile(tmp_path / "sums", split=split))


def test_a_bad_row_of_a_saved_data_set_has_the_number_that_hugging_face_gives(tmp_path):
    rows = [*ROWS[:4], {"question": "?", "answer": None}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "sums", num_shards=2)
    with pytest.raises(DataError, match="sums, row 4, `answer`"):
        load_tasks(tmp_path / "sums")


def test_shards_are_read_in_the_order_of_their_names(tmp_path):
    write_parquet(tmp_path / "data" / "train-1.parquet", ROWS[2:])
    write_parquet(tmp_path / "data" / "train-0.parquet", ROWS[:2])
    write_parquet(tmp_path / "data" / "test-0.parquet", ROWS[:1])
    tasks = load_tasks(tmp_path / "data" / "train-*.parquet")
    assert answers(tasks) == ["1", "2", "3", "4", "5"]
    assert ids(tasks)[:3] == ["train-0/0", "train-0/1", "train-1/0"]
    assert len(load_tasks(tmp_path / "data")) == 6


def test_a_folder_that_does_not_say_what_to_read_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    write_parquet(tmp_path / "mixed" / "a.parquet")
    (tmp_path / "mixed" / "a.jsonl").write_text(jsonl())
    for path, message in [
        ("empty", "holds no .parquet, .jsonl, .arrow file"),
        ("mixed/b*", r"named 'b\*'"),
        ("mixed", r"\.jsonl and \.parquet files: choose"),
    ]:
        with pytest.raises(DataError, match=message):
            load_tasks(tmp_path / path)
    with pytest.raises(DataError, match="has no splits"):
        load_tasks(DataFile(tmp_path / "mixed" / "a.jsonl", split="train"))


def test_a_file_without_a_known_column_is_refused_with_the_columns_it_has(tmp_path):
    path = write_parquet(tmp_path / "r.parquet", [{"q": "1 + 1?", "a": "2"}])
    with pytest.raises(DataError, match=r"has the columns \['q', 'a'\]"):
        load_tasks(path)
    columns = {"question": "q", "answer": "a"}
    assert answers(load_tasks(DataFile(path, columns=columns))) == ["2"]


def test_blank_lines_count_and_a_byte_order_mark_does_not(tmp_path):
    text = jsonl(ROWS[:1]) + "  \n" + jsonl(ROWS[1:2]) + "{\n"
    (tmp_path / "r.jsonl").write_text(text, "utf-8-sig")
    with pytest.raises(DataError, match="row 3: no JSON"):
        load_tasks(tmp_path / "r.jsonl")
    assert ids(load_tasks(tmp_path / "r.jsonl", limit=2)) == ["r/0", "r/2"]


@pytest.mark.parametrize("line", [b'{"question": "\xff", "answer": 1}', b"[" * 10**5])
def test_a_line_that_cannot_be_decoded_is_a_bad_row(tmp_path, line):
    (tmp_path / "r.jsonl").write_bytes(line + b"\n")
    with pytest.raises(DataError, match=r"r\.jsonl, row 0: no JSON"):
        load_tasks(tmp_path / "r.jsonl")


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    path = write_parquet(tmp_path / "r.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "sums")
    (arrow,) = (tmp_path / "sums").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:200])
    for broken, kind in (path, "parquet"), (tmp_path / "sums", "arrow"):
        with pytest.raises(DataError, match=f"cannot be read as .{kind}"):
            load_tasks(broken)


def test_a_file_uri_is_a_path(tmp_path):
    write_parquet(tmp_path / "r-0.parquet")
    for name in "r-0.parquet", "*.parquet", "":
        tasks = load_tasks(f"file://{tmp_path}/{name}")
        assert answers(tasks) == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("base", [_MockFileSystem(), None])
def test_any_file_system_of_pyarrow_serves(tmp_path, base):
    filesystem = base or SubTreeFileSystem(str(tmp_path), LocalFileSystem())
    with filesystem.open_output_stream("r.jsonl") as file:
        file.write(jsonl().encode())
    rows = RowsOnDisk(filesystem=filesystem, paths=("r.jsonl",), place="r", name="r")
    read = [
        row.fields for row in rows_of(rows, DEFAULT_COLUMNS) if isinstance(row, Row)
    ]
    assert read == ROWS


@pytest.fixture
def keys(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def test_files_of_an_object_store_are_read(tmp_path, keys):
    whole = write_parquet(tmp_path / "r.parquet").read_bytes()
    objects = {
        "train/a.parquet": whole,
        "train/b.parquet": whole,
        "rows.jsonl": jsonl().encode(),
        "bad.jsonl": b'{"question": "?"}\n',
    }
    with s3_server(objects) as query:
        shards = load_tasks(f"s3://{BUCKET}/train/*.parquet{query}")
        lines = load_tasks(f"s3://{BUCKET}/rows.jsonl{query}")
        for key, message in [
            ("bad.jsonl", r"^s3://bucket/bad\.jsonl, row 0, `answer`"),
            ("none.jsonl", r"^s3://bucket/none\.jsonl is no file"),
        ]:
            with pytest.raises(DataError, match=message):
                load_tasks(f"s3://{BUCKET}/{key}{query}")
    assert answers(shards) == ["1", "2", "3", "4", "5"] * 2
    assert ids(shards)[4:6] == ["a/4", "b/0"]
    assert answers(lines) == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    "uri", ["s3://AKIA:hush@bucket/r.jsonl", "s3://bucket/r.jsonl?secret_key=hush"]
)
def test_a_uri_with_a_key_in_it_is_refused_without_showing_it(uri):
    with pytest.raises(DataError, match="environment variables") as refusal:
        load_tasks(uri)
    assert "hush" not in str(refusal.value)


def test_a_uri_that_pyarrow_does_not_know_is_refused():
    with pytest.raises(DataError, match=r"ftp://host/r\.jsonl cannot be reached"):
        load_tasks("ftp://host/r.jsonl")
