"""Write the table of docs/memory.md that says which model fits which memory, by `troupe/run/fits.py`.

It stands between the comments `<!-- table: fits -->` and `<!-- end of table -->`, and is the one for Apple's GPU: an
MLX that is built for NVIDIA cards predicts another. `python -m scripts.fits_table` writes it, `--check` only compares.
"""

from scripts.pages import DOCS, with_tables, write_or_check
from troupe.run.fits import predict_fits, table

PAGE = DOCS / "memory.md"


def reference() -> str:
    """The whole page, its table written anew."""
    return with_tables(PAGE, {"fits": table(predict_fits())})


if __name__ == "__main__":
    write_or_check(PAGE, reference(), "fits_table")
