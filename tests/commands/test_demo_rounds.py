"""`vlmdpo demo --rounds`: what it hands to `vlmdpo rounds`."""

import json
from pathlib import Path

import pytest

from vlmdpo.commands import demo_rounds, rounds
from vlmdpo.commands.rounds_stages import stage_config
from vlmdpo.config import DemoConfig
from vlmdpo.errors import ConfigError


def test_rounds_go_on_from_the_demos_adapter_with_yes_no_pairs_beside_descriptions(monkeypatch):
    given = []
    monkeypatch.setattr(rounds, "run", lambda config: given.append(config) or {"best": 0})
    Path("demo").mkdir()
    config = DemoConfig(rounds=3, seed=7, output_dir=Path("demo"))
    assert demo_rounds.run(Path("demo"), Path("demo/adapter"), config) == {"best": 0}
    [made] = given
    assert (made.rounds, made.stop, made.adapter) == (2, False, Path("demo/adapter"))
    assert stage_config(made, "make_pairs", 1).adapter == Path("demo/adapter")
    train = stage_config(made, "train", 1)
    assert (train.seed, train.adapter) == (7, Path("demo/adapter"))
    first, second = stage_config(made, "prepare", 1).datasets()
    assert first == "demo/rounds/round-1/pairs/pairs.jsonl"
    rows = [json.loads(line) for line in Path(second).read_text().splitlines()]
    assert len(rows) == 200
    assert all({row["chosen"], row["rejected"]} == {"Yes", "No"} for row in rows)


def test_a_demo_has_a_round():
    with pytest.raises(ConfigError, match="--rounds"):
        DemoConfig(rounds=0)
