"""Shared by all tests: offline, two threads, a new working folder, AMBER's public data."""

import gc
import os
import re
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several at work: a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as `cli.main` does

import pytest

from tests.support.plots import blank_plot

gc.set_threshold(50_000)  # as `cli.main` does, before anything imports the libraries


def unfolded(err):
    """Warnings and errors without the line breaks that keep them within 80 columns."""
    return re.sub(r"\n {7,9}(?=\S)", " ", err)


if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # started in the background of a script; commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item):
    """Freeze the libraries of training once they are loaded: each collection takes 0.5 s less."""
    if "trl.trainer.dpo_trainer" in sys.modules and not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


# One family for each way in which models differ: image tokens from a connector, tiles, M-RoPE,
# recurrent layers, sliding windows, bidirectional prefixes, processors that pack images.
_REPRESENTATIVE = {
    *("idefics2", "llava", "llava_next", "qwen2_5_vl", "qwen3_5", "gemma3", "paligemma"),
    "minicpm_v",
}
_EVERY_FAMILY = ("test_matrix.py", "test_pretended_gpu.py")  # tests that run for all of them


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "exhaustive: more instances of what another test covers; `make test` leaves them out, "
        "`make test-all` has them",
    )


def pytest_collection_modifyitems(items):
    """Of the tests that run for every family, only those of Idefics2 are quick; the whole table of
    families is exhaustive.
    """
    for item in items:
        parameters = getattr(item, "callspec", None)
        family = parameters.params.get("family") if parameters else None
        if isinstance(family, str) and family != "idefics2":
            item.add_marker(pytest.mark.slow)
        name = getattr(family, "small", family)
        if name and item.path.name in _EVERY_FAMILY and name not in _REPRESENTATIVE:
            item.add_marker(pytest.mark.exhaustive)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Commands write into the working folder and a cache; each test gets its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLMDPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _plots_are_blank(request, monkeypatch):
    """Drawing curves takes a second of every run; what they show is tested where it is `drawn`."""
    if "matplotlib.figure" in sys.modules and not request.node.get_closest_marker("drawn"):
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", blank_plot)


@pytest.fixture
def vlmdpo(capfd):
    """Run a command line in this process: (exit code, stdout, stderr), each error in one line."""
    from vlmdpo import cli

    def call(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, unfolded(err)

    return call


@pytest.fixture(scope="session")
def amber_data():
    """AMBER's public data folder, named by VLMDPO_AMBER_DATA."""
    folder = os.environ.get("VLMDPO_AMBER_DATA")
    if not folder:
        pytest.skip("VLMDPO_AMBER_DATA names no folder with AMBER's public data")
    return Path(folder)


@pytest.fixture(scope="session")
def benchmark_data():
    """POPE's and CHAIR's data with figures of their own scorers, named by VLMDPO_BENCHMARK_DATA."""
    folder = os.environ.get("VLMDPO_BENCHMARK_DATA")
    if not folder:
        pytest.skip("VLMDPO_BENCHMARK_DATA names no folder with benchmarks' public data")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_model_parts():
    """The embedded model and processor, loaded once."""
    import torch

    from vlmdpo.models.load import load_model, load_processor

    torch.set_num_threads(min(2, torch.get_num_threads()))
    return load_model("tiny", device="cpu"), load_processor("tiny")
