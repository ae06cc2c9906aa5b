"""Several processes: one run, one cache, one report."""

import json
import os
import subprocess
import sys

import pyarrow as pa


def test_two_processes_share_the_work_and_the_cache(tmp_path):
    from vlmdpo import prepare
    from vlmdpo.config import PrepareConfig

    data, out = tmp_path / "data", tmp_path / "out"
    prepare.run(PrepareConfig(limit=24, output_dir=data))
    settings = ["--dataset", data, "--output-dir", out, "--per-device-train-batch-size", "2", "--json", "--checkpointing", "2"]
    settings += ["--gradient-accumulation-steps", "1", "--num-train-epochs", "1", "--logging-steps", "1"]
    settings += ["--gradient-checkpointing", "--device", "cpu"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "vlmdpo"]
    done = subprocess.run(
        [sys.executable, *launch, "train", *map(str, settings)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["steps"] == 6  # 24 pairs, 2 processes, 2 pairs each
    assert report["engine"] == "shared"
    assert report["checkpointed_layers"] == 2
    [cache] = (data / "reference-logprobs").glob("*.arrow")
    assert pa.ipc.open_file(cache).read_all()["row"].to_pylist() == list(range(24))
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 6
