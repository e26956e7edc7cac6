"""The settings of an external engine, without MLX: a server of another program that completes prompts."""

from typing import Annotated, Literal

import msgspec

from troupe.runtime.http_client import checked_url

EngineKind = Literal["vllm", "mlx-lm", "openai"]
EngineWeights = Literal["auto", "adapter", "reload", "none"]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of `[[schedule.engines]]`: an OpenAI-compatible server that completes prompts in the free schedule."""

    url: str
    """Where it listens, such as http://127.0.0.1:8000; a /v1 at the end may be there or not."""
    kind: EngineKind
    """Whose server it is: vLLM's (`vllm serve`), mlx-lm's (`mlx_lm.server`), or another one (`openai`), which has to
    take prompts as token ids and to give ids and log-probs back."""
    model: str | None = None
    """The name that it has for the model that the run begins with; None: the path of the model, as in `model.path`."""
    weights: EngineWeights = "auto"
    """How new weights reach it: as an adapter's folder, as the whole model's, or not at all. `auto`: as what is
    trained; with "openai" not at all."""
    weights_folder: str | None = None
    """A folder for these weights that it sees under the same path. None: memory (/dev/shm) where there is room, else
    the run folder, for a server on the same machine."""
    api_key_env: str | None = None
    """The environment variable that holds its key, if it wants one; the key itself stands in no file."""
    most: Annotated[int, msgspec.Meta(ge=1)] = 8
    """Prompts that it has in hand at a time."""
    timeout_s: Annotated[float, msgspec.Meta(gt=0.0)] = 600.0
    """Seconds that a completion, or loading weights, may take."""

    def __post_init__(self) -> None:
        checked_url(self.url)
        if self.kind == "openai" and self.weights not in ("auto", "none"):
            raise ValueError(
                f'weights is "{self.weights}", but how a server of kind "openai" takes weights is not known; say "none"'
            )

    @property
    def base_url(self) -> str:
        """Without a /v1 at the end."""
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def name(self) -> str:
        """As it is called on screens and in incidents: host and port."""
        return checked_url(self.url).netloc


def check_engines(engines: tuple[EngineConfig, ...], mode: str, generator: str) -> None:
    """ValueError where these cannot be used together, or not in this schedule."""
    if not engines:
        return
    if mode == "pinned":
        raise ValueError(
            "schedule.engines are there, but schedule.mode is 'pinned': another program's numbers are not ours to the "
            "bit, so such a run could not be made again; set mode to 'free', or leave the engines out"
        )
    if generator == "thread":
        raise ValueError(
            "schedule.engines are there, but schedule.generator is 'thread'; leave it out, so that engines alone "
            "complete prompts, or set it to 'process', so that one of ours does so beside them"
        )
    names = [engine.name for engine in engines]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"schedule.engines has {twice[0]} twice; give each server once, and raise its `most`")
