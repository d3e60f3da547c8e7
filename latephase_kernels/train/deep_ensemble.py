"""Several finished runs as one model: their class probabilities are averaged.

Source: Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles", 2017.
"""

import copy
import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .. import late_phase as lp
from ..nn.routing import is_expanded
from ..reference.precision import wide
from .recipe import Recipe


class DeepEnsemble(nn.Module):
    """Whole models of equal task; those with late-phase members are collapsed.

    Args:
        models: K of them, plain or expanded; they are copied.
    """

    def __init__(self, models: Iterable[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(_plain(model) for model in models)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, classes], here the logarithms of the mean of the models' class probabilities."""
        return lp.ensemble_probabilities(torch.stack([wide(model(x)) for model in self.models])).log()


def _plain(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).eval()
    return lp.collapse(model) if is_expanded(model) else model


def deep_ensemble_recipe(recipes: Sequence[Recipe], *, last: bool = False) -> Recipe:
    """Return the recipe under whose name and seed an ensemble of runs is reported: those of the first.

    Args:
        recipes: of the runs.
        last: the ensemble is of last weights, not of averages over time: by another name.

    Raises:
        ValueError: the runs differ in more than their seeds, or two have the same.
    """
    first, seeds = recipes[0], [recipe.seed for recipe in recipes]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"eval: the runs of an ensemble must have different seeds, got {seeds}")
    for recipe in recipes[1:]:
        alike = dataclasses.replace(recipe, seed=first.seed, data=first.data)
        if alike != first or recipe.data.name != first.data.name:
            raise ValueError(
                f"eval: the runs of an ensemble must be of one recipe, but {recipe.name} with seed {recipe.seed} and "
                f"{first.name} with seed {first.seed} differ in more than that"
            )
    return dataclasses.replace(first, name=f"{first.name}{'_last' if last else ''}_deep_ensemble", dropout_passes=0)
