"""The bundled digits, their split, and the minibatches made of them."""

import pytest
import torch

from latephase_kernels.data import Minibatches, load_digits, random_shift, split_digits
from latephase_kernels.data import digits as digits_file


def test_values_are_the_bundled_ones():
    images, labels = load_digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert labels.shape == (1797,) and labels.dtype == torch.int64
    # The class counts that scikit-learn documents.
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert labels[:10].tolist() == list(range(10))
    values = (images * digits_file.PIXEL_STD + digits_file.PIXEL_MEAN) * 16
    torch.testing.assert_close(values, values.round(), rtol=0, atol=1e-4)
    assert values.round().unique().tolist() == list(range(17))
    # The first image's first two rows, as printed in scikit-learn's documentation.
    assert values[0, 0, :2].round().tolist() == [[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]]
    assert abs(images.mean().item()) < 1e-4 and abs(images.std().item() - 1) < 1e-4
    assert images.min().item() == pytest.approx(digits_file.BACKGROUND)


def test_split_is_disjoint_complete_and_stratified():
    images, labels = load_digits()
    split = split_digits(images, labels, num_train=300, seed=1)
    indices = torch.cat([split.train_indices, split.test_indices])
    assert indices.sort().values.tolist() == list(range(1797))
    assert split.train_labels.bincount().tolist() == [30] * 10
    for part in ("train", "test"):
        chosen = getattr(split, f"{part}_indices")
        assert torch.equal(getattr(split, f"{part}_images"), images[chosen])
        assert torch.equal(getattr(split, f"{part}_labels"), labels[chosen])


def test_split_depends_on_its_seed_alone():
    images, labels = load_digits()
    first = split_digits(images, labels, seed=3).train_indices
    torch.rand(7)  # moves the global generator
    assert torch.equal(first, split_digits(images, labels, seed=3).train_indices)
    assert not torch.equal(first, split_digits(images, labels, seed=4).train_indices)


@pytest.mark.parametrize("num_train", [0, -10, 305, 1740])
def test_split_refuses_sizes_that_cannot_be(num_train):
    with pytest.raises(ValueError, match="num_train must be a multiple of 10 from 10 to 1730"):
        split_digits(*load_digits(), num_train=num_train)


def test_damage_is_reported(tmp_path):
    content = bytearray(digits_file._FILE.read_bytes())
    copy = tmp_path / "digits.npz"
    copy.write_bytes(content)
    assert torch.equal(load_digits(copy)[0], load_digits()[0])
    content[20000] ^= 1
    for damaged in (content, content[:1000], b""):
        copy.write_bytes(damaged)
        with pytest.raises(ValueError, match="digits.npz is damaged.*reinstall"):
            load_digits(copy)
    with pytest.raises(FileNotFoundError):
        load_digits(tmp_path / "missing.npz")


def test_shifts_move_whole_images_and_fill_with_background():
    image = torch.arange(1.0, 13.0).reshape(1, 1, 3, 4)
    shifted = random_shift(image.expand(500, 1, 3, 4), 1, -5.0, torch.Generator().manual_seed(0))
    expected = []
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            moved = torch.full((3, 4), -5.0)
            moved[max(down, 0) : 3 + min(down, 0), max(right, 0) : 4 + min(right, 0)] = image[
                0, 0, max(-down, 0) : 3 + min(-down, 0), max(-right, 0) : 4 + min(-right, 0)
            ]
            expected.append(moved)
    counts = [int((shifted[:, 0] == moved).flatten(1).all(1).sum()) for moved in expected]
    assert sum(counts) == 500 and min(counts) > 25  # 500 / 9 = 56 are expected


def test_minibatches_pass_over_the_data_once_and_repeat_by_seed():
    labels = torch.arange(23)
    images = labels.float().reshape(23, 1, 1, 1).expand(23, 1, 2, 2)

    def two_passes(seed):
        generator = torch.Generator().manual_seed(seed)
        loader = Minibatches(images, labels, 5, shift=0, fill=0.0, generator=generator)
        assert len(loader) == 4
        return [list(loader), list(loader)]

    first, second = two_passes(0)
    for batch_images, batch_labels in first:
        assert batch_images.shape == (5, 1, 2, 2) and torch.equal(batch_images[:, 0, 0, 0], batch_labels.float())
    seen = torch.cat([batch_labels for _, batch_labels in first])
    assert len(seen.unique()) == 20
    assert not torch.equal(seen, torch.cat([batch_labels for _, batch_labels in second]))
    again = two_passes(0)[0]
    assert all(torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) for x, y in zip(first, again, strict=True))
