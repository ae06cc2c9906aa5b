"""From settings to a trainer that has passed its checks: model, reference cache, engine, and why
the engine is another.

Imports torch only when called, so that the command above it stays light.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.config import TrainConfig
from vlmdpo.data import store
from vlmdpo.errors import ConfigError, DataError, ModelError

_ROWS_CHECKED = 4
_ROWS_LOOKED_AT = 64


@dataclass
class Setup:
    """Everything a run needs, ready to train."""

    trainer: Any
    processor: Any
    dataset: Any
    watch: Any
    fallback_reason: str | None
    over_length: list[dict[str, Any]]
    data: Path

    @property
    def is_sharded(self) -> bool:
        """Whether no process has all of the model, so that a pass needs them all."""
        from vlmdpo.distributed.processes import SHARDED_STRATEGIES, launched_strategy

        return launched_strategy() in SHARDED_STRATEGIES

    def examples(self, count: int = _ROWS_CHECKED) -> list[dict[str, Any]]:
        """A few rows to check on: of the first ones those with long answers, where a mistake in one
        would show.
        """
        texts = self.trainer.train_dataset.select_columns(["chosen", "rejected"])[:_ROWS_LOOKED_AT]
        lengths = [
            min(len(str(c)), len(str(r)))
            for c, r in zip(texts["chosen"], texts["rejected"], strict=True)
        ]
        longest = sorted(range(len(lengths)), key=lambda row: -lengths[row])[:count]
        return [self.trainer.train_dataset[row] for row in longest]


def set_up_training(config: TrainConfig, args: Any, data: Path, watch: Any) -> Setup:
    """Load, wrap, and choose the engine. Raises ConfigError, DataError, ModelError."""
    from vlmdpo.distributed.processes import SHARDED_STRATEGIES, launched_strategy
    from vlmdpo.engine.lengths import row_lengths
    from vlmdpo.models.load import load_model, load_processor
    from vlmdpo.training import activation_checkpointing
    from vlmdpo.training.arguments import enable_evaluation, lora_config
    from vlmdpo.training.sharding import check_sharding, shard_language_layers
    from vlmdpo.training.trainer import make_trainer

    origin: dict[str, Any] = {
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
    }
    dataset = store.load(data)
    dataset = dataset.add_column("row", range(len(dataset)))
    held_out, all_rows = _held_out(config, data, len(dataset))
    processor = load_processor(config.model, image_splitting=config.image_splitting, **origin)
    dataset, over_length = _within(config, dataset, processor, data)
    if held_out is not None:
        held_out, _ = _within(config, held_out, processor, data)
        enable_evaluation(args, config.eval_steps)
    how: dict[str, Any] = {
        "dtype": config.dtype,
        "device": config.device,
        "attention": config.attn_implementation,
        **origin,
    }
    shared = launched_strategy()
    whole_on_cpu = (
        {"device": "cpu"} if shared in SHARDED_STRATEGIES else {}
    )  # it may fit no GPU before it is shared out
    model = load_model(config.model, quantization=config.quantization, **{**how, **whole_on_cpu})
    _freeze(model, config)
    check_sharding(shared, config, dataset)
    engine, reason = _engine(config, model)
    references = _references(config, args, data, model, processor, engine, all_rows)
    # With an adapter the reference is the same weights with the adapter off; with a cache, what
    # they said at the start.
    second = not config.lora and references is None
    trainer = make_trainer(
        engine=engine,
        model=model,
        reference=load_model(config.model, **how) if second else None,
        processor=processor,
        dataset=dataset,
        held_out=held_out,
        args=args,
        lora=lora_config(config, model),
        watch=watch,
        references=references,
        conditional=all_rows if config.losses().is_mdpo else 0,
    )
    setup = Setup(trainer, processor, dataset, watch, reason, over_length, data)
    if trainer.is_fsdp_enabled:
        shard_language_layers(trainer)
    if setup.is_sharded:
        trainer.add_callback(_late_checks(setup, config))  # now no process's model could run alone
    else:
        _self_check(setup)
    if config.group_by_length or (config.group_by_length is None and trainer.engine == "rows"):
        trainer.lengths = [
            length.longest for length in row_lengths(processor, dataset, store.read_manifest(data))
        ]
    if config.feature_cache:
        _keep_features(setup, data)
    if config.auto_batch_size:
        trainer.enable_auto_batch()
    if config.gradient_checkpointing:
        activation_checkpointing.apply(
            trainer, config.checkpointing, setup.examples(config.per_device_train_batch_size)
        )
    return setup


def _held_out(config: TrainConfig, data: Path, rows: int) -> tuple[Any, int]:
    """The rows of the test split, numbered behind the `rows` that train, where they are evaluated
    on; and how many rows there are in all. Raises ConfigError for `--eval-steps` where there is no
    such split.
    """
    if not store.has_test_split(data):
        if config.eval_steps:
            raise ConfigError(
                "--eval-steps: this data has no test split; make one with vlmdpo prepare "
                "--test-size 0.05"
            )
        return None, rows
    held_out = store.load(data, "test")
    all_rows = rows + len(held_out)
    return (
        None if config.eval_steps == 0 else held_out.add_column("row", range(rows, all_rows))
    ), all_rows


def _late_checks(setup: Setup, config: TrainConfig) -> Any:
    """The checks before a run, once every process has its part of the model; each of them takes
    part.
    """
    from transformers import TrainerCallback

    class LateChecks(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            wanted = setup.trainer.engine
            _self_check(setup)
            if setup.trainer.engine != wanted:
                raise ModelError(
                    f"no shared prefix ({setup.fallback_reason}); run it with --engine stock, or "
                    "on one GPU"
                )
            if not state.global_step:  # a resumed policy has left the reference
                _check_before(setup)

    return LateChecks()


def _freeze(model: Any, config: TrainConfig) -> None:
    """Let the parts of `--freeze` not train. Raises ConfigError where nothing is left that does."""
    from vlmdpo.models.families import parts

    frozen = config.frozen_parts()
    for part, _, parameter in parts(model) if frozen else ():
        parameter.requires_grad_(part not in frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()) and not config.lora:
        raise ConfigError(f"--freeze {config.freeze} leaves nothing to train")


def _within(
    config: TrainConfig, dataset: Any, processor: Any, data: Path
) -> tuple[Any, list[dict[str, Any]]]:
    """The rows within `--max-length`, or whose answers may be trimmed to it; and what was done with
    the others.
    """
    from vlmdpo.engine.lengths import row_lengths, sift

    if config.max_length is None:
        return dataset, []
    stay, records = sift(
        row_lengths(processor, dataset, store.read_manifest(data)),
        config.max_length,
        config.over_length,
    )
    if not stay:
        shortest = min(
            record["prompt"] + max(record["chosen"], record["rejected"]) for record in records
        )
        raise DataError(
            f"--max-length {config.max_length}: no row is that short; the shortest has {shortest} "
            "tokens with its images"
        )
    if records:
        done = Counter(record["done"] for record in records)
        what = " and ".join(f"{count:,} {name}" for name, count in sorted(done.items()))
        first = ", ".join(str(record["row"]) for record in records[:5]) + (
            " ..." if len(records) > 5 else ""
        )
        ui.warn(
            f"{len(records):,} of {len(dataset):,} rows are over --max-length "
            f"{config.max_length}: {what} (rows {first})"
        )
    return dataset.select(stay), records


def _engine(config: TrainConfig, model: Any) -> tuple[str, str | None]:
    from vlmdpo.engine.forward import check_pairs_shareable
    from vlmdpo.engine.packed_attention import CannotShare

    if config.engine == "stock":
        return "stock", None
    try:
        check_pairs_shareable(model)
    except CannotShare as why:
        return "rows", str(why)
    return "shared", None


def _references(
    config: TrainConfig, args: Any, data: Path, model: Any, processor: Any, engine: str, rows: int
) -> Any:
    """The cache for this run, holding what earlier runs with the same reference found; None where
    it is not wanted.
    """
    from importlib.metadata import version

    from vlmdpo.distributed.processes import launched_strategy
    from vlmdpo.engine import reference_cache
    from vlmdpo.models import digest

    if not config.reference_cache:
        return None
    if args.sync_ref_model:
        ui.warn("no reference cache: sync_ref_model moves the reference while it trains")
        return None
    if not config.lora and launched_strategy():
        ui.warn(
            "no reference cache: full fine-tuning under FSDP or DeepSpeed keeps a reference model "
            "of its own"
        )
        return None
    manifest = store.read_manifest(data) or {}
    facts = {
        "weights": digest.weights_digest(model),
        "processor": digest.processor_digest(processor),
        "data": [manifest.get("key"), manifest.get("rows_out")],
        "computed": [
            str(model.dtype),
            args.bf16,
            args.fp16,
            engine,
            args.max_length,
            args.ld_alpha,
        ],
        "corrupted": args.seed if config.losses().is_mdpo else None,
        "transformers": version("transformers"),
    }
    rows *= 2 if config.losses().is_mdpo else 1  # mDPO's corrupted copies are rows of their own
    cache = reference_cache.ReferenceCache(data, reference_cache.key_of(facts), rows)
    if cache.known:
        ui.say(f"reference log-probs: {cache.known:,} of {rows:,} rows found in {cache.path}")
    return cache


def _keep_features(setup: Setup, data: Path) -> None:
    """Let the trainer keep image features on disk, having said how much that takes. Raises
    DataError for a full disk.
    """
    from vlmdpo.engine import feature_cache, reference_cache
    from vlmdpo.engine.batch_context import BATCH_CONTEXT
    from vlmdpo.models import digest
    from vlmdpo.models.families import vision_parameters
    from vlmdpo.training import doctor

    trainer = setup.trainer
    shared = trainer.shared_forwards[0]
    manifest = store.read_manifest(data) or {}
    facts = {
        "tower": feature_cache.tower_digest(vision_parameters(shared.backbone)),
        "processor": digest.processor_digest(setup.processor),
        "data": [manifest.get("key"), manifest.get("rows_out")],
        "computed": [str(trainer.model.dtype), trainer.args.bf16, trainer.args.fp16],
    }
    cache = feature_cache.FeatureCache(data, reference_cache.key_of(facts))
    examples = setup.examples()
    context = shared.new_batch()
    batch = trainer.data_collator([dict(example) for example in examples])
    doctor.token_logps(trainer, {**batch, BATCH_CONTEXT: context})
    per_row = context.image_feature_bytes / len(examples)
    known, free = cache.known(), shutil.disk_usage(data).free
    rows = sum(map(len, trainer.datasets))
    needed = per_row * (rows - known)
    ui.say(
        f"image features: {known:,} of {rows:,} rows found; the others will take about "
        f"{ui.human_bytes(needed)} in {cache.path}"
    )
    if needed > free:
        raise DataError(
            f"--feature-cache: about {ui.human_bytes(needed)} needed, {ui.human_bytes(free)} free "
            f"at '{data}'"
        )
    trainer.features = cache
    trainer.use_engine(trainer.engine)


def _self_check(setup: Setup) -> None:
    """The engine against stock rows on the first pair; on a disagreement the next simpler engine,
    with the reason.
    """
    from vlmdpo.training import doctor

    trainer = setup.trainer
    while trainer.engine != "stock":
        example = setup.examples()[0]
        check = (
            doctor.self_check(trainer, example)
            if trainer.engine == "shared"
            else doctor.rows_check(trainer, example)
        )
        if check.passed:
            ui.say(f"self-check: {check.name} {check.seen}")
            break
        setup.fallback_reason = f"{check.name}: {check.cause}"
        ui.warn(f"self-check: {check.name} {check.seen}; going on with a simpler engine")
        trainer.use_engine("rows" if trainer.engine == "shared" else "stock")
    if setup.fallback_reason and trainer.engine != "shared":
        how = "encoding each image once" if trainer.engine == "rows" else "as TRL does"
        ui.warn(f"no shared prefix ({setup.fallback_reason}); two rows a pair, {how}")


def check(setup: Setup, config: TrainConfig) -> None:
    """The brief checks before a run, and the reference log-probs of runs whose reference is about
    to change.

    Raises ModelError where the run could not learn; warns where it would learn less. Of a sharded
    model: later, see `_late_checks`.
    """
    if not setup.is_sharded:
        _check_before(setup)
    cache = setup.trainer.references
    numbers = [row for part in setup.trainer.datasets for row in part["row"]]
    rows = [row + copy for row in numbers for copy in {0, setup.trainer.conditional}]
    if cache is not None and not config.lora and not cache.holds(rows):
        setup.trainer.compute_references()


def _check_before(setup: Setup) -> None:
    from vlmdpo.training import doctor

    found = doctor.checkup(setup.trainer, setup.examples())
    for finding in found:
        if finding.passed is False:
            ui.warn(f"check: {finding.name}: {finding.seen}. Likely cause: {finding.cause}")
    if not found[0].passed:
        raise ModelError(
            f"the loss at step 0 is {found[0].seen}, not ln 2. Likely cause: {found[0].cause}"
        )
    ui.say("checks: " + "; ".join(f"{finding.name} ({finding.seen})" for finding in found))


def examine(setup: Setup, config: TrainConfig) -> dict[str, Any]:
    """`--doctor`: every check, as a table. Raises ModelError where one fails."""
    from vlmdpo.training import doctor

    trainer = setup.trainer
    found = [*_engine_findings(setup), *doctor.checkup(trainer, setup.examples())]
    if config.lora and not setup.trainer.args.process_index:
        with tempfile.TemporaryDirectory() as folder:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(
                folder, save_embedding_layers=False
            )
            found.append(doctor.adapter_check(trainer, setup.examples()[0], Path(folder)))
    marks = {True: "yes", False: "NO", None: "-"}
    rows = [[f.name, marks[f.passed], f.seen] for f in found]
    ui.table("Before training", ["Check", "Holds", "Seen"], rows, text=(0, 1, 2))
    failed = [f for f in found if f.passed is False]
    if failed:
        raise ModelError(f"{failed[0].name}: {failed[0].seen}. Likely cause: {failed[0].cause}")
    return {
        "checks": [vars(f) for f in found],
        "engine": trainer.engine,
        "fallback_reason": setup.fallback_reason,
    }


def _engine_findings(setup: Setup) -> list[Any]:
    from vlmdpo.training import doctor

    if setup.trainer.engine == "shared":
        return [doctor.self_check(setup.trainer, setup.examples()[0])]
    return [
        doctor.Check(
            "shared forward", None, f"not used: {setup.fallback_reason or 'stock asked for'}"
        )
    ]


def explain_non_finite_loss(setup: Setup, problem: Any, folder: Path) -> ModelError:
    """The error for a loss that is no number: which rows make it so, and what to do."""
    from vlmdpo.training import checkpoints

    last = next(iter(reversed(checkpoints.list_checkpoints(folder))), None)
    on = (
        f"lower --learning-rate and go on from {last.name} with --resume"
        if last
        else "lower --learning-rate"
    )
    copies = setup.trainer.conditional  # mDPO's rows are followed by copies of them
    rows = sorted({row % copies if copies else row for row in problem.rows})
    bad = _rows_without_number(setup, rows)
    if problem.evaluated:
        manifest = store.read_manifest(setup.data) or {}
        first = (
            bad[0] - manifest["splits"]["train"]
        )  # rows of the test split are numbered behind those that train
        return ModelError(
            f"after step {problem.step} the loss on the test split is no number, in {len(bad)} of "
            f"the {len(rows)} rows of a "
            f"batch, its row {first} first; {on}, or look without it: --eval-steps 0"
        )
    named = ", ".join(map(str, bad[:8])) + (" ..." if len(bad) > 8 else "")
    if len(bad) < len(rows):
        return ModelError(
            f"the loss of step {problem.step} is no number, because of row {named} (look at it: "
            "vlmdpo prepare --show "
            f"{bad[0]}); take it out of the data, or {on}"
        )
    return ModelError(
        f"the loss of step {problem.step} is no number, for every row of its batch ({named}); {on}"
    )


def _rows_without_number(setup: Setup, rows: list[int]) -> list[int]:
    """Those rows whose log-probs alone are no numbers; all of them where no process can run a row
    alone.
    """
    from vlmdpo.training import doctor

    trainer = setup.trainer
    if setup.is_sharded:
        return rows
    at = {row: (part, place) for part in trainer.datasets for place, row in enumerate(part["row"])}

    def has_number(row: int) -> bool:
        part, place = at[row]
        batch = trainer.pair_collator([dict(part[place])])
        return all(bool(tokens.isfinite().all()) for tokens in doctor.token_logps(trainer, batch))

    return [row for row in rows if not has_number(row)] or rows


def check_saved(
    setup: Setup, weights: dict[str, Any] | None, folder: Path, config: TrainConfig
) -> None:
    """Does what was just saved say what the live model says? Raises ModelError where it does not."""
    from vlmdpo.models.load import load_model
    from vlmdpo.training import doctor

    if weights is not None:
        finding = doctor.files_check(setup.trainer, weights, folder, adapter=config.lora)
    elif config.lora:
        finding = doctor.adapter_check(setup.trainer, setup.examples()[0], folder)
    else:
        live = setup.trainer.accelerator.unwrap_model(setup.trainer.model)
        finding = doctor.weights_check(
            live,
            load_model(str(folder), dtype=str(live.dtype).removeprefix("torch."), device="cpu"),
        )
    if not finding.passed:
        raise ModelError(f"{finding.name}: {finding.seen}. Likely cause: {finding.cause}")
