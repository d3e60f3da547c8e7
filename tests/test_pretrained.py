"""Weights to start from: files as training scripts leave them, libraries' by name; what does not fit is named."""

import pytest
import torch

from latephase_kernels.models import SmallResNet
from latephase_kernels.train.pretrained import load_pretrained
from latephase_kernels.train.recipe import Model


def network(seed=0, **options):
    torch.manual_seed(seed)
    return SmallResNet(num_classes=3, in_channels=3, widths=[4, 4], **options)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 90, "args": "x"},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        lambda state: {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")},
    ],
)
def test_files_of_training_scripts(wrapped, tmp_path):
    source = network(1)
    torch.save(wrapped(source.state_dict()), tmp_path / "weights.pth")
    target = network(2)
    load_pretrained(target, Model("small_resnet", weights=str(tmp_path / "weights.pth")))
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name


def test_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    source = network(1)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    target = network(2)
    load_pretrained(target, Model("small_resnet", weights=str(tmp_path / "weights.safetensors")))
    assert all(torch.equal(a, b) for a, b in zip(target.state_dict().values(), source.state_dict().values()))
    (tmp_path / "weights.safetensors").write_bytes(b"\xff" * 50)
    with pytest.raises(ValueError, match="weights.safetensors is damaged or no weights"):
        load_pretrained(target, Model("small_resnet", weights=str(tmp_path / "weights.safetensors")))


def test_old_densenet_names(tmp_path):
    """torchvision's published files; its own loader renames, too."""
    models = pytest.importorskip("torchvision.models")
    source = models.DenseNet(4, (2, 2), 4, num_classes=3)
    old = {}
    for name, tensor in source.state_dict().items():
        for part in ("norm1", "norm2", "conv1", "conv2"):
            if "denselayer" in name:
                name = name.replace(f".{part}.", f".{part[:4]}.{part[4]}.")
        old[name] = tensor
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet.pth")
    target = models.DenseNet(4, (2, 2), 4, num_classes=3)
    load_pretrained(target, Model("torchvision:densenet", weights=str(tmp_path / "densenet.pth")))
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name


class Hostile:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    "content, message",
    [
        ({"x": torch.zeros(2)}, r"does not fit small_resnet: it lacks: conv.weight and [0-9]+ more"),
        ([1, 2], "holds no state dict of tensors"),
        ({"state_dict": {"a": 1}}, "holds no state dict of tensors"),
        ({"x": Hostile()}, "is damaged or no weights"),
    ],
)
def test_files_that_are_something_else(content, message, tmp_path, capsys):
    torch.save(content, tmp_path / "weights.pt")
    before = network().state_dict()
    model = network()
    with pytest.raises(ValueError, match=message):
        load_pretrained(model, Model("small_resnet", weights=str(tmp_path / "weights.pt")))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "executed" not in capsys.readouterr().out


def test_weights_that_do_not_fit(tmp_path):
    path = str(tmp_path / "weights.pt")
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = dict(model.state_dict())
    head = [name for name in state if name.endswith("bias")][-1]
    torch.save({**state, head: torch.zeros(10)}, path)
    with pytest.raises(ValueError, match=rf"it has another shape: {head} is \[10\], expected \[3\]; give weights of"):
        load_pretrained(model, Model("small_resnet", weights=path))
    torch.save({**state, "more": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="it has unknown: more; give weights of this architecture"):
        load_pretrained(model, Model("small_resnet", weights=path))
    with open(path, "wb") as file:
        file.write(b"PK\x03\x04 no")
    with pytest.raises(ValueError, match="is damaged or no weights"):
        load_pretrained(model, Model("small_resnet", weights=path))
    with pytest.raises(FileNotFoundError, match="there is no file .*gone.pt"):
        load_pretrained(model, Model("small_resnet", weights=str(tmp_path / "gone.pt")))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_names_of_libraries(monkeypatch):
    with pytest.raises(ValueError, match=r"model.weights must be a file \(.pth, .pt, .* for small_resnet, got 'IMAGE"):
        load_pretrained(network(), Model("small_resnet", weights="IMAGENET1K_V1"))
    models = pytest.importorskip("torchvision.models")
    with pytest.raises(ValueError, match="must be IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT or a file .*, got 'IMAGENET9'"):
        load_pretrained(network(), Model("torchvision:resnet50", weights="IMAGENET9"))
    source = models.resnet18()
    asked = []
    monkeypatch.setattr(
        models.ResNet18_Weights, "get_state_dict", lambda self, **_: asked.append(self) or source.state_dict()
    )
    target = models.resnet18()
    load_pretrained(target, Model("torchvision:resnet18", weights="IMAGENET1K_V1"))
    assert asked == [models.ResNet18_Weights.IMAGENET1K_V1]
    assert all(torch.equal(a, b) for a, b in zip(target.state_dict().values(), source.state_dict().values()))
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="must be pretrained or a file for timm:resnet18, got 'IMAGENET1K_V1'"):
        load_pretrained(network(), Model("timm:resnet18", weights="IMAGENET1K_V1"))
