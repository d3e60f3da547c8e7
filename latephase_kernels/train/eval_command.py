"""`latephase eval`: a run's final model, or several as an ensemble, on test data, foreign and corrupted images."""

import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import (
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    NUM_SEVERITIES,
    DeviceImages,
    EvaluationImages,
    ImageFiles,
    ImageSet,
    TextSet,
    load_cifar10,
    load_cifar10_c,
    load_cifar100,
    load_cifar100_c,
    load_lsun_resized,
    load_svhn,
    load_tiny_imagenet_resized,
)
from .build import AnyData
from .checkpoints import RunError
from .deep_ensemble import DeepEnsemble, deep_ensemble_recipe
from .eval_report import draw_entropies, format_evaluation
from .evaluation import Answers, answers_of, detection_auroc, logits_of, metrics_of_answers, metrics_of_logits
from .files import write_json
from .image_input import evaluation_images
from .image_task import EVALUATION_BATCH
from .progress import Progress
from .ranks import usable_device
from .recipe import Recipe
from .saved_run import load_final_model, read_data, read_recipe
from .text_task import TextEvaluation

OUT_OF_DISTRIBUTION: dict[str, Callable[..., ImageSet]] = {
    "svhn": load_svhn,
    "lsun": load_lsun_resized,
    "tiny_imagenet": load_tiny_imagenet_resized,
    "cifar10": partial(load_cifar10, train=False),
    "cifar100": partial(load_cifar100, train=False),
}
CORRUPTED: dict[str, Callable[..., ImageSet]] = {"cifar10": load_cifar10_c, "cifar100": load_cifar100_c}


class Findings:
    """What is known of one model, collected part by part; what cannot be evaluated is named and left out.

    Args:
        recipe: of the run.
        model: plain, expanded or a DeepEnsemble.
        test: the set it was trained for; its mean and std normalize the others, too.
        folder: where the other sets lie.
        device: where the model is.

    Attributes:
        results: of the parts evaluated so far.
        left_out: what could not be evaluated, and why.
        entropies: [N] of each way to predict, by set.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, test: ImageSet | ImageFiles, folder: str, device: str):
        self.recipe, self.model, self.test, self.folder, self.device = recipe, model, test, folder, device
        self.results: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}
        self.entropies: dict[str, dict[str, torch.Tensor]] = {}

    def _leave_out(self, what: str, reason: object) -> None:
        self.left_out[what] = " ".join(str(reason).split())
        print(f"latephase: {what} left out: {self.left_out[what]}", file=sys.stderr)

    def _images(self, data: ImageSet | ImageFiles) -> DeviceImages | EvaluationImages:
        """The set on the device, prepared as the training data.

        Raises:
            ValueError: its images are of another size than the test set's.
        """
        if isinstance(data, ImageSet):
            size = self.recipe.images.size
            expected = tuple(self.test.images.shape[1:]) if isinstance(self.test, ImageSet) else (3, size, size)
            shape = tuple(data.images.shape[1:])
            if shape != expected:
                raise ValueError(f"its images are {shape}, the run's are {expected} (channels, height, width)")
        return evaluation_images(self.recipe, self.test, data, self.device)

    def _answers(self, name: str, images: DeviceImages | EvaluationImages) -> Answers:
        passes, seed = self.recipe.dropout_passes, self.recipe.seed
        answers = answers_of(self.model, images, EVALUATION_BATCH, dropout_passes=passes, seed=seed)
        self.entropies[name] = {way: entropy.cpu() for way, entropy in answers.entropies().items()}
        return answers

    def test_set(self) -> None:
        """Accuracy, NLL, ECE and Brier score of every way to predict, and the members' disagreement."""
        images = self._images(self.test)
        answers = self._answers("test", images)
        self.results["metrics"] = metrics_of_answers(answers, images.labels)
        self.results["disagreement"] = answers.disagreement()

    def out_of_distribution(self, names: Sequence[str]) -> None:
        """Detection of foreign images by predictive entropy; after test_set.

        Args:
            names: keys of OUT_OF_DISTRIBUTION.
        """
        found = self.results["out_of_distribution"] = {}
        for name in names:
            try:
                images = self._images(OUT_OF_DISTRIBUTION[name](self.folder))
            except (OSError, ValueError, ImportError) as error:
                self._leave_out(name, error)
                continue
            answers = self._answers(name, images)
            aurocs = {
                way: detection_auroc(self.entropies["test"][way], entropy, len(self.test.classes))
                for way, entropy in self.entropies[name].items()
            }
            found[name] = {"images": len(images), "auroc": aurocs, "disagreement": answers.disagreement()}

    def corruptions(self) -> None:
        """The error of the averaged model or deep ensemble, in %, on each corruption at each severity, read in turn."""
        name = self.recipe.data.name
        if name not in CORRUPTED:
            self._leave_out("corruptions", f"there are none of {name}, only of {', '.join(CORRUPTED)}")
            return
        errors: dict[str, list[float]] = {}
        with Progress(len(CORRUPTIONS + EXTRA_CORRUPTIONS) * NUM_SEVERITIES) as progress:
            for kind in CORRUPTIONS + EXTRA_CORRUPTIONS:
                progress.begin(f"{name}, corrupted: {kind}")
                by_severity = []
                for severity in range(1, NUM_SEVERITIES + 1):
                    try:
                        images = self._images(CORRUPTED[name](self.folder, kind, severity))
                    except FileNotFoundError as error:  # the whole set
                        self._leave_out("corruptions", error)
                        return
                    except (OSError, ValueError) as error:
                        self._leave_out(kind, error)
                        break
                    logits = logits_of(self.model, images.batches(EVALUATION_BATCH))
                    by_severity.append(100.0 - metrics_of_logits(logits, images.labels)["accuracy"])
                    progress.advance(1)
                else:
                    errors[kind] = by_severity
        if not errors:
            return
        means = {kind: statistics.fmean(by_severity) for kind, by_severity in errors.items()}
        self.results["corruptions"] = {
            "errors": errors,  # in %, of severities 1 to 5
            "mean_errors": means,
            # Of complete sets only: the mean of some others would look like theirs.
            "mean_corruption_error": {
                str(len(kinds)): statistics.fmean(means[kind] for kind in kinds) if means.keys() >= set(kinds) else None
                for kinds in (CORRUPTIONS, CORRUPTIONS + EXTRA_CORRUPTIONS)
            },
        }


def load_runs(
    folders: Sequence[Path], data: str | None, device: str, last: bool
) -> tuple[Recipe, nn.Module, dict[str, Any], AnyData]:
    """Return a run's recipe, model, source (see load_final_model) and test data, or those of an ensemble of runs.

    Raises:
        As run_eval.
    """
    recipes = [read_recipe(folder) for folder in folders]
    combined = deep_ensemble_recipe(recipes, last=last) if len(recipes) > 1 else recipes[0]
    combined.data.folder = data or combined.data.folder
    train, test = read_data(combined.data)
    if isinstance(test, TextSet) and len(folders) > 1:
        raise ValueError(f"eval: an ensemble of runs must be of runs on images, got {combined.data.name}; give one run")
    found = [load_final_model(folder, recipe, train, device, last=last) for folder, recipe in zip(folders, recipes)]
    if len(found) == 1:
        return combined, *found[0], test
    unfinished = [str(folder) for folder, (_, source) in zip(folders, found) if not source["finished"]]
    if unfinished:
        raise RunError(f"eval: {unfinished[0]} is not finished; resume it, or leave it out of the ensemble")
    source: dict[str, Any] = {"weights": f"deep ensemble of {len(found)} runs", "epoch": None, "finished": True}
    if last:
        source["weights"] += ", last weights"
    source["seeds"] = [recipe.seed for recipe in recipes]
    return combined, DeepEnsemble(model for model, _ in found), source, test


def run_eval(
    folders: str | Path | Sequence[str | Path],
    *,
    data: str | None = None,
    ood: Sequence[str] = (),
    corruptions: bool = False,
    device: str | None = None,
    last: bool = False,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluate a run or an ensemble of several: print tables, write evaluation.json and, with foreign images, ood.png.

    An ensemble's folder gets a results.json, too, so that `latephase report` finds it. What there is of last weights
    stands beside that of the average: evaluation_last.json and ood_last.png, of an ensemble in a folder of its own.

    Args:
        folders: of the run; or of runs that differ in their seeds only.
        data: where all data lie; the recipe's folder by default.
        ood: keys of OUT_OF_DISTRIBUTION, or "all": all but the set of the run itself.
        corruptions: evaluate CIFAR-C, all 19 corruptions at 5 severities.
        device: "cuda", "cpu", …; the GPU if there is one by default.
        last: evaluate the last weights of an SWA run, not their average over time.
        output: the folder to write to. By default the run's own; for an ensemble NAME_deep_ensemble-seedS, or
            NAME_last_deep_ensemble-seedS, beside the first run, S being its seed.

    Returns:
        What evaluation.json holds.

    Raises:
        ValueError: there is no run, an unknown set in ood, runs that make no ensemble, or damaged data of the run.
        OSError: the run's own data is missing; the message says where to get it. Or the folder cannot be written.
        RunError: see load_final_model; or a run of an ensemble is not finished.
        ImportError: a library of the extra "train" is missing.
    """
    paths = [Path(folders)] if isinstance(folders, (str, Path)) else [Path(folder) for folder in folders]
    device = usable_device("eval", device)
    own = read_recipe(paths[0]).data.name
    known = [name for name in OUT_OF_DISTRIBUTION if name != own]
    unknown = [name for name in ood if name not in known and name != "all"]
    if unknown:
        raise ValueError(f"eval: --ood must be of {', '.join(known)} or all for a run on {own}, got {unknown[0]!r}")
    recipe, model, source, test = load_runs(paths, data, device, last)
    if isinstance(test, TextSet) and (ood or corruptions):
        raise ValueError(f"eval: --ood and --corruptions are for runs on images, this one is on {own}; leave them out")
    several = len(paths) > 1
    beside = paths[0].parent / f"{recipe.name}-seed{recipe.seed}" if several else paths[0]
    target = beside if output is None else Path(output)
    target.mkdir(parents=True, exist_ok=True)
    suffix = "_last" if last else ""
    results: dict[str, Any] = {"name": recipe.name, "seed": recipe.seed, **source, "epochs": recipe.epochs}
    if isinstance(test, TextSet):
        results.update(metrics=TextEvaluation(recipe, test, device).final(model)[0], left_out={})
    else:
        findings = Findings(recipe, model, test, recipe.data.folder, device)
        findings.test_set()
        findings.out_of_distribution(known if "all" in ood else list(dict.fromkeys(ood)))
        if corruptions:
            findings.corruptions()
        results.update(findings.results, left_out=findings.left_out)
        if len(findings.entropies) > 1:
            draw_entropies(findings.entropies, len(test.classes), target / f"ood{suffix}.png")
    written = target / f"evaluation{suffix}.json"
    for path in (written, target / "results.json") if several else (written,):
        write_json(path, results)
    print(format_evaluation(results))
    print(f"written to {written}")
    return results
