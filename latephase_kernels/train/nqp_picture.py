"""The picture of `latephase nqp`: the averaged model's loss over K, step size and share."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .figures import new_figure, save_figure
from .nqp import Problem, Rule, expected_losses, late_mask
from .nqp_report import Cell


def draw_losses(
    problem: Problem, cells: Sequence[Cell], multiplicative: Sequence[Cell], order: str, path: Path
) -> bool:
    """Draw the three panels; False without matplotlib.

    Args:
        problem: what the cells simulate.
        cells: additive late-phase weights.
        multiplicative: multiplicative ones, for the first panel; may be empty.
        order: which coordinates are late, see `late_mask`.
        path: the PNG file to write.
    """
    figure = new_figure(16, 6.2)
    if figure is None:
        return False
    panels = _Panels(problem, cells, order)
    over_members, over_steps, over_shares = figure.subplots(1, 3)
    panels.over_members(over_members, multiplicative)
    panels.over_steps(over_steps)
    panels.over_shares(over_shares)
    for axes in figure.axes:
        axes.set_ylabel("steady-state loss of the averaged model × 1000")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
    figure.suptitle(
        "Points: simulation ± 2 standard errors. Lines: closed form (dotted: approximation). "
        "Mean, sum: of the members' gradients, for base coordinates."
    )
    save_figure(figure, path, dpi=110)
    return True


def _points(axes: Any, xs: Sequence[float], cells: Sequence[Cell], **style: Any) -> None:
    means = [1000 * cell.averaged.mean for cell in cells]
    errors = [2000 * cell.averaged.standard_error for cell in cells]
    axes.errorbar(xs, means, errors, **{"linestyle": "none", "marker": "o", "markersize": 5, "capsize": 3, **style})


def _hundred_from(first: float, last: float) -> list[float]:
    return [first + (last - first) * number / 100 for number in range(101)]


class _Panels:
    """What the panels share. The first and the third are drawn for the smallest step, the second for the largest K."""

    def __init__(self, problem: Problem, cells: Sequence[Cell], order: str):
        self.problem, self.cells, self.order = problem, cells, order
        self.members = sorted({cell.rule.num_members for cell in cells})
        self.steps = sorted({cell.rule.step_size for cell in cells})
        scaled = [cell for cell in cells if cell.rule.num_members > 1 and cell.share < 1]
        self.scales = sorted({cell.rule.base_grad_scale for cell in scaled}, reverse=True) or ["mean"]

    def closed(self, settings: Iterable[tuple[Rule, float]]) -> list[float]:
        """× 1000, for rules with shares."""
        masks = [(rule, late_mask(self.problem.dimension, share, self.order)) for rule, share in settings]
        return [1000 * expected_losses(self.problem, rule, mask)[0] for rule, mask in masks]

    def series(self) -> Iterable[tuple[str, float, list[Cell], dict[str, str]]]:
        """Base gradient scale, share, cells and style of each line of the first two panels."""
        summed = sorted({cell.share for cell in self.cells if cell.rule.base_grad_scale == "sum"})
        for number, share in enumerate(summed):
            same = [cell for cell in self.cells if cell.rule.base_grad_scale == "sum" and cell.share == share]
            yield "sum", share, same, {"color": f"C{number}", "label": f"sum, share {share:g}"}
        # One closed form for every share under the mean, and for share 1 under either: one line.
        rest = [cell for cell in self.cells if cell.rule.base_grad_scale == "mean"]
        label = "mean, every share; share 1" if "mean" in self.scales else "share 1"
        if rest:
            yield "mean", 1.0, rest, {"color": "black", "label": label}

    def over_members(self, axes: Any, multiplicative: Sequence[Cell]) -> None:
        step = self.steps[0]
        axes.set(xlabel="members K", xticks=self.members, title=f"step size {step:g}")
        grid = range(1, self.members[-1] + 1)
        for scale, share, same, style in self.series():
            axes.plot(grid, self.closed((Rule(num_members, step, scale), share) for num_members in grid), **style)
            chosen = [cell for cell in same if cell.rule.step_size == step]
            _points(axes, [cell.rule.num_members for cell in chosen], chosen, color=style["color"])
        for scale, marker in (("sum", "x"), ("mean", "+")):
            chosen = [cell for cell in multiplicative if cell.rule.step_size == step]
            # K = 1, simulated once, belongs to both.
            chosen = [cell for cell in chosen if cell.rule.base_grad_scale == scale or cell.rule.num_members == 1]
            if any(cell.rule.num_members > 1 for cell in chosen):
                xs = [cell.rule.num_members for cell in chosen]
                axes.plot(xs, [1000 * cell.averaged.theory for cell in chosen], color="grey", linestyle=":")
                _points(axes, xs, chosen, color="grey", marker=marker, label=f"multiplicative, {scale}")

    def over_steps(self, axes: Any) -> None:
        most = self.members[-1]
        axes.set(xlabel="step size", title=f"K = {most}")
        grid = _hundred_from(self.steps[0], self.steps[-1])
        for scale, share, same, style in self.series():
            axes.plot(grid, self.closed((Rule(most, step, scale), share) for step in grid), **style)
            chosen = [cell for cell in same if cell.rule.num_members == most]
            _points(axes, [cell.rule.step_size for cell in chosen], chosen, color=style["color"])
        sgd = self.closed((Rule(1, step), 0.0) for step in grid)
        axes.plot(grid, sgd, color="grey", linestyle="--", label="plain SGD, the same minibatch")

    def over_shares(self, axes: Any) -> None:
        step = self.steps[0]
        axes.set(xlabel="share of late coordinates", title=f"step size {step:g}")
        grid = _hundred_from(0.0, 1.0)
        styles = {"sum": ("-", "o"), "mean": ("--", "s")}
        for number, num_members in enumerate(self.members):
            here = [cell for cell in self.cells if cell.rule == Rule(num_members, step, cell.rule.base_grad_scale)]
            for scale in self.scales if num_members > 1 else ["mean"]:
                label = f"K = {num_members}, {scale}" if num_members > 1 else "K = 1, plain SGD"
                color = f"C{number}" if num_members > 1 else "grey"
                linestyle, marker = styles[scale]
                losses = self.closed((Rule(num_members, step, scale), share) for share in grid)
                axes.plot(grid, losses, color=color, linestyle=linestyle, label=label)
                chosen = [cell for cell in here if cell.rule.base_grad_scale == scale or cell.share == 1]
                _points(axes, [cell.share for cell in chosen], chosen, color=color, marker=marker)
