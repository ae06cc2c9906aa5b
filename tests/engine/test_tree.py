"""Trees of texts: where each token lies, what it sees, and that training on them is stock TRL's."""

import pytest
import torch

from tests.support.engines import (
    RANKING,
    RELATED,
    assert_same,
    pairs,
    related_pairs,
    step,
    stock_step,
    trainer,
)
from vlmdpo.engine import forward, tree_attention
from vlmdpo.engine.batch import batch_tokens
from vlmdpo.engine.collate import PairCollator
from vlmdpo.engine.tree import ROOT, Forest, GrowingTree, ancestry, common_beginning
from vlmdpo.engine.tree_layout import TreeLayout
from vlmdpo.tiny import random_models
from vlmdpo.training import engine_checks

CPU = torch.device("cpu")
# 0: the picture, 1 and 4: questions, 2, 3 and 5: answers; 6 and 7: a tree of one prompt and answer.
FOREST = Forest(
    parents=(ROOT, 0, 1, 1, 0, 4, ROOT, 6),
    lengths=(5, 2, 3, 4, 1, 2, 3, 1),
    prompts=(1, 4, 6),
    answers=(2, 3, 5, 7),
    images=(2, 1),
)


def causal(batch, head, query, key):
    return key <= query


def windowed(batch, head, query, key):
    return (key <= query) & (query - key < 3)


def test_each_slot_knows_its_index_in_a_row_of_its_own():
    layout = TreeLayout(FOREST, CPU)
    index = layout.slot_index.split(FOREST.lengths)
    assert [part.tolist() for part in index] == [
        *([0, 1, 2, 3, 4], [5, 6], [7, 8, 9], [7, 8, 9, 10], [5], [6, 7]),
        *([0, 1, 2], [3]),
    ]
    assert layout.row_mask.sum(1).tolist() == [11, 8, 4], "prompt and longest answer"
    assert layout.answer_slots[:, 0].tolist() == [6, 6, 14, 19], "the prompt's last token"
    assert layout.answer_slots[1].tolist() == [6, 10, 11, 12, 13]
    assert layout.image_rows() == [0, 1, 0, 1, 2], "each row's images"
    assert FOREST.tree_lengths == [17, 4]


def test_values_go_to_rows_and_back():
    layout = TreeLayout(FOREST, CPU)
    ids = torch.arange(1, FOREST.slots + 1)[None]
    rows = layout.slots_to_rows(ids)
    assert rows[1].tolist() == [1, 2, 3, 4, 5, 15, 16, 17, 0, 0, 0]
    positions = torch.arange(rows.shape[1]).expand(3, *rows.shape)  # M-RoPE's shape
    back = layout.rows_to_slots(positions)
    assert back.shape == (3, 1, FOREST.slots)
    assert torch.equal(back[0, 0], layout.slot_index)


@pytest.mark.parametrize("mask_function", [causal, windowed])
def test_attention_is_that_of_rows_of_their_own(mask_function):
    layout = TreeLayout(FOREST, CPU)
    query, key, value = torch.randn(3, 1, 2, FOREST.slots, 4).unbind(0)
    seen = ancestry(FOREST.parents)
    node = torch.repeat_interleave(torch.arange(8), torch.tensor(FOREST.lengths))
    index = layout.slot_index
    allowed = seen[node[:, None], node[None]] & mask_function(0, 0, index[:, None], index[None])
    sdpa = torch.nn.functional.scaled_dot_product_attention
    expected = sdpa(query, key, value, allowed).transpose(1, 2)
    given = []

    def attention(module, q, k, v, mask, **kwargs):
        given.append(mask)
        return sdpa(q, k, v, mask, is_causal=mask is None and q.shape[2] > 1).transpose(1, 2), None

    mask = layout.mask(mask_function, CPU)
    found, _ = mask.attend(attention, False, torch.nn.Identity(), query, key, value)
    assert torch.allclose(found, expected, atol=1e-6)
    assert [run.nodes for run in layout.runs] == [(0, 1, 2), (3,), (4, 5), (6, 7)]
    if mask_function is causal:
        # What its query sees is all there is, or its square is plainly causal: no mask.
        assert [m is None for m in given] == [True, False, False, True]


def test_a_causal_block_needs_no_mask_on_a_gpu():
    layout = TreeLayout(FOREST, torch.device("meta"))  # any device but the CPU
    blocks = layout.mask(causal, torch.device("meta")).blocks
    masks = [tree_attention._attention_mask(block, layout.slot_index, None) for block in blocks]
    assert masks[0] is masks[3] is None
    for mask, block in zip(masks[1:3], blocks[1:3], strict=True):
        assert isinstance(mask, torch.nn.attention.bias.CausalBias)
        assert (mask.seq_len_q, mask.seq_len_kv) == (block.queries, block.keys)
        assert mask.variant == torch.nn.attention.bias.CausalVariant.LOWER_RIGHT


def test_a_growing_tree_s_nodes_see_their_ancestors():
    tree = GrowingTree(2, [0, 0, 1], CPU)  # two questions, and an answer to the first
    tree.extend(torch.tensor([1, 1, 2]), torch.tensor([2, 3, 2]))
    first = tree.mask(causal, CPU)
    assert first[0, 0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    tree.extend(torch.tensor([3, 2]), torch.tensor([4, 3]))
    assert len(tree) == 7
    assert tree.mask(causal, CPU)[0, 0].int().tolist() == [
        [1, 1, 1, 1, 0, 1, 0],
        [1, 1, 0, 0, 1, 0, 1],
    ]


def test_a_common_beginning_leaves_each_text_a_token():
    assert common_beginning(["abcd", "abxd", "abc"]) == 2
    assert common_beginning(["abc", "abcde"]) == 2
    assert common_beginning(["abc", "xbc"]) == 0


def collated(rows, family="llava", **options):
    return PairCollator(random_models.make(family)[1], **options)([dict(row) for row in rows])


def test_rows_of_one_picture_are_one_tree():
    batch = collated(related_pairs(*RELATED))
    forest = batch["forest"]
    assert len(forest.roots) == 3
    assert len(forest.prompts) == 4
    assert forest.images == (1, 1, 0)
    assert len(forest.answers) == 10, "two of twelve are there twice"
    assert batch["pixel_values"].shape[0] == 2, "each picture once"
    assert len(batch["input_ids"]) == len(batch["order"]) == 12
    stock, run = batch_tokens(batch)
    assert (stock, run) == (int(batch["attention_mask"].sum()), batch["tree_ids"].shape[1])
    assert run < stock / 2


def test_pictures_are_told_apart_by_their_pixels():
    rows = [dict(row) for row in related_pairs((0, 0, 0, 1), (0, 1, 2, 3))]
    other = rows[1]["images"][0].copy()
    other.putpixel((0, 0), (1, 2, 3))
    for images, trees in ((rows[0]["images"], 1), ([other], 2)):
        rows[1]["images"] = images
        assert len(collated(rows)["forest"].roots) == trees


def test_prompts_that_begin_otherwise_have_pictures_of_their_own(monkeypatch):
    # The question stands before the picture, so that its tokens are not among the common ones.
    def render(self, example):
        text = example["prompt"][0]["content"][-1]["text"]
        return {"prompt": f"{text}<image>:", "chosen": "c", "rejected": "r"}

    monkeypatch.setattr(PairCollator, "render", render)
    rows = related_pairs((0, 0, 0, 1), (0, 1, 2, 3))
    batch = collated(rows)
    assert len(batch["forest"].roots) == 2
    assert batch["pixel_values"].shape[0] == 2
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])


def test_a_model_that_reads_both_ways_shares_equal_prompts_only():
    forest = collated(related_pairs(*RELATED), share_beginnings=False)["forest"]
    assert len(forest.roots) == len(forest.prompts) == 4


SHAPES = {
    "one prompt, two answers": [(0, 0, 0, 1)],
    "one prompt, four answers, six pairs": RANKING,
    "one prompt, eight answers": [(0, 0, *pair) for pair in ((0, 1), (2, 3), (4, 5), (6, 7))],
    "three questions": [(0, 0, 0, 1), (0, 1, 2, 3), (0, 2, 4, 5)],
    "no picture": [(None, 0, 0, 1), (None, 0, 0, 2), (None, 1, 3, 4)],
}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("shape", SHAPES)
def test_trees_of_any_shape_train_as_stock_trl(shape, family, tmp_path):
    rows = related_pairs(*SHAPES[shape], pictures=2 if "questions" in shape else 1)
    # A small beta: what float32 leaves of the log-probs is not multiplied.
    more = {"gradient_checkpointing": "questions" in shape, "beta": 0.1}
    assert_same(
        stock_step(family, rows, tmp_path, **more),
        step(trainer(family, "shared", rows, tmp_path, **more)),
    )


def test_the_vision_part_runs_once_a_tree_forward_and_backward(tmp_path):
    rows = related_pairs(*RANKING)
    made = trainer("llava", "shared", rows, tmp_path)
    tower = made.model.get_base_model().model.vision_tower
    forward_runs, backward_runs = [], []
    tower.register_forward_hook(lambda module, inputs, out: forward_runs.append(out[0].shape[0]))
    layer = tower.encoder.layers[0].mlp
    layer.register_full_backward_hook(lambda *_: backward_runs.append(1))
    step(made)
    assert forward_runs == [1, 1], "one picture: once for the policy, once for the reference"
    assert len(backward_runs) == 1


class Leaking(TreeLayout):
    """The last answer sees the one before it."""

    def sees(self, run):
        nodes = super().sees(run)
        last = self.forest.answers_of(0)[-1]
        before = self.forest.answers_of(0)[-2]
        return tuple(sorted({*nodes, before})) if run.nodes[-1] == last else nodes


class Questioning(TreeLayout):
    """The last question sees the first."""

    def sees(self, run):
        nodes, prompts = super().sees(run), self.forest.prompts
        return tuple(sorted({*nodes, prompts[0]})) if prompts[-1] in nodes else nodes


class Shifted(TreeLayout):
    """The last answer's positions are two too large."""

    def rows_to_slots(self, rows):
        found = super().rows_to_slots(rows).clone()
        found[..., -self.forest.lengths[-1] :] += 2
        return found


MISTAKES = {
    "an answer sees its brother": Leaking,
    "a question sees another": Questioning,
    "shifted positions": Shifted,
    "a swapped picture": None,
}


@pytest.mark.parametrize("family", ["idefics2", "llava", "qwen2_5_vl", "gemma3"])
def test_the_self_check_catches_planted_mistakes_in_bfloat16(family, tmp_path, monkeypatch):
    rows = related_pairs((0, 0, 0, 1), (0, 1, 2, 3), (0, 0, 0, 4), answer=30, seed=11)
    made = trainer(family, "shared", rows, tmp_path, bf16=True)
    examples = [dict(row) for row in rows]
    sound = engine_checks.check_shared_forward(made, examples)
    assert sound.passed, sound
    for mistake, layout in MISTAKES.items():
        with monkeypatch.context() as patched:
            if layout is None:
                collate = PairCollator.__call__
                patched.setattr(
                    PairCollator,
                    "__call__",
                    lambda self, rows: engine_checks.other_pixels(collate(self, rows)),  # noqa: B023
                )
            else:
                patched.setattr(forward, "TreeLayout", layout)
            found = engine_checks.check_shared_forward(made, examples)
        assert not found.passed, (mistake, found)


def test_the_check_names_what_it_broke(tmp_path):
    rows = related_pairs((0, 0, 0, 1), (0, 1, 2, 3))
    made = trainer("llava", "shared", rows, tmp_path)
    seen = engine_checks.check_shared_forward(made, [dict(row) for row in rows]).seen
    for broken in ("an answer sees another", "a question sees another", "shifted", "other image"):
        assert broken in seen


def test_rows_without_anything_in_common_stay_apart():
    forest = collated(pairs(3))["forest"]
    assert len(forest.roots) == len(forest.prompts) == 3
    assert len(forest.answers) == 6
