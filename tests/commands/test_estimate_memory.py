"""estimate-memory: exact counts, the article's table, and the promised keys."""

import json

import pytest

from vlmdpo.memory.terms import article_components, rounded_article_table
from vlmdpo.models import registry


def _report(vlmdpo, *arguments):
    code, out, _ = vlmdpo("estimate-memory", *arguments, "--fast", "--json")
    assert code == 0
    return json.loads(out)


def test_full_float32_is_the_articles_160_gb(vlmdpo):
    report = _report(vlmdpo, "--model", "idefics2-8b")
    assert [(line["name"], line["gb"]) for line in report["article"]["components"]] == [
        ("Model to train", 32.0),
        ("Reference model", 32.0),
        ("Gradients", 32.0),
        ("Optimizer states", 64.0),
    ]
    assert report["article"]["total_gb"] == 160.0
    assert report["total_bytes"] == 5 * 4 * 8_402_768_112
    assert report["parameters"]["trainable"] == report["parameters"]["total"] == 8_402_768_112


def test_bfloat16_lora_is_the_articles_32_3_gb(vlmdpo):
    report = _report(
        vlmdpo, "--model", "HuggingFaceM4/idefics2-8b", "--dtype", "bfloat16", "--lora"
    )
    assert [line["gb"] for line in report["article"]["components"]] == [16.0, 16.0, 0.1, 0.2]
    assert report["article"]["total_gb"] == 32.3
    assert report["parameters"]["trainable"] == 55_348_736
    assert report["parameters"]["with_adapter"] == 8_458_116_848
    assert report["total_bytes"] == 2 * (2 * 8_402_768_112 + 3 * 55_348_736)


def test_rank_scales_what_trains(vlmdpo):
    assert (
        _report(vlmdpo, "--model", "idefics2-8b", "--lora", "--lora-r", "8")["parameters"][
            "trainable"
        ]
        == 27_674_368
    )


def test_table_shows_both_units(vlmdpo):
    code, out, _ = vlmdpo("estimate-memory", "--model", "idefics2-8b", "--fast")
    assert code == 0
    assert "160.0" in out
    assert "168.055" in out
    assert "GiB" in out


@pytest.mark.parametrize("entry", registry.ENTRIES.values(), ids=lambda entry: entry.alias)
def test_parts_add_up(entry):
    assert entry.parameters == sum(entry.by_part.values()) > 0
    assert entry.lora_per_rank > 0


def test_small_models_are_rounded_to_millions():
    lines = rounded_article_table(256_484_928, 256_484_928, "float32", lora=False)
    assert lines[0] == ("Model to train", 1.0, "256 M × 4")
    assert sum(c.bytes for c in article_components(10, 2, "bfloat16", lora=True)) == 2 * (
        10 + 10 + 2 + 4
    )


def test_registry_counts_of_the_embedded_model_are_those_of_its_weights(tiny_model_parts):
    from peft import LoraConfig, get_peft_model

    model, _ = tiny_model_parts
    entry = registry.get("tiny")
    assert sum(p.numel() for p in model.parameters()) == entry.parameters
    import copy

    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear"))
    assert adapted.get_nb_trainable_parameters()[0] == 4 * entry.lora_per_rank


def test_the_engine_follows_a_field_of_trl(vlmdpo, monkeypatch):
    seen = []

    def choose(engine, model, *, router_loss=None):
        seen.append(router_loss)
        return engine, None

    monkeypatch.setattr("vlmdpo.training.simulate.choose_engine", choose)
    base = ["estimate-memory", "--answer-tokens", "4", "--json"]
    code, out, err = vlmdpo(*base, "--set", "router-aux-loss-coef=0", "--set", "fp16=true")
    assert code == 0, err
    assert seen == [0]
    assert json.loads(out)["peak_bytes"]
    assert "--set fp16=true: the estimate is of a step without it" in err
    code, _, err = vlmdpo(*base, "--set", "max_grad_norm=-1")
    assert code == 2
    assert "--set: max_grad_norm=-1 is out of range; give 0 or more" in err
    code, _, err = vlmdpo(*base, "--set", "ld_alpha=0.5", "--fast")
    assert code == 2
    assert "--fast has no formula for --set" in err
