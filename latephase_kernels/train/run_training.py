"""`latephase train`: a recipe from start, or from its last checkpoint, to the evaluated plain model on the disk."""

import contextlib
import copy
import importlib.util
import io
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .. import late_phase as lp
from ..data import TextSet
from ..data.worker_pool import ENDING_SIGNALS
from .build import AnyData, build_data
from .checkpoints import RunError
from .determinism import determinism
from .files import write_json, write_whole
from .image_task import ImageEvaluation
from .progress import Progress
from .rank_folder import AnyFolder, open_run_folder
from .ranks import Ranks, start_ranks
from .recipe import Recipe, check
from .runs import RunFolder
from .task import Evaluation
from .text_task import TextEvaluation
from .trainer import Trainer

# The collapsed model computes what the expanded one did by other additions and multiplications.
COLLAPSE_TOLERANCE = 1e-3


class Interrupted(Exception):
    """A signal ended the run, after its checkpoint was written."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Signals:
    """Remembers SIGINT, SIGTERM and SIGHUP instead of raising in the middle of a step; a second one acts as usual."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        for number in ENDING_SIGNALS:
            if signal.Signals(number).name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN:
                continue  # by nohup: the terminal's end is not the run's
            try:
                self._before[number] = signal.signal(number, self._receive)
            except ValueError:  # not in the main thread
                break
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame) -> None:
        self.received = number
        signal.signal(number, self._before[number])


def run_training(
    recipe: Recipe,
    config: str,
    output: str | Path,
    *,
    resume: bool = False,
    device: str | None = None,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Train, evaluate, collapse and save; everything goes to the run's folder.

    Args:
        recipe: what to do.
        config: the recipe as YAML, for the folder.
        output: the run's folder.
        resume: go on from the last checkpoint there, if there is one.
        device: "cuda", "cpu", …; the GPU if there is one by default.
        tensorboard: write the metrics for TensorBoard, too.

    Returns:
        What results.json holds; of several processes that torchrun has started, the first returns it, the others {}.

    Raises:
        ValueError, OSError: the recipe, the data or the folder; nothing was trained.
        RunError: another process has the folder, or all checkpoints are damaged.
        RuntimeError: the saved model does not answer as the trained one.
        FloatingPointError: a loss, or the trained model's outputs, were not finite.
        Interrupted: by SIGINT, SIGTERM or SIGHUP; a checkpoint holds everything.
    """
    check(recipe)
    with contextlib.ExitStack() as closing:
        closing.enter_context(determinism(recipe.deterministic))
        ranks = closing.enter_context(start_ranks(recipe.parallel, device))
        train, test = build_data(recipe.data)
        _check_libraries(train)
        # Before the folder: what does not fit leaves nothing behind.
        trainer = Trainer(recipe, train, ranks.device, ranks=ranks)
        closing.callback(trainer.task.close)
        evaluation = build_evaluation(recipe, train, test, ranks)
        closing.callback(evaluation.close)
        options: dict[str, Any] = {"resume": resume, "keep_checkpoints": recipe.keep_checkpoints}
        options |= {"tensorboard": tensorboard, "device": ranks.device}
        folder = closing.enter_context(open_run_folder(ranks, output, config, **options))
        with _Signals() as signals:
            _Run(recipe, folder, trainer, evaluation, signals).train()
        # From here on a signal acts at once: everything is saved, and the rest is done again on resuming.
        return _finish(recipe, folder, trainer, evaluation)


def _check_libraries(train: AnyData) -> None:
    """Raise an ImportError now for what would be missing at the first evaluation, or at the end."""
    needed = {"safetensors": "saving the model"}
    if not isinstance(train, TextSet):
        needed["torchmetrics"] = "evaluation"
    for name, purpose in needed.items():
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"train: {purpose} needs {name}; pip install 'latephase_kernels[train]'")


def build_evaluation(recipe: Recipe, train: AnyData, test: AnyData, ranks: Ranks) -> Evaluation:
    """Return the evaluation of a recipe's kind of data; of images each rank has its share, of a text the whole."""
    if isinstance(train, TextSet):
        return TextEvaluation(recipe, train, ranks.device)
    assert not isinstance(test, TextSet)
    return ImageEvaluation(recipe, train, test, ranks)


class _Run:
    """The loop over epochs: logging, evaluating, saving."""

    def __init__(self, recipe: Recipe, folder: AnyFolder, trainer: Trainer, evaluation: Evaluation, signals: _Signals):
        self.recipe, self.folder, self.trainer, self.evaluation = recipe, folder, trainer, evaluation
        self.signals = signals
        saved = folder.checkpoints.load(trainer.device)
        if saved is not None:
            total = saved[0].get("total", trainer.total)
            if total != trainer.total:
                raise RunError(
                    f"train: data.folder must hold the data of the checkpoint's run, whose minibatches were {total}, "
                    f"got {recipe.data.folder} with {trainer.total}"
                )
            trainer.load_state_dict(saved[0])
        # The record of an epoch that is still to be evaluated, and words for the terminal: a signal came meanwhile.
        self.unevaluated: tuple[dict[str, Any], str] | None = saved[0].get("unevaluated") if saved else None
        logged = folder.start_metrics(trainer.minibatch)
        self.seconds_before = (logged[-1].get("seconds") or 0.0) if logged else 0.0  # of the run that is resumed
        self.progress = Progress(trainer.total, sys.stderr if trainer.ranks.rank == 0 else io.StringIO())
        self.progress.done = self.progress.start = trainer.minibatch
        self.saved_at = time.monotonic()

    def train(self) -> None:
        """Train to the end.

        Raises:
            Interrupted, FloatingPointError, OSError: see run_training.
        """
        trainer, per_epoch = self.trainer, self.trainer.batches.minibatches_per_epoch
        started, first = time.perf_counter(), trainer.minibatch
        epochs, trained = self.recipe.epochs, trainer.minibatch >= trainer.total
        stage = f"all {epochs} epochs are trained" if trained else f"epoch {int(trainer.epoch) + 1} of {epochs}"
        self.progress.begin(f"{self.recipe.name}: {stage}")
        with self.progress:
            if self.unevaluated is not None:
                self._evaluate()
                started = time.perf_counter()
            while trainer.minibatch < trainer.total:
                before = trainer.minibatch // per_epoch
                self.progress.advance(trainer.step())
                ended = trainer.minibatch // per_epoch if trainer.minibatch < trainer.total else self.recipe.epochs
                if ended > before:
                    self._end_epochs(before, ended, (trainer.minibatch - first, started))
                    started, first = time.perf_counter(), trainer.minibatch
                due = time.monotonic() - self.saved_at > 60 * self.recipe.checkpoint_minutes
                received, due = trainer.ranks.agree(self.signals.received, due)
                if due or received is not None:
                    self._save()
                if received is not None:
                    raise Interrupted(received)
            self._save()
            if self.signals.received is not None:  # since the last look
                raise Interrupted(self.signals.received)

    def _end_epochs(self, before: int, epoch: int, since: tuple[int, float]) -> None:
        """Log after `epoch` epochs (a step of K minibatches may end several), `before` of them at the last logging.

        Args:
            since: minibatches since a time, for the throughput.
        """
        unit = self.trainer.task.unit
        loss, members, skipped = self.trainer.read_loss()  # waits for the device: what is queued there is not done yet
        minibatches, started = since
        units_per_second = minibatches * self.trainer.task.units_per_minibatch / (time.perf_counter() - started)
        record: dict[str, Any] = {
            "step": self.trainer.minibatch,
            "epoch": self.trainer.epoch,
            "seconds": self.seconds_before + self.progress.elapsed(),
            "train loss": loss,
            **({f"member {k} loss": one for k, one in enumerate(members)} if len(members) > 1 else {}),
            "learning rate": self.trainer.optimizer.param_groups[0]["lr"],
            "members": self.recipe.late.members if self.trainer.expanded else 1,
            f"{unit}/s": units_per_second,
        }
        if self.recipe.skip_nonfinite:
            record["skipped steps"] = skipped
        record.update(self.trainer.task.counts())
        stage = f"{self.recipe.name}: epoch {epoch} of {self.recipe.epochs}"
        if loss is not None:
            stage += f", loss {loss:.4f}"
        throughput = f", {units_per_second:,.0f} {unit}/s"
        every = self.recipe.evaluate_every
        if epoch // every > before // every or epoch == self.recipe.epochs:
            self.unevaluated = record, stage
            self._evaluate(throughput)
        else:
            self.folder.log(record)
            self.progress.begin(stage + throughput)

    def _evaluate(self, throughput: str = "") -> None:
        """Complete and log the record of an epoch; a signal ends it, and resuming does it again from its start.

        Raises:
            Interrupted: after a checkpoint was written.
        """
        assert self.unevaluated is not None
        record, stage = self.unevaluated
        try:
            with self.trainer.ranks.gathered(self.trainer.model) as model:
                tested, words = self.evaluation.progress(model, self._look)
        except Interrupted:
            self._save()
            raise
        self.unevaluated = None
        self.folder.log({**record, **tested})
        self.progress.begin(f"{stage}, {words}{throughput}")

    def _look(self) -> None:
        """Raise Interrupted where a signal has come on any rank."""
        received = self.trainer.ranks.any_signal(self.signals.received)
        if received is not None:
            raise Interrupted(received)

    def _save(self) -> None:
        state = {**self.trainer.state_dict(), "unevaluated": self.unevaluated}
        self.folder.checkpoints.save(state, self.trainer.minibatch)
        self.saved_at = time.monotonic()


def _finish(recipe: Recipe, folder: AnyFolder, trainer: Trainer, evaluation: Evaluation) -> dict[str, Any]:
    """Evaluate, collapse, save as safetensors, load into the plain network, compare."""
    with trainer.ranks.gathered(trainer.final_model()) as model:
        metrics, before = evaluation.final(model)
        plain = copy.deepcopy(model).eval()
    if not isinstance(folder, RunFolder):  # of another rank than the first, which does the rest
        return {}
    if not before.isfinite().all():
        raise FloatingPointError(
            "train: the trained model's outputs are not finite, so it was not saved; lower optimizer.lr or late.lr"
        )
    results: dict[str, Any] = {"name": recipe.name, "seed": recipe.seed, "epochs": recipe.epochs, "metrics": metrics}
    if trainer.expanded:
        lp.collapse(plain)
    path = folder.path / "model.safetensors"
    save_model(plain, path)
    fresh = trainer.task.build_network()
    load_model(fresh, path)
    after = evaluation.logits(fresh)
    error = ((after - before).abs().max() / before.abs().max().clamp_min(1.0)).item()
    if not error <= COLLAPSE_TOLERANCE:
        raise RuntimeError(
            f"train: the collapsed model in {path} does not answer as the trained one did: the logits differ by "
            f"{error:.1e} relative to the largest, allowed is {COLLAPSE_TOLERANCE:.0e}; please report this"
        )
    results["collapse_error"] = error
    if evaluation.classes:
        write_whole(folder.path / "classes.txt", "".join(f"{name}\n" for name in evaluation.classes))
    write_json(folder.path / "results.json", results)
    folder.finish_metrics()
    return results


def save_model(model: torch.nn.Module, path: Path) -> None:
    """Write a plain model's state dict as safetensors, whole or not at all.

    Raises:
        ImportError: safetensors is missing.
        OSError: the file cannot be written.
    """
    try:
        from safetensors.torch import save
    except ModuleNotFoundError:
        raise ImportError("saving the model needs safetensors; pip install 'latephase_kernels[train]'") from None
    write_whole(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}))


def load_model(model: torch.nn.Module, path: Path) -> None:
    """Load what save_model wrote into a plain network, strictly."""
    from safetensors.torch import load

    model.load_state_dict(load(path.read_bytes()))
