"""Memory estimates: exact counts of every known model, simulated and measured steps, what fits."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support import scripts
from tests.support.images import noise
from vlmdpo.config import TrainConfig
from vlmdpo.engine.content_keys import image_key
from vlmdpo.errors import ConfigError
from vlmdpo.memory import architecture as arch
from vlmdpo.memory import fast
from vlmdpo.memory.cuda_autocast import cuda_autocast_rules
from vlmdpo.memory.fake_tensors import SimulationMode
from vlmdpo.memory.fit import PeakByBatch, largest_batch_size, verdict
from vlmdpo.memory.gpus import capacity_bytes
from vlmdpo.memory.measure import AllocationLedger
from vlmdpo.memory.terms import Shards, allocated_components
from vlmdpo.models import registry
from vlmdpo.training.simulate import (
    cuda_rules,
    estimate_peak,
    simulate,
)
from vlmdpo.training.synthetic_rows import Workload, synthetic_rows

pytestmark = pytest.mark.slow

BENCHMARK = Path(__file__).parents[2] / "examples" / "benchmarks" / "memory.py"
PUBLIC = [entry for entry in registry.ENTRIES.values() if entry.alias != "tiny"]


@pytest.mark.parametrize("entry", PUBLIC, ids=lambda entry: entry.alias)
def test_the_registrys_counts_are_those_of_the_architectures(entry):
    model = arch.build_on_meta(arch.public_config(entry.alias))
    assert arch.count_parameters(model) == dict(entry.by_part)
    assert sum(p.numel() for p in model.parameters()) == entry.parameters
    assert arch.count_adapter_parameters(model, 8, "all") == 8 * entry.lora_per_rank
    if entry.alias not in fast.known_architectures():
        return  # its steps are simulated from its own files
    stand_in = arch.load_architecture(entry.alias)
    assert arch.count_parameters(arch.build_on_meta(stand_in.config)) == dict(entry.by_part), (
        "the stand-in is as large"
    )


def test_adapter_parameters_are_counted_as_peft_creates_them():
    config = arch.public_config("smolvlm-256m")
    wrapped = arch.build_on_meta(config, lora_r=16)
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert (
        trained
        == arch.count_adapter_parameters(arch.build_on_meta(config), 16, "all")
        == 16 * registry.get("smolvlm-256m").lora_per_rank
    )


def test_the_embedded_model_is_counted_from_its_files():
    entry = registry.get("tiny")
    assert arch.count_parameters(arch.build_on_meta(arch.load_architecture("tiny").config)) == dict(
        entry.by_part
    )


def test_a_simulated_step_peaks_like_a_measured_one():
    settings = [
        "gemma3",
        "smolvlm, shared, full",
    ]
    out = scripts.run(BENCHMARK, "--json", "--cases", *settings, timeout_s=600)
    cases = json.loads(out)["cases"]
    assert all(any(setting in case["name"] for case in cases) for setting in settings)
    for case in cases:
        assert abs(case["agreement"]) < 0.005, case
        assert case["predicted_bytes"] > 1e7


@pytest.mark.parametrize("engine", ["shared", pytest.param("stock", marks=pytest.mark.exhaustive)])
def test_shallow_copies_give_the_whole_models_peak(engine):
    shape = arch.load_architecture("smolvlm-256m")
    shape = dataclasses.replace(shape, config=arch.make_shallow(shape.config, 8, 6))
    config = TrainConfig(engine=engine, per_device_train_batch_size=1, bf16=True)
    rows = synthetic_rows(shape.processor, Workload((256, 192), 1, 30, 60, 40), 1)
    quick = estimate_peak(shape, config, rows, dtype=torch.bfloat16)
    whole = simulate(shape, config, rows, dtype=torch.bfloat16)
    assert quick.static == whole.static
    assert quick.peak == pytest.approx(whole.peak, rel=1e-4)
    assert whole.peak > 1.1 * whole.static


def test_a_ledger_counts_live_storages_only():
    ledger = AllocationLedger()
    with SimulationMode(ledger=ledger):
        first = torch.zeros(1000, 1000)
        view = first[10:]
        second = first + 1
        assert ledger.current_bytes == 2 * 4_000_000
        del second
        assert (ledger.current_bytes, ledger.peak_bytes) == (4_000_000, 8_000_000)
        ledger.reset_peak()
        ids = torch.arange(5)
        assert ids.tolist() == [0, 1, 2, 3, 4], "integers are real"
        assert first[ids].shape == (5, 1000)
        assert first[torch.tensor([True, False] * 500)].shape == (500, 1000)
        del first
        assert ledger.current_bytes >= 4_000_000, "a view keeps its storage"
        del view
    assert ledger.current_bytes < 100


def test_allocations_computed_by_hand():
    lines = {
        c.name: c.bytes
        for c in allocated_components(
            1000, 10, "bfloat16", lora=True, cached=True, optim="adamw_torch"
        )
    }
    assert lines == {
        "Model to train": 2000,
        "Adapter": 40,
        "Reference model": 0,
        "Gradients": 40,
        "Optimizer states": 80,
    }
    lines = {
        c.name: c.bytes
        for c in allocated_components(
            1000, 0, "float32", lora=False, cached=False, optim="adamw_torch"
        )
    }
    assert lines == {
        "Model to train": 4000,
        "Reference model": 4000,
        "Gradients": 4000,
        "Optimizer states": 8000,
    }
    eight = allocated_components(
        1000,
        0,
        "bfloat16",
        lora=False,
        cached=True,
        optim="adamw_8bit",
        shards=Shards.for_strategy("fsdp2", 4),
    )
    assert {c.name: c.bytes for c in eight} == {
        **{"Model to train": 500, "Reference model": 0, "Gradients": 500, "Optimizer states": 500}
    }
    assert not any(c.validated for c in eight)
    assert Shards.for_strategy("zero2", 8) == Shards(1, 8, 8)
    four = allocated_components(
        64 * 1024,
        10,
        "bfloat16",
        lora=True,
        cached=True,
        optim="adamw_torch",
        nf4_weights=64 * 1024,
    )
    assert four[0].name == "Model to train, in nf4"
    assert four[0].bytes == 64 * 1024 // 2 + 1024 + 1024 * 4 // 256


def test_verdicts_and_the_largest_batch():
    assert verdict(90, 100).word == "fits"
    assert verdict(97, 100).word == "tight"
    assert (verdict(110, 100).word, verdict(110, 100).free_bytes) == ("does not fit", -10)
    peaks = PeakByBatch(
        1, 2, {"forward": 12.0, "backward": 10.0}, {"forward": 13.0, "backward": 14.0}
    )
    assert [peaks.peak(batch) for batch in (1, 2, 4)] == [12.0, 14.0, 22.0]
    assert largest_batch_size(peaks, 0, 30, 64) == 4  # 8 would need 38
    assert largest_batch_size(peaks, 0, 24, 6) == 3, "a divisor of the effective batch"
    assert largest_batch_size(peaks, 0, 12, 64) is None


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        ("24GiB", 24 * 2**30),
        ("24 GB", 24 * 10**9),
        ("rtx-4090", 24 * 2**30),
        ("A100_80GB", 80 * 2**30),
    ],
)
def test_gpus_and_amounts(gpu, expected):
    assert capacity_bytes(gpu) == expected


def test_an_unknown_gpu_names_a_near_one():
    with pytest.raises(ConfigError, match="Did you mean 'rtx-4090'"):
        capacity_bytes("rtx-4091")


def estimate(vlmdpo, *arguments, code=0):
    got, out, err = vlmdpo("estimate-memory", "--json", *arguments)
    assert got == code, err
    return json.loads(out) if code == 0 else " ".join(err.split())


@pytest.mark.drawn
def test_a_verdict_a_plan_and_a_plot(tmp_path, vlmdpo):
    plot = ["--plot", tmp_path / "bars.png", "--gradient-accumulation-steps", "4"]
    report = estimate(vlmdpo, "--lora", "--gpu", "4GiB", *plot)
    assert report["verdict"] == "fits"
    assert (
        report["peak_bytes"] == max(report["phases"].values()) > report["allocated"]["total_bytes"]
    )
    plan = report["plan"]
    assert plan["per_device_train_batch_size"] * plan["gradient_accumulation_steps"] == 8
    assert plan["peak_bytes"] < 4 * 2**30
    assert "CUDA context and workspaces" in report["unvalidated"]
    with Image.open(tmp_path / "bars.png") as picture:
        assert picture.width > 800
    batch = ["--per-device-train-batch-size", plan["per_device_train_batch_size"]]
    larger = estimate(vlmdpo, "--lora", *batch)
    assert larger["peak_bytes"] == pytest.approx(plan["peak_bytes"], rel=1e-6), (
        "the plan's peak is that batch's own"
    )


def test_screen_shows_the_command_to_run(vlmdpo):
    code, out, err = vlmdpo(
        "estimate-memory", "--lora", "--gpu", "rtx-4090", "--gradient-accumulation-steps", "2"
    )
    assert code == 0, err
    out = " ".join(out.split())
    assert "rtx-4090: fits; needs" in out
    assert (
        "vlmdpo train --model tiny --dtype float32 --per-device-train-batch-size 4 "
        "--gradient-accumulation-steps 1" in out
    )
    assert "* not validated: CUDA context and workspaces, fragmentation" in out


def test_a_prepared_dataset_gives_its_own_longest_rows(tmp_path, vlmdpo):
    from vlmdpo.commands import prepare
    from vlmdpo.config import PrepareConfig

    prepare.run(PrepareConfig(limit=24, output_dir=tmp_path / "few"))
    report = estimate(vlmdpo, "--dataset", tmp_path / "few", "--lora")
    assert report["image"] == [72, 72]
    assert 1e7 < report["peak_bytes"] < 1e9
    longest = prepare.run(PrepareConfig(limit=24, output_dir=tmp_path / "few"))["lengths"]
    asked = ["--model", "smolvlm-256m", "--lora", "--fast", "--dataset", tmp_path / "few"]
    code, _, err = vlmdpo("estimate-memory", *asked)
    assert code == 3
    assert "were counted for 'tiny', not 'smolvlm-256m'" in err
    manifest = tmp_path / "few" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"model": "tiny"', '"model": "smolvlm-256m"'))
    _, _, err = vlmdpo("estimate-memory", *asked)
    assert "--fast counts each row alone; leave it out" in " ".join(err.split())
    fast = estimate(vlmdpo, *asked)["settings"]
    assert fast["prompt_tokens"] == longest["prompt_tokens"]["max"] - 18
    assert fast["answer_tokens"] == max(
        longest[f"{side}_tokens"]["max"] for side in ("chosen", "rejected")
    )


def test_a_prepared_dataset_is_taken_with_what_its_rows_share(tmp_path, vlmdpo, monkeypatch):
    from vlmdpo.commands import prepare
    from vlmdpo.config import PrepareConfig
    from vlmdpo.training import simulate

    source, data = tmp_path / "rows.jsonl", tmp_path / "few"
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(noise((64, 64), seed=i, kind="PNG"))
    rows = [
        {"question": "Is it?", "chosen": f"Yes {i}.", "rejected": "No.", "image": f"{i // 2}.png"}
        for i in range(16)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.run(PrepareConfig(dataset=str(source), output_dir=data))
    batches = []
    run = simulate.estimate_peak

    def watched(architecture, config, rows, **more):
        batches.append({image_key(row["images"]) for row in rows})
        return run(architecture, config, rows, **more)

    monkeypatch.setattr(simulate, "estimate_peak", watched)
    asked = ["--dataset", data, "--lora", "--per-device-train-batch-size", "4"]
    report = estimate(vlmdpo, *asked)
    assert report["pairs_per_prompt"] == 2
    apart = estimate(vlmdpo, *asked, "--pairs-per-prompt", "1")
    assert apart["pairs_per_prompt"] == 1
    assert [len(images) for images in batches] == [2, 4]


@pytest.mark.parametrize("images", ["1", "0"])
def test_pairs_per_prompt_is_reported_and_lowers_the_formulas_peak(images, vlmdpo):
    asked = ["--model", "llava-1.5-7b", "--lora", "--fast", "--images", images]
    asked += ["--per-device-train-batch-size", "8"]
    peaks = []
    for pairs in ("1", "2", "3", "8", "64"):
        report = estimate(vlmdpo, *asked, "--pairs-per-prompt", pairs)
        assert report["pairs_per_prompt"] == int(pairs)
        peaks.append(report["peak_bytes"])
    assert peaks[0] > peaks[1] > peaks[2] > peaks[3] == peaks[4]
    assert estimate(vlmdpo, *asked)["peak_bytes"] == peaks[0]
    code, out, _ = vlmdpo("estimate-memory", *asked, "--pairs-per-prompt", "2")
    assert code == 0
    assert "batch 8, 2 pairs a prompt" in " ".join(out.split())


def test_a_simulated_step_computes_a_shared_prompt_once(vlmdpo):
    asked = ["--lora", "--per-device-train-batch-size", "4", "--prompt-tokens", "100"]
    asked += ["--answer-tokens", "10"]
    one, two, four = (
        estimate(vlmdpo, *asked, "--pairs-per-prompt", pairs)["phases"]["backward"]
        for pairs in ("1", "2", "4")
    )
    assert one > two > four
    stock = estimate(vlmdpo, *asked, "--pairs-per-prompt", "4", "--engine", "stock")
    assert stock["phases"]["backward"] > one


def test_sharding_and_four_bits_are_marked(vlmdpo):
    plain = estimate(vlmdpo, "--lora")
    sharded = estimate(
        vlmdpo, "--lora", "--num-gpus", "2", "--strategy", "zero2", "--quantization", "nf4"
    )
    assert sharded["peak_bytes"] < plain["peak_bytes"]
    assert {"nf4 weights", "sharding over GPUs"} <= set(sharded["unvalidated"])
    assert not any(c["validated"] for c in sharded["allocated"]["components"] if c["bytes"])


@pytest.mark.parametrize("alias", sorted(fast.known_architectures()))
def test_formula_and_simulation_take_images_of_the_size_that_prepare_keeps(alias):
    from vlmdpo.models.image_limits import default_image_side

    side = default_image_side(arch.load_architecture(alias).processor)
    assert fast.default_image_side(alias) == side


@pytest.mark.parametrize(
    "alias",
    [
        *("idefics2-8b", "llava-1.5-7b", "llava-v1.6-mistral-7b", "qwen3-vl-4b", "gemma-3-4b"),
        "smolvlm-256m",
    ],
)
def test_the_formula_counts_image_tokens_as_the_processor_does(alias):
    shape = arch.load_architecture(alias)
    from vlmdpo.models.rendering import render_question

    side = fast.default_image_side(alias)
    image = Image.new("RGB", (side, side * 3 // 4))
    inputs = shape.processor(
        text=[render_question(shape.processor, "a")], images=[[image]], add_special_tokens=False
    )
    count = sum(token == shape.config.image_token_id for token in inputs["input_ids"][0])
    assert fast.image_tokens(alias, image.size)[0] == pytest.approx(count, abs=0.02 * count)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--gpu", "voodoo-2"], 2, "is neither a known GPU nor an amount"),
        (["--image-size", "big"], 2, "as in 490 or 640x480"),
        (["--quantization", "nf4"], 2, "needs --lora"),
        (["--fast", "--dataset", "x"], 3, "'x' was not written by vlmdpo prepare"),
        (["--fast", "--image-splitting"], 2, "--fast has no formula for --image-splitting"),
        (["--fast", "--model", "nobody/nothing"], 4, "no exact parameter counts"),
        (["--model", "nobody/nothing"], 4, "cannot find 'nobody/nothing'"),
        (["--dataset", "absent"], 3, "'absent' is not a folder; run vlmdpo prepare first"),
        (["--pairs-per-prompt", "0"], 2, "--pairs-per-prompt: 0 is out of range; give 1 or more"),
        (
            ["--pairs-per-prompt", "2", "--dataset", "x"],
            2,
            "--pairs-per-prompt: the rows of --dataset say what they share",
        ),
    ],
)
def test_mistakes(arguments, code, says, vlmdpo):
    assert says in estimate(vlmdpo, *arguments, code=code)


def test_a_folder_with_a_configuration_is_enough_to_count(tmp_path, vlmdpo):
    import shutil

    from vlmdpo.models.load import pretrained_source

    shutil.copy(Path(pretrained_source("tiny")) / "config.json", tmp_path)
    model = arch.build_on_meta(arch.load_config(str(tmp_path)))
    assert sum(arch.count_parameters(model).values()) == registry.get("tiny").parameters
    code, _, err = vlmdpo("estimate-memory", "--model", tmp_path)
    assert code == 4, "a step needs the processor too"
    assert "error: --model" in err


def test_the_first_saving_that_fits_is_shown_as_a_command(vlmdpo):
    small = [
        "--model",
        "smolvlm-256m",
        "--image-size",
        "64",
        "--answer-tokens",
        "8",
        "--gpu",
        "2GiB",
    ]
    code, out, err = vlmdpo("estimate-memory", *small)
    assert code == 0, err
    out = " ".join(out.split())
    assert "2GiB: does not fit" in out
    assert "First try --dtype bfloat16 --lora: vlmdpo train --model smolvlm-256m" in out
    assert "--per-device-train-batch-size 1 --gradient-accumulation-steps 64" in out


def test_simulated_autocast_follows_cuda():
    half, weight = torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)
    functional, norm = torch.nn.functional, torch.nn.LayerNorm(8, dtype=torch.bfloat16)

    def dtypes():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = (
                *(norm(half), functional.rms_norm(half, (8,), weight)),
                *(functional.softmax(half, -1), functional.gelu(half)),
                functional.linear(half, half),
            )
        return [output.dtype for output in outputs]

    assert set(dtypes()) == {torch.bfloat16}
    with cuda_autocast_rules():
        # As CUDA's autocast gives them; activations and products stay bfloat16 there too.
        assert dtypes() == [torch.float32] * 3 + [torch.bfloat16] * 2
        assert norm(half).dtype == torch.bfloat16, "autocast is off"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_simulated_gpu_needs_more_for_norms(checkpointing):
    shape = arch.load_architecture("smolvlm-256m")
    shape = dataclasses.replace(shape, config=arch.make_shallow(shape.config, 2, 2))
    rows = synthetic_rows(shape.processor, Workload((64, 48), 1, 10, 20, 20), 1)
    config = TrainConfig(
        per_device_train_batch_size=1, bf16=True, gradient_checkpointing=checkpointing
    )
    on_cpu = simulate(shape, config, rows, dtype=torch.bfloat16)
    with cuda_autocast_rules():
        on_gpu = simulate(shape, config, rows, dtype=torch.bfloat16)
    assert on_gpu.static == on_cpu.static
    assert on_gpu.peak > on_cpu.peak


@pytest.mark.exhaustive
def test_a_deep_model_is_on_the_lines_of_its_shallow_copies():
    """Qwen3-VL too, whose vision tower has layers of two kinds."""
    shape = arch.load_architecture("qwen3-vl-2b")
    shape = dataclasses.replace(shape, config=arch.make_shallow(shape.config, 5, 7))
    rows = synthetic_rows(shape.processor, Workload((448, 336), 1, 20, 60, 60), 1)
    config = TrainConfig(per_device_train_batch_size=1, bf16=True)
    with cuda_rules():
        whole = simulate(shape, config, rows, dtype=torch.bfloat16)
        extrapolated = estimate_peak(shape, config, rows, dtype=torch.bfloat16)
    assert extrapolated.phases == pytest.approx(whole.phases, rel=2e-3)


@pytest.mark.parametrize("alias", ["gemma-4-e4b", "gemma-4-31b", "qwen3.5-35b-a3b"])
def test_every_kind_of_model_has_shallow_copies(alias):
    """Gemma 4's smaller models too, whose last layers share the keys and values of earlier ones."""
    config = arch.public_config(alias)
    deep = arch.count_layers(config)
    assert min(deep) > 4
    three, four = (
        sum(arch.count_parameters(arch.build_on_meta(arch.make_shallow(config, n, 4))).values())
        for n in (3, 4)
    )
    assert four > three
    assert arch.count_layers(config) == deep, "the configuration itself stays as it is"
