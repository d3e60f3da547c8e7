"""The Trainer on several ranks against the Trainer of one process, float64; checkpoints between numbers of ranks."""

import pickle
import re
import shutil

import pytest
import torch
from distributed_trainer import (
    evaluate,
    outcome,
    recipe_for,
    resume,
    run,
    train,
    train_and_save,
    train_on_text,
    trainer_of,
)
from ranks import run_on_ranks

from latephase_kernels.train import image_task
from latephase_kernels.train.checkpoints import CheckpointFolder, RunError
from latephase_kernels.train.sharded_checkpoints import read_sharded

CLOSE = dict(rtol=1e-9, atol=1e-11)


def assert_same_outcome(answers, expected, bits=False):
    for answer in answers:
        assert not isinstance(answer, str), answer
        assert answer.keys() == expected.keys()
        for name, value in expected.items():
            if bits:
                assert torch.equal(answer[name], value), name
            else:
                torch.testing.assert_close(answer[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "member_ranks, ranks, swa, skip", [(2, 2, False, False), (2, 4, True, True), (1, 2, True, False)]
)
def test_the_same_optimization_on_any_number_of_ranks(member_ranks, ranks, swa, skip):
    expected = outcome(run(trainer_of(recipe_for(1, "local", swa, skip), False)))
    answers = run_on_ranks(ranks, train, member_ranks, "synchronized", swa, skip)
    assert_same_outcome(answers, expected)


@pytest.mark.parametrize("images, batch", [(42, 10), (3, 4)])
def test_ranks_evaluate_a_share_of_the_images_each(images, batch, monkeypatch):
    """Five batches and one, on two member ranks × two data ranks; the answers are those of one process."""
    monkeypatch.setattr(image_task, "EVALUATION_BATCH", batch)
    *expected, seen = evaluate(images, batch, False)
    assert sum(seen) == 2 * images and expected[2].shape == (images, 3)
    for rank, answer in enumerate(run_on_ranks(4, evaluate, images, batch)):
        assert not isinstance(answer, str), answer
        for found, one in zip(answer, expected):
            torch.testing.assert_close(found, one, rtol=1e-6, atol=1e-9)
        own = seen[: len(seen) // 2][rank::4] or seen[:1]  # a rank without a batch runs one for its shape
        assert answer[3] == 2 * own


def test_a_text_is_divided_by_its_streams():
    assert_same_outcome(run_on_ranks(2, train_on_text, 1, True), train_on_text(1, False))
    for answer in run_on_ranks(3, train_on_text, 3, True):
        assert "parallel.member_ranks must be 1 for a text, got 3" in answer


@pytest.mark.parametrize("step", [5, 11])  # before T0, after it
def test_resume_on_another_number_of_ranks(saved, step):
    folder, through, expected = saved
    assert_same_outcome(through, expected)
    assert_same_outcome(run_on_ranks(4, resume, 2, "synchronized", f"{folder}/{step}"), through[0], bits=True)
    assert_same_outcome(run_on_ranks(2, resume, 2, "synchronized", f"{folder}/{step}"), expected)
    assert_same_outcome([resume(1, "local", f"{folder}/{step}", several=False)], expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of 2 × 2 ranks before and after T0, what they come to, and what one process comes to."""
    folder = str(tmp_path_factory.mktemp("sharded"))
    through = run_on_ranks(4, train_and_save, 2, "synchronized", folder, [5, 11])
    return folder, through, outcome(run(trainer_of(recipe_for(1, "local", True, False), False)))


def test_each_ranks_own_statistics_are_resumed_to_the_bit(tmp_path):
    through = run_on_ranks(2, train_and_save, 1, "local", str(tmp_path), [11])
    assert_same_outcome(run_on_ranks(2, resume, 1, "local", f"{tmp_path}/11"), through[0], bits=True)


def test_ranks_go_on_with_what_one_process_saved(tmp_path):
    trainer = run(trainer_of(recipe_for(1, "local", True, False), False), 11)
    CheckpointFolder(tmp_path).save(trainer.state_dict(), 11)
    assert_same_outcome(run_on_ranks(2, resume, 2, "synchronized", str(tmp_path)), outcome(run(trainer)))


def test_damage_is_noticed(saved, tmp_path):
    folder, *_ = saved
    found = CheckpointFolder(f"{folder}/5")
    ((_, whole),) = found.steps()
    for victim in (next(whole.glob("*.distcp")), whole / "structure.pt"):
        content = victim.read_bytes()
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(RunError, match="every checkpoint .* is damaged"):
            found.load()
        victim.write_bytes(content)
    missing = next(whole.glob("rank-*"))
    missing.rename(tmp_path / missing.name)
    with pytest.raises(RunError, match="every checkpoint .* is damaged"):
        found.load()
    (tmp_path / missing.name).rename(missing)
    assert found.load()[1] == 5


def test_a_checkpoint_runs_no_code(saved, tmp_path):
    """A pickle that calls something, with digests that fit."""
    folder, *_ = saved
    ((_, whole),) = CheckpointFolder(f"{folder}/5").steps()
    shutil.copytree(whole, tmp_path / "step")
    (tmp_path / "step" / ".metadata").write_bytes(pickle.dumps(print))
    with pytest.raises(pickle.UnpicklingError, match="refers to builtins.print"):
        read_sharded(tmp_path / "step", "cpu", None)


@pytest.mark.parametrize("module", (b"pathlib", b"pathlib._local"))
def test_a_checkpoint_of_another_python_is_read(saved, tmp_path, module):
    """Its folder is a path, which Python 3.13 pickles as pathlib._local's and others as pathlib's."""
    folder, *_ = saved
    ((_, whole),) = CheckpointFolder(f"{folder}/5").steps()
    shutil.copytree(whole, tmp_path / "step")
    metadata = tmp_path / "step" / ".metadata"
    pickled = pickle.dumps(pickle.loads(metadata.read_bytes()), protocol=2)  # names stand in it as lines
    changed, count = re.subn(rb"cpathlib(\._local)?\n", b"c" + module + b"\n", pickled)
    metadata.write_bytes(changed)
    assert count and read_sharded(tmp_path / "step", "cpu", None).keys() == read_sharded(whole, "cpu", None).keys()
