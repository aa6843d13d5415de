"""All figures of the tools in one table; `tools_*.py` say how each is measured.

python benchmarks/tools.py --json tools.json
"""

import argparse
from pathlib import Path

from report import print_table_and_write
from tools_python import python_figures
from tools_search import search_figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    figures = python_figures() | search_figures()
    rows = [{"figure": name, "value": value} for name, value in figures.items()]
    print_table_and_write(rows, figures, args.json)


if __name__ == "__main__":
    main()
