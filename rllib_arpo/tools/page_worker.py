"""The text of pages and PDF files, in processes that can be killed.

Parsers of hostile files may run for ever or take all memory, where no thread stops
them. So a worker reads pages, each a line of JSON and then the body, with an alarm
set that the system itself ends it by; the next page starts another. A worker that
something else ended, such as the OOM killer while it was idle, is replaced. This file
is also the worker's program: run by its path, it imports nothing else of the package
there.
"""

import codecs
import contextlib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

MAX_WORKERS = 4
MEMORY_BYTES = 2 << 30
MAX_TEXT_CHARS = 1_000_000
MAX_PDF_PAGES = 200
# Of the text, read for its charset and whether it is text at all.
SAMPLE_CHARS = 20_000
MAX_CONTROL_SHARE = 0.05
MAX_BROKEN_SHARE = 0.1  # of the characters beyond ASCII, in UTF-8 that was damaged
READY = b"ready\n"
OUT_OF_MEMORY = 3  # exit status of a worker
# What ends a worker at its limits: the timer, and memory that Python, a library in C or
# the stack does not get.
LIMITS = (-signal.SIGALRM, OUT_OF_MEMORY, -signal.SIGABRT, -signal.SIGSEGV)
# What pages mean that declare the older and smaller charset.
WIDER_CHARSETS = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
}


class PageText(NamedTuple):
    """What a page says.

    Attributes:
        title: empty when it has none.
        text: one paragraph a line, empty when it has none.
        whole: whether that is all of it.
    """

    title: str
    text: str
    whole: bool


def extract_text(
    body: bytes, *, kind: str, charset: str | None, timeout_s: float
) -> PageText | str:
    """The text of a page, or why it cannot be read, in a few words.

    Blocks until a worker answers or is ended by its alarm; for threads of `threads()`.

    Args:
        body: of the page.
        kind: "html", "text" or "pdf".
        charset: as declared, which may be wrong.
        timeout_s: seconds for the parsers.

    Raises:
        ConfigError: the worker's packages cannot be imported.
        ToolError: one worker after the other was ended by something else.
    """
    request = {
        "kind": kind,
        "charset": charset,
        "timeout_s": timeout_s,
        "length": len(body),
    }
    whole = json.dumps(request).encode() + b"\n" + body
    try:
        worker = _idle.pop()
    except IndexError:
        worker = _start_worker()
    answer = _ask(worker, whole)
    if answer is None:
        worker = _start_worker()
        answer = _ask(worker, whole)
    if answer is None:
        from rllib_arpo.errors import ToolError  # not to be had in the worker

        raise ToolError(
            "the page was not read: two workers were ended from outside (exit status "
            f"{worker.returncode}), maybe for want of memory",
            retryable=True,
        )
    return answer


def threads() -> ThreadPoolExecutor:
    """Threads to wait for the workers in, as many as there may be workers."""
    return _threads


_threads = ThreadPoolExecutor(MAX_WORKERS, thread_name_prefix="page-text")
_idle: list["subprocess.Popen[bytes]"] = []
_inherited: list["subprocess.Popen[bytes]"] = []


def _start_worker() -> "subprocess.Popen[bytes]":
    worker = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert worker.stdout is not None
    if worker.stdout.readline() != READY:
        from rllib_arpo.errors import ConfigError  # not to be had in the worker

        _stop(worker)
        raise ConfigError(
            "trafilatura or pypdf cannot be imported, see what `python -c 'import "
            'trafilatura, pypdf\'` says; pip install "rllib_arpo[web]"'
        )
    return worker


def _ask(worker: "subprocess.Popen[bytes]", request: bytes) -> PageText | str | None:
    """The text or why it cannot be read; None: the worker was ended from outside."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    reply = b""
    with contextlib.suppress(BrokenPipeError):
        worker.stdin.write(request)
        worker.stdin.flush()
        reply = worker.stdout.readline()
    if reply.endswith(b"\n"):
        _idle.append(worker)
        answer = json.loads(reply)
        return answer if isinstance(answer, str) else PageText(*answer)
    status = worker.wait()
    _stop(worker)
    if status in LIMITS:
        return "its text takes too long or too much memory to read"
    return None


def _stop(worker: "subprocess.Popen[bytes]") -> None:
    worker.kill()
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdout.close()
    with contextlib.suppress(BrokenPipeError):  # what it did not read any more
        worker.stdin.close()
    worker.wait()


def _stop_workers() -> None:
    while _idle:
        _stop(_idle.pop())


def _forget_workers() -> None:
    """In a forked child: pipes and threads are the parent's."""
    global _threads
    _threads = ThreadPoolExecutor(MAX_WORKERS, thread_name_prefix="page-text")
    _inherited.extend(_idle)
    _idle.clear()


def _decode(body: bytes, declared: str | None) -> str:
    """The text, by byte order mark, declared charset or, where that fails, a guess.

    What is valid UTF-8 and not plain ASCII is UTF-8, whatever is declared; so is what
    fits nothing else and is almost valid.
    """
    for mark, charset in (
        (b"\xef\xbb\xbf", "utf-8-sig"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    ):
        if body.startswith(mark):
            return body.decode(charset, errors="replace")
    charsets = ["utf-8"]
    if declared:
        charsets.insert(0 if body.isascii() else 1, declared)
    for charset in charsets:
        try:
            name = codecs.lookup(charset).name
            return body.decode(WIDER_CHARSETS.get(name, name))
        except (LookupError, ValueError):
            continue  # there is no such charset, or the body is not in it
    lenient = body.decode("utf-8", errors="replace")
    num_wide = len(lenient) - len(lenient.encode("ascii", errors="ignore"))
    if lenient.count("\ufffd") <= MAX_BROKEN_SHARE * num_wide:
        return lenient
    from charset_normalizer import from_bytes

    guess = from_bytes(body[:SAMPLE_CHARS]).best()
    return body.decode(guess.encoding if guess else "cp1252", errors="replace")


def _is_text(text: str) -> bool:
    sample = text[:SAMPLE_CHARS]
    strange = sum(c == "\ufffd" or (c < " " and c not in "\t\n\r\f") for c in sample)
    return strange <= MAX_CONTROL_SHARE * len(sample)


def _meta_charset(body: bytes) -> str | None:
    import re

    found = re.search(rb"""charset\s*=\s*["']?([\w.:-]+)""", body[:2048], re.I)
    return found[1].decode("ascii") if found else None


def _html_text(text: str) -> tuple[str, str]:
    from trafilatura import extract, load_html

    # A fragment, such as a single paragraph, is taken for no page unless wrapped.
    tree = load_html(text)
    if tree is None:
        tree = load_html(f"<html><body>{text}</body></html>")
    if tree is None:
        return "", ""
    title = " ".join((tree.findtext(".//title") or "").split())
    return title, extract(tree, favor_recall=True) or ""


def _pdf_text(body: bytes) -> tuple[str, str, bool]:
    from io import BytesIO

    from pypdf import PdfReader

    reader = PdfReader(BytesIO(body))
    title = str((reader.metadata and reader.metadata.title) or "")
    texts: list[str] = []
    num_chars = 0
    for page in reader.pages[:MAX_PDF_PAGES]:
        texts.append(page.extract_text())
        num_chars += len(texts[-1])
        if num_chars > MAX_TEXT_CHARS:
            break
    whole = len(texts) == len(reader.pages)
    return title, "\n\n".join(texts), whole


def _read(body: bytes, kind: str, charset: str | None) -> PageText | str:
    whole = True
    if kind == "pdf":
        title, text, whole = _pdf_text(body)
    else:
        if kind == "html":
            charset = charset or _meta_charset(body)
        title, text = "", _decode(body, charset)
        if not _is_text(text):
            return "it is not text"
        if kind == "html":
            title, text = _html_text(text)
    return PageText(title, text[:MAX_TEXT_CHARS], whole and len(text) <= MAX_TEXT_CHARS)


def _serve() -> None:
    import resource

    import pypdf  # noqa: F401  loaded before the first alarm is set
    import trafilatura  # noqa: F401

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a parser prints is taken for a reply
    replies.write(READY)
    replies.flush()
    while line := sys.stdin.buffer.readline():
        request: dict[str, Any] = json.loads(line)
        body = sys.stdin.buffer.read(request["length"])
        signal.setitimer(signal.ITIMER_REAL, request["timeout_s"])
        try:
            answer = _read(body, request["kind"], request["charset"])
        except MemoryError:
            sys.exit(OUT_OF_MEMORY)  # so bloated, it reads no further page
        except Exception:  # boundary: whatever the parsers cannot do is not readable
            answer = "the file is damaged or of an unknown kind"
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(answer).encode() + b"\n")
        replies.flush()


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file, whose modules are no top-level names
    _serve()
else:
    import atexit

    atexit.register(_stop_workers)
    os.register_at_fork(after_in_child=_forget_workers)
