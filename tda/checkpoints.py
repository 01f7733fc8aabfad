"""Pytrees of arrays on disk, through Orbax; the only module that knows it.

A directory holds numbered checkpoints of which the newest counts. Orbax
renames one into place when it is complete and only then are older ones
deleted, so that a kill at any moment leaves a whole one. Arrays are read back
with the shardings of the arrays given as an example, so a checkpoint moves
between device counts.
"""

import contextlib
import json
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from tda import meshes, parts

PyTree: TypeAlias = Any


class Pace:
  """When to save what a run has so far: every so many seconds.

  Less often where saving takes long, so that it is a tenth of a run at most;
  but always with 0 seconds. Several processes go by the first one's clock, for
  which they have to wait: only every eighth time.
  """

  def __init__(self, seconds: float):
    self._wait = self._seconds = seconds
    self._last, self._asked = time.monotonic(), 0

  def due(self) -> bool:
    """Whether to save now; every process asks at the same place of the run."""
    self._asked += 1
    if not self._seconds:
      return True
    if jax.process_count() > 1 and self._asked % 8:
      return False
    return meshes.agreed(time.monotonic() - self._last > self._wait)

  @contextlib.contextmanager
  def saving(self) -> Iterator[None]:
    """Around a save."""
    began = time.monotonic()
    yield
    self._last = time.monotonic()
    self._wait = max(self._seconds, 9 * (self._last - began))


def exists(directory: str) -> bool:
  """Whether a whole checkpoint is there."""
  return bool(_numbers(directory))


def save(directory: str, tree: PyTree) -> None:
  """Writes a pytree of arrays as the newest checkpoint."""
  old = _numbers(directory)
  path = _path(directory, max(old, default=-1) + 1)
  path.parent.mkdir(parents=True, exist_ok=True)
  tree = jax.tree.map(jnp.asarray, tree)
  with parts.replacing(_contents(path)) as file:
    file.write(json.dumps(_described(tree)).encode())
  ocp.save(path, tree)
  for number in old:
    shutil.rmtree(_path(directory, number), ignore_errors=True)
    _contents(_path(directory, number)).unlink(missing_ok=True)


def load(directory: str, like: PyTree) -> PyTree:
  """Reads a pytree of the structure, shapes, dtypes and shardings of `like`.

  Arrays that are not committed to a device in `like` are not in the result.

  Raises:
    ValueError: nothing there, or a checkpoint of something else.
  """
  if not exists(directory):
    raise ValueError(f"there is no checkpoint in {directory}")
  path = _path(directory, max(_numbers(directory)))
  like = jax.tree.map(jnp.asarray, like)
  found, expected = json.loads(_contents(path).read_text()), _described(like)
  other = [
    f"{name}: {found.get(name)} there, {expected.get(name)} here"
    for name in sorted({*found, *expected})
    if found.get(name) != expected.get(name)
  ]
  if other:
    raise ValueError(
      f"the checkpoint {path} is of something else ({', '.join(other)}). Give "
      "this run another directory, or delete that one"
    )

  def abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

  def settle(x, like):
    return x if like.committed else jnp.asarray(np.asarray(x))

  read = ocp.load(path, jax.tree.map(abstract, like))
  return jax.tree.map(settle, read, like)


def _described(tree: PyTree) -> dict[str, str]:
  """Type and shape of every array, by its path."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}"
    for path, x in leaves
  }


def _contents(path: pathlib.Path) -> pathlib.Path:
  return path.with_suffix(".json")


def _numbers(directory: str) -> list[int]:
  folder = pathlib.Path(directory)
  if not folder.is_dir():
    return []
  return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]


def _path(directory: str, number: int) -> pathlib.Path:
  return pathlib.Path(directory).absolute() / str(number)
