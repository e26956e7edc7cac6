"""The tokenizer files of a model folder → one `Vocabulary`.

`tokenizer.json` is read by a file of its own; here are the choice, `vocab.json` with `merges.txt`, and rank files.
"""

import base64
import binascii
from pathlib import Path

from troupe.errors import ModelError
from troupe.policy.text.tokenizer_json import read_tokenizer_json
from troupe.policy.text.vocabulary import Merge, Vocabulary, Words, decode_json, rank_words, read_text


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of a model folder.

    `tokenizer.json` comes first, then `vocab.json` + `merges.txt`, then the rank file. Raises ModelError naming the
    file that is missing, malformed, or of a kind that is not supported.
    """
    if (folder / "tokenizer.json").is_file():
        return read_tokenizer_json(folder / "tokenizer.json")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _read_vocab_and_merges(folder)
    rank_files = sorted(folder.glob("*.tiktoken"))
    if len(rank_files) == 1:
        return _read_rank_file(rank_files[0])
    raise ModelError(
        f"{folder}: found {len(rank_files)} *.tiktoken files and no tokenizer.json, nor vocab.json with merges.txt; "
        "copy the tokenizer files of the model into this folder"
    )


def _read_vocab_and_merges(folder: Path) -> Vocabulary:
    file, merges_file = folder / "vocab.json", folder / "merges.txt"
    lines = read_text(merges_file).split("\n")
    merges: list[Merge] = [line for line in lines if line and not line.startswith("#version")]
    names = decode_json(file, dict[str, int])
    ids_by_rank, contents = rank_words(merges_file, names, merges)
    return Vocabulary(origin=str(file), model=Words(ids_by_rank=ids_by_rank), contents=contents, names=names)


def _read_rank_file(file: Path) -> Vocabulary:
    rank_of: dict[bytes, int] = {}
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            rank_of[base64.b64decode(encoded, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ModelError(f"{file}, line {number}: {line[:80]!r} is no 'base64 rank' pair: {error}") from error
    if len(set(rank_of.values())) != len(rank_of):
        raise ModelError(f"{file}: two tokens share one rank; each line needs a rank of its own")
    missing = [byte for byte in range(256) if bytes([byte]) not in rank_of]
    if missing:
        raise ModelError(f"{file}: byte 0x{missing[0]:02X} has no rank; a rank file needs all 256 single bytes")
    contents = {rank: token for token, rank in rank_of.items()}
    return Vocabulary(
        origin=str(file),
        model=Words(ids_by_rank={token: rank for rank, token in sorted(contents.items())}),
        contents=contents,
        names={token.decode(errors="replace"): rank for token, rank in rank_of.items()},
    )
