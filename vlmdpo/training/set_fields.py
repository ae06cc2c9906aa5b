"""`--set`: the other fields of TRL's `DPOConfig`, and which of them are not the user's to set."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import yaml
from trl import DPOConfig

from vlmdpo.config import TrainConfig, flag_name, set_key
from vlmdpo.errors import ConfigError, nearest

_OUR_FIELDS = {field.name for field in dataclasses.fields(TrainConfig)}
_REFERENCE = "reference log-probs are kept by --reference-cache, which is on by default"
_EVALUATION = "use --eval-steps, which evaluates on the test split of the data"
_BEST = "use --keep-best, which judges by the test split"
_CHECKPOINTS = "use --save-steps and --save-total-limit; --resume needs all that a checkpoint holds"
_UPLOAD = "upload the result with vlmdpo export --push-to-hub"
_STRATEGY = "use --strategy and --num-processes"
_NOTHING = "has no effect here"
_PRECISION = "evaluation computes as training does; it would round the weights that train"
# Field → what to do instead. They would undo what this package does, or be undone by it.
NOT_TO_SET = {
    "precompute_ref_log_probs": _REFERENCE,
    "precompute_ref_batch_size": _REFERENCE,
    "eval_strategy": _EVALUATION,
    "do_eval": _EVALUATION,
    "per_device_eval_batch_size": "evaluation takes batches as large as in training",
    "fp16_full_eval": _PRECISION,
    "bf16_full_eval": _PRECISION,
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "save_strategy": _CHECKPOINTS,
    "save_only_model": _CHECKPOINTS,
    "enable_jit_checkpoint": _CHECKPOINTS,
    "resume_from_checkpoint": "use --resume",
    "logging_strategy": "use --logging-steps",
    "auto_find_batch_size": "use --auto-batch-size",
    "activation_checkpointing": "use --gradient-checkpointing and --checkpointing",
    "train_sampling_strategy": "use --group-by-length",
    "length_column_name": "use --group-by-length",
    "label_smoothing_factor": "use --label-smoothing",
    "truncation_mode": "use --over-length: images are never cut",
    "model_init_kwargs": "use --dtype, --quantization and --attn-implementation",
    "fsdp": _STRATEGY,
    "fsdp_config": _STRATEGY,
    "deepspeed": _STRATEGY,
    "parallelism_config": _STRATEGY,
    "local_rank": _STRATEGY,
    "push_to_hub": _UPLOAD,
    **{f"hub_{name}": _UPLOAD for name in ("token", "private_repo", "model_id", "strategy")},
    **{f"hub_{name}": _UPLOAD for name in ("always_push", "revision")},
    "use_liger_kernel": "its loss reads rows of one answer, and here a row holds both",
    "liger_kernel_config": "its loss reads rows of one answer, and here a row holds both",
    "pad_token": "the model's tokenizer has one",
    "remove_unused_columns": "columns are chosen by the engine",
    "label_names": _NOTHING,
    "do_train": _NOTHING,
    "do_predict": _NOTHING,
    "dataset_num_proc": _NOTHING,
}
# Not with both answers of a pair in one row; stock TRL takes them, or says why not.
_NOT_WITH_PAIRS = {
    "padding_free": "rows of a pair have no padding; leave it out, or use --engine stock",
    "pad_to_multiple_of": "rows of a pair have no padding; leave it out, or use --engine stock",
}
# Field → (least, most) that TRL or transformers would take without a word, whatever it does: with
# a negative norm to clip to, steps go uphill.
_RANGES = {
    "max_grad_norm": (0.0, math.inf),
    "weight_decay": (0.0, math.inf),
    "adam_beta1": (0.0, _BELOW_ONE := math.nextafter(1.0, 0.0)),
    "adam_beta2": (0.0, _BELOW_ONE),
    "adam_epsilon": (0.0, math.inf),
    "neftune_noise_alpha": (0.0, math.inf),
    "router_aux_loss_coef": (0.0, math.inf),
    "ld_alpha": (0.0, 1.0),
    "rpo_alpha": (0.0, math.inf),
    "eval_delay": (0.0, math.inf),
    "ddp_timeout": (1.0, math.inf),
    "data_seed": (0.0, math.inf),
    "dataloader_prefetch_factor": (1.0, math.inf),
    "torch_empty_cache_steps": (1.0, math.inf),
    "ref_model_mixup_alpha": (0.0, 1.0),
    "ref_model_sync_steps": (1.0, math.inf),
}


def extra_fields(
    settings: tuple[str, ...], computed: Collection[str], *, is_shared: bool
) -> dict[str, Any]:
    """The fields of `--set`, with their values.

    Args:
        computed: names of the fields that follow from other options.
        is_shared: whether the engine is ours, not stock TRL.

    Raises ConfigError for one that is unknown or not theirs to set.
    """
    fields = {field.name: field for field in dataclasses.fields(DPOConfig) if field.init}
    extra: dict[str, Any] = {}
    for setting in settings:
        _, separator, text = setting.partition("=")
        key = set_key(setting)
        if not separator:
            raise ConfigError(
                f"--set: '{setting}' must be key=value, as in --set max_grad_norm=0.5"
            )
        if key in computed or key in _OUR_FIELDS:
            if key in _OUR_FIELDS:
                raise ConfigError(f"--set: use {flag_name(key)} for '{key}'")
            raise ConfigError(f"--set: '{key}' is determined by vlmdpo's own options")
        if key not in fields:
            raise ConfigError(f"--set: DPOConfig has no field '{key}'.{nearest(key, fields)}")
        instead = {**NOT_TO_SET, **(_NOT_WITH_PAIRS if is_shared else {})}.get(key)
        value = _parsed(text)
        default = fields[key].default
        if text == str(default):  # what a field is anyway may be said
            value = default
        if instead is not None and value != default:
            raise ConfigError(f"--set {key}: {instead}")
        if type(default) in (int, float) and not _is_number(value):
            raise ConfigError(f"--set: '{key}' takes a number, not '{text}'")
        if value != default:
            _check_range(key, value, text)
        extra[key] = value
    return extra


def _check_range(key: str, value: object, text: str) -> None:
    if key not in _RANGES or value is None:
        return
    least, most = _RANGES[key]
    if not _is_number(value):
        raise ConfigError(f"--set: '{key}' takes a number, not '{text}'")
    if not least <= float(str(value)) <= most:
        upper = {math.inf: " or more", 1.0: " to 1"}.get(most, " up to, but not, 1")
        raise ConfigError(f"--set: {key}={text} is out of range; give {least:g}{upper}")


def _is_number(value: object) -> bool:
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_one and math.isfinite(float(str(value)))


def _parsed(text: str) -> Any:
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError):  # plain text, such as a name or a path
        return yaml.safe_load(text) if text.lower() in ("true", "false") else text
