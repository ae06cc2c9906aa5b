"""Each way in which loading fails says what happened and what to do next."""

import errno
import shutil

import httpx
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from vlmdpo.errors import MemoryBudgetError, MissingDependencyError, ModelError
from vlmdpo.models import load
from vlmdpo.models.load_errors import explain_load_error, translate_load_errors


def answered(error, status):
    """An error of the Hub's client for an answer with this status."""
    request = httpx.Request("GET", "https://huggingface.co/api")
    return error(f"{status} Client Error", response=httpx.Response(status, request=request))


def wrapped(cause, message="There was a specific connection error", error=OSError):
    """How transformers passes an error on."""
    problem = error(message)
    problem.__cause__ = cause
    return problem


GATED = wrapped(answered(GatedRepoError, 403), "You are trying to access a gated repo.")
OFFLINE = wrapped(LocalEntryNotFoundError("no file"), "We couldn't connect to 'https://hf.co'")
CASES = {
    "gated": (GATED, ModelError, "is gated or private; accept its terms"),
    "no token": (wrapped(answered(HfHubHTTPError, 401)), ModelError, "run `hf auth login`"),
    "unknown": (
        wrapped(answered(RepositoryNotFoundError, 404), "not a valid model identifier"),
        ModelError,
        "cannot find 'some/model' as a folder, in the cache, or on the Hub",
    ),
    "unknown, asked without a token": (
        wrapped(answered(RepositoryNotFoundError, 401), "not a valid model identifier"),
        ModelError,
        "For a private one, run `hf auth login`",
    ),
    "no name": (wrapped(HFValidationError("Repo id must")), ModelError, "cannot find 'some/model'"),
    "revision": (
        wrapped(answered(RevisionNotFoundError, 404), "v9 is not a valid git identifier"),
        ModelError,
        "--revision: 'some/model' has no revision 'v9'",
    ),
    "the Hub is down": (
        wrapped(answered(HfHubHTTPError, 503)),
        ModelError,
        "the Hub answers 503 for 'some/model': try again later",
    ),
    "timeout": (
        httpx.ReadTimeout("The read operation timed out"),
        ModelError,
        "the connection broke while downloading 'some/model': The read operation timed out; run "
        "the command again",
    ),
    "connection": (
        wrapped(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")),
        ModelError,
        "the connection broke while downloading",
    ),
    "disk full": (
        OSError(errno.ENOSPC, "No space left on device"),
        ModelError,
        "the disk is full while downloading 'some/model' to",
    ),
    "disk full, in Rust": (
        RuntimeError("Data processing error: No space left on device (os error 28)"),
        ModelError,
        "the disk is full",
    ),
    "quota": (wrapped(OSError(errno.EDQUOT, "Disk quota exceeded")), ModelError, "set HF_HOME"),
    "no access": (
        wrapped(PermissionError(errno.EACCES, "Permission denied"), "PermissionError at /x"),
        ModelError,
        "no permission to read or write 'some/model'",
    ),
    "damaged": (
        SafetensorError("Error while deserializing header: incomplete metadata"),
        ModelError,
        "a file of 'some/model' is damaged (Error while deserializing header",
    ),
    "damaged settings": (
        OSError("It looks like the config file at 'config.json' is not a valid JSON file."),
        ModelError,
        "is damaged (It looks like the config file",
    ),
    "sizes": (
        RuntimeError("Error(s) in loading state_dict: size mismatch for lm_head.weight"),
        ModelError,
        "the weights of 'some/model' do not fit its config.json",
    ),
    "no safetensors": (
        OSError(
            "some/model does not appear to have a file named model.safetensors or no file "
            "named model.safetensors.index.json"
        ),
        ModelError,
        "holds no weights as safetensors",
    ),
    "own code": (
        ValueError("Please pass the argument `trust_remote_code=True` to allow custom code"),
        ModelError,
        "add --trust-remote-code if you trust it",
    ),
    "new architecture": (
        ValueError("model type `idefics9` but Transformers does not recognize this architecture."),
        ModelError,
        "pip install -U transformers",
    ),
    "no model": (
        ValueError("Unrecognized model in some/model. Should have a `model_type` key"),
        ModelError,
        "its config.json is missing or names no model_type",
    ),
    "package": (
        ImportError("Idefics9ImageProcessor requires the Torchvision library\nbut it was not"),
        MissingDependencyError,
        "'some/model' needs a package that is not installed: Idefics9ImageProcessor requires",
    ),
    "attention": (
        ValueError("Idefics9 does not support Flash Attention 2 yet. Please request it"),
        ModelError,
        "--attn-implementation: 'some/model' does not support it",
    ),
    "GPU memory": (
        wrapped(RuntimeError("CUDA error: out of memory\nCompile with"), "x", RuntimeError),
        MemoryBudgetError,
        "out of memory while loading 'some/model': CUDA error: out of memory; use --dtype",
    ),
    "machine's memory": (
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        MemoryBudgetError,
        "out of memory while loading 'some/model'",
    ),
    "something new": (
        ValueError("The moon is full.\nSecond line."),
        ModelError,
        "--model: 'some/model' cannot be loaded: The moon is full",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_went_wrong_is_said_in_one_line(name, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    problem, error, message = CASES[name]
    with pytest.raises(error) as shown, translate_load_errors("some/model", "v9"):
        raise problem
    assert message in str(shown.value)
    assert "\n" not in str(shown.value)
    assert shown.value.__cause__ is problem


@pytest.mark.parametrize("is_offline", [True, False])
def test_a_hub_that_cannot_be_reached(is_offline, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    known = str(explain_load_error(OFFLINE, "idefics2-8b"))
    why = "HF_HUB_OFFLINE is set" if is_offline else "the Hub cannot be reached"
    assert known.startswith(f"--model: 'HuggingFaceM4/idefics2-8b' is not in the cache, and {why};")
    assert "cannot find 'idefic2-8b'" in str(explain_load_error(OFFLINE, "idefic2-8b"))
    assert "Did you mean 'idefics2-8b'?" in str(explain_load_error(OFFLINE, "idefic2-8b"))


def test_a_bug_keeps_its_traceback():
    problem = TypeError("'NoneType' object is not callable")
    with pytest.raises(TypeError), translate_load_errors("some/model"):
        raise problem
    assert explain_load_error(RuntimeError("something else"), "some/model") is None


def test_a_local_folder_is_named_incomplete_or_damaged(tmp_path, tiny_model_parts):
    model, processor = tiny_model_parts
    processor.save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"config\.json is missing or names no model_type"):
        load.load_model(str(tmp_path / "m"), device="cpu")
    model.config.save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"is not a complete model folder|holds no weights"):
        load.load_model(str(tmp_path / "m"), device="cpu")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match=r"'model.safetensors' is damaged; get it again"):
        load.load_model(str(tmp_path / "m"), device="cpu")


def test_a_file_is_not_a_model_folder(tmp_path):
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(ModelError, match="is a file; give the folder"):
        load.load_processor(str(tmp_path / "model.json"))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    """transformers makes an empty tokenizer of it, which reads every answer as nothing."""
    shutil.copytree(load.pretrained_source("tiny"), tmp_path / "model")
    for path in (tmp_path / "model").glob("token*"):
        path.unlink()
    with pytest.raises(ModelError, match="has no tokenizer that reads text"):
        load.load_processor(str(tmp_path / "model"))


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('system first') }}", "{{ messages[0].content + 1 }}"]
)
def test_a_template_that_cannot_be_rendered_is_one_line(template, tmp_path):
    shutil.copytree(load.pretrained_source("tiny"), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match="cannot render a question about an image"):
        load.load_processor(str(tmp_path / "model"))
