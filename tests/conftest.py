"""Where LATEPHASE_REQUIRE_BACKENDS lists backends ("native triton"), a missing one fails the run.

Every test draws from generators seeded anew, alone or among others; LATEPHASE_TEST_SEED (0) chooses other numbers.
"""

import importlib.util
import os
import random

import numpy as np
import pytest
import torch

import latephase_kernels as lp


@pytest.fixture(autouse=True)
def _seed():
    seed = int(os.environ.get("LATEPHASE_TEST_SEED", "0"))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pytest_sessionstart(session):
    required = os.environ.get("LATEPHASE_REQUIRE_BACKENDS", "").split()
    if "native" in required and lp.backend_for(torch.zeros(1)) != "native":
        pytest.exit("the native CPU backend is required, but did not load", returncode=1)
    if "triton" in required and importlib.util.find_spec("triton") is None:
        pytest.exit("triton is required, but not installed", returncode=1)
