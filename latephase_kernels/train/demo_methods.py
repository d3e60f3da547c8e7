"""The runs that `latephase demo` compares: base training up to T0, and from there SGD, SWA and late-phase weights.

The hyperparameters are stated once, below, in the proportions of the paper's CIFAR recipes (T0 at 60 % of the training,
the learning rates, weight decay and γ_θ); what the methods share is the same number, and none was tuned on its own.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss
from torch.optim.swa_utils import AveragedModel, update_bn

from .. import late_phase as lp
from ..data import Minibatches, split_digits
from ..data.digits import BACKGROUND, Split
from ..models import SmallResNet
from .demo_report import METHODS, Curve, MethodResult
from .progress import Progress


@dataclass(frozen=True)
class Hyperparameters:
    """Everything that decides the result. An epoch is one pass over the training set; T0 = base_epochs."""

    num_train: int = 300
    batch_size: int = 20  # images in a minibatch; a member's minibatch has as many
    shift: int = 1  # largest random shift of a training image, pixels
    base_epochs: int = 48
    late_epochs: int = 32  # after T0, each method alike
    learning_rate: float = 0.1  # until T0, base and late-phase weights
    momentum: float = 0.9  # Nesterov
    weight_decay: float = 5e-4  # base and late-phase weights
    end_learning_rate: float = 0.001  # sgd, late_phase: linear from T0 …
    anneal_share: float = 0.75  # … over this share of the late epochs, then constant
    swa_end_learning_rate: float = 0.05
    swa_anneal_share: float = 0.3
    swa_start_share: float = 0.5  # the share of the late epochs after which averaging starts
    base_gradient_scale: str = "sum"  # γ_θ = 1, as in the paper's CIFAR runs
    noise_std: float = 0.0  # σ0: members start equal
    num_base_evaluations: int = 3  # points of the curves before T0
    num_late_evaluations: int = 6  # and after


QUICK = Hyperparameters(base_epochs=2, late_epochs=2, num_base_evaluations=1, num_late_evaluations=2)


def accuracy_and_nll(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return accuracy in % and mean negative log-likelihood.

    Args:
        logits: [N, classes] of one model, or [K, N, classes]: then the mean over K of softmax(logits) predicts.
        labels: [N]
    """
    log_probabilities = logits.double().log_softmax(-1)
    if logits.dim() == 3:
        log_probabilities = log_probabilities.logsumexp(0) - math.log(len(logits))
    correct = (log_probabilities.argmax(-1) == labels).double().mean()
    return 100 * correct.item(), nll_loss(log_probabilities, labels).item()


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in eval mode; an expanded model answers as its collapsed one. Leaves the model in train mode."""
    model.eval()
    logits = model(images)
    model.train()
    return logits


def linear_anneal(start: float, end: float, share: float) -> Callable[[float], float]:
    """Learning rate over the progress p in [0, 1] after T0: linear from start to end at p = share, then constant."""
    return lambda p: end + (start - end) * max(0.0, 1 - p / share)


@dataclass
class Run:
    """A model in training: what moves it on, and what it has cost."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    minibatches: Iterator[tuple[Tensor, Tensor]]  # endless
    loss: Callable[[Tensor, Tensor], Tensor]
    learning_rate: Callable[[int], float]  # of the images seen
    progress: Progress
    images_seen: int = 0
    seconds: float = 0.0  # training alone, no testing
    curve: Curve = field(default_factory=Curve)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of a with-block as training."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    def train_until(self, images_seen: int) -> None:
        """Take steps until so many images were seen."""
        first_image = self.images_seen
        with self.timed():
            while self.images_seen < images_seen:
                images, labels = next(self.minibatches)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate(self.images_seen)
                self.optimizer.zero_grad()
                self.loss(self.model(images), labels).backward()
                self.optimizer.step()
                self.images_seen += len(images)
        self.progress.advance(self.images_seen - first_image)

    def test(self, split: Split, model: nn.Module | None = None) -> None:
        """Add a point to the curve: the run's model, or another in its place."""
        logits = logits_of(self.model if model is None else model, split.test_images)
        self.curve.add(self.images_seen, *accuracy_and_nll(logits, split.test_labels))


def endless(loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pass over a loader again and again."""
    while True:
        yield from loader


class SeedRun:
    """All methods of one seed. The seed decides the split, the initial weights, the order and the shifts."""

    def __init__(
        self, hp: Hyperparameters, num_members: int, seed: int, digits: tuple[Tensor, Tensor], progress: Progress
    ):
        self.hp, self.num_members, self.seed, self.progress = hp, num_members, seed, progress
        self.split = split_digits(*digits, num_train=hp.num_train, seed=seed)
        self.epoch_images = hp.num_train // hp.batch_size * hp.batch_size
        self.base_images = hp.base_epochs * self.epoch_images
        self.late_images = late_images(hp, num_members)

    def loader(self, stream: int) -> Minibatches:
        """The training minibatches; the same stream gives the same ones."""
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        images, labels, hp = self.split.train_images, self.split.train_labels, self.hp
        return Minibatches(images, labels, hp.batch_size, shift=hp.shift, fill=BACKGROUND, generator=generator)

    def train_base(self) -> Run:
        """Train to T0."""
        self.progress.begin(f"seed {self.seed}: base training")
        hp = self.hp
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = SmallResNet()
        minibatches = endless(self.loader(stream=0))
        run = Run(
            model, self.new_optimizer(model), minibatches, cross_entropy, lambda _: hp.learning_rate, self.progress
        )
        for point in range(1, hp.num_base_evaluations + 1):
            run.train_until(self.base_images * point // hp.num_base_evaluations)
            run.test(self.split)
        return run

    def new_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        hp = self.hp
        return torch.optim.SGD(
            model.parameters(), lr=hp.learning_rate, momentum=hp.momentum, nesterov=True, weight_decay=hp.weight_decay
        )

    def continue_from(self, base: Run, method: str, end_learning_rate: float, anneal_share: float) -> Run:
        """A copy of the base run as it was at T0, with a learning rate for what follows."""
        self.progress.begin(f"seed {self.seed}: {METHODS[method]}")
        model = copy.deepcopy(base.model)
        optimizer = self.new_optimizer(model)
        optimizer.load_state_dict(base.optimizer.state_dict())
        anneal = linear_anneal(self.hp.learning_rate, end_learning_rate, anneal_share)

        def learning_rate(images_seen: int) -> float:
            return anneal((images_seen - base.images_seen) / self.late_images)

        minibatches = endless(self.loader(stream=1))
        run = Run(model, optimizer, minibatches, cross_entropy, learning_rate, self.progress, base.images_seen)
        run.curve = copy.deepcopy(base.curve)
        return run

    def late_points(self) -> list[int]:
        """The numbers of images seen at which the curves after T0 have a point; the last one is the end."""
        count = self.hp.num_late_evaluations
        return [self.base_images + self.late_images * point // count for point in range(1, count + 1)]

    def result(self, run: Run, curve: Curve) -> MethodResult:
        """The end of a curve, and what the training since T0 took."""
        return MethodResult(curve.accuracy[-1], curve.nll[-1], run.seconds, self.late_images / run.seconds, curve)

    def train_sgd(self, base: Run) -> MethodResult:
        """Go on with plain SGD."""
        run = self.continue_from(base, "sgd", self.hp.end_learning_rate, self.hp.anneal_share)
        for point in self.late_points():
            run.train_until(point)
            run.test(self.split)
        return self.result(run, run.curve)

    def train_swa(self, base: Run) -> MethodResult:
        """Stochastic weight averaging by PyTorch's own tools; its curve shows the average from the first one on."""
        hp = self.hp
        run = self.continue_from(base, "swa", hp.swa_end_learning_rate, hp.swa_anneal_share)
        averaged = AveragedModel(run.model)
        start = self.base_images + int(hp.swa_start_share * self.late_images)
        end = self.base_images + self.late_images
        epoch_ends = {*range(start + self.epoch_images, end, self.epoch_images), end}
        points = set(self.late_points())
        for stop in sorted(epoch_ends | points):
            run.train_until(stop)
            if stop in epoch_ends:
                with run.timed():
                    averaged.update_parameters(run.model)
            if stop in points and averaged.n_averaged > 0:
                # Recomputing before the end serves the curve alone.
                with run.timed() if stop == end else nullcontext():
                    update_bn(self.loader(stream=2), averaged)
                run.test(self.split, averaged)
            elif stop in points:
                run.test(self.split)
        return self.result(run, run.curve)

    def train_late_phase(self, base: Run) -> tuple[MethodResult, MethodResult, nn.Module, Tensor]:
        """Replicate, train stacked, collapse.

        Returns:
            The averaged model's and the ensemble's results, the collapsed model, and the test logits before collapsing.
        """
        hp, num_members = self.hp, self.num_members
        run = self.continue_from(base, "late_phase", hp.end_learning_rate, hp.anneal_share)
        targets = ("batch_norm", "head")
        lp.expand(run.model, num_members, targets=targets, noise_std=hp.noise_std, optimizers=(run.optimizer,))
        lp.set_base_grad_scale(run.optimizer, run.model, hp.base_gradient_scale)
        run.minibatches = endless(lp.stack_batches(self.loader(stream=1), num_members))
        run.loss = lambda output, target: lp.member_loss(cross_entropy, output, target, num_members=num_members)
        for point in self.late_points():
            run.train_until(point)
            run.test(self.split)
        ensemble_curve = Curve()
        with torch.no_grad():
            member_logits = lp.predict(run.model, self.split.test_images, members="all")
        ensemble_curve.add(run.images_seen, *accuracy_and_nll(member_logits, self.split.test_labels))
        before = logits_of(run.model, self.split.test_images)
        with run.timed():
            lp.collapse(run.model, mode="exact")
        return self.result(run, run.curve), self.result(run, ensemble_curve), run.model, before


def late_images(hp: Hyperparameters, num_members: int) -> int:
    """Images every method sees after T0: late_epochs, less what would not fill a stacked batch of K minibatches.

    Raises:
        ValueError: not even one stacked batch.
    """
    available = hp.late_epochs * (hp.num_train // hp.batch_size)
    if not 1 <= num_members <= available:
        raise ValueError(f"demo: the number of members must be from 1 to {available}, got {num_members}")
    return available // num_members * num_members * hp.batch_size
