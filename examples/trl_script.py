"""DPO on a vision-language model as a TRL script, and with vlmdpo's trainer: one import differs.

The steps are those of TRL's own example. Model and data are small and come with vlmdpo, so that it
runs on a laptop, offline:

    python examples/trl_script.py vlmdpo
    python examples/trl_script.py trl
"""

import random
import sys
from typing import Any

from datasets import Dataset, Image, List
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig

from vlmdpo.models.load import pretrained_source
from vlmdpo.tiny import scenes

MODEL = pretrained_source("tiny")  # a folder; in your script, a name on the Hub


def load_rows(split: str, count: int) -> Dataset:
    """Rows of TRL's vision-preference format, with messages of plain text: `count` images, and four
    questions about each, of which the false answer is rejected.
    """
    draw, rows = random.Random(split), []
    for _ in range(count):
        scene = scenes.sample_scene(draw, split)
        asked = [one for kind in scenes.questions(scene, draw).values() for one in kind]
        for question in draw.sample(asked, 4):
            answers = ["Yes", "No"] if question.truth == "yes" else ["No", "Yes"]
            rows.append(
                {
                    "images": [scenes.draw(scene)],
                    "prompt": [{"role": "user", "content": question.text}],
                    "chosen": [{"role": "assistant", "content": answers[0]}],
                    "rejected": [{"role": "assistant", "content": answers[1]}],
                }
            )
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def main(trainer: str = "vlmdpo", output_dir: str = "outputs/trl-script", **settings: Any) -> Any:
    """Train an adapter, save it, and return the trainer.

    Args:
        trainer: "vlmdpo" or "trl".
        settings: of `DPOConfig`.
    """
    if trainer == "trl":
        from trl import DPOTrainer
    else:
        from vlmdpo import PairTrainer as DPOTrainer  # the line that differs

    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype="float32")
    processor = AutoProcessor.from_pretrained(MODEL)
    args = DPOConfig(
        output_dir=output_dir,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        logging_steps=1,
        eval_strategy="steps",
        bf16=False,
        report_to="none",
        **{"max_steps": 20, "eval_steps": 10, **settings},
    )
    made = DPOTrainer(
        model=model,
        args=args,
        train_dataset=load_rows("train", 16),
        eval_dataset=load_rows("evaluation", 3),
        processing_class=processor,
        peft_config=LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"]),
    )
    made.train()
    made.save_model(output_dir)
    return made


if __name__ == "__main__":
    main(*sys.argv[1:])
