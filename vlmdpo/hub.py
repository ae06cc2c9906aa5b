"""Upload prepared data and models to the Hugging Face Hub, with cards, if the user asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.data import store
from vlmdpo.errors import DataError


def dataset(folder: Path, manifest: Mapping[str, Any], repo: str, *, private: bool) -> None:
    """Upload every split of a prepared folder as Parquet, with a card.

    Args:
        repo: "user/name".
        private: whether a new repository is private.

    Raises:
        DataError: no token, no permission to write there, or no connection.
    """
    from huggingface_hub import DatasetCard

    if not ui.confirm(
        f"Upload {ui.count(manifest['rows_out'], 'row')} to {repo} ({_visibility(private)})?",
        otherwise=True,
    ):
        ui.say("not uploaded")
        return
    with _translate_errors(repo, folder):
        for split in manifest["splits"]:
            ui.say(
                f"uploading {ui.count(manifest['splits'][split], 'row')} to {repo}, split {split}"
            )
            store.load(folder, split).push_to_hub(repo, split=split, private=private)
        dataset_card = DatasetCard.load(repo)  # has the metadata that push_to_hub wrote
        dataset_card.text = card(manifest, repo)
        dataset_card.push_to_hub(repo)
    ui.say(f"uploaded: https://huggingface.co/datasets/{repo}")


_UPLOADED = [
    *("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"),
    *("README.md", "learning_curves.png"),
]
# These name paths of this machine, or are not the model. The card has what is useful to others.
_NOT_UPLOADED = [
    *("checkpoint-*", "train_report.json", "amber.json", "evaluations.json", "lineage.json"),
]


def model(folder: Path, repo: str, *, private: bool) -> str | None:
    """Upload weights, processor, card and curves from a folder of `vlmdpo train` or `export`.

    Checkpoints, metrics and other files are not uploaded. Returns the address, or None if the user
    was asked and said no.

    Raises:
        DataError: no token, no permission to write there, or no connection.
    """
    from huggingface_hub import HfApi

    if not ui.confirm(f"Upload '{folder}' to {repo} ({_visibility(private)})?", otherwise=True):
        ui.say("not uploaded")
        return None
    with _translate_errors(repo, folder):
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        ui.say(f"uploading '{folder}' to {repo}")
        api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            allow_patterns=_UPLOADED,
            ignore_patterns=_NOT_UPLOADED,
        )
    return f"https://huggingface.co/{repo}"


def _visibility(private: bool) -> str:
    return "private if it is new" if private else "public"


@contextlib.contextmanager
def _translate_errors(repo: str, folder: Path) -> Iterator[None]:
    """Inside, errors of the Hub's libraries become one line that says where the result is."""
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
        reason = str(problem).strip().splitlines()[0]
        raise DataError(
            f"--push-to-hub {repo}: {reason}; the result is in '{folder}'. Log in with: hf auth "
            "login"
        ) from problem


def _public(dataset: str) -> str:
    """The name of a dataset without a local path."""
    path = Path(dataset)
    return path.name if path.exists() or path.is_absolute() else dataset


def card(manifest: Mapping[str, Any], repo: str) -> str:
    """The text of a dataset's card: source, checks, token counts, versions, how to load it."""
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
        f"of at most {manifest['max_image_side']} pixels per side"
        if manifest["max_image_side"]
        else "in their original size"
    )
    sources = manifest["sources"]
    origin = "`, `".join(_public(source["dataset"]) for source in sources)
    table = "".join(
        f"| {_public(source['dataset'])} | {source['rows_in']:,} | {source['usable']:,} "
        f"| {source['mix']:g} | {source['rows_out']:,} |\n"
        for source in sources
    )
    mixed = "\n## Sources\n\n| dataset | rows | usable | mix | pairs |\n|---|---:|---:|---:|---:|\n"
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return f"""
# {repo.rpartition("/")[2]}

{ui.count(manifest["rows_out"], "preference pair")} for Direct Preference Optimization (DPO) of
vision-language models, prepared by `vlmdpo prepare` from {ui.count(manifest["rows_in"], "row")} of
`{origin}` (format {manifest["schema"]}), with images {side}.

    from datasets import load_dataset
    # Columns images, prompt, chosen, rejected, as TRL's DPOTrainer takes them.
    pairs = load_dataset("{repo}", split="train")
{mixed + table if len(sources) > 1 else ""}
## Dropped rows

| reason | rows |
|---|---:|
{dropped or "| none | 0 |" + chr(10)}
## Corrected or noted rows

| what | rows |
|---|---:|
{changed or "| none | 0 |" + chr(10)}
## Tokens per row, by the processor of `{manifest["model"]}`

| | min | median | 95% | max |
|---|---:|---:|---:|---:|
{lengths}
Made with {versions}.
"""
