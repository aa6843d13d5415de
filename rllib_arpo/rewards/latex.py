r"""Answers in LaTeX, Unicode or Python's notation, brought into one form of LaTeX.

`tidy` changes how an answer is written, never what it says:

    \dfrac{1}{2}, \left( 1,\,2 \right), $x \geqslant 3$, 2*sqrt(13), π/2, x**10
    \frac{1}{2},  (1, 2),               x\ge 3,          2*\sqrt{13}, \pi/2, x^{10}

Spaces stay between letters and digits ("3 1/2" is not 31/2) and after a comma
("100, 198" is a list, "100,198" a number).
"""

import re

_UNICODE = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "\u00a0": " ",
        "×": r"\times ",
        "·": r"\cdot ",
        "÷": "/",
        "\uff1e": ">",
        "\uff1c": "<",
        "\u2044": "/",
        "π": r"\pi ",
        "θ": r"\theta ",
        "∞": r"\infty ",
        "\u222a": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "±": r"\pm ",
        "≈": r"\approx ",
        "∅": r"\emptyset ",
        "°": r"^\circ",
        "²": "^2",
        "³": "^3",
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
    }
)
_FUNCTIONS = (
    "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|pi"
)
_REWRITTEN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?i:^(?:the )?(?:final |correct )?answer is:?) *", ""),
        (r"√ ?(\d+)", r"\\sqrt{\1}"),
        (r"√", r"\\sqrt "),
        (
            r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|thinspace|q?quad)(?![a-zA-Z])",
            "",
        ),
        (r",\\! *", ","),
        (r"(?<!\\)\\!|\\(?:hspace|vspace)\{[^{}]*\}|(?<!\\)\$", ""),
        (r"(?<!\\)\\[,;: ]|~|\s+", " "),
        (r"\\_", "_"),
        (r"\\colon(?![a-zA-Z])", ":"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:text(?:bf|it|rm|sf)|mathrm|mathbf|mathsf|mbox|hbox)(?=\{)", r"\\text"),
        (r"\\leq(?:slant)?(?![a-zA-Z])", r"\\le "),
        (r"\\geq(?:slant)?(?![a-zA-Z])", r"\\ge "),
        (r"\\neq(?![a-zA-Z])", r"\\ne "),
        (r"\\varnothing", r"\\emptyset"),
        (r"\\([lr])brace(?![a-zA-Z])", lambda m: "\\{" if m[1] == "l" else "\\}"),
        (r"\\%", "%"),
        (r"\^ ?(?:\{ ?(?:\\circ|\\degree) ?\}|\\circ)|\\degree", r"^\\circ"),
        # Python and SymPy
        (r"\*\*\(([^()]*)\)", r"^{\1}"),
        (r"(?:\*\*|\^)(-?\d+)", r"^{\1}"),
        (r"\*\*", "^"),
        (r"\*I(?![a-zA-Z])", "i"),
        (r"(?<![\\a-zA-Z])oo(?![a-zA-Z])", r"\\infty "),
        (rf"(?<![\\a-zA-Z])({_FUNCTIONS})(?![a-zA-Z])", r"\\\1 "),
        (r"\\sqrt *\(([^()]*)\)", r"\\sqrt{\1}"),
        # spaces that no letter or digit needs
        (r" *, +", ", "),
        (r"(?<=[^\w,]) +| +(?=[^\w\\])", ""),
        (r" +", " "),
    )
]
# \text{...} or (\text{A}) around everything
_WRAPPED = re.compile(r"\(?\\text\{ *\(?([^{}()]*)\)? *\}\)?|\(([A-Za-z])\)")
_SET_BUILDER = re.compile(r"\\?\{ ?[a-zA-Z] ?(?:\||\\mid|:) ?(.*?) ?\\?\}")

_INNER_SIGN = re.compile(r"\{[^{}]*\\pm")


def tidy(answer: str) -> str:
    """The same answer in the plain form."""
    text = _boxed(answer).strip().translate(_UNICODE)
    if text.startswith("$") and text.count("$") == 1:
        text = "\\" + text  # an amount, not the start of a formula
    text = text.removeprefix("\\(").removesuffix("\\)")
    text = text.removeprefix("\\[").removesuffix("\\]")
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".,").rstrip()
    wrapped = _WRAPPED.fullmatch(text)
    if wrapped is not None:
        return (wrapped[1] or wrapped[2] or "").strip()
    described = _SET_BUILDER.fullmatch(text)
    return described[1] if described is not None else _both_signs(text)


def _both_signs(text: str) -> str:
    r"""Two answers for a \pm inside braces, where math-verify cannot read it."""
    if text.count("\\pm") != 1 or "," in text or not _INNER_SIGN.search(text):
        return text
    return ", ".join(re.sub(r"\\pm ?", sign, text) for sign in "+-")


def is_balanced(text: str) -> bool:
    r"""Whether braces, brackets and \begin close, "(" also by "]" as in intervals."""
    depth = {"{": 0, "(": 0}
    for mark in re.findall(r"\\[{}]|[{}()\[\]]", text):
        kind = "{" if mark[-1] in "{}" else "("
        depth[kind] += 1 if mark[-1] in "{([" else -1
        if depth[kind] < 0:
            return False
    ends = text.count("\\begin") == text.count("\\end")
    return ends and not any(depth.values())


def _boxed(text: str) -> str:
    r"""Inside of the last \boxed{}, the text itself when there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return text
    depth = 0
    for index in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : index]
    return text


_LEAF = (
    r"(?:\d++(?:\.\d++)?|[a-zA-Z]"
    r"|\\(?:pi|alpha|beta|theta|lambda|infty)(?![a-zA-Z]) ?)"
)
_TERM = rf"{_LEAF}(?:[\^_]{_LEAF})?"
_OPERATOR = r"(?: ?(?:[-+*/=<>]|\\(?:cdot|times|pm|le|ge)(?![a-zA-Z])) ?-?)"
_FLAT = rf"(?:[-+]|\\pm ?)?{_TERM}(?:{_OPERATOR}?{_TERM})*+"
_LIST = rf"{_FLAT}(?:, {_FLAT}|,{_FLAT})*+"
_SIMPLE_PART = re.compile(
    rf"\\frac ?\{{{_FLAT}\}}\{{{_FLAT}\}}|\\sqrt(?:\[\d\])?\{{{_FLAT}\}}"
    rf"|\{{{_FLAT}\}}|\({_FLAT}\)"
)
_SIMPLE = re.compile(rf"{_LIST}|[(\[]{_LIST}[)\]]|\\\{{{_LIST}\\\}}")


def is_simple(text: str) -> bool:
    """Whether a tidy answer is plain algebra, which needs no parser to be recognised.

    Fractions, roots and brackets of it shrink to a digit from the inside; what is
    left must be a sum of products, or a tuple, interval or set of such.
    """
    count = 1
    while count and _SIMPLE.fullmatch(text) is None:
        text, count = _SIMPLE_PART.subn("1", text)
    return count > 0
