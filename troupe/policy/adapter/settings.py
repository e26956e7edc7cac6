"""The `[adapter]` section of a run."""

import math
import re
from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is trained beside a base that stays as it is. Names are PEFT's, where PEFT has the thing."""

    kind: Literal["lora", "dora"] | None = None
    """LoRA (arXiv:2106.09685) or DoRA (arXiv:2402.09353); None: the whole network is trained, or the adapter of
    `resume_from`."""
    rank: Annotated[int, msgspec.Meta(ge=1)] = 16
    """Rows of A and columns of B."""
    alpha: float | None = None
    """The scale is alpha / rank; None: twice the rank, as TRL's 32 for 16, so that the scale is 2."""
    use_rslora: bool = False
    """The scale is alpha / √rank (arXiv:2312.03732)."""
    dropout: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0
    """Part of the numbers that A sees which are 0 while learning; drawn anew in each pass over a batch, by seed, slot
    and token."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Which matrices of a layer: "all-linear" for all seven; names, which a module's name equals or ends with behind a
    dot; or one text, a regular expression for the whole of a module's name."""
    layers: int | tuple[int, ...] | None = None
    """Only the last so many layers (mlx-lm's `num_layers`), or those of these numbers (PEFT's `layers_to_transform`);
    None: all."""
    rank_pattern: dict[str, Annotated[int, msgspec.Meta(ge=1)]] = {}
    """Regular expression, which the end of a module's name matches behind a dot → rank there."""
    alpha_pattern: dict[str, float] = {}
    """The same → alpha there."""
    init: Literal["default", "gaussian"] = "default"
    """A at first: uniform in ±1/√in, or normal with deviation 1/rank; B is 0, so that the policy is the base."""
    resume_from: str | None = None
    """An adapter folder, PEFT's, mlx-lm's or a run's, to go on from: kind, rank, scale and modules are those of the
    folder."""

    def __post_init__(self) -> None:
        self.refuse_idle(name for name in self.__struct_fields__ if getattr(self, name) != _DEFAULTS[name])
        for name, alpha in [("adapter.alpha", self.alpha), *_named("adapter.alpha_pattern", self.alpha_pattern)]:
            if alpha is not None and not 0.0 < alpha < math.inf:
                raise ValueError(f"{name} is {alpha}; give a finite number above 0")
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, key):
                check_end_pattern(f"adapter.{key}", pattern)
        if isinstance(self.target_modules, str):
            check_pattern("adapter.target_modules", self.target_modules)
        if not self.target_modules:
            raise ValueError('adapter.target_modules is empty; name modules, or leave it out for "all-linear"')
        self._check_layers()

    @property
    def is_on(self) -> bool:
        """Whether an adapter is trained, and not the whole network."""
        return self.kind is not None or self.resume_from is not None

    def refuse_idle(self, given: Iterable[str]) -> None:
        """Raise ValueError where one of the keys that are given does nothing: no adapter is named, or a folder says
        what the adapter is."""
        counting = {"kind", "resume_from", "dropout"} if self.resume_from is not None else {"kind"}
        idle = next((name for name in given if name not in counting), None)
        if idle is not None and self.resume_from is not None:
            raise ValueError(
                f"adapter.{idle} is given beside adapter.resume_from, whose folder says what the adapter is; leave one "
                "of them out"
            )
        if idle is not None and self.kind is None:
            raise ValueError(
                f"adapter.{idle} is given, but adapter.kind names no adapter; add adapter.kind = 'lora', or for an "
                "adapter that there is adapter.resume_from, or leave it out to train the whole network"
            )

    def _check_layers(self) -> None:
        if isinstance(self.layers, int) and self.layers < 1:
            raise ValueError(
                f"adapter.layers is {self.layers}; give how many of the last layers, at least 1, or leave it "
                "out for all"
            )
        if isinstance(self.layers, tuple):
            if not self.layers:
                raise ValueError("adapter.layers is empty; give numbers of layers, or leave it out for all")
            if min(self.layers) < 0:
                raise ValueError(f"adapter.layers names layer {min(self.layers)}; the first layer is 0")


def end_pattern(pattern: str) -> str:
    """The regular expression that a key of PEFT's patterns stands for: it matches where the end of a module's name
    does, behind a dot."""
    return rf"(.*\.)?({pattern})$"


def check_pattern(key: str, pattern: str) -> None:
    """Raise ValueError where a text is no regular expression."""
    _compile(key, pattern, pattern)


def check_end_pattern(key: str, pattern: str) -> None:
    """Raise ValueError where a text is none that `end_pattern` can take, which a bracket or a flag may spoil."""
    _compile(key, pattern, pattern)
    _compile(key, pattern, end_pattern(pattern))


def _compile(key: str, pattern: str, whole: str) -> None:
    try:
        re.compile(whole)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{key}: {pattern!r} is no regular expression that fits here: {error}") from None


def _named(key: str, values: dict[str, float]) -> list[tuple[str, float]]:
    return [(f"{key}.{pattern}", value) for pattern, value in values.items()]


_DEFAULTS = {
    field.name: field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    for field in msgspec.structs.fields(AdapterConfig)
}
