"""Data sets by name."""

from collections.abc import Callable
from pathlib import Path

from tda.data import bundled, idx, sentences, tables
from tda.data.datasets import Dataset

_BUNDLED: dict[str, Callable[..., Dataset]] = {
  "digits": bundled.digits,
  "diabetes": bundled.diabetes,
  "mnist5k": bundled.mnist5k,
  "planted": sentences.planted,
}
_TABLES: dict[str, Callable[..., Dataset]] = {
  "parkinsons": tables.parkinsons,
  "concrete": tables.concrete,
}
_IDX = ("mnist", "fashion_mnist")

NAMES = (*_BUNDLED, *_TABLES, *_IDX)


def load(
  name: str,
  *,
  data_dir: str | Path | None = None,
  seed: int = 0,
  train_size: int | None = None,
  test_size: int | None = None,
) -> Dataset:
  """The data set called `name`, split and shuffled by `seed`.

  Args:
    name: one of `NAMES`.
    data_dir: folder of the published files (for a table, also the file
      itself); only for the sets that no package brings.
    seed: of the split, and of the choice of a subset.
    train_size: training examples, 0 for all; None is the set's own default
      (6,144 for `mnist` and `fashion_mnist`, all for the others).
    test_size: test examples, 0 or None for all.
  """
  if name not in NAMES:
    raise ValueError(f"unknown dataset {name!r}; choose from {NAMES}")
  options = {"train_size": train_size, "test_size": test_size}
  sizes = {key: size for key, size in options.items() if size is not None}
  if name in _BUNDLED:
    return _BUNDLED[name](seed=seed, **sizes)
  if not data_dir:
    raise ValueError(
      f"{name} comes in no package: give the folder of its files as data_dir"
      f" ({', '.join(_BUNDLED)} need none)"
    )
  if name in _TABLES:
    return _TABLES[name](data_dir, seed=seed, **sizes)
  return idx.idx(data_dir, seed=seed, name=name, **sizes)
