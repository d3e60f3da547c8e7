"""Models of torchvision and timm, structurally different, expanded and collapsed; `benchmarks/model_zoo.py` runs all.

Shapes: K = 2 members, 2 samples each.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

_PATH = Path(__file__).parent.parent / "benchmarks" / "model_zoo_checks.py"
_SPEC = importlib.util.spec_from_file_location("model_zoo_checks", _PATH)  # by path: the tests run on a wheel as well
checks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(checks)

MODELS = {  # name → side of the image, options
    "torchvision/resnet18": (64, {}),
    "torchvision/densenet121": (64, {}),  # batch norms over concatenated features, in-place ReLUs
    "torchvision/mobilenet_v3_small": (64, {}),
    "torchvision/shufflenet_v2_x0_5": (64, {}),  # channels interleaved
    "torchvision/googlenet": (64, {"init_weights": False}),  # auxiliary outputs in training
    "timm/resnetv2_18d": (64, {}),  # BatchNormAct2d before the convolution
    "timm/mobilenetv3_small_050": (64, {}),  # BatchNormAct2d with several activations
    "timm/levit_128s": (224, {}),  # BatchNorm1d over [rows · tokens, C], two heads
    "timm/repvgg_a0": (64, {}),  # parallel branches, a batch norm without convolution
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    library, name = name.split("/")
    module = pytest.importorskip(library)
    side, options = MODELS[f"{library}/{name}"]
    make = module.create_model if library == "timm" else module.models.get_model
    torch.manual_seed(0)
    model = checks.prepare(make(name, num_classes=5, **options)).train()
    x = torch.randn(4, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    assert checks.check(model, x, 2) < checks.TOLERANCE


def _without(name, norm):
    setattr(norm, name, None)
    return norm


def _tracking_switched_off():
    norm = nn.BatchNorm2d(6)
    norm.track_running_stats = False  # the statistics stay, and normalize in eval mode
    return norm


def _twice():
    norm = nn.BatchNorm2d(6)
    return nn.Sequential(norm, nn.Conv2d(6, 6, 1), norm)


VARIANTS = {
    "no bias": lambda: _without("bias", nn.BatchNorm2d(6)),
    "no weight": lambda: _without("weight", nn.BatchNorm2d(6)),
    "not affine": lambda: nn.BatchNorm2d(6, affine=False),
    "frozen parameters": lambda: nn.BatchNorm2d(6).requires_grad_(False),
    "frozen layer": lambda: nn.BatchNorm2d(6).eval(),
    "untracked": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "tracking switched off": _tracking_switched_off,
    "cumulative": lambda: nn.BatchNorm2d(6, momentum=None),
    "one module twice": _twice,
    "synchronized": lambda: nn.SyncBatchNorm(6),
    "1d": lambda: nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(6), nn.Unflatten(2, (6, 6))),
    "3d": lambda: nn.Sequential(nn.Unflatten(2, (2, 3)), nn.BatchNorm3d(6), nn.Flatten(2, 3)),
}


@pytest.mark.parametrize("norm", VARIANTS)
def test_variants_of_batch_norm(norm):
    torch.manual_seed(0)
    # The first batch norm is the one target of the run with shared ones, so the variant is seen in both forms.
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        VARIANTS[norm](),
        nn.ReLU(),
        nn.Conv2d(6, 6, 1),
        VARIANTS[norm](),
        nn.Flatten(),
        nn.Linear(216, 5),
    )
    checks.prepare(model)
    model(torch.randn(3, 3, 8, 8, dtype=torch.float64))
    checks.check(model, torch.randn(6, 3, 8, 8, dtype=torch.float64), 2)


def test_the_checks_see_a_mistake():
    torch.manual_seed(0)
    model = checks.prepare(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(216, 5)))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    model.register_forward_pre_hook(
        lambda module, inputs: (inputs[0] + 1e-6 * inputs[0].mean(0),) if module.training else None
    )
    model(x)
    with pytest.raises(checks.Mismatch, match="training output: relative difference"):
        checks.check(model, x, 2)
