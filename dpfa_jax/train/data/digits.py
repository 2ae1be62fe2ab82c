"""1797 digits of 8 x 8 pixels (Alpaydin and Kaynak, 1998), as scikit-learn packages them."""

import gzip

import numpy as np

from dpfa_jax.train.data.dataset import ClassificationData
from dpfa_jax.train.data.images import image_data
from dpfa_jax.train.data.packages import package_file


def load_digits(seed: int) -> ClassificationData:
    """(n, 8, 8) float32 in [0, 1]. Errors: DataError if the package is not installed."""
    file = package_file("scikit-learn", "sklearn/datasets/data/digits.csv.gz")
    with gzip.open(file, "rt", encoding="ascii") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    images = table[:, :-1].reshape(-1, 8, 8) / 16.0
    return image_data("digits", images, table[:, -1], seed)
