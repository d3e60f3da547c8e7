"""Minibatches from the disk: true samples, reproducible from (seed, epoch, step), whatever loads them and when."""

import shutil
import threading
import time
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from image_sets import jpeg, write_folder, write_shards

from latephase_kernels.data import ArchiveError
from latephase_kernels.data.gpu_jpeg import find_gpu_decoder, resized_crops
from latephase_kernels.data.image_batches import EvaluationImages, ImageBatches
from latephase_kernels.data.image_crops import random_resized_crop, sample_generator
from latephase_kernels.data.image_decoding import CorruptImage, training_pixels
from latephase_kernels.data.image_folder import ImageFolder
from latephase_kernels.data.image_loader import Ahead
from latephase_kernels.data.image_shards import ImageShards, find_shards
from latephase_kernels.data.worker_pool import WorkerError

SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def files(folder):
    return ImageFolder(folder / "train")


def make(files, **options):
    return ImageBatches(files, **{"batch_size": 4, "size": SIZE, "seed": 5, **options})


def stacks(batches, calls):
    try:
        return [batches.stack(first, count) for first, count in calls]
    finally:
        batches.close()


CALLS = [(0, 1), (1, 1), (2, 3), (5, 3), (8, 3), (4, 2), (40, 1)]


def test_bits_do_not_depend_on_workers_or_on_what_was_taken_before(files):
    expected = stacks(make(files), CALLS)
    for num_workers in (1, 3):
        for found, (images, labels) in zip(stacks(make(files, num_workers=num_workers), CALLS), expected):
            assert torch.equal(found[0], images) and torch.equal(found[1], labels)
    for call, (images, labels) in zip(CALLS, expected):
        ((found, found_labels),) = stacks(make(files), [call])
        assert torch.equal(found, images) and torch.equal(found_labels, labels)
    assert expected[2][0].shape == (12, 3, SIZE, SIZE) and expected[2][0].dtype == torch.float32
    other = stacks(make(files, seed=6), CALLS[:1])[0][0]
    assert not torch.equal(other, expected[0][0])


def test_every_image_once_an_epoch_with_its_label_its_crop_and_its_flip(files):
    batches = make(files)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (files.mean, files.std))
    key = batches._loader.processing.seed
    orders, flips = [], []
    for epoch in range(3):
        images, labels = batches.stack(epoch * 6, 6)
        order = []
        for row in range(24):
            for index in np.flatnonzero(files.labels == labels[row].item()):
                pixels = training_pixels(files.read(index), "x", sample_generator(key, epoch, row), SIZE)
                expected = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div(255).sub(mean).div(std)
                for flip in (False, True):
                    if torch.equal(expected.flip(2) if flip else expected, images[row]):
                        order.append(index), flips.append(flip)
        orders.append(order)
        assert sorted(order) == list(range(24))
    assert len({tuple(order) for order in orders}) == 3 and 20 < sum(flips) < 52
    batches.close()


def test_ranks_share_every_minibatch(files):
    whole = stacks(make(files), [(3, 5)])[0]
    shares = [stacks(make(files, rank=rank, num_ranks=2, num_workers=rank), [(3, 5)])[0] for rank in range(2)]
    for part, expected in enumerate(whole):
        joined = torch.cat([share[part].unflatten(0, (5, 2)) for share in shares], dim=1)
        assert torch.equal(joined.flatten(0, 1), expected)


def test_what_is_loaded_ahead_is_what_is_asked_for_next(files, monkeypatch):
    """Also where a rank takes some of every step's members only: no image is decoded that is not used."""
    batches = make(files, batch_size=2)
    asked = []
    monkeypatch.setattr(
        batches, "_request", lambda number, request=batches._request: asked.append(number) or request(number)
    )
    restarts = []
    monkeypatch.setattr(batches, "_restart", lambda *a, restart=batches._restart: restarts.append(a) or restart(*a))
    for step in range(4):
        batches.stack(6 * step + 2, 2)
    assert asked[:2] == [2, 3] and asked[-6:][:4] == [14, 15, 20, 21]
    assert len(restarts) == 2  # the first, and when the stride was seen
    batches.close()


def test_shards_give_what_folders_give(files, tmp_path):
    shards = ImageShards(find_shards(write_shards(tmp_path), "train"))
    batches = make(shards, num_workers=2)
    images, labels = batches.stack(0, 6)
    assert sorted(labels.tolist()) == [label for label in range(3) for _ in range(8)] and images.isfinite().all()
    batches.close()


def test_memory_format(files):
    images, _ = stacks(make(files, memory_format=torch.channels_last), [(0, 2)])[0]
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, stacks(make(files), [(0, 2)])[0][0])


# ------------------------------------------------------------------------------------------ a GPU's decoder


def decode_on_cpu(encoded):
    """In the place of a GPU's decoder: Pillow's."""
    from io import BytesIO

    from PIL import Image

    images = [Image.open(BytesIO(part.numpy().tobytes())).convert("RGB") for part in encoded]
    return [torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) for image in images]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_encoded_images_give_the_same_crops(folder, tmp_path, num_workers):
    shutil.copytree(folder, tmp_path / "set")
    (tmp_path / "set/train/n0000/n0000_0.JPEG").write_bytes(jpeg(1, progressive=True))  # the CPU's in any case
    files = ImageFolder(tmp_path / "set" / "train")
    expected = stacks(make(files, size=40), CALLS)  # too large for the CPU to decode at half the resolution
    encoded = stacks(make(files, size=40, decoder=decode_on_cpu, num_workers=num_workers), CALLS)
    for found, (images, labels) in zip(encoded, expected):
        assert torch.equal(found[1], labels)
        assert (found[0] - images).abs().max() < 1.01 / 255 / 0.224  # a level, after rounding


def test_resized_crops_are_pillows():
    content = jpeg(3, 300, 200)
    (image,) = decode_on_cpu([torch.frombuffer(bytearray(content), dtype=torch.uint8)])
    boxes = [random_resized_crop(sample_generator(1, 0, position), 200, 300) for position in range(6)]
    found = torch.empty(6, 128, 128, 3, dtype=torch.uint8)
    resized_crops([image] * 6, boxes, found)
    for position in range(6):
        expected = training_pixels(content, "x", sample_generator(1, 0, position), 128).astype(int)
        assert np.abs(found[position].numpy() - expected).max() <= 1


def test_a_decoder_that_fails_is_named_and_the_cpu_decodes(files):
    def failing(encoded):
        raise RuntimeError("nvjpegDecode failed: 4")

    batches = make(files, decoder=failing)
    with pytest.warns(UserWarning, match="given failed on some images, which the CPU decoded: nvjpegDecode failed: 4"):
        images, _ = batches.stack(0, 3)
    batches.close()
    assert torch.equal(images, stacks(make(files), [(0, 3)])[0][0])


def test_no_decoder_without_a_gpu(files):
    assert find_gpu_decoder(torch.device("cpu")) == (None, "the device is cpu")
    assert make(files, decoder="auto").decoder_name == "cpu"
    with pytest.raises(ValueError, match="decoder must be cpu here: there is none on the GPU"):
        make(files, decoder="gpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("decoder", ["cpu", "auto"])
def test_on_a_gpu(files, decoder):
    expected = stacks(make(files), CALLS)
    found = stacks(make(files, device="cuda", decoder=decoder, num_workers=2), CALLS)
    for (images, labels), (expected_images, expected_labels) in zip(found, expected):
        assert torch.equal(labels.cpu(), expected_labels)
        difference = (images.cpu() - expected_images).abs()
        assert difference.max() < 1e-5 if decoder == "cpu" else difference.mean() < 0.1


def test_ahead():
    """The thread that works ahead: order, a bound, an error where it belongs, an end at any time."""
    from latephase_kernels.data.image_loader import Loaded

    made = []

    def items(count, error=None):
        for number in range(count):
            made.append(number)
            yield Loaded(number, torch.zeros(1), torch.zeros(1))
        if error is not None:
            raise error

    device = torch.device("cpu")
    ahead = Ahead(items(20), 3, device)
    assert next(ahead).number == 0
    time.sleep(0.3)
    assert len(made) <= 6  # one taken, three waiting, one in hand
    assert [item.number for item in ahead] == list(range(1, 20))
    ahead.close()
    ahead = Ahead(items(2, OSError(5, "Input/output error", "x.jpg")), 3, device)
    assert [next(ahead).number for _ in range(2)] == [0, 1]
    for _ in range(2):
        with pytest.raises(OSError, match="x.jpg"):
            next(ahead)
    ahead.close()
    ahead = Ahead(items(1000), 2, device)
    next(ahead)
    ahead.close()
    assert not any(thread.name == "image loader" for thread in threading.enumerate())


# ------------------------------------------------------------------------------------------ what goes wrong


@pytest.fixture
def damaged(folder, tmp_path):
    """Two of 24 images are corrupt."""
    shutil.copytree(folder, tmp_path / "set")
    first = tmp_path / "set/train/n0001/n0001_3.JPEG"
    first.write_bytes(first.read_bytes()[:200])
    (tmp_path / "set/train/n0002/n0002_0.JPEG").write_bytes(b"")
    return ImageFolder(tmp_path / "set" / "train")


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"decoder": decode_on_cpu, "num_workers": 1}])
def test_a_corrupt_image_is_an_error(damaged, options):
    batches = make(damaged, **options)
    for _ in range(2):  # and it stays one
        with pytest.raises(CorruptImage, match=r"set/train/n000(1/n0001_3|2/n0002_0).JPEG is no image or damaged"):
            batches.stack(0, 6)
    batches.close()


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"decoder": decode_on_cpu, "num_workers": 1}])
def test_a_corrupt_image_is_replaced_where_that_is_asked_for(damaged, options):
    batches = make(damaged, corrupt="replace", **options)
    with pytest.warns(UserWarning, match="another image takes its place") as caught:
        images, labels = batches.stack(0, 6)
    assert {str(one.message).split("/")[-1].split(" ")[0] for one in caught} == {"n0001_3.JPEG", "n0002_0.JPEG"}
    assert batches.num_corrupt == 2 and images.isfinite().all() and len(labels) == 24
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each is named once
        again, _ = batches.stack(6, 6)
        repeated, repeated_labels = batches.stack(0, 6)
    assert batches.num_corrupt == 2
    assert torch.equal(repeated_labels, labels)
    if "decoder" not in options:
        assert torch.equal(repeated, images)
    assert not torch.equal(again, images)
    batches.close()


def test_only_corrupt_images(tmp_path):
    for number in range(3):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / f"{number}.jpg").write_bytes(b"?")
    with pytest.raises(CorruptImage, match="100 images in a row are corrupt; the last: .*jpg is no image"):
        make(ImageFolder(tmp_path), batch_size=2, corrupt="replace").stack(0, 1)


@pytest.mark.parametrize("corrupt", ["error", "replace"])
def test_a_file_that_is_gone_is_an_error(folder, tmp_path, corrupt):
    shutil.copytree(folder, tmp_path / "set")
    files = ImageFolder(tmp_path / "set" / "train")
    (tmp_path / "set/train/n0001/n0001_3.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match="n0001_3.JPEG"):
        make(files, num_workers=1, corrupt=corrupt).stack(0, 6)


@pytest.mark.parametrize("corrupt", ["error", "replace"])
def test_a_shard_that_was_cut_since_is_an_error(tmp_path, corrupt):
    import os

    files = ImageShards(find_shards(write_shards(tmp_path), "train"))
    os.truncate(tmp_path / "train-00001.tar", 2048)
    with pytest.raises(ArchiveError, match="train-00001.tar, member .* is cut off"):
        make(files, num_workers=2, corrupt=corrupt).stack(0, 6)


class Sleeping(ImageFolder):
    """A disk that does not answer for one image."""

    def read(self, index):
        if index == 9:
            time.sleep(60)
        return super().read(index)


def test_a_read_that_hangs_is_an_error(folder):
    batches = make(Sleeping(folder / "train"), num_workers=2)
    assert batches._loader._pool._timeout <= 29  # so that the error comes within 30 s
    batches._loader._pool._timeout = 1.0
    with pytest.raises(WorkerError, match="stuck for 1 s at .*n0001_1.JPEG"):
        batches.stack(0, 6)


def test_evaluation(folder, files):
    val = ImageFolder(folder / "val", files.classes)
    expected = EvaluationImages(val, size=SIZE, resize=20)
    with_workers = EvaluationImages(val, size=SIZE, resize=20, num_workers=2, memory_format=torch.channels_last)
    for batch_size in (5, 12, 40):
        images, labels = (torch.cat(parts) for parts in zip(*expected.batches(batch_size)))
        assert images.shape == (12, 3, SIZE, SIZE) and torch.equal(labels, expected.labels)
        again = list(with_workers.batches(batch_size))
        assert torch.equal(torch.cat([part for part, _ in again]), images)
        assert again[0][0].is_contiguous(memory_format=torch.channels_last)
    assert len(list(zip(range(1), with_workers.batches(5)))) == 1  # left early
    assert len(list(with_workers.batches(5))) == 3
    transforms = pytest.importorskip("torchvision.transforms")
    datasets = pytest.importorskip("torchvision.datasets")
    steps = [transforms.Resize(20), transforms.CenterCrop(SIZE), transforms.ToTensor()]
    theirs = datasets.ImageFolder(folder / "val", transforms.Compose([*steps, transforms.Normalize(val.mean, val.std)]))
    torch.testing.assert_close(images, torch.stack([image for image, _ in theirs]), rtol=0, atol=1e-6)
    assert [label for _, label in theirs] == labels.tolist()


def test_a_corrupt_image_of_the_validation_set_is_an_error(folder, files, tmp_path):
    shutil.copytree(folder, tmp_path / "set")
    (tmp_path / "set/val/n0000/n0000_2.JPEG").write_bytes(b"no")
    val = ImageFolder(tmp_path / "set/val", files.classes)
    with pytest.raises(CorruptImage, match="val/n0000/n0000_2.JPEG"):
        list(EvaluationImages(val, size=SIZE, resize=20, num_workers=1).batches(4))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size must be from 1 to 24"),
        ({"batch_size": 25}, "batch_size must be from 1 to 24"),
        ({"num_ranks": 3}, "must be divisible by num_ranks=3"),
        ({"rank": 2, "num_ranks": 2}, "rank=2 smaller than that"),
        ({"corrupt": "ignore"}, "corrupt must be error or replace, got 'ignore'"),
        ({"decoder": "nvjpeg"}, "decoder must be auto, cpu or gpu, got 'nvjpeg'"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
    ],
)
def test_arguments(files, options, message):
    with pytest.raises(ValueError, match=message):
        make(files, **options)


def test_evaluation_arguments(files):
    with pytest.raises(ValueError, match="resize must be at least size=16, got 8"):
        EvaluationImages(files, size=SIZE, resize=8)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        next(EvaluationImages(files, size=SIZE, resize=20).batches(0))
