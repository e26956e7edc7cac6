"""How servers of each kind are asked for completions, and how new weights reach them.

vLLM (`vllm serve`): prompts as ids, G completions a request, each with its ids (`return_token_ids`, from 0.10.2 on). An
adapter is loaded under a name (`/v1/load_lora_adapter`; the server needs --enable-lora and, in its environment,
VLLM_ALLOW_RUNTIME_LORA_UPDATING=1); whole weights take the place of those that are there (`/collective_rpc`, method
reload_weights; VLLM_SERVER_DEV_MODE=1).

mlx-lm (`mlx_lm.server`): prompts as text only, one completion a request; every request names the model's folder and the
adapter's, which it then loads, unless it has them. A request with a seed is not batched, so none is sent.

Others: prompts as ids, G completions a request; no way for weights.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import msgspec

from troupe.actors.generator.engines.answers import EngineDownError, EngineRefusedError, shown
from troupe.messages import Slot
from troupe.policy import GenerationConfig, Tokenizer
from troupe.runtime.http_client import HttpClient, HttpError

_MAY_PASS = (408, 425, 429)
"""Statuses below 500 with which the same request may be answered later."""
EngineWay = Literal["adapter", "reload", "none"]
"""How weights reach an engine."""


class Held(NamedTuple):
    """Weights that an engine has, and how a request names them."""

    version: int
    model: str
    adapter: str | None = None


class Request(NamedTuple):
    """What an engine is asked for."""

    prompt_ids: tuple[int, ...]
    samples: int
    most: int
    """Tokens of each."""
    sampling: GenerationConfig
    slot: Slot | None = None
    """None: a probe."""


class Dialect(Protocol):
    """One kind of server."""

    at_once: ClassVar[bool]
    """Whether a request may ask for several completions."""
    raw: ClassVar[bool | None]
    """Whether its log-probs are those before temperature and filters; None: that depends on how it was started."""

    def body(self, request: Request, held: Held) -> dict[str, Any]:
        """What is posted to /v1/completions."""

    def replaces(self, way: EngineWay) -> bool:
        """Whether new weights take the place of those that are there, so that nothing may be under way meanwhile."""

    async def load(self, way: EngineWay, version: int, folder: Path) -> Held:
        """Have it use the weights in a folder. Raises EngineDownError and EngineRefusedError."""

    async def forget(self, held: Held) -> None:
        """Nothing is asked of these weights any more. Raises as `load`."""

    async def tidy(self) -> None:
        """Have it forget what an earlier start of the run had it load. Raises as `load`."""


class VllmDialect:
    """vLLM."""

    at_once: ClassVar[bool] = True
    raw: ClassVar[bool | None] = None

    def __init__(self, client: HttpClient, model: str, *, run: str, stop_ids: Sequence[int], seed: int) -> None:
        """`run`: what tells this run's adapters from others'."""
        self._client, self._model, self._stop_ids, self._seed = client, model, list(stop_ids), seed
        self._prefix = f"troupe-{hashlib.sha256(run.encode()).hexdigest()[:8]}-"

    def body(self, request: Request, held: Held) -> dict[str, Any]:
        sampling = request.sampling
        body = {
            **_common(request, held),
            "prompt": list(request.prompt_ids),
            "n": request.samples,
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
            "stop_token_ids": self._stop_ids,
            "ignore_eos": True,  # ends are ours, above
            # said even where they are off: else the server takes those of the model's generation_config.json
            "top_k": sampling.top_k if sampling.top_k > 0 else -1,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        if (slot := request.slot) is not None:
            key = f"troupe.engine/{self._seed}/{slot.step}/{slot.place}/{slot.attempt}"
            body["seed"] = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
        return body

    def replaces(self, way: EngineWay) -> bool:
        return way == "reload"

    async def load(self, way: EngineWay, version: int, folder: Path) -> Held:
        if way == "adapter":
            name = f"{self._prefix}{version}"
            await post(self._client, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
            return Held(version, name)
        order = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        await post(self._client, "/collective_rpc", order)
        await post(self._client, "/reset_prefix_cache", {})
        return Held(version, self._model)

    async def forget(self, held: Held) -> None:
        if held.model != self._model:
            await post(self._client, "/v1/unload_lora_adapter", {"lora_name": held.model})

    async def tidy(self) -> None:
        models = msgspec.json.decode(await _get(self._client, "/v1/models"))
        for entry in models.get("data", []) if isinstance(models, dict) else []:
            name = entry.get("id", "") if isinstance(entry, dict) else ""
            if isinstance(name, str) and name.startswith(self._prefix):
                await self.forget(Held(-1, name))


class MlxLmDialect:
    """mlx-lm."""

    at_once: ClassVar[bool] = False
    raw: ClassVar[bool | None] = True

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer

    def body(self, request: Request, held: Held) -> dict[str, Any]:
        text = text_of_prompt(self._tokenizer, request.prompt_ids)
        if text is None:
            raise EngineRefusedError(
                "it takes prompts as text, and there is none that its tokenizer reads as these tokens"
            )
        sampling = request.sampling
        body = {**_common(request, held), "prompt": text, "logprobs": True, "min_p": sampling.min_p}
        body["top_k"] = max(0, sampling.top_k)
        return body if held.adapter is None else {**body, "adapters": held.adapter}

    def replaces(self, way: EngineWay) -> bool:
        return False

    async def load(self, way: EngineWay, version: int, folder: Path) -> Held:
        if way == "adapter":
            return Held(version, self._model, str(folder))
        return Held(version, str(folder))

    async def forget(self, held: Held) -> None:
        pass

    async def tidy(self) -> None:
        pass


class OtherDialect:
    """Any other."""

    at_once: ClassVar[bool] = True
    raw: ClassVar[bool | None] = None

    def body(self, request: Request, held: Held) -> dict[str, Any]:
        body = {**_common(request, held), "prompt": list(request.prompt_ids), "n": request.samples, "logprobs": 1}
        if request.sampling.top_k > 0:
            body["top_k"] = request.sampling.top_k
        if request.sampling.min_p > 0.0:
            body["min_p"] = request.sampling.min_p
        return {**body, "return_token_ids": True, "return_tokens_as_token_ids": True}

    def replaces(self, way: EngineWay) -> bool:
        return False

    async def load(self, way: EngineWay, version: int, folder: Path) -> Held:
        raise EngineRefusedError("how it takes weights is not known")

    async def forget(self, held: Held) -> None:
        pass

    async def tidy(self) -> None:
        pass


def _common(request: Request, held: Held) -> dict[str, Any]:
    return {
        "model": held.model,
        "max_tokens": request.most,
        "temperature": request.sampling.temperature,
        "top_p": request.sampling.top_p,
        "stream": False,
    }


def text_of_prompt(tokenizer: Tokenizer, ids: Sequence[int]) -> str | None:
    """A text that is read as exactly these ids, with the special tokens that the tokenizer adds by itself; None where
    there is none."""
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    texts = [whole]
    if ids and ids[0] == tokenizer.bos_token_id:  # added by itself, perhaps
        texts.append(tokenizer.decode(ids[1:], skip_special_tokens=False))
    return next((text for text in texts if tokenizer.encode(text) == list(ids)), None)


async def post(client: HttpClient, path: str, body: dict[str, Any]) -> bytes:
    """What a server answers with status 200. EngineDownError where it gave no answer, or may give another one later;
    EngineRefusedError where it refused."""
    try:
        answer = await client.post(path, msgspec.json.encode(body))
    except HttpError as fault:
        raise EngineDownError(f"{path}: {fault}", again=not fault.late) from None
    return _checked(path, answer.status, answer.body)


async def _get(client: HttpClient, path: str) -> bytes:
    try:
        answer = await client.get(path)
    except HttpError as fault:
        raise EngineDownError(f"{path}: {fault}", again=not fault.late) from None
    return _checked(path, answer.status, answer.body)


def _checked(path: str, status: int, body: bytes) -> bytes:
    if status == 200:
        return body
    said = f"{path}: status {status}: {shown(body)}"
    if status >= 500 or status in _MAY_PASS:
        raise EngineDownError(said, of_request=True)
    raise EngineRefusedError(said)
