"""Prepared data and models to the Hugging Face Hub, with cards. Nothing leaves this machine unless
asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.data import store
from vlmdpo.errors import DataError


def dataset(folder: Path, manifest: Mapping[str, Any], repo: str, *, private: bool) -> None:
    """Upload every split of a prepared folder as Parquet, and a card that says what was done.

    Args:
        repo: "user/name".
        private: whether a new repository is.

    Raises:
        DataError: no token, no right to write there, or no connection.
    """
    from huggingface_hub import DatasetCard

    if not ui.confirm(
        f"Upload {manifest['rows_out']:,} rows to {repo} ({_seen(private)})?", otherwise=True
    ):
        ui.say("not uploaded")
        return
    with _explained(repo, folder):
        for split in manifest["splits"]:
            ui.say(f"uploading {manifest['splits'][split]:,} rows to {repo}, split {split}")
            store.load(folder, split).push_to_hub(repo, split=split, private=private)
        made = DatasetCard.load(repo)  # with the features and splits that push_to_hub wrote
        made.text = card(manifest, repo)
        made.push_to_hub(repo)
    ui.say(f"uploaded: https://huggingface.co/datasets/{repo}")


# What names places on this machine, or is no model: the card tells of it what is of use to others.
_AT_HOME = ["checkpoint-*", "train_report.json", "amber.json"]


def model(folder: Path, repo: str, *, private: bool) -> str | None:
    """Upload a folder of `vlmdpo train` or `export`: weights, processor, card, curves. Returns its
    address; None where it was asked on a terminal, and the answer was no.

    Checkpoints, metrics and whatever else lies there stay at home.

    Raises:
        DataError: no token, no right to write there, or no connection.
    """
    from huggingface_hub import HfApi

    if not ui.confirm(f"Upload '{folder}' to {repo} ({_seen(private)})?", otherwise=True):
        ui.say("not uploaded")
        return None
    sent = [
        "*.safetensors",
        "*.json",
        "*.jinja",
        "*.model",
        "*.txt",
        "README.md",
        "learning_curves.png",
    ]
    with _explained(repo, folder):
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        ui.say(f"uploading '{folder}' to {repo}")
        api.upload_folder(
            repo_id=repo, folder_path=str(folder), allow_patterns=sent, ignore_patterns=_AT_HOME
        )
    return f"https://huggingface.co/{repo}"


def _seen(private: bool) -> str:
    return "private where it is new" if private else "public"


@contextlib.contextmanager
def _explained(repo: str, folder: Path) -> Iterator[None]:
    """Turns what the Hub's libraries raise into one line that says where the result stands."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        ConnectionError,
    ) as problem:
        said = str(problem).strip().splitlines()[0]
        raise DataError(
            f"--push-to-hub {repo}: {said}; the result stands in '{folder}'. Log in with: hf auth "
            "login"
        ) from problem


def card(manifest: Mapping[str, Any], repo: str) -> str:
    """The card's text: source, checks, lengths, versions, how to load it."""
    dropped = "".join(
        f"| {reason} | {count:,} |\n" for reason, count in manifest["dropped"].items()
    )
    changed = "".join(f"| {name} | {count:,} |\n" for name, count in manifest["changed"].items())
    lengths = "".join(
        f"| {name.removesuffix('_tokens')} | {one['min']} | {one['median']:g} | {one['p95']:.0f} "
        f"| {one['max']} |\n"
        for name, one in manifest["lengths"].items()
    )
    side = (
        f"at most {manifest['max_image_side']} pixels a side"
        if manifest["max_image_side"]
        else "as they came"
    )
    source = Path(manifest["dataset"])
    origin = (
        source.name if source.exists() else manifest["dataset"]
    )  # without where it lies on this machine
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return f"""
# {repo.rpartition("/")[2]}

{manifest["rows_out"]:,} preference pairs for Direct Preference Optimization of vision-language models,
prepared by `vlmdpo prepare` from {manifest["rows_in"]:,} rows of `{origin}` (format {manifest["schema"]}),
images {side}.

    from datasets import load_dataset
    pairs = load_dataset("{repo}", split="train")  # images, prompt, chosen, rejected: what TRL's DPOTrainer takes

## Rows dropped

| reason | rows |
|---|---:|
{dropped or "| none | 0 |" + chr(10)}
## Rows changed or noted

| what | rows |
|---|---:|
{changed or "| none | 0 |" + chr(10)}
## Tokens of a row, as `{manifest["model"]}` reads it

| | least | median | 95% | most |
|---|---:|---:|---:|---:|
{lengths}
Made with {versions}.
"""
