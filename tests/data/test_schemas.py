"""Formats of preference data: recognized by columns, and turned into the same pair; bad rows."""

import json

import pytest

from tests.support.images import encoded, sent
from vlmdpo.data import schemas
from vlmdpo.data.pairs import BadRow, UncheckedPair, check, text_of
from vlmdpo.errors import DataError

PICTURE = encoded()
HUMAN = {"from": "human", "value": "<image>\nWhat?"}
USER = {"role": "user", "content": "<image>What?"}


def _said(role, text):
    return {"role": role, "content": text}


def _parts(text, images=1):
    return [{"type": "image"}] * images + [{"type": "text", "text": text}]


ROWS = {
    "RLAIF-V": {
        "image": PICTURE,
        "question": "What?",
        "chosen": "good",
        "rejected": "bad",
        "idx": 3,
        "image_path": "x",
    },
    "RLHF-V": {
        "image": PICTURE,
        "text": json.dumps({"question": "What?", "chosen": "good", "rejected": "bad"}),
        "ds_name": "d",
    },
    "VLFeedback ranking": {
        "img_path": PICTURE,
        "prompt": "What?",
        "models": ["a", "b", "c"],
        "completions": {
            "annotations": [
                {"Helpfulness": {"Rating": r}, "Visual Faithfulness": {"Rating": "4"}}
                for r in ("3", "1", "5")
            ],
            "model": ["a", "b", "c"],
            "response": ["middling", "bad", "good"],
        },
    },
    "TRL": {
        "images": [PICTURE],
        "prompt": [_said("user", _parts("What?"))],
        "chosen": [_said("assistant", [{"type": "text", "text": "good"}])],
        "rejected": [_said("assistant", "bad")],
    },
    "TRL with implicit prompt": {
        "image": PICTURE,
        "chosen": [_said("user", "What?"), _said("assistant", "good")],
        "rejected": [_said("user", "What?"), _said("assistant", "bad")],
    },
    "LLaMA-Factory sharegpt ranking": {
        "conversations": [HUMAN],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
        "images": [PICTURE],
    },
    "LLaMA-Factory alpaca ranking": {
        "instruction": "What?",
        "input": "",
        "chosen": "good",
        "rejected": "bad",
        "images": [PICTURE],
    },
    "ms-swift": {
        "messages": [USER, _said("assistant", "good")],
        "rejected_response": "bad",
        "images": [{"bytes": PICTURE}],
    },
    "LLaVA pairs": {
        "image": PICTURE,
        "conversations": [HUMAN],
        "output_1": {"from": "llava", "value": "bad"},
        "output_2": {"from": "llava", "value": "good"},
        "preference": 2,
    },
    "LLaVA conversations": {
        "image": PICTURE,
        "conversations": [HUMAN, {"from": "gpt", "value": "good"}],
        "rejected_conversations": [HUMAN, {"from": "gpt", "value": "bad"}],
    },
}


@pytest.mark.parametrize("name", list(ROWS))
def test_every_format_is_recognized_and_gives_the_same_pair(name, tmp_path):
    row = ROWS[name]
    schema = schemas.detect(row, row, "here")
    assert schema.name == name
    assert set(schema.columns) <= set(row)
    pair = check(sent(schema).unchecked_pair(row), tmp_path)
    assert pair.images == (PICTURE,)
    assert pair.prompt == (
        {
            "role": "user",
            "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}],
        },
    )
    assert (text_of(pair.chosen), text_of(pair.rejected)) == ("good", "bad")


def test_ms_swift_rows_with_whole_rejected_conversations(tmp_path):
    row = {
        "messages": [USER, _said("assistant", "good")],
        "rejected_messages": [USER, _said("assistant", "bad")],
        "images": [PICTURE],
        "rejected_images": [PICTURE],
    }
    schema = schemas.detect(row, row, "here")
    assert text_of(check(schema.unchecked_pair(row), tmp_path).rejected) == "bad"
    with pytest.raises(BadRow) as caught:
        schema.unchecked_pair({**row, "rejected_images": [encoded((5, 5))]})
    assert caught.value.reason == "other_images_for_rejected"


def test_a_vlfeedback_list_of_completions_and_its_ties():
    row = ROWS["VLFeedback ranking"]
    columns = row["completions"]
    as_list = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    draft = schemas.detect(row, row, "here").unchecked_pair
    assert draft({**row, "completions": as_list}) == draft(row)
    for rating, reason in (("3", "tied_ranking"), ("N/A", "unrated")):
        same = [{**one, "annotations": {"Helpfulness": {"Rating": rating}}} for one in as_list]
        with pytest.raises(BadRow) as caught:
            draft({**row, "completions": same})
        assert caught.value.reason == reason


def test_unknown_columns_are_named_with_the_remedy():
    with pytest.raises(
        DataError, match=r"no known preference format in columns photo, ask; .*--map image=photo"
    ):
        schemas.detect(["photo", "ask"], {"photo": 1, "ask": 2}, "here")
    plain_text = {"image": PICTURE, "text": "a caption, no JSON"}
    with pytest.raises(DataError, match="no known preference format"):
        schemas.detect(plain_text, plain_text, "here")


def test_videos_are_refused(tmp_path):
    row = {**ROWS["TRL"], "videos": ["x.mp4"]}
    with pytest.raises(DataError, match="videos; vlmdpo trains on images: sample frames"):
        schemas.detect(row, row, "here")
    for prompt in (
        "<video>What?",
        [_said("user", [{"type": "video"}, {"type": "text", "text": "What?"}])],
    ):
        with pytest.raises(BadRow) as caught:
            check(UncheckedPair(None, prompt, "good", "bad"), tmp_path)
        assert caught.value.reason == "video"


def test_a_mapping_reaches_into_rows(tmp_path):
    row = {"photo": PICTURE, "ask": "What?", "answers": [{"text": "good"}, {"text": "bad"}]}
    mapping = {
        "image": "photo",
        "question": "ask",
        "chosen": "answers.0.text",
        "rejected": "answers.-1.text",
    }
    schema = sent(schemas.mapped(mapping, list(row), row, "here"))
    pair = check(schema.unchecked_pair(row), tmp_path)
    assert (pair.images, text_of(pair.chosen), text_of(pair.rejected)) == (
        (PICTURE,),
        "good",
        "bad",
    )
    with pytest.raises(BadRow) as caught:
        check(schema.unchecked_pair({**row, "answers": [{"text": "good"}]}), tmp_path)
    assert caught.value.reason == "identical_answers"  # one answer is the first and the last
    with pytest.raises(
        DataError, match="--map wants column 'asked' as question; found photo, ask, answers"
    ):
        schemas.mapped({**mapping, "question": "asked"}, list(row), row, "here")


def _draft(**changes):
    return UncheckedPair(
        **{"images": PICTURE, "prompt": "What?", "chosen": "good", "rejected": "bad", **changes}
    )


TWO_TURNS = [_said("user", "<image>One?"), _said("assistant", "Yes"), _said("user", "<image>Two?")]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chosen": " "}, "empty_chosen"),
        ({"rejected": None}, "empty_rejected"),
        ({"prompt": ""}, "empty_prompt"),
        ({"prompt": None}, "empty_prompt"),
        ({"prompt": "<image>"}, "empty_prompt"),
        ({"rejected": "good "}, "identical_answers"),
        ({"images": ""}, "missing_image"),
        ({"images": "absent.png"}, "missing_image"),
        ({"images": 7}, "unreadable_image"),
        ({"prompt": "<image><image>What?"}, "placeholder_miscount"),
        ({"prompt": TWO_TURNS}, "placeholder_miscount"),
        ({"images": None, "prompt": "<image>What?"}, "placeholder_miscount"),
        ({"chosen": "good <image>"}, "placeholder_miscount"),
        ({"prompt": [_said("tool", "out")]}, "unknown_role"),
        ({"prompt": [_said("user", "What?"), _said("assistant", "Hm")]}, "prompt_without_question"),
        (
            {"chosen": [_said("assistant", "a"), _said("user", "b"), _said("assistant", "c")]},
            "answer_not_one_turn",
        ),
        ({"prompt": [_said("user", [{"type": "audio"}])]}, "unknown_message"),
        ({"prompt": 7}, "unknown_message"),
        ({"chosen": ["good"]}, "unknown_message"),
    ],
)
def test_bad_rows_have_a_reason(changes, reason, tmp_path):
    with pytest.raises(BadRow) as caught:
        check(_draft(**changes), tmp_path)
    assert caught.value.reason == reason


def test_several_turns_and_images_keep_their_places(tmp_path):
    second = encoded((5, 5))
    pair = check(
        _draft(images=[PICTURE, {"bytes": second}], prompt=TWO_TURNS, system="Be brief."), tmp_path
    )
    assert [turn["role"] for turn in pair.prompt] == ["system", "user", "assistant", "user"]
    assert [text_of(turn) for turn in pair.prompt] == [
        "Be brief.",
        "<image>\nOne?",
        "Yes",
        "<image>\nTwo?",
    ]
    assert pair.images == (PICTURE, second)
    front = check(_draft(images=[PICTURE, second]), tmp_path)
    assert text_of(front.prompt[0]) == "<image>\n<image>\nWhat?"


def test_rows_without_an_image_are_accepted_and_noted(tmp_path):
    for nothing in (None, [], {"bytes": None, "path": None}):
        pair = check(_draft(images=nothing), tmp_path)
        assert (pair.images, pair.notes) == ((), ("no_image",))


def test_keys_identify_duplicates_and_swapped_copies(tmp_path):
    key, swapped, pictures = check(_draft(), tmp_path).keys()
    again = check(_draft(chosen="bad", rejected="good"), tmp_path).keys()
    assert again == (swapped, key, pictures)
    others = [_draft(prompt="Which?"), _draft(images=encoded((5, 5))), _draft(chosen="best")]
    assert key not in {check(other, tmp_path).keys()[0] for other in others}
    bare = check(_draft(images=None), tmp_path).keys()
    assert bare[2] == check(_draft(images=None, chosen="best"), tmp_path).keys()[2] != pictures


def test_images_in_a_column_of_another_name_are_not_lost():
    row = {"question": "What?", "chosen": "good", "rejected": "bad"}
    for cell in (PICTURE, {"bytes": PICTURE, "path": None}, [PICTURE]):
        with pytest.raises(DataError, match=r"'photo' seems to hold images.*add --map image=photo"):
            schemas.detect([], {**row, "photo": cell}, "here")
    assert schemas.detect([], {**row, "photo": b"no image", "n": 1}, "here").name == "RLAIF-V"
    draft = schemas.mapped({"question": "question"}, row, {**row, "img_path": PICTURE}, "here")
    assert draft.unchecked_pair({**row, "img_path": PICTURE}).images == PICTURE


def test_columns_are_listed_in_part():
    with pytest.raises(DataError, match=r"x{80}…, .* and 81 more") as caught:
        schemas.detect([], {"x" * 999: 1, **{f"c{number}": 1 for number in range(100)}}, "here")
    assert len(str(caught.value)) < 500


CELLS = (
    *(None, float("nan"), float("inf"), 0, 7, 2.0, True, 10**30, "", " ", "x", "a\0", "\ud83d"),
    *(
        b"",
        b"x",
        [],
        [None],
        [[]],
        [7],
        ["x"],
        [["x"]],
        {},
        {"a": 1},
        {"bytes": 7},
        [{}],
        [{"a": 1}],
    ),
    *({"role": "user"}, {"role": ["user"], "content": 7}, {"from": "human", "value": [7]}),
    *([{"role": "user", "content": {"type": []}}], [{"role": "user", "content": [{"text": 7}]}]),
    *({"response": ["x"], "annotations": 7}, [{"annotations": {"a": {"Rating": []}}}], '["', "{"),
    *({"type": "image", "image": {"url": {}}}, [[7, 8]], [["x", None]], "<image>", "<video>"),
)


@pytest.mark.parametrize("name", list(ROWS))
def test_whatever_a_cell_holds_a_row_is_read_or_has_a_reason(name, tmp_path):
    """Every column with every kind of cell, alone and with another."""
    row = {
        **ROWS[name],
        **dict.fromkeys(("system", "history", "voted_at", "image", "rejected_images")),
    }
    row |= ROWS[name]
    draft = schemas.detect(ROWS[name], ROWS[name], "here").unchecked_pair
    reasons, longest = set(), 0
    columns = [*row, "image.bytes", "videos"]
    for column in columns:
        for number, cell in enumerate(CELLS):
            other = columns[number % len(columns)]
            for changes in ({column: cell}, {column: cell, other: CELLS[-number]}):
                try:
                    check(draft({**row, **changes}), tmp_path)
                except BadRow as problem:
                    reasons.add(problem.reason)
                    longest = max(longest, len(str(problem)))
    assert len(reasons) > 6
    assert longest < 300
