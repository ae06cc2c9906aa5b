"""`PairTrainer` in the place of TRL's `DPOTrainer`."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, List
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from PIL import Image as Pillow
from safetensors.torch import load_file
from trl import DPOConfig, DPOTrainer

import vlmdpo
from tests.support import templates
from vlmdpo.engine.forward import SharedForward
from vlmdpo.engine.trl_rows import is_rendered_as_asked, rendered
from vlmdpo.errors import ConfigError
from vlmdpo.models.families import fallback_chat_template
from vlmdpo.models.load import load_processor
from vlmdpo.tiny import random_models
from vlmdpo.training.trainer import PairTrainer

_TIMES = ("runtime", "per_second")


def lora():
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def turn(role, text):
    return [{"role": role, "content": text}]


def rows(count=4, *, images=2, **columns):
    """Rows as in TRL's own example: `images` pictures in turn, messages of plain text."""
    draw = np.random.default_rng(0)
    pictures = [
        Pillow.fromarray(draw.integers(0, 255, (40, 30 + 4 * i, 3), dtype=np.uint8))
        for i in range(images)
    ]
    made = [
        {
            "images": [pictures[i * images // count]],
            "prompt": turn("user", f"what is in {i % 2}"),
            "chosen": turn("assistant", f"a cat {i} of them"),
            "rejected": turn("assistant", f"dog {i}"),
            **{name: value(i) for name, value in columns.items()},
        }
        for i in range(count)
    ]
    return Dataset.from_list(made).cast_column("images", List(Image()))


def made(cls, folder, data, *, family="llava", model=None, adapter=lora, settings=None, **options):
    """A trainer of class `cls` on a tiny model, which is the same each time."""
    tiny, processor = random_models.make(family)
    processor.chat_template = processor.chat_template or fallback_chat_template(processor)
    args = DPOConfig(
        output_dir=str(folder),
        **{
            **{"per_device_train_batch_size": 4, "max_length": None, "max_steps": 2},
            **{"use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1},
            **{"save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False},
            **{"train_sampling_strategy": "sequential", "learning_rate": 1e-3},
            **(settings or {}),
        },
    )
    return cls(
        model=model or tiny,
        args=args,
        train_dataset=data,
        processing_class=processor,
        peft_config=adapter and adapter(),
        **options,
    )


def trained(cls, folder, data, **options):
    trainer = made(cls, folder, data, **options)
    trainer.train()
    return trainer


def assert_logs_equal(ours, theirs, tolerance=1e-4):
    assert len(ours.state.log_history) == len(theirs.state.log_history) > 1
    for found, expected in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if not name.endswith(_TIMES):
                assert found[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name


def both(folder, data, options_of_ours=None, **options):
    """(PairTrainer, DPOTrainer) that trained alike; their logs are compared."""
    ours = trained(PairTrainer, folder / "ours", data, **(options_of_ours or {}), **options)
    theirs = trained(DPOTrainer, folder / "theirs", data, **options)
    assert_logs_equal(ours, theirs)
    return ours, theirs


@pytest.fixture(scope="module")
def stock_run(tmp_path_factory):
    """What TRL logs of four rows about two images."""
    return trained(DPOTrainer, tmp_path_factory.mktemp("stock"), rows(4))


def test_a_trl_script_with_one_import_changed(tmp_path, monkeypatch):
    path = Path(vlmdpo.__file__).parent.parent / "examples" / "trl_script.py"
    found = importlib.util.spec_from_file_location("trl_script", path)
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    settings = {"max_steps": 3, "eval_steps": 3, "use_cpu": True, "disable_tqdm": True}
    settings["train_sampling_strategy"] = "sequential"  # PairTrainer would group rows by image
    theirs = script.main("trl", str(tmp_path / "trl"), **settings)
    ours = script.main("vlmdpo", str(tmp_path / "vlmdpo"), **settings)
    assert ours.engine == "shared"
    assert_logs_equal(ours, theirs)
    saved, expected = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("vlmdpo", "trl")
    )
    assert saved.keys() == expected.keys()
    assert all(torch.allclose(saved[name], expected[name], atol=1e-5) for name in expected)
    assert {p.name for p in (tmp_path / "trl").iterdir()} == {
        p.name for p in (tmp_path / "vlmdpo").iterdir()
    }


def test_rows_of_one_image_run_as_one_tree(tmp_path):
    ours, _ = both(tmp_path, rows(4, images=1), settings={"gradient_accumulation_steps": 1})
    assert ours.engine == "shared"
    assert ours.fallback_reason is None
    batch = ours.data_collator(list(ours.train_dataset))
    assert len(batch["forest"].roots) == 1
    assert len(batch["forest"].answers) == 8


@pytest.mark.parametrize(
    "change",
    [
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
        {"ld_alpha": 0.5},
        {"max_length": 55},  # cuts answers
        {"max_length": 47},  # leaves them no room
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    ],
    ids=["losses", "ld_alpha", "max_length", "full", "checkpointing"],
)
def test_arguments_of_trl(tmp_path, change):
    batch = {"per_device_train_batch_size": 2} if "gradient_checkpointing" in change else {}
    both(tmp_path, rows(4), settings={**change, **batch})


def test_a_full_model_with_a_reference_of_its_own(tmp_path):
    reference, _ = random_models.make("llava")
    for parameter in reference.parameters():
        parameter.data.mul_(1.01)
    ours = trained(PairTrainer, tmp_path / "a", rows(), adapter=None, ref_model=reference)
    assert ours.engine == "shared"
    assert len(ours.shared_forwards) == 2
    reference, _ = random_models.make("llava")
    for parameter in reference.parameters():
        parameter.data.mul_(1.01)
    assert_logs_equal(
        ours, trained(DPOTrainer, tmp_path / "b", rows(), adapter=None, ref_model=reference)
    )


def adapted():
    torch.manual_seed(3)
    return get_peft_model(random_models.make("llava")[0], lora())


@pytest.mark.parametrize("cached", [False, True])
def test_a_peft_model_is_its_own_reference(tmp_path, cached):
    more = {"adapter": None, "settings": {"max_steps": 3}}
    ours = trained(
        PairTrainer, tmp_path / "a", rows(), model=adapted(), cache_reference=cached, **more
    )
    theirs = trained(DPOTrainer, tmp_path / "b", rows(), model=adapted(), **more)
    assert_logs_equal(ours, theirs)
    assert abs(ours.state.log_history[0]["loss"] - math.log(2)) < 1e-5
    assert "ref" in ours.model.peft_config


def test_cached_references_are_computed_once(tmp_path, monkeypatch):
    calls = []
    compute = DPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(
        DPOTrainer, "compute_ref_log_probs", lambda *a: calls.append(a) or compute(*a)
    )
    ours, _ = both(tmp_path, rows(), {"cache_reference": True}, settings={"max_steps": 3})
    assert len(calls) == 1
    assert ours.reference_cache.num_known == 8


def single_image(data):
    data = data.map(lambda row: {"image": row["images"][0]}, remove_columns="images")
    return data.cast_column("image", Image())


def as_parts(data):
    def parts(row):
        prompt = [{"type": "image"}, {"type": "text", "text": row["prompt"][0]["content"]}]
        return {
            "images": row["images"],
            "prompt": [{"role": "user", "content": prompt}],
            **{
                side: [
                    {
                        "role": "assistant",
                        "content": [{"type": "text", "text": row[side][0]["content"]}],
                    }
                ]
                for side in ("chosen", "rejected")
            },
        }

    return [parts(row) for row in data]


def test_forms_of_rows(tmp_path, stock_run):
    """A single image, columns that TRL does not know, one named `row` among them."""
    data = rows(4, row=lambda i: f"no number {i}", extra=lambda i: {"nested": i})
    ours = trained(PairTrainer, tmp_path, single_image(data))
    assert ours.engine == "shared"
    assert_logs_equal(ours, stock_run)


def test_messages_of_parts_and_texts_are_rendered_as_trl_does(tmp_path):
    trainer = made(PairTrainer, tmp_path, rows(2))
    stock = trainer._stock_collator
    forms = [list(rows(2)), as_parts(rows(2))]
    rendered = [trainer.data_collator([dict(row) for row in form]) for form in forms]
    for form in forms:
        batch = trainer.pair_collator.stock_rows(
            [_as_text(trainer.processing_class, row) for row in form]
        )
        expected = stock([dict(row) for row in form])
        for name in ("input_ids", "attention_mask", "completion_mask"):
            assert torch.equal(
                batch[name] * batch["attention_mask"], expected[name] * expected["attention_mask"]
            ), name
    assert torch.equal(rendered[0]["tree_ids"], rendered[1]["tree_ids"])


def _as_text(processor, row):
    return rendered(processor, dict(row))


def test_a_prompt_that_both_answers_repeat(tmp_path, stock_run):
    explicit = rows(4)
    implicit = explicit.map(
        lambda row: {side: row["prompt"] + row[side] for side in ("chosen", "rejected")},
        remove_columns="prompt",
    )
    ours = trained(PairTrainer, tmp_path / "a", implicit)
    assert ours.engine == "shared"
    assert_logs_equal(ours, stock_run)


def test_rows_without_an_image_among_others(tmp_path):
    data = list(rows(4))
    data[1]["images"] = data[2]["images"] = []
    mixed = Dataset.from_list(data).cast_column("images", List(Image()))
    ours = trained(PairTrainer, tmp_path, mixed)
    assert ours.engine == "shared"
    assert ours.state.log_history[0]["loss"] > 0


def test_a_streamed_dataset(tmp_path):
    ours, _ = both(tmp_path, rows(4).to_iterable_dataset())
    assert ours.engine == "shared"
    assert ours.row_groups is None


def test_images_that_have_no_pixels_here_run_as_trl_runs_them(tmp_path, capfd):
    arrays = [{**row, "images": [np.asarray(image) for image in row["images"]]} for row in rows(2)]
    trainer = made(PairTrainer, tmp_path, rows(2))
    batch = trainer.data_collator([dict(row) for row in arrays])
    assert "forest" not in batch
    assert "a batch runs as TRL's own rows" in capfd.readouterr().err
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.isfinite()
    trainer.data_collator([dict(row) for row in arrays])
    assert capfd.readouterr().err == "", "said once"


def test_text_only_data_is_left_to_trl(tmp_path, capfd):
    ours, _ = both(tmp_path, rows(4).remove_columns("images"))
    assert ours.engine == "stock"
    assert "no column of images" in capfd.readouterr().err


class Reads:
    def __init__(self, processor):
        from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

        self.collate = DataCollatorForVisionPreference(processor)

    def __call__(self, examples):
        return self.collate(examples)


def test_a_collator_of_ones_own_is_used(tmp_path, stock_run, capfd):
    _, processor = random_models.make("llava")
    processor.chat_template = processor.chat_template or fallback_chat_template(processor)
    own = Reads(processor)
    ours = trained(PairTrainer, tmp_path, rows(4), data_collator=own)
    assert_logs_equal(ours, stock_run)
    assert ours.engine == "stock"
    assert ours.data_collator is own
    assert ours.fallback_reason == "it was given a data_collator"
    assert "it was given a data_collator" in " ".join(capfd.readouterr().err.split())


def prefix():
    return PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"settings": {"torch_compile": True}}, "torch_compile"),
        (
            {"adapter": lambda: PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")},
            "virtual",
        ),
    ],
    ids=["compile", "prefix"],
)
def test_what_the_engine_cannot_do_is_left_to_trl(tmp_path, capfd, change, reason):
    trainer = made(PairTrainer, tmp_path, rows(2), **change)
    assert trainer.engine == "stock"
    assert reason in trainer.fallback_reason
    assert type(trainer.data_collator).__module__.startswith("trl.")
    assert not trainer.shared_forwards
    assert reason in capfd.readouterr().err


def test_a_model_that_cannot_share_runs_rows(tmp_path, stock_run, capfd):
    ours = trained(PairTrainer, tmp_path, rows(4), engine="rows")
    assert_logs_equal(ours, stock_run)
    assert ours.engine == "rows"
    assert "image_copies" in ours.data_collator(list(ours.train_dataset))


def test_stock_is_trl_unchanged(tmp_path, stock_run, capfd):
    ours = trained(PairTrainer, tmp_path, rows(4), engine="stock")
    assert_logs_equal(ours, stock_run)
    assert ours.engine == "stock"
    assert ours.fallback_reason is None
    assert "PairTrainer" not in capfd.readouterr().err


def test_an_engine_that_is_wrong_is_found_before_the_first_step(
    tmp_path, stock_run, monkeypatch, capfd
):
    packed = SharedForward._packed_forward

    def wrong(self, *args, **kwargs):
        output = packed(self, *args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 1.5
        return output

    monkeypatch.setattr(SharedForward, "_packed_forward", wrong)
    ours = trained(PairTrainer, tmp_path, rows(4))
    assert_logs_equal(ours, stock_run)
    assert ours.engine == "rows"
    assert "differs from stock" in ours.fallback_reason
    assert "it runs each answer in a row of its own" in " ".join(capfd.readouterr().err.split())


def test_an_engine_that_fails_leaves_trl(tmp_path, stock_run, monkeypatch):
    def fail(self, *args, **kwargs):
        raise KeyError("positions")

    monkeypatch.setattr(SharedForward, "_packed_forward", fail)
    monkeypatch.setattr(SharedForward, "_row_positions", fail)
    ours = trained(PairTrainer, tmp_path, rows(4))
    assert_logs_equal(ours, stock_run)
    assert ours.engine == "stock"
    assert "positions" in ours.fallback_reason


def test_the_check_can_be_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmdpo.training.drop_in.verify", lambda trainer: pytest.fail("checked"))
    assert trained(PairTrainer, tmp_path, rows(2), self_check=False).engine == "shared"


def test_rows_of_one_image_are_grouped_by_default(tmp_path, capfd):
    random_order = {"settings": {"train_sampling_strategy": "random"}}
    grouped = trained(PairTrainer, tmp_path / "a", rows(8), **random_order)
    assert grouped.row_groups.num_images == 2
    assert "2 images and 4 prompts in 8 rows" in " ".join(capfd.readouterr().err.split())
    off = trained(PairTrainer, tmp_path / "b", rows(8), group_by_image=False, **random_order)
    assert off.row_groups is None
    assert_logs_equal(off, trained(DPOTrainer, tmp_path / "c", rows(8), **random_order))


def test_asked_to_group_where_that_does_nothing(tmp_path, capfd):
    trained(PairTrainer, tmp_path, rows(4), group_by_image=True)
    said = " ".join(capfd.readouterr().err.split())
    assert "group_by_image does nothing: train_sampling_strategy is sequential" in said


def metrics_of(prediction):
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return {"width": float(np.asarray(logits).shape[-1]), "sum": float(np.sum(logits))}


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_compute_metrics_and_predict_are_given_whole_rows(tmp_path):
    evaluation = {"eval_dataset": rows(2), "compute_metrics": metrics_of}
    ours, theirs = (
        made(cls, tmp_path / cls.__name__, rows(4), **evaluation)
        for cls in (PairTrainer, DPOTrainer)
    )
    found, expected = ours.evaluate(), theirs.evaluate()
    assert found.keys() == expected.keys()
    assert found["eval_sum"] == pytest.approx(expected["eval_sum"], rel=1e-4)
    logits, wanted = ours.predict(rows(2)).predictions, theirs.predict(rows(2)).predictions
    assert np.allclose(logits[0], wanted[0], atol=1e-4)
    assert ours.engine == "shared"
    assert "forest" in ours.data_collator(list(rows(2)))


def test_several_evaluation_sets_and_a_small_last_batch(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    sets = {"eval_dataset": {"first": rows(3), "second": rows(2, images=1)}}
    ours, _ = both(tmp_path, rows(4), settings=settings, **sets)
    assert any("eval_second_loss" in entry for entry in ours.state.log_history)


def test_a_run_is_saved_and_resumed_as_trls(tmp_path):
    whole = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    whole["train_sampling_strategy"] = "random"
    first = trained(PairTrainer, tmp_path / "a", rows(8), settings=whole)
    again = made(PairTrainer, tmp_path / "a", rows(8), settings=whole)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    names = ("loss", "rewards/margins", "logps/chosen")
    last, repeated = (trainer.state.log_history[3] for trainer in (first, again))
    assert [repeated[name] for name in names] == [last[name] for name in names]
    assert {p.name for p in (tmp_path / "a").iterdir()} >= {"checkpoint-2", "checkpoint-4"}
    theirs = trained(DPOTrainer, tmp_path / "b", rows(8), settings=whole)
    files = [
        sorted(p.name for p in (Path(t.args.output_dir) / "checkpoint-4").iterdir())
        for t in (first, theirs)
    ]
    assert files[0] == files[1]


def test_a_model_by_name(tmp_path):
    model, processor = random_models.make("llava")
    processor.chat_template = processor.chat_template or fallback_chat_template(processor)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    args = DPOConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none", max_steps=1
    )
    trainer = PairTrainer(str(tmp_path / "model"), None, args, None, rows(2), peft_config=lora())
    trainer.train()
    assert trainer.engine == "shared"


def test_errors_are_trls(tmp_path):
    for cls in (PairTrainer, DPOTrainer):
        with pytest.raises(ValueError, match="precompute_ref_log_probs"):
            made(cls, tmp_path, rows(2), settings={"precompute_ref_log_probs": True})
        with pytest.raises(NotImplementedError, match="sync_ref_model"):
            made(cls, tmp_path, rows(2), settings={"sync_ref_model": True})
        with pytest.raises(ValueError, match="train_dataset"):
            made(cls, tmp_path, None)


def test_a_reference_that_follows_the_policy(tmp_path):
    follows = {"sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 3}

    def run(cls):
        reference, _ = random_models.make("llava")
        return trained(
            cls,
            tmp_path / cls.__name__,
            rows(),
            adapter=None,
            ref_model=reference,
            settings=follows,
        )

    assert_logs_equal(run(PairTrainer), run(DPOTrainer))
    reference, _ = random_models.make("llava")
    with pytest.raises(ConfigError, match="cache_reference: sync_ref_model changes"):
        made(
            PairTrainer,
            tmp_path,
            rows(),
            adapter=None,
            ref_model=reference,
            settings=follows,
            cache_reference=True,
        )


def test_an_unknown_engine(tmp_path):
    with pytest.raises(ConfigError, match=r"engine='sock': choose .* Did you mean 'stock'"):
        made(PairTrainer, tmp_path, rows(2), engine="sock")


def test_messages_can_be_silenced(tmp_path, capfd):
    from vlmdpo import ui

    ui.set_verbosity(quiet=True, yes=False)
    try:
        trained(PairTrainer, tmp_path, rows(2))
    finally:
        ui.set_verbosity(quiet=False, yes=False)
    assert "self-check" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["parts", "no end", "as the model has it"])
def test_what_the_commands_would_ask_otherwise_is_said(tmp_path, capfd, kind):
    trainer = made(PairTrainer, tmp_path, rows(2))
    processor = trainer.processing_class
    if kind != "as the model has it":
        processor.chat_template = templates.of_family(kind, processor.chat_template)
    before = dict(vars(processor))
    trainer._before_use()
    said = "vlmdpo's commands render them differently" in " ".join(capfd.readouterr().err.split())
    assert said == (kind == "no end" or not is_rendered_as_asked(processor, rows(1)[0]))
    assert trainer.engine == "shared"
    assert vars(processor).keys() == before.keys()


def test_the_embedded_model_is_rendered_as_it_is_asked(tmp_path):
    processor = load_processor("tiny")
    row = rows(1)[0]
    assert is_rendered_as_asked(processor, row)
    assert is_rendered_as_asked(processor, rendered(processor, row))
    processor.chat_template = processor.chat_template.replace("<end_of_utterance>", "")
    assert not is_rendered_as_asked(processor, row)
