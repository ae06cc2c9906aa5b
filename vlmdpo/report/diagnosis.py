"""A diagnosis of a run from its curves: what they show, what it means, and what to try.

Each rule looks at the start of the run and at the mean of its last quarter. Rewards are TRL's: beta
times the difference of an answer's log-probs under policy and reference, in nats, so that 0 is
"unchanged", whatever the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmdpo import ui
from vlmdpo.config import TrainConfig

_MIN_LINES = 4  # logged lines; fewer show nothing
_UNMOVED_NATS = 0.2  # an answer's log-prob that changed by less has hardly moved
_CHANCE = (0.4, 0.6)  # reward accuracy
_RISE = 0.1  # relative; a loss that grew by more has risen

Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Finding:
    """One thing that the curves show.

    Attributes:
        name: for machines.
        level: "good", "look" (may be fine) or "bad".
        title, seen, means: for people; `seen` has the numbers.
        tries: what to try, the most promising first.
    """

    name: str
    level: str
    title: str
    seen: str
    means: str
    tries: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunSummary:
    """A run's logged lines, summarized over their last quarter.

    Attributes:
        first_loss: the loss at step 0, or None if it was not logged.
        unmoved: a reward below this has hardly moved.
        learning_rate: the peak.
    """

    steps: int
    first_loss: float | None
    loss: float
    accuracy: float
    margin: float
    chosen: float
    rejected: float
    unmoved: float
    learning_rate: float
    evaluations: Lines
    lines: Lines
    settings: TrainConfig


def diagnose(
    lines: Lines,
    evaluations: Lines = (),
    *,
    learning_rate: float,
    beta: float = 0.1,
    settings: TrainConfig | None = None,
) -> list[Finding]:
    """What the curves show, worst first; one finding "good" or "too early" if there is no other.

    Args:
        lines: logged metrics, each with "step", "loss" and TRL's "rewards/...".
        evaluations: the same for the test split.
        learning_rate: the peak, from which the next one to try is computed.
        beta: of the rewards, by which they are converted to nats.
        settings: the run's, so that no finding advises what was done; None for the defaults.
    """
    settings = settings or TrainConfig()
    if len(lines) < _MIN_LINES:
        seen = f"{len(lines)} logged lines; a diagnosis needs at least {_MIN_LINES}."
        return [
            Finding(
                "too_early",
                "look",
                "Too early to say",
                seen,
                "Train longer, or log more often.",
                _untried(("--logging-steps 1", settings.logging_steps <= 1), ("more steps", False)),
            )
        ]
    run = _summarized(lines, evaluations, learning_rate, beta, settings)
    rules = (
        _diverged,
        _overfits,
        _not_moving,
        _accuracy_at_chance,
        _both_fall,
        _only_rejected_falls,
        _all_separated,
    )
    found = [finding for rule in rules if (finding := rule(run)) is not None]
    if any(finding.name == "diverged" for finding in found):  # the others follow from it
        found = [finding for finding in found if finding.name in ("diverged", "overfits")]
    return sorted(found, key=lambda finding: finding.level != "bad") or [_healthy(run)]


def _untried(*tries: tuple[str, bool]) -> tuple[str, ...]:
    """The advice that was not followed yet, of (advice, whether the run did that)."""
    return tuple(advice for advice, done in tries if not done)


def _uses_loss(settings: TrainConfig, *names: str) -> bool:
    """Whether one of these losses is minimized, by its own name or as a part of a preset."""
    return bool({*settings.losses().names, settings.loss_type} & set(names))


def _sets_at_most(settings: TrainConfig, name: str, most: float) -> bool:
    """Whether `--set` gives a field this value or a smaller one."""
    values = [text.partition("=")[2] for text in settings.set if text.startswith(f"{name}=")]
    return any(float(value) <= most for value in values)


def _summarized(
    lines: Lines,
    evaluations: Lines,
    learning_rate: float,
    beta: float,
    settings: TrainConfig,
) -> RunSummary:
    last = lines[-max(1, len(lines) // 4) :]

    def mean(name: str) -> float:
        return float(sum(line.get(name, 0.0) for line in last) / len(last))

    return RunSummary(
        steps=int(lines[-1]["step"]),
        first_loss=float(lines[0]["loss"])
        if lines[0]["step"] == 1  # the first step starts from the reference itself
        else None,
        loss=mean("loss"),
        accuracy=mean("rewards/accuracies"),
        margin=mean("rewards/margins"),
        chosen=mean("rewards/chosen"),
        rejected=mean("rewards/rejected"),
        unmoved=_UNMOVED_NATS * beta,
        learning_rate=learning_rate,
        evaluations=evaluations,
        lines=lines,
        settings=settings,
    )


def _has_moved(run: RunSummary) -> bool:
    return max(abs(run.chosen), abs(run.rejected), abs(run.margin)) >= run.unmoved


def _diverged(run: RunSummary) -> Finding | None:
    if run.first_loss is None or run.loss <= run.first_loss * (1 + _RISE):
        return None
    return Finding(
        "diverged",
        "bad",
        "The loss rose above its start",
        f"loss {run.first_loss:.3f} at step 1, {run.loss:.3f} over the last quarter; reward "
        f"accuracy {run.accuracy:.2f}.",
        "Steps are too large for the gradient to be valid, so the model unlearns.",
        _untried(
            (f"--learning-rate {run.learning_rate / 10:.0e}", False),
            (
                "--warmup-steps 0.1, so that the first steps are small",
                run.settings.warmup_steps > 0,
            ),
            ("--set max_grad_norm=0.5", _sets_at_most(run.settings, "max_grad_norm", 0.5)),
        ),
    )


def _overfits(run: RunSummary) -> Finding | None:
    losses = [(float(line["loss"]), int(line["step"])) for line in run.evaluations]
    if len(losses) < 3:
        return None
    least, step = min(losses)
    last = losses[-1][0]
    trained_then = min(run.lines, key=lambda line: abs(int(line["step"]) - step))["loss"]
    if step == losses[-1][1] or last <= least * (1 + _RISE) or run.loss >= trained_then:
        return None
    return Finding(
        "overfits",
        "bad",
        "Overfitting: the test split gets worse",
        f"eval loss {least:.3f} at step {step}, {last:.3f} at step {losses[-1][1]}, while the "
        "training loss fell from "
        f"{trained_then:.3f} to {run.loss:.3f}.",
        f"Since about step {step} it memorizes the training rows.",
        _untried(
            ("--keep-best, which keeps the weights of that step", run.settings.keep_best),
            (f"--max-steps {step}, or the nearest checkpoint", False),
            ("more pairs, or fewer epochs", False),
            (_less_capacity(run.settings), False),
        ),
    )


def _less_capacity(settings: TrainConfig) -> str:
    ways = [
        *(["--lora-r 8"] if settings.lora and settings.lora_r > 8 else []),
        *(["--lora-dropout 0.1"] if settings.lora and settings.lora_dropout < 0.1 else []),
        "a larger --beta",
    ]
    return ways[0] if len(ways) == 1 else ", ".join(ways[:-1]) + f" or {ways[-1]}"


def _not_moving(run: RunSummary) -> Finding | None:
    if _has_moved(run):
        return None
    at = f"{run.loss:.4f}" + (
        f" (at the start {run.first_loss:.4f}{_ln2(run.first_loss)})"
        if run.first_loss is not None
        else ""
    )
    return Finding(
        "not_moving",
        "bad",
        f"Nothing was learned in {ui.count(run.steps, 'step')}",
        f"loss {at}; rewards: chosen {run.chosen:+.4f}, rejected {run.rejected:+.4f}.",
        "The model is still the reference: its weights hardly move.",
        _untried(
            (f"--learning-rate {run.learning_rate * 10:.0e}", False),
            ("more steps, or a schedule without a long warm-up", False),
            (
                "--lora-scope all, in case the adapter is in the wrong part of the model",
                not run.settings.lora or run.settings.lora_scope == "all",
            ),
        ),
    )


def _ln2(loss: float) -> str:
    return ", ln 2" if abs(loss - 0.6931) < 0.0005 else ""


def _accuracy_at_chance(run: RunSummary) -> Finding | None:
    if not _has_moved(run) or not _CHANCE[0] <= run.accuracy <= _CHANCE[1]:
        return None
    return Finding(
        "accuracy_at_chance",
        "bad",
        "Reward accuracy stays at chance",
        f"accuracy {run.accuracy:.2f} over the last quarter, although rewards moved (chosen "
        f"{run.chosen:+.3f}, rejected "
        f"{run.rejected:+.3f}).",
        "What moves the rewards does not separate chosen from rejected: labels may be noise, or "
        "the images may be ignored.",
        _untried(
            ("look at some pairs: the report.html of vlmdpo prepare, or --show N", False),
            ("vlmdpo train --doctor, which checks that the image matters", False),
            (
                "--loss robust --label-smoothing 0.2, if the labels are known to be noisy",
                _uses_loss(run.settings, "robust"),
            ),
        ),
    )


def _both_fall(run: RunSummary) -> Finding | None:
    if run.margin < run.unmoved or run.chosen >= -max(run.unmoved, 0.2 * run.margin):
        return None
    has_sft = _uses_loss(run.settings, "sft")
    return Finding(
        "both_fall",
        "bad",
        "Both answers become less likely",
        f"rewards: chosen {run.chosen:+.3f}, rejected {run.rejected:+.3f}; the margin is "
        f"{run.margin:+.3f}.",
        "The loss only asks for a difference, and gets it by making both answers unlikely; what "
        "becomes more likely is neither of them. Read the samples.",
        _untried(
            (
                "--loss mpo, or --loss sigmoid,sft --loss-weights 1,0.2: they keep the chosen "
                "answer likely",
                has_sft,
            ),
            ("a larger weight of sft in --loss-weights, as in 1,1", not has_sft),
            (f"--learning-rate {run.learning_rate / 3:.0e}, or fewer steps", False),
            (
                "--loss mdpo, whose anchor keeps the chosen answer's reward above zero",
                _uses_loss(run.settings, "mdpo"),
            ),
        ),
    )


def _only_rejected_falls(run: RunSummary) -> Finding | None:
    if (
        run.margin < 2 * run.unmoved
        or not -max(run.unmoved, 0.2 * run.margin) <= run.chosen <= 0.1 * run.margin
    ):
        return None
    return Finding(
        "only_rejected_falls",
        "look",
        "The margin grows only because rejected falls",
        f"rewards: chosen {run.chosen:+.3f}, rejected {run.rejected:+.3f}: "
        f"{-run.rejected / run.margin:.0%} of the margin.",
        "It learns what not to say. That is fine if chosen answers were likely anyway; otherwise "
        "it has not learned them.",
        _untried(
            ("read the samples: are the new answers the chosen ones?", False),
            (
                "--loss mpo, or --loss apo_zero, which raise the chosen answer",
                _uses_loss(run.settings, "sft", "apo_zero"),
            ),
        ),
    )


def _all_separated(run: RunSummary) -> Finding | None:
    half = run.lines[len(run.lines) // 2 :]
    if run.evaluations or any(
        line.get("rewards/accuracies", 0.0) < 0.99 or line["loss"] > 0.1 for line in half
    ):
        return None
    return Finding(
        "nothing_left",
        "look",
        "Every pair is separated for half of the run",
        f"accuracy {run.accuracy:.2f}, loss {run.loss:.3f}, margin {run.margin:+.2f} over the "
        "last quarter.",
        "These pairs have nothing more to teach. Only a test split can show whether other pairs "
        "improve.",
        ("vlmdpo prepare --test-size 0.05, and train on that", "fewer epochs, or harder pairs"),
    )


def _healthy(run: RunSummary) -> Finding:
    evaluated = (
        f" Eval accuracy {run.evaluations[-1]['rewards/accuracies']:.2f}."
        if run.evaluations
        else ""
    )
    return Finding(
        "learning",
        "good",
        "It learns, and nothing looks wrong",
        f"over the last quarter accuracy {run.accuracy:.2f}, margin {run.margin:+.3f} (chosen "
        f"{run.chosen:+.3f}, rejected "
        f"{run.rejected:+.3f}).{evaluated}",
        "Curves cannot show whether it hallucinates less.",
        ("vlmdpo eval-amber",),
    )


def of_this_model(findings: Iterable[Finding], command: str) -> list[Finding]:
    """The findings with `vlmdpo eval-amber` as the command that scores this run's model."""
    return [
        dataclasses.replace(
            one, tries=tuple(text.replace("vlmdpo eval-amber", command) for text in one.tries)
        )
        for one in findings
    ]


def best_kept(best: Mapping[str, Any] | None) -> list[Finding]:
    """What `--keep-best` kept, as a finding; none without it.

    Args:
        best: of `KeepBest.summary`.
    """
    if best is None:
        return []
    stopped = " The run was stopped there." if best["stopped_early"] else ""
    return [
        Finding(
            "best_kept",
            "good",
            f"The result is the weights of step {best['step']}",
            f"{best['judged_by']} {best['value']:.4f}, the best of {best['evaluations']} "
            f"evaluations on the test split; {best['last_value']:.4f} at the last, of step "
            f"{best['last_step']}.{stopped}",
            "It was chosen by the test split, so that its figure there is a little too good.",
            ("judge it by what did not choose it: vlmdpo eval-amber",),
        )
    ]
