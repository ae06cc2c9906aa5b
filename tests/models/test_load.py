"""Where a model is put, in which data type, and what its download shows. The GPU is pretended."""

import json
from types import SimpleNamespace

import httpx
import pytest
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError

from tests.conftest import unfolded
from vlmdpo import ui
from vlmdpo.config import TrainConfig
from vlmdpo.models import attention, download, load
from vlmdpo.training.arguments import dpo_config

GPU = torch.device("cuda")


@pytest.fixture
def asked(monkeypatch, tiny_model_parts):
    """What `from_pretrained` is asked for, on a machine with a GPU that computes in bfloat16."""
    asked = {}

    def from_pretrained(source, **options):
        asked.update(options)
        nothing = {name: set() for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        return tiny_model_parts[0], nothing

    monkeypatch.setattr(
        transformers.AutoModelForImageTextToText, "from_pretrained", from_pretrained
    )
    monkeypatch.setattr(load, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    return asked


def test_a_gpu_gets_the_weights_as_they_are_read(asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for device, number in (("cuda:1", 1), ("cuda", 3)):
        load.load_model("tiny", device=device)
        assert asked["device_map"] == {"": torch.device("cuda", number)}
    assert asked["dtype"] == torch.bfloat16


def test_a_model_asked_for_on_the_cpu_stays_there(asked):
    load.load_model("tiny", device="cpu")
    assert "device_map" not in asked
    assert asked["dtype"] == torch.float32


def test_a_device_map_leaves_no_hooks():
    """They would slow each call, and PEFT and accelerate take them for model parallelism."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        load.pretrained_source("tiny"), device_map={"": torch.device("cpu")}
    )
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())


def test_quantized_weights_go_to_the_gpu_too(asked, monkeypatch):
    monkeypatch.setattr(load, "is_bitsandbytes_available", lambda: True)
    load.load_model("tiny", device="cuda:0", quantization="nf4")
    assert asked["device_map"] == {"": torch.device("cuda:0")}
    assert asked["quantization_config"].bnb_4bit_compute_dtype == torch.bfloat16


def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(monkeypatch, capfd, tmp_path):
    """As a T4 or V100, for which PyTorch's own question is answered yes."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    load._say_no_bfloat16.cache_clear()
    assert load.pick_dtype("auto", GPU) == torch.float32
    assert load.pick_dtype("auto", GPU) == torch.float32
    err = capfd.readouterr().err
    assert err.count("--dtype auto is float32; --dtype float16 is faster") == 1
    assert load.pick_dtype("bfloat16", GPU) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = dpo_config(TrainConfig(), tmp_path, GPU)
    assert not args.bf16


def test_an_attention_of_a_models_own_code_is_its_own_business(asked, monkeypatch):
    class RemoteConfig(transformers.PreTrainedConfig):
        auto_map = {"AutoModelForImageTextToText": "x.Y"}  # noqa: RUF012

    monkeypatch.setattr(load, "check_is_vlm", lambda *a, **k: RemoteConfig())
    monkeypatch.setattr(load, "use_attention", lambda *a: pytest.fail("not a model to switch"))
    monkeypatch.setitem(attention._FLASH, "flash_attention_2", lambda: True)
    load.load_model("tiny", device="cpu", attention="flash_attention_2", trust_remote_code=True)
    assert asked["attn_implementation"] == "flash_attention_2"


FILES = {
    "model-1-of-2.safetensors": 10_000_000_000,
    "model-2-of-2.safetensors": 6_800_000_000,
    "consolidated.safetensors": 16_800_000_000,  # the same weights again
    "config.json": 500,
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with one model, and a cache with the files named in `hub.cached`."""
    hub = SimpleNamespace(cached=set(), asked=[], bars=[])
    index = tmp_path / "index.json"
    index.write_text(
        json.dumps(
            {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
        )
    )

    def try_to_load_from_cache(repo, name, revision=None):
        return str(index) if name in hub.cached else None

    def model_info(self, repo, **options):
        hub.asked.append(repo)
        files = [SimpleNamespace(rfilename=name, size=size) for name, size in FILES.items()]
        return SimpleNamespace(siblings=files)

    monkeypatch.setattr(download, "try_to_load_from_cache", try_to_load_from_cache)
    monkeypatch.setattr(download.HfApi, "model_info", model_info)
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download.constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(download, "enable_progress_bars", lambda: hub.bars.append("on"))
    monkeypatch.setattr(download, "disable_progress_bars", lambda: hub.bars.append("off"))
    yield hub
    ui.set_verbosity(quiet=False, yes=False)


def shown(capfd):
    with download.shown_download("some/model", None):
        pass
    return unfolded(capfd.readouterr().err).strip()


def test_a_download_is_announced_with_its_size(hub, capfd):
    assert shown(capfd) == "downloading some/model (16.8 GB) ..."
    assert hub.bars == []  # in a log they would be thousands of lines
    hub.cached = {"model-1-of-2.safetensors"}
    assert shown(capfd) == "downloading some/model (6.8 GB) ..."


def test_a_terminal_gets_the_hubs_progress_bars(hub, capfd, monkeypatch):
    monkeypatch.setattr(ui, "is_terminal", lambda: True)
    shown(capfd)
    assert hub.bars == ["on", "off"]
    monkeypatch.setattr(download.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    shown(capfd)
    assert hub.bars == ["on", "off"]


def test_nothing_is_asked_or_shown_where_all_is_there_or_nobody_reads(hub, capfd, monkeypatch):
    hub.cached = {"model.safetensors.index.json", *FILES}
    assert shown(capfd) == ""
    hub.cached = set()
    ui.set_verbosity(quiet=True, yes=False)
    assert shown(capfd) == ""
    ui.set_verbosity(quiet=False, yes=False)
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", True)
    assert shown(capfd) == ""
    assert hub.asked == []


def test_a_hub_that_does_not_answer_is_left_to_loading(hub, capfd, monkeypatch):
    def model_info(self, repo, **options):
        request = httpx.Request("GET", "https://huggingface.co")
        raise HfHubHTTPError("503", response=httpx.Response(503, request=request))

    monkeypatch.setattr(download.HfApi, "model_info", model_info)
    assert shown(capfd) == ""


def test_a_local_model_downloads_nothing(hub, tiny_model_parts):
    load.load_model("tiny", device="cpu")
    assert hub.asked == []
