"""Handwritten digits: those that come with scikit-learn, or MNIST from a folder.

    load_digits()           1797 images of 8 x 8, one in five of each class held out
    load_digits(data_dir)   MNIST's own 60000 and 10000 images of 28 x 28

Nothing is ever downloaded. Both are numbers in [0, 1], ink is 1.

References: Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits";
LeCun et al. 1998, "Gradient-based learning applied to document recognition".
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxpg._checks import check_range

__all__ = ["DigitData", "Digits", "load_digits", "split_off"]

TEST_SHARE = 0.2
_SPLIT_SEED = 0


class Digits(NamedTuple):
    """Images and what they show.

    Attributes:
        images: ink in [0, 1].
        labels: 0 to 9.
    """

    images: Float[np.ndarray, "N H W"]
    labels: Int[np.ndarray, " N"]


class DigitData(NamedTuple):
    """What is learned from, and what is held out."""

    train: Digits
    test: Digits


def load_digits(data_dir: Path | str | None = None) -> DigitData:
    """Read digits with their held-out test split.

    Args:
        data_dir: a folder with MNIST's four IDX files, gzipped or not; None for the
            digits of scikit-learn.

    Returns:
        The data: the same at every call.

    Raises:
        ImportError: if scikit-learn is needed and not there.
        ValueError: if a file of the folder is missing or damaged.
    """
    if data_dir is not None:
        return _load_mnist(Path(data_dir))
    try:
        from sklearn import datasets
    except ImportError:
        raise ImportError(
            "the digits of scikit-learn need scikit-learn, which is not installed; "
            "pip install 'jaxpg[digits]', or give a folder with MNIST's files "
            "(--data-dir)"
        ) from None
    bunch = datasets.load_digits()
    images = np.asarray(bunch.images, np.float32) / 16.0
    return split_off(Digits(images, np.asarray(bunch.target, np.int32)), TEST_SHARE)


def split_off(digits: Digits, share: float, seed: int = _SPLIT_SEED) -> DigitData:
    """Hold out the same share of each class.

    Args:
        digits: to split.
        share: of them that is held out, above 0 and below 1.
        seed: of the shuffle.

    Returns:
        What is left as `train`, what is held out as `test`, in the order they came in.

    Raises:
        ValueError: if the share is outside (0, 1).

    >>> digits = Digits(np.zeros((10, 1, 1), np.float32), np.arange(10) % 2)
    >>> sorted(split_off(digits, 0.4).test.labels.tolist())
    [0, 0, 1, 1]
    """
    check_range("share", share, 0.0, 0.999, open_low=True)
    rng = np.random.default_rng(seed)
    held = np.zeros(len(digits.labels), bool)
    for label in np.unique(digits.labels):
        (mine,) = np.nonzero(digits.labels == label)
        held[rng.permutation(mine)[: round(share * len(mine))]] = True
    return DigitData(*(Digits(*(x[keep] for x in digits)) for keep in (~held, held)))


def _load_mnist(folder: Path) -> DigitData:
    if not folder.is_dir():
        raise ValueError(
            f"data_dir is {str(folder)!r}, which is no folder; needs one with MNIST's "
            f"files {', '.join(_names('train') + _names('t10k'))}"
        )
    return DigitData(*(_load_part(folder, part) for part in ("train", "t10k")))


def _names(part: str) -> list[str]:
    return [f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"]


def _load_part(folder: Path, part: str) -> Digits:
    images, labels = (
        _read_idx(_find(folder, name), rank)
        for name, rank in zip(_names(part), (3, 1), strict=True)
    )
    if len(images) != len(labels):
        raise ValueError(
            f"{folder} has {len(images)} images but {len(labels)} labels in its part "
            f"{part!r}, needs as many of both; put the files of one data set there"
        )
    return Digits(images.astype(np.float32) / 255.0, labels.astype(np.int32))


def _find(folder: Path, name: str) -> Path:
    # Some archives unpack with a dot where MNIST itself has a dash.
    spellings = (name, name.replace("-idx", ".idx"))
    for spelling in spellings:
        for path in (folder / spelling, folder / f"{spelling}.gz"):
            if path.is_file():
                return path
    raise ValueError(
        f"{folder} holds no {name} (nor {name}.gz), needs MNIST's four IDX files; "
        "put it there, or leave data_dir out to use the digits of scikit-learn"
    )


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """An array of bytes: 0, 0, 8 (unsigned bytes), rank, sizes, then the entries."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy it anew") from None
    start = 4 + 4 * rank
    if raw[:4] != bytes((0, 0, 8, rank)) or len(raw) < start:
        raise ValueError(
            f"{path} is no IDX file of unsigned bytes in {rank} dimensions; copy it "
            "anew"
        )
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", rank, offset=4))
    if len(raw) != start + math.prod(shape):
        raise ValueError(
            f"{path} has {len(raw) - start} entries, but its header says "
            f"{math.prod(shape)}; copy it anew"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
