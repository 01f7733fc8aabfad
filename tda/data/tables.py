"""Regression tables of the UCI Machine Learning Repository, read as text.

Rows are split by 90 % for training, and both x and y are standardised with
the training rows (spec of Bae et al. 2024, arXiv 2405.12186, its UCI tasks).
"""

import csv
from pathlib import Path

import numpy as np

from tda.data.datasets import Dataset, split, standardize

_SEPARATORS = (",", "\t", ";", " ")


def parkinsons(
  path: str | Path,
  seed: int = 0,
  *,
  train_size: int = 0,
  test_size: int = 0,
) -> Dataset:
  """Telemonitoring: total UPDRS from age, sex, time and 16 voice measures.

  5,875 recordings of 22 columns. The subject's number and the motor UPDRS (a
  part of the target) are left out, so x is [N, 19].
  """
  table = _table(
    path,
    columns=22,
    default="parkinsons_updrs.data",
    publisher="the UCI repository's set Parkinsons Telemonitoring"
    " (A. Tsanas and M. Little)",
  )
  x = np.delete(table, (0, 4, 5), axis=1)
  return _regression(
    "parkinsons",
    x,
    table[:, 5],
    seed=seed,
    train_size=train_size,
    test_size=test_size,
  )


def concrete(
  path: str | Path,
  seed: int = 0,
  *,
  train_size: int = 0,
  test_size: int = 0,
) -> Dataset:
  """Compressive strength of concrete from its age and seven ingredients.

  1,030 mixtures of 9 columns, the last one the target: x is [N, 8].
  """
  table = _table(
    path,
    columns=9,
    default="Concrete_Data.csv",
    publisher="the UCI repository's set Concrete Compressive Strength"
    " (I-C. Yeh), saved as text from its Excel sheet",
  )
  return _regression(
    "concrete",
    table[:, :-1],
    table[:, -1],
    seed=seed,
    train_size=train_size,
    test_size=test_size,
  )


def read(path: str | Path, columns: int) -> np.ndarray:
  """A float64 table [N, columns]; a header is skipped, blank lines too.

  Commas, tabs, semicolons or blanks may separate the columns; what makes the
  last row numbers is taken.
  """
  path = Path(path)
  _reject_sheet(path)
  try:
    text = path.read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not a text file: {error}") from error
  lines = [line.strip() for line in text.splitlines()]
  numbered = [(i, line) for i, line in enumerate(lines, 1) if line]
  if not numbered:
    raise ValueError(f"{path} is empty")
  separator = _separator(path, numbered[-1][1], columns)
  if _numbers(numbered[0][1], separator) is None:
    numbered = numbered[1:]
  rows = []
  for number, line in numbered:
    row = _numbers(line, separator)
    if row is None or len(row) != columns or not np.isfinite(row).all():
      raise ValueError(
        f"{path}, line {number}: expected {columns} finite numbers, found"
        f" {line[:80]!r}"
      )
    rows.append(row)
  return np.asarray(rows, np.float64)


def _regression(
  name: str,
  x: np.ndarray,
  y: np.ndarray,
  **options: int,  # of `split`
) -> Dataset:
  parts = split({"x": x, "y": y[:, None]}, len(y) * 9 // 10, **options)
  return Dataset(name, *standardize(*parts))


def _table(
  path: str | Path, columns: int, default: str, publisher: str
) -> np.ndarray:
  """`path` is the file, or the folder where it has its usual name."""
  path = Path(path)
  if path.is_dir():
    for sheet in path.glob(f"{Path(default).stem}.xls*"):
      if not (path / default).exists():
        _reject_sheet(sheet)
    path = path / default
  if not path.is_file():
    raise FileNotFoundError(
      f"no file {path.absolute()}; it is {publisher}: put it there, or give"
      " its path as data_dir"
    )
  return read(path, columns)


def _reject_sheet(path: Path) -> None:
  with path.open("rb") as file:
    start = file.read(4)
  if start in (b"PK\x03\x04", b"\xd0\xcf\x11\xe0"):
    raise ValueError(
      f"{path} is an Excel sheet: save it as text first, in a spreadsheet"
      " program (Save as, CSV), or with pandas and openpyxl (xlrd for .xls):"
      f" pandas.read_excel({path.name!r}).to_csv("
      f"{path.stem + '.csv'!r}, index=False)"
    )


def _separator(path: Path, line: str, columns: int) -> str:
  for separator in _SEPARATORS:
    row = _numbers(line, separator)
    if row is not None and len(row) == columns:
      return separator
  raise ValueError(
    f"{path}: the last line is not {columns} numbers separated by commas,"
    f" tabs, semicolons or blanks: {line[:80]!r}"
  )


def _numbers(line: str, separator: str) -> list[float] | None:
  """None where a field is no number, as in a header."""
  fields = (
    line.split()
    if separator == " "
    else next(csv.reader([line], delimiter=separator))
  )
  try:
    return [float(field) for field in fields]
  except ValueError:
    return None
