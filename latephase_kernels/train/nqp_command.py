"""`latephase nqp`: the noisy quadratic problem simulated and compared with its closed form, in less than a minute.

A cell is a step size, a number of members K, a share of late coordinates and a base gradient scale. K = 1 is plain SGD
whatever the share, and at share 1 there is no base gradient to scale: such cells are simulated and shown once.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor

from .. import __version__
from .determinism import one_thread
from .files import prepare_output, write_whole
from .nqp import (
    BASE_GRAD_SCALES,
    Problem,
    Rule,
    additive_losses,
    check_stability,
    expected_losses,
    late_mask,
    start_at_t0,
    start_in_steady_state,
)
from .nqp_multiplicative import approximate_losses, balance, multiplicative_losses
from .nqp_picture import draw_losses
from .nqp_report import ALLOWED, Cell, Measured, chance, checks, format_tables, write_results
from .progress import Progress

MEMBERS = (1, 2, 5, 10)
STEP_SIZES = (0.05, 0.1, 0.15)
SHARES = (0.0, 0.25, 0.5, 1.0)
SEEDS, STEPS = 200, 800
QUICK_SEEDS, QUICK_STEPS = 50, 100
MOST_BYTES = 2**31  # of the deviations of all members and seeds, [S, K, d]; several such tensors are alive at once
GENERATOR_SEED = 0  # of the one generator that all noise is drawn from


def run_nqp(
    *,
    members: Sequence[int] = MEMBERS,
    step_sizes: Sequence[float] = STEP_SIZES,
    shares: Sequence[float] = SHARES,
    base_grad_scale: str = "both",
    late_coordinates: str = "spread",
    num_seeds: int | None = None,
    num_steps: int | None = None,
    dimension: int = 100,
    batch_size: int = 16,
    output: Path | str = "nqp_run",
    quick: bool = False,
) -> dict:
    """Simulate every cell, print the tables and write results.json, nqp.md and nqp.png.

    Args:
        members: the K to try.
        step_sizes: the α to try.
        shares: of late coordinates, from 0 to 1.
        base_grad_scale: γ, "mean", "sum" or "both" to compare.
        late_coordinates: which coordinates are late, "spread" or "sharpest".
        num_seeds: independent runs of each cell; 200 unless given, 50 if quick.
        num_steps: minibatches of each cell, K to an outer iteration; 800 unless given, 100 if quick.
        dimension: d.
        batch_size: B.
        output: the folder, made if it is missing.
        quick: few seeds and few steps.

    Returns:
        What results.json holds; ["checks"]["failed"] counts the simulations too far from theory.

    Raises:
        ValueError: an argument is out of range, or a cell has no steady state.
        OSError: the folder cannot be written.
    """
    num_seeds = (QUICK_SEEDS if quick else SEEDS) if num_seeds is None else num_seeds
    num_steps = (QUICK_STEPS if quick else STEPS) if num_steps is None else num_steps
    for name, values in (("members", members), ("step_sizes", step_sizes), ("shares", shares)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"nqp: {name} must be one value or more, all different, got {list(values)}")
    problem = Problem(dimension, batch_size)
    _check_sizes(max(members), num_seeds, num_steps, dimension)
    scales = BASE_GRAD_SCALES if base_grad_scale == "both" else (base_grad_scale,)
    pairs = list(itertools.product(step_sizes, members))
    masks = {share: late_mask(dimension, share, late_coordinates) for share in (0.0, *shares)}
    groups = [_group(*pair, shares, scales) for pair in pairs]
    for rule, _ in itertools.chain(*groups):
        check_stability(rule)
    rules, left_out = _multiplicative_rules(problem, pairs, scales)
    output = Path(output)
    prepare_output(output)

    generator = Generator().manual_seed(GENERATOR_SEED)
    cells, multiplicative = [], []
    with Progress((2 * len(groups) + len(rules)) * num_steps) as progress, one_thread():
        for group in groups:
            _begin(progress, f"additive late-phase weights, step size {group[0][0].step_size:g}")
            cells += _additive_cells(problem, group, masks, num_seeds, num_steps, generator)
            progress.advance(2 * num_steps)
        for rule in rules:
            _begin(progress, f"multiplicative late-phase weights, step size {rule.step_size:g}")
            cell = _multiplicative_cell(problem, rule, num_seeds, num_steps, generator)
            if cell is not None:
                multiplicative.append(cell)
            else:
                left_out.append(
                    f"multiplicative weights diverged with K = {rule.num_members}, base_grad_scale "
                    f"{rule.base_grad_scale!r}, step_size {rule.step_size:g}: too much noise for the step"
                )
            progress.advance(num_steps)

    found = checks(cells)
    facts = {
        "latephase_kernels": __version__,
        "torch": torch.__version__,
        "threads": 1,
        "quick": quick,
        "dimension": dimension,
        "batch_size": batch_size,
        "late_coordinates": late_coordinates,
        "seeds": num_seeds,
        "steps": num_steps,
        "seconds_total": progress.elapsed(),
        "left_out": left_out,
        "checks": {
            "number": len(found),
            "largest": max(map(abs, found)),
            # Not "more than allowed": NaN fails too.
            "failed": sum(not abs(z) <= ALLOWED for z in found),
            "chance": chance(len(found), num_seeds),
        },
    }
    # Files first: what was computed is kept even if printing fails.
    written = write_results(cells, multiplicative, facts, output / "results.json")
    tables = format_tables(cells, multiplicative, facts)
    write_whole(output / "nqp.md", tables.lstrip())
    picture = draw_losses(problem, cells, multiplicative, late_coordinates, output / "nqp.png")
    print(tables)
    print(f"Written to {output}: {', '.join(['results.json', 'nqp.md'] + ['nqp.png'] * picture)}")
    if not picture:
        print("No nqp.png: matplotlib is not installed (pip install matplotlib)")
    return written


def _check_sizes(num_members: int, num_seeds: int, num_steps: int, dimension: int) -> None:
    if num_seeds < 2:
        raise ValueError(f"nqp: the number of seeds must be 2 or more for a standard error, got {num_seeds}")
    if num_steps < num_members:
        raise ValueError(f"nqp: the number of steps, minibatches, must be at least K = {num_members}, got {num_steps}")
    size = 8 * num_seeds * num_members * dimension
    if size > MOST_BYTES:
        raise ValueError(
            f"nqp: seeds × members × dimension, in float64, must take at most {MOST_BYTES / 2**30:g} GiB, got "
            f"{num_seeds} × {num_members} × {dimension}: {size / 2**30:,.1f} GiB, and that several times"
        )


def _group(
    step_size: float, num_members: int, shares: Sequence[float], scales: Sequence[str]
) -> list[tuple[Rule, float]]:
    """The cells of one simulation: rules with a share."""
    if num_members == 1:
        return [(Rule(1, step_size), 0.0)]
    cells = [(Rule(num_members, step_size, scale), share) for scale in scales for share in shares if share < 1]
    return cells + [(Rule(num_members, step_size), 1.0)] * (1 in shares)


def _multiplicative_rules(
    problem: Problem, pairs: Sequence[tuple[float, int]], scales: Sequence[str]
) -> tuple[list[Rule], list[str]]:
    """What can be simulated, and why the rest cannot: these bounds are others than the additive weights'."""
    rules, left_out = [], []
    for step_size, num_members in pairs:
        for scale in scales if num_members > 1 else ["mean"]:
            rule = Rule(num_members, step_size, scale)
            try:
                balance(problem, rule)
                rules.append(rule)
            except ValueError as error:
                left_out.append(str(error).removeprefix("nqp: "))
    return rules, left_out


def _additive_cells(
    problem: Problem,
    group: Sequence[tuple[Rule, float]],
    masks: dict[float, Tensor],
    num_seeds: int,
    num_steps: int,
    generator: Generator,
) -> list[Cell]:
    choices = [(rule, masks[share]) for rule, share in group]
    iterations = num_steps // group[0][0].num_members
    simulate = functools.partial(additive_losses, problem, choices, num_seeds=num_seeds, iterations=iterations)
    steady = simulate(start=start_in_steady_state, burn_in=iterations // 2, generator=generator)
    since_t0 = simulate(start=start_at_t0, burn_in=iterations - 1, generator=generator)
    cells = []
    for (rule, share), losses, losses_since_t0 in zip(group, steady, since_t0, strict=True):
        averaged, member = map(_measured, losses, expected_losses(problem, rule, masks[share]))
        from_t0, _ = map(_measured, losses_since_t0, expected_losses(problem, rule, masks[share], iterations))
        cells.append(Cell(rule, share, averaged, member, from_t0))
    return cells


def _multiplicative_cell(
    problem: Problem, rule: Rule, num_seeds: int, num_steps: int, generator: Generator
) -> Cell | None:
    """None where the loop diverges: the approximation's steady state is none of the loop's under much noise."""
    iterations = num_steps // rule.num_members
    losses = multiplicative_losses(problem, rule, num_seeds, iterations, iterations // 2, generator)
    if not torch.stack(losses).isfinite().all():
        return None
    averaged, member = map(_measured, losses, approximate_losses(problem, rule))
    return Cell(rule, 1.0, averaged, member)


def _begin(progress: Progress, stage: str) -> None:
    """One line a stage, not one a simulation."""
    if progress.stage != stage:
        progress.begin(stage)


def _measured(losses: Tensor, theory: float) -> Measured:
    return Measured(losses.mean().item(), losses.std().item() / math.sqrt(len(losses)), theory)
