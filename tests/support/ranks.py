"""Run command lines in groups of real processes, forked from one that has its libraries imported.

`main` takes the path of a JSON file with a list of {"name", "processes", "arguments", "env",
"lost", "full_above", "killed_at_step"}. It prints, for each, the exit codes as JSON. Where
"full_above" is given, the second process runs out of memory for more pairs at once; where
"killed_at_step" is, it kills itself as that step begins.
"""

import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import torch

from tests.support import fork_server
from vlmdpo import cli
from vlmdpo.training import run_trainer

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


PATIENCE_S = 300  # machines can be slow


def run_groups(specs):
    """Run groups of processes one after another in the current folder.

    Each must succeed, or end with its "exit_codes".
    """
    Path("specs.json").write_text(json.dumps(specs))
    out = fork_server.run("tests.support.ranks", "specs.json", timeout_s=PATIENCE_S)
    for spec, line in zip(specs, out.splitlines(), strict=True):
        logs = [Path(f"{spec['name']}-{rank}.log").read_text() for rank in range(spec["processes"])]
        wanted = spec.get("exit_codes", [0] * spec["processes"])
        assert json.loads(line) == wanted, (spec["name"], line, logs)


CUDA_IS_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.")


def full_above(limit, problem=CUDA_IS_FULL):
    """A `_compute_loss` of the trainer that runs out of memory for more pairs than fit."""
    compute = run_trainer.RunTrainer._compute_loss

    def limited(self, model, inputs, *rest):
        if len(inputs["input_ids"]) // 2 > limit:
            raise problem
        return compute(self, model, inputs, *rest)

    return limited


def killed_at(step):
    """A `training_step` of the trainer that kills its process as this step begins."""
    train = run_trainer.RunTrainer.training_step

    def killed(self, *arguments):
        if self.state.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return train(self, *arguments)

    return killed


def _free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def start(rank, spec, port):
    """Fork a process of a group; return its pid."""
    child = os.fork()
    if child == 0:
        count = str(spec["processes"])
        group = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
        }
        if spec["processes"] > 1:
            os.environ.update(
                {**group, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            )
        os.environ.update(spec.get("env", {}))
        if "full_above" in spec and rank == 1:
            run_trainer.RunTrainer._compute_loss = full_above(spec["full_above"])
        if "killed_at_step" in spec and rank == 1:
            run_trainer.RunTrainer.training_step = killed_at(spec["killed_at_step"])
        log = os.open(f"{spec['name']}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = cli.run(spec["arguments"])
        sys.stdout.flush()
        os._exit(code)
    return child


def main(path):
    for spec in json.loads(Path(path).read_text()):
        for path in map(
            Path, spec.get("lost", [])
        ):  # as if the run had been killed before it wrote these
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        port = _free_port()
        children = [start(rank, spec, port) for rank in range(spec["processes"])]
        print(
            json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]),
            flush=True,
        )
