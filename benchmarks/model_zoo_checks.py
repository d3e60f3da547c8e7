"""What expand and collapse must hold on any classification model, checked in float64.

Shapes: K members, B rows each. Stacked input is [K·B, …], member-major.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten

import latephase_kernels as lp

# Both sides compute the same in float64, in another order of summation. Deep nets at random weights amplify its
# 1e-16 by some thousands; a mistake changes the first digits.
TOLERANCE = 1e-8
_RANDOM = ("p", "drop_prob", "drop_rate", "dropout", "dropout_p", "attn_drop", "proj_drop")


class Mismatch(AssertionError):
    """A model does not do what it must after expand or collapse."""


def prepare(model: nn.Module) -> nn.Module:
    """Return model in float64, without randomness, and with weights that hide nothing."""
    for module in model.modules():
        for name in _RANDOM:
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
        for parameter in model.parameters():
            if parameter.numel() and parameter.abs().max() < 1e-2:  # a layer scale of 1e-6 or a last weight of 0
                parameter.normal_(0.0, 0.1)
    return model.double()


def _tensors(output) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _compare(what: str, found: list[Tensor], expected: list[Tensor], scale: float = 0.0) -> float:
    """Return the largest difference relative to each tensor's own largest value, or to `scale` where that is more."""
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        raise Mismatch(f"{what}: shapes differ")
    worst = 0.0
    for one, other in zip(found, expected):
        if other.numel():
            size = max(other.abs().max().item(), scale)
            error = (one - other).abs().max().item() / size if size else float(bool(one.any()))
            if not error <= TOLERANCE:
                raise Mismatch(f"{what}: relative difference {error:.1e}")
            worst = max(worst, error)
    return worst


@torch.no_grad()
def _run(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [tensor.clone() for tensor in _tensors(model(x))]


def _train(model: nn.Module, x: Tensor, weights: list[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs and their weights (random ones if None), after the backward pass of the weighted sum."""
    outputs = _tensors(model(x))
    weights = weights or [torch.randn_like(output) for output in outputs]
    sum((output * weight).sum() for output, weight in zip(outputs, weights)).backward()
    return [output.detach() for output in outputs], weights


def _check_gradients(expanded: nn.Module, plains: list[nn.Module]) -> float:
    """A member's gradient is its plain copy's, a base weight's the sum of the copies'."""
    found, expected = [], []
    for (name, parameter), *copies in zip(expanded.named_parameters(), *(plain.named_parameters() for plain in plains)):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in copies]
        together = torch.stack(gradients)
        expected.append(together if hasattr(parameter, "num_members") else together.sum(0))
        found.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        if [other for other, _ in copies] != [name] * len(copies):
            raise Mismatch(f"parameter {name} changed its place")
    scale = max(gradient.abs().max().item() for gradient in expected)
    # Gradients that are zero in exact arithmetic, as of a bias before a batch norm, are measured by the largest one.
    return _compare("gradients", found, expected, 1e-3 * scale)


def _check_shared_statistics(shared: nn.Module, before: dict, plains: list[nn.Module]) -> float:
    """Statistics of batch norms that are no targets move as in a loop: r ← (1 − m)·r + m·s_k, member after member."""
    found, expected = [], []
    copies = [dict(plain.named_modules()) for plain in plains]
    for name, module in shared.named_modules():
        tracked = before.get(f"{name}.num_batches_tracked")
        if not isinstance(module, _BatchNorm) or tracked is None or module.running_mean.dim() > 1:
            continue
        if module.momentum is None or copies[0][name].num_batches_tracked != tracked + 1:
            continue  # a cumulative average, or a layer that is called more than once: not this formula
        for key in ("running_mean", "running_var"):
            start = running = before[f"{name}.{key}"]
            for modules in copies:
                moved = getattr(modules[name], key) - (1 - module.momentum) * start
                running = (1 - module.momentum) * running + moved
            found.append(getattr(module, key))
            expected.append(running)
    return _compare("statistics of shared batch norms", found, expected)


def check(model: nn.Module, x: Tensor, num_members: int) -> float:
    """Return the largest relative error of everything that expand and collapse must keep of model.

    Args:
        model: prepared, in train mode (layers may be frozen), after a pass (statistics other than 0 and 1); it is not
            changed.
        x: [K·B, …], float64.
        num_members: K.

    Raises:
        Mismatch: something is not kept, by more than rounding.
    """
    rows = x.chunk(num_members)
    errors = []
    state = copy.deepcopy(model.state_dict())
    plain_answer = _run(copy.deepcopy(model).eval(), rows[0])

    # Identical members: eval answers, and collapse gives the model back.
    expanded = lp.expand(copy.deepcopy(model), num_members)
    errors.append(_compare("eval output", _run(copy.deepcopy(expanded).eval(), rows[0]), plain_answer))
    for mode in ("exact", "weights"):
        back = lp.collapse(copy.deepcopy(expanded), mode=mode)
        found = back.state_dict()
        if list(found) != list(state) or not all(_same_bits(found[key], state[key]) for key in state):
            raise Mismatch(f'collapse(mode="{mode}") of identical members changes the state dict')
        if [type(module) for module in back.modules()] != [type(module) for module in model.modules()]:
            raise Mismatch("collapse changes the type of a module")
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in fresh.state_dict().values():
            tensor.zero_()
    fresh.load_state_dict(found, strict=True)
    del fresh, back, found  # large models: no more copies at a time than the next comparison needs

    # Training: every member as a plain copy of its own.
    stacked, weights = _train(expanded, x)
    plains = [copy.deepcopy(model) for _ in rows]
    parts = [
        _train(plain, part, [weight.chunk(num_members)[k] for weight in weights])[0]
        for k, (plain, part) in enumerate(zip(plains, rows))
    ]
    expected = [torch.cat(outputs) for outputs in zip(*parts)]
    errors.append(_compare("training output", stacked, expected))
    errors.append(_check_gradients(expanded, plains))
    statistics = [torch.stack(buffers) for buffers in zip(*(list(_statistics(plain)) for plain in plains))]
    errors.append(_compare("running statistics", list(_statistics(expanded)), statistics))

    # One batch norm as late-phase weights: the others still normalize each member by itself.
    first = next(name for name, module in model.named_modules() if isinstance(module, _BatchNorm))
    shared = lp.expand(copy.deepcopy(model), num_members, targets=lambda name, module: name == first)
    errors.append(_compare("training output with shared batch norms", _run(shared, x), expected))
    errors.append(_check_shared_statistics(shared, state, plains))
    del shared, plains, expanded

    # Members that differ: the collapsed model answers as they do on average.
    noisy = lp.expand(copy.deepcopy(model), num_members, noise_std=0.1)
    _run(noisy, x)
    average = _run(noisy.eval(), rows[0])
    errors.append(_compare("output after exact collapse", _run(lp.collapse(noisy), rows[0]), average))
    return max(errors)


@torch.no_grad()
def sensitivity(model: nn.Module, x: Tensor) -> float:
    """Return how far rounding x differently moves the plain model's training output, relative to its largest value."""
    moved = torch.nextafter(x, torch.where(torch.rand_like(x) < 0.5, -torch.inf, torch.inf))
    pairs = zip(_run(copy.deepcopy(model), moved), _run(copy.deepcopy(model), x))
    return max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other) and torch.equal(one.signbit(), other.signbit())


def _statistics(model: nn.Module):
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield module.running_mean
            yield module.running_var
            yield module.num_batches_tracked.double()
