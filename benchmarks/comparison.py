"""What the benchmarks of the gains share: contenders checked against float64, timed in turn, and their tables.

A contender is a function of a case's leaves. One whose values or gradients are off is named and not timed.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from timing import HUGE_PAGES, attempt, copy_bandwidth, geometric_mean, interleaved, quartiles, ratios

from latephase_kernels.train.runs import processor

OURS = "ours"


def with_gradients(function, leaves, dy):
    """Return y and the leaves' gradients, all allocated anew."""
    for leaf in leaves:
        leaf.grad = None
    y = function(*leaves)
    y.backward(dy)
    return y.detach(), *(leaf.grad for leaf in leaves)


def error(results, truth):
    """Return the largest error of the results, each relative to its largest value; NaN counts as infinite."""
    errors = [(r.double() - t).abs().max() / t.abs().max() for r, t in zip(results, truth, strict=True)]
    return torch.stack(errors).nan_to_num(torch.inf).max().item()


def check(functions, leaves, dy, formula, plain):
    """Return the errors of the functions by name (0 for those in `plain`), and the rows of those that are not timed."""
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = with_gradients(formula, wide, dy.double())
    allowed = 2e-5 + 6 * torch.finfo(dy.dtype).eps
    errors, rows = {}, {}

    def error_of(name, function):
        results = with_gradients(function, leaves, dy)
        errors[name] = 0.0 if name in plain else error(results, truth)
        return errors[name]

    for name, function in functions.items():
        failure = attempt(lambda name=name, function=function: error_of(name, function), allowed, "error")
        if failure is not None:
            rows[name] = failure
    return errors, rows


def compare(functions, leaves, dy, formula, arguments, *, plain=(), work=0.0):
    """Return {contender: figures} of forward and backward of each function.

    Args:
        functions: by name; one of them OURS.
        leaves, dy: arguments that require gradients, and the gradient of the answer.
        formula: what the functions compute, in plain PyTorch; runs in float64.
        arguments: of make_parser.
        plain: names of those that compute something else, and are neither checked nor peers.
        work: useful bytes, or operations, of one call.
    """
    errors, rows = check(functions, leaves, dy, formula, plain)
    timed = {name: f for name, f in functions.items() if name not in rows}
    steps = {name: lambda f=f: with_gradients(f, leaves, dy) for name, f in timed.items()}
    clock = time.thread_time if arguments.one_thread else time.perf_counter
    times = interleaved(steps, dy.device, seconds=arguments.seconds, clock=clock)
    for name, values in times.items():
        low, median, high = quartiles(values)
        rows[name] = {
            "ms": 1e3 * median, "ms_quartiles": [1e3 * low, 1e3 * high], "rounds": len(values),
            "error": None if name in plain else errors[name], "work_per_second": work / median,
        }  # fmt: skip
    if OURS in timed:
        fastest = min((n for n in timed if n not in (OURS, *plain)), key=lambda n: rows[n]["ms"])
        rows[OURS] |= {"fastest_peer": fastest, "to_fastest_peer": ratios(times[OURS], times[fastest])}
        rows[OURS] |= {"to": {name: ratios(times[OURS], times[name]) for name in plain}}
    return rows


def describe(rows):
    """Lines to print of one table."""
    for name, row in rows.items():
        if "ms" not in row:
            yield f"  {name:30} {row.get('failed') or 'off by {:.1e}'.format(row['error'])}, not timed"
            continue
        line = f"  {name:30} {row['ms']:9.2f} ms ({row['ms_quartiles'][0]:.2f} … {row['ms_quartiles'][1]:.2f})"
        ratios_to = dict(row.get("to", {}))
        if "fastest_peer" in row:
            ratios_to[row["fastest_peer"]] = row["to_fastest_peer"]
        for other, (low, ratio, high) in ratios_to.items():
            line += f"   × {ratio:.2f} ({low:.2f} … {high:.2f}) {other}"
        yield line


def markdown(tables, plain, floor=None):
    """The table of all cases: ours beside the fastest peer, and beside `plain`."""
    lines = [f"| case | fastest peer ms | ours ms | to fastest peer | to {plain} |" + (" floor |" if floor else "")]
    lines.append("|" + "---|" * (6 if floor else 5))
    for table in tables:
        row = table["rows"][OURS]
        if "ms" not in row:
            continue
        peer = table["rows"][row["fastest_peer"]]["ms"]
        spread = [f"{r:.2f} ({low:.2f} … {high:.2f})" for low, r, high in (row["to_fastest_peer"], row["to"][plain])]
        line = f"| {table['case']} | {peer:.1f} ({row['fastest_peer']}) | {row['ms']:.1f} | {' | '.join(spread)} |"
        lines.append(line + (f" {table['rows'][floor]['ms'] / peer:.2f} |" if floor else ""))
    return "\n".join(lines)


def make_parser(description, *, seconds):
    """The options that these benchmarks share."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=seconds, help="for each case")
    parser.add_argument(
        "--one-thread", action="store_true", help="its CPU time in place of the clock's: for a machine in use"
    )
    parser.add_argument("--huge-pages", **HUGE_PAGES)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes its time")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/OP_DEVICE_DTYPE.json")
    return parser


def compiled(functions, arguments):
    """Return the functions under torch.compile as contenders of their own."""
    if arguments.no_compile:
        return {}
    return {f"compiled {name}": torch.compile(function, dynamic=False) for name, function in functions.items()}


def run(op, arguments, cases, plain, floor=None):
    """Time cases, an iterable of (name, rows), print them, and write JSON after each one."""
    device = torch.device(arguments.device)
    if arguments.one_thread:
        torch.set_num_threads(1)
    report = {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": arguments.dtype,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "members": arguments.members, "load": os.getloadavg()[0], "huge pages": arguments.huge_pages,
        "clock": "CPU time of one thread" if arguments.one_thread else "wall",
        "copy GB/s": copy_bandwidth(device) / 1e9, "tables": [],
    }  # fmt: skip
    print({name: value for name, value in report.items() if name != "tables"})
    results = Path(__file__).parent / "results"
    output = arguments.output or results / f"{op}_{arguments.device}_{arguments.dtype}.json"
    output.parent.mkdir(exist_ok=True)
    for case, rows in cases:
        print(f"\n{case}", *describe(rows), sep="\n", flush=True)
        report["tables"].append({"case": case, "rows": rows})
        ours = [table["rows"][OURS] for table in report["tables"] if "ms" in table["rows"][OURS]]
        if ours:
            report["geometric means"] = {
                "ours to fastest peer": geometric_mean([row["to_fastest_peer"][1] for row in ours]),
                f"ours to {plain}": geometric_mean([row["to"][plain][1] for row in ours]),
            }
        output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{markdown(report['tables'], plain, floor)}\n\n{report.get('geometric means')}")
