"""The noisy quadratic problem: simulation, closed forms, `latephase nqp`. Seeded: a run does as the last one did."""

import itertools
import json
import math

import pytest
import torch

from latephase_kernels.cli import main
from latephase_kernels.train import nqp_command
from latephase_kernels.train.nqp import (
    Problem,
    Rule,
    additive,
    additive_losses,
    check_stability,
    expected_losses,
    late_mask,
    minibatch_noise,
    sgd_variance,
    start_at_t0,
    start_in_steady_state,
)
from latephase_kernels.train.nqp_multiplicative import (
    approximate_losses,
    balance,
    multiplicative,
    multiplicative_losses,
)
from latephase_kernels.train.nqp_report import chance

ALLOWED = 4  # standard errors


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def last(states):
    *_, state = states
    return state


def recursion(h, step, noise_variance, iterations, mean, variance):
    """Moments of δ' = (1 − step·h) δ − step·ε, one iteration after the other."""
    for _ in range(iterations):
        mean = (1 - step * h) * mean
        variance = (1 - step * h) ** 2 * variance + step**2 * noise_variance
    return mean, variance


def z_of_losses(losses, theory):
    return ((losses.mean() - theory) / (losses.std() / len(losses) ** 0.5)).item()


def test_moments_at_a_finite_time_from_far_away():
    problem, num_members, step, iterations, seeds = Problem(5, 2), 3, 0.3, 12, 4000
    h = problem.curvature
    rules = [Rule(num_members, step, scale) for scale in ("mean", "sum")]
    start = torch.full((seeds, 1, 5), 10.0, dtype=torch.float64)
    late, base = last(
        additive(
            problem,
            rules,
            (start.expand(-1, num_members, -1), start.expand(2, -1, -1, -1)),
            minibatch_noise(problem, seeds, num_members, iterations, generator()),
        )
    )
    # c = h; (deviations, step, samples in a gradient)
    for deviations, effective_step, samples in (
        (late[:, 1], step, 2),
        (late.mean(1), step, 6),
        (base[0, :, 0], step, 6),
        (base[1, :, 0], 3 * step, 6),
    ):
        mean, variance = recursion(h, effective_step, h / samples, iterations, torch.full_like(h, 10.0), 0.0)
        assert ((deviations.mean(0) - mean) / (variance / seeds).sqrt()).abs().max() < ALLOWED
        # The variance of s² is 2 v² / (n − 1).
        assert ((deviations.var(0) / variance - 1) / math.sqrt(2 / (seeds - 1))).abs().max() < ALLOWED
        closed = sgd_variance(problem, effective_step, samples, iterations)
        torch.testing.assert_close(closed, variance, rtol=1e-12, atol=0)
    # Members are independent once they have left T0.
    correlation = torch.corrcoef(late[:, :, 0].T) - torch.eye(num_members)
    assert correlation.abs().max() < ALLOWED / seeds**0.5


def test_one_member_is_plain_sgd_bit_for_bit():
    problem, step = Problem(20, 3), 0.7
    weights = torch.randn(8, 1, 20, generator=generator(), dtype=torch.float64)
    noises = list(minibatch_noise(problem, 8, 1, 50, generator(1)))
    rules = [Rule(1, step, "mean"), Rule(1, step, "sum")]
    late, base = last(additive(problem, rules, (weights, weights.expand(2, -1, -1, -1)), noises))
    for noise in noises:
        weights = weights - step * (problem.curvature * weights + noise)
    assert torch.equal(late, weights) and torch.equal(base[0], weights) and torch.equal(base[1], weights)


@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_vectorized_simulation_is_the_papers_loop(scale):
    problem, rule, seeds, iterations, burn_in = Problem(7, 2), Rule(4, 0.2, scale), 3, 9, 4
    late = late_mask(7, 0.4)
    ((averaged, member),) = additive_losses(
        problem, [(rule, late)], start_in_steady_state, seeds, iterations, burn_in, generator(5)
    )
    # The same draws again: start, then noise.
    draws = generator(5)
    members, base = start_in_steady_state(problem, [rule], seeds, draws)
    noises = list(minibatch_noise(problem, seeds, 4, iterations, draws))
    h, gamma = problem.curvature, {"mean": 0.25, "sum": 1.0}[scale]
    for seed in range(seeds):
        theta, phi = base[0, seed, 0, ~late], [members[seed, k, late] for k in range(4)]
        sums = [0.0, 0.0]
        for iteration, noise in enumerate(noises):
            accumulated = torch.zeros_like(theta)
            for k in range(4):
                deviation = torch.empty(7, dtype=torch.float64)
                deviation[late], deviation[~late] = phi[k], theta
                gradient = h * deviation + noise[seed, k]
                phi[k] = phi[k] - 0.2 * gradient[late]
                accumulated += gradient[~late]
            theta = theta - 0.2 * gamma * accumulated
            if iteration >= burn_in:
                models = [sum(phi) / 4, *phi]
                losses = [(0.5 * (h[~late] * theta**2).sum() + 0.5 * (h[late] * model**2).sum()) for model in models]
                sums[0] += losses[0].item() / 5
                sums[1] += sum(losses[1:]).item() / 4 / 5
        assert sums == pytest.approx([averaged[seed].item(), member[seed].item()], rel=1e-12)


def test_base_weights_under_the_mean_are_sgd_of_a_larger_batch():
    """Share 0 with K members and the mean: path by path, and in distribution, the SGD of batch K·B."""
    problem, large, seeds, iterations = Problem(10, 3), Problem(10, 12), 2000, 40
    start = torch.full((seeds, 1, 10), 0.3, dtype=torch.float64)
    noises = list(minibatch_noise(problem, seeds, 4, iterations, generator()))
    states = (start.expand(-1, 4, -1), start[None])
    late, base = last(additive(problem, [Rule(4, 0.5, "mean")], states, noises))
    means = [noise.mean(1, keepdim=True) for noise in noises]
    same, _ = last(additive(large, [Rule(1, 0.5)], (start, start[None]), means))
    torch.testing.assert_close(base[0], same, rtol=0, atol=1e-14)
    torch.testing.assert_close(base[0], late.mean(1, keepdim=True), rtol=0, atol=1e-14)
    # Kolmogorov and Smirnov's distance between two samples of losses: beyond this once in 10⁵.
    own = minibatch_noise(large, seeds, 1, iterations, generator(1))
    other, _ = last(additive(large, [Rule(1, 0.5)], (start, start[None]), own))
    ours, theirs = (problem.loss(deviation.squeeze().square()).sort().values for deviation in (base[0], other))
    both = torch.cat([ours, theirs])
    distance = (torch.searchsorted(ours, both, right=True) - torch.searchsorted(theirs, both, right=True)).abs().max()
    assert distance / seeds < math.sqrt(-math.log(1e-5 / 2) / seeds)


@pytest.mark.parametrize("order", ["spread", "sharpest"])
@pytest.mark.parametrize("num_members", [1, 2, 10])
@pytest.mark.parametrize("start", [start_in_steady_state, start_at_t0])
def test_closed_form_within_4_standard_errors(start, num_members, order):
    problem, step, iterations, seeds = Problem(30, 4), 0.15, 60, 300
    pairs = itertools.product(("mean", "sum"), (0, 0.25, 1))
    cells = [(Rule(num_members, step, scale), late_mask(30, share, order)) for scale, share in pairs]
    burn_in, since_t0 = (20, math.inf) if start is start_in_steady_state else (iterations - 1, iterations)
    simulated = additive_losses(problem, cells, start, seeds, iterations, burn_in, generator(num_members))
    for (rule, late), (averaged, member) in zip(cells, simulated, strict=True):
        theory = expected_losses(problem, rule, late, since_t0)
        assert abs(z_of_losses(averaged, theory[0])) < ALLOWED and abs(z_of_losses(member, theory[1])) < ALLOWED
        if num_members == 10 and start is start_in_steady_state:
            # These standard errors do tell theories apart: an average from a member, and mean from sum.
            other = Rule(num_members, step, "mean" if rule.base_grad_scale == "sum" else "sum")
            if late.any():
                assert abs(z_of_losses(averaged, theory[1])) > ALLOWED
            if not late.all():
                wrong, _ = expected_losses(problem, other, late, since_t0)
                assert abs(z_of_losses(averaged, wrong)) > ALLOWED


def test_closed_form_of_the_steady_state():
    problem, none = Problem(100, 16), late_mask(100, 0)
    c = h = 1 / torch.arange(1, 101, dtype=torch.float64)

    def loss(step, samples):  # the formula for plain SGD
        return (0.5 * step * c / (samples * (2 - step * h))).sum().item()

    assert expected_losses(problem, Rule(1, 0.3), none) == pytest.approx((loss(0.3, 16),) * 2, rel=1e-12)
    assert expected_losses(problem, Rule(5, 0.3), ~none) == pytest.approx((loss(0.3, 80), loss(0.3, 16)), rel=1e-12)
    assert expected_losses(problem, Rule(5, 0.3, "sum"), none)[0] == pytest.approx(loss(1.5, 80), rel=1e-12)
    # Late and base coordinates add up; the limit of many iterations; equal members at T0.
    half = late_mask(100, 0.5)
    rule = Rule(5, 0.3, "sum")
    parts = (0.5 * torch.where(half, 0.3 * c / (80 * (2 - 0.3 * h)), 1.5 * c / (80 * (2 - 1.5 * h)))).sum().item()
    assert expected_losses(problem, rule, half)[0] == pytest.approx(parts, rel=1e-12)
    assert expected_losses(problem, rule, half, 10**5) == pytest.approx(expected_losses(problem, rule, half), rel=1e-12)
    assert expected_losses(problem, rule, half, 0) == pytest.approx((loss(0.3, 16),) * 2, rel=1e-12)


def test_loss_falls_with_members_and_share():
    """The paper's claim, and where it holds: under the mean the share does not matter."""
    problem = Problem()

    def averaged(num_members, share, scale, order="spread", step=0.1):
        return expected_losses(problem, Rule(num_members, step, scale), late_mask(100, share, order))[0]

    shares, members = [number / 20 for number in range(21)], range(1, 19)
    for order in ("spread", "sharpest"):
        for num_members in members[1:]:
            losses = [averaged(num_members, share, "sum", order) for share in shares]
            assert all(more < less for less, more in itertools.pairwise(losses))
            losses = [averaged(num_members, share, "mean", order) for share in shares]
            assert losses == pytest.approx([averaged(1, 0, "mean") / num_members] * len(shares), rel=1e-12)
    for share in shares[5:]:  # small steps: the base coordinates' longer step costs less than the others gain
        losses = [averaged(num_members, share, "sum", step=0.005) for num_members in members]
        assert all(more < less for less, more in itertools.pairwise(losses))
    # With no late coordinate the sum does not gain: K times the step undoes the larger batch.
    assert averaged(10, 0, "sum") > averaged(1, 0, "sum")


@pytest.mark.parametrize(("num_members", "scale", "bound"), [(1, "sum", 2), (8, "mean", 2), (8, "sum", 0.25)])
def test_instability_names_the_bound(num_members, scale, bound):
    check_stability(Rule(num_members, bound * 0.999, scale))
    with pytest.raises(ValueError, match=f"step_size must be below 2/.* = {bound:g} for K = {num_members}"):
        expected_losses(Problem(), Rule(num_members, bound, scale), late_mask(100, 0.5))
    # It is the recursion's own bound: without noise, a start at 1 stays at ±1, or grows.
    one, silence = torch.ones(1, num_members, 1, dtype=torch.float64), [torch.zeros(1, num_members, 1)] * 99
    for factor, grows in ((1.01, True), (0.99, False)):
        late, base = last(
            additive(Problem(1, 1), [Rule(num_members, bound * factor, scale)], (one, one[None, :, :1]), silence)
        )
        assert (max(late.abs().max(), base.abs().max()) > 1) == grows


def test_late_coordinates():
    assert late_mask(100, 0.07).sum() == 7  # 0.07 · 100 is more than 7 in floating point
    assert late_mask(10, 0.01).sum() == 1 and not late_mask(10, 0).any() and late_mask(10, 1).all()
    assert late_mask(10, 0.25, "sharpest").tolist() == [True] * 3 + [False] * 7
    for order in ("spread", "sharpest"):
        masks = [late_mask(100, number / 30, order) for number in range(31)]
        assert all((less <= more).all() for less, more in itertools.pairwise(masks))
    # Spread: every tenth of the coordinates has its part, to one.
    assert set(late_mask(100, 0.3).view(10, 10).sum(1).tolist()) <= {2, 3, 4}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Problem(0), "dimension must be 1 or more, got 0"),
        (lambda: Problem(3, 0), "batch_size must be 1 or more, got 0"),
        (lambda: Rule(0, 0.1), "num_members must be 1 or more, got 0"),
        (lambda: Rule(2, math.nan), "step_size must be positive and finite, got nan"),
        (lambda: Rule(2, 0.0), "step_size must be positive and finite, got 0.0"),
        (lambda: Rule(2, 0.1, "median"), "base_grad_scale must be 'mean' or 'sum', got 'median'"),
        (lambda: late_mask(10, 1.1), "share must be from 0 to 1, got 1.1"),
        (lambda: late_mask(10, 0.5, "random"), "late_coordinates must be 'spread' or 'sharpest', got 'random'"),
        (lambda: sgd_variance(Problem(), 2.0, 1), "below 2/h for each curvature h, got 2.0"),
        (lambda: balance(Problem(), Rule(4, 0.5, "sum")), "step_size must be below 1/√.* = 0.5 for multiplicative"),
    ],
)
def test_values_out_of_range(call, message):
    with pytest.raises(ValueError, match=f"^nqp: .*{message}"):
        call()


@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_multiplicative_with_frozen_members_is_sgd(scale):
    """φ = 1 throughout: θ − w* follows the base coordinates' rule; with K = 1, plain SGD."""
    problem = Problem(12, 2)
    for num_members in (1, 3):
        rule, ones = Rule(num_members, 0.4, scale), torch.ones(5, num_members, 12, dtype=torch.float64)
        theta = 1 + torch.randn(5, 1, 12, generator=generator(), dtype=torch.float64)
        noises = list(minibatch_noise(problem, 5, num_members, 30, generator(1)))
        _, expected = last(additive(problem, [rule], (ones - 1, (theta - 1)[None]), noises))
        for noise in noises:
            theta, _ = last(multiplicative(problem, rule, (theta, ones), [noise]))
        torch.testing.assert_close(theta - 1, expected[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_multiplicative_linearization_is_of_second_order(scale):
    """Half the noise leaves a quarter of the distance between the loop and its linearization, from any θφ = 1."""
    problem, rule = Problem(6, 1), Rule(3, 0.2, scale)
    theta = torch.linspace(0.7, 1.4, 6, dtype=torch.float64)
    noises = list(minibatch_noise(problem, 4, 3, 40, generator()))
    h, gamma = problem.curvature, rule.gamma
    distances = []
    for amplitude in (2e-3, 1e-3):
        scaled = [amplitude * noise for noise in noises]
        start = theta.expand(4, 1, 6), (1 / theta).expand(4, 3, 6)
        base, members = last(multiplicative(problem, rule, start, scaled))
        deviation = torch.zeros(4, 3, 6, dtype=torch.float64)
        for noise in scaled:
            gradient = h * deviation + noise
            shared = gradient.sum(1, keepdim=True)
            deviation = deviation - 0.2 * theta**2 * gradient - 0.2 * gamma / theta**2 * shared
        distances.append((base * members - 1 - deviation).abs().max().item())
    assert 3.9 < distances[0] / distances[1] < 4.1 and distances[0] < 0.01 * amplitude


def test_multiplicative_approximation_for_little_noise():
    problem = Problem(20, 10**5)
    for rule in (Rule(1, 0.3), Rule(5, 0.15, "sum"), Rule(5, 0.3, "mean")):
        losses = multiplicative_losses(problem, rule, 300, 60, 20, generator())
        for loss, theory in zip(losses, approximate_losses(problem, rule), strict=True):
            assert abs(z_of_losses(loss, theory)) < ALLOWED


def test_multiplicative_weights_settle_in_the_balance():
    """Started at θ = φ = 1, the balance of small steps, φ²/θ² goes to the y² of `balance`."""
    problem, rule = Problem(1, 16), Rule(10, 0.15, "sum")
    y = balance(problem, rule).item()
    step, member_step = 0.15 * (1 / y + 10 * y), 0.15 / y
    assert (y**2 - 0.1) * (2 - member_step) == pytest.approx(0.9 * (2 - step), rel=1e-12) and y < 0.7
    ones = torch.ones(200, 10, 1, dtype=torch.float64)
    noises = minibatch_noise(problem, 200, 10, 1000, generator())
    states = list(multiplicative(problem, rule, (ones[:, :1], ones), noises))[-300:]
    found = torch.stack([(members.square().mean(1, keepdim=True) / base.square()).mean() for base, members in states])
    assert found.mean().sqrt() == pytest.approx(y, rel=2 * 0.15 / 16)  # an error of order α/B
    assert balance(Problem(), Rule(1, 0.5)).tolist() == pytest.approx([1.0] * 100)


def test_chance_of_a_false_alarm():
    # Student's t with 1 and 2 degrees of freedom, by hand; with many, the normal distribution.
    assert chance(1, 2) == pytest.approx(1 - 2 / math.pi * math.atan(4), rel=1e-8)
    assert chance(3, 3) == pytest.approx(3 * (1 - 4 / math.sqrt(18)), rel=1e-8)
    assert chance(1, 10**6) == pytest.approx(math.erfc(4 / math.sqrt(2)), rel=1e-3)


def test_command(tmp_path, capsys):
    output = tmp_path / "out" / "nqp"
    arguments = [*"--quick --members 1,4 --step-sizes 0.1,0.2 --shares 0,0.5,1 --output".split(), str(output)]
    assert main(["nqp", *arguments]) == 0
    printed = capsys.readouterr()
    results = json.loads((output / "results.json").read_text())
    settings = {
        (cell["rule"]["num_members"], cell["rule"]["step_size"], cell["rule"]["base_grad_scale"], cell["share"])
        for cell in results["cells"]
    }
    four = {("mean", 0.0), ("mean", 0.5), ("sum", 0.0), ("sum", 0.5), ("mean", 1.0)}
    # K = 1 once, whatever the share; share 1 once, whatever the base gradient.
    assert settings == {(4, step, *rest) for step in (0.1, 0.2) for rest in four} | {
        (1, step, "mean", 0.0) for step in (0.1, 0.2)
    }
    assert len(results["cells"]) == 12 and len(results["multiplicative"]) == 6
    problem, zs = Problem(), []
    for cell in results["cells"]:
        rule, late = Rule(**cell["rule"]), late_mask(100, cell["share"])
        theory = expected_losses(problem, rule, late)
        late_theory = expected_losses(problem, rule, late, results["steps"] // rule.num_members)[0]
        for name, value in (("averaged", theory[0]), ("member", theory[1]), ("from_t0", late_theory)):
            loss = cell[name]
            assert loss["theory"] == pytest.approx(value, rel=1e-12)
            assert loss["z"] == pytest.approx((loss["mean"] - value) / loss["standard_error"], rel=1e-9)
            if name != "member" or cell["share"]:
                zs.append(abs(loss["z"]))
    checks = results["checks"]
    assert (checks["number"], checks["failed"]) == (30, 0) == (len(zs), sum(z > 4 for z in zs))
    assert checks["largest"] == max(zs) and 0 < checks["chance"] < 0.1
    table = (output / "nqp.md").read_text(encoding="utf-8")
    assert table.strip() in printed.out and "30 checks" in table
    assert "if the seeds' losses were normal" in table  # else the bound does not hold
    assert sum(line.startswith("|") and "±" in line for line in table.splitlines()) == 12 + 6
    assert "\r" not in printed.err and printed.err.count("\n") == 4  # a line a stage
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "matplotlib is not installed" in printed.out and not (output / "nqp.png").exists()
    else:
        assert (output / "nqp.png").read_bytes().startswith(b"\x89PNG")
    assert not list(output.glob("*.tmp")) and not list(output.glob(".*"))


def test_command_fails_where_theory_is_wrong(tmp_path, monkeypatch, capsys):
    right = nqp_command.expected_losses
    monkeypatch.setattr(nqp_command, "expected_losses", lambda *args: tuple(2 * loss for loss in right(*args)))
    arguments = ["--quick", "--members", "2", "--shares", "1", "--step-sizes", "0.1", "--output", str(tmp_path)]
    assert main(["nqp", *arguments]) == 1
    assert "3 checks" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["checks"]["failed"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--members", "1,0"], "--members: must be a whole number, 1 or more, got '0'"),
        (["--members", "2,2"], "members must be one value or more, all different, got [2, 2]"),
        (["--step-sizes", "0.1;0.2"], "--step-sizes: must be numbers with commas between them, got '0.1;0.2'"),
        (["--step-sizes", "0.5"], "step_size must be below 2/(γ·K·h) = 0.4 for K = 5"),
        (["--step-sizes", "2", "--base-grad-scale", "mean"], "step_size must be below 2/(γ·K·h) = 2 for K = 1"),
        (["--shares", "0.5,1.5"], "share must be from 0 to 1, got 1.5"),
        (["--seeds", "1"], "--seeds: must be a whole number, 2 or more, got '1'"),
        (["--dimension", "1000000000"], "200 × 10 × 1000000000: 14,901.2 GiB, and that several times"),
        (["--steps", "9"], "the number of steps, minibatches, must be at least K = 10, got 9"),
        (["--dimension", "many"], "--dimension: must be a whole number"),
        (["--late-coordinates", "flattest"], "invalid choice: 'flattest'"),
        (["--output", "file/inside"], "file"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    try:
        code = main(["nqp", *arguments])
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and "error: " in captured.err and message in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
