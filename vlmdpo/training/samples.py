"""Answers to the same few prompts as training goes on, so that a person sees what the numbers mean.

Greedy, so that no random number is drawn: a run with samples learns what one without them learns.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from vlmdpo.data.pairs import text_of
from vlmdpo.engine.collate import PairCollator, images_of
from vlmdpo.training.monitor import read_lines, write_lines

SAMPLES = "samples.jsonl"
_ROWS = 4
_MAX_NEW_TOKENS = 64


class Samples(TrainerCallback):
    """Asks at step 0, every so many steps, and after the last one, about a few rows, evenly spaced
    over the test split or, where there is none, over what trains.

    Args:
        file: where answers are kept, a JSON line each: step, row, question, answer, chosen,
            rejected.
        every: optimizer steps between two times; None for the first and the last only.
        trainer: whose model is asked, and whose data is asked about.
        together: where no process has the model whole, all of them ask, and the first keeps what is
            answered.
    """

    def __init__(
        self, file: Path, every: int | None, trainer: Any, *, together: bool = False
    ) -> None:
        self.file, self.every, self.trainer, self._together = file, every, trainer, together
        data = trainer.datasets[-1]
        count = min(_ROWS, len(data))
        self.rows = [data[place * len(data) // count] for place in range(count)]
        self._batches = _alike(self.rows, trainer.args.train_batch_size)
        self.records: list[dict[str, Any]] = []
        self._collator = PairCollator(trainer.processing_class)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # After a resume, answers past the checkpoint belong to steps that will be done again.
        self.records = [
            record for record in read_lines(self.file) if record["step"] <= state.global_step
        ]
        if args.process_index == 0:
            write_lines(self.file, self.records)
        if state.global_step == 0:
            self._ask(args, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self._ask(args, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            self._ask(args, state.global_step)

    def _ask(self, args: Any, step: int) -> None:
        """One process asks, and the others wait for it where they next meet; or all ask, where it
        cannot alone.
        """
        wanted = not any(record["step"] == step for record in self.records)
        if self._together:
            wanted = broadcast_object_list([wanted])[
                0
            ]  # the file may lie on the first one's machine only
        if not wanted or (args.process_index and not self._together):
            return
        found = [
            {"step": step, **answered}
            for rows in self._batches
            for answered in self._answered(rows)
        ]
        self.records += found
        if args.process_index:
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in found)

    @torch.no_grad()
    def _answered(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        prompts = [self._collator.render(row)["prompt"] for row in rows]
        inputs = self._collator.prompts(prompts, [images_of(row) for row in rows])
        inputs.pop("labels", None)
        given = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        training = model.training
        model.eval()
        try:
            with self.trainer.accelerator.autocast():
                made = model.generate(
                    **given, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False, use_cache=True
                )
        finally:
            model.train(training)
        said = self.trainer.processing_class.batch_decode(
            made[:, given["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return [
            {
                "row": row["row"],
                "question": _question(row),
                "answer": answer.strip(),
                **{side: text_of(row[side][0]) for side in ("chosen", "rejected")},
            }
            for row, answer in zip(rows, said, strict=True)
        ]


def _alike(rows: list[dict[str, Any]], most: int) -> list[list[dict[str, Any]]]:
    """Rows in their order, in batches of as many pictures each, no larger than those that train:
    they fit into memory.
    """
    batches: list[list[dict[str, Any]]] = []
    for row in rows:
        if (
            batches
            and len(batches[-1]) < most
            and len(images_of(batches[-1][0])) == len(images_of(row))
        ):
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _question(row: dict[str, Any]) -> str:
    """What the user's turns say, pictures apart."""
    turns = [turn["content"] for turn in row["prompt"] if turn["role"] == "user"]
    return "\n".join(
        " ".join(part["text"] for part in content if part.get("text")) for content in turns
    ).strip()
