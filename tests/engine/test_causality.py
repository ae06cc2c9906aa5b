"""Which of transformers' mask functions are plainly causal."""

from functools import partial

import pytest
import torch
from transformers import masking_utils as masks

from vlmdpo.engine import causality
from vlmdpo.engine.causality import is_plainly_causal


def causal_by_hand(batch, head, query, key, *, reach):
    return (key <= query) & (key > query - reach)


@pytest.mark.parametrize(
    ("make", "causal_up_to"),
    [
        (lambda: masks.causal_mask_function, 10**9),
        (lambda: masks.sliding_window_causal_mask_function(5), 5),
        (lambda: masks.sliding_window_causal_mask_function(7), 7),
        (lambda: masks.and_masks(masks.causal_mask_function, masks.sliding_window_overlay(3)), 3),
        (lambda: masks.bidirectional_mask_function, 1),
        (lambda: partial(causal_by_hand, reach=4), 4),
    ],
)
@pytest.mark.parametrize("order", [(1, 3, 5, 4, 6, 9), (9, 6, 4, 5, 3, 1)])
def test_a_function_of_indices_is_evaluated(make, causal_up_to, order, monkeypatch):
    monkeypatch.setattr(causality, "_known", {})
    for slots in order * 2:  # made anew for every forward pass, as transformers does
        assert is_plainly_causal(make(), slots) == (slots <= causal_up_to), slots
    assert len(causality._known) <= 1


def test_a_function_of_the_batch_is_not_looked_into():
    blocks = masks.blockwise_overlay(torch.full((1, 8), -1))
    assert not is_plainly_causal(masks.or_masks(masks.causal_mask_function, blocks), 8)
    assert not is_plainly_causal(masks.chunked_overlay(4, torch.zeros(1, dtype=torch.long)), 8)
