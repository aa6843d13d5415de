"""Attempts of model-written code to get out of the sandbox or to take it down.

Each prints ESCAPED when it gets its way, and would in a plain interpreter. What it
is after is real: a file, a variable, servers and a process of the host.
"""

import asyncio
import json
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import pytest

import rllib_arpo
from rllib_arpo.errors import ToolError
from rllib_arpo.tools.python_subprocess import SandboxLimits, SubprocessPythonTool
from tests.tools.bubblewrap import needs_bubblewrap

LIMITS = SandboxLimits(
    time_s=0.5, memory_mb=128, output_bytes=20000, file_mb=1, state_mb=1
)
PATIENT = replace(LIMITS, time_s=60)  # for code that must get through

# {x} is replaced by the attribute x of `Host`.
FILES = {
    "read a file": "print(open({file!r}).read(), 'ESCAPED')",
    "read the system's files": "print(open('/etc/passwd').read(), 'ESCAPED')",
    "list the file's folder": "import os\nos.listdir({folder!r}); print('ESCAPED')",
    "overwrite a file": "open({file!r}, 'w').write('gone'); print('ESCAPED')",
    "delete a file": "import os\nos.remove({file!r}); print('ESCAPED')",
    "make a file beside it": "open({folder!r} + '/new', 'w'); print('ESCAPED')",
    "write into the system": "open('/usr/lib/evil', 'w'); print('ESCAPED')",
    "write into the root": "open('/evil', 'w'); print('ESCAPED')",
    "write into a package": """
import numpy
open(numpy.__file__, 'a').write('#'); print('ESCAPED')""",
    "write into the worker": """
open('/worker/python_worker/child.py', 'a').write('#'); print('ESCAPED')""",
    "write into /dev": "open('/dev/evil', 'w'); print('ESCAPED')",
    "write into /dev/shm": "open('/dev/shm/evil', 'w'); print('ESCAPED')",
    "read a disk": """
import os
for name in os.listdir('/dev'):
    if name not in ('null', 'zero', 'urandom'): print('ESCAPED', name)
open('/dev/vda', 'rb')""",
    "make a device": "import os\nos.mknod('/tmp/d', 0o20600, 259); print('ESCAPED')",
    "follow a symbolic link": """
import os
os.symlink({file!r}, '/tmp/link'); print(open('/tmp/link').read(), 'ESCAPED')""",
    "follow a link upwards": """
print(open('/tmp/../../../../..' + {file!r}).read(), 'ESCAPED')""",
    "follow a hard link": """
import os
os.link({file!r}, '/tmp/link'); print(open('/tmp/link').read(), 'ESCAPED')""",
    "change the root": "import os\nos.chroot('/tmp'); print('ESCAPED')",
    "read the source tree": "print(open({source!r}).read(), 'ESCAPED')",
    "import this package": "import rllib_arpo; print('ESCAPED')",
    "import other packages": "import torch; print('ESCAPED')",
    "keep a file for the next call": """
import os
print('ESCAPED' * os.path.exists('/tmp/kept')); open('/tmp/kept', 'w')""",
    "keep a folder that cannot be emptied": """
import os
print('ESCAPED' * os.path.exists('/tmp/locked'))
os.makedirs('/tmp/locked/in'); os.chmod('/tmp/locked', 0)""",
    "lock the temp folder": "import os\nos.chmod('/tmp', 0)",
    "nest folders without end": """
import os
for _ in range(3000): os.mkdir('d'); os.chdir('d')""",
    "fill the disk with one file": """
with open('/tmp/big', 'wb') as file:
    for _ in range(100): file.write(bytes(1 << 20))
print('ESCAPED')""",
    "fill the disk with many files": """
for i in range(100):
    with open(f'/tmp/{{i}}', 'wb') as file: file.write(bytes(1 << 20))
print('ESCAPED')""",
    "open thousands of files": """
files = [open('/dev/null') for _ in range(5000)]; print('ESCAPED')""",
}
ENVIRONMENT = {
    "read the environment": """
import os
if os.environ.get('ARPO_TEST_SECRET'): print('ESCAPED')
print(dict(os.environ))""",
    "read the host's environment": """
import glob
for file in glob.glob('/proc/*/environ'): print(open(file).read(), 'ESCAPED')""",
    "run printenv": """
import os
print(os.popen('printenv').read())""",
}
NETWORK = {
    "connect by TCP": """
import socket
socket.create_connection(('127.0.0.1', {tcp_port}), 1).send(b'x'); print('ESCAPED')""",
    "send by UDP": """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.sendto(b'x', ('127.0.0.1', {udp_port})); print('ESCAPED')""",
    "connect to a Unix socket": """
import socket
socket.socket(socket.AF_UNIX).connect({unix_socket!r}); print('ESCAPED')""",
    "connect to an abstract socket": """
import socket
socket.socket(socket.AF_UNIX).connect(chr(0) + {abstract!r}); print('ESCAPED')""",
    "look up a name": """
import socket
socket.getaddrinfo('example.com', 80); print('ESCAPED')""",
    "open a raw socket": """
import socket
socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); print('ESCAPED')""",
    "listen": """
import socket
socket.create_server(('127.0.0.1', 0)); print('ESCAPED')""",
    "fetch a page": """
import urllib.request
urllib.request.urlopen('http://127.0.0.1:{tcp_port}/', timeout=1); print('ESCAPED')""",
    "make a netlink socket": """
import socket
socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0); print('ESCAPED')""",
}
PROCESSES = {
    "fork": "import os\nif os.fork(): print('ESCAPED')",
    "bomb with forks": "import os\nwhile True: os.fork()",
    "bomb with forks that ignore errors": """
import os
while True:
    try:
        os.fork(); print('ESCAPED')
    except OSError: pass""",
    "bomb with threads": """
import threading, time
for _ in range(1000): threading.Thread(target=time.sleep, args=(9,)).start()
print('ESCAPED')""",
    "leave a daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
print('ESCAPED')""",
    "run a shell": """
import subprocess
print(subprocess.run(['/bin/sh', '-c', 'echo ESC''APED'], capture_output=True))""",
    "run a shell by system": "import os\nif not os.system('true'): print('ESCAPED')",
    "become a shell": "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo ESC''APED'])",
    "become another Python": """
import os, sys
os.execv(sys.executable, ['python', '-c', 'print("ESC" "APED")'])""",
    "spawn by multiprocessing": """
import multiprocessing
p = multiprocessing.get_context('fork').Process(target=print, args=('ESCAPED',))
p.start(); p.join()""",
    "kill the host's process": "import os\nos.kill({victim}, 9); print('ESCAPED')",
    "kill the parent": "import os\nos.kill(os.getppid(), 9); print('ESCAPED')",
    "kill process 1": "import os\nos.kill(1, 9); print('ESCAPED')",
    "kill everything": "import os\nos.kill(-1, 9); print('ESCAPED')",
    "kill the group": "import os\nos.killpg(0, 15); print('ESCAPED')",
    "kill the neighbours": """
import os
for pid in range(1, 3000):
    if pid != os.getpid():
        try: os.kill(pid, 9); print('ESCAPED')
        except OSError: pass""",
    "stop the parent": """
import os, signal
os.kill(os.getppid(), signal.SIGSTOP); print('ESCAPED')""",
    "limit the parent": """
import os, resource
resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1)); print('ESCAPED')""",
    "slow the parent down": """
import os
os.setpriority(os.PRIO_PROCESS, os.getppid(), 19); print('ESCAPED')""",
    "trace the parent": """
import ctypes, os
libc = ctypes.CDLL(None)
if libc.ptrace(16, os.getppid(), 0, 0) == 0: print('ESCAPED')""",
    "read the parent's memory": """
import os
open(f'/proc/{{os.getppid()}}/mem', 'rb'); print('ESCAPED')""",
    "read its memory by a system call": """
import ctypes, os
libc = ctypes.CDLL(None)
buffer = ctypes.create_string_buffer(8)
here = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 8)
if libc.process_vm_readv(os.getppid(), here, 1, here, 1, 0) > 0: print('ESCAPED')""",
    "write to its own memory file": """
open('/proc/self/mem', 'r+b'); print('ESCAPED')""",
    "list the host's processes": """
import os
if len([n for n in os.listdir('/proc') if n.isdigit()]) > 3: print('ESCAPED')""",
}
KERNEL = {
    f"call {name}": f"""
import ctypes
if ctypes.CDLL(None).{call} == 0: print('ESCAPED')"""
    for name, call in {
        "mount": "mount(b'none', b'/tmp', b'tmpfs', 0, None)",
        "umount": "umount2(b'/tmp', 2)",
        "unshare": "unshare(0x10000000)",
        "setns": "setns(0, 0)",
        "sethostname": "sethostname(b'evil', 4)",
        "kexec_load": "syscall(246, 0, 0, 0, 0)",
        "reboot": "reboot(0xfee1dead)",
        "settimeofday": "settimeofday(b'0' * 16, None)",
        "personality": "personality(0x0040000)",
    }.items()
} | {
    "call fork through the x32 table": """
import ctypes
if ctypes.CDLL(None).syscall(0x40000000 + 57) >= 0: print('ESCAPED')""",
    "call clone3": """
import ctypes
if ctypes.CDLL(None).syscall(435, b'0' * 88, 88) >= 0: print('ESCAPED')""",
    "lift the limits": """
import resource
resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); print('ESCAPED')""",
    "take memory that outlives the call": """
import ctypes
if ctypes.CDLL(None).shmget(7, 1 << 20, 0o1600) >= 0: print('ESCAPED')""",
    "take memory that no limit counts": """
import os
os.memfd_create('x'); print('ESCAPED')""",
    "become root": "import os\nos.setuid(0); print('ESCAPED' * (os.getuid() == 0))",
    "crash by ctypes": "import ctypes\nctypes.string_at(0); print('ESCAPED')",
}
EXHAUSTION = {
    "a list": "x = [0] * 10**9; print('ESCAPED')",
    "a growing list": """
x = []
while len(x) < 10**8: x += range(10**6)
print('ESCAPED')""",
    "a bytearray": "x = bytearray(10**9); print('ESCAPED')",
    "an array": "import numpy as np\nx = np.ones(10**9); print('ESCAPED')",
    "a mapping": "import mmap\nx = mmap.mmap(-1, 10**9); print('ESCAPED')",
    "a string": "x = 'a' * 10**9; print('ESCAPED')",
    "an endless loop": "while True: pass",
    "a loop that ignores signals": """
import signal
for s in range(1, 65):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass""",
    "a loop that catches everything": """
while True:
    try:
        while True: pass
    except BaseException: pass""",
    "an endless sleep": "import time\ntime.sleep(10**6); print('ESCAPED')",
    "endless output": "while True: print('spam' * 100)",
    "a huge line": "print('x' * 10**7); print('ESCAPED')",
    "output by the file descriptor": """
import os
for _ in range(1000): os.write(1, b'x' * 10**5)
print('ESCAPED')""",
    "endless errors": "import sys\nwhile True: sys.stderr.write('spam' * 100)",
    "recursion": "def f(): return f()\nf(); print('ESCAPED')",
    "recursion without a limit": """
import sys
sys.setrecursionlimit(10**9)
def f(): return f()
f(); print('ESCAPED')""",
    "recursion in C": """
x = []
for _ in range(10**6): x = [x]
print(str(x)[0], 'ESCAPED')""",
    "a nested program": "eval('(' * 10**5 + ')' * 10**5); print('ESCAPED')",
    "a huge integer": "x = 10 ** (10 ** 9); print('ESCAPED')",
    "digits of an integer": "print(str(10 ** 10 ** 6)); print('ESCAPED')",
    "a slow pattern": """
import re
re.match(r'(a+)+$', 'a' * 50 + 'b'); print('ESCAPED')""",
    "a compression bomb": """
import zlib
packer = zlib.compressobj()
bomb = b''.join(packer.compress(bytes(10**6)) for _ in range(500)) + packer.flush()
print(len(zlib.decompress(bomb)), 'ESCAPED')""",
    "factors of a number": "import sympy\nsympy.factorint(10**120 + 7**130 + 1)",
    "exit": "import os\nos._exit(0)",
    "an abort": "import os\nos.abort()",
    "a signal to itself": "import os\nos.kill(os.getpid(), 9)",
    "a stop signal to itself": "import os\nos.kill(os.getpid(), 19)",
    "closed files": "import os\nos.closerange(0, 100)",
    "a crash by the fault handler": "import faulthandler\nfaulthandler._sigsegv()",
}
TRICKS = {
    "garbage in the reply": """
import os
for fd in range(3, 64):
    try: os.write(fd, os.urandom(10**5)); os.write(fd, b'ESCAPED')
    except OSError: pass""",
    "a huge length in the reply": r"""
import os
os.write(3, b'\xff' * 4 + b'x' * 10**5); os._exit(0)""",
    "half a reply": r"""
import os
os.write(3, b'\0\0\1\0abc'); os._exit(0)""",
    "a reply that is no reply": r"""
import os
os.write(3, b'\0\0\0\4\0\0\0\11'); os._exit(0)""",
    "a reply with too many variables": r"""
import os
size = (1 << 20) + 5
body = b'\0\0\0\0' * 2 + b'\0\0\0\3set' + size.to_bytes(4, 'big') + bytes(size)
data = len(body).to_bytes(4, 'big') + body
while data: data = data[os.write(3, data):]
os._exit(0)""",
    "an open reply": "import os, time\nos.close(3); time.sleep(600)",
    "the worker's socket among the objects": """
import gc, socket
for thing in gc.get_objects():
    if isinstance(thing, socket.socket) and thing.fileno() >= 0:
        thing.send(b'garbage'); print('ESCAPED')""",
    "other calls among the objects": """
import gc
for thing in gc.get_objects():
    if type(thing) in (list, dict) and 'S0ME' + 'THING' in str(thing)[:10**5]:
        print('ESCAPED')""",
    "patched modules": """
import builtins, json, os, pickle, sys, traceback
import cloudpickle
def evil(*a, **k): raise RuntimeError('evil')
for module in (json, os, pickle, traceback, cloudpickle):
    for name in dir(module):
        if callable(getattr(module, name)): setattr(module, name, evil)
sys.stdout = None
builtins.print = builtins.repr = builtins.len = evil""",
    "an exit that does not": "import os\nos._exit = lambda code: None",
    "a value that cannot be shown": """
class Evil:
    def __repr__(self): raise SystemExit(5)
Evil()""",
    "a value that is never shown": """
class Evil:
    def __repr__(self):
        while True: pass
Evil()""",
    "a value of a long text": """
class Evil:
    def __repr__(self): return 'x' * 10**7
Evil()""",
    "an error that cannot be shown": """
class Evil(Exception):
    def __str__(self): raise Evil
raise Evil""",
    "an error of a long text": "raise ValueError('x' * 10**7)",
    "an object that never dies": """
class Evil:
    def __del__(self):
        while True: pass
x = Evil(); del x""",
    "a handler at exit": """
import atexit
@atexit.register
def evil():
    while True: pass""",
    "variables that are not variables": "globals()[5] = 6; globals()['\\ud800'] = 7",
    "a tracer": "import sys\nsys.settrace(lambda *a: 1 / 0)",
    "an alarm": """
import signal
signal.signal(signal.SIGALRM, lambda *a: 1 / 0)
signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)""",
    "a garbage collector's callback": """
import gc
gc.callbacks.append(lambda *a: 1 / 0)""",
    "text that is not Unicode": "print('\\ud800')",
}
CORPUS = FILES | ENVIRONMENT | NETWORK | PROCESSES | KERNEL | EXHAUSTION | TRICKS
# What must fail without bubblewrap too; nothing that would hurt if it did not.
WITHOUT_BUBBLEWRAP = [
    *NETWORK,
    *("fork", "leave a daemon", "bomb with threads", "become a shell"),
    *("run a shell", "run a shell by system", "spawn by multiprocessing"),
    *("kill the host's process", "kill the parent", "stop the parent"),
    *("limit the parent", "slow the parent down", "trace the parent"),
    *("call unshare", "call clone3", "take memory that no limit counts"),
    *("crash by ctypes", "lift the limits", "take memory that outlives the call"),
    *("a list", "an array", "a mapping", "an endless loop", "endless output"),
    *("a huge line", "recursion", "exit", "an abort", "a loop that ignores signals"),
    *("fill the disk with one file", "open thousands of files", "closed files"),
    *("garbage in the reply", "patched modules", "read the environment"),
]


@dataclass
class Host:
    """What the code is after."""

    file: str
    folder: str
    source: str
    secret: str
    tcp: socket.socket
    udp: socket.socket
    unix: socket.socket
    abstract_server: socket.socket
    unix_socket: str
    abstract: str
    victim_process: "subprocess.Popen[bytes]"

    @property
    def tcp_port(self) -> int:
        return self.tcp.getsockname()[1]

    @property
    def udp_port(self) -> int:
        return self.udp.getsockname()[1]

    @property
    def victim(self) -> int:
        return self.victim_process.pid

    def fill_in(self, code: str) -> str:
        names = ["file", "folder", "source", "unix_socket", "abstract"]
        names += ["tcp_port", "udp_port", "victim"]
        return code.format(**{name: getattr(self, name) for name in names})

    def is_untouched(self) -> bool:
        return (
            Path(self.file).read_text() == self.secret
            and {p.name for p in Path(self.folder).iterdir()} == {"secret", "socket"}
            and self.victim_process.poll() is None
            and not any(map(_has_been_reached, self.servers))
        )

    @property
    def servers(self) -> list[socket.socket]:
        return [self.tcp, self.udp, self.unix, self.abstract_server]


def _has_been_reached(server: socket.socket) -> bool:
    try:
        if server.type == socket.SOCK_DGRAM:
            server.recv(1)
        else:
            server.accept()[0].close()
    except BlockingIOError:
        return False
    return True


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("host")
    secret = secrets.token_hex()
    (folder / "secret").write_text(secret)
    os.environ["ARPO_TEST_SECRET"] = secret
    tcp = socket.create_server(("127.0.0.1", 0))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    unix, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    unix.bind(str(folder / "socket"))
    abstract.bind(f"\0{secret[:20]}")
    victim = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    host = Host(
        file=str(folder / "secret"),
        folder=str(folder),
        source=sys.modules[SubprocessPythonTool.__module__].__file__ or "",
        secret=secret,
        tcp=tcp,
        udp=udp,
        unix=unix,
        abstract_server=abstract,
        unix_socket=str(folder / "socket"),
        abstract=secret[:20],
        victim_process=victim,
    )
    for server in host.servers:
        server.setblocking(False)
    unix.listen()
    abstract.listen()
    yield host
    del os.environ["ARPO_TEST_SECRET"]
    victim.communicate(b"\n")
    for server in host.servers:
        server.close()


def outcome(tool: SubprocessPythonTool, code: str) -> str:
    try:
        return asyncio.run(tool.call(code))
    except ToolError as error:
        assert not error.retryable, error
        return f"{type(error).__name__}: {error}"


def test_the_corpus_is_large():
    assert len(CORPUS) >= 40


@needs_bubblewrap
@pytest.mark.parametrize("attempt", CORPUS)
def test_code_does_not_get_out_and_the_next_call_is_served(attempt, host):
    tool = SubprocessPythonTool(limits=LIMITS, max_workers=1)
    code = host.fill_in(CORPUS[attempt])
    # Twice, for an attempt may need what an earlier one has left.
    for _ in range(2 if attempt.startswith("keep") else 1):
        result = outcome(tool, code)
        assert "ESCAPED" not in result
        assert host.secret not in result
        assert len(result) <= LIMITS.output_bytes
    assert host.is_untouched()
    plain = SubprocessPythonTool(max_workers=1)
    assert outcome(plain, "import os, json\nprint(os.listdir())\nlen('ab') + 2") == (
        "[]\n4"
    )


@needs_bubblewrap
def test_nothing_runs_on_after_a_call(host):
    others = psutil.Process().children()
    tool = SubprocessPythonTool(limits=LIMITS, max_workers=3)  # a pool of its own
    for attempt in PROCESSES:
        outcome(tool, host.fill_in(PROCESSES[attempt]))
    left: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    # The child that waits for the next call may have yet to start.
    while not left:
        assert time.monotonic() < deadline
        left = [
            below
            for bubblewrap in psutil.Process().children()
            if bubblewrap not in others
            for process_1 in bubblewrap.children()
            for below in process_1.children(recursive=True)
        ]
    outcome(tool, "1")
    assert psutil.wait_procs(left, timeout=60)[1] == []


@needs_bubblewrap
def test_a_pickle_that_runs_code_runs_it_in_the_sandbox_only(host):
    tool = SubprocessPythonTool(limits=PATIENT, max_workers=1)
    evil = f"""
class Evil:
    def __reduce__(self):
        return exec, ("open({host.file!r}, 'w').write('gone')",)
x = Evil()"""
    assert outcome(tool, evil) == ""
    copied = pickle.loads(pickle.dumps(tool)).fork()
    result = outcome(copied, "print('x' in globals())")
    assert (
        result == "False\n(the variables of earlier calls are lost: FileNotFoundError)"
    )
    assert host.is_untouched()


@needs_bubblewrap
def test_the_worker_survives_every_attempt_at_exhaustion():
    tool = SubprocessPythonTool(limits=LIMITS, max_workers=1)
    outcome(tool, "1")
    workers = {p.pid for p in psutil.Process().children()}
    for attempt in ("an abort", "exit", "a bytearray", "garbage in the reply"):
        outcome(tool, CORPUS[attempt].replace("{{", "{").replace("}}", "}"))
    assert workers <= {p.pid for p in psutil.Process().children()}


# Not by way of the package's __init__, which imports Ray and takes seconds.
IMPORT = f"""
import sys, types
sys.modules["rllib_arpo"] = package = types.ModuleType("rllib_arpo")
package.__path__ = [{str(Path(rllib_arpo.__file__).parent)!r}]
import asyncio, json
from rllib_arpo.errors import ToolError
from rllib_arpo.tools.python_subprocess import SandboxLimits, SubprocessPythonTool
"""
FALLBACK = """
async def outcomes(codes, limits):
    limits = SandboxLimits(**limits)
    for code in codes:
        tool = SubprocessPythonTool(limits=limits, max_workers=1)
        assert not tool.sandboxed
        try:
            yield await tool.call(code)
        except ToolError as error:
            yield f"{type(error).__name__}: {error}" + "RETRYABLE" * error.retryable
        assert await SubprocessPythonTool(max_workers=1).call("2 + 2") == "4"

async def main():
    codes, limits = json.load(sys.stdin)
    print(json.dumps([each async for each in outcomes(codes, limits)]))

asyncio.run(main())
"""


def outcomes_without_bubblewrap(
    codes: list[str], limits: SandboxLimits
) -> tuple[list[str], str]:
    """Outcomes, each followed by a plain call that worked, and the log."""
    ran = subprocess.run(
        [sys.executable, "-c", IMPORT + FALLBACK],
        input=json.dumps([codes, asdict(limits)]),
        env={"PATH": "", "ARPO_TEST_SECRET": "secret"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout), ran.stderr


def test_without_bubblewrap_processes_network_and_memory_are_still_limited(host):
    codes = [host.fill_in(CORPUS[attempt]) for attempt in WITHOUT_BUBBLEWRAP]
    results, log = outcomes_without_bubblewrap(codes, LIMITS)
    for attempt, result in zip(WITHOUT_BUBBLEWRAP, results, strict=True):
        assert "ESCAPED" not in result, attempt
        assert "RETRYABLE" not in result, attempt
    assert host.is_untouched()
    assert log.count("without a sandbox") == 1
    assert "bubblewrap (bwrap) is not installed" in log


def test_the_attempts_are_real_for_without_bubblewrap_files_are_open(host):
    attempts = ["read a file", "follow a symbolic link", "import this package"]
    codes = [host.fill_in(CORPUS[attempt]) for attempt in attempts]
    codes[1] = codes[1].replace("/tmp/link", "link")
    results, _ = outcomes_without_bubblewrap(codes, PATIENT)
    assert [host.secret in result for result in results] == [True, True, False]


@needs_bubblewrap
def test_workers_die_with_their_host():
    code = """
print(asyncio.run(SubprocessPythonTool().call("7")), flush=True)
input()"""
    host = subprocess.Popen(
        [sys.executable, "-c", IMPORT + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with host:
        assert host.stdout is not None
        assert host.stdout.readline() == b"7\n"
        workers = psutil.Process(host.pid).children(recursive=True)
        assert workers
        os.kill(host.pid, signal.SIGKILL)
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive and gone
