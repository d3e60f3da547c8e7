"""Crops and decoding: torchvision's results, pixel for pixel where it is installed."""

import io
import math
import struct
import zlib

import numpy as np
import pytest

pytest.importorskip("PIL")
from image_sets import jpeg
from PIL import Image

from latephase_kernels.data.image_crops import central_box, random_resized_crop, resized_shape, sample_generator
from latephase_kernels.data.image_decoding import CorruptImage, jpeg_for_gpu, training_pixels, validation_pixels

SIZES = [(50, 40), (40, 50), (64, 64), (301, 200), (37, 333), (500, 375)]  # width, height


def random(position=0):
    return sample_generator(3, 0, position)


def test_boxes_are_inside_and_as_large_as_they_should_be():
    shares, log_ratios = [], []
    for position in range(1500):
        top, left, height, width = random_resized_crop(random(position), 375, 500)
        assert 0 <= top <= 375 - height and 0 <= left <= 500 - width and height > 0 and width > 0
        shares.append(height * width / (375 * 500))
        log_ratios.append(math.log(width / height))
    assert min(shares) > 0.079 and 0.95 < max(shares) <= 1
    assert min(log_ratios) > math.log(3 / 4) - 0.02 and max(log_ratios) < math.log(4 / 3) + 0.02
    transforms = pytest.importorskip("torchvision.transforms")
    import torch

    torch.manual_seed(0)
    image, theirs = torch.empty(3, 375, 500), []
    for _ in range(1500):
        _, _, height, width = transforms.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
        theirs.append(height * width / (375 * 500))
    # Two samples of one distribution: the largest distance of their distribution functions exceeds this once in 10⁶.
    grid = np.linspace(0.08, 1, 200)
    ours_below, theirs_below = (np.searchsorted(np.sort(part), grid) / 1500 for part in (shares, theirs))
    assert np.abs(ours_below - theirs_below).max() < math.sqrt(-math.log(5e-7) / 1500)


@pytest.mark.parametrize("height, width, box", [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10))])
def test_images_that_no_box_fits(height, width, box):
    assert random_resized_crop(random(), height, width) == box


def test_random_numbers_are_unrelated():
    draws = {
        tuple(sample_generator(key, epoch, position).random(2))
        for key in (1, 2)
        for epoch in range(3)
        for position in range(50)
    }
    assert len(draws) == 300
    assert (sample_generator(1, 2, 3).random(4) == sample_generator(1, 2, 3).random(4)).all()


@pytest.mark.parametrize("width, height", SIZES)
def test_training_pixels_are_those_of_the_box(width, height):
    content = jpeg(5, width, height)
    image = Image.open(io.BytesIO(content)).convert("RGB")
    for position in range(5):
        top, left, box_height, box_width = random_resized_crop(random(position), height, width)
        pixels = training_pixels(content, "x", random(position), 224)
        cropped = image.crop((left, top, left + box_width, top + box_height))
        assert np.array_equal(pixels, np.asarray(cropped.resize((224, 224), Image.Resampling.BILINEAR)))
        functional = pytest.importorskip("torchvision.transforms.functional")
        theirs = functional.resized_crop(image, top, left, box_height, box_width, [224, 224])
        assert np.array_equal(pixels, np.asarray(theirs))


def test_large_images_are_decoded_smaller():
    """At ½, ¼ or ⅛, with the box where it would be: little changes, and nothing moves."""
    content = jpeg(6, 1600, 1200)
    image = Image.open(io.BytesIO(content)).convert("RGB")
    differences = []
    for position in range(12):
        top, left, height, width = random_resized_crop(random(position), 1200, 1600)
        full = image.crop((left, top, left + width, top + height)).resize((32, 32), Image.Resampling.BILINEAR)
        difference = training_pixels(content, "x", random(position), 32).astype(float) - np.asarray(full)
        differences.append(np.abs(difference).max())
        assert abs(difference.mean()) < 0.5
    assert 0 < max(differences) < 6


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("resize, size", [(256, 224), (40, 32), (33, 32), (32, 32)])
def test_validation_pixels_are_torchvisions(width, height, resize, size):
    transforms = pytest.importorskip("torchvision.transforms")
    content = jpeg(7, width, height)
    image = Image.open(io.BytesIO(content)).convert("RGB")
    theirs = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(size)])(image)
    assert np.array_equal(validation_pixels(content, "x", resize, size), np.asarray(theirs))


def test_the_middle():
    assert resized_shape(375, 500, 256) == (256, 341) and resized_shape(500, 375, 256) == (341, 256)
    assert central_box(256, 341, 224) == (16, 58, 224, 224)
    content = jpeg(7, 300, 200)
    pixels = validation_pixels(content, "x", 200, 180)  # no resizing
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(content)))[10:190, 60:240])


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1", "LA", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = Image.open(io.BytesIO(jpeg(8))).convert("RGB")
    image = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG" if mode in ("L", "CMYK") else "PNG")
    content = file.getvalue()
    assert training_pixels(content, "x", random(), 24).shape == (24, 24, 3)
    assert validation_pixels(content, "x", 32, 24).dtype == np.uint8
    assert (jpeg_for_gpu(content, random()) is not None) == (mode == "L")


WHOLE = jpeg(9, 120, 90)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an image at all " * 9,
        WHOLE[:10],
        WHOLE[: len(WHOLE) // 2],
        WHOLE[:300],
        b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
    ],
)
def test_corrupt_images_are_named(content):
    with pytest.raises(CorruptImage, match="folder/one.JPEG is no image or damaged"):
        training_pixels(content, "folder/one.JPEG", random(), 24)
    with pytest.raises(CorruptImage, match="folder/one.JPEG is no image or damaged"):
        validation_pixels(content, "folder/one.JPEG", 32, 24)
    assert jpeg_for_gpu(content, random()) is None


def test_a_decompression_bomb_is_corrupt():
    header = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in (header, b"IDAT" + zlib.compress(b"")):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(CorruptImage, match="one.png is no image or damaged .*decompression bomb"):
        training_pixels(content, "one.png", random(), 24)


def test_what_a_gpu_gets():
    found = jpeg_for_gpu(WHOLE, random(4))
    assert found is not None and found.box == random_resized_crop(random(4), 90, 120) and found.exif == ()
    assert jpeg_for_gpu(WHOLE + b"\0\0", random()) is not None  # padding behind the end
    assert jpeg_for_gpu(jpeg(9, progressive=True), random()) is None
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    turned = jpeg(9, 120, 90, exif=exif)
    found = jpeg_for_gpu(turned, random(4))
    assert found is not None and [turned[at - 1 : at + 1] for at in found.exif] == [b"\xff\xe1"]
    # As torchvision's loader does, pixels are taken as they are stored.
    assert np.array_equal(training_pixels(turned, "x", random(4), 24), training_pixels(WHOLE, "x", random(4), 24))
    for cut in range(0, len(WHOLE), 37):
        assert jpeg_for_gpu(WHOLE[:cut], random()) is None


def test_colours_that_a_gpu_would_mistake():
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
    assert jpeg_for_gpu(WHOLE[:2] + adobe + b"\x00" + WHOLE[2:], random()) is None  # RGB
    assert jpeg_for_gpu(WHOLE[:2] + adobe + b"\x01" + WHOLE[2:], random()) is not None  # YCbCr
    frame = WHOLE.index(b"\xff\xc0")
    named = bytearray(WHOLE)
    named[frame + 10 : frame + 19 : 3] = b"RGB"
    assert jpeg_for_gpu(bytes(named), random()) is None
