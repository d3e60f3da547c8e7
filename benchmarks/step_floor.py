"""The arithmetic floor of a training step: convolutions at the rate of a matrix product, the rest at copy speed.

    convolutions and linear layers: 2·(products) FLOPs forward, as many for each gradient, over the matrix rate
    batch norm (+ ReLU): 2e bytes a value forward, 3e backward; a residual: e each way; optimizer: 20 bytes a parameter

over the copy bandwidth, e bytes a value. Nothing else is counted: no pooling, loss, launches or concatenations.
"""

import statistics

import torch
from step_contenders import Setting
from timing import copy_bandwidth, interleaved
from torch import nn

# They end in BN → add → ReLU: the batch norm reads a residual and writes its gradient.
_BLOCKS = ("BasicBlock", "Bottleneck")


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large square matrix product."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = interleaved({"mm": lambda: torch.mm(a, b)}, device, seconds=1.0)["mm"]
    return 2 * n**3 / statistics.median(times)


def work(setting: Setting) -> tuple[float, float]:
    """FLOPs and bytes of a training step on K·B images."""
    model = setting.model()
    flops: list[float] = []
    counted = {"values": 0}

    def multiply(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        forward = 2 * output.numel() * module.weight[0].numel()
        flops.append(forward * (3 if flops else 2))  # the images need no gradient

    def normalize(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        counted["values"] += 5 * output.numel()

    def add(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        counted["values"] += 2 * output.numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(multiply)
        elif isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(normalize)
        elif type(module).__name__ in _BLOCKS:
            module.register_forward_hook(add)
    with torch.no_grad():
        model(setting.batch()[0][: setting.rows])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    e = torch.finfo(setting.dtype).bits // 8
    return setting.num_members * sum(flops), setting.num_members * e * counted["values"] + 20 * parameters


def arithmetic_floor(setting: Setting) -> dict:
    """Return its milliseconds, and what they are made of."""
    flops, moved = work(setting)
    rate, bandwidth = matrix_rate(setting.device, setting.dtype), copy_bandwidth(setting.device)
    seconds = flops / rate + moved / bandwidth
    return {
        "ms": 1e3 * seconds, "images/s": setting.num_members * setting.rows / seconds,
        "GFLOP": flops / 1e9, "GB": moved / 1e9, "matrix GFLOP/s": rate / 1e9, "copy GB/s": bandwidth / 1e9,
    }  # fmt: skip
