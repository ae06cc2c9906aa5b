"""The examples run as they are."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

import vlmdpo
from vlmdpo.benchmarks import own_questions
from vlmdpo.config import EvalConfig

pytestmark = pytest.mark.slow

EXAMPLES = Path(vlmdpo.__file__).parent.parent / "examples"


def test_the_library_example_trains_and_answers(tmp_path):
    found = importlib.util.spec_from_file_location("library", EXAMPLES / "library.py")
    example = importlib.util.module_from_spec(found)
    found.loader.exec_module(example)
    base, tuned = example.main(tmp_path / "library", steps=3)
    assert base == "Yes", "the embedded model sees a moon that is not there"
    assert tuned
    assert (tmp_path / "library" / "adapter" / "README.md").is_file()


def test_the_sample_of_own_questions_is_thirty_with_as_many_yes_as_no():
    found = importlib.util.spec_from_file_location(
        "make_sample", EXAMPLES / "own_questions" / "make_sample.py"
    )
    sample = importlib.util.module_from_spec(found)
    found.loader.exec_module(sample)
    sample.main(Path("mine"))
    loaded = own_questions.load(EvalConfig(benchmark="mine/questions.jsonl"))
    assert len(loaded.questions) == 30
    assert loaded.images.missing([question.image for question in loaded.questions]) == []
    truths = [question.truth for question in loaded.questions]
    assert truths.count("yes") == truths.count("no") == 10
    first = [question.choices.index(question.truth) for question in loaded.questions[2::3]]
    assert sum(first) == 5, "the place of a choice says nothing"
    assert {question.group for question in loaded.questions} == {"presence", "colour"}


@pytest.mark.parametrize(("ways", "count"), [("pope_ways", 18), ("description_ways", 4)])
def test_the_benchmark_of_asking_gets_equal_answers_in_all_ways(ways, count, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    asking = importlib.import_module("eval_amber")
    monkeypatch.setattr(asking, "DESCRIPTION_TOKENS", 6)
    [case] = [case for case in asking.quick_cases() if case.ways is getattr(asking, ways)]
    small = replace(case.shape, text={}, vision={}, image_size=32, image=(32, 32))
    found = asking.measure(replace(case, shape=small, wanted=None), images=1, repeats=1)
    assert (found["agreement"], found["passed"], found["questions"]) == (0, True, count)
    assert found["distinct_answers"] > 1
    # 10 of the 18 prompts differ, of 16 image tokens and 11 others: one tree counts 3 times less.
    assert found["counted"]["ours"] >= {"pope_ways": 2.5, "description_ways": 1}[ways]
    assert found["name"] in asking.markdown([found], 1)
