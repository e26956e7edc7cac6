"""What others call our settings: TRL's GRPOConfig and its command line, PEFT, mlx-lm-lora, mlx-lm.

One table. The command line and the configuration answer a foreign name with it, and `scripts/alias_tables.py` writes
it into docs/coming-from-trl.md. From a name that we do not have it leads to the nearest of ours: another spelling,
another section, somebody else's word. Quick to import.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Alias(NamedTuple):
    """Names of theirs that mean something of ours, or for which there is nothing here."""

    theirs: tuple[str, ...]
    """As they are written there."""
    ours: tuple[str, ...] = ()
    """Keys of the configuration, or options that begin with `--`; as many as `theirs`, each for its own, or all for
    each. Empty where there is none."""
    note: str = ""
    """What differs; where there is none of ours, why, or what to do."""


def _a(theirs: str, ours: str = "", note: str = "") -> Alias:
    return Alias(tuple(theirs.split()), tuple(ours.split()), note)


def _same(section: str, *names: str, note: str = "") -> Alias:
    return Alias(names, tuple(f"{section}.{name}" for name in names), note)


GRPO_CONFIG = (
    _a("model", "model.path", "models of the families that are known"),
    _a("peft_config", "adapter.kind", "its keys are in the section `[adapter]`; see [adapters](adapters.md)"),
    _a("train_dataset", "data.path", "a file, or `hf:NAME`; see [prompts](datasets.md)"),
    _a("eval_dataset eval_steps", "data.eval_path evaluation.every", "once a row; [SFT](sft.md): `sft.eval_dataset`"),
    _a("reward_funcs", "rewards.functions", "`FILE.py:NAME`; reward models are yours to call"),
    _a("environment_factory tools", "environment.factory environment.tools", "`FILE.py:NAME`, or in Python as in TRL"),
    _a("max_tool_calling_iterations", "environment.max_turns", "one more: it counts the policy's turns"),
    _a("output_dir", "output"),
    _a("seed", "seed"),
    _a("bf16 fp16", "model.dtype", "as the folder has it; float32 on a CPU"),
    _a("per_device_train_batch_size", "learner.batch_size", "it counts prompts here, not completions"),
    _same("learner", "gradient_accumulation_steps", note="splits the batch, does not multiply it"),
    _same("learner", "gradient_checkpointing", note="off unless memory asks for it"),
    _a("num_train_epochs", "learner.epochs", "an incomplete last batch is filled by the next epoch, not dropped"),
    _same("learner", "max_steps", note="learner batches"),
    _same("learner", "num_iterations", note="passes over a batch, each one update from all of its rows"),
    _a("learning_rate", "learner.lr", "the same default, 1e-6"),
    _a("lr_scheduler_type", "learner.lr_scheduler", "`linear`, `cosine`, `constant`"),
    _same("learner", "warmup_steps", note="a number of updates"),
    _same("learner", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    _same("learner", "max_grad_norm", note="0 never clips"),
    _a("shuffle_dataset", "data.shuffle"),
    _same("data", "chat_template_kwargs"),
    _same("generation", "num_generations"),
    _same("generation", "max_completion_length", note="the default is 256, not 512"),
    _same("generation", "temperature", "top_p", "top_k", "min_p"),
    _same("generation", "repetition_penalty", note="over the last `generation.repetition_context_size` tokens"),
    _a("generation_kwargs", "generation.logit_bias generation.stop", "each has a key; these and others"),
    _same("learner", "loss_type", "beta", "importance_sampling_level", "multi_objective_aggregation"),
    _same("learner", "epsilon", "epsilon_high", "delta"),
    _same("learner", "scale_rewards", note='texts only: `"group"`, `"batch"`, `"none"`'),
    _a("reward_weights", "rewards.weights"),
    _same("learner", "mask_truncated_completions", note="a stop string's end is no truncation"),
    _same("learner", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    _same("learner", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy"),
    _same("learner", "entropy_target", "entropy_coef_delta", "entropy_coef_min", "entropy_coef_max"),
    _same("learner", "router_aux_loss_coef", note="prompts of a group count once for each completion, as there"),
    _same("learner", "sapo_temperature_pos", "sapo_temperature_neg"),
    _same("learner", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
    _same("learner", "off_policy_mask_threshold", "use_bias_correction_kl"),
    _same("learner", "vllm_importance_sampling_correction", note="for older weights, and for engines"),
    _same("learner", "vllm_importance_sampling_mode"),
    _same("learner", "vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max"),
    _a("vllm_importance_sampling_cap", "learner.vllm_importance_sampling_clip_max"),
    _a(
        "save_steps save_total_limit",
        "checkpoint.every checkpoint.keep",
        "by default 50, not 500; 2 and the best stay, not all",
    ),
    _a("load_best_model_at_end", "checkpoint.keep_best", "it is kept, not loaded"),
    _a("metric_for_best_model greater_is_better", "checkpoint.metric_for_best checkpoint.greater_is_better"),
    _a("resume_from_checkpoint", "--resume", "of the run folder that `-o` names, from its newest whole checkpoint"),
    _a("report_to logging_steps", "metrics.sinks", "every step is logged"),
    _a("run_name", "metrics.wandb_name metrics.trackio_name", "the run folder's name"),
    _a("project", "metrics.wandb_project metrics.trackio_project"),
    _a("log_completions", "metrics.sinks", "`sqlite`, which is on by default, has all of them; `troupe inspect`"),
    _a("num_completions_to_print", "metrics.completions", "for the trackers; `troupe inspect` shows any"),
    _a("log_level", "daemon.log_level", "the console says one line a step"),
    _a(
        "full_determinism data_seed",
        "schedule.mode seed",
        "the default mode, `pinned`, is deterministic; one seed for all",
    ),
)

OTHER_COMMANDS = (
    _a("teacher_model_name_or_path teacher_model_kind", "teacher.path teacher.model_kind", "[here](distillation.md)"),
    _a("teacher_update_rate teacher_sync_steps", "teacher.update_rate teacher.sync_steps", "SDFTConfig's"),
    _a("--model_name_or_path", "model.path", "models of the families that are known"),
    _a("--dataset_name", "data.path", "`hf:NAME`, or a file"),
    _a("--dataset_config --dataset_train_split", "data.path", "within the name: `hf:NAME?config=…&split=…`"),
    _a("--dataset_test_split", "data.eval_path", "within the name: `hf:NAME?split=…`"),
    _a("--dtype --torch_dtype", "model.dtype"),
    _a("--reward_model_name_or_path", "rewards.functions", "a reward model is yours to call, in a function"),
    _a("--max-tokens --max-new-tokens", "generation.max_completion_length"),
    _a("--temp", "generation.temperature"),
    _a("--system-prompt", "data.system_prompt"),
    _a("--save-path", "--output"),
    _a("--num-return-sequences", "generation.num_generations"),
    _a("--apply-chat-template --use-default-chat-template", "data.chat"),
    _a("--chat-template-config", "data.chat_template_kwargs"),
    _a("adv_estimator --advantage-estimator", "learner.advantage", "`gdpo` is `learner.multi_objective_aggregation`"),
    _a("normalize_advantages norm_adv_by_std_in_grpo", "learner.scale_rewards", '`"batch"`, and `"group"` or `"none"`'),
    _a("loss_mode", "learner.loss_type", "`clip_cov` and `kl_cov` too; `dppo_tv` is `dppo`, `vanilla` is `dapo`"),
    _a("clip_ratio_low clip_ratio_high", "learner.epsilon learner.epsilon_high"),
    _a("easy_fraction hard_fraction", "curriculum.easy_weight curriculum.hard_weight", "of a row, not of a batch"),
    _a("online_difficulty_filtering filter_groups", "learner.dynamic_sampling"),
    _a("kl_tau", "learner.dppo_kl_tau"),
    _same("sft", "max_length", "completion_only_loss", "assistant_only_loss", note="SFTConfig's; see [rows](sft.md)"),
)

MLX_LM_LORA = (
    _a("--model", "model.path"),
    _a("--data", "data.path", "one file, not a folder of train, valid and test; rows have `prompt` and any columns"),
    _a("--group-size", "generation.num_generations", "the default is 8, not 4"),
    _a("--batch-size", "learner.batch_size", "prompts in both"),
    _a("--iters --epochs", "learner.max_steps learner.epochs"),
    _a("--learning-rate", "learner.lr", "the default is 1e-6 for all weights, 1e-5 for an adapter"),
    _a("--lr-schedule", "learner.lr_scheduler", "`linear`, `cosine`, `constant`"),
    _a("--max-completion-length", "generation.max_completion_length"),
    _a("--temperature", "generation.temperature", "the default is 1.0"),
    _a("--beta", "learner.beta", "the default is 0, not 0.1"),
    _a("--epsilon --epsilon-high", "learner.epsilon learner.epsilon_high", "the default is 0.2, not 1e-4"),
    _a("--grpo-loss-type", "learner.loss_type"),
    _a("--importance-sampling-level", "learner.importance_sampling_level"),
    _a(
        "--reward-functions --reward-functions-file",
        "rewards.functions",
        "`FILE.py:NAME`, no registry; columns by their own names, not `types`",
    ),
    _a("--reward-weights", "rewards.weights"),
    _a("--grad-checkpoint", "learner.gradient_checkpointing"),
    _a("--gradient-accumulation-steps --grad-accumulation-steps", "learner.gradient_accumulation_steps", "splits it"),
    _a("--save-every", "checkpoint.every"),
    _a("--adapter-path", "adapter.resume_from", "to use one, or to begin with it; what a run makes is in its `final/`"),
    _a("--resume-adapter-file", "adapter.resume_from", "an adapter's folder; `--resume` goes on with a run"),
    _a("--train-type --fine-tune-type", "adapter.kind", "left out, all weights are trained"),
    _a("--num-layers --lora-layers", "adapter.layers", "left out, all of them have an adapter, not 16"),
    _a("lora_parameters", "adapter.rank adapter.alpha adapter.dropout adapter.target_modules", "alpha is scale × rank"),
    _a("scale", "adapter.alpha", "scale × rank; the scale is 2 where nothing is named, not 20"),
    _a("--optimizer-config", "learner.adam_beta1 learner.adam_beta2 learner.adam_epsilon", "AdamW"),
    _a("--steps-per-report --report-to --wandb", "metrics.sinks", "every step is logged"),
    _a("--project-name", "metrics.wandb_project metrics.trackio_project"),
    _a("--val-batches --steps-per-eval", "data.eval_path evaluation.every", "all rows, or `limit` of a set"),
    _a("--max-seq-length", "data.max_prompt_tokens generation.max_completion_length", "of prompt and completion"),
    _a("--seed", "seed"),
    _a("--mask-prompt", "sft.completion_only_loss", "on by default, in `troupe sft`"),
)

ADAPTERS = (
    _a("use_peft", "adapter.kind", "`--lora RANK` says both"),
    _a("r lora_r lora_rank", "adapter.rank", "the default is 16"),
    _a("lora_alpha", "adapter.alpha", "the scale is alpha / rank; left out, alpha is twice the rank"),
    _a("lora_dropout", "adapter.dropout", "0 unless it is named"),
    _a("lora_target_modules", "adapter.target_modules", "left out, all seven matrices of a layer"),
    _a("exclude_modules", "adapter.target_modules", "name the others, or one regular expression"),
    _a("layers_to_transform", "adapter.layers"),
    _same("adapter", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora"),
    _a("init_lora_weights", "adapter.init", '`"default"`, `"gaussian"`'),
    _a("use_dora", "adapter.kind", '`"dora"`'),
    _a("load_in_…", "model.path", "a folder that `mlx_lm.convert -q` has made; see [adapters](adapters.md)"),
)

ABSENT = (
    _a(
        "use_vllm vllm_… use_transformers_… transformers_… cache_implementation",
        "",
        "Troupe generates itself; in `free`, [external engines](engines.md) may, too",
    ),
    _a(
        "steps_per_generation generation_batch_size",
        "",
        "every update takes the whole batch; `learner.num_iterations` takes it several times",
    ),
    _a("eval_… per_device_eval_batch_size num_generations_eval --test-batches", "", "see `evaluation.sets`"),
    _a("optim optim_… --optimizer lr_scheduler_kwargs", "", "AdamW always; the schedules have no further settings"),
    _a("warmup_ratio", "", "give a number of updates, `learner.warmup_steps`"),
    _a("max_prompt_length", "", "prompts are not cut; `data.max_prompt_tokens` refuses longer ones"),
    _a("deepspeed fsdp fsdp_… accelerator_config ddp_… ds3_… local_rank", "", "one device learns"),
    _a("use_liger_kernel liger_… torch_… attn_implementation", "", "the kernels are MLX's and Troupe's own"),
    _a("--clear-cache-threshold --prefill-step-size", "", "memory is kept below `memory_limit_gb`"),
    _a(
        "model_init_kwargs disable_dropout cast_lm_head_to_fp32",
        "",
        "networks without dropout; their type is `model.dtype`",
    ),
    _a("push_to_hub hub_… log_completions_hub_repo", "", "`hf upload NAME OUT/final` does it"),
    _a("remove_unused_columns log_multimodal log_unique_prompts", "", "rewards and `run.sqlite` have all columns"),
    _a("dataloader_… streaming dataset_streaming pad_to_multiple_of", "", "all prompts are in memory, none is padded"),
    _a(
        "trust_remote_code model_revision",
        "",
        "code of a model folder is never run; fetch a revision with `hf download`",
    ),
    _a("do_train do_eval --train --test --train-mode", "", "`troupe train`, `troupe sft`, `troupe eval` are commands"),
    _a("rollout_func", "", "an environment plays what such a function would"),
    _a("--fuse --merge", "", "`troupe fuse` is a command"),
    _a(
        "lora_… modules_to_save layers_pattern layer_replication",
        "",
        "of each matrix A and B are trained, nothing else",
    ),
    _a("bnb_… qat_… --quantize-activations", "", "`mlx_lm.convert -q` packs a model, before or after training"),
    _a(
        "--judge --reference-model-path",
        "",
        "a judge is a reward function of yours; the reference is the model that the run begins with",
    ),
    _a("--config -c", "", "the file is given without a flag: `troupe train RUN.toml`, in TOML"),
    _a("--kv-… --max-kv-size --quantized-kv-start --prompt-cache-file", "", "the cache is whole, in the weights' type"),
    _a("--draft-model --num-draft-tokens --image --prefill-response", "", "one model continues one text"),
    _a("--ignore-chat-template", "", "texts go to the model as they are, unless `--chat` is given"),
    _a("--verbose -v", "", "`--json` has all figures"),
    _a("--extra-eos-token", "", "stop strings are `generation.stop` of a run"),
)
"""A name that ends in … stands for all that begin so."""

COMMANDS = {
    "grpo": "train",
    "lora": "sft",
    "finetune": "sft",
    "fine_tune": "sft",
    "run": "train",
    "start": "train",
    "evaluate": "eval",
    "test": "eval",
    "chat": "generate",
    "infer": "generate",
    "complete": "generate",
    "sample": "generate",
    "env": "doctor",
    "check": "doctor",
    "show": "inspect",
    "view": "inspect",
    "look": "inspect",
    "merge": "fuse",
    "html": "report",
    "plot": "report",
    "end": "drain",
    "kill": "stop",
    "continue": "resume",
    "ps": "status",
}
"""What others call a command → ours."""

TABLES = {
    "GRPOConfig": GRPO_CONFIG,
    "mlx-lm-lora": MLX_LM_LORA,
    "LoraConfig": ADAPTERS,
    "other commands": OTHER_COMMANDS,
    "absent": ABSENT,
}
"""What is written into the documents, by the names that the marks there have."""


class Meaning(NamedTuple):
    """What one foreign name is here."""

    ours: tuple[str, ...]
    note: str


def normalized(name: str) -> str:
    """A name as one writes it in Python: `--learning-rate` → `learning_rate`."""
    return name.strip().lstrip("-").replace("-", "_").lower()


def meaning_of(name: str) -> Meaning | None:
    """What a foreign name is here; None where the table does not know it."""
    name = normalized(name)
    family = next((meaning for start, meaning in _FAMILIES.items() if name.startswith(start)), None)
    return _MEANINGS.get(name) or family


def known_names() -> list[str]:
    """All foreign names, normalized."""
    return [name for name in _MEANINGS if not name.endswith("…")]


def _meanings() -> dict[str, Meaning]:
    found: dict[str, Meaning] = {}
    for table in TABLES.values():
        for alias in table:
            paired = len(alias.theirs) == len(alias.ours)
            for place, name in enumerate(alias.theirs):
                ours = (alias.ours[place],) if paired else alias.ours
                found.setdefault(normalized(name), Meaning(ours, alias.note))
    return found


_MEANINGS = _meanings()
_FAMILIES = {name.removesuffix("…"): meaning for name, meaning in _MEANINGS.items() if name.endswith("…")}

_LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")


def ours_for(name: str, keys: Sequence[str]) -> Meaning | None:
    """What a name, in any spelling and with any section or none, is among our `section.key`s; None: nothing is known.

    `learning_rate`, `--Learner.LR`, `lr` and `generation.lr` are all `learner.lr`.
    """
    whole = normalized(name)
    leaf = whole.rpartition(".")[2]
    named = [key for key in keys if key.rpartition(".")[2] == leaf]
    # a warm start has keys of names that others have, who are meant more often
    own = [key for key in keys if key == whole] or [key for key in named if not key.startswith("warm_start.")] or named
    alias = meaning_of(leaf)
    if own:
        return Meaning(tuple(own), alias.note if alias is not None and set(alias.ours) <= set(own) else "")
    return alias


def foreign_for(name: str) -> tuple[str, Meaning] | None:
    """Somebody else's name that looks most like this one, and what it is here."""
    close = close_to(normalized(name).rpartition(".")[2], known_names())
    meaning = meaning_of(close) if close is not None else None
    return (close, meaning) if close is not None and meaning is not None else None


def describe_meaning(meaning: Meaning) -> str:
    """What a name is here, as a clause for a message."""
    note = plain(meaning.note)
    if not meaning.ours:
        return f"there is none here: {note}"
    return f"it is {' or '.join(meaning.ours)} here{f' ({note})' if note else ''}"


def plain(note: str) -> str:
    """A note without its Markdown."""
    return _LINK.sub(r"\1", note).replace("`", "")


def close_to(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like it, if any does."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return close[0] if close else None
