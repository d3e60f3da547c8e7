"""`latephase demo`: plain SGD, SWA and late-phase weights compared on the bundled digits in about a minute.

For each seed the small network is trained with SGD up to T0. From that very state (weights, momentum, statistics, and
the same minibatches to come) three runs go on, until each has seen the same number of images:

    SGD          goes on as before, the learning rate annealed to a small value
    SWA          annealed less, then the weights averaged once an epoch and the BN statistics recomputed
    late-phase   BatchNorm and head replicated into K members; a stacked step takes K minibatches; collapsed at the end

The collapsed model is saved, loaded into a plain network and tested again. `demo_methods.py` has the hyperparameters.
"""

import io
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__, backend_for
from ..data import load_digits
from ..models import SmallResNet
from .demo_methods import QUICK, Hyperparameters, SeedRun, accuracy_and_nll, late_images, logits_of
from .demo_report import METHODS, MethodResult, draw_curves, format_table, write_results
from .determinism import one_thread
from .files import prepare_output, write_whole
from .progress import Progress

CHECKPOINT = "late_phase_collapsed.pt"
# The collapsed network computes what the expanded one did by other additions and multiplications: rounding, no more.
LOGIT_TOLERANCE = 1e-3


def save_and_retest(run: SeedRun, model: torch.nn.Module, before: Tensor, path: Path) -> dict:
    """Save the collapsed model, load it into a plain network, and compare with the test logits before collapsing.

    Raises:
        RuntimeError: the two do not agree to rounding.
    """
    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    write_whole(path, content.getvalue())
    plain = SmallResNet()
    plain.load_state_dict(torch.load(path, weights_only=True))
    after = logits_of(plain, run.split.test_images)
    error = (after - before).abs().max().item() / max(1.0, before.abs().max().item())
    if not error <= LOGIT_TOLERANCE:
        raise RuntimeError(
            f"demo: the collapsed model in {path} does not answer as the expanded one did: the logits differ by "
            f"{error:.1e} relative to the largest, allowed is {LOGIT_TOLERANCE:.0e}; please report this"
        )
    accuracy_before, nll_before = accuracy_and_nll(before, run.split.test_labels)
    accuracy, nll = accuracy_and_nll(after, run.split.test_labels)
    return {
        "file": path.name,
        "seed": run.seed,
        "accuracy_before_collapse": accuracy_before,
        "nll_before_collapse": nll_before,
        "accuracy": accuracy,
        "nll": nll,
        "relative_logit_error": error,
    }


def run_demo(
    *, num_seeds: int | None = None, num_members: int = 5, output: Path | str = "demo_run", quick: bool = False
) -> dict:
    """Run the comparison, print its table and write results.json, curves.png and the collapsed model of the first seed.

    Args:
        num_seeds: 5 unless given; 1 if quick.
        num_members: K.
        output: the folder, made if it is missing.
        quick: a few steps only: shows that everything works, its figures mean nothing.

    Returns:
        What results.json holds.

    Raises:
        ValueError: num_seeds or num_members is out of range, or the bundled data is damaged.
        OSError: the folder cannot be written.
        RuntimeError: the saved model does not answer as the trained one.
    """
    hp = QUICK if quick else Hyperparameters()
    num_seeds = (1 if quick else 5) if num_seeds is None else num_seeds
    if num_seeds < 1:
        raise ValueError(f"demo: the number of seeds must be 1 or more, got {num_seeds}")
    late = late_images(hp, num_members)
    digits = load_digits()
    output = Path(output)
    prepare_output(output)

    results: dict[str, list[MethodResult]] = {method: [] for method in METHODS}
    retest = {}
    with Progress(num_seeds * (hp.base_epochs * hp.num_train + 3 * late)) as progress, one_thread():
        for seed in range(num_seeds):
            run = SeedRun(hp, num_members, seed, digits, progress)
            base = run.train_base()
            results["sgd"].append(run.train_sgd(base))
            results["swa"].append(run.train_swa(base))
            averaged, ensemble, collapsed, before = run.train_late_phase(base)
            results["late_phase"].append(averaged)
            results["late_phase_ensemble"].append(ensemble)
            if seed == 0:
                retest = save_and_retest(run, collapsed, before, output / CHECKPOINT)

    facts = {
        "latephase_kernels": __version__,
        "torch": torch.__version__,
        "backend": backend_for(digits[0]),
        "device": "cpu",
        "threads": 1,
        "quick": quick,
        "num_members": num_members,
        "parameters": sum(parameter.numel() for parameter in collapsed.parameters()),
        "num_test": len(run.split.test_labels),
        "images_before_t0": run.base_images,
        "images_after_t0": late,
        "seconds_total": progress.elapsed(),
        "hyperparameters": asdict(hp),
        "collapsed": retest,
    }
    # Files first: what was computed is kept even if printing fails.
    written = write_results(results, facts, output / "results.json")
    picture = draw_curves(results, run.base_images, output / "curves.png")
    print(format_table(results, facts))
    files = ["results.json", CHECKPOINT] + (["curves.png"] if picture else [])
    print(f"Written to {output}: {', '.join(files)}")
    if not picture:
        print("No curves.png: matplotlib is not installed (pip install matplotlib)")
    return written
