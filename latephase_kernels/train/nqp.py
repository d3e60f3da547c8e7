"""The noisy quadratic problem (NQP): what late-phase weights do to the steady-state loss, simulated and in closed form.

    L(w) = ½ (w − w*)ᵀ H (w − w*),  H = diag(h), h_i = 1/i, i = 1 … d;
    a minibatch of B samples gives the gradient H (w − w*) + ε, ε ~ N(0, C/B), C = H = diag(c).

H and C are diagonal: coordinates never meet, and each follows a recursion of its own. Letters: α step size, K members,
γ base gradient scale, δ = w − w* deviation, S independent runs ("seeds"), R base gradient scales.

**Plain SGD**, δ' = (1 − αh) δ − α ε. From a start of mean m and variance v, with a = 1 − αh, after t steps

    E δ = aᵗ m,   Var δ = a²ᵗ v + (1 − a²ᵗ) V(α, B),   V(α, B) = α² (c/B) / (1 − a²) = α c / (B h (2 − αh)),

if 0 < αh < 2. The steady-state loss of a coordinate is ½ h V = ½ α c / (B (2 − αh)), written L(α, B).

**Additive late-phase weights.** Some coordinates ("late") have K copies, each trained on its own minibatches. The
others ("base") are shared and take one step α γ Σ_k g_k in an outer iteration of K minibatches. It is all SGD again:

    late, one member    the SGD of step α and batch B                                             L(α, B)
    late, averaged      δ̄' = (1 − αh) δ̄ − α mean_k ε_k: step α, batch K·B                         L(α, K·B)
    base                γ Σ_k (h δ + ε_k) = γK (h δ + mean_k ε_k): step γKα, batch K·B            L(γKα, K·B)

The averaged model's loss is the sum of the last two over their coordinates; a single member's has the first in place
of the second. An ensemble that averages outputs linear in w, as in least squares, *is* the averaged model. At T0 plain
SGD's steady state is replicated: all three start with v = V(α, B), and the formula above tells what they have t outer
iterations later. The steady state keeps nothing of T0.

With γ = 1/K ("mean") the last two are one and the same: 1/K of plain SGD's loss *whatever the share of late
coordinates*. With γ = 1 ("sum") a base coordinate has L(Kα, K·B) = ½ α c / (B (2 − Kαh)), more than plain SGD's, so the
loss falls as the share grows; it falls with K as long as that outweighs the base coordinates' longer step.

At equal data, n minibatches in all, plain SGD forgets its start as (1 − αh)ⁿ and base coordinates under "sum" as
(1 − Kαh)^(n/K), much the same; late coordinates and base ones under "mean" as (1 − αh)^(n/K): less noise has a price.

`nqp_multiplicative.py` has multiplicative late-phase weights.

Source: von Oswald et al. (2021), the noisy quadratic problem; Zhang et al. (2019).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

LATE_COORDINATES = ("spread", "sharpest")
BASE_GRAD_SCALES = ("mean", "sum")
# Multiples of it, modulo 1, fill [0, 1) evenly at every length.
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Problem:
    """H = C = diag(1/i), i = 1 … dimension; a minibatch of batch_size samples has gradient noise C / batch_size.

    Raises:
        ValueError: dimension or batch_size below 1.
    """

    dimension: int = 100
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("dimension", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"nqp: {name} must be 1 or more, got {getattr(self, name)}")

    @property
    def curvature(self) -> Tensor:
        """h, and c: [d], float64."""
        return 1 / torch.arange(1, self.dimension + 1, dtype=torch.float64)

    def loss(self, squared_deviation: Tensor) -> Tensor:
        """½ Σ_i h_i δ_i²: [..., d] → [...]."""
        return 0.5 * squared_deviation @ self.curvature


@dataclass(frozen=True)
class Rule:
    """How the weights are trained: K, α and γ ("mean" is γ = 1/K, "sum" is γ = 1). K = 1 is plain SGD.

    Raises:
        ValueError: a value out of range.
    """

    num_members: int
    step_size: float
    base_grad_scale: str = "mean"

    def __post_init__(self) -> None:
        if self.num_members < 1:
            raise ValueError(f"nqp: num_members must be 1 or more, got {self.num_members}")
        if not 0 < self.step_size < math.inf:
            raise ValueError(f"nqp: step_size must be positive and finite, got {self.step_size}")
        if self.base_grad_scale not in BASE_GRAD_SCALES:
            raise ValueError(f"nqp: base_grad_scale must be 'mean' or 'sum', got {self.base_grad_scale!r}")

    @property
    def gamma(self) -> float:
        """γ: what the sum of the members' base gradients is multiplied by."""
        return 1 / self.num_members if self.base_grad_scale == "mean" else 1.0

    @property
    def base_step(self) -> float:
        """γKα: the step of a base coordinate along the members' mean gradient."""
        return self.step_size * (1.0 if self.base_grad_scale == "mean" else self.num_members)


def late_mask(dimension: int, share: float, order: str = "spread") -> Tensor:
    """Which coordinates are late-phase weights: ⌈share · dimension⌉ of them, a larger share containing every smaller.

    Args:
        dimension: d.
        share: from 0 to 1.
        order: "spread" evenly over all curvatures, or "sharpest": the first ones, where the curvature is largest.

    Returns:
        [d], bool.

    Raises:
        ValueError: share or order is none of these.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"nqp: share must be from 0 to 1, got {share}")
    if order not in LATE_COORDINATES:
        raise ValueError(f"nqp: late_coordinates must be 'spread' or 'sharpest', got {order!r}")
    numbers = torch.arange(1, dimension + 1, dtype=torch.float64)
    ranked = torch.argsort(numbers * GOLDEN_RATIO % 1 if order == "spread" else numbers)
    late = torch.zeros(dimension, dtype=torch.bool)
    late[ranked[: math.ceil(share * dimension - 1e-9)]] = True  # 0.07 · 100 is a little more than 7
    return late


def sgd_variance(
    problem: Problem,
    step_size: float | Tensor,
    batch_size: int,
    iterations: float = math.inf,
    variance: Tensor | float = 0.0,
) -> Tensor:
    """Variance of plain SGD's deviation after some iterations, exactly.

    Args:
        problem: H and C; its batch size is not used.
        step_size: α, one for all or [d].
        batch_size: B; batches of K minibatches have K times their size.
        iterations: t, or math.inf for the steady state.
        variance: of the deviation at the start, [d] or one for all.

    Returns:
        [d], float64.

    Raises:
        ValueError: no steady state: α h is 2 or more for a curvature.
    """
    h = c = problem.curvature
    if not ((step_size * h > 0) & (step_size * h < 2)).all():
        raise ValueError(f"nqp: the step must be above 0 and below 2/h for each curvature h, got {step_size}")
    decay = (1 - step_size * h) ** iterations
    steady = step_size * c / (batch_size * h * (2 - step_size * h))
    return decay**2 * variance + (1 - decay**2) * steady


def check_stability(rule: Rule) -> None:
    """Every coordinate must have a steady state as a late one and as a base one.

    Raises:
        ValueError: α or γKα is 2 or more, which the largest curvature, h = 1, does not bear.
    """
    bound = 2 * rule.step_size / max(rule.base_step, rule.step_size)
    if not rule.step_size < bound:
        raise ValueError(
            f"nqp: step_size must be below 2/(γ·K·h) = {bound:g} for K = {rule.num_members}, base_grad_scale "
            f"{rule.base_grad_scale!r} and the largest curvature h = 1, got {rule.step_size:g}; take smaller steps"
        )


def expected_losses(problem: Problem, rule: Rule, late: Tensor, iterations: float = math.inf) -> tuple[float, float]:
    """Closed form for additive late-phase weights: the averaged model's loss, and one member's.

    Args:
        problem: H, C and B.
        rule: K, α and γ.
        late: [d], bool, which coordinates are late.
        iterations: outer ones since T0, when plain SGD's steady state was replicated; math.inf for the steady state.

    Raises:
        ValueError: there is no steady state.
    """
    check_stability(rule)
    small, large = problem.batch_size, rule.num_members * problem.batch_size
    at_t0 = sgd_variance(problem, rule.step_size, small)
    base, averaged, member = (
        sgd_variance(problem, step, batch, iterations, at_t0)
        for step, batch in ((rule.base_step, large), (rule.step_size, large), (rule.step_size, small))
    )
    return (
        problem.loss(torch.where(late, averaged, base)).item(),
        problem.loss(torch.where(late, member, base)).item(),
    )


def minibatch_noise(
    problem: Problem, num_seeds: int, num_members: int, iterations: int, generator: Generator
) -> Iterator[Tensor]:
    """Yield ε ~ N(0, C/B), [S, K, d], float64, for each outer iteration: every seed and member has its own."""
    deviation = (problem.curvature / problem.batch_size).sqrt()
    for _ in range(iterations):
        yield normal((num_seeds, num_members, problem.dimension), generator) * deviation


def normal(shape: Sequence[int], generator: Generator) -> Tensor:
    """Draw from N(0, 1), float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def start_at_t0(problem: Problem, rules: Sequence[Rule], num_seeds: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw δ from plain SGD's steady state and replicate it: late [S, K, d] and base [R, S, 1, d]."""
    variance = sgd_variance(problem, rules[0].step_size, problem.batch_size)
    deviation = normal((num_seeds, 1, problem.dimension), generator) * variance.sqrt()
    return deviation.expand(-1, rules[0].num_members, -1), deviation.expand(len(rules), -1, -1, -1)


def start_in_steady_state(
    problem: Problem, rules: Sequence[Rule], num_seeds: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Draw δ as if T0 were long ago: late [S, K, d], members independent, and base [R, S, 1, d]."""
    member = sgd_variance(problem, rules[0].step_size, problem.batch_size)
    late = normal((num_seeds, rules[0].num_members, problem.dimension), generator) * member.sqrt()
    base = []
    for rule in rules:
        variance = sgd_variance(problem, rule.base_step, rule.num_members * problem.batch_size)
        base.append(normal((num_seeds, 1, problem.dimension), generator) * variance.sqrt())
    return late, torch.stack(base)


def additive(
    problem: Problem, rules: Sequence[Rule], start: tuple[Tensor, Tensor], noises: Iterable[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the deviations after each outer iteration, of every coordinate as a late one and as a base one.

    Coordinates never meet, so one run serves every share: it picks which coordinates count as late.

    Args:
        problem: H.
        rules: differ in γ alone.
        start: (late [S, K, d], base [R, S, 1, d]), as is what is yielded.
        noises: ε for each iteration, [S, K, d].
    """
    late, base = start
    h, step, num_members = problem.curvature, rules[0].step_size, late.shape[-2]
    gamma = torch.tensor([rule.gamma for rule in rules], dtype=torch.float64)[:, None, None, None]
    for noise in noises:
        late = late - step * (h * late + noise)
        base = base - step * gamma * (num_members * h * base + noise.sum(-2, keepdim=True))
        yield late, base


def additive_losses(
    problem: Problem,
    cells: Sequence[tuple[Rule, Tensor]],
    start: Callable[[Problem, Sequence[Rule], int, Generator], tuple[Tensor, Tensor]],
    num_seeds: int,
    iterations: int,
    burn_in: int,
    generator: Generator,
) -> list[tuple[Tensor, Tensor]]:
    """Simulate additive late-phase weights: time means of the averaged model's loss and of one member's.

    Args:
        problem: H, C and B.
        cells: rules that differ in γ alone, each with its late coordinates, [d], bool.
        start: start_in_steady_state or start_at_t0.
        num_seeds: S.
        iterations: outer ones, of K minibatches.
        burn_in: iterations that do not count, fewer than all.
        generator: draws everything; all cells have the same noise.

    Returns:
        Two [S] for each cell.
    """
    rules = list(dict.fromkeys(rule for rule, _ in cells))
    noises = minibatch_noise(problem, num_seeds, rules[0].num_members, iterations, generator)
    states = additive(problem, rules, start(problem, rules, num_seeds, generator), noises)
    averaged, member, *base = time_mean(
        torch.cat([squares(late), base.squeeze(-2).square()]) for late, base in itertools.islice(states, burn_in, None)
    )
    shared = dict(zip(rules, base, strict=True))
    return [
        (
            problem.loss(torch.where(late, averaged, shared[rule])),
            problem.loss(torch.where(late, member, shared[rule])),
        )
        for rule, late in cells
    ]


def squares(deviation: Tensor) -> Tensor:
    """[..., K, d] → [2, ..., d]: the square of the members' average, and the mean square of a member."""
    return torch.stack([deviation.mean(-2).square(), deviation.square().mean(-2)])


def time_mean(values: Iterable[Tensor]) -> Tensor:
    """Mean of equally shaped tensors, one at a time."""
    count, total = 0, torch.zeros((), dtype=torch.float64)
    for value in values:
        count, total = count + 1, total + value
    return total / count
