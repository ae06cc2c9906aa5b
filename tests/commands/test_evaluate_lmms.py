"""`vlmdpo eval --benchmark lmms:TASK`, with a stand-in for lmms-eval's command line."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support.lmms import install, read_calls
from vlmdpo.benchmarks import lmms_process
from vlmdpo.commands import evaluate_lmms, export
from vlmdpo.commands.compare import SHIPPED
from vlmdpo.config import EvalConfig
from vlmdpo.errors import (
    ConfigError,
    DataError,
    MemoryBudgetError,
    MissingDependencyError,
    ModelError,
    Preempted,
)

FOLDER = Path("outputs/lmms")
CONFIG = EvalConfig(
    benchmark="lmms:colours,counts", adapter=SHIPPED, device="cpu", quiet=True, output_dir=FOLDER
)


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """The stand-in's calls, and an export that only makes a folder: merging is tested there."""
    monkeypatch.setattr(export, "run", _merge)
    return install(monkeypatch, tmp_path)


def _merge(config):
    config.output_dir.mkdir()
    (config.output_dir / "config.json").write_text("{}")


def _run(**changes):
    return evaluate_lmms.run(dataclasses.replace(CONFIG, **changes))


def test_base_and_tuned_are_asked_in_turn_and_stand_in_one_report(calls):
    report = _run()
    listed, base, tuned = read_calls(calls)
    assert listed["--tasks"] == "list"
    assert {base["--tasks"], tuned["--tasks"]} == {"colours,counts"}
    assert (base["--model"], base["--device"]) == ("idefics2", "cpu")
    assert base["--model_args"].endswith("assets/model,dtype=float32,device_map=cpu")
    assert "merged" in tuned["--model_args"]
    assert "--log_samples" in base
    assert report["scores"]["base"] == {
        task: {"exact": 0.5, "f1": 0.25} for task in ("colours", "counts")
    }
    assert report["scores"]["tuned"]["counts"]["exact"] == 1
    assert report["stderr"]["base"]["counts"] == {"exact": 0.1, "f1": None}
    assert report["intervals"]["base"]["counts"]["exact"] == pytest.approx((0.304, 0.696), abs=1e-3)
    figure = report["comparison"]["figures"]["counts"]["exact"]
    assert (figure["verdict"], figure["fixed"], figure["broken"]) == ("improvement", 4, 0)
    assert "f1" not in report["comparison"]["figures"]["counts"], "not the mean of its documents"
    assert "colours: tuned is not compared with base by f1" in " ".join(report["notes"])
    assert "counts, exact: 4 fixed by tuning, 0 broken, exact McNemar" in " ".join(report["notes"])
    assert (report["questions"], report["part"]["of_questions"]) == (16, 40)
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {"base", "tuned", "base.log", "tuned.log", "run.json"}


def test_the_command_shows_them_and_keeps_them_with_a_page(calls, vlmdpo):
    arguments = ["eval", "--benchmark", "lmms:colours,counts", "--adapter", SHIPPED]
    code, out, err = vlmdpo(*arguments, "--device", "cpu", "--limit", "8")
    assert code == 0, err
    for told in ("lmms-eval: colours, counts", "0.500", "+0.500", "improvement", "exact McNemar"):
        assert told in out
    assert "16 of 40 questions, the first ones" in out
    assert "Shares in per cent" not in out, "figures stay in lmms-eval's units"
    folder = Path("outputs/eval/adapter")
    report = json.loads((folder / "lmms-colours-counts" / "scores.json").read_text())
    assert len(report["comparison"]["flips"]) == 8
    for page in (folder, folder / "lmms-colours-counts"):
        text = (page / "report.html").read_text()
        assert "improvement" in text
        assert "standard errors" in text
        assert "Shares in per cent" not in text
    (folder / "lmms-colours-counts" / "scores.json").unlink()
    code, out, err = vlmdpo(*arguments, "--device", "cpu", "--limit", "8", "--json")
    assert code == 0, err
    assert json.loads(out)["scores"] == report["scores"]


def test_a_model_that_is_finished_is_not_asked_again(calls, monkeypatch):
    monkeypatch.setattr(export, "run", _disk_is_full)
    with pytest.raises(DataError, match="disk"):
        _run()
    assert not list(FOLDER.glob(".merged*"))
    monkeypatch.setattr(export, "run", _merge)
    _run()
    assert [one["--tasks"] for one in read_calls(calls)] == [
        *("list", "colours,counts"),
        *("list", "colours,counts"),
    ]
    _run()
    assert len(read_calls(calls)) == 4, "nothing is left to do"
    _run(overwrite=True)
    assert len(read_calls(calls)) == 7


def _disk_is_full(config):
    raise DataError("no space left on disk")


def test_results_of_other_arguments_are_refused(calls):
    _run(base=False)
    with pytest.raises(DataError, match="another run"):
        _run(lmms_args="--batch_size 2")


def test_without_the_package_nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(lmms_process.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install .*lmms"):
        _run()
    assert not Path("outputs").exists()


def test_an_unknown_task_is_found_before_a_model_is_loaded(calls):
    with pytest.raises(ConfigError, match=r"no task 'count'\. Did you mean 'counts'\?"):
        _run(benchmark="lmms:colours,count")
    assert not FOLDER.exists()
    assert len(read_calls(calls)) == 1


def test_a_folder_named_like_the_task_would_be_taken_for_it(calls):
    Path("mme").mkdir()
    with pytest.raises(ConfigError, match="'mme' for the folder of that name"):
        _run(benchmark="lmms:mme")
    assert read_calls(calls) == []


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("ValueError: unknown image size", ModelError),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GB", MemoryBudgetError),
    ],
)
def test_a_failure_is_told_in_lmms_evals_words_and_its_log_is_kept(calls, monkeypatch, said, kind):
    monkeypatch.setenv("LMMS_ERROR", said)
    with pytest.raises(kind) as caught:
        _run(lmms_args="--model broken")
    assert said in str(caught.value)
    assert str(FOLDER / "base.log") in str(caught.value)
    assert "Traceback" in (FOLDER / "base.log").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 2}, r"--batch-size is not for .*--lmms-args"),
        ({"benchmark": "lmms:"}, "name tasks of lmms-eval"),
        ({"output_dir": Path("a,b")}, "rename the folder"),
        ({"dtype": "float32", "lmms_args": "--model qwen2_vl"}, "chooses its own data type"),
    ],
)
def test_options_that_lmms_eval_would_not_read_are_refused(calls, changes, message):
    with pytest.raises(ConfigError, match=message):
        _run(**changes)
    assert read_calls(calls) == []


def test_a_limit_is_passed_on(calls):
    _run(limit=8, base=False)
    assert read_calls(calls)[1]["--limit"] == "8"


def test_sigterm_stops_lmms_eval_too(monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    before = time.monotonic()
    with (
        pytest.raises(Preempted, match="repeat the command"),
        lmms_process._stopped_at_the_end(process),
    ):
        process.wait()
    assert process.poll() is not None
    assert time.monotonic() - before < 5


def test_the_adapter_is_merged_for_the_time_of_the_run(monkeypatch, tmp_path):
    calls = install(monkeypatch, tmp_path)
    report = _run(base=False, benchmark="lmms:counts")
    assert "comparison" in report
    assert report["comparison"] is None
    merged = read_calls(calls)[1]["--model_args"].split(",")[0].removeprefix("pretrained=")
    assert not Path(merged).exists()
