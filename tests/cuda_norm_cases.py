"""Cases of ensemble batch norm on CUDA, and the comparison with the float64 reference on the CPU."""

import torch
from accuracy import ACTIVATIONS

from latephase_kernels.ops.ensemble_batch_norm import ensemble_batch_norm
from latephase_kernels.reference import ensemble_batch_norm as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
LAYOUTS = ("contiguous", "channels_last")
SLOPES = ("silu", "hardswish")  # activations whose gradient is more than dy or 0

# What sends small groups to every tier: the shared memory of a block and the size of a cluster, lowered.
TIERS = {
    "as they fit": {},
    "clusters": {"LATEPHASE_CUDA_SHARED_KIB": "6"},
    "virtual clusters": {"LATEPHASE_CUDA_SHARED_KIB": "12", "LATEPHASE_CUDA_CLUSTER": "1"},
    "streaming": {"LATEPHASE_CUDA_SHARED_KIB": "0"},
}

# A small case of each tier, of two bytes a value and [2, batch, channels, 7, 7]: batch, channels, shared memory of a
# block in KiB, largest cluster.
ONE_CASE = {
    "several groups a block": (5, 5, "64", "1"),  # in channels_last one
    "one group a block": (112, 5, "227", "1"),  # in channels_last backward virtual clusters
    "clusters": (41, 5, "6", "16"),
    "packed planes": (11, 16, "64", "1"),  # in channels_last not
    "packed planes in clusters": (41, 16, "24", "16"),
    "virtual clusters": (41, 5, "2", "1"),
    "streaming": (41, 5, "0", "1"),
}


def memory_format(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if layout == "contiguous" or tensor.dim() not in formats:
        return tensor
    return tensor.contiguous(memory_format=formats[tensor.dim()])


def normal(shape, dtype, layout="contiguous", *, seed=0, scale=1.0, shift=0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift
    return memory_format(values.to("cuda", dtype), layout)


def case_of(shape, dtype, layout, residual=False, shared=False, parameter_dtype=torch.float32, gain=False) -> dict:
    K, B, C, spatial = shape
    parameters = (C,) if shared else (K, C)
    return {
        "input": normal((K * B, C, *spatial), dtype, layout, seed=1, scale=2, shift=0.5),
        "weight": normal(parameters, parameter_dtype, seed=2),
        "bias": normal(parameters, parameter_dtype, seed=3),
        "residual": normal((K * B, C, *spatial), dtype, layout, seed=4) if residual else None,
        "gain": normal(parameters, parameter_dtype, seed=8) if gain else None,
        "running_mean": normal((K, C), torch.float32, seed=5, scale=0.1),
        "running_var": normal((K, C), torch.float32, seed=6).square() + 0.5,
        "dy": normal((K * B, C, *spatial), dtype, layout, seed=7),
    }


def run(case: dict, K: int, training: bool, activation: str) -> dict:
    """Return output, gradients and new running statistics of the op on the GPU, on the backend that is set."""
    leaves = {name: case[name].detach().clone().requires_grad_() for name in ("input", "weight", "bias")}
    for name in ("residual", "gain"):
        if case[name] is not None:
            leaves[name] = case[name].detach().clone().requires_grad_()
    running_mean, running_var = case["running_mean"].clone(), case["running_var"].clone()
    y = ensemble_batch_norm(
        leaves["input"],
        running_mean,
        running_var,
        leaves["weight"],
        leaves["bias"],
        training,
        num_members=K,
        residual=leaves.get("residual"),
        activation=activation,
        output_gain=leaves.get("gain"),
    )
    grads = torch.autograd.grad(y, list(leaves.values()), case["dy"])
    return {
        "y": y.detach(),
        "running_mean": running_mean,
        "running_var": running_var,
        **{f"d{name}": grad for name, grad in zip(leaves, grads)},
    }


def expected(case: dict, K: int, training: bool, activation: str, passed: torch.Tensor) -> dict:
    """Return the same in float64 on the CPU, by what the op found that a ReLU passed: rounding may decide."""
    double = {name: t.detach().double().cpu() for name, t in case.items() if t is not None}
    names = [name for name in ("input", "weight", "bias", "residual", "gain") if name in double]
    for name in names:
        double[name].requires_grad_()
    z, mean, var = reference.ensemble_batch_norm(
        double["input"],
        double["running_mean"],
        double["running_var"],
        double["weight"],
        double["bias"],
        double.get("residual"),
        training,
        1e-5,
        K,
        "none",
    )
    gate = passed.double().cpu() if activation in ("relu", "relu6") else torch.ones_like(z)
    y, dz = ACTIVATIONS[activation](z), double["dy"] * gate
    if activation in SLOPES:
        (dz,) = torch.autograd.grad(y, z, dz, retain_graph=True)
    if "gain" in double:
        gain = reference.per_row(double["gain"], z)
        y, z = y * gain, z * gain
    grads = torch.autograd.grad(z, [double[name] for name in names], dz)
    scale = reference.per_row(double["weight"] * (var + 1e-5).rsqrt(), z)
    n = z.numel() // mean.numel()
    running_mean, running_var = double["running_mean"], double["running_var"]
    if training:
        running_mean = running_mean.lerp(mean, 0.1)
        running_var = running_var.lerp(var * n / (n - 1), 0.1)
    return {
        "y": y.detach(),
        "running_mean": running_mean.detach(),
        "running_var": running_var.detach(),
        **{f"d{name}": grad for name, grad in zip(names, grads)},
        "dz times scale": (dz * scale).detach(),
    }


def check(case: dict, K: int, training: bool, activation: str) -> None:
    actual = run(case, K, training, activation)
    passed = (actual["y"] != 0) & ((actual["y"] != 6) | (activation == "relu"))
    right = expected(case, K, training, activation, passed)
    dtype = case["input"].dtype
    n = case["input"].numel() // case["running_mean"].numel()
    assert actual["y"].dtype == dtype and actual["y"].stride() == case["input"].stride()
    for name, value in actual.items():
        error = (value.double().cpu() - right[name]).abs()
        rounding = ROUNDING[value.dtype] if name in ("y", "dinput", "dresidual") else ROUNDING[torch.float32]
        if name in ("dweight", "dbias", "dgain"):
            rounding = max(ROUNDING[value.dtype], ROUNDING[torch.float32] * max(1.0, n**0.5))
        size = right[name].abs()
        if activation in SLOPES and name == "dinput":  # dz is rounded, as a tensor, before its means are subtracted
            size = torch.maximum(size, right["dz times scale"].abs())
        scale = size.clamp_min(right[name].abs().mean().item() + 1e-3)
        assert (error / scale).max().item() < 8 * rounding, name


def op_arguments(case: dict, K: int, activation: str) -> tuple:
    return case["input"], None, None, case["weight"], case["bias"], case["residual"], True, 1e-5, K, activation
