"""A stand-in for lmms-eval: a package whose command line writes files in its exact layout.

The layout is lmms-eval 0.7.3's. What a model answers is chosen by the folder it lies in: the merged
one is right about all, the base about half.
"""

import json
from pathlib import Path

_MAIN = """
import json, os, sys
from pathlib import Path

arguments = sys.argv[1:]
with open(os.environ["LMMS_CALLS"], "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")

def value(name, default=None):
    return arguments[arguments.index(name) + 1] if name in arguments else default

stamp = "\\x1b[32m2026-01-01 00:00:00\\x1b[0m | \\x1b[1m%s\\x1b[0m | \\x1b[36ma:b:1\\x1b[0m - "
if value("--tasks") == "list":
    print(stamp % "INFO    " + "\\x1b[1mAvailable Tasks:\\n - colours\\n - counts\\n - mme\\x1b[0m")
    sys.exit()
source = dict(part.split("=", 1) for part in value("--model_args").split(","))["pretrained"]
if os.environ.get("LMMS_FAILS") == source or value("--model") == "broken":
    print("Traceback (most recent call last):\\n  File x\\n" + os.environ["LMMS_ERROR"])
    print(stamp % "ERROR   " + "Error during evaluation: something. Please set `--verbosity`")
    sys.exit()
assert (Path(source) / "config.json").is_file(), "the merged model is there while it answers"
folder = Path(value("--output_path")) / "_".join(Path(source).parts[-2:])
folder.mkdir(parents=True)
right = [1.0] * 8 if "merged" in source else [1.0, 0.0] * 4
tasks = value("--tasks").split(",")
results = {}
for task in tasks:
    mean = sum(right) / 8
    results[task] = {"alias": task, "exact,none": mean, "exact_stderr,none": 0.1}
    results[task] |= {"exact_stderr_clt,none": 0.1, "exact_stderr_clustered,none": "N/A"}
    results[task] |= {"f1,none": 0.25, "f1_stderr,none": "N/A", "f1_stderr_clt,none": 0.2}
    lines = [
        {"doc_id": n, "target": "yes", "filtered_resps": "Yes" if score else "No", "doc_hash": "0",
         "exact": score, "f1": {"score": score, "image_id": f"{n // 2}.png"}, "input": f"{n}?"}
        for n, score in enumerate(right)
    ]
    text = "".join(json.dumps(line) + "\\n" for line in lines)
    (folder / f"20260101_000000_samples_{task}.jsonl").write_text(text)
better = {"exact": True, "f1": True}
everything = {
    "results": results, "configs": {task: {"task": task} for task in tasks},
    "higher_is_better": {task: better for task in tasks},
    "n-samples": {task: {"original": 20, "effective": 8} for task in tasks},
}
(folder / "20260101_000000_results.json").write_text(json.dumps(everything))
"""


def install(monkeypatch, folder: Path) -> Path:
    """Make `lmms_eval` importable here and in child processes. Returns the file of its calls."""
    package = folder / "stand_in" / "lmms_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(_MAIN)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    calls = folder / "calls.jsonl"
    monkeypatch.setenv("LMMS_CALLS", str(calls))
    monkeypatch.setenv("LMMS_ERROR", "ValueError: unknown image size")
    return calls


def read_calls(calls: Path) -> list[dict[str, str]]:
    """The options of each call of the stand-in, by name."""
    lines = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
    return [
        {
            name: following if not following.startswith("--") else ""
            for name, following in zip(line, [*line[1:], ""], strict=True)
            if name.startswith("--")
        }
        for line in lines
    ]
