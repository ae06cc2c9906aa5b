"""What `PairTrainer` in a TRL script relies on without TRL's promise; a part of `trl_contract`."""

from __future__ import annotations

from vlmdpo.training.contract import attributes, classes, overridden

DROP_IN = (
    *overridden(
        "training/trainer",
        "transformers.Trainer.train(self, resume_from_checkpoint, trial, ignore_keys_for_eval)",
        "trl.DPOTrainer.evaluate(self, eval_dataset, ignore_keys, metric_key_prefix)",
        why="the engine is compared with TRL's rows before it trains or evaluates",
        breaks="a TRL script with PairTrainer would train with an engine that nobody checked",
    ),
    *overridden(
        "training/trainer",
        "transformers.Trainer.get_eval_dataloader(self, eval_dataset)",
        "transformers.Trainer.get_test_dataloader(self, test_dataset)",
        why="predicted logits are those of TRL's own rows",
        breaks="`compute_metrics` and `predict` would be given logits of packed rows",
    ),
    *overridden(
        "training/trainer",
        "transformers.Trainer.floating_point_ops(self, inputs)",
        why="`total_flos` counts the rows that TRL would run",
        breaks="a logged count would differ from TRL's",
    ),
    *classes(
        "engine/trl_rows",
        "trl.data_utils.apply_chat_template",
        "trl.data_utils.extract_prompt",
        "trl.data_utils.is_conversational",
        "trl.data_utils.prepare_multimodal_messages",
        why="rows of a TRL script become the texts that TRL's own collator makes of them",
        breaks="PairTrainer",
    ),
    *attributes(
        "training/drop_in",
        "trl.DPOTrainer._is_vision_dataset",
        why="TRL tokenizes a text-only dataset beforehand, for a collator of its own",
        breaks="PairTrainer on text-only data",
    ),
)
