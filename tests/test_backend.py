"""Which backend runs, and what a missing one says."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import latephase_kernels as lp
from latephase_kernels import backend


@pytest.fixture(autouse=True)
def restore():
    yield
    lp.set_backend("auto")


def test_backend_for():
    assert lp.backend_for(torch.zeros(1)) == "native"
    assert lp.backend_for(torch.zeros(1, device="meta")) == "reference"
    for op in ("member_gain", "rank1_linear", "rank1_lstm", "ensemble_batch_norm_with_gain"):
        assert lp.backend_for(torch.zeros(1), op) == "native"
    with pytest.raises(ValueError, match="backend_for: op must be None or the name of a registered op, .* got 'nope'"):
        lp.backend_for(torch.zeros(1), "nope")
    lp.set_backend("reference")
    assert lp.backend_for(torch.zeros(1)) == "reference"
    lp.set_backend("native")
    with pytest.raises(RuntimeError, match=r'no kernels for meta tensors; call set_backend\("auto"\)'):
        lp.backend_for(torch.zeros(1, device="meta"))


@pytest.mark.parametrize("loaded", [True, False])
def test_a_model_compiled_before_anything_has_run_is_compiled_once(loaded, monkeypatch):
    monkeypatch.setattr(backend, "_native", set())
    monkeypatch.setattr(backend, "_warned", set())
    if not loaded:
        monkeypatch.setitem(backend._load_failures, "cpu", "a test asks for none")
    layers = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.LayerNorm(16)
    targets = ("batch_norm", "rank1", "layer_norm")
    model, eager = (lp.fuse(lp.expand(nn.Sequential(*layers), 2, targets=targets)) for _ in range(2))
    counter, x = CompileCounter(), torch.randn(8, 6)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch._dynamo.reset()
    ys = [compiled(x) for _ in range(2)]
    assert counter.frame_count == 1
    if loaded:
        eager(x)
    else:
        with pytest.warns(UserWarning, match="runs on the reference path .* a test asks for none"):
            eager(x)
    ys.append(compiled(x))
    assert counter.frame_count == 1
    for y in ys:
        torch.testing.assert_close(y, eager(x))


def test_triton_without_a_gpu_is_refused_when_it_is_chosen(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    lp.set_backend("reference")
    with pytest.raises(RuntimeError, match="set_backend: Triton needs a GPU, and torch finds none; TRITON_INTERPRET=1"):
        lp.set_backend("triton")
    assert lp.backend_for(torch.zeros(1)) == "reference"  # the choice in force stays
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    lp.set_backend("triton")
    assert lp.backend_for(torch.zeros(1)) == "triton"


def test_the_cuda_library_loads_exactly_where_torch_has_cuda():
    built = (Path(lp.__file__).parent / "lib" / "liblatephase_cuda.so").exists()
    if torch.version.cuda is None:
        assert "without CUDA" in backend._load_failures["cuda"]
    else:
        assert ("cuda" not in backend._load_failures) == built


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_registered_ops_refuse_tensors_on_different_devices():
    """Where a kernel would read the address as its own device's."""
    op, x = torch.ops.latephase_kernels, torch.randn(6, 5, device="cuda")
    gain, wide = torch.ones(3, 5), torch.ones(3, 20)
    folded, gates, state = (torch.empty(size, device="cuda") for size in ((3, 5, 5), (3, 2, 2, 20), (6, 5)))
    saved = (x, x, gain, gain, None, None, torch.empty(0, dtype=torch.uint8))
    calls = [
        lambda: op.member_gain(x, gain, None, 1, "none"),
        lambda: op.member_gain_backward(x.cpu(), x, gain.cuda(), None, 1, "none"),
        lambda: op.rank1_fold(gain.new_ones(5, 5), gain.cuda(), gain.cuda(), folded),
        lambda: op.rank1_fold_backward(folded, folded[0], gain.cuda(), gain.cuda(), torch.ones(5, 5)),
        lambda: op.rank1_lstm_steps(gates, state, state, torch.ones(20, 5), gain.cuda(), wide.cuda()),
        lambda: op.rank1_lstm_steps(gates, state.cpu(), state, wide.new_ones(20, 5).cuda(), gain.cuda(), wide.cuda()),
        lambda: op.ensemble_batch_norm(x, None, None, gain, None, None, True, 1e-5, 3, "none", None),
        lambda: op.ensemble_batch_norm_apply(x, gain, gain, None, None, None, 3, "none", None),
        lambda: op.ensemble_batch_norm_backward(*saved, True, 3, "none", False, None),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="must be on input's device"):
            call()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_libraries_ask_for_nothing_newer_than_their_target(device):
    library = Path(lp.__file__).parent / "lib" / f"liblatephase_{device}.so"
    nm = shutil.which("nm")
    if not library.exists() or nm is None:
        pytest.skip("needs the library and nm")
    symbols = subprocess.run([nm, "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    newer_than_2_10 = ("torch_exception_get_what", "torch_new_stable_ivalue", "torch_dtype_float8_e8m0fnu")
    assert "torch_call_dispatcher" in symbols
    assert not [name for name in newer_than_2_10 if name in symbols]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_messages_name_sources_by_their_place_in_the_repository(device):
    library = Path(lp.__file__).parent / "lib" / f"liblatephase_{device}.so"
    if not library.exists():
        pytest.skip("needs the library")
    content = library.read_bytes()
    assert f"csrc/{device}/../checks.h".encode() in content
    assert not re.findall(rb"/[\w./+-]+/csrc/[\w./]+", content)  # neither this checkout's nor torch's folder


def test_without_libraries_the_reference_runs_and_says_so_once():
    code = """
import pathlib, warnings
from unittest import mock
with mock.patch.object(pathlib.Path, "exists", lambda self: False):
    import latephase_kernels as lp
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        y = lp.functional.ensemble_batch_norm(torch.randn(6, 4, 3), None, None, training=True, num_members=2)
assert lp.backend_for(y) == "reference"
messages = [str(w.message) for w in caught]
assert len(messages) == 1 and "reference path" in messages[0] and "C++ compiler" in messages[0], messages
try:
    lp.set_backend("native")
except RuntimeError as error:
    assert "was not built" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_device_without_float64():
    subprocess.run([sys.executable, Path(__file__).with_name("without_float64.py")], check=True)


@pytest.mark.parametrize(
    "system, device, remedy",
    [
        ("win32", "cpu", "on Windows, WSL has them"),
        ("darwin", "cpu", "a C++ compiler was missing at installation, or LATEPHASE_WITHOUT_KERNELS set"),
        ("linux", "cuda", "nvcc was missing at installation"),
    ],
)
def test_a_library_that_was_not_built_says_what_to_do(system, device, remedy, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(backend, "_LIBRARY_FOLDER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert remedy in backend._load(device)


@pytest.mark.parametrize(
    "driver, message",
    [
        (0, None),
        (13020, None),
        (14000, None),
        (12080, "driver runs CUDA up to 12.8, and .* compiled with 13.1; update"),
    ],
)
def test_a_driver_that_is_too_old_for_the_cuda_library_is_named(driver, message, monkeypatch):
    """Asked of the driver itself: CUDA's runtime would initialize it, and forked processes could not use the GPU."""

    def load(path):
        if path != "libcuda.so.1":
            return SimpleNamespace(**versions)
        if driver == 0:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return SimpleNamespace(cuDriverGetVersion=lambda version: setattr(version._obj, "value", driver))

    versions = {"latephase_cuda_runtime_version": lambda: 13010}
    monkeypatch.setattr(backend.ctypes, "CDLL", load)
    failure = backend._driver_failure(Path("liblatephase_cuda.so"))
    assert failure is None if message is None else re.search(message, failure)
    versions.clear()
    assert "is older than the package" in backend._driver_failure(Path("liblatephase_cuda.so"))


def test_a_damaged_library_names_its_likely_causes(tmp_path, monkeypatch):
    (tmp_path / "liblatephase_cpu.so").write_bytes(b"not a library")
    monkeypatch.setattr(backend, "_LIBRARY_FOLDER", tmp_path)
    failure = backend._load("cpu")
    assert failure is not None and "(1)" in failure and "(3) the file is damaged" in failure


ROOT = Path(__file__).parents[1]


def setup(folder, *arguments):
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_the_source_distribution_has_the_sources_of_the_kernels(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    found = setup(ROOT, "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    assert found.returncode == 0, found.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "tests", "benchmarks", "docs"):
        files = [path for path in (ROOT / folder).rglob("*.*") if path.is_file() and path.suffix not in (".pyc", ".so")]
        assert files and {str(path.relative_to(ROOT)) for path in files} <= names
    assert {"setup.py", "Makefile", "latephase_kernels/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_no_build_without_the_sources_of_the_kernels(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    shutil.copy(ROOT / "setup.py", tmp_path)
    found = setup(tmp_path, "build_ext")
    assert found.returncode and "has no csrc, the kernels' sources; build from the repository" in found.stderr
