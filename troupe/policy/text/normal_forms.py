"""Unicode normal forms as Hugging Face's tokenizers makes them, the same on every version of Python.

That library normalizes by the tables of Unicode 9: marks and letters that came later are to it letters without parts,
which nothing composes with and nothing is sorted around. Python's tables are newer, and others in each version. So a
text is cut at the characters that later tables treat in a way of their own, and what lies between is normalized.
"""

import re
import unicodedata
from typing import Literal, TypeAlias

NormalForm: TypeAlias = Literal["NFC", "NFD", "NFKC", "NFKD"]

_LATER = """
    558 58B-58C 5C8-5C9 7FD 897-89F 8CA-8D3 9FE C3C D3B-D3C EBA 1715 1ABF-1AF0 1DF6-1DFA 209D-209F 32FF A7F1-A7F4
    A82C AB69 105C9 105D2 105DA 105E4 10781-10785 10787-107B0 107B2-107BF 10D24-10D27 10D69-10D6D 10EAB-10EAC
    10ECB-10ECF 10EF0-10EFB 10EFD-10EFF 10F46-10F50 10F82-10F85 11070 1133B 11382-11385 1138B 1138E 11390-11391
    113C2 113C5 113C7-113C8 113CE-113D0 1145E 11839-1183A 11935 11938 1193D-1193E 11943 119E0 11A34 11A47 11A99
    11D42 11D44-11D45 11D97 11F41-11F42 1611E 16121-16129 1612F 16D63 16D67-16D6A 16FF0-16FF1 1B123-1B126
    1CCD6-1CCF9 1D127-1D128 1D250-1D252 1D25B-1D25C 1D25F 1D280-1D281 1D6A6 1DF95 1DFCD-1DFFF 1E030-1E06D 1E08F
    1E130-1E136 1E2AE 1E2EC-1E2EF 1E4EC-1E4EF 1E5EE-1E5EF 1E6E3 1E6E6 1E6EE-1E6EF 1E6F5 1F16C 1FBF0-1FBF9
"""
"""Code points, in hexadecimal, that Unicode 10 to 18 gave a combining class, parts, or something to compose with."""


def _later() -> re.Pattern[str]:
    ends = [[chr(int(end, 16)) for end in span.split("-")] for span in _LATER.split()]
    return re.compile("([" + "".join(f"{span[0]}-{span[-1]}" for span in ends) + "]+)")


_CUT = _later()


def normalize(form: NormalForm, text: str) -> str:
    """`unicodedata.normalize`, by the tables of Unicode 9."""
    if text.isascii():
        return text
    parts = _CUT.split(text)
    parts[::2] = [unicodedata.normalize(form, part) for part in parts[::2]]
    return "".join(parts)
