"""Compiles every Triton kernel ahead of time for sm_80, sm_90 and sm_100, without a GPU: no spills, no local memory.

The compiler runs in processes of its own (`python test_triton_compile.py 90` prints one target's table), because
TRITON_INTERPRET, which other tests set, turns every kernel of its process into an interpreted one.
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

CAPABILITIES = (80, 90, 100)
ELEMENTS = ("x", "y", "dy", "dx", "residual", "dresidual")
STATISTICS = ("mean", "var", "rstd", "running_mean", "running_var", "sum_dz", "sum_dz_xhat")
PER_MEMBER = (*STATISTICS, "weight", "bias", "gain", "dgain", "dbias")
SUMS = ("first", "second", "partials")
BLOCKS = dict(BLOCK_SPLITS=64, BLOCK_GROUPS=16)
FLAGS = dict(EPS=1e-5, WEIGHT_SHARED=False, BIAS_SHARED=False, GAIN_SHARED=False, BATCH_STATISTICS=True)
STANDALONE = ("ReLU6", "SiLU", "Hardswish")
APPLY_KERNELS = ("apply_kernel", "backward_apply_kernel")  # tiles of their own; others have a reduction's
NORM, ON_CHIP = "ensemble_batch_norm_streaming", "ensemble_batch_norm_resident"
GAIN, TILES = "member_gain", "tiles"
RESIDENT_KERNELS = {"resident_forward_kernel": 1, "resident_backward_kernel": 2}  # and how many operands they keep
RUNNING = ("running_mean", "running_var", "tracked")
VARIANTS = {  # row of the table: file, kernel, the optional tensors that it goes without
    "statistics": (NORM, "statistics_kernel", ["partials", *RUNNING]),
    "statistics, split": (NORM, "statistics_kernel", []),
    "merge statistics": (NORM, "merge_statistics_kernel", []),
    "apply + ReLU": (NORM, "apply_kernel", ["residual", "mask", "gain"]),
    "apply + ReLU + gain": (NORM, "apply_kernel", ["residual", "mask"]),
    "apply + residual + ReLU": (NORM, "apply_kernel", ["gain"]),
    "apply + SiLU": (NORM, "apply_kernel", ["residual", "mask", "gain"]),
    "backward reduce, SiLU": (NORM, "backward_reduce_kernel", ["mask"]),
    "backward apply, SiLU": (NORM, "backward_apply_kernel", ["mask", "dresidual", "gain"]),
    "backward reduce, ReLU recomputed": (NORM, "backward_reduce_kernel", ["mask", "partials"]),
    "backward reduce, ReLU bits, split": (NORM, "backward_reduce_kernel", []),
    "backward apply, ReLU recomputed": (NORM, "backward_apply_kernel", ["mask", "dresidual", "gain"]),
    "backward apply, ReLU recomputed, gain": (NORM, "backward_apply_kernel", ["mask", "dresidual"]),
    "backward apply, ReLU bits": (NORM, "backward_apply_kernel", ["gain"]),
    "on chip, statistics": (ON_CHIP, "resident_forward_kernel", ["y", "mask", "residual", "gain", "rstd", *RUNNING]),
    "on chip, forward + ReLU": (ON_CHIP, "resident_forward_kernel", ["mask", "residual", "gain"]),
    "on chip, forward + ReLU + gain": (ON_CHIP, "resident_forward_kernel", ["mask", "residual"]),
    "on chip, forward + residual + ReLU": (ON_CHIP, "resident_forward_kernel", ["gain"]),
    "on chip, forward + SiLU": (ON_CHIP, "resident_forward_kernel", ["mask", "residual", "gain"]),
    "on chip, backward, SiLU": (ON_CHIP, "resident_backward_kernel", ["mask", "dresidual", "gain"]),
    "on chip, forward + ReLU6": (ON_CHIP, "resident_forward_kernel", ["mask", "residual", "gain"]),
    "on chip, backward, ReLU6": (ON_CHIP, "resident_backward_kernel", ["mask", "dresidual", "gain"]),
    "on chip, forward + Hardswish": (ON_CHIP, "resident_forward_kernel", ["mask", "residual", "gain"]),
    "on chip, backward, Hardswish": (ON_CHIP, "resident_backward_kernel", ["mask", "dresidual", "gain"]),
    "on chip, backward, ReLU recomputed": (ON_CHIP, "resident_backward_kernel", ["mask", "dresidual", "gain"]),
    "on chip, backward, ReLU recomputed, gain": (ON_CHIP, "resident_backward_kernel", ["mask", "dresidual"]),
    "on chip, backward, ReLU bits": (ON_CHIP, "resident_backward_kernel", ["gain"]),
    "merge sums": (TILES, "merge_sums_kernel", []),
    "gain + bias + ReLU": (GAIN, "_forward_kernel", []),
    "gain backward": (GAIN, "_backward_kernel", ["partials"]),
    "gain backward without bias, split": (GAIN, "_backward_kernel", ["bias"]),
}

# The kernels around a matrix product: rows a member, in and out, or for the LSTM rows and units.
PRODUCTS = {
    "product forward": ("rank1_linear", "_product_kernel", (3152, 384, 1536)),
    "product forward, few rows": ("rank1_linear", "_product_kernel", (32, 500, 2000)),
    "product forward, odd rows": ("rank1_linear", "_product_kernel", (200, 785, 511)),
    "product backward": ("rank1_linear", "_product_kernel", (3152, 1536, 384)),
    "weight gradients": ("rank1_linear", "_weight_gradient_kernel", (3152, 384, 1536)),
    "weight gradients, few rows": ("rank1_linear", "_weight_gradient_kernel", (32, 500, 2000)),
    "weight gradients, odd rows": ("rank1_linear", "_weight_gradient_kernel", (200, 785, 511)),
    "LSTM step": ("rank1_lstm", "_step_kernel", (32, 500)),
    "LSTM step backward": ("rank1_lstm", "_step_backward_kernel", (32, 500)),
    "merge of parts": ("rank1_linear", "_merge_kernel", (1, 1, 1)),
}
PRECISIONS = (("float32", "ieee"), ("float32", "tf32"), ("bfloat16", "ieee"))
OPERANDS = {  # that have the data's type; other pointers are to float32
    "_product_kernel": ("a", "b", "out"),
    "_step_kernel": ("gates", "h_before", "weight", "output"),
    "_step_backward_kernel": ("gates", "weight", "dgates"),
}
GAINS = ("inner_gain", "outer_gain", "input_gain", "output_gain", "dweight", "ds", "dr", "total", "parts")
STATES = ("cells", "c_before", "dc")


def _layouts(kernel_name):
    """Sizes of rows in vectors and of odd rows, in both layouts; on chip, the largest that fit."""
    import torch

    from latephase_kernels.triton_kernels.tiles import Sizes

    for dtype in (torch.float32, torch.bfloat16):
        if kernel_name in RESIDENT_KERNELS:
            operands = RESIDENT_KERNELS[kernel_name]
            yield "contiguous 32×32", Sizes(4, 16 // operands, 64, 1024, False, dtype)
            yield "contiguous 7×7", Sizes(4, 128 // operands, 512, 49, False, dtype)
            yield "channels_last", Sizes(4, 64 // operands, 256, 16 * dtype.itemsize // 4, True, dtype)
            continue
        yield "contiguous 56×56", Sizes(4, 64, 64, 3136, False, dtype)
        yield "contiguous 7×7", Sizes(4, 64, 512, 49, False, dtype)
        yield "channels_last", Sizes(4, 64, 256, 196, True, dtype)


def _compile(file, kernel_name, without, sizes, capability, activation):
    """Return the compiled kernel as the launch in triton_kernels/<file>.py would specialize it."""
    import torch

    from latephase_kernels.triton_kernels import ensemble_batch_norm_resident, ensemble_batch_norm_streaming, tiles

    kernel = getattr(importlib.import_module(f"latephase_kernels.triton_kernels.{file}"), kernel_name)
    if kernel_name in RESIDENT_KERNELS:
        plan = ensemble_batch_norm_resident.resident_plan(sizes, RESIDENT_KERNELS[kernel_name])
    elif kernel_name in APPLY_KERNELS:
        plan = ensemble_batch_norm_streaming.apply_plan(sizes)
    else:
        plan = tiles.reduction(sizes)
    element = "*fp32" if sizes.dtype == torch.float32 else "*bf16"
    values = dict(
        FLAGS, **BLOCKS, **activation, ACC=sizes.acc, ROWS_OF_CHANNELS=sizes.rows_of_channels,
        BLOCK_R=plan.block_r, BLOCK_C=plan.block_c,
    )  # fmt: skip
    extents = dict(num_channels=sizes.channels, spatial=sizes.spatial)
    options = dict(num_warps=4 if "merge" in kernel_name else plan.num_warps)
    return _compiled(kernel, without, values, element, extents, capability, options)


def _compile_product(file, kernel_name, shape, dtype, precision, capability):
    """Return a kernel around a matrix product, compiled as the launch in triton_kernels/<file>.py specializes it."""
    import torch
    import triton.language as tl

    from latephase_kernels.triton_kernels import rank1_linear, rank1_lstm
    from latephase_kernels.triton_kernels.tiles import unit

    kernel = getattr(importlib.import_module(f"latephase_kernels.triton_kernels.{file}"), kernel_name)
    torch_dtype, without = getattr(torch, dtype), []
    values = dict(ACC=tl.float32, OPERAND=getattr(tl, dtype), PRECISION=precision)
    if kernel_name == "_product_kernel":
        tile = rank1_linear.product_tile(torch_dtype, precision, *shape)
        _, inner, outer = shape
        forward = inner < outer or outer % 16 != 0
        without = [] if forward else ["bias"]
        values |= dict(TRANSPOSED=forward, BIAS_SHARED=False, EVEN=inner % tile.k == 0, GROUP=8)
        values |= dict(INNER_UNIT=unit(inner), OUTER_UNIT=unit(outer))
        values |= dict(BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k)
    elif kernel_name == "_weight_gradient_kernel":
        tile = rank1_linear.gradient_plan(torch_dtype, precision, *shape).tile
        _, inner, outer = shape
        values |= dict(IN_UNIT=unit(inner), OUT_UNIT=unit(outer), BLOCK_O=tile.m, BLOCK_I=tile.n, BLOCK_M=tile.k)
    elif file == "rank1_lstm":
        tile = rank1_lstm.step_tile(torch_dtype, precision, *shape)
        values |= dict(H_UNIT=unit(shape[1]), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k)
    else:
        tile = rank1_linear.Tile(16, 16, 16, 4, 3)
        values |= dict(BLOCK_C=rank1_linear.MERGE_COLUMNS)
    element = "*fp32" if dtype == "float32" else "*bf16"
    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
    return _compiled(kernel, without, values, element, {}, capability, options)


def _compiled(kernel, without, values, element, extents, capability, options):
    """Compile a kernel; what `without` names is None, what `extents` names is specialized if 16 divides it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    data = OPERANDS.get(kernel.__name__, ())
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in without or name in values:
            signature[name] = "constexpr"
            constants[name] = values.get(name)
        elif name in (*ELEMENTS, *PER_MEMBER, *SUMS, *GAINS, *STATES, *data, "mask"):
            signature[name] = element if name in (*ELEMENTS, *data) else "*u8" if name == "mask" else "*fp32"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in ("momentum", "tracked"):
            signature[name] = "fp32" if name == "momentum" else "*i64"
        else:
            signature[name] = "i32"
            if extents.get(name, 1) % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options | kernel.run.keywords,
    )


def _resources(compiled):
    """Return {"REG": …, "STACK": …, "SHARED": …, "LOCAL": …} as cuobjdump reads them from the binary."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def _print_table(capability):
    print("target | kernel | layout | type | registers | shared | stack | local | warps")

    def print_row(row, layout, dtype, compiled):
        used = _resources(compiled)
        cells = (used["REG"], compiled.metadata.shared, used["STACK"], used["LOCAL"], compiled.metadata.num_warps)
        print(f"sm_{capability}", row, layout, dtype, *cells, sep=" | ", flush=True)

    for row, variant in PRODUCTS.items():
        for dtype, precision in PRECISIONS:
            compiled = _compile_product(*variant, dtype, precision, capability)
            print_row(row, "×".join(map(str, variant[2])), f"{dtype} {precision}", compiled)
    for row, variant in VARIANTS.items():
        names = [name.lower() for name in STANDALONE if name in row]
        activation = dict(ACTIVATION=names[0]) if names else dict(RELU=True, ACTIVATION="relu")
        for layout, sizes in _layouts(variant[1]):
            print_row(row, layout, str(sizes.dtype)[6:], _compile(*variant, sizes, capability, activation))


@pytest.fixture(scope="module")
def tables():
    """Start a process for each target at once; {target: process}."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])])
    processes = {
        capability: subprocess.Popen(
            [sys.executable, __file__, str(capability)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for capability in CAPABILITIES
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_without_spills(tables, capability):
    output, errors = tables[capability].communicate(timeout=600)
    print(output)
    assert tables[capability].returncode == 0, errors
    header, *rows = (line.split(" | ") for line in output.splitlines())
    assert len(rows) == len(VARIANTS) * 6 + len(PRODUCTS) * len(PRECISIONS)
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        assert cells["stack"] == cells["local"] == "0", cells


if __name__ == "__main__":
    _print_table(int(sys.argv[1]))
