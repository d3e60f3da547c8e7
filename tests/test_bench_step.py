"""The benchmarks of training steps on tiny networks: contenders agree with members in turn, and it counts rightly."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
K, B = 3, 4


@pytest.fixture
def import_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield pytest.importorskip
    for name in set(sys.modules) - before:  # so that "timing" and "memory" stay the benchmarks' own names
        if getattr(sys.modules[name], "__file__", "") and str(BENCHMARKS) in (sys.modules[name].__file__ or ""):
            del sys.modules[name]


@pytest.fixture
def contenders(import_benchmark):
    return import_benchmark("step_contenders")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.relu(self.bn(self.conv(x))).mean((2, 3)))


def setting_of(contenders):
    return contenders.Setting("net", K, B, torch.device("cpu"), torch.float32, False, Net, 8)


def test_every_ensemble_has_the_gradients_of_the_members_in_turn(contenders):
    setting = setting_of(contenders)
    truth = contenders.STEPS[contenders.IN_TURN](setting).gradients()
    assert truth[1]["bn.weight"].shape == (K, 8) and truth[1]["conv.weight"].shape == (8, 3, 3, 3)
    for name in (contenders.SLICES, contenders.VMAP, contenders.OURS, contenders.FUSED):
        step = contenders.STEPS[name](setting)
        found = step.gradients()
        assert contenders.largest_difference(found, truth) < 1e-4, name
        step()
        found[1]["bn.weight"] = found[1]["bn.weight"].roll(1, 0)  # members mixed up
        assert contenders.largest_difference(found, truth) > 0.1
    plain = contenders.STEPS[contenders.PLAIN](setting).gradients()
    assert contenders.largest_difference(plain, truth) == float("inf")


def test_the_floor_has_neither_norm_nor_relu(contenders):
    step = contenders.STEPS[contenders.NO_NORM](setting_of(contenders))
    step()
    assert not [m for m in step.model.modules() if isinstance(m, (nn.BatchNorm2d, nn.ReLU))]
    assert torch.equal(torch.nn.functional.relu(torch.tensor([-1.0])), torch.tensor([0.0]))


def test_the_table_and_its_figures(contenders, tmp_path, monkeypatch):
    import bench_step

    monkeypatch.setitem(contenders.NETWORKS, "ResNet-18", (Net, 8))
    output = tmp_path / "step.json"
    chosen = ["--contenders", contenders.PLAIN, contenders.FUSED, contenders.NO_NORM]
    options = ["--networks", "ResNet-18", "--members", "3", "--rows", "4", "--layouts", "channels_last"]
    command = ["bench_step.py", "--device", "cpu", *options, *chosen, "--seconds", "0.1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    bench_step.main()
    (table,) = json.loads(output.read_text())["tables"]
    assert list(table["contenders"]) == chosen[1:]
    ours = table["contenders"][contenders.FUSED]
    assert ours["ms"] > 0 and ours["images/s"] > 0 and len(ours["to plain"]) == 3 and ours["gradient difference"] < 1e-4
    floor = table["arithmetic floor"]
    forward = 2 * (K * B) * (8 * 8 * 8 * 27 + 8 * 10)  # products of the convolution and the linear layer
    assert floor["GFLOP"] == pytest.approx((3 * forward - 2 * (K * B) * 8 * 8 * 8 * 27) / 1e9)
    parameters = sum(p.numel() for p in Net().parameters())
    assert floor["GB"] == pytest.approx((4 * 5 * K * B * 8 * 64 + 20 * parameters) / 1e9)


def test_live_bytes_counts_what_is_alive(contenders):
    import memory

    with memory.LiveBytes() as counted:
        a = torch.zeros(1024)
        b = a.view(32, 32) + 1  # the view is a's memory
        assert counted.live == 8192
        del a
        c = torch.ones(256)
    assert counted.live == 4096 + 1024 and counted.peak == 8192
    del b, c
    assert counted.live == 0


@pytest.mark.parametrize("late", [False, True])
def test_the_rest_alone_is_a_trainers_step_without_its_passes(late, import_benchmark, monkeypatch):
    bench = import_benchmark("bench_trainer")
    monkeypatch.setattr(bench, "IMAGES", 8)
    size = {"depth": 10, "width": 1, "batch": 2, "members": 2, "precision": "float32", "channels_last": False}
    trainer = bench.make_trainer(argparse.Namespace(device="cpu", **size), bench.random_images(), late)
    trainer.step()
    bench.leave_out_training(trainer)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    assert trainer.step() == (2 if late else 1)
    assert all(map(torch.equal, before, trainer.model.parameters()))
