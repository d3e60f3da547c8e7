"""Data: loaders that read published files without executing them, and minibatches that live on the device."""

from .cifar import load_cifar10, load_cifar100
from .cifar_corrupted import CORRUPTIONS, EXTRA_CORRUPTIONS, NUM_SEVERITIES, load_cifar10_c, load_cifar100_c
from .device_batches import DeviceBatches
from .device_images import DeviceImages
from .digits import load_digits, split_digits
from .downloads import DOWNLOADS, Download, download
from .fashion_mnist import load_fashion_mnist
from .files import ArchiveError
from .image_batches import EvaluationImages, ImageBatches
from .image_decoding import CorruptImage
from .image_files import ImageFiles
from .image_folder import ImageFolder
from .image_shards import ImageShards, find_shards
from .imagenet import load_imagenet
from .minibatches import Minibatches, random_shift
from .resized_images import load_lsun_resized, load_tiny_imagenet_resized
from .sets import ImageSet, TextSet
from .svhn import load_svhn
from .text import load_enwik8, load_python_text, load_text, split_text, split_texts
from .text_batches import TextBatches
from .worker_pool import WorkerError

__all__ = [
    "CORRUPTIONS",
    "DOWNLOADS",
    "EXTRA_CORRUPTIONS",
    "NUM_SEVERITIES",
    "ArchiveError",
    "CorruptImage",
    "DeviceBatches",
    "DeviceImages",
    "Download",
    "EvaluationImages",
    "ImageBatches",
    "ImageFiles",
    "ImageFolder",
    "ImageSet",
    "ImageShards",
    "Minibatches",
    "TextBatches",
    "TextSet",
    "WorkerError",
    "download",
    "find_shards",
    "load_cifar10",
    "load_cifar10_c",
    "load_cifar100",
    "load_cifar100_c",
    "load_digits",
    "load_enwik8",
    "load_fashion_mnist",
    "load_imagenet",
    "load_lsun_resized",
    "load_python_text",
    "load_svhn",
    "load_text",
    "load_tiny_imagenet_resized",
    "random_shift",
    "split_digits",
    "split_text",
    "split_texts",
]
