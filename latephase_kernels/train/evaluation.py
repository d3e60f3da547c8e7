"""How well a model predicts, and how well it knows when it does not: averaged, ensemble and each member.

Legend: K members, N images.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import late_phase as lp
from ..data.device_images import DeviceImages
from ..nn.routing import Routed

CALIBRATION_BINS = 15


def metrics_of(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy (%), NLL (nats), ECE (%, 15 bins) and Brier score of class probabilities.

    Args:
        probabilities: [N, classes]
        labels: [N] int64

    Raises:
        ImportError: torchmetrics is missing.
    """
    try:
        from torchmetrics.functional.classification import multiclass_calibration_error
    except ModuleNotFoundError:
        raise ImportError("evaluation needs torchmetrics; pip install 'latephase_kernels[train]'") from None
    probabilities = probabilities.double()
    chosen = probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    one_hot = torch.nn.functional.one_hot(labels, probabilities.size(1))
    calibration = multiclass_calibration_error(
        probabilities.float(), labels, probabilities.size(1), n_bins=CALIBRATION_BINS, norm="l1"
    )
    return {
        "accuracy": 100.0 * (probabilities.argmax(1) == labels).double().mean().item(),
        "nll": -chosen.clamp_min(torch.finfo(torch.float64).tiny).log().mean().item(),
        "ece": 100.0 * calibration.item(),
        "brier": (probabilities - one_hot).square().sum(1).mean().item(),
    }


@torch.no_grad()
def logits_of(model: nn.Module, data: Iterable[tuple[Tensor, Tensor]], members: str | int = "average") -> Tensor:
    """Return the logits of a plain or expanded model in eval mode: [N, classes], or [K, N, classes] for "all"."""
    expanded = any(isinstance(module, Routed) for module in model.modules())
    training = model.training
    try:
        if expanded:
            parts = [lp.predict(model, images, members=members).float() for images, _ in data]
        else:
            model.eval()
            parts = [model(images).float() for images, _ in data]
    finally:
        model.train(training)
    return torch.cat(parts, dim=-2)


@dataclass(frozen=True)
class Answers:
    """What a model says of one set of images.

    Attributes:
        averaged: one model's logits, [N, classes].
        members: each member's, [K, N, classes]; None for a plain model.
    """

    averaged: Tensor
    members: Tensor | None

    def entropies(self) -> dict[str, Tensor]:
        """Return the predictive entropy in nats, [N] float64, of "averaged" and, with members, "ensemble"."""
        found = {"averaged": lp.predictive_entropy(self.averaged.double().unsqueeze(0))}
        if self.members is not None:
            found["ensemble"] = lp.predictive_entropy(self.members.double())
        return found

    def disagreement(self) -> float | None:
        """Return the share of pairs of members that predict different classes, over all images; None for K < 2."""
        if self.members is None or len(self.members) < 2:
            return None
        return lp.member_disagreement(self.members.double()).mean().item()


def answers_of(model: nn.Module, images: DeviceImages, batch_size: int) -> Answers:
    """Return a plain or expanded model's answers to a set.

    Args:
        model: plain or expanded.
        images: the set.
        batch_size: images a forward pass; an expanded model runs it for all members.
    """
    expanded = any(isinstance(module, Routed) for module in model.modules())
    return Answers(
        logits_of(model, images.batches(batch_size)),
        logits_of(model, images.batches(batch_size), "all") if expanded else None,
    )


def metrics_of_answers(answers: Answers, labels: Tensor) -> dict[str, dict[str, float]]:
    """Return the metrics of every way to predict.

    Args:
        answers: to N images.
        labels: [N] int64

    Returns:
        "averaged" (one model), and of an expanded one also "ensemble" (mean of the members' probabilities),
        "members" (mean over members of each one's metrics) and "member 0", ….
    """
    results = {"averaged": metrics_of(answers.averaged.double().softmax(-1), labels)}
    if answers.members is not None:
        results["ensemble"] = metrics_of(lp.ensemble_probabilities(answers.members.double()), labels)
        single = [metrics_of(part.double().softmax(-1), labels) for part in answers.members]
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
    try:
        from torchmetrics.functional.classification import binary_auroc
    except ModuleNotFoundError:
        raise ImportError("evaluation needs torchmetrics; pip install 'latephase_kernels[train]'") from None
    entropies = torch.cat([inside, outside])
    if not entropies.isfinite().all():
        return math.nan
    # torchmetrics takes scores beyond [0, 1] for logits, and its sigmoid would round small entropies to ties.
    scores = (entropies / math.log(num_classes)).clamp(0.0, 1.0)
    foreign = torch.cat([torch.zeros_like(inside), torch.ones_like(outside)]).long()
    return binary_auroc(scores, foreign).item()
