"""Who completes the rows of evaluations: once each, or as episodes where the policy acts."""

from collections.abc import Callable

from troupe.actors.evaluator.decoding import CompletionDecoder, Decoder
from troupe.actors.evaluator.episodes import EpisodeDecoder
from troupe.actors.generator.episodes import EpisodeLimits
from troupe.policy import GenerationConfig, RolloutEngine, Tokenizer
from troupe.run.acting import ActingSetup
from troupe.runtime.device import DeviceThread
from troupe.runtime.reporter import Reporter


def make_decoder(
    engine: Callable[[], RolloutEngine],
    generation: GenerationConfig,
    device: DeviceThread,
    *,
    tokenizer: Tokenizer,
    acting_setup: ActingSetup | None,
    seed: int,
    report: Reporter,
) -> Decoder:
    """`engine` makes one for `generation`. `acting_setup`: where the policy acts."""
    decode = tokenizer.decode_sampled
    if acting_setup is None:
        return CompletionDecoder(engine, device, seed=seed, decode_text=decode, report=report)
    rules = acting_setup.rules
    limits = EpisodeLimits(
        num_generations=generation.num_generations,
        max_completion_length=generation.max_completion_length,
        context=rules.context,
        max_turns=rules.max_turns,
    )
    conversations = acting_setup.conversations()
    return EpisodeDecoder(
        engine, device, conversations=conversations, limits=limits, seed=seed, decode_text=decode, report=report
    )
