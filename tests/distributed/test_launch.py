"""Several real processes: the same results as one in every arrangement, and no hang."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from functools import partial
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import torch
import yaml
from safetensors.torch import load_file

import vlmdpo as package
from tests.conftest import unfolded
from tests.support.images import noise
from tests.support.ranks import FSDP2, PATIENCE_S, run_groups
from vlmdpo.config import InferConfig, TrainConfig
from vlmdpo.data import store
from vlmdpo.distributed import launch
from vlmdpo.engine.content_keys import content_keys
from vlmdpo.errors import (
    ConfigError,
    MissingDependencyError,
    PeerLost,
    Preempted,
    ProcessError,
)
from vlmdpo.tiny import pairs

pytestmark = pytest.mark.slow

ROOT = Path(package.__file__).parent.parent
PAIRS = 24  # three steps of 8
_ONE_CURVE = [
    # The anchor of the embedded model's own recipe is a mean over the tokens of one process.
    "--loss-type",
    "sigmoid",
    "--logging-steps",
    "1",
    "--lora-dropout",
    "0",
    "--device",
    "cpu",
    "--save-steps",
    "100",
    "--sample-every",
    "0",
]


def spec(name, processes, batch, accumulation, *more, data="data", env=None, again=False):
    """A training run of 8 pairs per step on CPU; `again` starts from its first checkpoint."""
    arguments = [
        "train",
        "--dataset",
        data,
        "--output-dir",
        name,
        "--per-device-train-batch-size",
        str(batch),
    ]
    arguments += ["--gradient-accumulation-steps", str(accumulation), *_ONE_CURVE, *more]
    lost = ["adapter_model.safetensors", "train_report.json", "checkpoint-3"] if again else []
    return {
        "name": name,
        "processes": processes,
        "arguments": arguments,
        "env": env or {},
        "lost": [f"{name}/{x}" for x in lost],
    }


def curve(name):
    lines = [json.loads(line) for line in (Path(name) / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"], line["rewards/margins"]) for line in lines]


def report(name):
    return json.loads((Path(name) / "train_report.json").read_text())


@pytest.fixture
def data(vlmdpo, request):
    limit = str(getattr(request, "param", PAIRS))
    code, _, err = vlmdpo("prepare", "--limit", limit, "--output-dir", "data")
    assert code == 0, err


@pytest.fixture
def shared_data(vlmdpo):
    """Embedded pairs, some of which have an image in common."""
    counts = Counter(json.dumps(row["scene"]) for row in pairs.load())
    rows = sorted(pairs.load()[:400], key=lambda row: -counts[json.dumps(row["scene"])])
    lines = []
    for row in map(pairs.as_row, rows[:PAIRS]):
        name = f"{hashlib.sha256(row['image']).hexdigest()[:8]}.png"
        Path(name).write_bytes(row["image"])
        lines.append(json.dumps({**row, "image": name}))
    Path("pairs.jsonl").write_text("\n".join(lines))
    code, _, err = vlmdpo("prepare", "--dataset", "pairs.jsonl", "--output-dir", "data")
    assert code == 0, err


def test_every_arrangement_of_processes_learns_the_same(shared_data):
    shutil.copytree("data", "own")  # so that the sharded run computes its own reference log-probs
    shutil.copytree("data", "full")
    sharded = ["--save-steps", "2", "--sample-every", "2", "--resume"]
    sharded_spec = partial(spec, "sharded", 2, 4, 1, *sharded, data="own", env=FSDP2)
    checkpointed = ["--gradient-checkpointing", "--checkpointing", "2", "--sample-every", "2"]
    grouped = ["--group-by-length", "--num-train-epochs", "2"]
    run_groups(
        [
            spec("one", 1, 8, 1),
            spec("two", 2, 4, 1, *checkpointed),
            sharded_spec(),
            sharded_spec(again=True),
            spec("grouped-one", 1, 8, 1, *grouped),
            spec("grouped-four", 4, 1, 2, *grouped),
            spec("full-one", 1, 8, 1, "--no-lora"),
            spec("full-two", 2, 4, 1, "--no-lora", data="full"),
            spec("full-sharded", 2, 4, 1, "--no-lora", env=FSDP2),
        ]
    )
    for name in ("full-two", "full-sharded"):
        for here, there in zip(curve(name), curve("full-one"), strict=True):
            assert here == pytest.approx(there, rel=1e-3, abs=1e-5)
    assert len(curve("one")) == 3
    for name in ("two", "sharded"):
        for here, there in zip(curve(name), curve("one"), strict=True):
            assert here == pytest.approx(there, rel=2e-4, abs=2e-6), name
    for here, there in zip(curve("grouped-four"), curve("grouped-one"), strict=True):
        assert here == pytest.approx(there, rel=2e-3, abs=2e-5)
    assert curve("grouped-one")[:3] != curve("one")
    assert report("one")["sharing"]["is_grouped"], "by image, without being asked to"
    stock = {report(name)["tokens"]["stock"] for name in ("one", "two")}
    assert len(stock) == 1, "tokens are those of all processes"
    assert report("two")["checkpointed_layers"] == 2
    assert Path("two/samples.jsonl").read_text().count("\n") == 3 * 4, (
        "one process asks, before, between and after"
    )
    assert Path("sharded/samples.jsonl").read_text() == Path("two/samples.jsonl").read_text(), (
        "all ask, and one keeps"
    )
    assert [report(name)["strategy"] for name in ("one", "two", "sharded")] == [
        "single",
        "ddp",
        "fsdp2",
    ]
    engines = {report(name)["engine"] for name in ("one", "two", "grouped-four", "sharded")}
    assert engines == {"shared"}
    saved, whole = (load_file(f"{name}/adapter_model.safetensors") for name in ("sharded", "two"))
    assert saved.keys() == whole.keys()
    assert all(saved[name].shape == whole[name].shape for name in whole)
    for folder in ("data", "full"):
        _reference_logps(folder)


def _answers(data):
    """The keys of all answers, whichever process computed their log-probs."""
    return set(content_keys(list(store.load(Path(data))))["answer_keys"])


def _reference_logps(data):
    [path] = Path(data, "reference-logprobs").glob("*.arrow")
    table = pa.ipc.open_file(path).read_all()
    assert set(table["answer"].to_pylist()) == _answers(data)
    return torch.tensor(table["ref_logps"].to_pylist())


@pytest.mark.parametrize("data", [32], indirect=True)
def test_sharded_bf16_keeps_whole_log_probs_and_shares_a_half_filled_cache(data):
    shutil.copytree("data", "other")
    few = {"data": "other", "env": FSDP2}
    run_groups(
        [
            spec("ddp", 2, 1, 4, "--bf16"),
            spec("half", 2, 1, 4, "--bf16", "--max-steps", "2", **few),
            # In another order, so that in many batches one process finds its row and the other not.
            spec("rest", 2, 1, 4, "--bf16", "--seed", "7", **few),
        ]
    )
    whole, sharded = _reference_logps("data"), _reference_logps("other")
    assert (sharded != sharded.round()).float().mean() > 0.9
    torch.testing.assert_close(sharded, whole, rtol=0, atol=0.1)
    for here, there in zip(curve("half"), curve("ddp")[:2], strict=True):
        assert here == pytest.approx(there, rel=0.05, abs=0.01)


def test_batches_without_images_do_not_hang_the_others(vlmdpo):
    Path("mixed").mkdir()
    for i in range(4):
        Path(f"mixed/{i}.png").write_bytes(noise((64, 64), seed=i, kind="PNG"))
    rows = [
        {
            "question": f"q{i}",
            "chosen": f"A red one {i}.",
            "rejected": f"Blue {i}.",
            "images": [f"{i % 4}.png"] * (i % 3 == 0),
        }
        for i in range(8)
    ]
    Path("mixed/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert vlmdpo("prepare", "--dataset", "mixed/rows.jsonl", "--output-dir", "prepared")[0] == 0
    own = {"data": "prepared"}
    run_groups(
        [
            spec("shared-one", 1, 2, 1, **own),
            spec("shared-ddp", 2, 1, 1, **own),
            spec("shared-fsdp2", 2, 1, 1, env=FSDP2, **own),
            spec("stock-one", 1, 2, 1, "--engine", "stock", **own),
            spec("stock-ddp", 2, 1, 1, "--engine", "stock", **own),
        ]
    )
    for name in ("shared-ddp", "shared-fsdp2", "stock-ddp"):
        alone = curve(f"{name.partition('-')[0]}-one")
        for here, there in zip(curve(name), alone, strict=True):
            assert here == pytest.approx(there, rel=1e-3, abs=1e-5), name


def test_settings_that_sharding_rules_out_are_refused(data, monkeypatch, vlmdpo):
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    for arguments, says in (
        (["--auto-batch-size"], "--auto-batch-size needs the whole model"),
        (
            ["--gradient-checkpointing", "--checkpointing", "auto"],
            "--checkpointing auto measures the whole model",
        ),
        (["--loss-type", "mdpo"], "untested with sharded weights"),
    ):
        code, _, err = vlmdpo("train", "--dataset", "data", "--output-dir", "no", *arguments)
        assert code == 2
        assert says in err.splitlines()[-1]
    monkeypatch.setenv("FSDP_VERSION", "1")
    code, _, err = vlmdpo("train", "--dataset", "data", "--output-dir", "no")
    assert code == 2
    assert "fsdp_version: 2" in err
    assert not Path("no").exists()


def _launched(*arguments, **more):
    command = [sys.executable, "-m", "vlmdpo", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def test_the_first_machine_may_leave_before_the_others():
    """The store of torch's launcher leaves too. A real agent and store, in their own process."""
    program = """
        from datetime import timedelta
        from types import SimpleNamespace
        from torch.distributed import TCPStore
        from vlmdpo.distributed import launch
        launch._silence_loggers("torch.distributed", "accelerate")
        from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
        first = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
        second = TCPStore("127.0.0.1", first.port, is_master=False, timeout=timedelta(seconds=5))
        del first
        agent = SimpleNamespace(_store=second, _exit_barrier_timeout=5, _in_exit_barrier=False)
        agent._worker_group = SimpleNamespace(state="SUCCEEDED", group_world_size=2)
        SimpleElasticAgent._exit_barrier(agent)
        print("ended")
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env=env,
        timeout=PATIENCE_S,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


def test_the_launcher_on_two_machines_gives_one_report(data):
    many = [
        "--num-processes",
        2,
        "--num-machines",
        2,
        "--main-process-ip",
        "127.0.0.1",
        "--main-process-port",
    ]
    many += [
        launch._free_port(),
        "--strategy",
        "fsdp2",
        "--per-device-train-batch-size",
        4,
        "--max-steps",
        2,
    ]
    many += [
        "--gradient-accumulation-steps",
        1,
        "--dataset",
        "data",
        "--output-dir",
        "out",
        *_ONE_CURVE,
    ]
    machines = [
        _launched("train", *many, "--gradient-checkpointing", "--machine-rank", rank)
        for rank in range(2)
    ]
    said = [machine.communicate(timeout=PATIENCE_S) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "Trained tiny on data" in said[0][0]
    assert said[1][0] == ""  # the same table, said once
    made = report("out")
    assert (made["steps"], made["num_processes"], made["strategy"]) == (2, 2, "fsdp2")
    assert "Traceback" not in said[0][1] + said[1][1]
    recipe = yaml.safe_load(Path("out/recipe.yaml").read_text())
    assert recipe["strategy"] == "fsdp2"
    assert "machine_rank" not in recipe


def _training(name, process):
    """Wait until steps are logged; return the processes that train, without their parent."""
    metrics = Path(name) / "metrics.jsonl"
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= 2:
            return psutil.Process(process.pid).children()
        time.sleep(0.1)
    pytest.fail(f"no step was done: {process.communicate()}")


def test_sigterm_keeps_a_checkpoint(data):
    settings = ["--dataset", "data", "--output-dir", "out", "--num-processes", 2]
    settings += ["--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 2]
    settings += ["--num-train-epochs", 500, "--device", "cpu", "--logging-steps", 1]
    settings += ["--sample-every", 0]
    run = _launched("train", *settings)
    ranks = _training("out", run)
    assert len(ranks) == 2
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 75, err
    assert (
        "continue with: vlmdpo train --config out/recipe.yaml --resume"
        in unfolded(err).splitlines()[-1]
    )
    assert "Traceback" not in err
    assert not psutil.wait_procs(ranks, timeout=PATIENCE_S)[1]
    [saved] = Path("out").glob("checkpoint-*")
    steps = [
        json.loads(line)["step"] for line in Path("out/metrics.jsonl").read_text().splitlines()
    ]
    assert saved.name == f"checkpoint-{steps[-1]}"


def test_a_rank_whose_peer_is_killed_ends(data):
    """In the middle of training, where it waits for what the other would have sent."""
    ends = {"killed_at_step": 2, "exit_codes": [PeerLost.exit_code, -signal.SIGKILL]}
    run_groups([{**spec("out", 2, 2, 2), **ends}])
    assert len(curve("out")) == 1
    assert "another process of the run ended" in unfolded(Path("out-0.log").read_text())


def test_a_killed_process_is_the_cause_also_where_the_others_saved_their_work(tmp_path):
    """The launcher sends them SIGTERM, upon which one may end as preempted. Real processes that
    only wait, started and stopped as those of a run."""
    config = TrainConfig(num_processes=2, device="cpu")
    settings, program = tmp_path / "accelerate.yaml", tmp_path / "rank.py"
    settings.write_text(yaml.safe_dump(launch.accelerate_config(config)))
    program.write_text(_WAITING_RANK)
    with launch._worker_environment(config, tmp_path):
        exit_codes = launch._run_workers(["--config_file", str(settings), str(program)])
    assert exit_codes[1] == -signal.SIGKILL
    assert json.loads((tmp_path / "error-0.json").read_text())["kind"] == "Preempted"
    problem = launch._run_error(tmp_path, exit_codes, "go on with --resume")
    assert isinstance(problem, ProcessError)
    assert problem.exit_code == 7
    assert str(problem) == (
        "process 1 was killed (SIGKILL, probably out of memory); the others were stopped; go on "
        "with --resume"
    )
    stopped = launch._run_error(tmp_path, {0: 75}, "go on with --resume")
    assert isinstance(stopped, Preempted)


_WAITING_RANK = """
import json, os, signal, sys, time
from pathlib import Path

folder = Path(os.environ["VLMDPO_RUN_FOLDER"])

def stop(number, frame):
    error = {"kind": "Preempted", "message": "stopped at step 3", "at": 1.0}
    (folder / "error-0.json").write_text(json.dumps(error))
    sys.exit(75)

if os.environ["RANK"] == "0":
    signal.signal(signal.SIGTERM, stop)
    (folder / "waits").touch()
    time.sleep(300)
while not (folder / "waits").exists():
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_infer_writes_the_file_of_one_process():
    Path("pictures").mkdir()
    for i in range(6):
        Path(f"pictures/{i}.png").write_bytes(noise((64, 64), seed=i, kind="PNG"))
    lines = [
        {"id": i, "image": f"{i}.png", "question": f"What is in picture {i}?"} for i in range(6)
    ]
    Path("pictures/questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ask = [
        "infer",
        "--input",
        "pictures/questions.jsonl",
        "--batch-size",
        "2",
        "--max-new-tokens",
        "6",
        "--device",
        "cpu",
    ]
    Path("two.jsonl").write_text("")
    Path(".two.jsonl.part-1").write_text(
        '{"id": 4, "image": "4.png", "question": "?", "answer": "kept", '
    )  # cut by a kill
    run_groups(
        [
            {"name": "one", "processes": 1, "arguments": [*ask, "--output", "one.jsonl"]},
            {"name": "two", "processes": 2, "arguments": [*ask, "--output", "two.jsonl"]},
        ]
    )
    assert Path("one.jsonl").read_text() == Path("two.jsonl").read_text()
    assert len(Path("one.jsonl").read_text().splitlines()) == 6
    assert not list(Path(".").glob(".two*"))


def test_what_cannot_be_launched_is_an_error(monkeypatch):
    with pytest.raises(ConfigError, match="--num-machines needs --main-process-ip"):
        TrainConfig(num_processes=2, num_machines=2)
    with pytest.raises(ConfigError, match="must be a multiple of --num-machines"):
        TrainConfig(num_processes=3, num_machines=2, main_process_ip="10.0.0.1")
    with pytest.raises(ConfigError, match="add --num-processes"):
        TrainConfig(strategy="fsdp2")
    with pytest.raises(ConfigError, match="give --input and --output"):
        InferConfig(num_processes=2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install 'deepspeed>="):
        launch.run("train", TrainConfig(num_processes=2, strategy="zero3", device="cpu"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="the launcher has started 4"):
        launch.is_launcher(TrainConfig(num_processes=2))
    assert not launch.is_launcher(TrainConfig(num_processes=4))
    monkeypatch.delenv("WORLD_SIZE")
    assert launch.is_launcher(TrainConfig(num_processes=4))
    assert not launch.is_launcher(TrainConfig(num_processes=4, dry_run=True))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_the_shipped_configurations_are_what_the_launcher_makes(strategy):
    shipped = yaml.safe_load((ROOT / "examples" / "accelerate" / f"{strategy}.yaml").read_text())
    made = launch.accelerate_config(TrainConfig(num_processes=8, strategy=strategy))
    for name in ("main_process_ip", "main_process_port", "machine_rank"):
        del made[name]
    if strategy.startswith("zero"):
        assert shipped["deepspeed_config"].pop("gradient_accumulation_steps") == "auto"
        assert (
            made["deepspeed_config"].pop("gradient_accumulation_steps")
            == TrainConfig().gradient_accumulation_steps
        )
    assert shipped == made


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_deepspeed_learns_the_same(strategy, data):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    run_groups([spec("one", 1, 8, 1, "--max-steps", "3")])
    shared = spec(
        strategy, 2, 4, 1, "--max-steps", "3", "--num-processes", "2", "--strategy", strategy
    )["arguments"]
    done = subprocess.run(
        [sys.executable, "-m", "vlmdpo", *shared],
        **{"capture_output": True, "text": True, "timeout": PATIENCE_S},
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert report(strategy)["strategy"] == strategy
    for here, there in zip(curve(strategy), curve("one"), strict=True):
        assert here == pytest.approx(there, rel=2e-4, abs=2e-6)


def test_ctrl_c_ends_as_without_workers(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        launch._run_error(tmp_path, {0: 130, 1: -15}, "")
