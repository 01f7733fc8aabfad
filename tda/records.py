"""Digests of what a run is made of, so that none takes up another's results."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

PyTree = Any


def digest(tree: PyTree) -> str:
  """Of a pytree of arrays: names, types, shapes and values."""
  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    x = np.ascontiguousarray(leaf)
    found.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}".encode())
    found.update(x.tobytes())
  return found.hexdigest()


def program(function: Callable, *args: Any) -> str:
  """Digest of what a function computes, with the numbers and arrays in it.

  Of its jaxpr, which another version of JAX may write differently.
  """
  closed = jax.make_jaxpr(function)(*args)
  text = re.sub(r"0x[0-9a-f]+", "", str(closed))  # addresses of functions
  arrays = digest([np.asarray(x) for x in closed.consts])
  return hashlib.sha256((text + arrays).encode()).hexdigest()
