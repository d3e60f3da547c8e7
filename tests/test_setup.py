"""setup.py: where there are no kernels it says so, and a build that fails names the remedies."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

SETUP = Path(__file__).parents[1] / "setup.py"
pytest.importorskip("setuptools.command.bdist_wheel")


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """What setup.py defines, for a checkout in a folder with a space that holds an empty kernel."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    for name in ("CXX", "LATEPHASE_WITHOUT_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    defined = {"__file__": str(tmp_path / "a checkout" / "setup.py"), "__name__": "setup"}
    exec(compile(SETUP.read_text(encoding="utf-8"), SETUP, "exec"), defined)
    kernel = tmp_path / "a checkout" / "csrc" / "cpu" / "empty.kernel.cpp"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("")
    defined["cuda_toolkit"] = lambda: None
    return defined


def build(setup):
    from setuptools import Distribution

    command = setup["BuildKernels"](Distribution())
    command.editable_mode, command.inplace = True, True
    command.run()
    return setup["ROOT"] / "latephase_kernels" / "lib" / "liblatephase_cpu.so"


@pytest.mark.parametrize("system", ["win32", "darwin", "linux"])
def test_installs_without_kernels_and_says_why(setup, system, monkeypatch, capfd, tmp_path):
    why = "LATEPHASE_WITHOUT_KERNELS is set"
    if system == "win32":
        why = "on Windows, WSL has them"
        monkeypatch.setenv("CXX", "g++")  # even so
    elif system == "darwin":
        why = "no C++ compiler"
        for name in ("c++", "g++", "clang++"):  # macOS has these before its compiler is installed
            (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("LATEPHASE_WITHOUT_KERNELS", "1")
    monkeypatch.setattr(sys, "platform", system)
    assert not build(setup).exists()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and why in lines[0] and "installing without kernels" in lines[0], lines


def test_a_compiler_that_fails_ends_with_the_remedies(setup, monkeypatch):
    pytest.importorskip("ninja")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(SystemExit, match=r"did not compile.*CXX=.*LATEPHASE_WITHOUT_KERNELS=1"):
        build(setup)


def test_builds_where_folders_have_spaces(setup, tmp_path):
    pytest.importorskip("ninja")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    torch_folder = tmp_path / "a torch"
    os.symlink(Path(torch.__file__).parent, torch_folder)
    setup["torch_folder"] = lambda: torch_folder
    assert build(setup).exists()


def test_nvcc_is_that_of_cuda_home_or_on_path(setup, monkeypatch, tmp_path):
    for name in ("home", "path"):
        folder = tmp_path / name / "bin"
        folder.mkdir(parents=True)
        (folder / "nvcc").write_text("#!/bin/sh\n")
        (folder / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path/bin"))
    for home, found in ((tmp_path / "home", "home"), (tmp_path / "nowhere", "path"), (None, "path")):
        monkeypatch.setenv("CUDA_HOME", str(home)) if home else monkeypatch.delenv("CUDA_HOME")
        assert setup["nvcc"]() == str(tmp_path / found / "bin/nvcc")


def test_macos_has_its_own_linker(setup, monkeypatch):
    on_linux = setup["ninja_file"](Path("/torch"), "c++", None)
    monkeypatch.setattr(sys, "platform", "darwin")
    on_macos = setup["ninja_file"](Path("/torch"), "c++", None)
    assert "--no-as-needed" in on_linux and "--no-as-needed" not in on_macos
    assert "-ltorch_cpu" in on_macos
