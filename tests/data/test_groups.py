"""What rows share: from the columns that prepare writes, or from what a dataset stores."""

import pytest
from datasets import Dataset
from PIL import Image

from tests.support.images import encoded
from vlmdpo.data import store
from vlmdpo.data.groups import (
    NO_IMAGES,
    answer_numbers,
    count_distinct,
    image_digest,
    prompt_digest,
    row_groups,
)
from vlmdpo.data.images import bounded
from vlmdpo.data.pairs import PreferencePair, TokenCounts, message


def _rows(specs):
    """Prepared rows of (images by size, question, chosen, rejected)."""
    rows = []
    for number, (sizes, question, chosen, rejected) in enumerate(specs):
        data = tuple(encoded((size, 8), kind="PNG") for size in sizes)
        answers = [message("assistant", text) for text in (chosen, rejected)]
        pair = PreferencePair(data, (message("user", question, len(data)),), *answers)
        images = [bounded(one, None) for one in data]
        rows.append(store.row_of(pair, images, TokenCounts(9, 1, 1, 4), number))
    return Dataset.from_list(rows, features=store.features())


SPECS = [
    ([10], "a?", "yes", "no"),
    ([11], "a?", "yes", "no"),  # the same question about another image
    ([10], "b?", "yes", "no"),
    ([10], "a?", "no", "never"),  # the same prompt, and an answer of row 0
    ([10, 11], "a?", "yes", "no"),
    ([11, 10], "a?", "yes", "no"),  # in another order they are not the same
    ([], "a?", "yes", "no"),
    ([], "a?", "yes", "maybe"),
]


def test_rows_share_what_is_equal_in_them():
    groups = row_groups(_rows(SPECS))
    assert groups.images == [0, 1, 0, 0, 2, 3, NO_IMAGES, NO_IMAGES]
    assert groups.prompts == [0, 1, 2, 0, 3, 4, 5, 5]
    assert (groups.num_images, groups.num_prompts, groups.is_shared) == (4, 6, True)


def test_equal_answers_count_as_one_only_within_a_prompt():
    rows = _rows(SPECS)
    answers = answer_numbers(rows, row_groups(rows))
    assert answers[0][1] == answers[3][0]
    assert answers[6][0] == answers[7][0]
    assert len({number for pair in answers for number in pair}) == 2 * len(SPECS) - 2


def test_without_the_columns_they_are_computed_from_what_is_stored(monkeypatch):
    rows = _rows(SPECS)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("decoded"))
    plain = rows.remove_columns(["image_digest", "prompt_digest"])
    assert row_groups(plain) == row_groups(rows)
    assert row_groups(plain.select([3, 0])) == row_groups(rows.select([3, 0]))


def test_trl_s_own_datasets_with_one_image_and_a_text_as_prompt():
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "red")]
    plain = Dataset.from_dict(
        {
            "image": pictures,
            "prompt": ["a?", "a?", "a?"],
            "chosen": ["x", "x", "x"],
            "rejected": ["y", "y", "z"],
        }
    )
    groups = row_groups(plain)
    assert (groups.images, groups.prompts) == ([0, 1, 0], [0, 1, 0])
    assert answer_numbers(plain, groups) == [(0, 1), (2, 3), (0, 4)]


def test_images_are_read_from_their_paths_where_only_those_are_stored(tmp_path):
    paths = []
    for name, size in (("a", 8), ("b", 9), ("c", 8)):
        (tmp_path / f"{name}.png").write_bytes(encoded((size, 8), kind="PNG"))
        paths.append({"bytes": None, "path": str(tmp_path / f"{name}.png")})
    rows = [
        {
            "images": [path],
            "prompt": [message("user", "a?", 1)],
            "chosen": [message("assistant", "x")],
            "rejected": [message("assistant", "y")],
        }
        for path in paths
    ]
    assert row_groups(Dataset.from_list(rows, features=store.pair_features())).images == [0, 1, 0]


def test_nothing_is_shared_by_rows_that_differ():
    rows = _rows([([size], "a?", "yes", "no") for size in (10, 11, 12)] + [([], "b?", "yes", "no")])
    assert not row_groups(rows).is_shared


def test_distinct_images_are_counted_one_by_one_over_all_splits():
    rows = _rows(SPECS)
    counted = count_distinct([rows.select(range(4)), rows.select(range(4, 8))])
    assert counted == {"images": 2, "prompts": 6, "pairs_per_prompt": 8 / 6}
    assert count_distinct([rows.select([6])]) == {
        "images": 0,
        "prompts": 1,
        "pairs_per_prompt": 1.0,
    }


def test_a_digest_is_of_the_images_in_order_and_of_the_prompt_with_them():
    first, second = image_digest([b"a", b"b"]), image_digest([b"b", b"a"])
    assert sorted(first.split("-")) == sorted(second.split("-"))
    assert first != second
    assert image_digest([]) == ""
    assert prompt_digest("a?", first) != prompt_digest("a?", second)
