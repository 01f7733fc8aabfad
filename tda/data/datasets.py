"""What every loader returns, and what may be done to it before training.

A dataset is a training and a test dictionary {"x", "y"} of NumPy arrays; one of
texts has "segments" and "mask" too (`tda.data.packing`).

Notation: N examples, F columns, H rows and W columns of pixels, K classes, T
positions.
  x  float32: [N, F] for a table, [N, H, W, 1] in 0..1 for grey pictures
     int32 [N, T] for tokens of text, and y the tokens that follow
  y  int32 [N] in 0..K-1 for classification; float32 [N, 1] for regression,
     the shape of a network's single output

Splits are drawn with `numpy.random.RandomState`: its streams are frozen, so a
seed names the same split under every NumPy release.
"""

from typing import NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]  # "x", "y" and perhaps others, each [N, ...]


class Dataset(NamedTuple):
  """Arrays, and what a model and a report must know about them."""

  name: str
  train: Arrays
  test: Arrays
  class_names: tuple[str, ...] = ()  # K names; none for regression
  vocab: int = 0  # tokens that texts are made of
  relevant: np.ndarray | None = None  # [N, tests] bool, where that is known

  @property
  def kind(self) -> str:
    """One of "language", "classification" and "regression"."""
    if self.vocab:
      return "language"
    return "classification" if self.class_names else "regression"

  @property
  def num_classes(self) -> int:
    """K, and 0 for regression and texts."""
    return len(self.class_names)

  @property
  def num_outputs(self) -> int:
    """Outputs that a model needs: tokens, K, or one per regression target."""
    return self.vocab or self.num_classes or self.train["y"].shape[1]

  @property
  def image_shape(self) -> tuple[int, ...] | None:
    """(H, W) of a picture, and None for a table."""
    x = self.train["x"]
    return x.shape[1:3] if x.ndim == 4 else None


def split(
  data: Arrays,
  num_train: int,
  *,
  seed: int,
  train_size: int = 0,
  test_size: int = 0,
) -> tuple[Arrays, Arrays]:
  """Shuffles, gives the first `num_train` rows to training, the rest to test.

  `train_size` and `test_size` then keep the first rows of each side (0: all),
  so that a smaller training set is nested in a larger one and never meets the
  test set.
  """
  num_rows = len(data["y"])
  order = np.random.RandomState(seed).permutation(num_rows)
  train = order[: checked_size("train_size", train_size, num_train)]
  rest = order[num_train:]
  test = rest[: checked_size("test_size", test_size, len(rest))]
  return take(data, train), take(data, test)


def take(data: Arrays, rows: np.ndarray) -> Arrays:
  """The given rows of every array."""
  return {name: array[rows] for name, array in data.items()}


def checked_size(option: str, size: int, available: int) -> int:
  """`size` rows, all of them for 0; more than there are is an error."""
  if not 0 <= size <= available:
    raise ValueError(
      f"{option}={size}, but there are {available} examples to take from;"
      f" choose 1 to {available}, or 0 for all of them"
    )
  return size or available


def standardize(train: Arrays, test: Arrays) -> tuple[Arrays, Arrays]:
  """Shifts and scales each column by the training rows' mean and deviation.

  Both x and y, in float64 before the float32 of the result. A column that is
  constant in training is only shifted.
  """
  parts = ({}, {})  # type: tuple[Arrays, Arrays]
  for name, array in train.items():
    mean = array.mean(axis=0, dtype=np.float64)
    # By range: the deviation of a constant column may round to 1e-17.
    varies = np.ptp(array, axis=0) > 0
    scale = np.where(varies, array.std(axis=0, dtype=np.float64), 1.0)
    for part, source in zip(parts, (train, test), strict=True):
      part[name] = ((source[name] - mean) / scale).astype(np.float32)
  return parts


def relabel(data: Dataset, fraction: float, seed: int) -> Dataset:
  """Gives a random `fraction` of the training rows one of the other labels.

  The new label is uniform over the K-1 wrong ones, so `fraction` is the share
  of wrong labels and the changed rows are those whose y differ from `data`'s.
  """
  if not 0 <= fraction <= 1:
    raise ValueError(f"label noise must be a fraction of 0 to 1: {fraction}")
  if data.num_classes < 2:
    raise ValueError(
      f"{data.name} has {data.num_classes} classes: only the labels of a"
      " classification set can be replaced; use label noise 0"
    )
  random = np.random.RandomState(seed)
  y = data.train["y"].copy()
  rows = random.permutation(len(y))[: round(fraction * len(y))]
  shift = random.randint(1, data.num_classes, size=len(rows))
  y[rows] = (y[rows] + shift) % data.num_classes
  return data._replace(train={**data.train, "y": y})


CHANGES = ("rotated", "shifted")


def divide(data: Dataset, size: int, change: str) -> tuple[Dataset, Arrays]:
  """Takes the last `size` training pictures out, and changes them.

  Args:
    data: of pictures.
    size: how many.
    change: "rotated" by a quarter turn, or "shifted" by a quarter of the
      picture down and to the right, what leaves it coming back on the other
      side.

  Returns:
    The set without them, and them.

  Raises:
    ValueError: no pictures, none or all of them, or turns of oblong ones.
  """
  if change not in CHANGES:
    raise ValueError(f"unknown change {change!r}; choose from {CHANGES}")
  if data.image_shape is None:
    raise ValueError(f"{data.name} has no pictures that can be {change}")
  rows = len(data.train["y"])
  if not 0 < size < rows:
    raise ValueError(
      f"a second stage takes 1 to {rows - 1} of {rows} examples, not {size}"
    )
  first = {name: x[:-size] for name, x in data.train.items()}
  second = {name: x[-size:] for name, x in data.train.items()}
  if change == "rotated":
    if len({*data.image_shape}) > 1:
      raise ValueError(
        f"a quarter turn changes the shape of pictures {data.image_shape}"
      )
    x = np.rot90(second["x"], axes=(1, 2))
  else:
    by = [side // 4 for side in data.image_shape]
    x = np.roll(second["x"], by, axis=(1, 2))
  second["x"] = np.ascontiguousarray(x)
  return data._replace(train=first), second
