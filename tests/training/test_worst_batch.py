"""The rows that an estimate takes: what training can have at its worst, and no more."""

import itertools
import random

import pytest
from datasets import Dataset

from vlmdpo.data.groups import IMAGE_DIGEST, PROMPT_DIGEST
from vlmdpo.engine.lengths import RowLength
from vlmdpo.training.image_grouping import ImageGroupedSampler
from vlmdpo.training.worst_batch import WorstBatches

IMAGE = 50  # tokens


def rows_of(sizes, seed=0, images=True):
    """A dataset with a group of rows of one image and prompt for each size, and its lengths."""
    rng = random.Random(seed)
    rows, lengths = [], []
    for group, size in enumerate(sizes):
        prompt = rng.randint(5, 20) + (IMAGE if images else 0)
        for pair in range(size):
            lengths.append(
                RowLength(
                    *(prompt, rng.randint(1, 30), rng.randint(1, 30)),
                    *(IMAGE if images else 0, len(rows)),
                )
            )
            rows.append(
                {
                    IMAGE_DIGEST: f"{group:016d}" if images else "",
                    PROMPT_DIGEST: f"{group:016d}",
                    "chosen": f"{group}/{pair}/yes",
                    "rejected": f"{group}/{pair}/no",
                }
            )
    return Dataset.from_list(rows), lengths


def tokens(worst, batch):
    return worst._shared.run_tokens(batch)


@pytest.mark.parametrize("sizes", [[2] * 12, [1, 2, 3, 4, 5, 6] * 6, [6] * 8, [1] * 20, [20, 30]])
@pytest.mark.parametrize("pairs", [1, 2, 4, 6])
def test_no_batch_of_any_seed_is_larger_and_sharing_counts(sizes, pairs):
    dataset, lengths = rows_of(sizes)
    worst = WorstBatches(dataset, lengths, 12, grouped=True)
    found = worst.of_size(pairs, shared=True)[0]
    assert len(set(found)) == pairs
    largest = 0
    for seed, epoch in itertools.product(range(40, 50), range(2)):
        sampler = ImageGroupedSampler(worst.groups, 12, seed)
        sampler.set_epoch(epoch)
        order = list(sampler)
        largest = max(
            largest, *(tokens(worst, order[at : at + pairs]) for at in range(0, len(order), pairs))
        )
    assert largest <= tokens(worst, found) <= 1.6 * largest


def test_whole_groups_are_not_taken_apart():
    dataset, lengths = rows_of([2] * 12)
    worst = WorstBatches(dataset, lengths, 8, grouped=True)
    (found,) = worst.of_size(4, shared=True)
    assert len({worst.groups.images[row] for row in found}) == 2
    (apart,) = WorstBatches(dataset, lengths, 8, grouped=False).of_size(4, shared=True)
    assert len({worst.groups.images[row] for row in apart}) == 4
    assert tokens(worst, apart) > tokens(worst, found) + IMAGE
    assert worst.pairs_per_prompt == 2


def test_a_batch_with_more_images_is_tried_too():
    dataset, lengths = rows_of([1] * 8 + [4] * 2)
    # Answers of the two larger groups outweigh three more images.
    long = [
        RowLength(length.prompt, 400, 400, length.images, length.row) if length.row >= 8 else length
        for length in lengths
    ]
    worst = WorstBatches(dataset, long, 4, grouped=True)
    by_tokens, by_images = worst.of_size(4, shared=True)
    assert len({worst.groups.images[row] for row in by_tokens}) == 1
    assert len({worst.groups.images[row] for row in by_images}) == 4


def test_rows_of_their_own_and_few_rows():
    dataset, lengths = rows_of([3, 1])
    worst = WorstBatches(dataset, lengths, 4, grouped=True)
    longest_first = sorted(range(4), key=lambda row: -lengths[row].longest)
    assert worst.of_size(2, shared=False) == [longest_first[:2]]
    assert worst.of_size(64, shared=True) == [longest_first], "a batch repeats no row"


def test_rows_without_images_train_together_by_prompt():
    dataset, lengths = rows_of([2] * 6, images=False)
    worst = WorstBatches(dataset, lengths, 4, grouped=True)
    (found,) = worst.of_size(4, shared=True)
    assert len({worst.groups.prompts[row] for row in found}) == 2


def test_an_image_counts_for_each_prompt_where_prompts_cannot_share_it():
    """As in PaliGemma: three questions about one image hold it three times."""
    groups = [(0, 0, 1), (0, 1, 1), (0, 2, 1), (1, 3, 15), (1, 3, 15), (1, 3, 15)]
    lengths = [
        RowLength(IMAGE + 5, answer, answer, IMAGE, row) for row, (*_, answer) in enumerate(groups)
    ]
    dataset = Dataset.from_list(
        [
            {
                **{IMAGE_DIGEST: f"{image:016d}", PROMPT_DIGEST: f"{prompt:016d}"},
                **{"chosen": f"{row}/yes", "rejected": f"{row}/no"},
            }
            for row, (image, prompt, _) in enumerate(groups)
        ]
    )
    for share_images, rows in ((True, [3, 4, 5]), (False, [0, 1, 2])):
        worst = WorstBatches(dataset, lengths, 3, grouped=True, share_images=share_images)
        assert sorted(worst.of_size(3, shared=True)[0]) == rows
