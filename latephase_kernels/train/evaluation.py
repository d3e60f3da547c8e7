"""How well a model predicts, and how well it knows when it does not: averaged, ensemble and each member.

Legend: K members, N images.
"""

import contextlib
import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .. import late_phase as lp
from ..late_phase.kept_state import training_flags_kept
from ..nn.routing import is_expanded
from ..reference.precision import wide
from .deep_ensemble import DeepEnsemble

CALIBRATION_BINS = 15
IMAGES_AT_ONCE = 4096  # whose probabilities are in float64: a thousand classes and ten members take 330 MB


class Batches(Protocol):
    """Images in batches of at most so many, with their labels."""

    def batches(self, batch_size: int, /) -> Iterable[tuple[Tensor, Tensor]]: ...


def _classification() -> Any:
    """Return torchmetrics' functions.

    Raises:
        ImportError: it is missing.
    """
    try:
        return importlib.import_module("torchmetrics.functional.classification")
    except ModuleNotFoundError:
        raise ImportError("evaluation needs torchmetrics; pip install 'latephase_kernels[train]'") from None


def metrics_of(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy (%), NLL (nats), ECE (%, 15 bins) and Brier score of class probabilities.

    Args:
        probabilities: [N, classes]
        labels: [N] int64

    Raises:
        ImportError: torchmetrics is missing.
    """
    probabilities = wide(probabilities)
    labels = labels.to(probabilities.device)
    chosen = probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    one_hot = torch.nn.functional.one_hot(labels, probabilities.size(1))
    calibration = _classification().multiclass_calibration_error(
        probabilities.float(), labels, probabilities.size(1), n_bins=CALIBRATION_BINS, norm="l1"
    )
    return {
        "accuracy": 100.0 * (probabilities.argmax(1) == labels).double().mean().item(),
        "nll": -chosen.clamp_min(torch.finfo(torch.float64).tiny).log().mean().item(),
        "ece": 100.0 * calibration.item(),
        "brier": (probabilities - one_hot).square().sum(1).mean().item(),
    }


def metrics_of_logits(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return what metrics_of does for logits [N, classes], whose softmax is taken in float64."""
    return metrics_of(wide(logits).softmax(-1), labels)


def logits_of(model: nn.Module, data: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the logits [N, classes] of a plain model, or of an expanded one's average, in eval mode."""
    return _logits_of(model, data, ["average"])[0]


@torch.no_grad()
def _logits_of(model: nn.Module, data: Iterable[tuple[Tensor, Tensor]], ways: Sequence[str | int]) -> list[Tensor]:
    """Return what logits_of does for several choices of members, reading every image once."""
    expanded = is_expanded(model)
    parts: list[list[Tensor]] = [[] for _ in ways]
    with training_flags_kept(model):
        model.eval()
        for images, _ in data:
            for part, members in zip(parts, ways, strict=True):
                logits = lp.predict(model, images, members=members) if expanded else model(images)
                part.append(logits.float())
    return [torch.cat(part, dim=-2) for part in parts]


def _by_images(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Return [N, *] of logits [·, N, classes], wide for a few thousand images at a time."""
    return torch.cat([function(wide(part)) for part in logits.split(IMAGES_AT_ONCE, dim=1)])


@dataclass(frozen=True)
class Answers:
    """What a model says of one set of images.

    Attributes:
        averaged: one model's logits, [N, classes]; None for an ensemble of whole models, which have no average.
        members: each member's, [K, N, classes]; None for a plain model.
        dropout: those of S passes with dropout, [S, N, classes]; None where none was asked for.
    """

    averaged: Tensor | None
    members: Tensor | None
    dropout: Tensor | None = None

    def ways(self) -> dict[str, Tensor]:
        """Return the logits, [·, N, classes], whose probabilities are averaged in each way to predict."""
        single = None if self.averaged is None else self.averaged.unsqueeze(0)
        ways = {"averaged": single, "ensemble": self.members, "MC-dropout": self.dropout}
        return {way: logits for way, logits in ways.items() if logits is not None}

    def entropies(self) -> dict[str, Tensor]:
        """Return the predictive entropy in nats, [N] float64, of every way to predict."""
        return {way: _by_images(lp.predictive_entropy, logits) for way, logits in self.ways().items()}

    def disagreement(self) -> float | None:
        """Return the share of pairs of members that predict different classes, over all images; None for K < 2."""
        if self.members is None or len(self.members) < 2:
            return None
        return _by_images(lp.member_disagreement, self.members).mean().item()


def dropout_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that drop at random, but for those whose probability is 0."""
    return [module for module in model.modules() if isinstance(module, _DropoutNd) and module.p > 0]


@torch.no_grad()
def dropout_logits_of(model: nn.Module, images: Batches, batch_size: int, *, passes: int, seed: int) -> Tensor:
    """Return the logits of passes in eval mode but for dropout, [passes, N, classes]; an expanded model's averaged.

    Args:
        model: plain or expanded.
        images: the set, N images.
        batch_size: images a forward pass.
        passes: S.
        seed: of what is dropped; the global generators are as before afterwards.

    Source: Gal & Ghahramani, ICML 2016 (MC-dropout).
    """
    averaged = lp.members(model, "average") if is_expanded(model) else contextlib.nullcontext()
    with training_flags_kept(model), averaged, torch.random.fork_rng():
        torch.manual_seed(seed)
        model.eval()
        for layer in dropout_layers(model):
            layer.train()
        parts = [[model(batch).float() for batch, _ in images.batches(batch_size)] for _ in range(passes)]
    return torch.stack([torch.cat(part) for part in parts])


def answers_of(
    model: nn.Module,
    images: Batches,
    batch_size: int,
    *,
    dropout_passes: int = 0,
    seed: int = 0,
) -> Answers:
    """Return a model's answers to a set.

    Args:
        model: plain, expanded, or a DeepEnsemble, whose models are the members.
        images: the set.
        batch_size: images a forward pass; an expanded model runs it for all members.
        dropout_passes: of MC-dropout; 0 for none.
        seed: of what these drop.
    """
    if isinstance(model, DeepEnsemble):
        return Answers(None, torch.stack([logits_of(one, images.batches(batch_size)) for one in model.models]))
    ways = ["average", "all"] if is_expanded(model) else ["average"]
    averaged, *members = _logits_of(model, images.batches(batch_size), ways)
    return Answers(
        averaged,
        members[0] if members else None,
        dropout_logits_of(model, images, batch_size, passes=dropout_passes, seed=seed) if dropout_passes else None,
    )


def metrics_of_answers(answers: Answers, labels: Tensor) -> dict[str, dict[str, float]]:
    """Return the metrics of every way to predict.

    Args:
        answers: to N images.
        labels: [N] int64

    Returns:
        "averaged" (one model); with members "ensemble" (mean of the members' probabilities), "members" (mean over
        members of each one's metrics) and "member 0", …; "MC-dropout" (mean over passes with dropout).
    """
    results = {
        way: metrics_of(_by_images(lp.ensemble_probabilities, logits), labels) for way, logits in answers.ways().items()
    }
    if answers.members is not None:
        single = [metrics_of_logits(part, labels) for part in answers.members]
        results["members"] = {key: math.fsum(one[key] for one in single) / len(single) for key in single[0]}
        results.update({f"member {k}": one for k, one in enumerate(single)})
    return results


def detection_auroc(inside: Tensor, outside: Tensor, num_classes: int) -> float:
    """Return the area under the ROC curve of telling a foreign image by its high entropy.

    That is P(outside > inside) + P(outside = inside) / 2 for one image of each set: 0.5 is chance, 1 perfect.

    Args:
        inside: predictive entropies of the set the model was trained for, [N] float64, nats.
        outside: those of another set, [M] float64.
        num_classes: bounds the entropy by its logarithm.

    Returns:
        0 … 1; nan where an entropy is not finite.

    Raises:
        ImportError: torchmetrics is missing.
    """
    entropies = torch.cat([inside, outside])
    if not entropies.isfinite().all():
        return math.nan
    # torchmetrics takes scores beyond [0, 1] for logits, and its sigmoid would round small entropies to ties.
    scores = (entropies / math.log(num_classes)).clamp(0.0, 1.0)
    foreign = torch.cat([torch.zeros_like(inside), torch.ones_like(outside)]).long()
    return _classification().binary_auroc(scores, foreign).item()
