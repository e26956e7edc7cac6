"""Write the table of docs/memory.md that says which model fits which memory, by `troupe/run/fits.py`.

It stands between the comments `<!-- table: fits -->` and `<!-- end of table -->`, and is the one for Apple's GPU: an
MLX that is built for NVIDIA cards predicts another. `python -m scripts.fits_table` writes it, `--check` only compares.
"""

import re
import sys
from pathlib import Path

from troupe.run.fits import predict_fits, table

PAGE = Path(__file__).parent.parent / "docs" / "memory.md"
_TABLE = re.compile(r"(<!-- table: fits -->\n).*?(<!-- end of table -->)", re.DOTALL)


def reference() -> str:
    """The whole page, its table written anew."""
    text = PAGE.read_text(encoding="utf-8")
    assert len(_TABLE.findall(text)) == 1
    return _TABLE.sub(lambda match: f"{match[1]}\n{table(predict_fits())}\n{match[2]}", text)


def main() -> None:
    """Write the page, or say whether it is up to date."""
    written = reference()
    if "--check" in sys.argv[1:]:
        if PAGE.read_text(encoding="utf-8") != written:
            sys.exit(f"{PAGE.name} is out of date; write it with: python -m scripts.fits_table")
        return
    PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
