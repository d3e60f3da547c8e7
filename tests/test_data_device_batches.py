"""Images on the device: crops against slicing by hand, their distribution, the order, stacking and shares."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latephase_kernels.data import DeviceBatches, DeviceImages, ImageSet

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def random_set(count=23, height=5, width=6, mean=MEAN, std=STD):
    images = torch.randint(256, (count, 3, height, width), generator=torch.Generator().manual_seed(1))
    return ImageSet(images.to(torch.uint8), torch.arange(count), (), mean, std)


def crop_by_hand(image, down, right, flip, padding):
    """Pad with black, cut a window out, mirror it: one image, one pixel after the other."""
    channels, height, width = image.shape
    window = np.zeros((channels, height, width), dtype=np.uint8)
    for row, column in itertools.product(range(height), range(width)):
        source_row = row + down - padding
        source_column = (width - 1 - column if flip else column) + right - padding
        if 0 <= source_row < height and 0 <= source_column < width:
            window[:, row, column] = image[:, source_row, source_column]
    return window


def normalize_by_hand(window):
    """In double precision."""
    return (window / 255.0 - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]


@pytest.mark.parametrize(("padding", "size"), [(0, (5, 6)), (2, (5, 6)), (4, (1, 3))])
def test_crops_are_those_cut_by_hand(padding, size):
    data = random_set(height=size[0], width=size[1])
    images = DeviceImages(data, padding=padding)
    shifts = [*itertools.product(range(2 * padding + 1), range(2 * padding + 1), (False, True))]
    index = torch.arange(len(shifts)) % len(data)
    down, right, flip = (torch.tensor(values) for values in zip(*shifts))
    crops = images.crop(index, down, right, flip)
    assert crops.dtype == torch.uint8
    for position, shift in enumerate(shifts):
        by_hand = crop_by_hand(data.images[index[position]].numpy(), *shift, padding)
        assert np.array_equal(crops[position].numpy(), by_hand)


def test_erased_squares_are_cut_off_at_the_border():
    images = DeviceImages(random_set(height=6, width=7))
    centers = [*itertools.product(range(6), range(7))]
    for size in (1, 2, 3, 4, 16):
        erased = images.square(*torch.tensor(centers).T, size)
        for mask, (row, column) in zip(erased, centers):
            by_hand = torch.zeros(6, 7, dtype=torch.bool)
            top, left = row - size // 2, column - size // 2
            by_hand[max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = True
            assert torch.equal(mask, by_hand)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_values_and_layout(memory_format):
    data = random_set()
    images = DeviceImages(data, memory_format=memory_format)
    batches = [*images.batches(10)]
    assert [len(labels) for _, labels in batches] == [10, 10, 3]
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.labels)
    output = torch.cat([batch for batch, _ in batches])
    exact = torch.from_numpy(np.stack([normalize_by_hand(image) for image in data.images.numpy()]))
    # Three roundings.
    torch.testing.assert_close(output.double(), exact, rtol=torch.finfo(torch.float32).eps, atol=4 * 2**-24)
    stacked, labels = DeviceBatches(images, 4, cutout=2).stack(0, 3)
    for batch in (*(batch for batch, _ in batches), stacked):
        assert batch.dtype == torch.float32 and batch.is_contiguous(memory_format=memory_format)
    assert stacked.shape == (12, 3, 5, 6) and labels.dtype == torch.int64


def test_a_batch_equals_its_images_treated_one_by_one():
    # 1-pixel classes tell which image it is; every combination of crop and flip is tried by hand until one fits.
    data = random_set(count=30, height=4, width=4)
    padding, erased_value = 2, 0.0
    images, labels = DeviceBatches(DeviceImages(data, padding=padding), 30, cutout=2, seed=5).stack(0, 1)
    assert labels.sort().values.tolist() == list(range(30))
    erased_pixels = 0
    for image, label in zip(images, labels.tolist()):
        erased = (image == erased_value).all(0)
        erased_pixels += int(erased.sum())
        assert 1 <= int(erased.sum()) <= 4  # 2 × 2, or what is left of it at the border
        fits = [
            np.abs(
                np.where(
                    erased,
                    0,
                    normalize_by_hand(crop_by_hand(data.images[label].numpy(), *shift, padding)) - image.numpy(),
                )
            ).max()
            < 1e-5
            for shift in itertools.product(range(5), range(5), (False, True))
        ]
        assert any(fits)
    assert erased_pixels > 60  # 3.06 on average


def test_every_crop_and_flip_is_equally_likely_and_independent():
    # One picture 3600 times: 9 shifts × 2 flips × 9 centres of a one-pixel square = 162 outcomes, all different.
    picture = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3)
    data = ImageSet(picture.expand(3600, 1, 3, 3), torch.zeros(3600, dtype=torch.int64), (), (0.0,), (1.0,))
    batches = DeviceBatches(DeviceImages(data, padding=1, mean=(-1 / 255,)), 3600, cutout=1)
    outcomes = {}
    for down, right, flip, row, column in itertools.product(range(3), range(3), (False, True), range(3), range(3)):
        window = crop_by_hand(picture[0].numpy(), down, right, flip, 1).astype(int) + 1
        window[0, row, column] = 0
        outcomes[window.tobytes()] = len(outcomes)
    assert len(outcomes) == 162
    counts = np.zeros(162)
    for number in range(3):
        for window in (batches.stack(number, 1)[0] * 255).round().numpy().astype(int):
            counts[outcomes[window.tobytes()]] += 1
    expected = counts.sum() / 162  # 66.7
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 161 + 4 * np.sqrt(2 * 161)
    assert counts.min() > 0


@pytest.mark.parametrize(("crop", "flip", "cutout"), [*itertools.product((True, False), (True, False), (0, 3))])
def test_what_is_switched_off_leaves_the_rest_as_it_was(crop, flip, cutout):
    data = random_set(mean=(0.0,) * 3, std=(1.0,) * 3)
    full = DeviceBatches(DeviceImages(data), 20, cutout=3, seed=1)
    part = DeviceBatches(DeviceImages(data), 20, crop=crop, flip=flip, cutout=cutout, seed=1)
    index, down, right, mirror, row, column = full._draws(0).flatten(1)
    if not crop:
        down, right = torch.full_like(down, 4), torch.full_like(right, 4)
    expected = torch.from_numpy(
        np.stack(
            [
                crop_by_hand(data.images[i].numpy(), int(d), int(r), bool(m) and flip, 4)
                for i, d, r, m in zip(index, down, right, mirror)
            ]
        )
    ).float()
    if cutout:
        expected.masked_fill_(part.images.square(row, column, 3)[:, None], 0)
    images, labels = part.stack(0, 1)
    assert torch.equal((images * 255).round(), expected) and torch.equal(labels, data.labels[index])


def test_an_epoch_is_one_pass_in_a_new_order_decided_by_seed_and_epoch():
    images = DeviceImages(random_set(count=23))

    def orders(seed):
        batches = DeviceBatches(images, 5, seed=seed)
        assert batches.minibatches_per_epoch == 4
        return [batches.stack(4 * epoch, 4)[1].tolist() for epoch in range(12)]

    first = orders(3)
    for order in first:
        assert len(set(order)) == len(order) == 20
    assert len({tuple(order) for order in first}) == 12
    assert set().union(*first) == set(range(23))  # not always the same ones sit out
    torch.rand(3)  # the global generator has no part in it
    assert orders(3) == first and orders(4)[0] != first[0]


@pytest.mark.parametrize(("count", "batch_size", "members"), [(24, 4, 3), (23, 3, 3), (23, 5, 3), (11, 5, 5)])
def test_a_stack_is_its_minibatches_whatever_was_taken_before(count, batch_size, members):
    images = DeviceImages(random_set(count=count))
    batches = DeviceBatches(images, batch_size, cutout=2)
    single = [batches.stack(number, 1) for number in range(5 * members)]
    for first in (*range(0, 5 * members, members), 4, 1):  # in order, as in a run, and back again
        for other in (batches, DeviceBatches(images, batch_size, cutout=2)):  # a run that goes on from there
            found, expected = other.stack(first, members), zip(*single[first : first + members])
            assert all(torch.equal(stacked, torch.cat(parts)) for stacked, parts in zip(found, expected))


def test_ranks_share_every_minibatch():
    images = DeviceImages(random_set())
    whole = DeviceBatches(images, 6, cutout=2)
    shares = [DeviceBatches(images, 6, cutout=2, rank=rank, num_ranks=3) for rank in range(3)]
    assert shares[0].batch_size == 2
    for first in (0, 2, 4):
        parts = zip(*(share.stack(first, 2) for share in shares))
        for expected, shared in zip(whole.stack(first, 2), parts):
            assert torch.equal(torch.cat([part.unflatten(0, (2, 2)) for part in shared], 1).flatten(0, 1), expected)


class NoSynchronization(TorchDispatchMode):
    """Refuses what waits for a device: reading a value, sizes that depend on values, copies between devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in {
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "_unique2",
            "item",
            "equal",
            "is_nonzero",
        }
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    batches = DeviceBatches(DeviceImages(random_set()), 3, cutout=2)
    with NoSynchronization():
        for first in range(0, 14, 2):
            batches.stack(first, 2)
        with pytest.raises(AssertionError):  # the check itself works
            torch.ones(1).item()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(4, 3, 2, 2)}, TypeError, "must have uint8 images.*got torch.float32"),
        ({"labels": torch.zeros(4)}, TypeError, "int64 labels"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "a label for each image, got 4 and 3"),
        ({"mean": (0.5,)}, ValueError, "mean must have 3 values"),
        ({"std": None}, ValueError, "no mean and std of its own; give those of the training set"),
    ],
)
def test_sets_that_cannot_be_used_are_refused(change, error, message):
    fields = {"images": torch.zeros(4, 3, 2, 2, dtype=torch.uint8), "labels": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        DeviceImages(ImageSet(**{**fields, "classes": (), "mean": MEAN, "std": STD, **change}))


def test_arguments_that_do_not_fit_are_refused():
    images = DeviceImages(random_set())
    for arguments, message in (
        ({"batch_size": 24}, "batch_size must be from 1 to 23"),
        ({"batch_size": 0}, "batch_size must be from 1 to 23"),
        ({"batch_size": 4, "cutout": -1}, "cutout must be at least 0"),
        ({"batch_size": 4, "num_ranks": 3}, "batch_size=4 must be divisible by num_ranks=3"),
        ({"batch_size": 4, "num_ranks": 2, "rank": 2}, "rank=2 smaller than that"),
    ):
        with pytest.raises(ValueError, match=message):
            DeviceBatches(images, **arguments)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        next(images.batches(0))
    with pytest.raises(ValueError, match="padding must be at least 0"):
        DeviceImages(random_set(), padding=-1)
