"""What a directory is of, so that no run takes up another's."""

import hashlib
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

PyTree = Any


def belongs(directory: pathlib.Path, record: dict[str, Any]) -> None:
  """Writes what a directory is of.

  Raises:
    ValueError: it is of something else, naming the entries that differ.
  """
  directory.mkdir(parents=True, exist_ok=True)
  path = directory / "run.json"
  there = json.loads(path.read_text()) if path.exists() else record
  other = [name for name in record if there.get(name) != record[name]]
  if other:
    raise ValueError(
      f"{directory} holds another run: its {', '.join(other)} differ. Give this"
      " one another directory, or delete that one"
    )
  path.write_text(json.dumps(record))


def digest(tree: PyTree) -> str:
  """Of a pytree of arrays: names, types, shapes and values."""
  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    x = np.ascontiguousarray(leaf)
    found.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}".encode())
    found.update(x.tobytes())
  return found.hexdigest()


def program(function: Callable, *args: Any) -> str:
  """Digest of what a function computes, with the numbers in it.

  Of its jaxpr, which another version of JAX may write differently.
  """
  text = str(jax.make_jaxpr(function)(*args))
  text = re.sub(r"0x[0-9a-f]+", "", text)  # addresses of functions
  return hashlib.sha256(text.encode()).hexdigest()
