"""The methods that are compared, as data: a name and what it sets in a recipe's criterion.

Pairs are combinations of what others published, one rule for heads and one for feed-forwards, because one axis alone
does not reach low budgets. Swaps exchange one axis of ours. Ablations change one choice of ours.

One rule of tuning holds for all of them: `CANDIDATES` settings of how attention and feed-forwards share the budget are
tried on the validation split, for each method and budget, and the best is what the test split sees. Where heads and
ranks compete in one currency, that setting is the weight of a head; elsewhere it is the share of attention that stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from infoprune_export.recipe import Criterion, Recovery

Kind = Literal["ours", "pair", "swap", "ablation", "original"]

CANDIDATES = 4
_HEAD_WEIGHTS = (1.0, 0.5, 1.5, 2.0)
_SHARE_POWERS = (1.0, 0.5, 0.25, 0.0)
"""Attention keeps budget ** power: as much as everything, more, still more, all of it."""


@dataclass(frozen=True)
class Method:
    """One way of compressing.

    Attributes:
        name: In rows, tables and figures.
        kind: What it is compared as.
        fields: What it sets in `Criterion`; the rest are the defaults, which are ours.
    """

    name: str
    kind: Kind
    fields: dict[str, Any] = field(default_factory=dict, hash=False)

    def candidates(self, budget: float) -> Iterator[dict[str, Any]]:
        """The parameters that are tried on the validation split, the plain one first."""
        if Criterion(**self.fields).one_currency:
            yield from ({"head_weight": w} for w in _HEAD_WEIGHTS)
        else:
            yield from ({"head_share": round(budget**p, 4)} for p in _SHARE_POWERS)

    def criterion(self, parameters: dict[str, Any] | None = None) -> Criterion:
        """What a recipe holds for this method.

        Args:
            parameters: One of the candidates.
        """
        return Criterion(**self.fields, **(parameters or {}))

    def recovery(self, settings: Recovery) -> Recovery:
        """How its networks are trained: as ours are, except that only ours may learn which heads go."""
        return settings if self.kind == "ours" else settings.model_copy(update={"head_share": 0.0})


HEAD_RULES = {
    "random": {"heads": "random", "compensate": "none"},
    "magnitude": {"heads": "magnitude", "compensate": "none"},
    "Michel": {"heads": "michel", "compensate": "none"},
    "Taylor": {"heads": "taylor", "compensate": "none"},
    "FLAP": {"heads": "flap", "compensate": "bias"},
    "Wanda-sp": {"heads": "wanda-sp", "compensate": "none"},
}
"""As published: only FLAP makes up for what it removes."""

FFN_RULES = {
    "SVD": {"weighting": "none", "allocation": "uniform", "text_share": None},
    "ASVD": {"weighting": "asvd", "allocation": "uniform", "text_share": None},
    "SVD-LLM": {"weighting": "activation", "allocation": "uniform", "text_share": None},
    "D-Rank": {"weighting": "activation", "allocation": "d-rank", "text_share": None},
}
"""As published: every token counts the same."""

ORIGINAL = Method("original", "original")
OURS = Method("ours", "ours")
PAIRS = tuple(
    Method(f"{head} + {ffn}", "pair", HEAD_RULES[head] | FFN_RULES[ffn])
    for head, ffn in (
        ("random", "SVD"),
        ("magnitude", "SVD"),
        ("Michel", "SVD-LLM"),
        ("Taylor", "ASVD"),
        ("FLAP", "SVD-LLM"),
        ("Wanda-sp", "D-Rank"),
    )
)
# A swap of heads changes the score alone: our refit stays, or it would be compared as well.
SWAPS = (
    *(Method(f"our heads + {ffn}", "swap", fields) for ffn, fields in FFN_RULES.items()),
    *(Method(f"{head} + our ranks", "swap", {"heads": fields["heads"]}) for head, fields in HEAD_RULES.items()),
)


def _ablation(**fields: Any) -> Method:
    return Method(", ".join(f"{k} {v}" for k, v in fields.items()), "ablation", fields)


ABLATIONS = (
    _ablation(text_share=None),
    _ablation(text_share=0.5),
    _ablation(erank_weight=0.5),
    _ablation(erank_weight=1.0),
    _ablation(weighting="activation"),
    _ablation(heads="ks-activation", weighting="activation"),
    _ablation(weighting="none"),
    _ablation(allocation="uniform"),
    _ablation(allocation="d-rank"),
    _ablation(compensate="none"),
    _ablation(compensate="bias"),
    _ablation(recalibrate=False),
)
"""Each against `OURS`, which has the criterion's defaults."""

METHODS = {m.name: m for m in (ORIGINAL, OURS, *PAIRS, *SWAPS, *ABLATIONS)}
