"""Where LATEPHASE_REQUIRE_BACKENDS lists backends ("native triton"), a missing one fails the run."""

import importlib.util
import os

import pytest
import torch

import latephase_kernels as lp


def pytest_sessionstart(session):
    required = os.environ.get("LATEPHASE_REQUIRE_BACKENDS", "").split()
    if "native" in required and lp.backend_for(torch.zeros(1)) != "native":
        pytest.exit("the native CPU backend is required, but did not load", returncode=1)
    if "triton" in required and importlib.util.find_spec("triton") is None:
        pytest.exit("triton is required, but not installed", returncode=1)
