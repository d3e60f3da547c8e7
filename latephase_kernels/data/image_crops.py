"""Which part of an image a network sees: at random for training, the middle for validation.

Legend: an image has height × width pixels; a box is (top, left, height, width) in them.
"""

import math

import numpy as np

Box = tuple[int, int, int, int]
_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random-resized-crop: shares of the area, width / height


def sample_generator(key: int, epoch: int, position: int) -> np.random.Generator:
    """Return the random numbers of one sample: the position-th of an epoch's order; unrelated to any other's."""
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, position, epoch]))


def random_resized_crop(random: np.random.Generator, height: int, width: int) -> Box:
    """Draw the box of a random-resized-crop.

    Its share of the area is uniform from 8 % to all of it, the logarithm of width/height uniform between those of 3/4
    and 4/3, its place uniform. Where ten such boxes in turn do not fit into the image: the largest central one whose
    ratio is allowed.

    Source:
        Szegedy et al., "Going deeper with convolutions", 2015; the rules are torchvision's RandomResizedCrop.
    """
    log_ratio = math.log(_RATIO[0]), math.log(_RATIO[1])
    for _ in range(10):
        area = height * width * random.uniform(*_SCALE)
        aspect = math.exp(random.uniform(*log_ratio))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(random.integers(height - box_height + 1))
            left = int(random.integers(width - box_width + 1))
            return top, left, box_height, box_width
    box_height, box_width = height, width
    if width / height < _RATIO[0]:
        box_height = min(round(width / _RATIO[0]), height)
    elif width / height > _RATIO[1]:
        box_width = min(round(height * _RATIO[1]), width)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def resized_shape(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Return height and width with the shorter side at `shorter`, in the same proportion."""
    if height <= width:
        return shorter, int(shorter * width / height)
    return int(shorter * height / width), shorter


def central_box(height: int, width: int, size: int) -> Box:
    """Return the box of size × size pixels in the middle; where the image is smaller, it begins outside of it."""
    return round((height - size) / 2.0), round((width - size) / 2.0), size, size
