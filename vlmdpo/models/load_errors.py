"""Why a model, processor or adapter could not be loaded, in one line that names the next step.

transformers reports nearly everything as an OSError or ValueError whose cause is the real error, of
huggingface_hub, safetensors, the network or the disk. So the whole chain of causes is looked at.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError

from vlmdpo.errors import (
    MemoryBudgetError,
    MissingDependencyError,
    ModelError,
    VlmDpoError,
    install_command,
    is_out_of_memory,
    nearest,
    out_of_memory_reason,
)
from vlmdpo.models import registry
from vlmdpo.models.weight_files import damaged_file, local_folder

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
# How transformers says that a class of its own, or an image processor's, needs a package.
_MISSING_PACKAGE = re.compile(
    r"[Mm]issing optional dependencies: (?P<listed>[\w\-, ]+)"
    r"|requires the (?P<library>[\w\-. ]+?) library but"
    r"|[Pp]ackage [`'](?P<package>[\w\-]+)[`'] is required"
    r"|pip install [`']?(?P<named>[\w\-]+)"
)
_VISION_EXTRA = {"torchvision", "timm", "num2words"}


@contextlib.contextmanager
def translate_load_errors(model: str, revision: str | None = None) -> Iterator[None]:
    """Inside, errors of loading become errors that say what happened and what to do next.

    Args:
        model: as `--model` names it.
        revision: of `--revision`.
    """
    try:
        yield
    except VlmDpoError:
        raise
    except Exception as problem:
        translated = explain_load_error(problem, model, revision)
        if translated is None:
            raise
        raise translated from problem


def explain_load_error(
    problem: BaseException, model: str, revision: str | None = None
) -> VlmDpoError | None:
    """The error to show for what loading a model raised; None if the input is not at fault."""
    chain = list(_chain(problem))
    if any(map(is_out_of_memory, chain)):
        reason = next(out_of_memory_reason(link) for link in chain if is_out_of_memory(link))
        return MemoryBudgetError(
            f"out of memory while loading '{model}': {reason}; use --dtype bfloat16, train with "
            "--quantization nf4, or close what else uses the memory"
        )
    for explain in (_of_disk, _of_packages, _of_hub, _of_files, _of_code):
        translated = explain(chain, model, revision)
        if translated is not None:
            return translated
    if not isinstance(problem, (OSError, ValueError)):
        return None
    return ModelError(f"--model: '{model}' cannot be loaded: {_line(problem)}")


def _chain(problem: BaseException) -> Iterator[BaseException]:
    """An error, its cause, the cause of that, and so on."""
    link: BaseException | None = problem
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _line(problem: BaseException) -> str:
    """The first line of what an error says, or its class's name."""
    lines = str(problem).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(problem).__name__


def _is_broken_connection(problem: BaseException) -> bool:
    """Whether an error is the network's: Python's own, or that of httpx, or of its successor."""
    if isinstance(problem, (TimeoutError, ConnectionError)):
        return True
    return any(
        base.__name__ == "TransportError" and base.__module__.startswith("httpx")
        for base in type(problem).__mro__
    )


def _has(chain: list[BaseException], *classes: type[BaseException]) -> bool:
    return any(isinstance(link, classes) for link in chain)


def _of_disk(chain: list[BaseException], model: str, _: str | None) -> ModelError | None:
    """A full disk, or a cache that may not be written."""
    folder = constants.HF_HUB_CACHE
    text = " ".join(map(str, chain)).lower()
    codes = {link.errno for link in chain if isinstance(link, OSError)}
    if codes & set(_DISK_FULL) or "no space left" in text or "disk quota exceeded" in text:
        return ModelError(
            f"--model: the disk is full while downloading '{model}' to '{folder}'; free some space "
            "or set HF_HOME to a folder on another disk"
        )
    if codes & set(_NO_ACCESS) or "permissionerror at" in text:
        return ModelError(
            f"--model: no permission to read or write '{model}' in '{folder}'; see its owner, or "
            "set HF_HOME to a folder of yours"
        )
    return None


def _of_packages(
    chain: list[BaseException], model: str, _: str | None
) -> MissingDependencyError | None:
    """A package that the model's processor or code needs.

    transformers says it as an OSError or ValueError too.
    """
    found = [match for link in chain for match in _MISSING_PACKAGE.finditer(str(link))]
    names: list[str] = []
    for match in found:
        listed = next(text for text in match.groups() if text)
        names += [name.strip().lower() for name in listed.split(",") if name.strip()]
    names = list(dict.fromkeys(names))
    if not names:
        return None
    of_extra = [name for name in names if name in _VISION_EXTRA]
    others = [name for name in names if name not in _VISION_EXTRA]
    how = install_command(*others, extra="vision" if of_extra else "")
    return MissingDependencyError(f"'{model}' needs {' and '.join(names)}, not installed: {how}")


def _of_hub(chain: list[BaseException], model: str, revision: str | None) -> ModelError | None:
    """What the Hub refuses or lacks, and a Hub that cannot be reached."""
    if Path(model).exists() or model == "tiny":
        return None
    statuses = {
        link.response.status_code
        for link in chain
        if isinstance(link, HfHubHTTPError) and link.response is not None
    }
    text = " ".join(map(str, chain))
    is_unknown = _has(chain, RepositoryNotFoundError) and not _has(chain, GatedRepoError)
    if (statuses & {401, 403} and not is_unknown) or "gated repo" in text:
        return ModelError(
            f"--model: '{model}' is gated or private; accept its terms on the Hub and run `hf "
            "auth login`"
        )
    if _has(chain, RevisionNotFoundError) or "is not a valid git identifier" in text:
        return ModelError(
            f"--revision: '{model}' has no revision '{revision}'; see its page on the Hub"
        )
    if is_unknown or _has(chain, HFValidationError):
        return _not_found(model, ", in the cache, or on the Hub")
    if _has(chain, LocalEntryNotFoundError, OfflineModeIsEnabled) or "couldn't connect" in text:
        return _not_reached(model)
    broken = [link for link in chain if _is_broken_connection(link)]
    if broken:
        why = _line(broken[-1])
        return ModelError(
            f"--model: the connection broke while downloading '{model}': {why}; run the command "
            "again, which continues the download"
        )
    if statuses:
        return ModelError(
            f"--model: the Hub answers {min(statuses)} for '{model}': try again later, or give a "
            "local folder"
        )
    return None


def _not_found(model: str, where: str, more: str = "") -> ModelError:
    return ModelError(
        f"--model: cannot find '{model}' as a folder{where}{more}."
        f"{nearest(model, registry.ENTRIES)} Aliases: {', '.join(list(registry.ENTRIES)[:4])} ... "
        "For a private one, run `hf auth login`"
    )


def _not_reached(model: str) -> ModelError:
    if registry.find(model) is None:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "it cannot be reached"
        return _not_found(model, " or in the cache", f", and the Hub was not asked: {why}")
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
    return ModelError(
        f"--model: '{registry.hub_id(model)}' is not in the cache, and {why}; go online, or give a "
        "local folder"
    )


def _of_files(chain: list[BaseException], model: str, revision: str | None) -> ModelError | None:
    """Files that are damaged, missing, or of another model."""
    folder = local_folder(model, revision)
    reason = damaged_file(folder) if folder is not None else None
    if reason is not None:
        return ModelError(f"--model: of '{model}', {reason}")
    text = " ".join(map(str, chain))
    if (
        _has(chain, SafetensorError)
        or "not a valid JSON" in text
        or "Unable to load weights" in text
    ):
        why = next((_line(x) for x in chain if isinstance(x, SafetensorError)), _line(chain[0]))
        where = f"'{model}'" if Path(model).exists() else f"'{constants.HF_HUB_CACHE}'"
        return ModelError(
            f"--model: a file of '{model}' is damaged ({why}); delete it from {where} and get it "
            "again"
        )
    if _has(chain, StrictDataclassError):
        why = " ".join(str(chain[0]).split())[:200]
        return ModelError(f"--model: the config.json of '{model}' is not valid: {why}")
    if "size mismatch" in text:
        return ModelError(
            f"--model: the weights of '{model}' do not fit its config.json: {_line(chain[0])}"
        )
    if "no file named" in text and "safetensors" in text:
        return ModelError(
            f"--model: '{model}' holds no weights as safetensors, the only format that is read; "
            "use a revision that has them"
        )
    if Path(model).is_file():
        return ModelError(f"--model: '{model}' is a file; give the folder that holds config.json")
    if Path(model).exists() and _has(chain, OSError):
        return ModelError(f"--model: '{model}' is not a complete model folder: {_line(chain[0])}")
    return None


def _of_code(chain: list[BaseException], model: str, _: str | None) -> VlmDpoError | None:
    """A model that needs its own code, a newer transformers, or a package that is not installed."""
    text = " ".join(map(str, chain))
    if "trust_remote_code" in text:
        return ModelError(
            f"--model: '{model}' runs code of its own; add --trust-remote-code if you trust it"
        )
    if _has(chain, ImportError):
        why = next(" ".join(str(link).split()) for link in chain if isinstance(link, ImportError))
        return MissingDependencyError(f"'{model}' needs a package that is not installed: {why}")
    if "Unrecognized model" in text:
        return ModelError(
            f"--model: '{model}' is not a model: its config.json is missing or names no model_type"
        )
    if "does not recognize this architecture" in text:
        return ModelError(
            f"--model: the installed transformers does not know the architecture of '{model}'; "
            "upgrade it: pip install -U transformers"
        )
    if "does not support" in text and ("ttention" in text or "attn_implementation" in text):
        return ModelError(
            f"--attn-implementation: '{model}' does not support it: {_line(chain[0])}; use auto"
        )
    return None
