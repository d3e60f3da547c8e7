"""Weights to start from: a library's, by their name, or a file of one's own."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .recipe import Model

_SUFFIXES = (".pth", ".pt", ".tar", ".safetensors")
_WRAPPERS = ("state_dict", "model", "model_state")  # where training scripts keep the weights in their checkpoints
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
# torchvision's files of DenseNets have names from before PyTorch 0.4: denselayer1.norm.1.weight for norm1.weight.
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\.\w+)$")


def load_pretrained(network: nn.Module, model: Model) -> None:
    """Load the weights that a recipe names into its plain network, strictly.

    Raises:
        ValueError: the weights are unknown, damaged, or do not fit the network; the message names keys.
        FileNotFoundError: there is no such file.
        ImportError: a library is missing.
        OSError: a file cannot be read, or a download fails.
    """
    assert model.weights is not None
    is_file = model.weights.endswith(_SUFFIXES)
    weights = _of_file(Path(model.weights)) if is_file else _of_library(model)
    expected = network.state_dict()
    found = {_key(name, expected): tensor for name, tensor in weights.items()}
    differing = [
        f"{name} is {list(tensor.shape)}, expected {list(expected[name].shape)}"
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    # num_batches_tracked is younger than some files; where it is missing, PyTorch starts it at 0.
    missing = [name for name in expected if name not in found and not name.endswith("num_batches_tracked")]
    unknown = [name for name in found if name not in expected]
    for problem, names in (("has another shape", differing), ("lacks", missing), ("has unknown", unknown)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"train: model.weights {model.weights} does not fit {model.name}: it {problem}: {names[0]}{more}; "
                "give weights of this architecture and as many classes"
            )
    network.load_state_dict({**{k: v for k, v in expected.items() if k not in found}, **found})


def _key(name: str, expected: Mapping[str, Any]) -> str:
    """A tensor's name in the network, whatever wrapped it when it was saved."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    old = _OLD_DENSENET.match(name)
    return old[1] + old[2] if old and name not in expected else name


def _of_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"train: model.weights: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise ImportError("train: model.weights needs safetensors; pip install 'latephase_kernels[train]'") from None
    except OSError:
        raise
    except Exception as error:  # damaged files make each library raise its own
        raise ValueError(f"train: model.weights {path} is damaged or no weights: {error!s:.200}") from None
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(part, Tensor) for part in content.values()):
        raise ValueError(f"train: model.weights {path} holds no state dict of tensors")
    return dict(content)


def _of_library(model: Model) -> Mapping[str, Tensor]:
    library, _, name = model.name.rpartition(":")
    try:
        if library == "torchvision":
            import torchvision

            known = torchvision.models.get_model_weights(name)
            if model.weights not in known.__members__:
                raise ValueError(
                    f"train: model.weights must be {', '.join(known.__members__)} or a file for {model.name}, got "
                    f"{model.weights!r}"
                )
            return known[model.weights].get_state_dict(progress=False, check_hash=True)
        if library == "timm":
            import timm

            if model.weights != "pretrained":
                raise ValueError(
                    f"train: model.weights must be pretrained or a file for {model.name}, got {model.weights!r}"
                )
            options: dict[str, Any] = dict(model.options)
            return timm.create_model(name, pretrained=True, **options).state_dict()
    except ModuleNotFoundError:
        raise ImportError(f"train: model.weights of {model.name} needs {library}; pip install {library}") from None
    raise ValueError(
        f"train: model.weights must be a file ({', '.join(_SUFFIXES)}) for {model.name}, got {model.weights!r}"
    )
