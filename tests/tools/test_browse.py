import asyncio
import functools
import json
import pickle
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import psutil
import pytest

from rllib_arpo.errors import ConfigError, ToolError, ToolTimeoutError
from rllib_arpo.tools import page_worker
from rllib_arpo.tools.browse import BrowseTool
from rllib_arpo.tools.fetch import FetchLimits, PageFetcher
from rllib_arpo.tools.tool import Tool
from tests.children import children_running
from tests.tools.unruly_server import UnrulyServer, page, sends, silence

QUESTION = "Who designed the Kestrel bridge, and when?"
GERMAN = (
    "Die Brücke über den Fluß ist schön und führt nach Köln. Früher gab es dort nur "
    "eine Fähre, für die man lange Schlange stehen mußte."
)
FILLER = "".join(
    f"<p>Paragraph {i} is about the weather in the valley, which is mild.</p>"
    for i in range(200)
)
BRIDGE = "<p>The Kestrel bridge was designed by Ada Low in 1931.</p>"
ARTICLE = (
    "<html><head><title>Bridges \n of the valley</title><style>p {color: red}</style>"
    "<script>var secret = 1;</script></head><body><nav><a href='/'>Home</a></nav>"
    f"<article><h1>Bridges</h1>{FILLER}{BRIDGE}{FILLER}</article></body></html>"
).encode()


def browse(server: UnrulyServer, path: str = "/", **settings) -> str:
    limits = FetchLimits(total_s=5.0)
    tool = BrowseTool(QUESTION, local_fetcher(server, limits=limits), **settings)
    return asyncio.run(tool.call(server.url(path)))


def local_fetcher(server: UnrulyServer, **settings) -> PageFetcher:
    return PageFetcher(
        allowed_networks=("127.0.0.1/32",), allowed_ports=(server.port,), **settings
    )


def answer_to(body: bytes, content_type: str = "text/html", **settings) -> str:
    with UnrulyServer({"/": page(body, content_type)}) as server:
        return browse(server, **settings)


def pdf(*pages: str, title: str = "") -> bytes:
    """A PDF file with a line of text a page."""
    objects = ["<</Type/Catalog/Pages 2 0 R>>", ""]
    kids: list[str] = []
    for text in pages:
        stream = f"BT /F1 12 Tf 50 700 Td ({text}) Tj ET"
        objects.append(f"<</Length {len(stream)}>>stream\n{stream}\nendstream")
        objects.append(
            "<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]"
            f"/Contents {len(objects)} 0 R/Resources<</Font<</F1<</Type/Font"
            "/Subtype/Type1/BaseFont/Helvetica>>>>>>>>"
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<</Type/Pages/Kids[{' '.join(kids)}]/Count {len(kids)}>>"
    objects.append(f"<</Title({title})>>")
    file = BytesIO(b"%PDF-1.4\n")
    file.seek(0, 2)
    offsets: list[int] = []
    for number, content in enumerate(objects, start=1):
        offsets.append(file.tell())
        file.write(f"{number} 0 obj\n{content}\nendobj\n".encode("latin-1"))
    start = file.tell()
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    file.write(
        f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n"
        f"<</Size {len(objects) + 1}/Root 1 0 R/Info {len(objects)} 0 R>>\n"
        f"startxref\n{start}\n%%EOF".encode()
    )
    return file.getvalue()


def test_it_is_a_tool():
    tool = BrowseTool(QUESTION, PageFetcher())
    assert isinstance(tool, Tool)
    assert tool.fork() is tool


def test_the_passages_of_the_question_come_with_title_and_address():
    with UnrulyServer({"/": page(ARTICLE)}) as server:
        answer = browse(server)
        opening = f"Title: Bridges of the valley\nURL: {server.url('/')}\n\n"
    assert answer.startswith(opening)
    assert "designed by Ada Low in 1931" in answer
    assert "passages, those nearest to the question)" in answer
    assert "secret" not in answer
    assert "color: red" not in answer


def test_an_answer_keeps_within_its_tokens():
    with UnrulyServer({"/": page(ARTICLE)}) as server:
        for max_tokens in (100, 240, 1000):
            words = functools.partial(browse, server, count_tokens=len)
            answer = words(max_tokens=4 * max_tokens)
            assert "Ada Low" in answer
            assert len(answer) <= 4 * max_tokens + 2 * len("\n[...]\n")


def test_a_short_page_is_given_whole():
    answer = answer_to(b"<p>Ada Low designed it.</p>")
    assert answer.endswith("\n\nAda Low designed it.")
    assert "passages" not in answer


def test_lists_and_tables_are_read():
    rows = "".join(f"<tr><td>bridge {i}</td><td>{1900 + i}</td></tr>" for i in range(9))
    body = (
        f"<html><body><article>{BRIDGE * 5}<table>{rows}</table>"
        "<ul><li>Kestrel</li></ul></article></body></html>"
    )
    answer = answer_to(body.encode(), max_tokens=2000)
    assert "| bridge 3 | 1903 |" in answer
    assert "- Kestrel" in answer


def test_plain_text_is_read_as_it_is():
    assert answer_to(b"Ada <b>Low</b>", "text/plain").endswith("\n\nAda <b>Low</b>")


def test_pdf_files_are_read():
    file = pdf("The Kestrel bridge is by Ada Low", "Page two", title="On bridges")
    answer = answer_to(file, "application/pdf")
    assert answer.startswith("Title: On bridges\nURL: ")
    assert "The Kestrel bridge is by Ada Low" in answer
    assert "Page two" in answer


def test_a_long_pdf_file_is_read_to_a_limit_and_the_answer_says_so():
    texts = [f"This is page {i}" for i in range(page_worker.MAX_PDF_PAGES + 5)]
    answer = answer_to(pdf(*texts), "application/pdf", max_tokens=10_000)
    assert f"This is page {page_worker.MAX_PDF_PAGES - 1}" in answer
    assert f"This is page {page_worker.MAX_PDF_PAGES}" not in answer
    assert answer.endswith("; the end of the page was not read)")


def test_a_long_text_is_read_to_a_limit_and_the_answer_says_so():
    body = b"Kestrel bridge. " * (page_worker.MAX_TEXT_CHARS // 16 + 1000)
    answer = answer_to(body, "text/plain")
    assert answer.endswith("; the end of the page was not read)")


@pytest.mark.parametrize(
    ("text", "charset", "declared"),
    [
        ("Brücke über den Fluß", "utf-8", "utf-8"),
        ("Brücke über den Fluß", "utf-8", None),
        ("Brücke über den Fluß", "utf-8", "iso-8859-1"),
        ("Brücke über den Fluß", "utf-8", "ascii"),
        ("Brücke über den Fluß", "utf-8-sig", "cp1252"),
        ("Brücke über den Fluß", "iso-8859-1", "iso-8859-1"),
        (GERMAN, "iso-8859-1", "utf-8"),
        (GERMAN, "iso-8859-1", None),
        ("“Brücke” über den Fluß", "cp1252", "iso-8859-1"),
        ("Brücke über den Fluß", "utf-16", None),
        ("鎔接大橋由李春設計", "gb18030", "gb2312"),
        ("橋の設計者は誰ですか", "iso2022_jp", "iso-2022-jp"),
        ("橋の設計者は誰ですか", "shift_jis", "shift_jis"),
        ("Мост построил Иван", "koi8-r", "koi8-r"),
    ],
)
@pytest.mark.parametrize("kind", ["header", "meta"])
def test_the_charset_is_found_though_it_is_declared_wrongly(
    text, charset, declared, kind
):
    content_type, meta = "text/html", ""
    if declared and kind == "header":
        content_type += f"; charset={declared}"
    elif declared:
        meta = f'<meta charset="{declared}">'
    body = f"<html><head>{meta}</head><body><p>{text}</p></body></html>"
    assert answer_to(body.encode(charset), content_type).endswith("\n\n" + text)


def test_utf16_without_a_mark_is_read_as_declared():
    body = "<p>Ada Low</p>".encode("utf-16-le")
    answer = answer_to(body, "text/html; charset=utf-16-le")
    assert answer.endswith("\n\nAda Low")


@pytest.mark.parametrize(
    "charset",
    ["no-such-charset", "zlib", "base64", "undefined", "idna", "a" * 5000],
)
def test_a_charset_that_cannot_be_right_does_no_harm(charset):
    body = f"<p>{GERMAN}</p>"
    answer = answer_to(body.encode("cp1252"), f"text/html; charset={charset}")
    assert GERMAN in answer


def test_damaged_utf8_stays_utf8():
    body = f"<p>{GERMAN}</p>".encode().replace(b"sch\xc3\xb6n", b"sch\xffn")
    assert GERMAN.replace("schön", "sch\ufffdn") in answer_to(body)


@pytest.mark.parametrize(
    ("body", "content_type", "message"),
    [
        (b"<html><body></body></html>", "text/html", "has no text"),
        (b"<script>app()</script><div id=root></div>", "text/html", "has no text"),
        (b" \n ", "text/plain", "has no text"),
        (pdf(""), "application/pdf", "has no text"),
        (b"%PDF-1.7 and nothing", "application/pdf", "damaged or of an unknown"),
        (pdf("text")[:200], "application/pdf", "damaged or of an unknown"),
        (b"<html>log in</html>", "application/pdf", "damaged or of an unknown"),
        (bytes(range(256)) * 40, "text/html", "it is not text"),
        (b"\x89PNG\r\n\x1a\n" + bytes(500), "text/plain", "it is not text"),
        (b"\x7fELF" + bytes(500), "application/octet-stream", "it is not text"),
        (zlib.compress(ARTICLE), "", "it is not text"),
    ],
)
def test_a_page_without_text_is_an_error_with_a_reason(body, content_type, message):
    with pytest.raises(ToolError, match=message) as caught:
        answer_to(body, content_type)
    assert not caught.value.retryable


@pytest.mark.parametrize(
    "body",
    [
        b"<div>" * 200_000 + b"deep",
        b"<" * 200_000,
        b"<p>" + b"&amp;" * 200_000,
        b"<!DOCTYPE x [<!ENTITY a 'ha'><!ENTITY b '&a;&a;&a;'>]><p>&b;</p>" * 1000,
        b"<!--" * 100_000,
        b"<a href='" + b"x" * 500_000,
    ],
    ids=["deep", "open", "entities", "doctypes", "comments", "endless tag"],
)
def test_hostile_markup_is_read_or_refused_and_the_next_page_is_read(body):
    with UnrulyServer({"/bad": page(body), "/good": page(ARTICLE)}) as server:
        try:
            assert browse(server, "/bad").startswith("URL: ")
        except ToolError as error:
            assert str(error).startswith("the page ")
        assert "Ada Low" in browse(server, "/good")


def test_a_bomb_in_a_pdf_file_is_refused():
    packed = zlib.compress(bytes(100_000_000))
    stream = b"<</Length %d/Filter/FlateDecode>>stream\n%s\nendstream"
    file = pdf("to be replaced")
    start, end = file.index(b"3 0 obj"), file.index(b"4 0 obj")
    packed_object = stream % (len(packed), packed)
    file = file[:start] + b"3 0 obj\n" + packed_object + b"\nendobj\n" + file[end:]
    with pytest.raises(ToolError, match="cannot be read"):
        answer_to(file, "application/pdf")


def test_outside_files_are_not_read_into_a_page(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret of the house")
    body = (
        f'<!DOCTYPE html [<!ENTITY x SYSTEM "{secret.as_uri()}">]>'
        f"<html><body><p>hello &x;</p></body></html>"
    )
    for content_type in ("text/html", "application/xhtml+xml"):
        assert "secret of the house" not in answer_to(body.encode(), content_type)


def test_a_parser_that_takes_too_long_is_ended_and_the_next_page_is_read():
    with UnrulyServer({"/": page(ARTICLE * 200)}) as server:
        url, fetcher = server.url("/"), local_fetcher(server)
        hasty = BrowseTool(QUESTION, fetcher, extract_timeout_s=0.01)
        with pytest.raises(ToolError, match="takes too long or too much memory"):
            asyncio.run(hasty.call(url))
        assert "Ada Low" in asyncio.run(BrowseTool(QUESTION, fetcher).call(url))


def kill_workers() -> int:
    workers = children_running(page_worker.__file__)
    for worker in workers:
        worker.kill()
    psutil.wait_procs(workers)
    return len(workers)


@pytest.fixture
def other_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], None]]:
    """Gives the workers a program in place of trafilatura."""

    def give(program: str) -> None:
        (tmp_path / "trafilatura.py").write_text(program)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        kill_workers()

    yield give
    kill_workers()


def test_a_page_is_read_though_all_idle_workers_were_killed():
    assert "Ada Low" in answer_to(ARTICLE, extract_timeout_s=600.0)
    assert kill_workers()
    assert "Ada Low" in answer_to(ARTICLE, extract_timeout_s=600.0)


# A library that ends its process at its work.
ENDING = """
import os, signal
extract = None
def load_html(text): {}
"""


@pytest.mark.parametrize(
    ("end", "says", "retryable"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", r"outside \(exit status -9\)", True),
        ("raise MemoryError", "takes too long or too much memory", False),
        ("os.abort()", "takes too long or too much memory", False),
    ],
    ids=["killed", "no memory", "no memory in C"],
)
def test_a_page_is_blamed_only_for_what_it_did_to_its_worker(
    end, says, retryable, other_library
):
    other_library(ENDING.format(end))
    with pytest.raises(ToolError, match=says) as caught:
        answer_to(ARTICLE)
    assert caught.value.retryable == retryable


def test_many_pages_are_read_at_once_by_few_workers():
    async def read_all(tool: BrowseTool, url: str) -> list[str]:
        return await asyncio.gather(*(tool.call(url) for _ in range(8)))

    with UnrulyServer({"/": page(ARTICLE)}) as server:
        tool = BrowseTool(QUESTION, local_fetcher(server))
        for _ in range(2):
            answers = asyncio.run(read_all(tool, server.url("/")))
            assert len(set(answers)) == 1
    workers = children_running(page_worker.__file__)
    assert 1 <= len(workers) <= page_worker.MAX_WORKERS


def test_an_abandoned_call_leaves_the_others_alone():
    async def abandon(tool: BrowseTool, url: str) -> str:
        call = asyncio.ensure_future(tool.call(url))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait({call})
        return await tool.call(url)

    with UnrulyServer({"/": page(ARTICLE)}) as server:
        tool = BrowseTool(QUESTION, local_fetcher(server))
        assert "Ada Low" in asyncio.run(abandon(tool, server.url("/")))


def test_errors_of_the_fetcher_reach_the_model():
    answers = {"/503": sends(b"HTTP/1.1 503 x\r\n\r\n"), "/slow": silence}
    with UnrulyServer(answers) as server:
        with pytest.raises(ToolError, match="503 Service Unavailable") as caught:
            browse(server, "/503")
        assert caught.value.retryable
        tool = BrowseTool(
            QUESTION, local_fetcher(server, limits=FetchLimits(total_s=0.2))
        )
        with pytest.raises(ToolTimeoutError):
            asyncio.run(tool.call(server.url("/slow")))
        with pytest.raises(ToolError, match="the address is empty"):
            asyncio.run(tool.call(" \n"))


class Shelf:
    """Keeps texts by the arguments they were found with."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    async def fetch(self, *, backend, version, arguments, call) -> str:
        key = json.dumps([backend, version, arguments])
        if key not in self.texts:
            self.texts[key] = await call()
        return self.texts[key]


def test_the_text_of_a_page_is_fetched_once_for_all_questions():
    shelf = Shelf()
    with UnrulyServer({"/": page(ARTICLE), "/gone": sends()}) as server:
        url, fetcher = server.url("/"), local_fetcher(server)
        answers = [
            asyncio.run(BrowseTool(question, fetcher, cache=shelf).call(url))
            for question in (QUESTION, QUESTION, "What is paragraph 77?")
        ]
        assert len(server.requests) == 1
        with pytest.raises(ToolError):
            browse(server, "/gone", cache=shelf)
    assert len(shelf.texts) == 1
    assert "Ada Low" in answers[0]
    assert answers[1] == answers[0]
    assert "Paragraph 77 is" in answers[2]
    assert "Ada Low" not in answers[2]


def test_a_tool_travels_to_other_processes():
    with UnrulyServer({"/": page(ARTICLE)}) as server:
        tool = BrowseTool(QUESTION, local_fetcher(server))
        copy = pickle.loads(pickle.dumps(tool))
        assert "Ada Low" in asyncio.run(copy.call(server.url("/")))


@pytest.mark.parametrize("settings", [{"max_tokens": 0}, {"extract_timeout_s": 0}])
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError):
        BrowseTool(QUESTION, PageFetcher(), **settings)
