"""The noisy quadratic problem with multiplicative late-phase weights, w_i = θ_i φ_{k,i}: simulation and approximation.

The problem and the letters are those of `nqp.py`; every coordinate is late, and w* = 1. The loop, exactly:

    g_k = h (θφ_k − 1) + ε_k,   φ_k' = φ_k − α θ g_k,   θ' = θ − α γ Σ_k φ_k g_k.

No closed form is known. For little noise (α/B small), to first order in the deviations δ_k = θφ_k − 1 and near a point
θφ = 1 of the curve on which the loss is zero,

    δ_k' = δ_k − α θ² g_k − α γ φ² Σ_j g_j.

So the averaged model, δ̄ = mean_k δ_k, follows the SGD of step β = α (θ² + γKφ²) and batch K·B, and δ_k − δ̄ is
independent of it, with (1 − 1/K) times the variance of the SGD of step μ = αθ² and batch B.

Near which point? Along the curve neither force nor noise acts at first order: θ² − γ Σ_k φ_k² changes, exactly, by

    α² γ (γ (Σ_k φ_k g_k)² − θ² Σ_k g_k²).

An SGD of step s and noise variance q has E g² = q · 2/(2 − sh), which gives both sums their means. The mean change is
zero, and the weights stay, where y = φ² = 1/θ² solves

    (γ y² − 1/K) (2 − μh) = (1 − 1/K) (2 − βh).

Between y = (γK)^−½, where β is smallest, and y = γ^−½, its solution for small steps, the difference of the two sides
changes sign if α√(γK) h < 1, and at the solution βh < 2. The errors of the approximation are of relative order α/B.
"""

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Generator, Tensor

from .nqp import Problem, Rule, minibatch_noise, normal, sgd_variance, squares, time_mean


def _steps(rule: Rule, y: Tensor) -> tuple[Tensor, Tensor]:
    """β and μ: [d]."""
    member = rule.step_size / y
    return member + rule.base_step * y, member


def balance(problem: Problem, rule: Rule) -> Tensor:
    """φ², and 1/θ², where the weights settle on the curve θφ = 1: [d]. K = 1 has 1.

    Raises:
        ValueError: α√(γK) is 1 or more, which the largest curvature, h = 1, does not bear.
    """
    h, num_members, gamma = problem.curvature, rule.num_members, rule.gamma
    bound = 1 / math.sqrt(gamma * num_members)
    if not rule.step_size < bound:
        raise ValueError(
            f"nqp: step_size must be below 1/√(γ·K·h²) = {bound:g} for multiplicative weights with K = {num_members}, "
            f"base_grad_scale {rule.base_grad_scale!r} and the largest curvature h = 1, got {rule.step_size:g}; "
            "take smaller steps"
        )
    low = torch.full_like(h, (gamma * num_members) ** -0.5)
    high = torch.full_like(h, gamma**-0.5)
    for _ in range(60):  # bisection down to rounding
        y = (low + high) / 2
        step, member_step = _steps(rule, y)
        above = (gamma * y**2 - 1 / num_members) * (2 - member_step * h) > (1 - 1 / num_members) * (2 - step * h)
        low, high = torch.where(above, low, y), torch.where(above, y, high)
    return high


def _variances(problem: Problem, rule: Rule) -> tuple[Tensor, Tensor]:
    """Of δ̄ in the steady state, and of the SGD of step μ."""
    step, member_step = _steps(rule, balance(problem, rule))
    averaged = sgd_variance(problem, step, rule.num_members * problem.batch_size)
    member = sgd_variance(problem, member_step, problem.batch_size)
    return averaged, member


def approximate_losses(problem: Problem, rule: Rule) -> tuple[float, float]:
    """Little-noise approximation of the steady-state losses: the averaged model's, and one member's.

    Raises:
        ValueError: there is no steady state.
    """
    averaged, member = _variances(problem, rule)
    spread = (1 - 1 / rule.num_members) * member
    return problem.loss(averaged).item(), problem.loss(averaged + spread).item()


def multiplicative_start(problem: Problem, rule: Rule, num_seeds: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw θ [S, 1, d] and φ [S, K, d] from the approximate steady state.

    Gradients move θ by γφ Σ_k g_k and the members' mean by θ mean_k g_k, which divides δ̄ between the two.

    Raises:
        ValueError: there is no steady state.
    """
    y = balance(problem, rule)
    step, _ = _steps(rule, y)
    averaged, member = _variances(problem, rule)
    common = normal((num_seeds, 1, problem.dimension), generator) * averaged.sqrt()
    spread = normal((num_seeds, rule.num_members, problem.dimension), generator) * member.sqrt()
    theta, phi = y**-0.5, y**0.5
    member_mean = common * rule.step_size * theta / step
    return (
        theta + rule.gamma * rule.num_members * y * member_mean,
        phi + member_mean + (spread - spread.mean(-2, keepdim=True)) / theta,
    )


def multiplicative(
    problem: Problem, rule: Rule, start: tuple[Tensor, Tensor], noises: Iterable[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield θ [S, 1, d] and φ [S, K, d] after each outer iteration of the exact loop.

    Args:
        problem: H.
        rule: K, α and γ.
        start: θ and φ.
        noises: ε for each iteration, [S, K, d].
    """
    base, members = start
    h, step = problem.curvature, rule.step_size
    for noise in noises:
        gradients = h * (base * members - 1) + noise
        base, members = (
            base - step * rule.gamma * (members * gradients).sum(-2, keepdim=True),
            members - step * base * gradients,
        )
        yield base, members


def multiplicative_losses(
    problem: Problem, rule: Rule, num_seeds: int, iterations: int, burn_in: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Simulate from the approximate steady state, otherwise as `additive_losses`: two [S].

    Raises:
        ValueError: there is no steady state.
    """
    start = multiplicative_start(problem, rule, num_seeds, generator)
    noises = minibatch_noise(problem, num_seeds, rule.num_members, iterations, generator)
    states = itertools.islice(multiplicative(problem, rule, start, noises), burn_in, None)
    averaged, member = time_mean(squares(base * members - 1) for base, members in states)
    return problem.loss(averaged), problem.loss(member)
