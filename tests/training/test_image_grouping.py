"""The order of rows when those of one image train together."""

import itertools
import random
from collections import Counter
from types import SimpleNamespace

import pytest

from vlmdpo.data.groups import NO_IMAGES, RowGroups
from vlmdpo.training.image_grouping import ImageGroupedSampler
from vlmdpo.training.row_order import grouped_sampler


def _groups(*images, seed=0):
    """Rows in a random order: for each image the number of rows of each of its prompts."""
    rows, prompt = [], 0
    for image, prompts in enumerate(images):
        for count in prompts:
            rows += [(image, prompt)] * count
            prompt += 1
    random.Random(seed).shuffle(rows)
    return RowGroups([image for image, _ in rows], [prompt for _, prompt in rows])


def _steps(sampler):
    order = list(sampler)
    return [order[at : at + sampler.batch_size] for at in range(0, len(order), sampler.batch_size)]


def _divided(sampler, names):
    """How many steps each image or prompt is in."""
    return Counter(name for step in _steps(sampler) for name in {names[row] for row in step})


MIXED = _groups(*[[1], [2, 1], [1, 1, 3], [2], [1, 1]] * 40)


def test_every_row_comes_once_and_every_epoch_is_another_order():
    sampler = ImageGroupedSampler(MIXED, 16, seed=3)
    orders = []
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(len(sampler)))
    assert orders[0] != orders[1] != orders[2]
    meeting = [{frozenset(MIXED.images[row] for row in order[:16])} for order in orders]
    assert meeting[0] != meeting[1], "other groups meet"
    assert list(ImageGroupedSampler(MIXED, 16, seed=4)) != orders[0]


def test_a_resumed_run_finds_the_epoch_s_order_without_the_earlier_ones():
    whole, resumed = (ImageGroupedSampler(MIXED, 16, seed=3) for _ in range(2))
    for epoch in range(3):
        whole.set_epoch(epoch)
        order = list(whole)
    resumed.set_epoch(2)
    assert list(resumed) == order


def test_the_order_within_a_group_is_random():
    groups = RowGroups([0] * 8, list(range(8)))
    sampler = ImageGroupedSampler(groups, 8, seed=0)
    orders = set()
    for epoch in range(5):
        sampler.set_epoch(epoch)
        orders.add(tuple(sampler))
    assert len(orders) == 5


@pytest.mark.parametrize("lengths", [None, list(range(len(MIXED.images)))])
def test_the_same_rows_are_in_the_same_steps_however_a_step_is_divided(lengths):
    orders = []
    for batch, accumulation, processes in ((1, 8, 1), (2, 4, 1), (4, 2, 1), (2, 2, 2), (2, 1, 4)):
        args = SimpleNamespace(
            train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            world_size=processes,
            seed=42,
        )
        orders.append(list(grouped_sampler(MIXED, lengths, args)))
    assert all(order == orders[0] for order in orders)


def test_rows_of_an_image_are_in_one_step_and_those_of_a_prompt_beside_each_other():
    sampler = ImageGroupedSampler(MIXED, 16, seed=3)
    assert set(_divided(sampler, MIXED.images).values()) == {1}
    order = list(sampler)
    for names in (MIXED.images, MIXED.prompts):
        runs = 1 + sum(names[a] != names[b] for a, b in itertools.pairwise(order))
        assert runs == len(set(names))


def test_groups_that_fill_a_step_together_are_found():
    """Three and three leave two rows, which no group has; three and five do not."""
    groups = _groups(*[[3]] * 30, *[[5]] * 30)
    for seed in range(5):
        assert set(_divided(ImageGroupedSampler(groups, 8, seed), groups.images).values()) == {1}


def test_a_group_is_divided_between_prompts_where_one_must_be():
    groups = _groups(*[[2, 1]] * 20)  # no number of threes is eight
    sampler = ImageGroupedSampler(groups, 8, seed=1)
    images, prompts = _divided(sampler, groups.images), _divided(sampler, groups.prompts)
    assert sum(images.values()) - 20 <= 7
    assert set(prompts.values()) == {1}


def test_an_image_with_more_rows_than_a_step_is_divided_as_seldom_as_possible():
    groups = _groups([3, 3, 3, 3, 3], [20], [1], [2])
    sampler = ImageGroupedSampler(groups, 8, seed=1)
    assert sorted(sampler) == list(range(38))
    steps = _divided(sampler, groups.images)
    assert steps[0] in (2, 3, 4)
    assert steps[1] in (3, 4)
    for prompt in range(5):
        assert _divided(sampler, groups.prompts)[prompt] == 1


@pytest.mark.parametrize("batch", [2, 4, 8])
def test_groups_end_with_forward_passes(batch):
    """Of 32 rows in groups of 4, 2, 1 and 3 with 1, none needs to be in two forward passes."""
    groups = _groups(*[[4]] * 16, *[[2]] * 16, *[[1]] * 64, *[[3]] * 32)
    order = list(ImageGroupedSampler(groups, 32, seed=0))
    passes = [order[at : at + batch] for at in range(0, len(order), batch)]
    counted = Counter(name for rows in passes for name in {groups.images[row] for row in rows})
    size = Counter(groups.images)
    needed = {name: -(-count // batch) for name, count in size.items()}
    assert sum(counted.values()) <= 1.06 * sum(needed.values())


def test_larger_groups_come_first_in_a_step():
    groups = _groups([1], [1], [2], [4])
    sizes = Counter(groups.images)
    order = [sizes[groups.images[row]] for row in ImageGroupedSampler(groups, 8, seed=2)]
    assert order == [4, 4, 4, 4, 2, 2, 1, 1]


def test_rows_without_an_image_are_grouped_by_their_prompt():
    groups = RowGroups([NO_IMAGES] * 12, [0, 1, 2, 3, 4, 5] * 2)
    order = list(ImageGroupedSampler(groups, 4, seed=0))
    assert [groups.prompts[row] for row in order[::2]] == [
        groups.prompts[row] for row in order[1::2]
    ]


def test_groups_of_similar_length_share_a_step_if_rows_are_grouped_by_length_too():
    random_lengths = random.Random(0)
    of_image = [random_lengths.randint(10, 500) for _ in range(200)]
    lengths = [of_image[image] + row % 3 for row, image in enumerate(MIXED.images)]

    def spread(sampler):
        steps = [[lengths[row] for row in step] for step in _steps(sampler)]
        return sum(max(step) - min(step) for step in steps)

    plain = ImageGroupedSampler(MIXED, 8, seed=0)
    both = ImageGroupedSampler(MIXED, 8, seed=0, lengths=lengths)
    assert sorted(both) == list(range(len(both)))
    assert spread(both) < spread(plain) * 2 / 3
    assert max(lengths) in [lengths[row] for row in _steps(both)[0]], "the longest comes first"
    assert set(_divided(both, MIXED.images).values()) == {1}
    first = list(both)
    both.set_epoch(1)
    assert list(both) != first


def test_without_anything_in_common_it_is_a_random_order():
    groups = RowGroups(list(range(50)), list(range(50)))
    order = list(ImageGroupedSampler(groups, 8, seed=0))
    assert sorted(order) == list(range(50)) != order


def test_what_rows_are_not_grouped_by_is_left_out():
    args = SimpleNamespace(train_batch_size=2, gradient_accumulation_steps=2, world_size=1, seed=1)
    assert grouped_sampler(None, None, args) is None
    assert type(grouped_sampler(None, [3, 1, 2], args)).__name__ == "LengthGroupedSampler"
