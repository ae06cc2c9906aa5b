"""Which GPU a process uses, and how its batches reach it. The GPUs are pretended."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from vlmdpo.config import TrainConfig
from vlmdpo.errors import ConfigError, ModelError
from vlmdpo.models.devices import pick_device
from vlmdpo.training import arguments
from vlmdpo.training.arguments import default_num_workers, dpo_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that this many GPUs are visible, none of which may be initialized."""

    def see(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("a GPU was initialized"))

    return see


@pytest.fixture
def shared_memory(monkeypatch):
    """Pretend that this many bytes of shared memory are free."""
    usage = namedtuple("usage", "total used free")

    def free(size):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(size, 0, size))

    free(1 << 34)
    return free


def test_one_process_uses_one_of_several_gpus_and_says_how_to_use_all(gpus, capfd, monkeypatch):
    gpus(4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    config = TrainConfig(per_device_train_batch_size=3, bf16=False, dataloader_num_workers=0)
    args = dpo_config(config, Path("out"), GPU)
    AcceleratorState._reset_state(reset_partial_state=True)  # the next test finds no GPU
    assert args.device == torch.device("cuda:0")
    assert args.n_gpu == 1, "TRL refuses more in one process"
    assert args.train_batch_size == 3
    said = " ".join(capfd.readouterr().err.split())
    assert "training on one of 4 GPUs, and the other 3 GPUs are idle" in said
    assert "vlmdpo train --num-processes 4 uses all of them" in said


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_each_process_picks_a_gpu_of_its_own_and_initializes_none(asked, gpus, monkeypatch):
    gpus(4)
    assert pick_device(asked) == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert pick_device(asked) == pick_device("cuda:2") == torch.device("cuda:2")
    with pytest.raises(ModelError, match="each process of this run has a GPU of its own"):
        pick_device("cuda:1")
    gpus(1)  # a launcher that shows each process one GPU
    assert pick_device(asked) == torch.device("cuda:0")
    assert pick_device("cuda:0") == torch.device("cuda:0")


def test_a_gpu_that_is_not_there_is_refused(gpus, monkeypatch):
    gpus(2)
    with pytest.raises(ModelError, match="'cuda:2' is not available here: visible GPUs are n"):
        pick_device("cuda:2")
    gpus(0)
    assert pick_device("auto") == CPU
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(ModelError, match="PyTorch was installed without CUDA"):
        pick_device("cuda")
    with pytest.raises(ModelError, match="'no-device' is not available here"):
        pick_device("no-device")


def test_workers_share_the_cores_and_none_are_started_on_a_cpu(monkeypatch, shared_memory, capfd):
    monkeypatch.setattr(arguments, "available_cores", lambda: 12)
    assert default_num_workers(CPU) == 0
    assert default_num_workers(GPU) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_num_workers(GPU) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    shared_memory(64 << 20)  # Docker's default
    assert default_num_workers(GPU) == 0
    assert "--shm-size" in capfd.readouterr().err


def test_workers_make_the_batches_of_a_whole_step_ahead(monkeypatch, shared_memory):
    monkeypatch.setattr(arguments, "available_cores", lambda: 12)

    def fields(device, **options):
        config = TrainConfig(gradient_accumulation_steps=32, **options)
        return arguments._data_loader_fields(config, device)

    on_gpu = fields(GPU)
    assert on_gpu["dataloader_num_workers"] * on_gpu["dataloader_prefetch_factor"] == 32
    assert on_gpu["dataloader_pin_memory"]
    assert on_gpu["accelerator_config"]["non_blocking"]
    assert fields(GPU, dataloader_num_workers=1)["dataloader_prefetch_factor"] == 8
    assert "dataloader_prefetch_factor" not in fields(CPU)
    set_by_user = dpo_config(
        TrainConfig(dataloader_num_workers=2, set=("dataloader_prefetch_factor=3",)),
        Path("out"),
        CPU,
    )
    assert set_by_user.dataloader_prefetch_factor == 3


def test_compiling_is_refused_for_packed_rows(monkeypatch):
    for name in ("torch_compile=true", "torch_compile_mode=default"):
        with pytest.raises(ConfigError, match="compile again for each batch"):
            dpo_config(TrainConfig(set=(name,)), Path("out"), CPU)
    dpo_config(TrainConfig(set=("torch_compile=false",)), Path("out"), CPU)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ConfigError, match="dynamo_backend in accelerate's configuration"):
        dpo_config(TrainConfig(), Path("out"), CPU)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    dpo_config(TrainConfig(), Path("out"), CPU)
