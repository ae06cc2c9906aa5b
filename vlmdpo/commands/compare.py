"""`vlmdpo compare`: a local page with base and tuned side by side; votes become data."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import importlib.util
import json
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vlmdpo import ui
from vlmdpo.config import CompareConfig
from vlmdpo.data.left_out import in_words
from vlmdpo.errors import ConfigError, DataError, MissingDependencyError, install_command
from vlmdpo.models.configured import configured_model, configured_processor

if TYPE_CHECKING:
    from vlmdpo.web.voting import Voting

SHIPPED = Path(str(resources.files("vlmdpo.tiny").joinpath("assets", "adapter")))
FLIPS = "flips.json"  # beside the shipped adapter: some of the answers it changed
_DEFAULT_BETA = 0.1


def run(config: CompareConfig) -> dict[str, Any]:
    """Serve until Ctrl-C or SIGTERM. Returns the address, and the number of votes.

    Raises:
        MissingDependencyError: gradio is not installed.
        ConfigError: a port in use, a relay that cannot be reached.
        DataError, ModelError: examples, adapter or model that cannot be used.
    """
    if importlib.util.find_spec("gradio") is None:
        raise MissingDependencyError(f"vlmdpo compare needs gradio: {install_command(extra='web')}")
    if config.share and not ui.confirm(
        "Make the page public: anyone with the link can ask this model?", otherwise=True
    ):
        raise ConfigError("not shared; leave out --share to serve on this machine alone")
    _warn_if_reachable_by_others(config.host)
    _check_votes(config.votes)
    _check_address(config)
    # Readable by this user alone, and gone at the end: copies of examples, and uploads.
    with tempfile.TemporaryDirectory(prefix="vlmdpo-compare-") as name, _uploads_to(name):
        voting = _voting(config, Path(name))
        url = _serve(config, voting)
    return {
        "url": url,
        "votes": voting.votes,
        "file": str(config.votes),
        "tally": dataclasses.asdict(voting.file.tally()),
        "train": _second_round(config),
    }


@contextlib.contextmanager
def _uploads_to(folder: str) -> Iterator[None]:
    """Inside, gradio keeps uploads and copies in `folder`, not where every user finds them."""
    name = "GRADIO_TEMP_DIR"
    before = os.environ.get(name)
    os.environ[name] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _voting(config: CompareConfig, folder: Path) -> Voting:
    from vlmdpo.engine.side_by_side import SideBySide
    from vlmdpo.web.votes import VoteFile
    from vlmdpo.web.voting import Voting

    adapter = config.adapter or SHIPPED
    ui.step("look for examples")
    examples = _examples(config, adapter, folder)  # before the model: they may be unreadable
    ui.say(ui.count(len(examples), "example"))
    ui.step(f"load {config.model} and its adapter")
    model = configured_model(config, adapter=adapter)
    processor = configured_processor(config, adapter=adapter)
    names = (
        config.model,
        "the adapter shipped with it" if adapter == SHIPPED else str(config.adapter),
    )
    models = SideBySide(model, processor, config.beta or _beta(adapter))
    file = VoteFile(config.votes, names)
    return Voting(models, names, examples, file, config.max_new_tokens, config.blind)


def _examples(config: CompareConfig, adapter: Path, folder: Path) -> list[Any]:
    from vlmdpo.benchmarks.image_folder import DrawnImages
    from vlmdpo.tiny import evaluation
    from vlmdpo.web import examples, flips

    picked = _changed(config, adapter, folder)
    if not picked and config.model == "tiny":
        shipped = json.loads((SHIPPED / FLIPS).read_text(encoding="utf-8"))
        drawn = DrawnImages(evaluation.draw_image)
        picked = flips.from_flips(shipped, folder, drawn, "questions about the embedded scenes")
    picked += examples.from_run(adapter, folder)
    if config.examples is not None:
        root = config.image_root or config.examples.parent
        own, left_out = examples.from_file(config.examples, root)
        picked += own
        if left_out:
            reasons = in_words(left_out.report())
            ui.warn(f"left out {ui.count(len(left_out), 'line')} of '{config.examples}': {reasons}")
    return picked


def _changed(config: CompareConfig, adapter: Path, folder: Path) -> list[Any]:
    """Questions whose answers changed, of the evaluations that are named, else of the latest."""
    from vlmdpo.web import flips

    named = [
        (flag, evaluated)
        for flag, evaluated in (("--eval", config.eval), ("--amber", config.amber))
        if evaluated is not None
    ]
    if named:
        found = [flips.from_evaluation(path, adapter, folder, flag) for flag, path in named]
        return [example for some in found for example in some]
    for folder_of_eval in _evaluations(adapter):
        try:
            return flips.from_evaluation(folder_of_eval, adapter, folder, "--eval")
        except DataError as problem:  # nobody asked for this one
            ui.say(f"no examples of an evaluation: {problem}")
    return []


def _evaluations(adapter: Path) -> list[Path]:
    """The folders that eval and eval-amber wrote by default for this adapter, latest first."""
    name = glob.escape(adapter.resolve().name)
    found = [
        *Path("outputs", "amber").glob(f"*-{name}/scores.json"),
        *Path("outputs", "eval").glob(f"{name}/*/scores.json"),
    ]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent for path in found]


def _beta(adapter: Path) -> float:
    """The beta that the adapter was trained with, or the default for one from elsewhere."""
    try:
        recipe = yaml.safe_load((adapter / "recipe.yaml").read_text(encoding="utf-8"))
        return float(recipe["beta"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return _DEFAULT_BETA


def _second_round(config: CompareConfig) -> str:
    """The command that trains on the votes, with the settings of the adapter's run."""
    command = ["vlmdpo", "train", "--dataset", str(config.votes)]
    if config.adapter is not None and (config.adapter / "recipe.yaml").is_file():
        again = config.adapter.resolve().name + "-votes"
        command += ["--config", str(config.adapter / "recipe.yaml")]
        command += ["--output-dir", str(config.adapter.parent / again)]
    elif config.model != "tiny":
        command += ["--model", config.model]
    return shlex.join(command)


def _warn_if_reachable_by_others(host: str) -> None:
    from vlmdpo.web.guard import is_local

    if not is_local(host):
        ui.warn(
            f"--host {host}: everyone who can reach this machine can use the page; 127.0.0.1 keeps "
            "it private"
        )


def _check_votes(file: Path) -> None:
    """Raise DataError if votes could not be written, before anyone votes."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as problem:
        raise DataError(f"--votes: cannot write '{file}': {problem.strerror}") from problem
    if file.is_dir():
        raise DataError(f"--votes: '{file}' is a folder; name a file")


def _serve(config: CompareConfig, voting: Voting) -> str:
    """Start the page, print its address, and wait until it is stopped. Returns the address."""
    ui.step("start the page")
    # stdout is for results; gradio prints there.
    with contextlib.redirect_stdout(sys.stderr):
        app, url = _launch(config, voting)
    # Not an Event: the signal may interrupt a line that holds its lock.
    stopped: list[int] = []
    handlers = {
        number: signal.signal(number, lambda which, _: stopped.append(which))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        (ui.say if config.json else ui.result)(f"Base and tuned side by side: {url}")
        ui.say(f"votes go to {config.votes}; stop with Ctrl-C")
        with contextlib.redirect_stdout(sys.stderr):
            while not stopped:
                time.sleep(0.2)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        app.close(verbose=False)
        voting.models.close()
    return url


def _launch(config: CompareConfig, voting: Voting) -> tuple[Any, str]:
    """The running app and its address. Raises ConfigError."""
    from starlette.middleware import Middleware

    from vlmdpo.web.app import CSS, HEAD, THEME, Page
    from vlmdpo.web.guard import Hosts, OnlyThisPage

    hosts = Hosts(config.host, config.allow_host)
    app = Page(voting).build()
    try:
        _, local, shared = app.launch(
            server_name=config.host,
            server_port=config.port,
            share=config.share,
            inbrowser=config.open,
            max_file_size=f"{config.max_upload_mb}mb",
            theme=THEME,
            css=CSS,
            head=HEAD,
            quiet=True,
            footer_links=[],
            ssr_mode=False,
            prevent_thread_lock=True,
            allowed_paths=[str(example.image) for example in voting.examples],
            app_kwargs={"middleware": [Middleware(OnlyThisPage, hosts=hosts)]},
        )
    except (OSError, RuntimeError, ValueError) as problem:
        raise _cannot_serve(config, problem) from problem
    if shared:  # the local address is ours already, and with its port: other pages may share it
        hosts.add(str(shared))
    return app, str(shared or local)


def _check_address(config: CompareConfig) -> None:
    """Raise ConfigError for an address that cannot be served on: gradio would wait for it."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            config.host, config.port or 0, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as problem:
        raise _cannot_serve(config, problem) from problem


def _cannot_serve(config: CompareConfig, problem: Exception) -> ConfigError:
    return ConfigError(
        f"cannot serve on {config.host}, port {config.port or 'any'}: "
        f"{' '.join(str(problem).split())}"
    )


def show(report: dict[str, Any]) -> None:
    """Print how many votes there were, what they say, and how to train on them."""
    from vlmdpo.web.panes import tally_sentence
    from vlmdpo.web.votes import Tally

    if report["votes"]:
        ui.result(f"{report['votes']} preferences written to {report['file']}")
        ui.result(tally_sentence(Tally(**report["tally"])))
        ui.result(f"A second round: {report['train']}")
    else:
        ui.result("No votes.")
