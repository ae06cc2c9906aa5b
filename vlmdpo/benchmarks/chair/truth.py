"""What is in an image: the categories of its boxes, and the objects in its reference captions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from vlmdpo import ui
from vlmdpo.benchmarks.chair import kept, mentions
from vlmdpo.benchmarks.chair.coco import Coco, CocoFiles
from vlmdpo.benchmarks.chair.mentions import Scorer


def read_coco(files: CocoFiles, digest: str, scorer: Scorer) -> Coco:
    """Images and boxes, read from COCO's files once and then kept. Raises DataError.

    Args:
        digest: of the files.
    """
    name = f"coco-{kept.key({'files': digest, 'words': scorer.word_list.digest})}.json"
    found = kept.read(name)
    if found is None:
        ui.say(f"reading COCO's boxes; what is in them is kept in '{kept.cache_folder()}'")
        coco = files.read(scorer.word_list.categories)
        kept.write(name, asdict(coco))
        return coco
    return Coco(
        {int(i): image for i, image in found["names"].items()},
        found["val"],
        {int(i): categories for i, categories in found["boxes"].items()},
    )


def truths(
    ids: Iterable[int], files: CocoFiles, digest: str, coco: Coco, scorer: Scorer
) -> dict[int, frozenset[str]]:
    """By id, the categories in each of these images; empty where no file knows one.

    What was found for this scorer before is kept, and only other images are looked for. Raises
    DataError.
    """
    wanted = frozenset(ids)
    facts = {"files": digest, "words": scorer.word_list.digest, **scorer.facts}
    name = f"chair-{scorer.name}-{kept.key(facts)}.json"
    known = {int(i): frozenset(found) for i, found in (kept.read(name) or {}).items()}
    missing = wanted - known.keys()
    if missing:
        new = {i: set(coco.boxes.get(i, ())) for i in missing}
        for i, caption in files.references(missing):
            new[i].update(category for _, category in mentions.read(caption, scorer).mentions)
        known |= {i: frozenset(found) for i, found in new.items()}
        kept.write(name, {str(i): sorted(found) for i, found in sorted(known.items())})
    return {i: known[i] for i in wanted}
