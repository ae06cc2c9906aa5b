"""Ways to train: losses, MPO and mDPO, kinds of LoRA, frozen parts, rates, attention, 4 bits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open

from tests.conftest import unfolded
from tests.support.engines import pairs, step, trainer
from vlmdpo.commands import prepare
from vlmdpo.config import PrepareConfig, TrainConfig
from vlmdpo.errors import ModelError
from vlmdpo.tiny import random_models
from vlmdpo.training.arguments import dpo_config
from vlmdpo.training.make_trainer import make_trainer

pytestmark = pytest.mark.slow

SHORT = [
    "train",
    "--dataset",
    "data",
    "--max-steps",
    "2",
    "--per-device-train-batch-size",
    "4",
    "--output-dir",
    "out",
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return Path(
        prepare.run(
            PrepareConfig(limit=24, output_dir=tmp_path_factory.mktemp("prepared") / "data")
        )["path"]
    )


@pytest.fixture
def data(prepared):
    shutil.copytree(prepared, "data")


def _names(folder="out"):
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as held:
        return list(held.keys())


def test_several_losses_are_their_weighted_sum(tmp_path):
    rows = pairs(3, seed=2)
    single = {}
    for name in ("sigmoid", "bco_pair", "sft"):
        single[name] = step(trainer("idefics2", "shared", rows, tmp_path, loss_type=[name]))[0]
    mixed = trainer(
        "idefics2", "shared", rows, tmp_path, loss_type=list(single), loss_weights=[0.8, 0.2, 1.0]
    )
    assert step(mixed)[0] == pytest.approx(
        0.8 * single["sigmoid"] + 0.2 * single["bco_pair"] + single["sft"], rel=1e-5
    )


def test_mpo_and_mdpo_train_and_log_their_metrics(data, vlmdpo):
    code, out, err = vlmdpo(*SHORT, "--loss", "mpo", "--json")
    assert code == 0, err
    code, out, err = vlmdpo(*SHORT, "--loss", "mdpo", "--overwrite", "--json")
    assert code == 0, err
    assert json.loads(out)["engine"] == "shared"
    line = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[0])
    assert {
        "rewards/conditional_accuracies",
        "rewards/conditional_margins",
        "rewards/anchored",
    } <= set(line)
    assert line["loss"] == pytest.approx(3 * 0.6931, abs=0.02)
    found = [path.name for path in Path("data/reference-logprobs").iterdir()]
    assert len(found) == 1, "mDPO's answers about corrupted images lie beside the others"
    code, _, err = vlmdpo(*SHORT, "--loss", "mdpo", "--overwrite")
    assert code == 0
    assert "answers found in" in err


@pytest.mark.parametrize(("options", "has"), [([], False), (["--use-dora", "--use-rslora"], True)])
def test_kinds_of_lora(options, has, data, vlmdpo):
    code, _, err = vlmdpo(*SHORT, *options)
    assert code == 0, err
    assert any("lora_magnitude_vector" in name for name in _names()) == has
    saved = json.loads(Path("out/adapter_config.json").read_text())
    assert (saved["use_rslora"], saved["use_dora"]) == (has, has)


def test_frozen_parts_stay_as_they_were_and_others_move(data, vlmdpo):
    from vlmdpo.models.families import parameters_by_part
    from vlmdpo.models.load import load_model

    before = {
        name: (part, p.clone())
        for part, name, p in parameters_by_part(load_model("tiny", device="cpu"))
    }
    code, _, err = vlmdpo(
        *SHORT, "--no-lora", "--freeze", "vision,connector", "--learning-rate", "1e-3"
    )
    assert code == 0, err
    moved = {part: 0 for part, _ in before.values()}
    for part, name, parameter in parameters_by_part(load_model("./out", device="cpu")):
        moved[part] += int(not parameter.equal(before[name][1]))
    assert moved["vision"] == moved["connector"] == 0
    assert moved["language"] > 0
    code, _, err = vlmdpo(
        *SHORT, "--overwrite", "--no-lora", "--freeze", "vision,connector,language,head"
    )
    assert code == 2
    assert "leaves nothing to train" in err


def test_learning_rates_suit_lora_or_full_fine_tuning(data, vlmdpo):
    from vlmdpo.config import TrainConfig

    assert TrainConfig().peak_learning_rate == 5e-5
    assert TrainConfig(lora=False).peak_learning_rate == 5e-7
    assert TrainConfig(lora=False, learning_rate=1e-6).peak_learning_rate == 1e-6
    from vlmdpo.models.load import pretrained_source

    here = ["--model", pretrained_source("tiny")]
    code, _, err = vlmdpo(*SHORT, *here, "--learning-rate", "2e-2")
    assert code == 0
    assert "--learning-rate 0.02: LoRA usually takes 1e-06 to 0.0005; the default is 5e-05" in err
    _, _, err = vlmdpo(*SHORT, *here, "--overwrite")
    assert "usually takes" not in err


def test_attention_by_name(data, vlmdpo):
    code, _, err = vlmdpo(*SHORT, "--attn-implementation", "eager")
    assert code == 0
    assert "eager attention" in err
    code, _, err = vlmdpo(*SHORT, "--attn-implementation", "flash_attention_2", "--overwrite")
    assert code == 6
    assert "needs the flash-attn package" in err


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--quantization", "nf4", "--device", "cpu"], 4, "--quantization nf4 needs an NVIDIA GPU"),
        (["--quantization", "nf4", "--no-lora"], 2, "4-bit weights cannot be trained"),
        (
            ["--quantization", "nf4", "--strategy", "fsdp2", "--num-processes", "2"],
            2,
            "use --strategy ddp or zero2",
        ),
        (["--loss", "mdpo,sft"], 2, "cannot be combined with other losses"),
        (["--loss", "sigmod"], 2, "Did you mean 'sigmoid'?"),
        (["--loss", "mdpo", "--engine", "stock"], 2, "needs the shared engine"),
        (["--loss", "sigmoid,sft", "--loss-weights", "1"], 2, "1 weights for 2 losses"),
        (["--loss", "sigmoid,sft", "--loss-weights", "1,x"], 2, "cannot read '1,x' as numbers"),
        (["--label-smoothing", "0.1"], 2, "has no effect on --loss-type sigmoid"),
        (["--freeze", "vision"], 2, "--freeze needs --no-lora"),
        (["--no-lora", "--freeze", "eyes"], 2, "Choices: vision, connector, language, head"),
        (["--learning-rate", "0"], 2, "a number above 0"),
        (["--attn-implementation", "flash"], 2, "Choices: auto, sdpa, eager, flash_attention_2"),
    ],
)
def test_refusals(options, code, says, data, vlmdpo):
    got, _, err = vlmdpo(*SHORT, *options)
    assert got == code, err
    assert says in err.strip().splitlines()[-1]


def test_a_gpu_gets_the_fused_optimizer_and_peers_wait_for_hours(tmp_path):
    on_gpu = dpo_config(TrainConfig(), tmp_path, torch.device("cuda"))
    on_cpu = dpo_config(TrainConfig(), tmp_path, torch.device("cpu"))
    assert (on_gpu.optim, on_cpu.optim) == ("adamw_torch_fused", "adamw_torch")
    assert on_cpu.ddp_timeout == 3 * 3600
    chosen = TrainConfig(set=("ddp_timeout=60",), optim="adafactor")
    chosen_args = dpo_config(chosen, tmp_path, torch.device("cuda"))
    assert (chosen_args.ddp_timeout, chosen_args.optim) == (60, "adafactor")


@pytest.mark.parametrize(
    ("options", "dtype"),
    [([], "auto"), (["--no-lora"], "float32"), (["--no-lora", "--dtype", "bfloat16"], "bfloat16")],
)
def test_full_fine_tuning_loads_float32_weights(options, dtype, data, monkeypatch, vlmdpo):
    loaded = []

    def load_model(model, **settings):
        loaded.append(settings["dtype"])
        raise ModelError("enough")

    monkeypatch.setattr("vlmdpo.models.load.load_model", load_model)
    code, _, err = vlmdpo(*SHORT, *options)
    assert (code, loaded) == (4, [dtype])
    assert ("most weights will not move" in unfolded(err)) == (dtype == "bfloat16")


def test_qlora_adapters_stay_float32(tmp_path):
    model, processor = random_models.make("llava")
    model.is_loaded_in_4bit = True  # TRL then rounds the adapter to bfloat16
    args = dpo_config(TrainConfig(), tmp_path, torch.device("cpu"))
    made = make_trainer(
        engine="shared",
        model=model,
        reference_model=None,
        processor=processor,
        train_dataset=pairs(1),
        args=args,
        lora_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    trained = [p for p in made.model.parameters() if p.requires_grad]
    assert trained
    assert {p.dtype for p in trained} == {torch.float32}
