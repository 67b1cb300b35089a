"""`make readme`: writes the generated parts of README.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from router.config import config_table

README: Final = Path(__file__).parents[1] / "README.md"
TABLE: Final = re.compile(r"\| Flag \| Environment \|.*?\n(?!\|)", re.DOTALL)


def main() -> None:
    text = README.read_text()
    assert TABLE.search(text), "README.md has lost its configuration table"
    README.write_text(TABLE.sub(lambda _: config_table(), text, count=1))


if __name__ == "__main__":
    main()
