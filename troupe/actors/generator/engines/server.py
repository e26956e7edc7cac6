"""One external engine: what it is asked, again where that may help, and whether its answers can be trained on."""

from functools import partial

import anyio
import msgspec

from troupe.actors.generator.engines.answers import EngineDownError, EngineRefusedError, Sampled, finished, read_answer
from troupe.actors.generator.engines.dialects import Dialect, EngineWay, Held, Request, post
from troupe.actors.generator.engines.settings import EngineConfig
from troupe.messages import Prompt, Rollout
from troupe.policy import GenerationConfig, Tokenizer
from troupe.policy.decode.stopping import StopRules
from troupe.runtime.backoff import backoff_s
from troupe.runtime.http_client import HttpClient
from troupe.runtime.roles import together

_TRIES = 4
"""Of a request that is answered by a fault which may pass."""
_PROBED = 8  # tokens
_CERTAIN = 1e-4
"""By which a log-prob may be below 0 that is 0."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """What completions are to be like, whoever samples them."""

    generation: GenerationConfig
    rules: StopRules
    vocab_size: int
    tokenizer: Tokenizer


class EngineServer:
    """Asks one server. Every method raises EngineDownError where there is no answer now, and EngineRefusedError where
    what comes is of no use."""

    def __init__(
        self,
        config: EngineConfig,
        client: HttpClient,
        dialect: Dialect,
        way: EngineWay,
        sampling: Sampling,
        model: str,
        *,
        first_pause_s: float = 0.5,
    ) -> None:
        """`way`: how weights reach it. `model`: its name for the model that the run begins with. `first_pause_s`:
        before a request is repeated; each further time twice as long."""
        self.config = config
        self.dialect = dialect
        self.way = way
        self.as_begun = Held(0, model)
        """The weights that it has by itself."""
        self._client = client
        self._sampling = sampling
        self._first_pause_s = first_pause_s

    async def probe(self, prompt_ids: tuple[int, ...]) -> None:
        """See whether it gives ids and log-probs, and of which distribution; with the weights that it has by itself."""
        await self.sample_some(prompt_ids, self.as_begun)
        generation = self._sampling.generation
        is_plain = generation.temperature == 1.0
        is_filtered = generation.top_k > 0 or generation.top_p < 1.0 or generation.min_p > 0.0
        if is_plain and not is_filtered:
            return
        raw = self.dialect.raw
        if raw is None:
            raw = await self._gives_raw(prompt_ids)
        if raw and not is_plain:
            raise EngineRefusedError(
                "its log-probs are those before the temperature, and generation.temperature is "
                f"{generation.temperature:g}; start vLLM with --logprobs-mode processed_logprobs, or set it to 1"
            )
        if is_filtered and not raw:
            raise EngineRefusedError(
                "its log-probs are those after top_k, top_p and min_p, while the learner needs those before; start "
                "vLLM without --logprobs-mode, or leave these filters out"
            )

    async def _gives_raw(self, prompt_ids: tuple[int, ...]) -> bool:
        """Whether log-probs are those before filters: after top_k = 1 every token would be certain."""
        certain = msgspec.structs.replace(self._sampling.generation, temperature=1.0, top_k=1, top_p=1.0, min_p=0.0)
        sampled = await self._ask(Request(prompt_ids, 1, self._few, certain), self.as_begun)
        return min(sampled[0].log_probs) < -_CERTAIN

    @property
    def _few(self) -> int:
        return min(_PROBED, self._sampling.generation.max_completion_length)

    async def sample_some(self, prompt_ids: tuple[int, ...], held: Held) -> Sampled:
        """A few tokens with some weights."""
        return (await self._ask(Request(prompt_ids, 1, self._few, self._sampling.generation), held))[0]

    async def complete(self, prompt: Prompt, held: Held) -> tuple[Rollout, ...]:
        """The G completions of a prompt, ended as ours would be."""
        generation = self._sampling.generation
        G, most = generation.num_generations, generation.max_completion_length
        n = G if self.dialect.at_once else 1
        parts: dict[int, list[Sampled]] = {}

        async def ask(place: int) -> None:
            parts[place] = await self._ask_again(Request(prompt.prompt_ids, n, most, generation, prompt.slot), held)

        await together([partial(ask, place) for place in range(0, G, n)])
        completions = [sampled for place in sorted(parts) for sampled in parts[place]]
        sampling = self._sampling
        text_of = sampling.tokenizer.decode_sampled
        return tuple(
            finished(sampled, sampling.rules, most, version=held.version, text_of=text_of) for sampled in completions
        )

    async def _ask_again(self, request: Request, held: Held) -> list[Sampled]:
        for nth in range(1, _TRIES):
            try:
                return await self._ask(request, held)
            except EngineDownError as fault:
                if not fault.again:
                    raise
            await anyio.sleep(backoff_s(nth, self._first_pause_s))
        return await self._ask(request, held)

    async def _ask(self, request: Request, held: Held) -> list[Sampled]:
        body = await post(self._client, "/v1/completions", self.dialect.body(request, held))
        return read_answer(
            body,
            request.prompt_ids,
            samples=request.samples,
            most=request.most,
            vocab_size=self._sampling.vocab_size,
        )
