"""What rows of a run share: tokens foretold and counted, who groups, and what is said of it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.support.engines import related_pairs, trainer
from vlmdpo import ui
from vlmdpo.config import SpeedOptions
from vlmdpo.data.groups import NO_IMAGES, RowGroups, row_groups
from vlmdpo.data.pairs import TokenCounts
from vlmdpo.engine import lengths
from vlmdpo.engine.batch import batch_tokens
from vlmdpo.training import grouping
from vlmdpo.training.monitor import TrainingMonitor
from vlmdpo.training.setup import TrainingSetup
from vlmdpo.training.sharing import SharedRows, Sharing
from vlmdpo.training.token_count import TokenCount, Tokens

# Rows 0 and 1 are of one prompt and have an answer in common; row 2 asks about the same image; row
# 3 about none.
ROWS = SharedRows(
    RowGroups([0, 0, 0, NO_IMAGES], [0, 0, 1, 2]),
    [(0, 1), (2, 0), (3, 4), (5, 6)],
    [
        TokenCounts(100, 10, 20, 64),
        TokenCounts(100, 30, 10, 64),
        TokenCounts(90, 5, 6, 64),
        TokenCounts(20, 7, 8, 0),
    ],
)


def test_what_rows_of_one_forward_pass_share_runs_once():
    together = ROWS.tokens([0, 1, 2], 3)
    assert together.stock == (2 * 100 + 30) + (2 * 100 + 40) + (2 * 90 + 11)
    image, prompts = 64, (100 - 64) + (90 - 64)
    assert together.run == image + prompts + (10 + 20 + 30) + (5 + 6)
    assert replace(ROWS, share_images=False).tokens([0, 1, 2], 3).run == together.run + image
    apart = ROWS.tokens([0, 1, 2], 1)
    assert apart.stock == together.stock
    assert apart.run == (100 + 30) + (100 + 40) + (90 + 11)
    assert ROWS.tokens([0, 3, 1, 2], 2).run == sum(
        ROWS.tokens(part, 2).run for part in ([0, 3], [1, 2])
    )
    assert ROWS.tokens([3], 4) == Tokens(2 * 20 + 15, 20 + 15)


def test_an_engine_that_shares_nothing_runs_stock_rows():
    tokens = ROWS.tokens([0, 1, 2, 3], None)
    assert tokens.stock == tokens.run == 230 + 240 + 191 + 55


def test_corrupted_copies_of_mdpo_carry_the_chosen_answers():
    rows = replace(ROWS, with_copies=True)
    assert rows.tokens([2], 2) == Tokens(191 + 90 + 5, (90 + 5 + 6) + (90 + 5))
    shared = rows.tokens([0, 1], 2)
    assert shared.run == (100 + 10 + 20 + 30) + (100 + 10 + 30)
    # Without an image there is nothing to corrupt: the copy is the row itself.
    assert rows.tokens([3], 2) == Tokens(55 + 20 + 7, 20 + 15)


# (image, question, chosen, rejected): rows of one prompt, with answers in common, and one alone.
OF_ONE_PROMPT = [(0, 0, 0, 1), (0, 0, 2, 1), (1, 1, 3, 4), (None, 2, 0, 5)]


@pytest.mark.parametrize(
    ("engine", "mdpo"), [("shared", False), ("rows", False), ("stock", False), ("shared", True)]
)
def test_the_tokens_foretold_are_those_counted(engine, mdpo, tmp_path):
    rows = related_pairs(*OF_ONE_PROMPT)
    made = trainer("qwen2_5_vl", engine, rows, tmp_path, mdpo=mdpo)
    groups = row_groups(rows)
    counts = lengths.row_lengths(made.processing_class, rows)
    answers = grouping.answer_numbers(rows, groups)
    foretold = SharedRows(groups, answers, counts, with_copies=mdpo).tokens(
        range(4), 2 if engine == "shared" else None
    )
    made.current_gradient_accumulation_steps = 1  # as `train` sets it
    for at in (0, 2):
        batch = made.data_collator([rows[at], rows[at + 1]])
        made.training_step(made.model, batch)
    assert made.tokens.here() == made.tokens.total() == foretold
    assert made.tokens.here().stock == made._total_train_tokens


@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_an_image_is_foretold_as_shared_where_it_is(family, tmp_path):
    """PaliGemma's prompts see themselves in both directions, so each needs the image anew."""
    rows = related_pairs((0, 0, 0, 1), (0, 1, 2, 3), (0, 2, 4, 5))
    made = trainer(family, "shared", rows, tmp_path)
    monitor = TrainingMonitor(tmp_path / "metrics.jsonl")
    setup = TrainingSetup(made, made.processing_class, rows, monitor, None, [], tmp_path)
    grouping.group_by_image(setup, SpeedOptions())
    assert setup.sharing.is_grouped
    assert setup.sharing.epoch is None, "without a manifest tokens are not known"
    counts = lengths.row_lengths(made.processing_class, rows)
    shares = made.pair_collator.share_beginnings
    assert shares == (family == "llava")
    foretold = SharedRows(
        row_groups(rows),
        grouping.answer_numbers(rows, row_groups(rows)),
        counts,
        share_images=shares,
    ).tokens(range(3), 3)
    counted = batch_tokens(made.data_collator(list(rows)))
    assert foretold.stock == counted[0]
    # Words before the image are shared too.
    assert 0 <= foretold.run - counted[1] <= (20 if shares else 0)


def test_tokens_of_rows_are_not_read_from_the_device_while_training():
    class OnDevice:
        """A sum that may be added to, and must not be read."""

        def __radd__(self, other):
            return self

        __add__ = __radd__

        def __int__(self):
            raise AssertionError("waited for the device")

    count = TokenCount()
    count.add([{"attention_mask": SimpleNamespace(sum=OnDevice)}] * 2)
    with pytest.raises(AssertionError, match="waited"):
        count.here()


SHARED, APART = RowGroups([0, 0, 1], [0, 1, 2]), RowGroups([0, 1, 2], [0, 1, 2])


@pytest.mark.parametrize(
    ("engine", "asked", "groups", "batch", "is_grouped", "says"),
    [
        ("shared", None, SHARED, 2, True, ""),
        ("shared", True, SHARED, 2, True, ""),
        ("shared", False, SHARED, 2, False, ""),
        ("shared", None, APART, 2, False, ""),
        ("shared", True, APART, 2, False, "no two rows have an image or a prompt in common"),
        ("stock", None, SHARED, 2, False, ""),
        ("stock", True, SHARED, 2, False, "--group-by-image does nothing with the stock engine"),
        ("rows", True, SHARED, 2, False, "--group-by-image does nothing with the rows engine"),
        ("shared", None, SHARED, 1, True, "--per-device-train-batch-size 1 computes each alone"),
    ],
)
def test_who_groups(engine, asked, groups, batch, is_grouped, says, monkeypatch):
    said = []
    monkeypatch.setattr(ui, "say", said.append)
    monkeypatch.setattr(grouping, "row_groups", lambda dataset: groups)
    monkeypatch.setattr(grouping, "_describe", lambda setup, groups: "described")
    args = SimpleNamespace(train_batch_size=batch)
    setup = SimpleNamespace(
        trainer=SimpleNamespace(engine=engine, args=args, row_groups=None), dataset=None
    )
    grouping.group_by_image(setup, SpeedOptions(group_by_image=asked))
    assert (setup.trainer.row_groups is groups) == is_grouped
    assert setup.sharing == "described"
    assert len(said) == bool(says)
    assert says in "".join(said)


def test_the_sentence_says_what_is_shared_and_saved():
    sharing = Sharing(
        pairs=1200, images=400, prompts=600, answers=2000, is_grouped=True, epoch=Tokens(1000, 400)
    )
    assert sharing.sentence == (
        "1,200 pairs have 400 images, 600 prompts and 2,000 answers; the first epoch, with rows of "
        "one image grouped, computes 400 tokens where stock rows hold 1,000 (60% fewer)"
    )
    unknown = replace(sharing, epoch=None)
    assert unknown.sentence.endswith("2,000 answers")
    same = replace(sharing, is_grouped=False, epoch=Tokens(1000, 1000))
    assert same.sentence.endswith(
        "the first epoch computes 1,000 tokens where stock rows hold 1,000"
    )


def test_answers_cut_to_the_limit_count_as_cut():
    counts = TokenCounts(100, 10, 50, 64)
    assert grouping._within(counts, 120) == TokenCounts(100, 10, 20, 64)
    assert grouping._within(counts, None) == counts
