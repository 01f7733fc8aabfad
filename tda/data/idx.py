"""IDX files, the format in which MNIST and its relatives are published.

A file is two zero bytes, a type code (8: unsigned bytes), the number of
dimensions, their sizes as big-endian 32-bit integers, and the values.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from tda.data.datasets import Arrays, Dataset, checked_size, take

_GARMENTS = (
  "T-shirt",
  "trouser",
  "pullover",
  "dress",
  "coat",
  "sandal",
  "shirt",
  "sneaker",
  "bag",
  "ankle boot",
)
# Set -> (class names, publisher).
_SETS = {
  "mnist": (
    tuple(str(digit) for digit in range(10)),
    "MNIST is published by Y. LeCun, C. Cortes and C. Burges",
  ),
  "fashion_mnist": (
    _GARMENTS,
    "Fashion-MNIST is published by Zalando Research (fashion-mnist on GitHub,"
    " Debian package dataset-fashion-mnist)",
  ),
}


def idx(
  data_dir: str | Path,
  train_size: int = 6144,
  test_size: int = 0,
  seed: int = 0,
  *,
  name: str = "fashion_mnist",
) -> Dataset:
  """A random `train_size` of the training files and `test_size` of the test.

  Reads the four published files, gzipped or not, named `train-images-idx3-...`
  or `train-images.idx3-...`. A size of 0 takes every example.

  Raises:
    FileNotFoundError: a file is missing; says which, where and whence.
    ValueError: a file is damaged, or a size exceeds what the file holds.
  """
  if name not in _SETS:
    raise ValueError(f"unknown IDX set {name!r}; choose from {sorted(_SETS)}")
  class_names, publisher = _SETS[name]
  random = np.random.RandomState(seed)
  parts = []
  for prefix, option, size in (
    ("train", "train_size", train_size),
    ("t10k", "test_size", test_size),
  ):
    pictures = _pictures(Path(data_dir), prefix, publisher, len(class_names))
    count = len(pictures["y"])
    rows = random.permutation(count)[: checked_size(option, size, count)]
    chosen = take(pictures, rows)
    chosen["x"] = (chosen["x"][..., None] / 255).astype(np.float32)
    parts.append(chosen)
  train, test = parts
  return Dataset(name, train, test, class_names)


def read(path: str | Path, rank: int) -> np.ndarray:
  """The array of unsigned bytes in one IDX file, gzipped or not."""
  content = _bytes(Path(path))
  start = 4 + 4 * rank
  if len(content) < start or content[:4] != bytes([0, 0, 8, rank]):
    raise ValueError(
      f"{path} is no IDX file of unsigned bytes with {rank} dimensions: it"
      f" starts with {content[:4].hex(' ') or 'nothing'}, not"
      f" 00 00 08 {rank:02x}"
    )
  shape = tuple(int(n) for n in np.frombuffer(content, ">u4", rank, 4))
  if len(content) - start != math.prod(shape):
    raise ValueError(
      f"{path} is damaged: its header promises {math.prod(shape)} bytes of"
      f" shape {shape}, it holds {len(content) - start}; fetch it again"
    )
  return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _pictures(
  data_dir: Path, prefix: str, publisher: str, num_classes: int
) -> Arrays:
  """Images [N, H, W] uint8 and labels [N] int32 of one pair of files."""
  images_path = _find(data_dir, prefix, "images", 3, publisher)
  labels_path = _find(data_dir, prefix, "labels", 1, publisher)
  images, labels = read(images_path, rank=3), read(labels_path, rank=1)
  if len(images) != len(labels):
    raise ValueError(
      f"{images_path} holds {len(images)} pictures, but {labels_path}"
      f" {len(labels)} labels: they are not of the same set"
    )
  if labels.max(initial=0) >= num_classes:
    raise ValueError(
      f"{labels_path} has the label {labels.max()}; expected 0 to"
      f" {num_classes - 1}"
    )
  return {"x": images, "y": labels.astype(np.int32)}


def _find(
  data_dir: Path, prefix: str, content: str, rank: int, publisher: str
) -> Path:
  names = [
    f"{prefix}-{content}{mark}idx{rank}-ubyte{suffix}"
    for mark in "-."
    for suffix in ("", ".gz")
  ]
  for name in names:
    if (data_dir / name).is_file():
      return data_dir / name
  raise FileNotFoundError(
    f"no file {names[0]} (or {', '.join(names[1:])}) in {data_dir.absolute()}."
    f" {publisher}; put its four files there, or give their folder as data_dir"
  )


def _bytes(path: Path) -> bytes:
  content = path.read_bytes()
  # By content, not by name: browsers unpack a download and keep its name.
  if content[:2] != b"\x1f\x8b":
    return content
  try:
    return gzip.decompress(content)
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(
      f"{path} is a damaged gzip file ({error}); fetch it again"
    ) from error
