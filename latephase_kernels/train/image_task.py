"""Image classification: device-resident minibatches, cross entropy, accuracy and calibration."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .. import late_phase as lp
from ..data import DeviceImages, EvaluationImages, ImageBatches, ImageFiles, ImageSet
from .build import build_network, check_network
from .evaluation import Answers, answers_of, dropout_logits_of, logits_of, metrics_of_answers, metrics_of_logits
from .image_input import evaluation_images, memory_format_of, training_batches
from .ranks import Ranks
from .recipe import Recipe
from .task import Evaluation, Task, autocast, cross_entropies, looking

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

    def losses(self, model: nn.Module, inputs: Tensor, targets: Tensor, rows: slice) -> Tensor:
        with autocast(self.device, self.recipe.precision):
            logits = model(inputs)
        return cross_entropies(logits, targets, self.recipe).view(-1, self.batches.batch_size).mean(1)

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


class _Share:
    """Of a set of images, the batches that are this rank's; if none, the first, for the shape of the answer."""

    def __init__(self, images: DeviceImages | EvaluationImages, ranks: Ranks):
        self.images, self.ranks = images, ranks

    def batches(self, batch_size: int, look: Callable[[], None] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        count = -(-len(self.images) // batch_size)
        own = self.ranks.share(count) or range(1)
        batches = self.images.batches(batch_size, own)
        if look is None:
            yield from batches
            return
        yield from looking(batches, look)
        for _ in range(len(own), -(-count // self.ranks.num_ranks)):  # other ranks have one more
            look()

    def whole(self, logits: Tensor, batch_size: int) -> Tensor:
        """Return [·, N, classes] of all images from that of this rank's batches."""
        return self.ranks.rows_of_all(logits, len(self.images), batch_size)


class ImageEvaluation(Evaluation):
    """The test set, normalized as the training data.

    Args:
        recipe: checked.
        train: for its mean and std.
        test: the test set, or the validation images.
        ranks: the processes that evaluate together, a share of the images each; the model is on their device.
    """

    def __init__(
        self,
        recipe: Recipe,
        train: ImageSet | ImageFiles,
        test: ImageSet | ImageFiles,
        ranks: Ranks,
    ):
        self.recipe, self.classes = recipe, train.classes
        self.images = evaluation_images(recipe, train, test, ranks.device)
        self.share = _Share(self.images, ranks)

    def progress(self, model: nn.Module, look: Callable[[], None]) -> tuple[dict[str, float], str]:
        logits = self.share.whole(logits_of(model, self.share.batches(EVALUATION_BATCH, look)), EVALUATION_BATCH)
        found = metrics_of_logits(logits, self.images.labels)
        return {f"test {key}": value for key, value in found.items()}, f"test accuracy {found['accuracy']:.2f} %"

    def final(self, model: nn.Module) -> tuple[dict[str, dict[str, float]], Tensor]:
        own = answers_of(model, self.share, EVALUATION_BATCH)
        passes, dropout = self.recipe.dropout_passes, None
        if passes:  # what is dropped follows from the order of all images
            dropout = dropout_logits_of(model, self.images, EVALUATION_BATCH, passes=passes, seed=self.recipe.seed)
        assert own.averaged is not None  # of one model
        averaged = self.share.whole(own.averaged, EVALUATION_BATCH)
        members = None if own.members is None else self.share.whole(own.members, EVALUATION_BATCH)
        return metrics_of_answers(Answers(averaged, members, dropout), self.images.labels), averaged

    def logits(self, model: nn.Module) -> Tensor:
        return logits_of(model, self.images.batches(EVALUATION_BATCH))

    def close(self) -> None:
        if isinstance(self.images, EvaluationImages):
            self.images.close()
