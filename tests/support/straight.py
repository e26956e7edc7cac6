"""The run as one loop: no actors, no tasks, no channels. What the drive must equal bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import msgspec

from troupe import RunConfig
from troupe.actors.learner.batch import CompletionLogProbs, as_rollouts, assemble
from troupe.actors.schedule import PromptSchedule, count_steps, tokenize_prompts
from troupe.actors.teacher.forward import TeacherForward, with_log_probs
from troupe.dataset import PromptDataset
from troupe.grpo import adamw_init, learning_rate, sync_reference, train_on_batch
from troupe.messages import Prompt, RolloutGroup, ScoredGroup, Slot
from troupe.policy import Policy, RolloutEngine, RolloutRequest, Weights, load_policy
from troupe.policy.load import begin_policy
from troupe.runtime import linux_cpu


class Straight(NamedTuple):
    """Where the loop ends."""

    weights: Weights
    optimizer_state: dict[str, mx.array]
    reference: Weights | None
    filtered: list[int]
    """Groups left out of each step."""
    num_tokens: int


def _parts(config: RunConfig, prompts: list[Prompt]) -> list[list[Prompt]]:
    parts = config.schedule.parts or 1
    dealt = [[prompt for prompt in prompts if prompt.slot.place % parts == number] for number in range(parts)]
    return [part for part in dealt if part]


class _Own:
    """The policy as its own teacher, of rows that have an answer."""

    def __init__(self, config: RunConfig, policy: Policy, dataset: PromptDataset) -> None:
        self._config, self._policy = config, policy
        template = config.teacher.prompt_template
        rows = [
            msgspec.structs.replace(
                row,
                prompt=template.replace("{prompt}", str(row.prompt)).replace(
                    "{privileged_context}", row.columns["answer"]
                ),
            )
            for row in dataset
        ]
        self._ids = tokenize_prompts(PromptDataset(rows), policy.tokenizer, config.data, max_tokens=999)
        self._average = {name: array.astype(mx.float32) for name, array in policy.weights.items()}

    def taught(self, scored: ScoredGroup, weights: Weights) -> ScoredGroup:
        if self._config.teacher.model_kind != "live":
            weights = {name: self._average[name].astype(array.dtype) for name, array in weights.items()}
        temperature = self._config.generation.temperature
        forward = TeacherForward(self._policy.config, weights, self._policy.base, temperature)
        prompt = msgspec.structs.replace(scored.group.prompt, prompt_ids=self._ids[scored.group.prompt.row])
        said = forward.taught(msgspec.structs.replace(scored.group, prompt=prompt))
        group = with_log_probs(scored.group, [rollout.teacher_log_probs for rollout in said.rollouts])
        return msgspec.structs.replace(scored, group=group)

    def follow(self, update: int, weights: Weights) -> None:
        teacher = self._config.teacher
        if teacher.model_kind == "ema" and update % teacher.sync_steps == 0:
            rate = teacher.update_rate
            self._average = {
                name: rate * weights[name].astype(mx.float32) + (1.0 - rate) * old
                for name, old in self._average.items()
            }
            mx.eval(list(self._average.values()))


def run_straight(config: RunConfig, reward: Callable[..., list[float]]) -> Straight:
    """A pinned run with one reward that wants `completion_ids` alone, with the run's number of BLAS threads."""
    with linux_cpu.blas_limited(config.schedule.blas_threads):
        return _run_straight(config, reward)


def _run_straight(config: RunConfig, reward: Callable[..., list[float]]) -> Straight:
    learner, generation = config.learner, config.generation
    policy, _ = begin_policy(config.model.path or "", config.model.dtype, config.adapter, config.seed)
    dataset = PromptDataset.from_json(config.data.path or "")
    ids = tokenize_prompts(dataset, policy.tokenizer, config.data, max_tokens=policy.config.max_position_embeddings)
    P = learner.batch_size
    schedule = PromptSchedule(dataset, ids, batch_size=P, seed=config.seed, shuffle=config.data.shuffle)
    total = count_steps(len(dataset), batch_size=P, epochs=learner.epochs, max_steps=learner.max_steps)
    log_probs = CompletionLogProbs(
        policy.config,
        generation.temperature,
        recompute=learner.gradient_checkpointing or False,
        base=policy.base,
        seed=config.seed,
    )

    teacher = None
    if config.teacher.path is not None:
        teaching = load_policy(config.teacher.path, config.teacher.dtype)
        teacher = TeacherForward(teaching.config, teaching.weights, teaching.base, generation.temperature)

    own = None if config.teacher.model_kind is None else _Own(config, policy, dataset)

    def complete(prompts: list[Prompt], weights: Weights, version: int) -> list[ScoredGroup]:
        records = learner.router_replay != "off"
        engine = RolloutEngine(
            policy.config, generation, stop_ids=policy.eos_ids, base=policy.base, records_experts=records
        )
        engine.load(weights, version)
        keys = [(config.seed, p.slot.step, p.slot.place, p.slot.attempt) for p in prompts]
        requests = [RolloutRequest(prompt_ids=p.prompt_ids, key=key) for p, key in zip(prompts, keys, strict=True)]
        scored: dict[int, ScoredGroup] = {}
        for completed in engine.decode(requests):
            group = RolloutGroup(
                prompt=prompts[completed.index],
                rollouts=as_rollouts(completed, policy.tokenizer.decode_sampled),
                prompt_experts=completed.prompt_experts,
            )
            group = group if teacher is None else teacher.taught(group)
            completion_ids: Any = [list(rollout.token_ids) for rollout in group.rollouts]
            scored[completed.index] = ScoredGroup(group=group, scores={"r": tuple(reward(completion_ids))})
        return [scored[i] for i in range(len(prompts))]

    versions: list[Weights] = [policy.weights]
    state = adamw_init(policy.weights)
    reference = policy.weights if learner.beta else None
    filtered, num_tokens = [], 0
    for step in range(total):
        sampled_from = max(0, step - config.schedule.max_staleness)
        kept: dict[int, ScoredGroup] = {}
        without: list[int] = []
        places = list(range(P))
        for attempt in range(learner.max_resampling_attempts + 1 if learner.dynamic_sampling else 1):
            prompts = [schedule.prompt(Slot(step=step, place=place, attempt=attempt)) for place in places]
            decoded = [complete(part, versions[sampled_from], sampled_from) for part in _parts(config, prompts)]
            groups = sorted((group for part in decoded for group in part), key=lambda group: group.group.prompt.slot)
            num_tokens += sum(
                len(g.group.prompt.prompt_ids) + len(r.token_ids) for g in groups for r in g.group.rollouts
            )
            constant = [len(set(group.scores["r"])) == 1 and learner.dynamic_sampling for group in groups]
            kept |= {place: g for place, g, same in zip(places, groups, constant, strict=True) if not same}
            places = [place for place, same in zip(places, constant, strict=True) if same]
            without += places
        filtered.append(len(without))
        weights = versions[-1]
        passes = learner.num_iterations
        if kept:
            prepared = assemble(
                [kept[place] if own is None else own.taught(kept[place], weights) for place in sorted(kept)],
                learner,
                weights={"r": 1.0},
                pad_id=policy.tokenizer.pad_token_id or 0,
                teacher=config.teacher if config.teacher.is_on else None,
            )
            result = train_on_batch(
                weights,
                state,
                prepared.batch,
                log_probs,
                learner,
                lr=[learning_rate(step * passes + i, total * passes, learner) for i in range(passes)],
                ref_weights=reference,
                max_completion_length=generation.max_completion_length,
            )
            weights, state = result.weights, result.optimizer_state
        for update in range(step * passes + 1, (step + 1) * passes + 1):
            if reference is not None and learner.sync_ref_model and update % learner.ref_model_sync_steps == 0:
                reference = sync_reference(reference, weights, learner.ref_model_mixup_alpha)
                mx.eval(list(reference.values()))
            if own is not None:
                own.follow(update, weights)
        versions.append(weights)
    return Straight(versions[-1], state, reference, filtered, num_tokens)
