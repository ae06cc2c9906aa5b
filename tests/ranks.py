"""Run command lines in groups of real processes, forked from one that has its libraries imported.

    python -m tests.ranks SPEC.json

The file holds a list of {"name", "processes", "arguments", "env", "lost"}. Prints, for each, the exit codes as JSON.
"""

import gc
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import matplotlib.pyplot
import torch

from vlmdpo import cli
from vlmdpo.dpo import arguments, doctor, lengths, reference, trainer
from vlmdpo.models import generate

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def _free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def start(rank, spec, port):
    """A forked process of a group. Returns its number."""
    child = os.fork()
    if child == 0:
        count = str(spec["processes"])
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        if spec["processes"] > 1:
            os.environ.update({**group, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"})
        os.environ.update(spec.get("env", {}))
        log = os.open(f"{spec['name']}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = cli.run(spec["arguments"])
        sys.stdout.flush()
        os._exit(code)
    return child


def main(path):
    assert all((matplotlib.pyplot, arguments, doctor, lengths, reference, trainer, generate))
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    gc.freeze()  # the forked ones need not look through the libraries again and again
    for spec in json.loads(Path(path).read_text()):
        for path in map(Path, spec.get("lost", [])):  # as if the run had been killed before it wrote these
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        port = _free_port()
        children = [start(rank, spec, port) for rank in range(spec["processes"])]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
