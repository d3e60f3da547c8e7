"""A run read again from its folder: its recipe, its data and its model."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from .build import AnyData, build_data
from .checkpoints import CheckpointFolder, RunError, random_state
from .recipe import Data, Recipe, check
from .run_training import load_model
from .train_command import parse_recipe
from .trainer import Trainer


def read_recipe(folder: Path, command: str = "eval") -> Recipe:
    """Return the recipe in a run's config.yaml; `command` opens the messages of errors, here and below.

    Raises:
        ValueError: it is missing, or no recipe.
        ImportError: jsonargparse is missing.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{command}: {folder} holds no run (no {path.name}); give a folder that latephase train wrote")
    try:
        return check(parse_recipe([str(path)])[0])
    except ValueError as error:
        raise ValueError(f"{command}: {path} is no recipe: {error}") from None


def read_data(data: Data, command: str = "eval") -> tuple[AnyData, AnyData]:
    """Return a run's training and test set.

    Raises:
        ValueError, OSError: see build_data.
    """
    try:
        return build_data(data)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{command}: {error}; where it lies elsewhere, give --data") from None


def load_final_model(
    folder: Path, recipe: Recipe, train: AnyData, device: str, *, last: bool = False, command: str = "eval"
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a run's model, and what it was read from.

    The newest whole checkpoint holds the members. Without any there is still the plain model, model.safetensors.

    Args:
        folder: of the run.
        recipe: from its config.yaml.
        train: the training data; SWA's statistics are recomputed from them.
        device: where the model shall be.
        last: of an SWA run the last weights, not their average.

    Returns:
        The model, and {"weights": "checkpoint" or "model.safetensors", "epoch": a checkpoint's, "finished": whether
        this is the run's end}.

    Raises:
        RunError: there is neither, or what is there does not fit the recipe.
        OSError: the folder cannot be read.
    """
    plain, checkpoints, saved = folder / "model.safetensors", folder / "checkpoints", None
    if checkpoints.is_dir():
        try:
            saved = CheckpointFolder(checkpoints).load(device)
        except RunError as error:
            if not plain.exists():
                raise
            warnings.warn(f"{error}; using {plain.name} instead", stacklevel=2)
    if last and saved is None:
        raise RunError(f"{command}: {folder} has no checkpoint, and {plain.name} has no last weights; leave out --last")
    model_alone = dataclasses.replace(recipe.model, weights=None)  # those it started from are not wanted
    recipe = dataclasses.replace(recipe, model=model_alone, compile=False, cuda_graph=False)
    trainer = Trainer(recipe, train, device)
    if saved is not None:
        with _fitting(checkpoints, command):
            # The generators' states are of the training machine's devices, and nothing here draws from them.
            trainer.load_state_dict({**saved[0], "random": random_state()})
        weights = "last weights of the checkpoint" if last else "checkpoint"
        source = {"weights": weights, "epoch": trainer.epoch, "finished": trainer.minibatch == trainer.total}
        model = trainer.model if last else trainer.final_model()
        trainer.task.close()
        return model, source
    if plain.exists():
        with _fitting(plain, command):
            load_model(trainer.model, plain)
        return trainer.model, {"weights": plain.name, "epoch": None, "finished": True}
    raise RunError(f"{command}: {folder} has neither a checkpoint nor {plain.name}; train first, or resume")


@contextlib.contextmanager
def _fitting(path: Path, command: str) -> Iterator[None]:
    """Name the file where its content has other keys or shapes than the recipe's model, or none."""
    try:
        from safetensors import SafetensorError
    except ModuleNotFoundError:
        raise ImportError(
            f"{command}: reading a run needs safetensors; pip install 'latephase_kernels[train]'"
        ) from None
    try:
        yield
    except (RuntimeError, KeyError, ValueError, SafetensorError) as error:
        raise RunError(
            f"{command}: {path} does not fit the run's config.yaml, or is damaged; was one of them changed? "
            f"({error!s:.200})"
        ) from error
