"""Image classification: device-resident minibatches, cross entropy, accuracy and calibration."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import late_phase as lp
from ..data import EvaluationImages, ImageBatches, ImageFiles, ImageSet
from .build import build_network, check_network
from .evaluation import answers_of, logits_of, metrics_of, metrics_of_answers
from .image_input import evaluation_images, memory_format_of, training_batches
from .recipe import Recipe
from .task import Evaluation, Task, autocast

EVALUATION_BATCH = 250  # images a forward pass; times K for all members


class ImageTask(Task):
    """Labelled images, augmented on the device.

    Args:
        recipe: checked.
        train: its images go to the device, all at once or minibatch by minibatch.
        device: where to train.
        rank, num_ranks: which share of every minibatch is this process's; see DeviceBatches.
    """

    unit = "images"

    def __init__(
        self,
        recipe: Recipe,
        train: ImageSet | ImageFiles,
        device: torch.device,
        *,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.recipe, self.device = recipe, device
        self.num_classes, self.in_channels = len(train.classes), train.num_channels
        self._train = train
        self.batches = training_batches(recipe, train, device, rank=rank, num_ranks=num_ranks)
        self.units_per_minibatch = recipe.batch_size

    def set_share(self, rank: int, num_ranks: int) -> None:
        self.close()
        self.batches = training_batches(self.recipe, self._train, self.device, rank=rank, num_ranks=num_ranks)

    def build_network(self) -> nn.Module:
        model, images = self.recipe.model, self._train
        network = build_network(model, self.num_classes, self.in_channels)
        network = network.to(self.device).to(memory_format=memory_format_of(self.recipe))
        size = self.recipe.images.size
        sizes = (self.in_channels, size, size) if isinstance(images, ImageFiles) else tuple(images.images.shape[1:])
        check_network(network, model.name, sizes, self.num_classes)
        return network

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor, rows: slice) -> Tensor:
        with autocast(self.device, self.recipe.precision):
            logits = model(inputs)
        # Every member has as many images, so the sum of the means is the sum of all over that number.
        losses = F.cross_entropy(
            logits.float() if logits.dtype != torch.float64 else logits,
            targets,
            reduction="sum",
            label_smoothing=self.recipe.label_smoothing,
        )
        return losses / self.batches.batch_size

    def update_statistics(self, model: nn.Module, expanded: bool) -> None:
        per_epoch = self.batches.minibatches_per_epoch
        first = self.recipe.epochs * per_epoch  # an order and an augmentation that training has not seen
        images = (self.batches.stack(first + number, 1)[0] for number in range(per_epoch))
        with torch.random.fork_rng():  # dropout draws the same whenever this is called
            torch.manual_seed(self.recipe.seed)
            if expanded:
                lp.update_bn(images, model)
            else:
                torch.optim.swa_utils.update_bn(images, model)

    def counts(self) -> dict[str, int]:
        batches = self.batches
        counted = isinstance(batches, ImageBatches) and batches.num_corrupt
        return {"corrupt images": batches.num_corrupt} if counted else {}

    def close(self) -> None:
        if isinstance(self.batches, ImageBatches):
            self.batches.close()


class ImageEvaluation(Evaluation):
    """The test set, normalized as the training data.

    Args:
        recipe: checked.
        train: for its mean and std.
        test: the test set, or the validation images.
        device: where the model is.
    """

    def __init__(
        self,
        recipe: Recipe,
        train: ImageSet | ImageFiles,
        test: ImageSet | ImageFiles,
        device: str | torch.device,
    ):
        self.recipe = recipe
        self.images = evaluation_images(recipe, train, test, device)

    def progress(self, model: nn.Module) -> tuple[dict[str, float], str]:
        found = metrics_of(self.logits(model).double().softmax(-1), self.images.labels)
        return {f"test {key}": value for key, value in found.items()}, f"test accuracy {found['accuracy']:.2f} %"

    def final(self, model: nn.Module) -> tuple[dict[str, dict[str, float]], Tensor]:
        recipe = self.recipe
        answers = answers_of(
            model, self.images, EVALUATION_BATCH, dropout_passes=recipe.dropout_passes, seed=recipe.seed
        )
        assert answers.averaged is not None  # of one model
        return metrics_of_answers(answers, self.images.labels), answers.averaged

    def logits(self, model: nn.Module) -> Tensor:
        return logits_of(model, self.images.batches(EVALUATION_BATCH))

    def close(self) -> None:
        if isinstance(self.images, EvaluationImages):
            self.images.close()
