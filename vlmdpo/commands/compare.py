"""`vlmdpo compare`: a local page with base and tuned side by side; votes become data."""

from __future__ import annotations

import glob
import importlib.util
import ipaddress
import json
import shlex
import signal
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vlmdpo import ui
from vlmdpo.config import CompareConfig
from vlmdpo.errors import ConfigError, DataError, MissingDependencyError, install_command
from vlmdpo.models.configured import configured_model, configured_processor

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
    with tempfile.TemporaryDirectory(prefix="vlmdpo-compare-") as name:
        page = _page(config, Path(name))
        url = _serve(config, page)
    return {"url": url, "votes": page.votes, "file": str(config.votes)}


def _page(config: CompareConfig, folder: Path) -> Any:
    from vlmdpo.engine.side_by_side import SideBySide

    adapter = config.adapter or SHIPPED
    examples = _examples(config, adapter, folder)  # before the model: they may be unreadable
    model = configured_model(config, adapter=adapter)
    processor = configured_processor(config, adapter=adapter)
    from vlmdpo.web.app import Page

    names = (
        config.model,
        "the adapter shipped with it" if adapter == SHIPPED else str(config.adapter),
    )
    models = SideBySide(model, processor, config.beta or _beta(adapter))
    return Page(models, names, examples, config.votes, config.max_new_tokens)


def _examples(config: CompareConfig, adapter: Path, folder: Path) -> list[Any]:
    from vlmdpo.web import examples

    picked = []
    amber = config.amber or _latest_evaluation(adapter)
    if amber is not None:
        picked += examples.from_amber(amber, folder)
    elif config.model == "tiny":
        flips = json.loads((SHIPPED / FLIPS).read_text(encoding="utf-8"))
        picked += examples.from_flips(flips, folder, None, "questions about the embedded scenes")
    picked += examples.from_run(adapter, folder)
    if config.examples is not None:
        picked += examples.from_file(config.examples, config.image_root or config.examples.parent)
    return picked


def _latest_evaluation(adapter: Path) -> Path | None:
    """The latest folder that eval-amber wrote by default for this adapter; None without one."""
    found = Path("outputs", "amber").glob(f"*-{glob.escape(adapter.resolve().name)}/scores.json")
    return max(
        (path.parent for path in found), key=lambda folder: folder.stat().st_mtime, default=None
    )


def _beta(adapter: Path) -> float:
    """The beta that the adapter was trained with, or the default for one from elsewhere."""
    try:
        recipe = yaml.safe_load((adapter / "recipe.yaml").read_text(encoding="utf-8"))
        return float(recipe["beta"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return _DEFAULT_BETA


def _warn_if_reachable_by_others(host: str) -> None:
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not is_local:
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


def _serve(config: CompareConfig, page: Any) -> str:
    """Start the page, print its address, and wait until it is stopped. Returns the address."""
    from vlmdpo.web.app import CSS, THEME

    app = page.build()
    try:
        _, local, shared = app.launch(
            server_name=config.host,
            server_port=config.port,
            share=config.share,
            inbrowser=config.open,
            max_file_size=f"{config.max_upload_mb}mb",
            theme=THEME,
            css=CSS,
            quiet=True,
            footer_links=[],
            ssr_mode=False,
            prevent_thread_lock=True,
        )
    except (OSError, RuntimeError) as problem:
        raise ConfigError(
            f"cannot serve on {config.host}, port {config.port or 'any'}: "
            f"{' '.join(str(problem).split())}"
        ) from problem
    url = str(shared or local)
    # Not an Event: the signal may interrupt a line that holds its lock.
    stopped: list[int] = []
    handlers = {
        number: signal.signal(number, lambda which, _: stopped.append(which))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        (ui.say if config.json else ui.result)(f"Base and tuned side by side: {url}")
        ui.say(f"votes go to {config.votes}; stop with Ctrl-C")
        while not stopped:
            time.sleep(0.2)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        app.close(verbose=False)
    return url


def show(report: dict[str, Any]) -> None:
    """Print how many votes there were, and how to train on them."""
    if report["votes"]:
        ui.result(f"{report['votes']} votes written to {report['file']}")
        ui.result(
            f"Train on them: {shlex.join(['vlmdpo', 'prepare', '--dataset', report['file']])}"
        )
    else:
        ui.result("No votes.")
