"""The maker of what learns: the trainer, and its other ranks where several processes learn together."""

from functools import partial
from typing import Any

from troupe.actors.generator.hosted import GeneratorHost
from troupe.actors.learner.held_out import HeldOutRows
from troupe.actors.learner.rank_wire import RankSetup
from troupe.actors.learner.ranks import RankProcesses
from troupe.actors.learner.train import BatchTrainer
from troupe.actors.teacher.own import OwnTeacher
from troupe.grpo.supervised import Supervision
from troupe.policy import is_on_cpu
from troupe.run.generators import base_source
from troupe.run.ledgers import Factories, Ledgers
from troupe.run.prepare import Prepared
from troupe.runtime.reporter import Reporter


def make_trainer(prepared: Prepared, factories: Factories, ledgers: Ledgers, report: Reporter) -> BatchTrainer:
    """By the settings of the run."""
    config, policy, rewards = prepared.config, prepared.start.policy, prepared.inputs.rewards
    trainer = factories.trainer(
        config.learner,
        policy.config,
        reward_weights=dict(zip(rewards.names, rewards.weights, strict=True)),
        temperature=config.generation.temperature,
        max_completion_length=config.generation.max_completion_length,
        pad_id=policy.pad_id,
        total_steps=prepared.inputs.total_steps,
        streams=config.schedule.learner_streams or 1,
        rates=prepared.live.rates,
        base=policy.base,
        seed=config.seed,
        gamma=config.environment.gamma,
    )
    trainer.teacher = config.teacher if config.teacher.is_on else None
    if prepared.inputs.demonstrated is not None:
        shown, temperature = prepared.inputs.demonstrated, config.generation.temperature
        trainer.own_teacher = OwnTeacher(config.teacher, policy.config, policy.base, temperature, shown)
    trainer.supervision = supervision_of(prepared)
    if prepared.inputs.supervised is not None and (held_out := prepared.inputs.supervised.held_out):
        trainer.held_out = HeldOutRows(held_out, every=config.sft.eval_steps, pad_id=policy.pad_id)
    if config.metrics.store_token_figures and "sqlite" in config.metrics.sinks:
        trainer.watch()
    if prepared.ranks > 1:
        cards, on_cpu = prepared.cards, is_on_cpu()
        host = GeneratorHost(ledgers.board, policy.base, ledgers.devices["generator"])
        ranks = trainer.others = RankProcesses(
            _rank_setup(prepared, ledgers, on_cpu=on_cpu),
            [{} if cards is None else cards.of_rank(rank) for rank in range(1, prepared.ranks)],
            backend="ring" if on_cpu else "nccl",
            folder=prepared.folder,
            silent_s=config.schedule.rank_timeout_s,
            trainer=trainer,
            host=host,
            report=report,
        )
        ledgers.hosts += [partial(ranks.generator, rank) for rank in prepared.hosts]
    return trainer


def supervision_of(prepared: Prepared) -> Supervision | None:
    """How the supervised steps are learned, where there are any."""
    config, supervised = prepared.config, prepared.inputs.supervised
    if supervised is None:
        return None
    if config.task == "sft":
        learner = config.learner
        rates: dict[str, Any] = {"lr_scheduler": learner.lr_scheduler, "warmup_steps": learner.warmup_steps}
    else:
        warm = config.warm_start
        rates = {"lr": warm.lr, "lr_scheduler": warm.lr_scheduler, "warmup_steps": warm.warmup_steps}
    return Supervision(steps=supervised.steps, max_completion_length=supervised.longest_completion, **rates)


def _rank_setup(prepared: Prepared, ledgers: Ledgers, *, on_cpu: bool) -> RankSetup:
    config, policy = prepared.config, prepared.start.policy
    return RankSetup(
        learner=config.learner,
        policy=policy.config,
        base=base_source(prepared),
        temperature=config.generation.temperature,
        max_completion_length=config.generation.max_completion_length,
        pad_id=policy.pad_id,
        total_steps=prepared.inputs.total_steps,
        streams=config.schedule.learner_streams or 1,
        seed=config.seed,
        on_cpu=on_cpu,
        blas_threads=config.schedule.blas_threads,
        supervision=supervision_of(prepared),
        max_staleness=ledgers.board.max_staleness,
        limit_gb=None if on_cpu else prepared.memory.limit_gb,
    )
