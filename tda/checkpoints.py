"""Pytrees of arrays on disk, through Orbax; the only module that knows it.

A directory holds numbered checkpoints of which the newest counts. Orbax
renames one into place when it is complete and only then are older ones
deleted, so that a kill at any moment leaves a whole one. Arrays are read back
with the shardings of the arrays given as an example, so a checkpoint moves
between device counts.
"""

import pathlib
import shutil
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

PyTree: TypeAlias = Any


def exists(directory: str) -> bool:
  """Whether a whole checkpoint is there."""
  return bool(_numbers(directory))


def save(directory: str, tree: PyTree) -> None:
  """Writes a pytree of arrays as the newest checkpoint."""
  old = _numbers(directory)
  path = _path(directory, max(old, default=-1) + 1)
  path.parent.mkdir(parents=True, exist_ok=True)
  ocp.save(path, jax.tree.map(jnp.asarray, tree))
  for number in old:
    shutil.rmtree(_path(directory, number), ignore_errors=True)


def load(directory: str, like: PyTree) -> PyTree:
  """Reads a pytree of the structure, shapes, dtypes and shardings of `like`.

  Raises:
    ValueError: nothing there, or a checkpoint of something else.
  """
  if not exists(directory):
    raise ValueError(f"there is no checkpoint in {directory}")
  path = _path(directory, max(_numbers(directory)))

  def abstract(x):
    x = jnp.asarray(x)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

  try:
    found = ocp.load(path, jax.tree.map(abstract, like))
  except (KeyError, ValueError) as error:
    raise ValueError(
      f"the checkpoint {path} is not of this structure: {error}. Give this run "
      "another directory, or delete that one"
    ) from error
  return found


def _numbers(directory: str) -> list[int]:
  folder = pathlib.Path(directory)
  if not folder.is_dir():
    return []
  return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]


def _path(directory: str, number: int) -> pathlib.Path:
  return pathlib.Path(directory).absolute() / str(number)
