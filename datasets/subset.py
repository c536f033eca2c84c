"""A part of the training images with the same number of each class, chosen by a seed."""

import numpy as np

from datasets.errors import DataError

__all__ = ["choose_images"]


def choose_images(targets: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the positions of the chosen images, (count,) int64, in the order of the data.

    The images of every class are shuffled, and the classes take turns. So each class has the same
    number of images, up to one, unless it has too few; and for the same seed, a smaller choice is a
    subset of a larger one.

    Args:
        targets: Class number of each image, (N,) integers.
        count: Number of images to choose.
        seed: Seed of the random choice.

    Raises:
        DataError: There are fewer images.
    """
    if count > len(targets):
        raise DataError(
            f"max_train_samples must be at most {len(targets)}, the number of training images, "
            f"got {count}"
        )
    generator = np.random.default_rng(seed)
    turns = np.empty(len(targets), dtype=np.int64)
    places = np.empty(len(targets), dtype=np.int64)
    classes = np.unique(targets)
    for place, target in zip(generator.permutation(len(classes)), classes, strict=True):
        members = np.flatnonzero(targets == target)
        turns[members] = generator.permutation(len(members))
        places[members] = place
    return np.sort(np.lexsort((places, turns))[:count])
