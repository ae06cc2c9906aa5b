"""How the next token of each answer is chosen, as `generate` chooses it: the likeliest, or drawn.

Each answer draws from a generator of its own on the CPU, so that its tokens depend neither on the
answers beside it nor on the device.

Shapes: K active answers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from vlmdpo.engine.leaves import Leaf
from vlmdpo.engine.sampling import Sampling


class TokenChooser:
    """Chooses next tokens by a model's settings.

    Args:
        config: the model's generation settings.
        sampling: how answers are chosen.
    """

    def __init__(self, config: GenerationConfig, sampling: Sampling) -> None:
        penalty = config.repetition_penalty
        self._penalty = (
            RepetitionPenaltyLogitsProcessor(penalty) if penalty not in (None, 1.0) else None
        )
        self._sampling = sampling
        self._warpers = warpers(config, sampling)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether `generate` chooses the same tokens by itself."""
        return self._sampling.is_greedy

    def penalize(self, leaves: Sequence[Leaf], logits_KV: Tensor) -> Tensor:
        """(K, V) scores in float32, as `generate` has them: with the model's repetition penalty."""
        scores_KV = logits_KV.float()
        if self._penalty is None:
            return scores_KV
        rows = [
            self._penalty(torch.tensor([leaf.ids], device=row.device), row[None])
            for leaf, row in zip(leaves, scores_KV, strict=True)
        ]
        return torch.cat(rows)

    def choose(self, leaves: Sequence[Leaf], scores_KV: Tensor) -> list[int]:
        """The next token of each answer, by its scores."""
        if self._sampling.is_greedy:
            tokens: list[int] = scores_KV.argmax(dim=-1).tolist()
            return tokens
        no_ids = torch.empty(0)  # these look at scores only
        chances_KV = self._warpers(no_ids, scores_KV).softmax(dim=-1).cpu()
        return [
            int(torch.multinomial(row, 1, generator=leaf.draws))
            for leaf, row in zip(leaves, chances_KV, strict=True)
        ]


def warpers(config: GenerationConfig, sampling: Sampling) -> LogitsProcessorList:
    """What `generate` applies to scores before it draws, given `sampling.options()`, in its order.

    A model's own settings hold where `sampling` has none: min_p and its like. Its top_k does not.
    """
    found: list[LogitsProcessor] = []
    if sampling.is_greedy:
        return LogitsProcessorList(found)
    if sampling.temperature != 1.0:
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if (top_h := getattr(config, "top_h", None)) is not None:
        found.append(TopHLogitsWarper(top_h=top_h))
    if sampling.top_p < 1.0:
        found.append(TopPLogitsWarper(top_p=sampling.top_p))
    if config.min_p is not None:
        found.append(MinPLogitsWarper(min_p=config.min_p))
    if config.typical_p is not None and config.typical_p < 1.0:
        found.append(TypicalLogitsWarper(mass=config.typical_p))
    if config.epsilon_cutoff is not None and 0.0 < config.epsilon_cutoff < 1.0:
        found.append(EpsilonLogitsWarper(epsilon=config.epsilon_cutoff))
    if config.eta_cutoff is not None and 0.0 < config.eta_cutoff < 1.0:
        found.append(EtaLogitsWarper(epsilon=config.eta_cutoff))
    return LogitsProcessorList(found)


class ChosenTokens(LogitsProcessor):
    """Within a greedy `generate`: leaves each row only the token that a chooser chose for it.

    Scores come with the model's own processors applied, its repetition penalty among them.

    Args:
        leaves: the answer of each row.
    """

    def __init__(self, chooser: TokenChooser, leaves: Sequence[Leaf]) -> None:
        self.chooser, self.leaves = chooser, leaves

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = self.chooser.choose(self.leaves, scores)
        chosen = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)
