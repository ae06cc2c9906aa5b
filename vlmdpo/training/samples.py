"""Answers to the same few prompts during training, so that a person sees what the numbers mean.

Greedy, so that no random number is drawn: a run with samples learns the same as one without.

Shapes: B prompts; S tokens of the longest prompt; T of prompts and answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from vlmdpo.data.pairs import SIDES, text_of
from vlmdpo.engine.collate import PairCollator, images_of
from vlmdpo.models.rendering import stop_token_ids
from vlmdpo.report.metrics import GO_ON_WITHOUT, read_lines, write_lines

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from vlmdpo.training.run_trainer import RunTrainer

SAMPLES_FILE = "samples.jsonl"
_ROWS = 4
_MAX_NEW_TOKENS = 64


class SampleAnswers(TrainerCallback):
    """Generates answers at step 0, at regular steps, and after the last one.

    The prompts are of a few rows, evenly spaced over the test split, or over the rows that train if
    there is none.

    Args:
        file: where answers are written, a JSON line each: step, row, question, answer, chosen,
            rejected.
        every: optimizer steps between two times; None for the first and the last only.
        trainer: whose model answers, and whose data has the prompts.
        all_processes: whether no process has the whole model, so that all must generate; the first
            one writes.
    """

    def __init__(
        self,
        file: Path,
        every: int | None,
        trainer: RunTrainer,
        *,
        all_processes: bool = False,
    ) -> None:
        self.file, self.every, self.trainer = file, every, trainer
        self._all_processes = all_processes
        data = trainer.datasets[-1]
        count = min(_ROWS, len(data))
        self.rows = [data[place * len(data) // count] for place in range(count)]
        self._batches = _batches_of_equal_image_count(self.rows, trainer.args.train_batch_size)
        self.records: list[dict[str, Any]] = []
        self._collator = PairCollator(trainer.processing_class)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # After a resume, answers past the checkpoint belong to steps that are repeated.
        before = read_lines(self.file, GO_ON_WITHOUT)
        self.records = [record for record in before if record["step"] <= state.global_step]
        if args.process_index == 0:
            write_lines(self.file, self.records)
        if state.global_step == 0:
            self._generate(args, 0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every and state.global_step % self.every == 0:
            self._generate(args, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            self._generate(args, state.global_step)

    def _generate(self, args: TrainingArguments, step: int) -> None:
        """Generate in one process, for which the others wait where they next meet, or in all."""
        is_new = not any(record["step"] == step for record in self.records)
        if self._all_processes:
            # Only the first process may see the file: it can lie on another machine.
            is_new = broadcast_object_list([is_new])[0]
        if not is_new or (args.process_index and not self._all_processes):
            return
        records = [
            {"step": step, **record} for rows in self._batches for record in self._answer(rows)
        ]
        self.records += records
        if args.process_index:
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    @torch.no_grad()
    def _answer(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        prompts = [self._collator.render(row)["prompt"] for row in rows]
        inputs = self._collator.process_prompts(prompts, [images_of(row) for row in rows])
        inputs.pop("labels", None)
        inputs = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        was_training = model.training
        model.eval()
        try:
            with self.trainer.accelerator.autocast():
                ids_BT = model.generate(
                    **inputs,
                    max_new_tokens=_MAX_NEW_TOKENS,
                    do_sample=False,
                    use_cache=True,
                    eos_token_id=stop_token_ids(model, self.trainer.processing_class),
                )
        finally:
            model.train(was_training)
        answers = self.trainer.processing_class.batch_decode(
            ids_BT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return [
            {
                "row": row["row"],
                "question": _question(row),
                "answer": answer.strip(),
                **{side: text_of(row[side][0]) for side in SIDES},
            }
            for row, answer in zip(rows, answers, strict=True)
        ]


def _batches_of_equal_image_count(
    rows: list[dict[str, Any]], max_size: int
) -> list[list[dict[str, Any]]]:
    """Rows in their order, in batches that `generate` can take: every row has as many images.

    No batch is larger than in training, where it fits into memory.
    """
    batches: list[list[dict[str, Any]]] = []
    for row in rows:
        batch = batches[-1] if batches else []
        has_room = 0 < len(batch) < max_size
        if has_room and len(images_of(batch[0])) == len(images_of(row)):
            batch.append(row)
        else:
            batches.append([row])
    return batches


def _question(row: dict[str, Any]) -> str:
    """The text of the user's turns, without images."""
    turns = [turn["content"] for turn in row["prompt"] if turn["role"] == "user"]
    return "\n".join(
        " ".join(part["text"] for part in content if part.get("text")) for content in turns
    ).strip()
