"""Results kept as they are computed: one file per finished part.

A directory belongs to one computation, whose fingerprint it holds. Each part
is a file that appears under its name only when it is complete, so a kill loses
at most the part in progress.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np


class Parts(NamedTuple):
  """What is kept in a directory, or nothing at all without one."""

  load: Callable[[], Iterable[tuple[np.ndarray, list[np.ndarray]]]]
  """() -> for each part, its positions [P] and arrays [P, ...]."""
  save: Callable[[np.ndarray, Sequence[np.ndarray]], None]
  """(positions [P], arrays [P, ...])."""


def opened(
  directory: str | os.PathLike | None, fingerprint: dict[str, Any]
) -> Parts:
  """The parts in a directory, made if missing.

  Args:
    directory: None keeps nothing.
    fingerprint: what the parts were computed from, as JSON values by name.

  Raises:
    ValueError: the directory holds parts of another computation; says in what
      it differs.
  """
  if directory is None:
    return Parts(lambda: (), lambda positions, arrays: None)
  folder = Path(directory)
  belongs(folder, fingerprint)

  def load():
    for path in sorted(folder.glob("part_*.npz")):
      with np.load(path) as arrays:
        leaves = [arrays[str(i)] for i in range(len(arrays) - 1)]
        yield arrays["positions"], leaves

  def save(positions, arrays):
    leaves = {str(i): array for i, array in enumerate(arrays)}
    with replacing(folder / f"part_{positions[0]:010d}.npz") as file:
      np.savez(file, positions=positions, **leaves)

  return Parts(load, save)


def belongs(folder: Path, fingerprint: dict[str, Any]) -> None:
  """Makes a directory, and writes down what it is of.

  Raises:
    ValueError: it is of something else; says in what that differs.
  """
  folder.mkdir(parents=True, exist_ok=True)
  record = folder / "fingerprint.json"
  fingerprint = json.loads(json.dumps(fingerprint))
  if not record.exists():
    with replacing(record) as file:
      file.write(json.dumps(fingerprint).encode())
  found = json.loads(record.read_text())
  if found != fingerprint:
    names = sorted({*found, *fingerprint})
    other = [n for n in names if found.get(n) != fingerprint.get(n)]
    raise ValueError(
      f"{folder} holds results of other {' and '.join(other)}: give this run "
      "another directory, or delete that one"
    )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
  """A file that appears under its name only when it is complete."""
  handle, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
  try:
    with os.fdopen(handle, "wb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(name, 0o666 & ~mask)  # temporary files are their owner's alone
    os.replace(name, path)
  except BaseException:
    os.unlink(name)
    raise
