"""The parts of a `tokenizer.json` besides its model: normalizer, pre-tokenizer, decoder, post-processor.

Each is a list of small objects with a `type`. What is supported is a table or a pattern here; the rest is refused.
"""

import re
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, cast, get_args

import msgspec

from troupe.errors import ModelError
from troupe.policy.text.normal_forms import NormalForm
from troupe.policy.text.normalizing import Prepended, Replaced, Step
from troupe.policy.text.vocabulary import GPT2_PATTERN, Decoding

Part: TypeAlias = dict[str, Any]

WHOLE_TEXT = r"[\s\S]+"
"""No split at all."""

DIGIT, DIGITS = r"\p{N}", r"\p{N}+"
"""What the pre-tokenizer Digits splits by, with and without `individual_digits`."""

_BEHIND_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
JOINED: dict[tuple[str, ...], str] = {
    (digits, GPT2_PATTERN): _BEHIND_DIGITS.replace("DIGITS", digits) for digits in (DIGIT, DIGITS)
}
"""Splits one behind the other → the one pattern that does the same, as SmolLM2 and StarCoder have them.

A digit is a piece of its own then, so it is nothing that white space stands before: `\\s+(?!\\S)` ends there too.
"""

_HARMLESS = {"type", "trim_offsets", "cased"}
"""Keys that change no id and no text."""


def flat(part: Part | None, key: str) -> list[Part]:
    """A component as a list: a "Sequence" is its members, which stand under `key`, and null is none."""
    if part is None:
        return []
    if part.get("type") == "Sequence":
        return [inner for member in part.get(key, []) for inner in flat(member, key)]
    return [part]


def read_steps(file: Path, normalizer: Part | None) -> tuple[Step, ...]:
    """What a text goes through before it is split."""
    forms = get_args(NormalForm)
    steps: list[Step] = []
    for part in flat(normalizer, "normalizers"):
        match part:
            case {"type": str(form)} if form in forms and part.keys() == {"type"}:
                steps.append(cast("NormalForm", form))
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old and len(part) == 3:
                steps.append(Replaced(old, new))
            case {"type": "Prepend", "prepend": str(text)} if len(part) == 2:
                steps.append(Prepended(text))
            case _:
                known = f"{', '.join(forms)}, 'Replace' of a String, 'Prepend'"
                raise ModelError(
                    f"{file}: normalizer {part.get('type')!r} is not supported, only {known}; it is {_shown(part)}"
                )
    return tuple(steps)


def splits_into_bytes(pre_tokenizer: Part | None) -> bool:
    """Whether texts are spelt in the byte-level alphabet."""
    return any(part.get("type") == "ByteLevel" for part in flat(pre_tokenizer, "pretokenizers"))


def read_pattern(file: Path, pre_tokenizer: Part | None) -> str:
    """The one pattern that texts of a byte-level BPE are split by, since tiktoken takes one."""
    patterns = []
    for part in flat(pre_tokenizer, "pretokenizers"):
        match part:
            case {"type": "ByteLevel"} if not _says_more(part, "use_regex"):
                if part.get("use_regex", True):
                    patterns.append(GPT2_PATTERN)
            case {"type": "Digits"} if not _says_more(part, "individual_digits"):
                patterns.append(DIGIT if part.get("individual_digits") else DIGITS)
            case {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": str(regex)}} if _is_plain(part):
                patterns.append(regex)
            case {"type": "Split", "behavior": "Isolated", "pattern": {"String": str(text)}} if _is_plain(part):
                patterns.append(re.escape(text))
            case _:
                _refuse_split(file, part, "one Split of behavior 'Isolated', Digits, and ByteLevel without options")
    if len(patterns) < 2:
        return patterns[0] if patterns else WHOLE_TEXT
    if (joined := JOINED.get(tuple(patterns))) is None:
        raise ModelError(
            f"{file}: pre_tokenizer splits {len(patterns)} times, by {' then '.join(map(repr, patterns))}; at most one "
            "split is supported, or Digits and then ByteLevel with use_regex"
        )
    return joined


def refuse_splits(file: Path, pre_tokenizer: Part | None, steps: tuple[Step, ...]) -> None:
    """ModelError where a BPE of characters is to split texts: only at what its normalizer has replaced, so nowhere."""
    gone = {step.old for step in steps if isinstance(step, Replaced) and step.old not in step.new}
    for part in flat(pre_tokenizer, "pretokenizers"):
        match part:
            case {"type": "Split", "pattern": {"String": str(text)}} if text in gone and not part.get("invert"):
                continue
            case _:
                _refuse_split(file, part, "none, or a Split at a text that the normalizer replaces")


def refuse_byte_decoders(file: Path, decoder: Part | None) -> None:
    """ModelError where a byte-level BPE decodes in a way of its own."""
    for part in flat(decoder, "decoders"):
        if part.get("type") != "ByteLevel":
            raise ModelError(f"{file}: decoder {part.get('type')!r} is not supported, only 'ByteLevel'")


def read_character_decoder(file: Path, decoder: Part | None) -> tuple[Decoding, bool]:
    """How a BPE of characters decodes, and whether tokens such as <0x0A> are the byte that they name."""
    replaced: list[tuple[str, str]] = []
    seen: list[str] = []
    stripped = ""
    for part in flat(decoder, "decoders"):
        match part:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old and not seen:
                replaced.append((old, new))
            case {"type": "ByteFallback" | "Fuse" as kind} if not {kind, "Fuse"} & set(seen):
                seen.append(kind)
            case {"type": "Strip", "content": str(character), "start": int(start), "stop": 0} if seen[-1:] == ["Fuse"]:
                stripped = character * start
                seen.append("Strip")
            case _:
                raise ModelError(
                    f"{file}: decoder {part.get('type')!r} is not supported here, only 'Replace' of a String, then "
                    f"'ByteFallback', 'Fuse' and 'Strip' at the beginning, as Gemma and Mistral have; it is "
                    f"{_shown(part)}"
                )
    if not seen and not replaced:
        raise ModelError(f"{file}: decoder is null, which puts a space between any two tokens; give it the model's own")
    return Decoding(replaced=tuple(replaced), stripped=stripped), "ByteFallback" in seen


def read_post_processor(file: Path, processor: Part | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and after a single text."""
    before: list[int] = []
    after: list[int] = []
    for part in flat(processor, "processors"):
        if part.get("type") == "ByteLevel":
            continue
        if part.get("type") != "TemplateProcessing":
            raise ModelError(
                f"{file}: post_processor {part.get('type')!r} is not supported, "
                "only 'ByteLevel' and 'TemplateProcessing'"
            )
        try:
            template = msgspec.convert(part, _TemplateProcessing)
            side = before
            for piece in template.single:
                if "SpecialToken" in piece:
                    side.extend(template.special_tokens[piece["SpecialToken"]["id"]].ids)
                else:
                    side = after
        except (msgspec.ValidationError, KeyError) as error:
            raise ModelError(f"{file}: post_processor TemplateProcessing is malformed: {error!r}") from error
    return tuple(before), tuple(after)


class _TemplateToken(msgspec.Struct):
    ids: list[int]


class _TemplateProcessing(msgspec.Struct):
    single: list[dict[str, dict[str, Any]]]
    special_tokens: dict[str, _TemplateToken]


def _says_more(part: Part, *known: str) -> bool:
    """Whether a part has an option that is set and not among the known ones."""
    return any(value for key, value in part.items() if key not in _HARMLESS and key not in known)


def _is_plain(part: Part) -> bool:
    return not _says_more(part, "behavior", "pattern")


def _refuse_split(file: Path, part: Part, known: str) -> NoReturn:
    raise ModelError(f"{file}: pre_tokenizer part {_shown(part)} is not supported; supported are {known}")


def _shown(part: Part) -> str:
    shown = str(part)
    return shown if len(shown) <= 300 else f"{shown[:300]} …"
