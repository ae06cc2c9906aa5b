"""Digests of weights: the same for the same, another for any difference."""

import itertools

import pytest
import torch

from vlmdpo.models import digest
from vlmdpo.models.digest import tensors_digest, weights_digest
from vlmdpo.tiny import random_models


@pytest.fixture(params=["in memory", "on a GPU"], autouse=True)
def where(request, monkeypatch):
    """Both ways of hashing; the one for GPUs runs on any device."""
    if request.param == "on a GPU":
        monkeypatch.setattr(digest, "_is_in_memory", lambda tensor: False)
    return request.param


def test_every_difference_is_seen():
    torch.manual_seed(0)
    plain = torch.randn(30_001, dtype=torch.float32)
    last, swapped, moved, sign = plain.clone(), plain.clone(), plain.clone(), plain.clone()
    last[-1] += 1e-6
    swapped[[10, 20_000]] = plain[[20_000, 10]]
    moved[100:110], moved[20_100:20_110] = plain[20_100:20_110], plain[100:110]
    sign[7] = -sign[7]
    made = {
        "plain": plain,
        "another dtype": plain.bfloat16(),
        "last": last,
        "swapped": swapped,
        "moved": moved,
        "sign": sign,
        "shape": plain.reshape(1, -1),
        "shorter": plain[:-1],
        "shifted": plain.roll(1),
        "zeros": torch.zeros_like(plain),
        "fewer zeros": torch.zeros(10),
        "none": torch.zeros(0),
        "flag": torch.zeros(10, dtype=torch.bool),
    }
    digests = {name: tensors_digest([("w", tensor)]) for name, tensor in made.items()}
    for (one, first), (other, second) in itertools.combinations(digests.items(), 2):
        assert first != second, (one, other)
    assert tensors_digest([("v", plain)]) != digests["plain"]
    two = [("a", plain), ("b", last)]
    assert tensors_digest(two) != tensors_digest([("a", last), ("b", plain)])


def test_it_depends_on_values_only():
    torch.manual_seed(0)
    plain = torch.randn(64, 33)
    expected = tensors_digest([("w", plain)])
    assert tensors_digest([("w", plain.T.contiguous().T)]) == expected
    inside = torch.zeros(64 * 33 + 1)
    inside[1:] = plain.flatten()  # begins in the middle of a word
    assert tensors_digest([("w", inside[1:].view(64, 33))]) == expected
    before = plain.clone()
    tensors_digest([("w", plain)])
    assert torch.equal(plain, before)


def test_parts_of_a_tensor_are_hashed_as_the_whole(monkeypatch):
    plain = torch.arange(1000, dtype=torch.float64)
    expected = tensors_digest([("w", plain)])
    monkeypatch.setattr(digest, "_WORDS", 7)
    assert tensors_digest([("w", plain)]) == expected


def test_weights_stay_where_they_are(where, monkeypatch):
    """Only the sums leave the device."""
    model, _ = random_models.make("llava")
    copied = []
    to_cpu = torch.Tensor.cpu

    def cpu(self, *rest):
        copied.append(self.numel())
        return to_cpu(self, *rest)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    assert weights_digest(model) == weights_digest(random_models.make("llava")[0])
    assert set(copied) == ({2} if where == "on a GPU" else set())
