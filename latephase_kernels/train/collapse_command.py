"""`latephase collapse`: the members in a run's checkpoint become one plain model, in a file of its own."""

from pathlib import Path

from .. import late_phase as lp
from ..nn.routing import is_expanded
from .checkpoints import RunError
from .eval_report import format_source
from .ranks import usable_device
from .run_training import save_model
from .saved_run import load_final_model, read_data, read_recipe

_NAME = "collapsed.safetensors"


def run_collapse(
    folder: str | Path,
    *,
    mode: str = "exact",
    member: int | None = None,
    data: str | None = None,
    device: str | None = None,
    last: bool = False,
    output: str | Path | None = None,
) -> Path:
    """Collapse the model of a run, finished or not, and write it as safetensors; it loads into the plain network.

    Args:
        folder: of the run.
        mode: "exact" or "weights", see lp.collapse. A run without members has one plain model in both.
        member: keep this one instead of the average.
        data: where all data lie; the recipe's folder by default. SWA's statistics are recomputed from them.
        device: "cuda", "cpu", …; the GPU if there is one by default.
        last: of an SWA run the last weights, not their average.
        output: the file to write, or a folder for a file named collapsed.safetensors; the run's by default.

    Returns:
        The file's path.

    Raises:
        ValueError: there is no run, damaged data, or no such member.
        OSError: the run's own data is missing, or the file cannot be written.
        RunError: see load_final_model; or "weights" or a member are asked for and there is no checkpoint with members.
        ImportError: a library of the extra "train" is missing.
    """
    path = Path(folder)
    device = usable_device("collapse", device)
    recipe = read_recipe(path, "collapse")
    recipe.data.folder = data or recipe.data.folder
    train, _ = read_data(recipe.data, "collapse")
    model, source = load_final_model(path, recipe, train, device, last=last, command="collapse")
    if source["epoch"] is None and recipe.late.start is not None and mode != "exact":
        raise RunError(f"collapse: {path} has no checkpoint, and {source['weights']} is exact; leave out --mode {mode}")
    if member is not None and not is_expanded(model):
        where = "no checkpoint" if source["epoch"] is None else "no members in its checkpoint"
        raise RunError(f"collapse: {path} has {where}, so that there is no member {member}; leave out --member")
    words = [format_source({"name": recipe.name, "seed": recipe.seed, **source})]
    if is_expanded(model):
        lp.collapse(model, mode=mode, member=member)
        words.append(f'collapsed in mode "{mode}"' if member is None else f"member {member} alone")
    target = path if output is None else Path(output)
    if target.is_dir():
        target = target / _NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, target)
    print(", ".join(words))
    print(f"written to {target}")
    return target
