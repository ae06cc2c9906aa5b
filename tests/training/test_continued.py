"""`train --adapter`: the policy goes on from an adapter, whose frozen copy is the reference."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer

from tests.conftest import unfolded
from tests.support.engines import assert_same, pairs, related_pairs, step
from vlmdpo.config import TrainConfig
from vlmdpo.engine.stock_collator import StockCollator
from vlmdpo.errors import ConfigError, DataError, MissingDependencyError, ModelError
from vlmdpo.models.adapters import reference_adapter, use_adapter
from vlmdpo.models.families import fallback_chat_template, linear_layers
from vlmdpo.tiny import random_models
from vlmdpo.training import caches, continued_options, lineage
from vlmdpo.training.continued import with_adapter
from vlmdpo.training.doctor import token_logps
from vlmdpo.training.make_trainer import make_trainer

SHIPPED = Path(__import__("vlmdpo").__file__).parent / "tiny" / "assets" / "adapter"
LANGUAGE = TrainConfig(lora_scope="language")


def _parts(family):
    model, processor = random_models.make(family)
    processor.chat_template = processor.chat_template or fallback_chat_template(processor)
    return model, processor


def _adapter(folder, family="idefics2", *, seed=3, **settings):
    """A trained adapter of a small random model, on disk."""
    model, _ = _parts(family)
    targets = linear_layers(model, "language")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, **settings))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    return folder


def _arguments(folder, rows, **settings):
    settings = {"gradient_checkpointing": False, "beta": 0.5, **settings}
    return DPOConfig(
        output_dir=str(folder),
        max_length=None,
        report_to="none",
        use_cpu=True,
        bf16=False,  # TRL's default is autocast
        per_device_train_batch_size=len(rows),
        **settings,
    )


def _going_on(adapter, rows, folder, *, family="idefics2", engine="shared", mdpo=False, **settings):
    model, processor = _parts(family)
    made = make_trainer(
        engine=engine,
        model=with_adapter(LANGUAGE, adapter, model),
        reference_model=None,
        processor=processor,
        train_dataset=rows,
        args=_arguments(folder, rows, **settings),
        lora_config=None,
        mdpo=mdpo,
    )
    made.model.train()
    return made


def _move(model):
    """Let the policy differ from its reference."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter += 0.03 * torch.randn_like(parameter)


@pytest.mark.parametrize("family", ["idefics2", "qwen2_5_vl"])
@pytest.mark.parametrize("engine", ["shared", "stock"])
def test_loss_metrics_and_gradients_are_those_of_trl_given_the_peft_model(family, engine, tmp_path):
    rows = related_pairs((0, 0, 0, 1), (1, 0, 0, 1), (0, 1, 2, 3))
    adapter = _adapter(tmp_path / "round-1", family)
    made = _going_on(adapter, rows, tmp_path, family=family, engine=engine)
    _move(made.model)
    model, processor = _parts(family)
    stock = DPOTrainer(
        model=with_adapter(LANGUAGE, adapter, model),
        args=_arguments(tmp_path, rows),
        processing_class=processor,
        data_collator=StockCollator(processor, max_length=None),
        train_dataset=rows,
    )
    stock.model.train()
    _move(stock.model)
    assert_same(step(stock), step(made))


def test_before_the_first_step_policy_and_reference_are_the_adapters_model(tmp_path):
    rows = pairs(2)
    adapter = _adapter(tmp_path / "round-1")
    made = _going_on(adapter, rows, tmp_path)
    assert step(made)[0] == pytest.approx(math.log(2), abs=1e-7)
    mdpo = _going_on(adapter, rows, tmp_path, mdpo=True, loss_weights=[3.0])
    assert step(mdpo)[0] == pytest.approx(3 * math.log(2), abs=1e-6)
    batch = made.data_collator([made.train_dataset[0]])
    tuned = token_logps(made, batch, reference=True)
    with use_adapter(made.model, None):
        base = token_logps(made, batch)
    assert max((a - b).abs().max() for a, b in zip(tuned, base, strict=True)) > 1e-3
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".default." in name for name in trained)
    assert reference_adapter(made.model) == "ref"


def test_the_reference_drops_nothing_out(tmp_path):
    rows = pairs(1)
    adapter = _adapter(tmp_path / "round-1", lora_dropout=0.5)
    made = _going_on(adapter, rows, tmp_path, disable_dropout=False)
    inputs = made._prepare_inputs(made.data_collator([made.train_dataset[0]]))
    kept = ("row", "image_keys", "answer_keys")
    inputs = {name: value for name, value in inputs.items() if name not in kept}
    first, second = (torch.cat(made.compute_ref_log_probs(made.model, inputs)) for _ in range(2))
    assert torch.equal(first, second)


def test_rounding_of_4_bit_models_is_undone(tmp_path):
    """TRL rounds the adapter that trains to bfloat16, and not its copy."""
    adapter = _adapter(tmp_path / "round-1")
    model, processor = _parts("idefics2")
    model.is_loaded_in_4bit = True
    rows = pairs(1)
    made = make_trainer(
        engine="shared",
        model=with_adapter(LANGUAGE, adapter, model),
        reference_model=None,
        processor=processor,
        train_dataset=rows,
        args=_arguments(tmp_path, rows),
        lora_config=None,
    )
    weights = dict(made.model.named_parameters())
    trained = [name for name in weights if ".default." in name]
    assert trained
    for name in trained:
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], weights[name.replace(".default.", ".ref.")]), name


def test_a_checkpoint_holds_the_adapter_that_trains_and_gives_it_back(tmp_path):
    adapter = _adapter(tmp_path / "round-1")
    made = _going_on(adapter, pairs(1), tmp_path / "out")
    _move(made.model)
    made.create_optimizer_and_scheduler(num_training_steps=2)
    made.state.global_step = 1
    made.save_now()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "ref").exists(), "transformers would read only folders of adapters"
    moved = {n: p.clone() for n, p in made.model.named_parameters() if ".default." in n}
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if ".default." in name:
                parameter.zero_()
    made._load_from_checkpoint(str(checkpoint))
    for name, parameter in made.model.named_parameters():
        if name in moved:
            assert torch.equal(parameter, moved[name]), name


def test_reference_log_probs_are_kept_apart_by_weights_and_by_scale(tmp_path):
    first = _adapter(tmp_path / "first")
    other = _adapter(tmp_path / "other", seed=4)
    scaled = shutil.copytree(first, tmp_path / "scaled")
    settings = json.loads((scaled / "adapter_config.json").read_text())
    (scaled / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 64}))
    rows, keys = pairs(1), []
    for adapter in (None, first, other, scaled, first):
        model, processor = _parts("idefics2")
        if adapter is not None:
            model = with_adapter(LANGUAGE, adapter, model)
        args = _arguments(tmp_path, rows)
        cache = caches.open_reference_cache(
            TrainConfig(), args, tmp_path, model, processor, "shared"
        )
        keys.append(cache.key)
    assert len(set(keys[:4])) == 4
    assert keys[4] == keys[1]


def test_whole_layers_of_an_adapter_are_switched_too():
    """`modules_to_save` of a TRL script: the reference would have them trained."""
    model, processor = _parts("idefics2")
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    inputs = processor.tokenizer("a b c", return_tensors="pt")
    with torch.no_grad(), adapted.disable_adapter():
        base = adapted(**inputs).logits
    head = next(p for n, p in adapted.named_parameters() if "modules_to_save" in n)
    with torch.no_grad():
        head += 1.0
        with use_adapter(adapted, None):
            assert torch.equal(adapted(**inputs).logits, base)
        assert not torch.equal(adapted(**inputs).logits, base)


# What an adapter fixes.


def _edited(**changes):
    folder = shutil.copytree(SHIPPED, "edited", dirs_exist_ok=True)
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return Path(folder)


def test_options_follow_the_adapter():
    settled = continued_options.settle(TrainConfig(adapter=_edited(r=4, lora_alpha=9)))
    assert (settled.lora_r, settled.lora_alpha) == (4, 9)
    assert continued_options.settle(settled) == settled
    assert continued_options.settle(TrainConfig(lora_r=5)).lora_r == 5, "without one, as they are"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lora_r": 8}, "--lora-r 8: 'edited' was made with 16"),
        ({"lora_alpha": 3}, "--lora-alpha 3"),
        ({"use_dora": True}, "--use-dora True"),
    ],
)
def test_an_option_that_says_otherwise_is_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        continued_options.settle(TrainConfig(adapter=_edited(), **options))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "is of kind IA3, not LoRA, from which training cannot go on; merge"),
        ({"bias": "all"}, "has trained biases"),
        ({"modules_to_save": ["lm_head"]}, r"holds whole layers \(lm_head\)"),
        ({"trainable_token_indices": [1]}, "holds embeddings of tokens"),
        ({"r": "many"}, "is damaged: r is 'many'"),
        ({"base_model_name_or_path": "HuggingFaceM4/idefics2-8b"}, "was trained on"),
    ],
)
def test_an_adapter_that_training_cannot_go_on_from(changes, says):
    with pytest.raises(ModelError, match=says):
        continued_options.settle(TrainConfig(adapter=_edited(**changes)))


def test_an_old_peft_cannot_keep_a_copy_of_experts_weights(monkeypatch):
    monkeypatch.setattr(continued_options, "version", lambda name: "0.19.1")
    with pytest.raises(MissingDependencyError, match=r"peft>=0\.20"):
        continued_options.settle(TrainConfig(adapter=_edited(target_parameters=["experts.up"])))
    continued_options.settle(TrainConfig(adapter=_edited()))


def test_a_damaged_adapter_is_named():
    folder = _edited()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(ModelError, match="adapter_model"):
        continued_options.settle(TrainConfig(adapter=folder))
    with pytest.raises(ModelError, match="holds no adapter_config"):
        continued_options.settle(TrainConfig(adapter=Path("nothing")))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lora": False}, "leave out --no-lora, or merge the adapter"),
        ({"strategy": "zero3", "num_processes": 2}, "untested with ZeRO-3"),
    ],
)
def test_what_cannot_be_with_an_adapter(options, says):
    with pytest.raises(ConfigError, match=says):
        TrainConfig(adapter=SHIPPED, **options)


def test_layers_that_options_name_must_be_the_adapters(tmp_path):
    model, _ = _parts("idefics2")
    wide = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    wide.save_pretrained(tmp_path / "wide")
    narrow = _adapter(tmp_path / "narrow")
    for options, adapter, says in (
        (LANGUAGE, tmp_path / "wide", "--lora-scope language: '.*' also has"),
        (TrainConfig(lora_target_modules="q_proj"), narrow, "also has"),
        (TrainConfig(lora_target_modules="q_proj,fc9"), narrow, "has no 'fc9'"),
    ):
        with pytest.raises(ConfigError, match=says):
            with_adapter(options, adapter, _parts("idefics2")[0])
    with_adapter(TrainConfig(), narrow, _parts("idefics2")[0])


# The chain of rounds.


def _trained(name, report):
    folder = Path(shutil.copytree(SHIPPED, name))
    (folder / "train_report.json").write_text(json.dumps(report))
    (folder / "recipe.yaml").write_text("loss_type: sigmoid\n")
    return folder


def test_the_chain_of_rounds_grows_and_names_what_it_holds(capfd):
    assert lineage.lineage(None) == []
    [alone] = lineage.lineage(SHIPPED)
    assert set(alone) == {"adapter", "digest"}, "it comes from elsewhere"
    report = {"dataset": "scenes", "steps": 9, "learning_rate": 1e-4, "lineage": [alone]}
    chain = lineage.lineage(_trained("second", report))
    assert [one["adapter"] for one in chain] == [str(SHIPPED), "second"]
    assert chain[1] | {"dataset": "scenes", "steps": 9, "loss_type": "sigmoid"} == chain[1]
    (Path("second") / "train_report.json").write_text("{")
    assert len(lineage.lineage(Path("second"))) == 1
    assert "the record of how 'second' was trained is damaged" in unfolded(capfd.readouterr().err)


def test_a_resumed_run_needs_the_adapter_that_it_began_with():
    run = Path("run")
    run.mkdir()
    lineage.check_same(run, None)
    with pytest.raises(ModelError, match="began without --adapter"):
        lineage.check_same(run, SHIPPED)
    lineage.write(run, lineage.lineage(SHIPPED))
    lineage.check_same(run, _edited())
    with pytest.raises(ModelError, match="goes on from --adapter"):
        lineage.check_same(run, None)
    other = _adapter(Path("other"))
    with pytest.raises(ModelError, match="'other' is not what the run went on from"):
        lineage.check_same(run, other)
    (run / lineage.LINEAGE).write_text("[")
    with pytest.raises(ModelError, match="is damaged"):
        lineage.check_same(run, SHIPPED)


def test_the_result_may_not_replace_the_adapter():
    from vlmdpo.commands.train_folder import check_apart

    adapter = Path("rounds/one")
    adapter.mkdir(parents=True)
    check_apart(Path("rounds/two"), adapter)
    check_apart(Path("rounds/one"), None)
    for folder in ("rounds/one", "rounds", "rounds/../rounds/one"):
        with pytest.raises(DataError, match="holds the adapter that training goes on from"):
            check_apart(Path(folder), adapter)


def test_estimates_count_the_copy():
    from vlmdpo.commands import estimate_memory
    from vlmdpo.config import EstimateMemoryConfig

    plain = EstimateMemoryConfig(fast=True, lora=True)
    more = dataclasses.replace(plain, adapter=SHIPPED, lora=False, lora_r=3)
    before, after = (estimate_memory.run(one) for one in (plain, more))
    adapter = before["parameters"]["trainable"]
    assert after["parameters"]["trainable"] == adapter
    grown = after["allocated"]["total_bytes"] - before["allocated"]["total_bytes"]
    assert grown == 4 * adapter
