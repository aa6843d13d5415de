"""Symbolic comparison of two answers by math-verify."""


def symbolic_equal(answer: str, gold: str, timeout_s: float) -> bool:
    """Whether math-verify finds two LaTeX or plain expressions equal."""
    from math_verify import parse, verify

    left = parse(f"${answer}$", parsing_timeout=None)
    right = parse(f"${gold}$", parsing_timeout=None)
    return bool(verify(right, left, timeout_seconds=None))
