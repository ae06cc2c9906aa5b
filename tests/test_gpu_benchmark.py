"""The GPU check runs, keeps what it measured, and its page shows no more than that."""

import importlib
import json
from pathlib import Path

import pytest

import vlmdpo
from tests.support import scripts

ROOT = Path(vlmdpo.__file__).parent.parent
BENCHMARKS = ROOT / "examples" / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks" / "gpu.md"


@pytest.fixture
def module(monkeypatch):
    """Imports a module that lies beside the benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_the_committed_page_is_made_from_the_committed_results(module):
    data = PAGE.with_suffix(".json")
    results = json.loads(data.read_text(encoding="utf-8")) if data.is_file() else None
    assert results is None or not results["toy"]
    assert PAGE.read_text(encoding="utf-8") == module("_gpu_page").markdown(results)


def test_without_results_the_page_says_that_nothing_was_measured(module):
    assert "**Not measured.**" in module("_gpu_page").markdown(None)


def test_a_failed_item_is_recorded_and_the_next_one_runs(module, tmp_path):
    run = module("_gpu_run")
    results = run.Results(tmp_path / "gpu.json", toy=True)
    cleaned = []

    def fail():
        raise RuntimeError("CUDA error: an illegal memory access")

    def not_here():
        raise run.NotHere("bitsandbytes is not installed")

    items = [
        run.Item("broken", 1, fail, keeps=True),
        run.Item("absent", 1, not_here),
        run.Item("fine", 1, lambda: {"ratio": 2.0}),
        run.Item("kept", 1, lambda: {}, keeps=True),
        run.Item("too long", 1000, fail),
    ]
    run.run_items(items, results, lambda: 100.0, lambda: cleaned.append(len(results.items)))
    kept = run.Results(tmp_path / "gpu.json", toy=True).items
    assert list(kept) == ["broken", "absent", "fine", "kept"]
    assert kept["broken"]["status"] == "failed"
    assert "illegal memory access" in kept["broken"]["error"]
    assert "in fail" in "\n".join(kept["broken"]["traceback"])
    assert kept["absent"]["status"] == "not here"
    assert kept["fine"]["result"] == {"ratio": 2.0}
    assert cleaned == [1, 2, 3], "what the next item may use stays, unless the item failed"


def test_a_second_run_goes_on_where_the_first_ended(module, tmp_path):
    run = module("_gpu_run")
    ran = []

    def item(name, result):
        def measure():
            ran.append(name)
            if result is None:
                raise ValueError("no")
            return result

        return run.Item(name, 1, measure)

    def go(*items):
        run.run_items(
            items, run.Results(tmp_path / "gpu.json", toy=True), lambda: 9.0, lambda: None
        )

    go(item("a", {"n": 1}), item("b", None))
    go(item("a", {"n": 2}), item("b", {"n": 2}), item("c", {"n": 2}))
    assert ran == ["a", "b", "b", "c"], "results stay; what failed is tried again"
    assert json.loads((tmp_path / "gpu.json").read_text())["items"]["a"]["result"] == {"n": 1}


def test_results_of_toys_and_of_real_models_are_not_mixed(module, tmp_path):
    run = module("_gpu_run")
    run.Results(tmp_path / "gpu.json", toy=True).put("a", {"status": "done", "result": {}})
    with pytest.raises(SystemExit, match="holds a toy run"):
        run.Results(tmp_path / "gpu.json", toy=False)


# One item of each kind; the others run the same code.
TRIED = ["environment", "tiny-sdpa", "tiny-flash_attention_2", "step-idefics2-490"]
TRIED += ["memory-qwen2-vl-2b-full-shared-batch2", "memory-qwen2-vl-2b-LoRA-shared-batch4-nf4"]
TRIED += ["evaluation", "auto-batch", "profile"]


@pytest.mark.slow
def test_the_gpu_check_runs_as_a_toy_on_the_cpu(module, tmp_path):
    tried = ",".join(TRIED)
    out = scripts.run(BENCHMARKS / "gpu.py", "--toy", "--json", "--only", tried, timeout_s=900)
    report = json.loads(out)
    items = report["items"]
    without = {name: entry["error"] for name, entry in items.items() if entry["status"] != "done"}
    assert without == {
        "memory-qwen2-vl-2b-LoRA-shared-batch4-nf4": "4-bit weights need a GPU",
        "tiny-flash_attention_2": "flash_attention_2 needs a GPU",
    }
    assert set(items) == set(TRIED)
    failed = [case for case in report["cases"] if case["passed"] is False]
    assert not failed
    result = items["step-idefics2-490"]["result"]
    assert result["exactness"]["error"] < 1e-5
    assert result["agreement"]["loss_error"] < 1e-5
    assert result["agreement"]["gradient_error"] < 1e-4
    assert result["peak_bytes"] is None, "only CUDA counts it"
    assert result["tokens"]["ours"] < result["tokens"]["stock"]
    evaluation = items["evaluation"]["result"]
    assert evaluation["distinct_answers"] > 1
    assert evaluation["wrong"] == 0
    assert items["auto-batch"]["result"]["parts"] == 2
    memory = items["memory-qwen2-vl-2b-full-shared-batch2"]["result"]
    assert memory["estimated_bytes"] > memory["estimated"]["static_bytes"] > 0
    page = module("_gpu_page").markdown(report)
    assert "A toy run on a CPU" in page
    for section in ("Exactness", "Training steps", "Memory", "Questions", "Running out of memory"):
        assert f"## {section}" in page
