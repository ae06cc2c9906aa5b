"""`vlmdpo make-pairs`: draw a model's own answers, judge them, and pair the best with the worst.

What is drawn and judged lies in the output folder line by line, so a stopped run goes on, and
another margin, number of pairs or judge needs no new answers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdpo import ui
from vlmdpo.benchmarks import answers as answer_files
from vlmdpo.commands.make_pairs_models import Models
from vlmdpo.commands.make_pairs_screen import show, show_left_out
from vlmdpo.config import PER_CALL, MakePairsConfig, recipes
from vlmdpo.data.folder_lock import locked
from vlmdpo.data.left_out import LeftOut, in_words
from vlmdpo.distributed.processes import ProcessGroup, join_process_group
from vlmdpo.errors import ConfigError, DataError
from vlmdpo.feedback import pair_files, pictures, scores, work
from vlmdpo.feedback.judges.base import Judgment
from vlmdpo.feedback.judges.statements import Splitter
from vlmdpo.feedback.judges.truth import AmberTruth, Truth
from vlmdpo.feedback.pictures import Picture
from vlmdpo.feedback.records import Records, judgments_in, samples_in
from vlmdpo.feedback.select import Scored, Selection, select
from vlmdpo.models import registry
from vlmdpo.report import make_pairs_page

__all__ = ["run", "show"]

PAGE, REPORT, SAMPLES = "report.html", "report.json", "samples.jsonl"


@dataclass(frozen=True)
class Source:
    """What is asked, and what is known about it.

    Attributes:
        split: how answers are split into statements where the model needs its own questions.
    """

    pictures: list[Picture]
    left_out: LeftOut
    truth: Truth | None = None
    split: Splitter | None = None


def run(config: MakePairsConfig) -> dict[str, Any]:
    """Draw, judge, select and write.

    Raises ConfigError, DataError, ModelError, MissingDependencyError, EndpointError.
    """
    processes = join_process_group(config.device)
    if processes.index:
        ui.mute()
    config = dataclasses.replace(config, device=processes.device, num_processes=1)
    source = _source(config)
    alone = nullcontext() if processes.index else locked(config.output_dir, "making pairs in")
    with alone:
        report = _made(config, source, processes)
    processes.destroy()
    if not report["pairs"]:
        show_left_out(report)
        raise DataError(_no_pairs(config, report))
    return report


def _made(config: MakePairsConfig, source: Source, processes: ProcessGroup) -> dict[str, Any]:
    """What `run` returns, once all of it is written."""
    if processes.index == 0:
        _open_folder(config)
    processes.barrier()
    models = Models(config, source.truth, source.split, processes)
    drawn, left_out, before = _draw(config, source, models, processes)
    judged, refused = _judge(config, source, drawn, models, processes)
    scored, true = _scored(config, source, drawn, judged)
    selection = select(
        scored.values(),
        per_prompt=config.pairs_per_prompt,
        margin=config.least_difference,
        max_length_gap=config.max_length_gap,
    )
    left_out = LeftOut.joined([source.left_out, left_out, refused])
    cost = models.judge_cost()
    images: dict[str, str] = {}
    if processes.index == 0:
        folder = config.output_dir
        digests = {key: entry["image_digest"] for key, entry in drawn.by_id.items()}
        images = pair_files.write_images(
            folder, source.pictures, digests, selection.pairs, left_out
        )
        selection.pairs = [pair for pair in selection.pairs if pair.key in images]
    report = _report(config, source, scored, selection, judged, left_out)
    true = true if config.judge != "truth" else {}
    report |= {"drawn_before": before, "judge_cost": cost, **_agreement(scored, true)}
    if processes.index == 0:
        _write(config, source, images, scored, selection, judged, report)
    processes.barrier()
    return report


def _source(config: MakePairsConfig) -> Source:
    truth = AmberTruth(config.truth) if config.truth is not None else None
    if config.input is not None:
        asked, left_out = pictures.read_pictures(config)
        return Source(asked, left_out, truth, _splitter(config))
    if config.model != "tiny":
        raise ConfigError(
            "--input is needed: only the embedded model has images of its own; give a JSONL of "
            "questions, a folder of images, or a folder written by vlmdpo prepare"
        )
    from vlmdpo.tiny import own_answers

    asked, scenes = own_answers.pictures(config.limit or own_answers.SCENES)
    return Source(asked, LeftOut(), own_answers.SceneTruth(scenes), _splitter(config))


def _splitter(config: MakePairsConfig) -> Splitter | None:
    """How answers are split for a judge that understands only some questions; else None."""
    if (config.judge_model or config.model) != "tiny":
        return None
    from vlmdpo.tiny import own_answers

    return own_answers.claims_of


def _open_folder(config: MakePairsConfig) -> None:
    """Create the folder, or check that it holds answers of these settings. Raises DataError."""
    folder = config.output_dir
    identity = _identity(config)
    if config.overwrite:
        answer_files.clear(folder)
    else:
        answer_files.check(folder, identity)
    answer_files.create(folder)
    if not (folder / answer_files.RUN).is_file():
        answer_files.write_json(folder / answer_files.RUN, identity)


def _identity(config: MakePairsConfig) -> dict[str, Any]:
    """What drawn answers depend on, as far as it is known before the model is loaded."""
    from vlmdpo.models import digest
    from vlmdpo.models.adapter_files import WEIGHTS, check_adapter

    adapter = config.adapter
    if adapter is not None:
        check_adapter(adapter, config.model, config.revision)
    names = ("model", "revision", "image_splitting", "engine", "samples", "temperature", "top_p")
    more = ("max_new_tokens", "seed", "system", "chat_template_kwargs")
    return {
        **{name: getattr(config, name) for name in (*names, *more)},
        "input": str(config.input) if config.input is not None else None,
        "prompts": pictures.prompts_digest(config),
        "adapter_digest": digest.file_digest(adapter / WEIGHTS)[:16] if adapter else None,
    }


def _draw(
    config: MakePairsConfig, source: Source, models: Models, processes: ProcessGroup
) -> tuple[Records, LeftOut, int]:
    """(all answers, what could not be asked, how many prompts an earlier run had asked)."""
    drawn = Records(config.output_dir / SAMPLES, processes)
    ids = [one.id_of(prompt) for one in source.pictures for prompt in one.prompts]
    before = sum(number in drawn.by_id for number in ids)
    left_out = LeftOut()
    if before < len(ids):
        own = source.pictures[processes.index :: processes.count]
        work.draw(own, models.answerer(), models.sampling, config.max_new_tokens, drawn, left_out)
    drawn.join(ids)
    left_out = LeftOut.joined(processes.gather(left_out))
    if not any(number in drawn.by_id for number in ids):
        raise DataError(f"no image can be asked about: {in_words(left_out.report())}")
    return drawn, left_out, before


def _judge(
    config: MakePairsConfig,
    source: Source,
    drawn: Records,
    models: Models,
    processes: ProcessGroup,
) -> tuple[Records, LeftOut]:
    """(all judgments, what could not be judged)."""
    judged = Records(config.output_dir / _judged_file(config), processes)
    asked = {one.id_of(prompt) for one in source.pictures for prompt in one.prompts}
    ids = asked.intersection(drawn.by_id) - set(judged.by_id)
    left_out = LeftOut()
    if ids:
        own = source.pictures[processes.index :: processes.count]
        work.judge(own, drawn, models.judge(), judged, left_out, max_unread=config.max_unread)
    judged.join(list(drawn.by_id))
    # Of all processes, and of an earlier run that stopped here with everything judged.
    unread = work.Unread(config.max_unread)
    for number in asked.intersection(judged.by_id):
        unread.count(judgments_in(judged.by_id[number]).values())
    return judged, LeftOut.joined(processes.gather(left_out))


def _judged_file(config: MakePairsConfig) -> str:
    """The file of this judge: another one gets a file of its own, beside it."""
    facts = {
        "judge": config.judge,
        "model": config.judge_model,
        "url": config.judge_url,
        "truth": str(config.truth) if config.judge == "truth" else None,
        "log_odds": config.judge_score == "calibrated",
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return f"judged-{config.judge}-{digest}.jsonl"


def _scored(
    config: MakePairsConfig, source: Source, drawn: Records, judged: Records
) -> tuple[dict[str, Scored], dict[str, list[scores.Score]]]:
    """(the judge's scores by prompt, the true ones where there are any)."""
    # Only of what is asked now: an earlier run may have had a larger --limit.
    asked = {one.id_of(prompt) for one in source.pictures for prompt in one.prompts}
    entries = [judged.by_id[key] for key in judged.by_id if key in asked]
    calibrated = config.judge_score == "calibrated"
    medians = scores.medians_by_kind(
        one for entry in entries if calibrated for one in judgments_in(entry).values()
    )
    scored: dict[str, Scored] = {}
    true: dict[str, list[scores.Score]] = {}
    for picture in source.pictures:
        for prompt in picture.prompts:
            key = picture.id_of(prompt)
            if key not in drawn.by_id or key not in judged.by_id:
                continue
            samples = samples_in(drawn.by_id[key])
            by_answer = judgments_in(judged.by_id[key])
            judgments = [by_answer.get(sample.text, _MISSING) for sample in samples]
            found = (
                scores.calibrated(judgments, medians) if calibrated else scores.denied(judgments)
            )
            scored[key] = Scored(key, samples, found)
            if source.truth is not None:
                known = [source.truth.of(picture.name, prompt, s.text) for s in samples]
                true[key] = scores.denied(known)
    return scored, true


_MISSING = Judgment(unread="not judged")


def _agreement(
    scored: dict[str, Scored], true: dict[str, list[scores.Score]]
) -> dict[str, float | int | None]:
    share, pairs = scores.agreement((scored[key].scores, true[key]) for key in true)
    return {"judge_agreement": share, "judge_agreement_pairs": pairs}


def _report(
    config: MakePairsConfig,
    source: Source,
    scored: dict[str, Scored],
    selection: Selection,
    judged: Records,
    left_out: LeftOut,
) -> dict[str, Any]:
    judgments = [one for key in scored for one in judgments_in(judged.by_id[key]).values()]
    chosen, rejected = selection.mean_lengths
    return {
        "path": str(config.output_dir / pair_files.PAIRS),
        "output_dir": str(config.output_dir),
        "input": str(config.input) if config.input is not None else "scenes",
        "model": config.model,
        "adapter": str(config.adapter) if config.adapter else None,
        "engine": config.engine,
        "judge": config.judge,
        "judge_model": judge_model(config),
        "self_judged": _is_self_judged(config),
        "images": len(source.pictures),
        "prompts": len(scored),
        "samples": sum(len(one.samples) for one in scored.values()),
        "pairs": len(selection.pairs),
        "skipped": dict(sorted(selection.skipped.items())),
        "replaced_for_length": selection.replaced,
        "mean_length": {"chosen": chosen, "rejected": rejected},
        "verdicts": sum(one.verdicts for one in judgments),
        "unread_verdicts": sum(one.unread_verdicts for one in judgments),
        "left_out": left_out.report(),
        "settings": recipes.plain(config, without=(*PER_CALL, "overwrite")),
    }


def _is_self_judged(config: MakePairsConfig) -> bool:
    """Whether the model that answers also judges."""
    if config.judge not in ("statements", "claims"):
        return False
    return config.judge_model is None or (
        config.adapter is None and registry.is_same_name(config.judge_model, config.model)
    )


def judge_model(config: MakePairsConfig) -> str | None:
    """The model that judges; None where none does."""
    if config.judge == "truth":
        return None
    return config.judge_model or config.model


def _write(
    config: MakePairsConfig,
    source: Source,
    images: dict[str, str],
    scored: dict[str, Scored],
    selection: Selection,
    judged: Records,
    report: dict[str, Any],
) -> None:
    folder = config.output_dir
    names = ("model", "revision", "temperature", "top_p", "samples", "seed", "engine", "system")
    known = json.loads((folder / answer_files.RUN).read_text(encoding="utf-8"))
    origin = {
        **{name: getattr(config, name) for name in names},
        "adapter": report["adapter"],
        **{name: known.get(name) for name in ("adapter_digest", "weights", "processor")},
        "judge": config.judge,
        "judge_model": report["judge_model"],
        "judge_score": config.judge_score,
    }
    pair_files.write(folder, source.pictures, images, scored, selection.pairs, origin)
    page = make_pairs_page.page(
        report, source.pictures, scored, selection.pairs, judged, source.truth
    )
    answer_files.write_text(folder / PAGE, page)
    answer_files.write_json(folder / REPORT, report)


def _no_pairs(config: MakePairsConfig, report: dict[str, Any]) -> str:
    reasons = "; ".join(
        f"{make_pairs_page.SKIPPED[reason]}: {count:,}"
        for reason, count in report["skipped"].items()
    )
    return (
        f"no pairs: of {ui.count(report['prompts'], 'prompt')} none has two answers that may be "
        f"paired ({reasons}); see '{Path(report['output_dir']) / PAGE}', and try more --samples, a "
        "higher --temperature, a lower --margin, a larger --max-length-gap or another --judge"
    )
