"""How a Python worker is confined: bubblewrap where it works, else rlimits.

In bubblewrap the worker is process 1 of its own namespaces. It sees the interpreter,
its libraries and the packages that the tool offers, read-only; a private `/tmp` of
`TEMP_MB`; no network, no `/proc`, no environment, no capability. User namespaces
make that possible without privileges; many containers forbid them, so it is tried
once, with the very command that starts a worker.

Without bubblewrap a worker has no environment, a session and a working folder of its
own, rlimits and, on Linux, the filter of system calls (no network, no other
processes). Files are NOT protected: the code reads and writes whatever this user
may, `/proc` included, where the environment of the user's other processes is.
"""

import functools
import importlib.util
import json
import os
import platform
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rllib_arpo.tools.python_seccomp import refusal_program
from rllib_arpo.tools.python_worker.messages import Settings

TEMP_MB = 64  # of the private /tmp
PROBE_S = 60.0
HOW_TO_SANDBOX = (
    "install bubblewrap (apt install bubblewrap, dnf install bubblewrap), and in a "
    "container allow unprivileged user namespaces (Docker: --security-opt "
    "seccomp=unconfined --security-opt apparmor=unconfined)"
)

_WORKER = Path(__file__).with_name("python_worker")
_PACKAGES = ("numpy", "scipy", "sympy", "mpmath", "gmpy2", "cloudpickle")
_PACKAGES_IN_SANDBOX = "/packages"
_START = (
    "import json, sys; settings = json.loads(sys.argv[1]); "
    "sys.path += [settings['home'], *settings['packages']]; "
    "from python_worker.worker import main; main(settings)"
)


def environment(temp: str) -> dict[str, str]:
    """The whole environment of a worker; nothing of this process's goes in.

    Huge pages halve the time of a fork, since there is less to copy; they need all
    memory to come from malloc.
    """
    return {
        "HOME": temp,
        "TMPDIR": temp,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTHONMALLOC": "malloc",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "MKL_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def worker_command(*, sandboxed: bool, temp: str, probe: bool = False) -> list[str]:
    """What starts a worker, with `environment(temp)` and a socket as its stdin.

    Args:
        sandboxed: in bubblewrap.
        temp: working folder; "/tmp" in bubblewrap.
        probe: only try whether a worker could start.
    """
    settings = Settings(
        home="/worker" if sandboxed else str(_WORKER.parent),
        packages=[_PACKAGES_IN_SANDBOX]
        if sandboxed
        else sorted({os.path.dirname(folder) for folder in _package_folders()}),
        temp=temp,
        seccomp=refusal_program(platform.machine()).hex(),
        sandboxed=sandboxed,
        probe=probe,
    )
    # No site: neither .pth files nor other packages; the script's folder is no path.
    python = [_interpreter(), "-B", "-P", "-S", "-s", "-c", _START]
    command = [*python, json.dumps(settings)]
    return [*_bubblewrap(), "--", *command] if sandboxed else command


@functools.cache
def sandbox_problem() -> str | None:
    """Why bubblewrap cannot be used here, None when it can; tried once a process."""
    if sys.platform != "linux":
        return f"there is no bubblewrap for {sys.platform}"
    if shutil.which("bwrap") is None:
        return "bubblewrap (bwrap) is not installed"
    try:
        tried = subprocess.run(
            worker_command(sandboxed=True, temp="/tmp", probe=True),
            env=environment("/tmp"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_S,
        )
    except subprocess.TimeoutExpired:
        return f"bubblewrap did not start Python within {PROBE_S:g} s"
    if tried.returncode:
        lines = tried.stderr.strip().splitlines() or ["no message"]
        return f"bubblewrap cannot start Python: {lines[-1]}"
    return None


def new_temp_folder(*, sandboxed: bool) -> str:
    """The working folder of a new worker; to be removed after it unless "/tmp"."""
    return "/tmp" if sandboxed else tempfile.mkdtemp(prefix="python-tool-")


def _bubblewrap() -> list[str]:
    bwrap = shutil.which("bwrap")
    assert bwrap is not None
    read_only = [*_system_folders(), *_interpreter_files()]
    hidden = _other_packages(read_only)
    packages = [path for folder in _package_folders() for path in _with_libs(folder)]
    return [
        bwrap,
        *("--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534"),
        *("--cap-drop", "ALL", "--hostname", "sandbox"),
        *("--die-with-parent", "--new-session", "--as-pid-1"),
        *_each("--ro-bind", read_only),
        *(part for folder in hidden for part in ("--tmpfs", folder)),
        # Not where they are: an environment below /tmp would be hidden by our own.
        *(
            part
            for package in packages
            for part in ("--ro-bind", package, _place_in_sandbox(package))
        ),
        *("--ro-bind", str(_WORKER), f"/worker/{_WORKER.name}"),
        *_each("--dev-bind", ["/dev/null", "/dev/zero", "/dev/urandom"]),
        *("--size", str(TEMP_MB << 20), "--tmpfs", "/tmp"),
        *(part for folder in ["/", *hidden] for part in ("--remount-ro", folder)),
        *("--chdir", "/tmp"),
    ]


def _each(option: str, paths: list[str]) -> Iterator[str]:
    """Bind every path where it is."""
    for path in paths:
        yield from (option, path, path)


def _interpreter() -> str:
    """The program behind a virtual environment's link."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _system_folders() -> list[str]:
    """Shared libraries and time zones."""
    folders = ["/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64"]
    folders += ["/etc/ld.so.cache", "/usr/share/zoneinfo"]
    return [folder for folder in folders if os.path.exists(folder)]


def _interpreter_files() -> list[str]:
    """The interpreter, the standard library and the libraries beside it."""
    folders = {os.path.join(sys.base_prefix, name) for name in ("lib", "lib64")}
    folders |= {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    outside = [
        folder
        for folder in sorted(folders)
        if os.path.isdir(folder) and _inside(folder, [sys.base_prefix])
    ]
    return [*outside, _interpreter()]


def _other_packages(read_only: list[str]) -> list[str]:
    """Folders of installed packages that are in sight and must not be."""
    stdlib = sysconfig.get_path("stdlib")
    candidates = {
        *site.getsitepackages(),
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        os.path.join(stdlib, "site-packages"),
        os.path.join(stdlib, "dist-packages"),
        "/usr/lib/python3/dist-packages",
    }
    return sorted(
        folder
        for folder in candidates
        if os.path.isdir(folder) and _inside(folder, read_only)
    )


def _inside(path: str, folders: list[str]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _package_folders() -> list[str]:
    """Where the packages are that the code may import, found without importing."""
    specs = (importlib.util.find_spec(name) for name in _PACKAGES)
    return [
        folder
        for spec in specs
        if spec is not None
        for folder in (spec.submodule_search_locations or [])
    ]


def _place_in_sandbox(package: str) -> str:
    return f"{_PACKAGES_IN_SANDBOX}/{os.path.basename(package)}"


def _with_libs(folder: str) -> list[str]:
    """A package, and the folder of libraries that wheels put beside it."""
    libs = f"{folder}.libs"
    return [folder, libs] if os.path.isdir(libs) else [folder]
