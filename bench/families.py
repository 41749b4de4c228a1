"""Print what the compiler finds in each family as a Markdown table: python bench/families.py

The rows are those of tests/families.json, which tests/test_families.py holds to what the compiler does;
`pytest tests/test_families.py --update-golden` writes it anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import effc
from effc.anatomy import COLUMNS, Anatomy

GOLDEN = Path(effc.__file__).parent / "tests" / "families.json"


def main() -> None:
    rows = json.loads(GOLDEN.read_text())
    print(f"| family | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for family, row in rows.items():
        cells = (text.replace("|", "\\|") for text in Anatomy(**row).cells())
        print(f"| {family} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
