"""What every loader of data returns: images or text, in memory, as unsigned bytes."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, with their labels.

    Attributes:
        images: [N, C, H, W] uint8, 0 … 255.
        labels: [N] int64, an index into classes; −1 everywhere for a set without labels.
        classes: the names of the classes; empty for a set without labels.
        mean: per channel, for values divided by 255, as published recipes use it; None where there is no such habit
            (a set for testing another set's model: normalize it as that one).
        std: likewise.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_channels(self) -> int:
        """C."""
        return self.images.size(1)


@dataclass(frozen=True)
class TextSet:
    """A text as a sequence of symbols, split in order of appearance.

    Attributes:
        train: [T] uint8, indices into vocabulary, 0 … len(vocabulary) − 1.
        validation: likewise, what follows the training text.
        test: likewise, the end.
        vocabulary: the distinct bytes of the whole text, ascending.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: bytes

    def decode(self, symbols: Tensor) -> bytes:
        """Return the bytes that symbols [T] stand for.

        Raises:
            IndexError: a symbol is outside of the vocabulary.
        """
        return bytes(self.vocabulary[symbol] for symbol in symbols.tolist())
