"""The real command in processes of its own, as a user runs it."""

import json
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rllib_arpo import ARPO
from rllib_arpo.cli import main
from rllib_arpo.cli_config import find_checkpoint
from rllib_arpo.errors import ConfigError
from tests.commands import LIMIT_S, finish, run, start
from tests.locked_runs import locked_by_another
from tests.models import save_tiny_model
from tests.tokenizers import qwen_like

CHECKPOINTED_MODULE = "learner_group/learner/rl_module/default_policy/module_state.pkl"


def records(run_folder: Path) -> list[dict]:
    file = run_folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, questions, documents, traces, and mistakes."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = qwen_like()
    tokenizer.save_pretrained(folder / "model")
    save_tiny_model(folder / "model", vocab_size=len(tokenizer))
    rows = [
        {
            "data_source": "test",
            "prompt": [{"role": "user", "content": f"{number} + 1?"}],
            "ability": ability,
            "reward_model": {"ground_truth": str(number + 1), "style": "rule"},
            "extra_info": {"index": number, "question": "", "split": "train"},
            "metadata": None,
        }
        for number, ability in enumerate(["math", "qa", "math", "qa"])
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    (folder / "bad.jsonl").write_text('{"question": "1 + 1?"}\n')
    (folder / "bad_config.py").write_text("import nonsense_module\n")
    (folder / "no_config.py").write_text("config = 3\n")
    for checkpoint in ("begun/checkpoints/iteration_000010", "alone"):
        (folder / checkpoint).mkdir(parents=True)
        (folder / checkpoint / ARPO.METADATA_FILE_NAME).touch()
        (folder / checkpoint / "contents.json").write_text("{}")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "facts.txt").write_text("The height of vifel is 44.\n")
    messages = [
        {"role": "user", "content": "What is the height of vifel?"},
        {"role": "assistant", "content": "<search> height of vifel </search>"},
        {"role": "tool", "content": "height vifel 44"},
        {"role": "assistant", "content": "<answer> \\boxed{44} </answer>"},
    ]
    (folder / "traces.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    return folder


TRAIN = "train --data rows.parquet --model model"
# Words of the command, and what its one line must hold.
MISTAKES = {
    "model": ("train --data rows.parquet --model nowhere", 'no model "nowhere"'),
    "no model": ("train --data rows.parquet", "--data and --model are both needed"),
    "row": ("train --data bad.jsonl --model model", "bad.jsonl, row 0, `answer`"),
    "corpus": (f"{TRAIN} --corpus nowhere", "nowhere"),
    "search": (f"{TRAIN} --search searxng", "'searxng' needs `endpoint`"),
    "search of a model": (
        "evaluate model --data rows.parquet --search searxng",
        "'searxng' needs `endpoint`",
    ),
    "address": (
        f"{TRAIN} --search searxng --search-endpoint nowhere",
        "must be an address",
    ),
    "config file": ("train none.py", "there is no config file none.py"),
    "failing config": ("train bad_config.py", "No module named 'nonsense_module'"),
    "no config": ("train no_config.py", "must define `config`, an ARPOConfig"),
    "value": (f"{TRAIN} --lr high", "Invalid value for '--lr'"),
    "range": (f"{TRAIN} --iterations 0", "Invalid value for '--iterations'"),
    "flag": (f"{TRAIN} --speed 3", "--speed"),
    "batch": (
        f"{TRAIN} --batch-size 3 --num-learners 2",
        "--batch-size (3) must be a multiple of --num-learners (2)",
    ),
    "no effect": ("train no_config.py --lr 1", "--lr has no effect with no_config.py"),
    "resume": ("train --resume corpus", "corpus holds no checkpoint"),
    "checkpoint of a run": (
        "train --resume begun/checkpoints/iteration_000010",
        "begun to go on from its newest one, or begin a run with these weights "
        "(rllib-arpo export begun/checkpoints/iteration_000010 MODEL, then",
    ),
    "checkpoint of no run": (
        "train --resume alone",
        "alone is a checkpoint, and --resume takes the folder of a run: begin a run",
    ),
    "evaluate": ("evaluate corpus --data rows.parquet", "corpus holds no checkpoint"),
}


# Found before Ray starts and after; the others need not pay for a process.
IN_A_PROCESS = ("model", "row")


@pytest.fixture(scope="module")
def refused(place: Path) -> dict[str, tuple[int, str, str]]:
    """What mistakes in processes of their own give."""
    started = {
        name: start(*MISTAKES[name][0].split(), "--out", f"out {name}", folder=place)
        for name in IN_A_PROCESS
    }
    return {name: finish(process) for name, process in started.items()}


def check_refusal(name: str, code: object, err: str) -> None:
    lines = err.splitlines()
    assert code == 2, err
    assert len(lines) == 1, err
    assert lines[0].startswith("Error: ")
    assert MISTAKES[name][1] in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_the_command_ends_a_mistake_with_one_line_and_code_2(refused, name):
    code, _, err = refused[name]
    check_refusal(name, code, err)


@pytest.mark.parametrize("name", [n for n in MISTAKES if n not in IN_A_PROCESS])
def test_a_mistake_is_one_line_and_exit_code_2(name, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["rllib-arpo", *MISTAKES[name][0].split()])
    with pytest.raises(SystemExit) as ended:
        main()
    check_refusal(name, ended.value.code, capsys.readouterr().err)


@pytest.mark.parametrize("words", ["train --resume begun", f"{TRAIN} --out new"])
def test_a_run_that_another_process_trains_is_left_alone(
    words, place, monkeypatch, capsys
):
    folder = place / words.split()[-1]
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["rllib-arpo", *words.split()])
    with locked_by_another(folder):
        before = sorted(folder.rglob("*"))
        with pytest.raises(SystemExit) as ended:
            main()
        assert sorted(folder.rglob("*")) == before
    assert ended.value.code == 2
    assert f"another process trains in {folder}" in capsys.readouterr().err


def test_debug_shows_the_traceback(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["rllib-arpo", "train", "none.py", "--debug"])
    with pytest.raises(ConfigError, match=r"there is no config file none\.py"):
        main()


def test_info_names_the_versions(place):
    lines = dict(
        line.split(maxsplit=1)
        for line in run("info", folder=place).splitlines()
        if line.startswith(("rllib_arpo", "torch", "python"))
    )
    assert lines["torch"] == torch.__version__
    assert lines["python"] == sys.version.split()[0]


@pytest.fixture(scope="module")
def trained(place: Path) -> str:
    """Two iterations by flags, as the output on the terminal."""
    flags = (
        "--corpus corpus --iterations 2 --batch-size 2 --group-size 2 "
        "--max-response-tokens 32 --lr 1 --eval-data rows.parquet --out run"
    )
    return run(*TRAIN.split(), *flags.split(), folder=place)


@pytest.fixture(scope="module")
def resumed(place: Path, trained: str) -> str:
    return run(*["train", "--resume", "run", "--iterations", "3"], folder=place)


@pytest.fixture(scope="module")
def exported(place: Path, resumed: str) -> Path:
    run("export", "run", "exported", folder=place)
    return place / "exported"


@pytest.mark.slow
def test_training_by_flags_fills_a_run_and_prints_where_time_went(place, trained):
    for name in ("generate", "tools", "learn", "sync"):
        assert any(name in line and "%" in line for line in trained.splitlines())
    folder = place / "run"
    for name in ("config.json", "curves.png", "checkpoints", "model/model.safetensors"):
        assert (folder / name).exists()
    first = records(folder)[0]
    assert first["num_tokens_sampled"] > 0
    assert first["time_generate_s"] > 0
    assert first["time_learn_s"] > 0


@pytest.mark.slow
def test_a_resumed_run_goes_on_where_it_stopped(place, resumed):
    assert [record["iteration"] for record in records(place / "run")] == [1, 2, 3]


@pytest.mark.slow
def test_an_exported_folder_holds_the_learners_weights(place, exported):
    state = pickle.loads(
        (find_checkpoint(place / "run") / CHECKPOINTED_MODULE).read_bytes()
    )
    learned = AutoModelForCausalLM.from_pretrained(place / "model")
    start_weights = {n: p.detach().clone() for n, p in learned.named_parameters()}
    for name, parameter in learned.named_parameters():
        parameter.data = torch.from_numpy(state[name].astype("float32"))
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    ids = AutoTokenizer.from_pretrained(exported)("1 + 1?", return_tensors="pt")
    with torch.no_grad():
        expected = learned(ids["input_ids"]).logits
        torch.testing.assert_close(loaded(ids["input_ids"]).logits, expected)
    # Weight decay alone moves every matrix, so this is not the model of the start.
    assert any(
        not torch.equal(parameter, start_weights[name])
        for name, parameter in loaded.named_parameters()
    )


@pytest.mark.slow
def test_a_run_and_a_folder_of_the_same_model_evaluate_alike(place, exported):
    common = ["--temperature", "0", "--num-tasks", "2", "--json"]
    tools = [
        *("--corpus", "corpus", "--data", "rows.parquet"),
        *("--max-response-tokens", "32"),
    ]
    processes = [
        start("evaluate", "run", *common, "run.json", folder=place),
        start("evaluate", exported, *tools, *common, "model.json", folder=place),
    ]
    for process in processes:
        code, out, err = finish(process)
        assert code == 0, err
        assert "2 tasks, 1 answers each" in out
    of_run, of_model = (
        json.loads((place / name).read_text()) for name in ("run.json", "model.json")
    )
    assert of_run["num_tokens_sampled"] > 0
    assert of_run["num_tokens_sampled"] == of_model["num_tokens_sampled"]


@pytest.mark.slow
def test_what_a_run_brings_with_it_is_refused_as_a_flag(
    place, trained, monkeypatch, capsys
):
    monkeypatch.chdir(place)
    for flags in ("--engine torch", "--max-tool-calls 3", "--browse"):
        words = ["rllib-arpo", "evaluate", "run", *flags.split()]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        err = capsys.readouterr().err
        assert f"{flags.split()[0]} has no effect with" in err
        assert "a checkpoint that brings its own settings: leave it out" in err


@pytest.mark.slow
def test_sft_learns_from_chats(place):
    flags = "--iterations 4 --batch-size 4 --lr 0.01 --out sft"
    run("sft", "model", "--data", "traces.jsonl", *flags.split(), folder=place)
    losses = [record["negative_log_likelihood"] for record in records(place / "sft")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    AutoModelForCausalLM.from_pretrained(place / "sft" / "model")


@pytest.fixture
def endless(place: Path) -> Iterator[subprocess.Popen]:
    flags = (
        "--iterations 100000 --batch-size 1 --group-size 2 --max-response-tokens 8 "
        "--out endless"
    )
    stdout = place / "endless.txt"
    process = start(*TRAIN.split(), *flags.split(), folder=place, stdout=stdout)
    yield process
    if process.poll() is None:
        process.kill()
    shutil.rmtree(place / "endless")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(
    place, endless, number, expected
):
    metrics = place / "endless" / "metrics.jsonl"
    deadline = time.monotonic() + LIMIT_S
    while not (metrics.exists() and metrics.read_text().count("\n")):
        assert time.monotonic() < deadline
        assert endless.poll() is None, endless.communicate()
        time.sleep(0.1)
    endless.send_signal(number)
    code, _, err = finish(endless)
    assert code == expected, err
    assert "Traceback" not in err
    said = (place / "endless.txt").read_text()
    command = f"rllib-arpo train --resume {place / 'endless'} --iterations 100000"
    assert command in " ".join(said.split())
    # All that was learned is saved.
    last = records(place / "endless")[-1]["iteration"]
    assert find_checkpoint(place / "endless").name == f"iteration_{last:06d}"
    assert f"iteration {last} is saved" in said
