"""A plugin of pytest: "cuda" is the CPU, where the emulated library runs the CUDA kernels in the place of the CPU's."""

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

LIBRARY = os.environ["LATEPHASE_EMULATOR_LIBRARY"]


def _load_library(path, load=torch.ops.load_library) -> None:
    if Path(path).name == "liblatephase_cuda.so":
        raise OSError("the emulated library stands for this one")
    load(LIBRARY if Path(path).name == "liblatephase_cpu.so" else path)


torch.ops.load_library = _load_library

from latephase_kernels import backend  # noqa: E402

backend._SUPPORTED_DTYPES["cpu"] = backend._SUPPORTED_DTYPES["cuda"]
_launched = ctypes.CDLL(LIBRARY).emulator_launched
_launched.restype = ctypes.c_char_p


def _on_cpu(value):
    is_cuda = isinstance(value, str) and value.startswith("cuda")
    return "cpu" if is_cuda or (isinstance(value, torch.device) and value.type == "cuda") else value


class _CudaIsCpu(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cuda:
            return args[0]
        kwargs = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        return function(*map(_on_cpu, args), **kwargs)


class _Profile:
    """Of torch.profiler: the kernels that were launched."""

    def __init__(self, **_):
        pass

    def __enter__(self):
        _launched()
        return self

    def __exit__(self, *_):
        names = _launched().decode().split()
        self._events = [SimpleNamespace(name=n, device_type=torch.autograd.DeviceType.CUDA) for n in names]

    def events(self):
        return self._events


def _skip(*_, **__):
    pytest.skip("the emulated GPU has neither streams nor graphs")


@pytest.fixture(autouse=True)
def _cuda_is_cpu(monkeypatch):
    clusters = os.environ.get("LATEPHASE_EMULATOR_CLUSTERS") != "0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0) if clusters else (8, 0))
    properties = SimpleNamespace(multi_processor_count=132)  # runtime.cpp
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "Stream", _skip)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _skip)
    monkeypatch.setattr(torch.profiler, "profile", _Profile)
    with _CudaIsCpu():
        yield


torch.cuda.is_available = lambda: True  # tests ask when they are collected
torch.cuda.device_count = lambda: 1
