"""`latephase collapse`: files of both modes beside what the members in the checkpoint say; on the bundled digits."""

import re
import shutil

import pytest
import torch

import latephase_kernels as lp
from latephase_kernels.cli import main
from latephase_kernels.train.build import build_data, build_network
from latephase_kernels.train.recipe import Data, Model
from latephase_kernels.train.run_training import load_model, run_training
from latephase_kernels.train.saved_run import load_final_model, read_recipe
from latephase_kernels.train.train_command import as_yaml, parse_recipe

pytest.importorskip("jsonargparse"), pytest.importorskip("torchmetrics")
load_file = pytest.importorskip("safetensors.torch").load_file
OPTIONS = [
    *("--epochs=3", "--late.start=1", "--late.members=3", "--late.noise_std=0.3", "--model.options.widths=[4,4]"),
    *("--schedule.anneal_start=1", "--schedule.anneal_end=3", "--checkpoint_minutes=0", "--evaluate_every=5"),
]


def train(folder, *more):
    recipe, _ = parse_recipe(["digits", *OPTIONS, *more])
    run_training(recipe, as_yaml(recipe), folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with SWA; nobody writes to it."""
    return train(tmp_path_factory.mktemp("digits") / "run", "--swa.start=2")


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def with_members(folder, *, last=False):
    model, _ = load_final_model(folder, read_recipe(folder), build_data(Data("digits"))[0], "cpu", last=last)
    return model


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


def test_exact_is_the_model_that_training_saved(run, capsys):
    before = sorted(path.name for path in run.iterdir())
    assert main(["collapse", str(run), "--device=cpu"]) == 0
    assert same(load_file(run / "collapsed.safetensors"), load_file(run / "model.safetensors"))
    assert sorted(path.name for path in run.iterdir()) == sorted([*before, "collapsed.safetensors"])
    assert capsys.readouterr().out == (
        'digits, seed 0: checkpoint of epoch 2.8, the end of the run, collapsed in mode "exact"\n'
        f"written to {run / 'collapsed.safetensors'}\n"
    )


@pytest.mark.parametrize("last", [False, True])
def test_weights_are_the_means_of_the_members(run, tmp_path, last):
    output = tmp_path / "a" / "b.safetensors"
    more = ["--last"] if last else []
    assert main(["collapse", str(run), "--mode", "weights", *more, "--device=cpu", "--output", str(output)]) == 0
    written, state = load_file(output), with_members(run, last=last).state_dict()
    assert written.keys() == state.keys() and not (run / "collapsed.safetensors").exists()
    replicated = 0
    for name, tensor in state.items():
        if tensor.shape != written[name].shape:
            replicated += 1
            tensor = tensor.double().mean(0).to(tensor.dtype)
        assert torch.equal(written[name], tensor), name
    assert replicated > 5
    load_model(build_network(Model("small_resnet", {"widths": [4, 4]}), 10, 1), output)  # strictly


def test_the_last_weights_answer_as_their_members_do(run, tmp_path):
    assert main(["collapse", str(run), "--last", "--device=cpu", "--output", str(tmp_path)]) == 0
    network = build_network(Model("small_resnet", {"widths": [4, 4]}), 10, 1)
    load_model(network, tmp_path / "collapsed.safetensors")
    images = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = lp.predict(with_members(run, last=True), images)
        torch.testing.assert_close(network.eval()(images), expected, rtol=1e-4, atol=1e-4)
    assert not same(load_file(tmp_path / "collapsed.safetensors"), load_file(run / "model.safetensors"))


def test_one_member_alone(run, tmp_path, capsys):
    assert main(["collapse", str(run), "--member=2", "--device=cpu"]) == 0
    assert "the end of the run, member 2 alone\n" in capsys.readouterr().out
    expected = lp.collapse(with_members(run), member=2).state_dict()
    assert same(load_file(run / "collapsed.safetensors"), expected)
    assert main(["collapse", str(run), "--member=3", "--device=cpu", f"--output={tmp_path / 'x'}"]) == 2
    assert "member must be within range(3), got 3" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_an_unfinished_run(run, capsys):
    """The newest whole checkpoint counts; one from before T0 holds a plain model."""
    sorted((run / "checkpoints").iterdir())[-1].unlink()
    assert main(["collapse", str(run), "--device=cpu"]) == 0
    assert re.search(r"of epoch 2\.\d+, NOT the end of the run, collapsed in", capsys.readouterr().out)
    assert not same(load_file(run / "collapsed.safetensors"), load_file(run / "model.safetensors"))


def test_a_run_without_members(tmp_path, capsys):
    folder = train(tmp_path / "run", "--late.start=null")
    assert main(["collapse", str(folder), "--mode=weights", "--device=cpu"]) == 0
    assert capsys.readouterr().out.startswith("digits, seed 0: checkpoint of epoch 3, the end of the run\n")
    assert same(load_file(folder / "collapsed.safetensors"), load_file(folder / "model.safetensors"))
    assert main(["collapse", str(folder), "--member=0", "--device=cpu"]) == 2
    assert "has no members in its checkpoint, so that there is no member 0; leave out" in capsys.readouterr().err


def test_without_checkpoints_there_is_the_exact_model(run, capsys):
    shutil.rmtree(run / "checkpoints")
    assert main(["collapse", str(run), "--device=cpu"]) == 0
    assert same(load_file(run / "collapsed.safetensors"), load_file(run / "model.safetensors"))
    (run / "collapsed.safetensors").unlink(), capsys.readouterr()
    assert main(["collapse", str(run), "--mode=weights", "--device=cpu"]) == 2
    message = f"latephase: error: collapse: {run} has no checkpoint, and model.safetensors is exact; leave out"
    assert capsys.readouterr().err.startswith(message) and not (run / "collapsed.safetensors").exists()


def test_what_is_no_run_is_named(run, capsys):
    (run / "config.yaml").unlink()
    assert main(["collapse", str(run), "--device=cpu"]) == 2
    printed = capsys.readouterr()
    assert re.search("^latephase: error: collapse: .* holds no run .no config.yaml.; give a folder that", printed.err)
    assert printed.out == "" and printed.err.count("\n") == 1 and not (run / "collapsed.safetensors").exists()
