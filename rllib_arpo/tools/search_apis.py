"""Wire formats of search services: a query to a request, an answer to documents.

serper      Google's results, serper.dev
brave       Brave Search, api.search.brave.com
bing        Bing Web Search v7, and services that speak it
searxng     a SearXNG instance with its JSON format switched on
retrieval   the retrieval server of Search-R1, over a collection of one's own
"""

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rllib_arpo.tools.search import Document

_TAG = re.compile(r"</?\w[^<>]*>")


class Request(NamedTuple):
    """What is sent beside the address and the key."""

    method: str
    params: Mapping[str, Any] = {}
    body: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Locale:
    """Where and in what language is searched; None leaves it to the service.

    Attributes:
        country: two letters, "us".
        language: two letters, "en".
    """

    country: str | None = None
    language: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchAPI:
    """One service.

    Attributes:
        name: of the backend.
        endpoint: address, None where the user must give it.
        key_header: header that carries the key, None where there is none.
        key_variable: environment variable that holds it.
        request: what to send for a query, a number of documents and a locale.
        documents: the documents of a parsed answer, best first. Raises KeyError,
            TypeError, IndexError or AttributeError for an answer of another shape.
    """

    name: str
    endpoint: str | None
    key_header: str | None
    key_variable: str | None
    request: Callable[[str, int, Locale], Request]
    documents: Callable[[Any], Sequence[Document]]


def plain(text: str | None) -> str:
    """A snippet without its markup."""
    return html.unescape(_TAG.sub("", text or "")).strip()


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _found(
    results: Sequence[Mapping[str, Any]], title: str, text: str, url: str
) -> list[Document]:
    return [
        Document(plain(one.get(text)), plain(one.get(title)), one.get(url) or "")
        for one in results
    ]


def _serper(query: str, top_k: int, locale: Locale) -> Request:
    body = _given(q=query, num=top_k, gl=locale.country, hl=locale.language)
    return Request("POST", body=body)


def _brave(query: str, top_k: int, locale: Locale) -> Request:
    params = _given(
        q=query,
        count=top_k,
        country=locale.country,
        search_lang=locale.language,
    )
    return Request("GET", params=params)


def _bing(query: str, top_k: int, locale: Locale) -> Request:
    market = None
    if locale.country and locale.language:
        market = f"{locale.language}-{locale.country.upper()}"
    params = _given(
        q=query,
        count=top_k,
        mkt=market,
        cc=None if market else locale.country,
        setLang=None if market else locale.language,
    )
    return Request("GET", params=params)


def _searxng(query: str, top_k: int, locale: Locale) -> Request:
    params = _given(q=query, format="json", language=locale.language)
    return Request("GET", params=params)


def _retrieval(query: str, top_k: int, locale: Locale) -> Request:
    body = {"queries": [query], "topk": top_k, "return_scores": True}
    return Request("POST", body=body)


def _retrieved(answer: Any) -> list[Document]:
    """Search-R1 keeps the title in quotes in the first line of the contents."""
    documents: list[Document] = []
    for hit in answer["result"][0]:
        title, _, text = hit.get("document", hit)["contents"].partition("\n")
        if not text:
            title, text = "", title
        documents.append(Document(text.strip(), title.strip().strip('"')))
    return documents


APIS: Mapping[str, SearchAPI] = {
    api.name: api
    for api in (
        SearchAPI(
            name="serper",
            endpoint="https://google.serper.dev/search",
            key_header="X-API-KEY",
            key_variable="SERPER_API_KEY",
            request=_serper,
            documents=lambda answer: _found(
                answer.get("organic", ()), "title", "snippet", "link"
            ),
        ),
        SearchAPI(
            name="brave",
            endpoint="https://api.search.brave.com/res/v1/web/search",
            key_header="X-Subscription-Token",
            key_variable="BRAVE_API_KEY",
            request=_brave,
            documents=lambda answer: _found(
                answer.get("web", {}).get("results", ()), "title", "description", "url"
            ),
        ),
        SearchAPI(
            name="bing",
            endpoint="https://api.bing.microsoft.com/v7.0/search",
            key_header="Ocp-Apim-Subscription-Key",
            key_variable="BING_API_KEY",
            request=_bing,
            documents=lambda answer: _found(
                answer.get("webPages", {}).get("value", ()), "name", "snippet", "url"
            ),
        ),
        SearchAPI(
            name="searxng",
            endpoint=None,
            key_header=None,
            key_variable=None,
            request=_searxng,
            documents=lambda answer: _found(
                answer["results"], "title", "content", "url"
            ),
        ),
        SearchAPI(
            name="retrieval",
            endpoint="http://127.0.0.1:8000/retrieve",
            key_header=None,
            key_variable=None,
            request=_retrieval,
            documents=_retrieved,
        ),
    )
}
