"""`--set`, `--optim` and schedules that TRL refuses, or that conflict with what is done here."""

import dataclasses

import pytest
import torch
from trl import DPOConfig

from vlmdpo.config import TrainConfig
from vlmdpo.errors import ConfigError, MissingDependencyError
from vlmdpo.training import set_fields
from vlmdpo.training.arguments import dpo_config
from vlmdpo.training.trial import try_if_unusual, try_settings

CPU = torch.device("cpu")


def _refused(*settings, error=ConfigError, **options):
    """The message for what is refused before anything is loaded."""
    with pytest.raises(error) as caught:
        try_settings(TrainConfig(set=settings, **options), CPU)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("precompute_ref_log_probs=true", "kept by --reference-cache"),
        ("eval_strategy=steps", "use --eval-steps"),
        ("use_liger_kernel=true", "here a row holds both"),
        ("padding_free=true", "have no padding"),
        ("load_best_model_at_end=true", "use --keep-best"),
        ("save_strategy=no", "use --save-steps"),
        ("logging_strategy=no", "use --logging-steps"),
        ("auto_find_batch_size=true", "use --auto-batch-size"),
        ("deepspeed=ds.json", "use --strategy"),
        ("truncation_mode=keep_end", "use --over-length"),
        ("max_grad_norm=inf", "takes a number, not 'inf'"),
        ("max_grad_norm=1e999", "takes a number, not '1e999'"),
        ("max_grad_norm=true", "takes a number, not 'true'"),
        ("max_grad_norm=-1", "max_grad_norm=-1 is out of range; give 0 or more"),
        ("weight-decay=-0.1", "give 0 or more"),
        ("adam_beta1=1", "give 0 up to, but not, 1"),
        ("ld_alpha=2", "give 0 to 1"),
        # TRL's own words:
        ("sync_ref_model=true", "if you need a synced reference model"),
        ("accelerator_config=absent.json", "No such file or directory: 'absent.json'"),
        ("optim_args=foo", "not enough values to unpack"),
        ("f_divergence_type=foo", "Unknown f_divergence_type: foo"),
        ("lr_scheduler_kwargs={foo: 1}", "unexpected keyword argument 'foo'"),
    ],
)
def test_a_field_that_is_not_to_be_set_says_what_is(setting, says):
    assert says in _refused(setting)


@pytest.mark.parametrize(
    "setting",
    ["eval_strategy=no", "max_grad_norm=0.5", "f_divergence_type=js_divergence", "ld_alpha=0.5"],
)
def test_other_fields_are_taken(setting):
    try_settings(TrainConfig(set=(setting,)), CPU)


def test_what_depends_on_model_or_device_is_not_tried_on_the_embedded_one():
    of_experts = TrainConfig(set=("router_aux_loss_coef=0.1", "activation_offloading=true"))
    try_settings(of_experts, CPU)
    with pytest.raises(ConfigError, match="activation_offloading: offloads to the CPU"):
        try_if_unusual(of_experts, CPU)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("fp16=true", "--set fp16: has no effect on a CPU"),
        ("tf32=true", "--set tf32: has no effect on a CPU"),
        ("activation-offloading=true", "--set activation_offloading: offloads to the CPU"),
    ],
)
def test_what_a_cpu_would_ignore_is_refused(setting, says):
    with pytest.raises(ConfigError, match=says):
        try_if_unusual(TrainConfig(set=(setting,)), CPU)


def test_every_field_named_exists_but_those_of_other_versions():
    fields = {field.name for field in dataclasses.fields(DPOConfig)}
    named = set(set_fields.NOT_TO_SET) | set(set_fields._NOT_WITH_PAIRS)
    assert len(named - fields) <= 5, named - fields


def test_an_absent_package_is_named_with_its_command(monkeypatch):
    def absent(*_):
        raise ImportError("You need to install `some_optim`: `pip install some-optim`")

    monkeypatch.setattr("vlmdpo.training.arguments._check_optimizer", absent)
    message = _refused(error=MissingDependencyError, optim="lomo")
    assert message.startswith("--optim lomo: a package is missing: You need to install `some_opti")


def test_a_plan_for_another_machine_only_warns_of_it(monkeypatch, vlmdpo):
    def absent(args):
        if args.optim == "lomo":
            raise ImportError("You need to install `some_optim`: `pip install some-optim`")

    monkeypatch.setattr("vlmdpo.training.arguments._check_optimizer", absent)
    plan = ["train", "--dry-run", "--optim", "lomo"]
    assert vlmdpo(*plan)[0] == 6
    code, _, err = vlmdpo(*plan, "--gpu", "h100")
    assert code == 0, err
    assert "the machine that trains needs it" in err


def test_unknown_names_and_incomplete_settings_of_optimizer_and_schedule():
    assert "adamw_foo" in _refused(optim="adamw_foo")
    assert "min_lr" in _refused(lr_scheduler_type="cosine_with_min_lr")
    assert "Label smoothing must be" in _refused(loss_type="exo_pair")
    assert "WPO-style" in _refused("use_weighting=true", loss_type="aot")


def test_a_trial_leaves_the_runs_own_arguments_as_they_are(tmp_path):
    config = TrainConfig(set=("max_grad_norm=0.5",), loss_type="mdpo")
    before = dpo_config(config, tmp_path, CPU).to_dict()
    try_if_unusual(config, CPU)
    assert dpo_config(config, tmp_path, CPU).to_dict() == before


@pytest.mark.parametrize(
    "options",
    [
        ["--set", "sync_ref_model=true"],
        ["--optim", "adamw_foo"],
        ["--learning-rate", "inf"],
        ["--beta", "nan"],
    ],
    ids=lambda options: options[1],
)
@pytest.mark.parametrize("plan", [["--dry-run"], []], ids=["plan", "train"])
def test_train_and_its_plan_refuse_alike(options, plan, vlmdpo):
    code, _, err = vlmdpo("train", "--device", "cpu", *plan, *options)
    assert code == 2, err
    assert "Traceback" not in err
