"""Errors that say that memory ran out, in all their forms, and what the program makes of them."""

import errno
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import unfolded
from vlmdpo import cli
from vlmdpo.errors import MemoryBudgetError, is_out_of_memory, out_of_memory_reason

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of "
    "which 10.00 MiB is free. Including non-PyTorch memory, this process has 79.00 GiB memory in "
    "use. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF."
)
OUT_OF_MEMORY = {
    "CUDA's allocator": torch.OutOfMemoryError(CUDA),
    "the driver": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "NCCL": RuntimeError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"),
    "ROCm": RuntimeError("HIP out of memory. Tried to allocate 1.00 GiB."),
    "MPS": RuntimeError("MPS backend out of memory (MPS allocated: 18.10 GiB)"),
    "PyTorch on the CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate "
        "memory: you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "Python": MemoryError(),
    "the system": OSError(errno.ENOMEM, "Cannot allocate memory"),
}
OTHERS = (
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("DataLoader worker is killed by signal: workers are out of shared memory"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("out of memory"),
)


@pytest.mark.parametrize("name", OUT_OF_MEMORY)
def test_every_form_of_it_ends_with_exit_code_5_and_what_to_try(name, vlmdpo, monkeypatch):
    problem = OUT_OF_MEMORY[name]
    assert is_out_of_memory(problem)

    def run(config):
        raise problem

    monkeypatch.setattr("vlmdpo.commands.infer.run", run)
    code, _, err = vlmdpo("infer")
    assert code == MemoryBudgetError.exit_code == 5
    assert "error: out of memory: " in err
    assert "use a smaller --batch-size" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "env"])
def test_every_command_says_what_to_try(command, vlmdpo, monkeypatch):
    def run(config):
        raise torch.OutOfMemoryError(CUDA)

    module = SimpleNamespace(run=run)
    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=lambda name: module))
    more = ["--adapter", "out", "--merge", "--model", "tiny"] if command == "export" else []
    code, _, err = vlmdpo(command, *more)
    assert code == 5
    assert f"is free; {cli.COMMANDS[command].less_memory}" in unfolded(err).replace(":\n", ":")


@pytest.mark.parametrize("problem", OTHERS, ids=str)
def test_other_errors_are_not_taken_for_it(problem):
    assert not is_out_of_memory(problem)


def test_the_reason_leaves_out_advice_on_variables():
    reason = out_of_memory_reason(torch.OutOfMemoryError(CUDA))
    assert reason.endswith("79.10 GiB of which 10.00 MiB is free")
    assert out_of_memory_reason(MemoryError()) == "the machine's memory is full"


def test_loading_a_model_that_does_not_fit_says_so(vlmdpo, monkeypatch):
    import transformers

    def from_pretrained(*args, **options):
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr(
        transformers.AutoModelForImageTextToText, "from_pretrained", from_pretrained
    )
    code, _, err = vlmdpo("infer")
    assert code == 5
    assert "out of memory while loading 'tiny': CUDA out of memory. Tried to allocate" in err
