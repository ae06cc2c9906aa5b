"""Every family and engine on a pretended GPU: no devices mixed, CUDA's autocast, few waits."""

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from torch.utils.data._utils.pin_memory import pin_memory

from tests.support.engines import pairs, trainer
from tests.support.pretended_gpu import (
    CUDA,
    GpuTensor,
    MixedDevices,
    PretendedGpu,
    load_device_guard,
    why_not,
)
from vlmdpo.engine.devices import to_device
from vlmdpo.engine.reference_cache import ReferenceCache
from vlmdpo.engine.tree_layout import TreeLayout
from vlmdpo.models.families import fallback_chat_template
from vlmdpo.tiny.random_models import RECURRENT
from vlmdpo.training.auto_batch import PARTS, Parts
from vlmdpo.training.engine_checks import check_images_once, check_shared_forward

# How often the host waits for the device in one batch of two pairs, policy and reference, with the
# shared engine: for us see below, 17 times for TRL's metrics, else in transformers' models.
WAITS = {
    **{"idefics2": 30, "idefics3": 28, "smolvlm": 28, "llava": 20, "llava_next": 34},
    **{"paligemma": 20, "paligemma2": 20, "gemma3": 20, "internvl": 20},
    **{"qwen2_vl": 45, "qwen2_5_vl": 59, "qwen3_vl": 61, "qwen3_5": 59},
}
IS_FINITE = "training/finite_check.py first_non_finite: copy to the host"  # once an optimizer step
# Qwen's positions are computed on the host, from token types and image grids.
POSITIONS = [
    "models/families.py stock_position_ids: copy to the device",
    "models/families.py stock_position_ids: copy to the host",
    "models/families.py stock_position_ids: copy to the host",
]


@pytest.fixture(scope="session")
def device_guard(pytestconfig):
    if reason := why_not():
        pytest.skip(reason)
    load_device_guard(pytestconfig.cache.mkdir("pretended_gpu"))


@pytest.fixture
def gpu(device_guard):
    with PretendedGpu() as pretended:
        yield pretended
    AcceleratorState._reset_state(reset_partial_state=True)  # the next test finds no GPU


def on_gpu(gpu, family, folder, **settings):
    """A trainer as accelerate prepares it: bf16 base weights, float32 adapter, autocast."""
    made = trainer(family, "shared", pairs(2), folder, bf16=True, gpu=gpu, **settings)
    assert made.args.device == CUDA
    made.accelerator.prepare_model(made.model, device_placement=False)
    return made


def loss_of(made):
    """The loss of one batch. What the host waited for before it is forgotten."""
    batch = made._prepare_inputs(made.data_collator([dict(row) for row in made.train_dataset]))
    made.model.train()
    torch.utils._python_dispatch._get_current_dispatch_mode().waits.clear()
    loss = made.compute_loss(made.model, batch)
    assert isinstance(loss, GpuTensor)
    return loss.inner.item()


def ours(gpu):
    """The places in vlmdpo where the host waited, without line numbers."""
    return sorted(
        f"{wait.line.partition(':')[0]} {wait.line.split()[-1]}: {wait.reason}"
        for wait in gpu.waits.elements()
        if wait.is_ours
    )


def expected_waits(family, engine="shared"):
    """The places in vlmdpo where the host may wait."""
    return [*(POSITIONS if "qwen" in family and engine != "stock" else []), IS_FINITE]


def engines_of(family, made):
    """Recurrent models cannot share, and TRL's collator cannot make PaliGemma's rows."""
    has_stock = fallback_chat_template(made.processing_class) is None
    shared = [] if family in RECURRENT else ["shared"]
    return [*shared, "rows", *(["stock"] if has_stock else [])]


@pytest.mark.parametrize("family", WAITS)
def test_every_engine_gives_the_same_loss_and_waits_little(family, gpu, tmp_path):
    made = on_gpu(gpu, family, tmp_path)
    examples = list(made.train_dataset)
    best, *others = engines_of(family, made)
    check = {"shared": check_shared_forward, "rows": check_images_once}[best]
    found = check(made, examples)
    assert found.passed, found
    made.use_engine(best)
    expected = loss_of(made)
    assert ours(gpu) == expected_waits(family)
    assert sum(gpu.waits.values()) == WAITS[family], sorted(gpu.waits.items())
    for engine in others:
        made.use_engine(engine)
        assert loss_of(made) == pytest.approx(expected, rel=2e-3), engine
        assert ours(gpu) == expected_waits(family, engine)


def test_flash_attention_runs_trees_where_the_mask_is_causal(gpu, tmp_path, monkeypatch):
    made = on_gpu(gpu, "llava", tmp_path)
    expected, calls = loss_of(made), []

    def flash_attention(query, key, value, dropout_p, *, is_causal, return_debug_mask, scale):
        """What the kernel computes: causal, its last query at the last key."""
        queries, keys = query.shape[2], key.shape[2]
        calls.append((queries, keys, is_causal))
        hidden = torch.ones(queries, keys, device=CUDA).triu(keys - queries + 1).bool()
        scores = (query @ key.transpose(-1, -2) * scale).masked_fill(hidden, float("-inf"))
        return (scores.float().softmax(-1).to(query.dtype) @ value,)

    # PyTorch built for CPUs has no such kernel, and says that it cannot be used.
    monkeypatch.setattr(torch.nn.attention.bias, "can_use_flash_attention", lambda *_: True)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", flash_attention)
    assert loss_of(made) == pytest.approx(expected, rel=2e-3)
    forest = made.data_collator(list(made.train_dataset))["forest"]
    # The first run of nodes of each tree is a plain square; the second answers are these.
    asked = {(forest.lengths[node], forest.tokens(node), True) for node in (2, 5)}
    assert set(calls) == asked
    layers = made.model.get_base_model().config.get_text_config().num_hidden_layers
    assert len(calls) == 2 * 2 * layers, "two trees, policy and reference"


def test_cached_reference_log_probs_cost_no_wait(gpu, tmp_path):
    made = on_gpu(gpu, "idefics2", tmp_path)
    expected = loss_of(made)
    made.reference_cache = ReferenceCache(tmp_path, "k")
    for known in (0, 4):
        assert made.reference_cache.num_known == known
        assert loss_of(made) == pytest.approx(expected, rel=1e-5)
        assert ours(gpu) == [IS_FINITE]


@pytest.mark.parametrize("family", ["idefics2", "paligemma2", "qwen3_vl"])
def test_without_autocast_the_loss_is_the_cpus(family, device_guard, tmp_path):
    on_cpu = trainer(family, "shared", pairs(2), tmp_path)
    batch = on_cpu.data_collator([dict(row) for row in on_cpu.train_dataset])
    expected = on_cpu.compute_loss(on_cpu.model, batch).item()
    with PretendedGpu() as gpu:
        made = trainer(family, "shared", pairs(2), tmp_path, gpu=gpu)
        assert loss_of(made) == pytest.approx(expected, rel=1e-4)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("family", ["idefics2", "gemma3"])
def test_mdpo(family, gpu, tmp_path):
    cache = ReferenceCache(tmp_path, "k")
    made = on_gpu(gpu, family, tmp_path, mdpo=True, reference_cache=cache)
    expected = loss_of(made)
    mdpos_metrics = "training/run_trainer.py _log_mdpo_metrics: copy to the host"
    assert ours(gpu) == [*expected_waits(family), mdpos_metrics]
    assert loss_of(made) == pytest.approx(expected, rel=1e-5)


def test_parts_of_a_batch_are_pinned_and_stay_on_the_host(gpu):
    part = {"input_ids": torch.arange(3), "order": [2, 1, 1]}
    pinned = pin_memory({PARTS: Parts([5], [part])})
    (moved,) = send_to_device(pinned, CUDA)[PARTS].batches
    assert moved["input_ids"].is_pretended_pinned
    assert not isinstance(moved["input_ids"], GpuTensor), "all parts may be what does not fit"
    assert moved["order"] == [2, 1, 1]


# Tests of the pretended device itself.


def test_operations_that_mix_devices_are_found_in_our_code(gpu, tmp_path, monkeypatch):
    on_device = torch.ones(3, device="cuda")
    assert (on_device + torch.tensor(1.0)).tolist() == [2, 2, 2], "numbers may be anywhere"
    with pytest.raises(MixedDevices, match=r"aten\.add.*CPU tensors \[\(3,\)\]"):
        on_device + torch.ones(3)
    with pytest.raises(MixedDevices, match="indexed by CUDA tensor"):
        torch.ones(3)[on_device.long()]
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        on_device.numpy()
    gather = TreeLayout.rows_to_slots
    monkeypatch.setattr(TreeLayout, "rows_to_slots", lambda *a: gather(*a).cpu())
    with pytest.raises(MixedDevices, match="CPU tensors"):
        loss_of(on_gpu(gpu, "idefics2", tmp_path))


def test_a_planted_wait_is_counted_at_our_line(gpu, tmp_path, monkeypatch):
    gather = TreeLayout.rows_to_slots

    def looked_at(self, rows):
        found = gather(self, rows)
        assert found.any().item()
        return found

    monkeypatch.setattr(TreeLayout, "rows_to_slots", looked_at)
    loss_of(on_gpu(gpu, "idefics2", tmp_path))
    (planted,) = (wait for wait in gpu.waits if wait.line.endswith(" looked_at"))
    assert planted.caller.startswith("engine/forward.py:")
    assert planted.reason == "a number is read"
    assert gpu.waits[planted] == 1, "positions are made once for policy and reference"


@pytest.mark.parametrize(
    ("wait", "reason"),
    [
        (lambda x: x.cpu(), "copy to the host"),
        (lambda x: torch.zeros(3).copy_(x), "copy to the host"),
        (lambda x: x.tolist(), "copy to the host"),
        (lambda x: bool(x.any()), "a number is read"),
        (lambda x: x[torch.tensor(1, device=CUDA)], "a number is read"),
        (lambda x: x[x > 0], "a size is read"),
        (lambda x: x.nonzero(), "a size is read"),
        (lambda x: x.unique(), "a size is read"),
        (lambda x: x.repeat_interleave(x.long()), "a size is read"),
        (lambda x: x[torch.tensor([0, 1])], "copy to the device"),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=CUDA), "copy to the device"),
        (lambda x: torch.zeros(3).to(CUDA, non_blocking=True), "copy to the device"),
    ],
)
def test_what_the_host_waits_for(wait, reason, gpu):
    values = torch.arange(3.0, device="cuda")
    wait(values)
    assert reason in {found.reason for found in gpu.waits}


def test_what_the_host_does_not_wait_for(gpu):
    values = torch.arange(3.0, device="cuda")
    moved = to_device(torch.tensor([2, 0]), CUDA)
    result = torch.where(values[moved] > 0, torch.zeros((), device=CUDA), values.sum())
    assert not gpu.waits
    assert result.tolist() == [0, 3]


def test_autocast_is_cudas(gpu):
    values = torch.randn(4, 8, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(8, 8, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.nn.functional.layer_norm(values, (8,)).dtype == torch.float32
        assert torch.nn.functional.linear(values, weight).dtype == torch.bfloat16
        assert values.softmax(-1).dtype == torch.float32
