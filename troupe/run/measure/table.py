"""A measurement as a table for a person, beside machines that were measured before."""

import msgspec

from troupe.run.measure.figures import Measurement

_LABEL = 34
_NOTHING = "–"


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """What another machine came to with the same work (docs/performance.md, docs/performance-parts.md)."""

    name: str
    model: str
    decode: dict[int, float]
    learner: float | None = None


REFERENCES = (
    Reference(
        name="H100", model="Qwen3-0.6B", decode={1: 493, 8: 2250, 32: 5400, 64: 16184}, learner=20500
    ),  # the learner with cuDNN's gradients of attention (learner.deterministic = false)
    Reference(name="2 CPU cores (EPYC)", model="8.9 million parameters", decode={1: 69, 8: 555, 32: 1191, 64: 1316}),
)
MACS = "Macs are not measured yet: please send your file (an issue of the project), and it will stand here"


def describe(measurement: Measurement) -> str:
    """Lines: the machine, its figures beside those of others with the same model, and what could not be measured."""
    figures = measurement.figures
    beside = [each for each in REFERENCES if each.model == figures.model]
    memory = _NOTHING if measurement.memory_gb is None else f"{measurement.memory_gb:.1f} GB"
    limit = "" if measurement.limit_gb is None else f", of which a run may take {measurement.limit_gb:.1f} GB"
    lines = [
        f"{measurement.chip}, {measurement.backend}, {measurement.processors} processors, {memory}{limit}",
        f"{measurement.system}, mlx {measurement.mlx}; can be kept resident: {measurement.wired}",
        f"a random policy, {figures.model}, {figures.dtype}; {figures.prompt_tokens} + {figures.new_tokens} tokens",
        "",
        _row("", "here", *(each.name for each in beside)),
    ]
    for rows, rate in figures.decode.items():
        name = f"decode, {rows} row{'s' if rows > 1 else ''}, tokens/s"
        lines.append(_row(name, _number(rate), *(_number(each.decode.get(rows)) for each in beside)))
    lines += [
        _row("learn, 8 × 512, tokens/s", _number(figures.learner), *(_number(each.learner) for each in beside)),
        _row("copies, GB/s", _number(figures.copy_gb_per_s)),
        _row("overlap, two threads", _ratio(figures.overlap.threads)),
        _row("overlap, two processes", _ratio(figures.overlap.processes)),
        _row("same bits twice, decoding", _answer(same=figures.same_decode)),
        _row("same bits twice, learning", _answer(same=figures.same_learner)),
        *(_row(f"largest that fits, {way}", model or "none") for way, model in measurement.largest.items()),
    ]
    lines += [f"not measured: {line}" for line in figures.lacking]
    return "\n".join([*lines, MACS] if measurement.backend == "metal" else lines)


def _row(label: str, *cells: str) -> str:
    return (label.ljust(_LABEL) + "".join(cell.ljust(22) for cell in cells)).rstrip()


def _number(value: float | None) -> str:
    if value is None:
        return _NOTHING
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.2f} × as fast as in turns"


def _answer(*, same: bool | None) -> str:
    return {True: "yes", False: "no", None: _NOTHING}[same]
