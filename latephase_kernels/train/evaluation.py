"""How well a model predicts: accuracy, negative log-likelihood, calibration; averaged, ensemble and each member."""

import math
from collections.abc import Iterable

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


def evaluate(model: nn.Module, images: DeviceImages, batch_size: int) -> dict[str, dict[str, float]]:
    """Return the metrics of every way to predict.

    Args:
        model: plain or expanded.
        images: the test set.
        batch_size: images a forward pass; an expanded model runs it for all members.

    Returns:
        "averaged" (one model), and of an expanded one also "ensemble" (mean of the members' probabilities),
        "members" (mean over members of each one's metrics) and "member 0", ….
    """
    labels = images.labels
    averaged = logits_of(model, images.batches(batch_size))
    results = {"averaged": metrics_of(averaged.double().softmax(-1), labels)}
    if any(isinstance(module, Routed) for module in model.modules()):
        logits = logits_of(model, images.batches(batch_size), "all")
        results["ensemble"] = metrics_of(lp.ensemble_probabilities(logits.double()), labels)
        single = [metrics_of(part.double().softmax(-1), labels) for part in logits]
        results["members"] = {key: math.fsum(one[key] for one in single) / len(single) for key in single[0]}
        results.update({f"member {k}": one for k, one in enumerate(single)})
    return results
