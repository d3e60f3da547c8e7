"""JPEG decoding and cropping on a GPU: by torchcodec, or by torchvision where that is older.

Legend: n images, each [3, H, W] with a size of its own; S × S pixels are what a network sees.
"""

import io
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .image_decoding import imaging

# Takes encoded JPEGs, uint8 [bytes] each, on the CPU; returns them as uint8 [3, H, W] on the device.
Decoder = Callable[[list[Tensor]], list[Tensor]]


def _torchcodec(device: torch.device) -> Decoder:
    from torchcodec.decoders import decode_jpeg  # since 0.16

    return lambda encoded: decode_jpeg(encoded, mode="RGB", device=device)


def _torchvision(device: torch.device) -> Decoder:
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(encoded: list[Tensor]) -> list[Tensor]:
        with warnings.catch_warnings():  # torchvision 0.29 asks to use torchcodec instead
            warnings.simplefilter("ignore")
            return decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)

    return decode


def find_gpu_decoder(device: torch.device) -> tuple[Decoder | None, str]:
    """Return a decoder that works on this device, or None; and its name, or why there is none.

    Each is tried on a small image: installed libraries may lack the decoder, or what it needs of the system.
    """
    if device.type != "cuda":
        return None, f"the device is {device}"
    file = io.BytesIO()
    imaging().fromarray(np.full((32, 32, 3), 99, dtype=np.uint8)).save(file, "JPEG")
    encoded = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    reasons = []
    for name, make in (("torchcodec", _torchcodec), ("torchvision", _torchvision)):
        try:
            decoder = make(device)
            (image,) = decoder([encoded])
            if image.shape == (3, 32, 32) and (image.float() - 99).abs().max().item() < 5:
                return decoder, name
            reasons.append(f"{name}: a wrong image")
        except Exception as error:  # whatever a library has for what is missing
            reasons.append(f"{name}: {' '.join(str(error).split())[:200]}")
    return None, "; ".join(reasons)


def resized_crops(images: Sequence[Tensor], boxes: Sequence[Sequence[int]], target: Tensor) -> None:
    """Write a box of each image, resized with antialiased bilinear filtering, into target.

    Args:
        images: n of [3, H, W] uint8.
        boxes: n of (top, left, height, width).
        target: [n, S, S, 3] uint8, on the images' device.
    """
    size = target.shape[1:3]
    for image, (top, left, height, width), pixels in zip(images, boxes, target):
        crop = image[None, :, top : top + height, left : left + width].float()
        resized = F.interpolate(crop, size=size, mode="bilinear", antialias=True, align_corners=False)
        pixels.copy_(resized[0].permute(1, 2, 0).round_().clamp_(0, 255))
