"""`vlmdpo eval --benchmark lmms:TASK` with lmms-eval itself: the embedded model, a made-up task."""

import importlib.util
import json
import shlex
from pathlib import Path

import pytest

from vlmdpo.commands import evaluate_lmms
from vlmdpo.commands.compare import SHIPPED
from vlmdpo.config import EvalConfig
from vlmdpo.errors import ConfigError
from vlmdpo.tiny import evaluation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed"
    ),
]
_TASK = """
task: moons
dataset_path: json
dataset_kwargs: {data_files: {test: DOCUMENTS}}
test_split: test
output_type: generate_until
doc_to_visual: !function moons.picture
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 8, do_sample: false}
process_results: !function moons.score
metric_list:
  - {metric: right, aggregation: mean, higher_is_better: true}
metadata: [{version: 0.0}]
"""
_FUNCTIONS = """
from PIL import Image


def picture(document):
    return [Image.open(document["path"]).convert("RGB")]


def score(document, results):
    return {"right": float(results[0].strip().lower().rstrip(".") == document["answer"])}
"""


def test_a_made_up_task_is_scored_for_base_and_tuned():
    folder = Path("tasks").absolute()
    folder.mkdir()
    lines = []
    for number in range(1, 5):
        path = folder / f"{number}.png"
        evaluation.draw_image(f"SCENE_{number}.png").save(path)
        for question in ("Is there a moon in this image?", "Is there a tree in this image?"):
            lines.append({"question": question, "answer": "no", "path": str(path)})
    documents = folder / "documents.jsonl"
    documents.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "moons.yaml").write_text(_TASK.replace("DOCUMENTS", str(documents)))
    (folder / "moons.py").write_text(_FUNCTIONS)
    more = shlex.join(["--include_path", str(folder)])
    config = {"adapter": SHIPPED, "device": "cpu", "lmms_args": more}
    moons = EvalConfig(benchmark="lmms:moons", **config, output_dir=Path("out"))
    report = evaluate_lmms.run(moons)
    for role in ("base", "tuned"):
        assert 0 <= report["scores"][role]["moons"]["right"] <= 1
        assert report["models"][role]["answered"] == report["questions"] == 8
    figure = report["comparison"]["figures"]["moons"]["right"]
    scores = [report["scores"][role]["moons"]["right"] for role in ("base", "tuned")]
    assert figure["delta"] == scores[1] - scores[0]
    assert figure["fixed"] - figure["broken"] == pytest.approx(8 * figure["delta"])
    with pytest.raises(ConfigError, match=r"no task 'moon'\. Did you mean 'moons'\?"):
        evaluate_lmms.run(EvalConfig(benchmark="lmms:moon", **config, output_dir=Path("other")))
