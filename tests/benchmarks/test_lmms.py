"""lmms-eval's files: which figures are read, with which standard error, and which are paired."""

import json
from pathlib import Path

import pytest

from vlmdpo.benchmarks import lmms, lmms_arguments
from vlmdpo.benchmarks.lmms_process import _reason
from vlmdpo.errors import ConfigError, DataError


def _write(folder, entry, lines, config=None, better=None):
    folder = Path(folder) / "model"
    folder.mkdir(parents=True)
    results = {
        "results": {"t": {"alias": "t", **entry}},
        "configs": {"t": config or {}},
        "higher_is_better": {"t": better or {"acc": True}},
        "n-samples": {"t": {"original": 9, "effective": len(lines)}},
    }
    (folder / "20260101_000000_results.json").write_text(json.dumps(results))
    text = "".join(
        json.dumps({"doc_id": n, "input": "q", "target": "yes", **line}) + "\n"
        for n, line in enumerate(lines)
    )
    if lines:
        (folder / "20260101_000000_samples_t.jsonl").write_text(text)
    return folder.parent


def _task(*arguments, **more):
    return lmms.read(_write(*arguments, **more))["t"]


def test_the_standard_error_is_lmms_evals_own_and_the_interval_is_of_it():
    entry = {"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_stderr_clustered,none": "N/A"}
    figure = _task("a", entry, [{"acc": 1.0}, {"acc": 0.0}]).figures["acc"]
    assert (figure.value, figure.stderr) == (0.5, 0.1)
    assert figure.ci95 == pytest.approx((0.5 - 0.196, 0.5 + 0.196), abs=1e-4)
    clustered = {**entry, "acc_stderr_clustered,none": 0.2}
    assert _task("b", clustered, [{"acc": 1.0}, {"acc": 0.0}]).figures["acc"].stderr == 0.2


def test_a_figure_that_is_no_mean_gets_neither_its_scores_nor_their_standard_error():
    entry = {"acc,none": 0.9, "acc_stderr,none": "N/A", "acc_stderr_clt,none": 0.1}
    figure = _task("a", entry, [{"acc": {"score": 1}}, {"acc": {"score": 0}}]).figures["acc"]
    assert (figure.stderr, figure.ci95, figure.scores) == (None, None, {})


def test_a_figure_in_per_cent_has_its_standard_error_in_per_cent():
    entry = {"acc,none": 50.0, "acc_stderr,none": "N/A", "acc_stderr_clt,none": 0.1}
    figure = _task("a", entry, [{"acc": {"score": 1}}, {"acc": {"score": 0}}]).figures["acc"]
    assert (figure.stderr, figure.scores, figure.scale) == (10.0, {0: 1.0, 1: 0.0}, 100)


def test_filters_are_named_and_what_is_no_number_is_listed():
    entry = {"acc,strict": 0.5, "file,none": None, "nan,none": float("nan"), "alias": "t"}
    task = _task("a", entry, [])
    assert (list(task.figures), task.unnumbered) == (["acc (strict)"], ["file", "nan"])


def test_a_document_logged_once_for_each_filter_is_not_paired():
    folder = _write("a", {"acc,one": 0.5, "acc,two": 0.5}, [{"acc": 1.0}, {"acc": 0.0}])
    samples = next(folder.rglob("*.jsonl"))
    samples.write_text(samples.read_text() * 2)
    assert lmms.read(folder)["t"].documents == {}


@pytest.mark.parametrize("better", [True, False])
def test_base_and_tuned_are_paired_by_document(better):
    entry, more = {"acc,none": 0.5}, {"better": {"acc": better}}
    base = {"t": _task("a", entry, [{"acc": score} for score in [1, 0] * 10], **more)}
    tuned = {"t": _task("b", {"acc,none": 1.0}, [{"acc": 1}] * 20, **more)}
    found = lmms.compare(base, tuned)
    figure = found["figures"]["t"]["acc"]
    low, high = figure["ci95"]
    assert (figure["delta"], figure["n"]) == (0.5, 20)
    assert 0.2 < low < 0.5 < high < 0.8
    assert figure["verdict"] == ("improvement" if better else "decline")
    assert (figure["fixed"], figure["broken"]) == ((10, 0) if better else (0, 10))
    assert figure["mcnemar_p"] == pytest.approx(2 * 0.5**10)
    assert [flip["id"] for flip in found["flips"]] == [f"t/{n}" for n in range(1, 20, 2)]
    assert {flip["fixed"] for flip in found["flips"]} == {better}


def test_questions_about_one_image_are_drawn_together(monkeypatch):
    def width(folder, image_of):
        lines = [{"acc": score, "image_id": image_of(n)} for n, score in enumerate([0] * 40)]
        base = {"t": _task(folder + "base", {"acc,none": 0.0}, lines)}
        for n, line in enumerate(lines):
            line["acc"] = float(n < 20)
        tuned = {"t": _task(folder + "tuned", {"acc,none": 0.5}, lines)}
        low, high = lmms.compare(base, tuned)["figures"]["t"]["acc"]["ci95"]
        return high - low

    one_each = width("a", lambda n: n)
    together = width("b", lambda n: n // 10)
    assert together > 2 * one_each
    monkeypatch.setattr(lmms, "_MAX_COUNTS", 40 * 100)
    assert width("c", lambda n: n) == pytest.approx(one_each, rel=0.15), "in blocks, as at once"


def test_graded_scores_get_an_interval_and_no_mcnemar():
    base = {"t": _task("a", {"acc,none": 0.4}, [{"acc": 0.3}, {"acc": 0.5}])}
    tuned = {"t": _task("b", {"acc,none": 0.6}, [{"acc": 0.6}, {"acc": 0.6}])}
    found = lmms.compare(base, tuned)
    assert found["flips"] == []
    assert set(found["figures"]["t"]["acc"]) == {"delta", "ci95", "verdict", "n"}


def test_documents_that_differ_are_refused():
    lines = [{"acc": 1.0}, {"acc": 0.0}]
    base = {"t": _task("a", {"acc,none": 0.5}, lines)}
    tuned = {"t": _task("b", {"acc,none": 0.5}, [lines[0], {"acc": 0.0, "target": "no"}])}
    with pytest.raises(DataError, match="different documents: t, document 1"):
        lmms.compare(base, tuned)


def test_without_a_direction_nothing_is_called_better():
    more = {"better": {"acc": None}}
    base = {"t": _task("a", {"acc,none": 0.0}, [{"acc": 0}] * 9, **more)}
    tuned = {"t": _task("b", {"acc,none": 1.0}, [{"acc": 1}] * 9, **more)}
    assert lmms.compare(base, tuned)["figures"]["t"]["acc"]["verdict"] == "more"


@pytest.mark.parametrize("text", ["[]", "{}", '{"results": {"t": {"a,none": 1}}}', "not JSON"])
def test_files_of_another_form_are_refused_in_one_line(text):
    Path("x_results.json").write_text(text)
    with pytest.raises(DataError, match=r"x_results\.json"):
        lmms.read(Path())


def test_the_reason_of_a_failure_is_the_exception_else_the_logged_error():
    logged = "2026-01-01 00:00:00 | ERROR    | m:f:1 - Error during evaluation: it."
    assert _reason(f"Traceback:\n  File x\ntorch.AcceleratorError: no GPU\n{logged}") == (
        "torch.AcceleratorError: no GPU"
    )
    assert _reason(f"start\n\x1b[31m{logged}\x1b[0m") == "Error during evaluation: it"
    assert _reason("") == "it printed nothing"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--output_path x", "vlmdpo gives --output_path itself"),
        ("--limit 3", "use vlmdpo's own --limit"),
        ("--device cuda:1", "use vlmdpo's own --device"),
        ("--log_samples", "vlmdpo gives --log_samples itself"),
        ("--tasks mme", "vlmdpo gives --tasks itself"),
        ("--config x.yaml", "vlmdpo gives --config itself"),
        ("--model_args pretrained=x", "vlmdpo's own --model"),
        ("--gen_kwargs 'a", "No closing quotation"),
        ("--model", "expected one argument"),
    ],
)
def test_arguments_that_vlmdpo_gives_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        lmms_arguments.parse(text)


def test_users_arguments_are_added_and_win():
    given = lmms_arguments.parse(
        "--model huggingface --model_args dtype=float16,max_pixels=9 --batch_size 4"
    )
    assert lmms_arguments.model_class("m", "smolvlm", given) == "huggingface"
    line = lmms_arguments.command_line("huggingface", "a/b", "cpu", "float32", given)
    assert line == [
        *("--model", "huggingface"),
        *("--model_args", "pretrained=a/b,device_map=cpu,dtype=float16,max_pixels=9"),
        *("--device", "cpu", "--batch_size", "4"),
    ]


def test_a_family_whose_class_is_not_known_is_to_be_named():
    with pytest.raises(ConfigError, match=r"smolvlm.*--lmms-args '--model huggingface'"):
        lmms_arguments.model_class("m", "smolvlm", lmms_arguments.parse(""))


@pytest.mark.parametrize("path", ["a,b", "it's", "{a}"])
def test_paths_that_would_break_its_arguments_are_refused(path):
    with pytest.raises(ConfigError, match="rename the folder"):
        lmms_arguments.check_path(path, "--model")
