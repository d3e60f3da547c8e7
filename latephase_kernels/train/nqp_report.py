"""What `latephase nqp` shows and writes: the tables and results.json; `nqp_picture.py` has the picture."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from .files import write_json
from .nqp import Problem, Rule, expected_losses, late_mask

# More standard errors than this between simulation and closed form is a failure.
ALLOWED = 4.0


@dataclass(frozen=True)
class Measured:
    """A simulated loss, mean and standard error over the seeds, and what theory says."""

    mean: float
    standard_error: float
    theory: float
    z: float = field(init=False)  # simulation minus theory, in standard errors

    def __post_init__(self) -> None:
        object.__setattr__(self, "z", (self.mean - self.theory) / self.standard_error)

    def texts(self) -> tuple[str, str]:
        """Simulation and theory, × 1000: two digits of the error, and as many decimals everywhere."""
        decimals = max(0, -2 - math.floor(math.log10(self.standard_error)))
        mean, error, theory = (
            f"{1000 * value:.{decimals}f}" for value in (self.mean, self.standard_error, self.theory)
        )
        return f"{mean} ± {error}", theory


@dataclass(frozen=True)
class Cell:
    """One setting's result: the loss of the averaged model and of a single member.

    K = 1 stands for any share, and share 1 for any base gradient scale: it makes no difference.
    """

    rule: Rule
    share: float
    averaged: Measured
    member: Measured
    from_t0: Measured | None = None  # the averaged model again, some outer iterations after T0


def checks(cells: Sequence[Cell]) -> list[float]:
    """The z of every comparison with the closed form; without late members the averaged model is the only one."""
    return [
        loss.z
        for cell in cells
        for loss in (cell.averaged, cell.from_t0, cell.member if cell.share > 0 else None)
        if loss is not None
    ]


def chance(num_checks: int, num_seeds: int) -> float:
    """At most so probable is a |z| beyond ALLOWED in one or more checks, where theory holds and losses are normal.

    Losses are skewed to the right: with few seeds, or few coordinates, |z| is beyond ALLOWED more often.

    The sum of the tails of Student's t with ν = num_seeds − 1, an upper bound for checks that share noise as well. With
    t = √ν tan x the density is cos^(ν−1) x · Γ((ν+1)/2) / (√π Γ(ν/2)).
    """
    freedom = num_seeds - 1
    x = torch.linspace(math.atan(ALLOWED / math.sqrt(freedom)), math.pi / 2, 100_001, dtype=torch.float64)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    tail = scale * torch.trapezoid(x.cos() ** (freedom - 1), x).item()
    return min(1.0, num_checks * 2 * tail)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned to be read as it is."""
    widths = [max(2, *map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [" | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    lines.insert(1, " | ".join("-" * (width - 1) + ":" for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def format_tables(cells: Sequence[Cell], multiplicative: Sequence[Cell], facts: dict) -> str:
    """Both tables and under what conditions they were made: text that is also Markdown."""
    problem = Problem(facts["dimension"], facts["batch_size"])

    def setting(cell: Cell, scaled: bool) -> list[str]:
        return [f"{cell.rule.step_size:g}", str(cell.rule.num_members), cell.rule.base_grad_scale if scaled else "–"]

    def losses(cell: Cell, compare: Callable[[Measured], str]) -> list[str]:
        sgd, _ = expected_losses(problem, Rule(1, cell.rule.step_size), late_mask(problem.dimension, 0))
        averaged = [*cell.averaged.texts(), compare(cell.averaged), f"{cell.averaged.mean / sgd:.1%}"]
        return [*averaged, *cell.member.texts(), compare(cell.member)]

    def header(theory: str, compare: str) -> list[str]:
        return ["averaged model", theory, compare, "of SGD", "one member", theory, compare]

    rows = [
        [
            *setting(cell, scaled=cell.rule.num_members > 1 and cell.share < 1),
            f"{cell.share:g}" if cell.rule.num_members > 1 else "–",
            *losses(cell, lambda loss: f"{loss.z:+.2f}"),
            f"{cell.from_t0.z:+.2f}" if cell.from_t0 else "",
        ]
        for cell in cells
    ]
    parts = [
        "Steady-state loss × 1000, additive late-phase weights",
        markdown_table(["step", "K", "base", "share", *header("closed form", "z"), "z from T0"], rows),
    ]
    if multiplicative:
        rows = [
            [
                *setting(cell, scaled=cell.rule.num_members > 1),
                *losses(cell, lambda loss: f"{loss.mean / loss.theory - 1:+.1%}"),
            ]
            for cell in multiplicative
        ]
        parts += [
            "Steady-state loss × 1000, multiplicative late-phase weights on every coordinate",
            markdown_table(["step", "K", "base", *header("approximation", "off by")], rows),
        ]
    return "\n" + "\n\n".join([*parts, "\n".join(f"- {line}" for line in _footer(facts))])


def _footer(facts: dict) -> list[str]:
    found = facts["checks"]
    order = {"spread": "spread evenly over the curvatures", "sharpest": "those of largest curvature"}
    lines = [
        f"d = {facts['dimension']}, H = C = diag(1/i), minibatches of {facts['batch_size']}; late coordinates: "
        f"{order[facts['late_coordinates']]}.",
        f"Equal data: {facts['seeds']} independent seeds of {facts['steps']} minibatches each, K an outer iteration; "
        "± standard error over the seeds.",
        "The losses: started in the steady state, as if T0 were long ago; the first half is burn-in.",
        "z from T0: started from plain SGD's steady state, replicated; the averaged model at the last step, against "
        "the closed form there.",
        "base: what base coordinates get, the mean or the sum of the members' gradients. The sum is K times the step.",
        "of SGD: the simulated averaged model's loss, of plain SGD's closed form at the same step and minibatch.",
        "With the mean it is 1/K whatever the share; with the sum it falls as the share and, for small steps, K grow.",
        "Multiplicative: the approximation is for little noise (step / minibatch); it is not a check.",
        f"{found['number']} checks, largest |z| {found['largest']:.2f}, {found['failed']} beyond {ALLOWED:g}. Where "
        f"theory holds, any beyond {ALLOWED:g} would have a probability of {found['chance']:.1g} at most if the seeds' "
        "losses were normal; they are skewed, which makes it more with few seeds or few coordinates.",
        f"latephase_kernels {facts['latephase_kernels']}, torch {facts['torch']}, {facts['threads']} thread, "
        f"{facts['seconds_total']:.0f} s in all.",
    ]
    lines += [f"Left out: {reason}" for reason in facts["left_out"]]
    if facts["quick"]:
        lines.append("--quick: few seeds and few steps; the standard errors say how few.")
    return lines


def write_results(cells: Sequence[Cell], multiplicative: Sequence[Cell], facts: dict, path: Path) -> dict:
    """Write everything as JSON; returns what was written."""
    content = {
        **facts,
        "cells": [asdict(cell) for cell in cells],
        "multiplicative": [asdict(cell) for cell in multiplicative],
    }
    write_json(path, content)
    return content
