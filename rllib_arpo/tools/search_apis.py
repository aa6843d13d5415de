"""What search services are asked and how they answer, one class a service.

    serper      Google's results by serper.dev
    brave       Brave's own index
    bing        any service that speaks Bing Web Search v7
    searxng     a SearXNG instance that allows the JSON format
    retrieval   the retrieval server of Search-R1, a corpus of one's own

Each is a frozen record of settings, all of which change what is found. None holds a
key: it names the environment variable that does. `search_http.py` does the asking.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from rllib_arpo.errors import ToolError
from rllib_arpo.tools.search import Document


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiRequest:
    """What is sent.

    Attributes:
        method: "POST" sends `content` as JSON, "GET" sends none.
        params: of the query string.
        content: of the body.
        headers: besides the usual ones.
    """

    method: Literal["GET", "POST"]
    params: Mapping[str, str | int] = field(default_factory=dict)
    content: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


class SearchApi(Protocol):
    """The wire format of one service; its fields are what is found depends on.

    Attributes:
        name: of the kind of service.
        refusal: what 401, 402 or 403 means.
        key_problems: parts of an answer that mean the same with another status.
        endpoint: the whole address that is asked.
        key_variable: environment variable with the key; "" when none is needed.
    """

    name: ClassVar[str]
    refusal: ClassVar[str]
    key_problems: ClassVar[Sequence[str]]

    @property
    def endpoint(self) -> str: ...

    @property
    def key_variable(self) -> str: ...

    def request(self, query: str, top_k: int, key: str) -> ApiRequest:
        """What to send.

        Raises:
            ToolError: the service takes no such query.
        """
        ...

    def documents(self, answer: Any) -> list[Document]:
        """What was found, best first.

        Args:
            answer: the decoded JSON.

        Raises:
            ToolError: it is no answer of this service, or one of a service in trouble.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Serper:
    """Google by serper.dev: the answer box, what Google knows, and the pages.

    Attributes:
        country: "gl", such as "us"; "" leaves it to the service, as below.
        language: "hl", such as "en".
        location: a place's name, such as "Boston, Massachusetts, United States".
    """

    name: ClassVar[str] = "serper"
    refusal: ClassVar[str] = "the key is wrong or its credits are used up"
    key_problems: ClassVar[Sequence[str]] = ("Not enough credits",)
    endpoint: str = "https://google.serper.dev/search"
    key_variable: str = "SERPER_API_KEY"
    country: str = "us"
    language: str = "en"
    location: str = ""

    def request(self, query: str, top_k: int, key: str) -> ApiRequest:
        content = {
            "q": query,
            "num": top_k,
            **_given(gl=self.country, hl=self.language, location=self.location),
        }
        headers = _given(**{"X-API-KEY": key})
        return ApiRequest(method="POST", content=content, headers=headers)

    def documents(self, answer: Any) -> list[Document]:
        box = _mapping(answer, "answerBox")
        known = _mapping(answer, "knowledgeGraph")
        found = [
            Document(
                _text(box, "answer") or _text(box, "snippet"),
                _text(box, "title"),
                _text(box, "link"),
            ),
            Document(
                _text(known, "description"),
                _text(known, "title"),
                _text(known, "descriptionLink"),
            ),
        ]
        return [document for document in found if document.text] + [
            Document(_text(page, "snippet"), _text(page, "title"), _text(page, "link"))
            for page in _items(answer, "organic")
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Brave:
    """Brave Search.

    Attributes:
        country: such as "us"; "" leaves it to the service, as below.
        language: "search_lang", such as "en".
        safesearch: "off", "moderate" or "strict".
    """

    MAX_RESULTS: ClassVar[int] = 20
    MAX_CHARS: ClassVar[int] = 400
    MAX_WORDS: ClassVar[int] = 50
    name: ClassVar[str] = "brave"
    refusal: ClassVar[str] = "the key is wrong or its quota is used up"
    key_problems: ClassVar[Sequence[str]] = ("SUBSCRIPTION_TOKEN_INVALID",)
    endpoint: str = "https://api.search.brave.com/res/v1/web/search"
    key_variable: str = "BRAVE_API_KEY"
    country: str = "us"
    language: str = "en"
    safesearch: str = "moderate"

    def request(self, query: str, top_k: int, key: str) -> ApiRequest:
        if len(query) > self.MAX_CHARS or len(query.split()) > self.MAX_WORDS:
            raise ToolError(
                f"the search query is too long, at most {self.MAX_CHARS} characters "
                f"and {self.MAX_WORDS} words are allowed"
            )
        params = {
            "q": query,
            "count": min(top_k, self.MAX_RESULTS),
            "text_decorations": "false",
            "result_filter": "web",
            **_given(
                country=self.country.upper(),
                search_lang=self.language,
                safesearch=self.safesearch,
            ),
        }
        headers = _given(**{"X-Subscription-Token": key})
        return ApiRequest(method="GET", params=params, headers=headers)

    def documents(self, answer: Any) -> list[Document]:
        # Brave escapes what it quotes, though no HTML was asked for.
        return [
            Document(
                html.unescape(_text(page, "description")),
                html.unescape(_text(page, "title")),
                _text(page, "url"),
            )
            for page in _items(_mapping(answer, "web"), "results")
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bing:
    """A service that speaks Bing Web Search v7; Microsoft's own has ended.

    Attributes:
        market: "mkt", such as "en-US"; "" leaves it to the service.
        safesearch: "Off", "Moderate" or "Strict".
    """

    MAX_RESULTS: ClassVar[int] = 50
    name: ClassVar[str] = "bing"
    refusal: ClassVar[str] = "the key is wrong or its quota is used up"
    key_problems: ClassVar[Sequence[str]] = ()
    endpoint: str
    key_variable: str = "BING_API_KEY"
    market: str = "en-US"
    safesearch: str = "Moderate"

    def request(self, query: str, top_k: int, key: str) -> ApiRequest:
        params = {
            "q": query,
            "count": min(top_k, self.MAX_RESULTS),
            "responseFilter": "Webpages",
            "textFormat": "Raw",
            **_given(mkt=self.market, safeSearch=self.safesearch),
        }
        headers = _given(**{"Ocp-Apim-Subscription-Key": key})
        return ApiRequest(method="GET", params=params, headers=headers)

    def documents(self, answer: Any) -> list[Document]:
        return [
            Document(_text(page, "snippet"), _text(page, "name"), _text(page, "url"))
            for page in _items(_mapping(answer, "webPages"), "value")
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearXNG:
    """A SearXNG instance; "json" must be among `search.formats` of its settings.

    Attributes:
        key_variable: holds the whole `Authorization` header of a guarded instance,
            such as "Basic ...".
        language: such as "en"; "" leaves it to the instance, as below.
        categories: such as "general,science".
        engines: such as "duckduckgo,wikipedia".
        safesearch: 0, 1 or 2.
    """

    name: ClassVar[str] = "searxng"
    refusal: ClassVar[str] = "it is guarded, or its `search.formats` lacks json"
    key_problems: ClassVar[Sequence[str]] = ()
    endpoint: str
    key_variable: str = ""
    language: str = "en"
    categories: str = ""
    engines: str = ""
    safesearch: int = 1

    def request(self, query: str, top_k: int, key: str) -> ApiRequest:
        params = {
            "q": query,
            "format": "json",
            "safesearch": self.safesearch,
            **_given(
                language=self.language, categories=self.categories, engines=self.engines
            ),
        }
        return ApiRequest(
            method="GET", params=params, headers=_given(Authorization=key)
        )

    def documents(self, answer: Any) -> list[Document]:
        pages = _items(answer, "results")
        if not pages and answer.get("unresponsive_engines"):
            # Else an outage of the engines would pass for a query without results.
            raise ToolError("the search engines did not answer", retryable=True)
        return [
            Document(_text(page, "content"), _text(page, "title"), _text(page, "url"))
            for page in pages
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalServer:
    """The retrieval server of Search-R1, `POST /retrieve`.

    Attributes:
        key_variable: holds the whole `Authorization` header of a guarded server.
    """

    name: ClassVar[str] = "retrieval"
    refusal: ClassVar[str] = "it is guarded"
    key_problems: ClassVar[Sequence[str]] = ()
    endpoint: str
    key_variable: str = ""

    def request(self, query: str, top_k: int, key: str) -> ApiRequest:
        content = {"queries": [query], "topk": top_k, "return_scores": True}
        return ApiRequest(
            method="POST", content=content, headers=_given(Authorization=key)
        )

    def documents(self, answer: Any) -> list[Document]:
        found = answer.get("result") if isinstance(answer, Mapping) else None
        if not isinstance(found, list) or len(found) != 1:
            raise _malformed()
        return [_passage(hit) for hit in _items({"hits": found[0]}, "hits")]


def _passage(hit: Mapping[str, Any]) -> Document:
    r"""A document whose contents are `"Title"\ntext`."""
    document = _mapping(hit, "document")
    if not isinstance(document.get("contents"), str):
        raise _malformed()
    contents = _text(document, "contents")
    title, newline, text = contents.partition("\n")
    if not newline:
        return Document(contents)
    return Document(text.strip(), title.strip().strip('"'))


def _given(**settings: str) -> dict[str, str]:
    """Those that are not empty."""
    return {name: value for name, value in settings.items() if value}


def _items(answer: Any, name: str) -> Sequence[Mapping[str, Any]]:
    """A list of objects; an empty one when there is no such field."""
    if not isinstance(answer, Mapping):
        raise _malformed()
    items = answer.get(name) or []
    if not isinstance(items, list) or not all(isinstance(i, Mapping) for i in items):
        raise _malformed()
    return items


def _mapping(answer: Any, name: str) -> Mapping[str, Any]:
    """An object; an empty one when there is no such field."""
    if not isinstance(answer, Mapping):
        raise _malformed()
    value = answer.get(name) or {}
    if not isinstance(value, Mapping):
        raise _malformed()
    return value


def _text(item: Mapping[str, Any], name: str) -> str:
    """A text; an empty one when there is none."""
    value = item.get(name)
    return value.strip() if isinstance(value, str) else ""


def _malformed() -> ToolError:
    return ToolError("the search service's answer cannot be read", retryable=True)
