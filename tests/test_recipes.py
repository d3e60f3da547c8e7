"""Every recipe of the package is read; those of images in memory are built at a tiny size and trained through T0."""

import dataclasses
import functools
import math

import pytest
import torch

from latephase_kernels.data import ImageSet
from latephase_kernels.late_phase.optimizers import member_parameters
from latephase_kernels.nn import HyperConv2d, HyperLinear, MemberLinear, Rank1Conv2d, Rank1Linear
from latephase_kernels.train.recipe import RECIPES, Data, Late, Model, Optimizer, Schedule, Swa, check, recipe_names
from latephase_kernels.train.train_command import as_yaml, parse_recipe
from latephase_kernels.train.trainer import Trainer

yaml, _ = pytest.importorskip("yaml"), pytest.importorskip("jsonargparse")
TINY = {
    "wide_resnet": {"depth": 10, "width": 1},
    "hyper_wide_resnet": {"depth": 10, "width": 1},
    "small_resnet": {"widths": [4, 4]},
}
IMAGE_RECIPES = [name for name in recipe_names() if parse_recipe([name])[0].model.name in TINY]
METHODS = {"", "_base", "_swa", "_swa_base", "_dropout", "_batch_ensemble", "_from_start", "_rank1", "_hypernetwork"}


def tiny(recipe):
    """The recipe with a network of a few channels, two members, three epochs of four minibatches."""
    shrink = 3 / recipe.epochs
    options = {**recipe.model.options, **TINY[recipe.model.name]}
    start = None if recipe.late.start is None else float(round(shrink * recipe.late.start))
    return check(
        dataclasses.replace(
            recipe,
            model=dataclasses.replace(recipe.model, options=options),
            batch_size=2,
            epochs=3,
            late=dataclasses.replace(recipe.late, members=2, start=start),
            swa=Swa(None if recipe.swa.start is None else 2),
        )
    )


@pytest.mark.parametrize("name", IMAGE_RECIPES)
def test_a_recipe_trains(name):
    recipe = tiny(parse_recipe([name])[0])
    side, channels = 8 if recipe.data.name == "digits" else 16, 3 if recipe.data.name.startswith("cifar") else 1
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (8, channels, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.arange(8) % 4
    data = ImageSet(images, labels, ("a", "b", "c", "d"), (0.5,) * channels, (0.3,) * channels)
    trainer = Trainer(recipe, data)
    while trainer.minibatch < trainer.total:
        assert trainer.expanded <= (recipe.late.start is not None and trainer.epoch >= recipe.late.start)
        trainer.step()
    assert trainer.expanded == (recipe.late.start is not None)
    assert (trainer.averaged is not None) == (recipe.swa.start is not None)
    assert math.isfinite(trainer.read_loss()[0])
    if trainer.expanded:
        kinds = {type(m) for m in trainer.model.modules() if any(True for _ in _own_members(m))}
        for target, among in {
            "rank1": (Rank1Conv2d, Rank1Linear),
            "head": (MemberLinear,),
            "embedding": (HyperConv2d, HyperLinear),
        }.items():
            assert any(issubclass(kind, among) for kind in kinds) == (target in recipe.late.targets), target
        assert any("BatchNorm" in kind.__name__ for kind in kinds) == ("batch_norm" in recipe.late.targets)
        late = list(member_parameters(trainer.model))
        parted = [parameter for parameter in late if not torch.equal(parameter[0], parameter[1])]
        # Not all: a gain in front of a batch norm has next to no gradient, and a dead unit none.
        assert all(len(parameter) == 2 for parameter in late) and len(parted) > len(late) / 2


def _own_members(module):
    return getattr(module, "replicated_parameters", dict)().values()


def test_the_set_is_complete():
    for data in ("cifar10", "cifar100", "digits"):
        assert {data + method for method in METHODS} <= set(IMAGE_RECIPES)
    assert {f"fashion_mnist{method}" for method in ("", "_base", "_swa", "_swa_base")} <= set(IMAGE_RECIPES)
    for name in recipe_names():
        recipe, _ = parse_recipe([name])
        assert check(recipe).name == name
        assert (RECIPES / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize(
    "name, width, cutout, epochs, start, anneal, end_lr, swa_start, late_decay",  # decay of members: None is the base's
    [
        ("cifar10", 10, 0, 200, 120, (100, 180), 0.001, None, None),
        ("cifar100", 10, 0, 200, 120, (100, 180), 0.001, None, 5e-3),
        ("cifar10_swa", 10, 0, 200, 100, (80, 144), 0.05, 161, None),
        ("cifar100_swa", 10, 0, 200, 100, (80, 144), 0.05, 161, None),
        ("cifar10_wide_swa", 14, 16, 300, 120, (80, 240), 0.05, 241, None),
        ("cifar100_wide_swa", 14, 16, 300, 120, (80, 240), 0.05, 241, None),
    ],
)
def test_cifar_recipes_are_the_published_ones(
    name, width, cutout, epochs, start, anneal, end_lr, swa_start, late_decay
):
    """Whole sections are compared, so that nothing of the training is added either. No value deviates."""
    recipe, _ = parse_recipe([name])
    assert recipe.data == Data(name.split("_")[0], crop_padding=4, flip=True, cutout=cutout)
    assert recipe.model == Model("wide_resnet", {"depth": 28, "width": width}, weights=None)
    assert recipe.optimizer == Optimizer("sgd", 0.1, 0.9, nesterov=True, weight_decay=5e-4, clip_norm=None)
    assert recipe.schedule == Schedule(*anneal, end_lr, drop_epochs=[], members_follow=True)
    assert dataclasses.replace(recipe.late, fuse=True, member_chunk=None) == Late(
        start=start,
        members=10,
        targets=["batch_norm", "head"],
        noise_std=0.0,
        base_grad_scale="sum",
        lr=None,
        weight_decay=late_decay,
        member_state="fresh",
    )
    assert recipe.swa == Swa(swa_start, per_epoch=1)
    assert (recipe.epochs, recipe.batch_size, recipe.accumulate) == (epochs, 128, 1)
    assert (recipe.label_smoothing, recipe.precision, recipe.dropout_passes) == (0.0, "float32", 0)


HYPERNETWORK = {"model.name": "hyper_wide_resnet", "late.targets": ["embedding"], "late.weight_decay": None}
BATCH_ENSEMBLE = {"start": 0, "members": 4, "targets": ["rank1", "batch_norm"], "noise_std": 0.5, "weight_decay": 0.0}


@pytest.mark.parametrize(
    "published, method, differences",
    [
        ("cifar*", "_base", {"late.start": None}),
        ("cifar*_swa", "_base", {"late.start": None}),
        ("cifar*", "_from_start", {"late.start": 0}),
        ("cifar*", "_hypernetwork", HYPERNETWORK),
        ("cifar100_swa", "_hypernetwork", HYPERNETWORK),
        # What follows is this project's choice of settings, no published one.
        ("cifar*", "_rank1", {"late.targets": ["rank1"], "late.weight_decay": None}),
        ("cifar*", "_batch_ensemble", {f"late.{option}": value for option, value in BATCH_ENSEMBLE.items()}),
        ("cifar*", "_dropout", {"late.start": None, "model.options.dropout": 0.3, "dropout_passes": 10}),
    ],
)
def test_other_cifar_recipes_differ_from_the_published_ones_in_the_method_alone(published, method, differences):
    for data in ("10", "100"):
        recipe, _ = parse_recipe([published.replace("*", data) + method])
        expected = dataclasses.asdict(parse_recipe([published.replace("*", data)])[0])
        for option, value in {"name": recipe.name, **differences}.items():
            *sections, last = option.split(".")
            functools.reduce(dict.__getitem__, sections, expected)[last] = value
        assert dataclasses.asdict(recipe) == expected


def test_a_recipe_changes_another():
    """What a derived recipe does not name is its base's, over two generations."""
    plain, dropout = parse_recipe(["cifar10_base"])[0], parse_recipe(["cifar10_dropout"])[0]
    assert plain == dataclasses.replace(
        parse_recipe(["cifar10"])[0], name="cifar10_base", late=dataclasses.replace(plain.late, start=None)
    )
    assert dropout.model.options == {"depth": 28, "width": 10, "dropout": 0.3}
    assert dataclasses.replace(dropout, name=plain.name, model=plain.model, dropout_passes=0) == plain
    assert yaml.safe_load(as_yaml(dropout)).keys() == {field.name for field in dataclasses.fields(dropout)}


def test_bases_of_ones_own(tmp_path):
    mine, other = tmp_path / "mine.yaml", tmp_path / "other.yaml"
    mine.write_text("base: digits_swa\nname: mine\nlate: {members: 3}\n")
    recipe, own = parse_recipe([str(mine), "--seed=4"])
    assert (recipe.name, recipe.late.members, recipe.late.start, recipe.swa.start) == ("mine", 3, 50, 81)
    assert recipe.seed == 4 and "base" not in own
    mine.write_text(f"base: {other}\n"), other.write_text(f"base: {mine}\n")
    with pytest.raises(ValueError, match=r"mine.yaml is its own base; base must be another recipe"):
        parse_recipe([str(mine)])
    mine.write_text("base: nothing\n")
    with pytest.raises(ValueError, match="there is no recipe 'nothing'"):
        parse_recipe([str(mine)])
    other.write_text("base: digits\n")
    for argument in ("--base=digits", f"--config={other}"):
        with pytest.raises(ValueError, match="base must stand in the recipe's own file"):
            parse_recipe(["cifar10", argument])
