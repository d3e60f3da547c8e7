"""Runs of the Trainer in float64 on several ranks, or on one."""

import signal

import test_text_task
import torch

from latephase_kernels.data import ImageSet
from latephase_kernels.train import image_task
from latephase_kernels.train.checkpoints import CheckpointFolder
from latephase_kernels.train.ranks import SeveralRanks
from latephase_kernels.train.recipe import Data, Late, Model, Optimizer, Parallel, Recipe, Schedule, Swa, check
from latephase_kernels.train.sharded_checkpoints import ShardedCheckpointFolder
from latephase_kernels.train.trainer import Trainer

K, B = 4, 8


def data():
    """42 images: 5 minibatches of 8 an epoch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (42, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.randint(3, (42,), generator=generator), ("a", "b", "c"), (0.5,), (0.3,))


def recipe(parallel=None, **changes):
    """Four epochs of 5 minibatches; T0 after 7, then three steps of 4."""
    given = {
        "data": Data(name="none", crop_padding=1, flip=True, cutout=2),
        "model": Model("small_resnet", {"widths": (4, 4)}),
        "batch_size": B,
        "epochs": 4,
        "optimizer": Optimizer(lr=0.05),
        "schedule": Schedule(1.0, 3.5, 0.01),
        "late": Late(start=7 / 5, members=K, noise_std=0.1, base_grad_scale="mean", weight_decay=1e-3),
        "parallel": parallel or Parallel(),
    }
    return check(Recipe(**{**given, **changes}))


def in_double(images):
    normalize = images.normalize
    images.normalize = lambda *given: normalize(*given).double()


def trainer_of(recipe, several):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        ranks = SeveralRanks(recipe.parallel, torch.device("cpu")) if several else None
        trainer = Trainer(recipe, data(), ranks=ranks)
    finally:
        torch.set_default_dtype(before)
    set_share = trainer.task.set_share

    def set_share_and_type(*share):
        set_share(*share)
        in_double(trainer.batches.images)

    trainer.task.set_share = set_share_and_type
    in_double(trainer.batches.images)
    return trainer


def run(trainer, until=None):
    while trainer.minibatch < (until or trainer.total):
        trainer.step()
    return trainer


def outcome(trainer):
    """Every member's tensors of the final model, and the mean loss since the last reading."""
    with trainer.ranks.gathered(trainer.final_model()) as model:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss, members, _ = trainer.read_loss()
    return {**state, "loss": torch.tensor([loss, *members])}


def recipe_for(member_ranks, batch_norm, swa, skip):
    parallel = Parallel(member_ranks=member_ranks, batch_norm=batch_norm)
    return recipe(parallel, swa=Swa(2.0 if swa else None), skip_nonfinite=skip, accumulate=2 if skip else 1)


def train(member_ranks, batch_norm, swa, skip):
    return outcome(run(trainer_of(recipe_for(member_ranks, batch_norm, swa, skip), True)))


def checkpoints_of(trainer, folder):
    several = isinstance(trainer.ranks, SeveralRanks)
    return ShardedCheckpointFolder(folder, trainer.ranks) if several else CheckpointFolder(folder)


def train_and_save(member_ranks, batch_norm, folder, steps):
    """Save at each of these minibatches, and go on to the end."""
    trainer = trainer_of(recipe_for(member_ranks, batch_norm, True, False), True)
    for step in steps:
        run(trainer, step)
        checkpoints_of(trainer, f"{folder}/{step}").save(trainer.state_dict(), trainer.minibatch)
    return outcome(run(trainer))


def resume(member_ranks, batch_norm, folder, several=True):
    trainer = trainer_of(recipe_for(member_ranks, batch_norm, True, False), several)
    state, step = checkpoints_of(trainer, folder).load()
    trainer.load_state_dict(state)
    assert trainer.minibatch == step > 0
    return outcome(run(trainer))


def evaluate(images, batch, several=True):
    """Progress, and the final metrics and logits, of so many test images in batches of this size."""
    image_task.EVALUATION_BATCH = batch
    parallel = Parallel(member_ranks=2 if several else 1, batch_norm="synchronized")
    trainer = run(trainer_of(recipe(parallel), several), 8)  # one step with members
    test = data()
    test = ImageSet(test.images[:images], test.labels[:images], test.classes, test.mean, test.std)
    evaluation = image_task.ImageEvaluation(trainer.recipe, data(), test, trainer.ranks)
    in_double(evaluation.images)
    seen = []
    batches = evaluation.images.batches
    evaluation.images.batches = lambda *given: ((seen.append(len(y)), (x, y))[1] for x, y in batches(*given))
    with trainer.ranks.gathered(trainer.model) as model:
        progress = evaluation.progress(model, lambda: trainer.ranks.any_signal(None))[0]  # all ranks as often
        metrics, logits = evaluation.final(model)
    number = signal.SIGTERM if trainer.ranks.rank == trainer.ranks.num_ranks - 1 else None
    assert trainer.ranks.any_signal(number) == signal.SIGTERM
    return progress, metrics, logits, seen


def train_on_text(member_ranks, several):
    parallel = Parallel(member_ranks=member_ranks)
    given = test_text_task.recipe(batch_size=2 * member_ranks, parallel=parallel)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        ranks = SeveralRanks(given.parallel, torch.device("cpu")) if several else None
        return outcome(run(Trainer(given, test_text_task.text(), ranks=ranks)))
    finally:
        torch.set_default_dtype(before)
