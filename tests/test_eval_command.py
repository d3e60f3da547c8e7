"""`latephase eval`: runs made here, on the bundled digits and on tiny files in the published data sets' formats."""

import dataclasses
import json
import math
import re
import shutil
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import latephase_kernels as lp
from latephase_kernels.cli import main
from latephase_kernels.data import (
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    cifar,
    cifar_corrupted,
    downloads,
    resized_images,
    svhn,
)
from latephase_kernels.data.cifar import CIFAR10, CIFAR100, load_cifar
from latephase_kernels.train.build import build_data, build_network
from latephase_kernels.train.eval_command import run_eval
from latephase_kernels.train.evaluation import Answers, detection_auroc
from latephase_kernels.train.recipe import Data, Model
from latephase_kernels.train.run_training import load_model, run_training, save_model
from latephase_kernels.train.saved_run import read_recipe
from latephase_kernels.train.train_command import as_yaml, parse_recipe

pytest.importorskip("jsonargparse"), pytest.importorskip("torchmetrics"), pytest.importorskip("safetensors")
K = 3
OPTIONS = [
    *("--epochs=3", "--late.start=1", f"--late.members={K}", "--swa.start=2", "--model.options.widths=[4,4]"),
    *("--schedule.anneal_start=1", "--schedule.anneal_end=3", "--checkpoint_minutes=0", "--evaluate_every=5"),
]


def train(folder, *more):
    recipe, _ = parse_recipe(["digits", *OPTIONS, *more])
    return run_training(recipe, as_yaml(recipe), folder, device="cpu")


def rank_auroc(inside, outside):
    """P(outside > inside) + P(outside = inside) / 2, every pair looked at."""
    inside, outside = np.asarray(inside, np.float64)[:, None], np.asarray(outside, np.float64)[None]
    return (outside > inside).mean() + 0.5 * (outside == inside).mean()


def numpy_entropy(probabilities):
    return -np.where(probabilities > 0, probabilities * np.log(np.where(probabilities > 0, probabilities, 1)), 0).sum(1)


# ---------------------------------------------------------------------------------------------- the measures


def test_auroc_is_the_rank_formula():
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(40, generator=generator, dtype=torch.float64) * math.log(10)
    more = torch.rand(30, generator=generator, dtype=torch.float64) * math.log(10)
    tiny = torch.tensor([1e-18, 2e-18, 0.0, 1e-12], dtype=torch.float64)  # of a confident network
    rounded = torch.tensor([0.5, 0.5, 1.0, 2.0], dtype=torch.float64)  # ties
    largest = torch.tensor([math.log(10), math.log(10) * (1 + 1e-15)], dtype=torch.float64)
    cases = [(spread, more), (more.sqrt(), spread), (rounded, rounded[1:]), (tiny, torch.cat([tiny * 1.5, largest]))]
    for inside, outside in cases:
        assert detection_auroc(inside, outside, 10) == pytest.approx(rank_auroc(inside, outside), abs=1e-6)
    assert detection_auroc(tiny, largest, 10) == 1.0 and detection_auroc(largest, tiny, 10) == 0.0
    assert math.isnan(detection_auroc(tiny, torch.tensor([math.nan], dtype=torch.float64), 10))


def test_entropies_and_disagreement():
    z = 3 * torch.randn(K, 50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    answers = Answers(z[0], z)
    p = np.exp(z.numpy())
    p /= p.sum(-1, keepdims=True)
    found = answers.entropies()
    np.testing.assert_allclose(found["averaged"], numpy_entropy(p[0]), rtol=1e-12)
    np.testing.assert_allclose(found["ensemble"], numpy_entropy(p.mean(0)), rtol=1e-12)
    first, second, third = p.argmax(-1)
    pairs = np.stack([first != second, first != third, second != third])
    assert answers.disagreement() == pytest.approx(pairs.mean())
    plain = Answers(z[0], None)
    assert plain.entropies().keys() == {"averaged"} and plain.disagreement() is None
    assert Answers(z[0], z[:1]).disagreement() is None


# ---------------------------------------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A finished run with members and SWA, so its statistics must be recomputed, and its results."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    return folder, train(folder)


def copy_of(digits, tmp_path):
    return shutil.copytree(digits[0], tmp_path / "run")


def checkpoints_of(folder):
    return sorted((folder / "checkpoints").iterdir())


def test_a_run_is_evaluated_as_it_was_at_its_end(digits, capsys):
    folder, trained = digits
    assert main(["eval", str(folder), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    written = json.loads((folder / "evaluation.json").read_text())
    assert written["metrics"] == trained["metrics"]  # every number, every way to predict
    assert list(written["metrics"]) == ["averaged", "ensemble", "members", "member 0", "member 1", "member 2"]
    assert 0 < written["disagreement"] < 1 and written["left_out"] == {}
    assert [written[key] for key in ("name", "seed", "epoch", "epochs", "finished")] == ["digits", 0, 2.8, 3, True]
    for way, metrics in written["metrics"].items():
        assert re.search(rf"^ *{way} +{metrics['accuracy']:.2f} +{metrics['nll']:.4f} ", printed.out, re.MULTILINE)
    assert "digits, seed 0: checkpoint of epoch 2.8, the end of the run\n" in printed.out
    assert printed.err == "" and not (folder / "ood.png").exists() and not list(folder.glob("*unfinished*"))


def test_without_checkpoints_there_is_the_plain_model(digits, tmp_path, capsys):
    folder = copy_of(digits, tmp_path)
    shutil.rmtree(folder / "checkpoints")
    found = run_eval(folder, device="cpu")
    assert found["weights"] == "model.safetensors" and list(found["metrics"]) == ["averaged"]
    assert "one plain model, no members" in capsys.readouterr().out
    assert found["metrics"]["averaged"]["nll"] == pytest.approx(digits[1]["metrics"]["averaged"]["nll"], rel=1e-4)
    assert found["disagreement"] is None and not (folder / "checkpoints").exists()


def test_a_damaged_checkpoint(digits, tmp_path, capsys):
    """The one before is used, and the table says that it is not the end; without any, the plain model is."""
    folder = copy_of(digits, tmp_path)
    first, last = checkpoints_of(folder)
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{last.name} .* is damaged .* going on from {first.name}"):
        found = run_eval(folder, device="cpu")
    assert "NOT the end of the run" in capsys.readouterr().out and not found["finished"] and found["epoch"] == 2.5
    assert found["metrics"] != digits[1]["metrics"] and "ensemble" in found["metrics"]
    first.write_bytes(content)
    with pytest.warns(UserWarning, match="every checkpoint .* is damaged: .*; using model.safetensors instead"):
        assert run_eval(folder, device="cpu")["weights"] == "model.safetensors"
    plain = folder / "model.safetensors"
    plain.write_bytes(plain.read_bytes()[:-1])
    with (
        pytest.warns(UserWarning),
        pytest.raises(RuntimeError, match="model.safetensors does not fit .* or is damaged"),
    ):
        run_eval(folder, device="cpu")
    plain.unlink()
    with pytest.raises(RuntimeError, match="every checkpoint in .* is damaged"):
        run_eval(folder, device="cpu")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: (folder / "config.yaml").unlink(), "holds no run .no config.yaml.; give a folder that"),
        (lambda folder: (folder / "config.yaml").write_text("members: 3\n"), "config.yaml is no recipe: .*members"),
        (lambda folder: (folder / "config.yaml").write_text("{"), "config.yaml is no recipe: "),
        (
            lambda folder: (folder / "config.yaml").write_text(
                (folder / "config.yaml").read_text().replace("members: 3", "members: 2")
            ),
            "checkpoints does not fit the run's config.yaml, .*members in the checkpoint and",
        ),
        (
            lambda folder: (shutil.rmtree(folder / "checkpoints"), (folder / "model.safetensors").unlink()),
            "has neither a checkpoint nor model.safetensors; train first, or resume",
        ),
    ],
)
def test_what_is_no_finished_run_is_named(digits, tmp_path, change, message, capsys):
    folder = copy_of(digits, tmp_path)
    (folder / "evaluation.json").unlink(missing_ok=True)
    change(folder)
    assert main(["eval", str(folder), "--device=cpu"]) == 2
    printed = capsys.readouterr()
    assert re.search(f"^latephase: error: .*{message}", printed.err) and printed.err.count("\n") == 1
    assert printed.out == "" and not (folder / "evaluation.json").exists()


def test_without_safetensors_the_remedy_is_named(digits, tmp_path, monkeypatch, capsys):
    folder = copy_of(digits, tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["eval", str(folder), "--device=cpu"]) == 2
    assert "needs safetensors; pip install 'latephase_kernels[train]'" in capsys.readouterr().err


def test_what_does_not_suit_a_run_is_left_out(digits, tmp_path, capsys):
    folder, data = copy_of(digits, tmp_path), write_data(tmp_path / "data")
    with small_sets():
        assert main(["eval", str(folder), "--data", str(data), "--ood=svhn,lsun", "--corruptions", "--device=cpu"]) == 0
    written = json.loads((folder / "evaluation.json").read_text())
    assert written["metrics"] == digits[1]["metrics"] and written["out_of_distribution"] == {}
    assert "its images are (3, 32, 32), the run's are (1, 8, 8)" in written["left_out"]["lsun"]
    assert "there are none of digits" in written["left_out"]["corruptions"]
    assert "latephase: svhn left out: " in capsys.readouterr().err and not (folder / "ood.png").exists()


def test_several_runs_are_a_deep_ensemble(digits, tmp_path, capsys):
    """Mean of the probabilities of each run's averaged model; `latephase report` finds it under its own name."""
    other = tmp_path / "other"
    train(other, "--seed=1")
    assert main(["eval", str(digits[0]), str(other), "--device=cpu", "--output", str(tmp_path / "both")]) == 0
    written = json.loads((tmp_path / "both" / "results.json").read_text())
    assert written["name"] == "digits_deep_ensemble" and written["seeds"] == [0, 1] and written["seed"] == 0
    assert list(written["metrics"]) == ["ensemble", "members", "member 0", "member 1"]
    _, test = build_data(Data("digits"))
    images = (test.images.double() / 255 - test.mean[0]) / test.std[0]
    answers = []
    for folder in (digits[0], other):
        network = build_network(Model("small_resnet", {"widths": [4, 4]}), 10, 1)
        load_model(network, folder / "model.safetensors")
        with torch.no_grad():
            answers.append(network.double().eval()(images).softmax(1))
    nll = torch.nn.functional.nll_loss((sum(answers) / 2).log(), test.labels).item()
    assert written["metrics"]["ensemble"]["nll"] == pytest.approx(nll, rel=1e-4)
    singles = [
        json.loads((folder / "results.json").read_text())["metrics"]["averaged"] for folder in (digits[0], other)
    ]
    for k, single in enumerate(singles):
        assert written["metrics"][f"member {k}"]["nll"] == pytest.approx(single["nll"], rel=1e-4)
    alike = shutil.copytree(digits[0], tmp_path / "digits")
    last = run_eval([alike, other], device="cpu", last=True)  # written beside the first run, by a name of its own
    results = json.loads((tmp_path / "digits_last_deep_ensemble-seed0" / "results.json").read_text())
    assert results == last and last["name"] == "digits_last_deep_ensemble" and last["metrics"] != written["metrics"]
    capsys.readouterr()
    runs = [str(folder) for folder in (digits[0], other, tmp_path / "both")]
    assert main(["report", *runs, "--output", str(tmp_path / "report")]) == 0
    assert (
        f"| digits_deep_ensemble | ensemble | 1 | {written['metrics']['ensemble']['accuracy']:.2f} "
        in capsys.readouterr().out
    )


def test_runs_that_make_no_ensemble(digits, tmp_path, capsys):
    folder = copy_of(digits, tmp_path)
    assert main(["eval", str(folder), str(digits[0]), "--device=cpu"]) == 2
    assert "the runs of an ensemble must have different seeds, got [0, 0]" in capsys.readouterr().err
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 3"))
    (folder / "model.safetensors").unlink(), checkpoints_of(folder)[-1].unlink()
    assert main(["eval", str(digits[0]), str(folder), "--device=cpu"]) == 2
    assert f"{folder} is not finished; resume it, or leave it out" in capsys.readouterr().err
    config.write_text(config.read_text().replace("batch_size: 30", "batch_size: 20"))
    assert main(["eval", str(digits[0]), str(folder), "--device=cpu"]) == 2
    assert "must be of one recipe, but digits with seed 3 and digits with seed 0 differ" in capsys.readouterr().err
    assert not list(tmp_path.glob("*deep_ensemble*")) and not list(digits[0].parent.glob("*deep_ensemble*"))


# ---------------------------------------------------------------------------------------------- CIFAR's shape

TRAIN, TEST, HOUSES, PICTURES = 12, 20, 26, 15  # images: in each of five training files, and in the test sets


class small_sets:
    """The published formats, with few images."""

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(cifar, "CIFAR10", dataclasses.replace(CIFAR10, images_per_file=TRAIN, test_images=TEST))
        self.patch.setattr(cifar, "CIFAR100", dataclasses.replace(CIFAR100, images_per_file=TRAIN, test_images=TEST))
        self.patch.setattr(cifar_corrupted, "_NUM_IMAGES", TEST)
        self.patch.setattr(resized_images, "_NUM_IMAGES", PICTURES)
        self.patch.setattr(svhn, "_NUM_TEST_IMAGES", HOUSES)
        # The publisher's checksum cannot be that of a file made here; tests of the loaders have it.
        self.patch.setattr(downloads.Download, "check", lambda *_: None)

    def __exit__(self, *_):
        self.patch.undo()


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def matlab_element(kind, data):
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def matlab_matrix(name, values):
    content = matlab_element(6, struct.pack("<II", 9, 0)) + matlab_element(
        5, struct.pack(f"<{values.ndim}i", *values.shape)
    )
    return matlab_element(14, content + matlab_element(1, name) + matlab_element(2, values.tobytes(order="F")))


def write_data(folder):
    """CIFAR-10, CIFAR-100 (test), SVHN, LSUN and CIFAR-10-C; no Tiny-ImageNet."""
    for name, layout in (("cifar-10-batches-bin", CIFAR10), ("cifar-100-binary", CIFAR100)):
        (folder / name).mkdir(parents=True)
        classes = "\n".join(f"class{number}" for number in range(layout.num_classes))
        (folder / name / layout.names[2]).write_text(classes)
        for seed, (file, count) in enumerate(
            [*((file, TRAIN) for file in layout.train_files), (layout.test_file, TEST)]
        ):
            records = noise(seed, count, layout.label_bytes + 3072)
            records[:, : layout.label_bytes] %= 10
            (folder / name / f"{file}.bin").write_bytes(records.tobytes())
    houses = noise(7, 32, 32, 3, HOUSES) // 4  # darker than CIFAR's
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM"
    numbers = np.ones((HOUSES, 1), dtype=np.uint8)
    (folder / "test_32x32.mat").write_bytes(header + matlab_matrix(b"X", houses) + matlab_matrix(b"y", numbers))
    (folder / "LSUN_resize").mkdir()
    for number, picture in enumerate(noise(8, PICTURES, 32, 32, 3)):
        Image.fromarray(picture).save(folder / "LSUN_resize" / f"{number:02d}.png")
    (folder / "CIFAR-10-C").mkdir()
    for seed, kind in enumerate(CORRUPTIONS + EXTRA_CORRUPTIONS):
        np.save(folder / "CIFAR-10-C" / f"{kind}.npy", noise(100 + seed, 5 * TEST, 32, 32, 3))
    np.save(folder / "CIFAR-10-C" / "labels.npy", np.tile(noise(0, TEST) % 10, 5))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A finished run on tiny files in CIFAR-10's format, and the folder of all data."""
    base = tmp_path_factory.mktemp("pictures")
    data = write_data(base / "data")
    with small_sets():
        train(
            base / "run",
            "--name=tiny",
            "--data.name=cifar10",
            f"--data.folder={data}",
            "--batch_size=10",
            "--data.flip=true",
        )
    return base / "run", data


def probabilities_of(folder, images):
    """The collapsed model's answer to uint8 images [N, 3, 32, 32], in float64, normalized here."""
    network = build_network(Model("small_resnet", {"widths": [4, 4]}), 10, 3)
    load_model(network, folder / "model.safetensors")
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (CIFAR10.mean, CIFAR10.std))
    with torch.no_grad():
        return network.double().eval()((torch.from_numpy(images).double() / 255 - mean) / std).softmax(1).numpy()


def test_foreign_and_corrupted_images(pictures, tmp_path, capsys):
    folder, data = shutil.copytree(pictures[0], tmp_path / "run"), pictures[1]
    with small_sets():
        code = main(["eval", str(folder), "--ood", "all", "--corruptions", "--device", "cpu"])
        test = load_cifar(data, cifar.CIFAR10, train=False)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    written = json.loads((folder / "evaluation.json").read_text())
    # Tiny-ImageNet is not there: the message says what to put where, and all the rest is evaluated.
    assert written["left_out"].keys() == {"tiny_imagenet"}
    assert f"tiny_imagenet left out: {data} is none of Imagenet_resize" in printed.err
    assert (
        "put it into that folder" in printed.err and "Left out, for reasons given above: tiny_imagenet" in printed.out
    )
    sets = written["out_of_distribution"]
    assert {name: found["images"] for name, found in sets.items()} == {
        "svhn": HOUSES,
        "lsun": PICTURES,
        "cifar100": TEST,
    }
    inside = numpy_entropy(probabilities_of(folder, test.images.numpy()))
    for name, images in (
        ("svhn", noise(7, 32, 32, 3, HOUSES).transpose(3, 2, 0, 1) // 4),
        ("lsun", noise(8, PICTURES, 32, 32, 3).transpose(0, 3, 1, 2)),
        ("cifar100", noise(1, TEST, 3074)[:, 2:].reshape(-1, 3, 32, 32)),
    ):
        expected = rank_auroc(inside, numpy_entropy(probabilities_of(folder, np.ascontiguousarray(images))))
        assert sets[name]["auroc"]["averaged"] == pytest.approx(expected, abs=1e-6)
        assert 0 <= sets[name]["auroc"]["ensemble"] <= 1 and 0 <= sets[name]["disagreement"] <= 1
        assert f"{expected:.4f}" in re.search(rf"^ *{name} .*", printed.out, re.MULTILINE)[0]
    assert (folder / "ood.png").read_bytes().startswith(b"\x89PNG")

    corrupted = written["corruptions"]
    labels = noise(0, TEST) % 10
    errors = {}
    for seed, kind in enumerate(CORRUPTIONS + EXTRA_CORRUPTIONS):
        images = noise(100 + seed, 5 * TEST, 32, 32, 3).transpose(0, 3, 1, 2)
        wrong = probabilities_of(folder, np.ascontiguousarray(images)).argmax(1).reshape(5, TEST) != labels
        errors[kind] = 100 * wrong.mean(1)
        np.testing.assert_allclose(corrupted["errors"][kind], errors[kind])
        assert corrupted["mean_errors"][kind] == pytest.approx(errors[kind].mean())
    assert len({tuple(by_severity) for by_severity in errors.values()}) > 5  # so mixing them up would show
    for kinds in (CORRUPTIONS, CORRUPTIONS + EXTRA_CORRUPTIONS):
        expected = np.mean([errors[kind] for kind in kinds])
        assert corrupted["mean_corruption_error"][str(len(kinds))] == pytest.approx(expected)
        assert f"{expected:.2f} % over {len(kinds)} corruptions" in printed.out


def test_members_see_foreign_images_as_they_see_the_test_set(pictures, tmp_path):
    """The ensemble's figures, from the members' answers to images normalized here."""
    from latephase_kernels.train.saved_run import load_final_model

    folder, data = shutil.copytree(pictures[0], tmp_path / "run"), pictures[1]
    with small_sets():
        found = run_eval(folder, ood=["lsun", "lsun"], device="cpu")
        train_set = load_cifar(data, cifar.CIFAR10, train=True)
        test = load_cifar(data, cifar.CIFAR10, train=False)
        model, _ = load_final_model(folder, read_recipe(folder), train_set, "cpu")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR10.mean, CIFAR10.std))
    entropies, answers = [], []
    for images in (test.images, torch.from_numpy(noise(8, PICTURES, 32, 32, 3)).permute(0, 3, 1, 2)):
        x = (images / 255 - mean) / std
        p = torch.stack([lp.predict(model, x, members=k) for k in range(K)]).double().softmax(-1)
        entropies.append(numpy_entropy(p.mean(0).numpy()))
        answers.append(p.argmax(-1))
    lsun = found["out_of_distribution"]["lsun"]
    assert lsun["auroc"]["ensemble"] == pytest.approx(rank_auroc(*entropies), abs=1e-6)
    pairs = [(answers[1][i] != answers[1][j]).double().mean().item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert lsun["disagreement"] == pytest.approx(sum(pairs) / 3)


def test_incomplete_corruptions(pictures, tmp_path, capsys):
    folder, data = shutil.copytree(pictures[0], tmp_path / "run"), shutil.copytree(pictures[1], tmp_path / "data")
    (data / "CIFAR-10-C" / "spatter.npy").unlink()
    fog = data / "CIFAR-10-C" / "fog.npy"
    fog.write_bytes(fog.read_bytes()[:-1])  # so only severity 5 is damaged
    with small_sets():
        found = run_eval(folder, data=str(data), corruptions=True, device="cpu")
        assert found["left_out"].keys() == {"fog", "spatter"} and "lacks spatter.npy" in found["left_out"]["spatter"]
        assert found["corruptions"]["errors"].keys() == {*CORRUPTIONS, *EXTRA_CORRUPTIONS} - {"fog", "spatter"}
        assert found["corruptions"]["mean_corruption_error"] == {"15": None, "19": None}
        assert "unknown over 15, some are left out" in capsys.readouterr().out
        shutil.rmtree(data / "CIFAR-10-C")
        found = run_eval(folder, data=str(data), corruptions=True, device="cpu")
        assert found["left_out"].keys() == {"corruptions"} and "corruptions" not in found
        assert capsys.readouterr().err.count("get it with") == 1  # said once, not for each of 19


def test_the_runs_own_data_must_be_there(pictures, tmp_path, capsys):
    for arguments, message in (
        (
            ["--data", str(tmp_path)],
            r"eval: .* is none of cifar-10-batches-py.*; get one with .*elsewhere, give --data",
        ),
        (["--ood", "svhn,cifar10"], "--ood must be of svhn, lsun, tiny_imagenet, cifar100 or all .*, got 'cifar10'"),
    ):
        assert main(["eval", str(pictures[0]), "--device=cpu", *arguments]) == 2
        assert re.search(message, capsys.readouterr().err)


def test_no_number_that_json_lacks(digits, tmp_path):
    """A model that answers nan is reported as such, in a file that any JSON reader takes."""
    folder = copy_of(digits, tmp_path)
    shutil.rmtree(folder / "checkpoints")
    network = build_network(Model("small_resnet", {"widths": [4, 4]}), 10, 1)
    network.head.bias.data.fill_(math.nan)
    save_model(network, folder / "model.safetensors")
    assert math.isnan(run_eval(folder, device="cpu")["metrics"]["averaged"]["brier"])
    written = json.loads((folder / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert written["metrics"]["averaged"]["brier"] is None
