"""What every benchmark does at its end: print a table, write its figures.

`--json FILE` gives one flat object of figures, so that a script can compare runs.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path


def print_table_and_write(
    rows: Sequence[Mapping[str, object]],
    figures: Mapping[str, float],
    json_file: Path | None,
) -> None:
    """Print rows with equal keys as a table, then the figures; write them.

    Args:
        rows: at least one; the first one's keys head the columns.
        figures: name -> value, as written to `json_file`.
        json_file: None writes nothing.
    """
    heads = list(rows[0])
    cells = [heads] + [[_text(row[head]) for head in heads] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    for number, line in enumerate(cells):
        first, rest = line[0].ljust(widths[0]), zip(line[1:], widths[1:], strict=True)
        print("  ".join([first, *(cell.rjust(width) for cell, width in rest)]))
        if number == 0:
            print("  ".join("-" * width for width in widths))
    print()
    for name, value in figures.items():
        print(f"{name} = {_text(value)}")
    if json_file is not None:
        json_file.write_text(json.dumps(dict(figures), indent=2) + "\n")


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
    return str(value)
