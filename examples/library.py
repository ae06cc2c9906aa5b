"""vlmdpo as a library: prepare, train and ask without the command line, offline.

python examples/library.py
"""

from pathlib import Path

from vlmdpo.commands import prepare, train
from vlmdpo.config import PrepareConfig, TrainConfig
from vlmdpo.engine.generate import answer
from vlmdpo.models.load import load_model, load_processor
from vlmdpo.tiny import evaluation


def main(folder: Path = Path("outputs/library"), steps: int = 60) -> tuple[str, str]:
    """Train a small adapter and return the answers of base and tuned model to one question."""
    data = prepare.run(PrepareConfig(output_dir=folder / "data", limit=800))
    settings = {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
    }
    report = train.run(
        TrainConfig(
            dataset=data["path"],
            output_dir=folder / "adapter",
            max_steps=steps,
            learning_rate=3e-4,
            overwrite=True,
            **settings,
        )
    )
    model = load_model("tiny", adapter=Path(report["output_dir"]))
    processor = load_processor("tiny")
    image = evaluation.draw_image(evaluation.first_image_name())
    request = (model, processor, [image], ["Is there a moon in this image?"], 8)
    with model.disable_adapter():
        base = answer(*request)[0]
    return base, answer(*request)[0]


if __name__ == "__main__":  # worker processes of `prepare` import this file too
    print("base: {}\ntuned: {}".format(*main()))
