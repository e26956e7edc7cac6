"""How likely given completions are to a policy: the learner's forward pass."""

from __future__ import annotations

from collections.abc import Sequence

from troupe.policy.network.architecture import Qwen3Config
from troupe.policy.network.head import TokenStatistics, token_statistics
from troupe.policy.network.packing import Packing
from troupe.policy.network.qwen3 import EMBEDDING, HEAD, Weights, hidden_states


def completion_statistics(
    config: Qwen3Config,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    temperature: float = 1.0,
) -> TokenStatistics:
    """Log-probabilities and entropies of R completions after their prompts, float32 (R, T), 0 after a row's own end.

    In nats, under softmax(logits / temperature); T is the longest completion. `prompts` are R rows of at least one id.
    Neighbours with the same prompt share its computation. Differentiable by the weights; `completion_gradients` does
    that with less memory.
    """
    packing = Packing(prompts, completions)
    hidden = hidden_states(config, weights, packing.ids[None], attention=packing).squeeze(0)
    head = weights[EMBEDDING if config.tie_word_embeddings else HEAD]
    log_probs, entropies = token_statistics(packing.sources(hidden), head, packing.targets, temperature)
    return TokenStatistics(packing.in_rows(log_probs), packing.in_rows(entropies))
