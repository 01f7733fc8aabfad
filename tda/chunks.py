"""Batches taken apart inside a traced function, where memory asks for it."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

PyTree: TypeAlias = Any


def count(size: int, need: float) -> int:
  """How many chunks cut a batch of `size` by a factor `need` or more.

  A divisor of the size if there is one below twice the factor.
  """
  least = min(max(math.ceil(need), 1), size)
  exact = (n for n in range(least, 2 * least) if size % n == 0)
  return next(exact, least)


def apply(
  fn: Callable[[PyTree], PyTree],
  rows: PyTree,
  chunks: int,
  *,
  per_example: bool,
) -> PyTree:
  """`fn(rows)`, a chunk of the examples at a time, one after another.

  Args:
    fn: rows [C, ...] -> pytree, of leaves [C, ...] if `per_example`, else sums
      over the examples.
    rows: pytree of arrays with leading axis B.
    chunks: how many. A chunk takes every `chunks`-th example, so that a batch
      that is spread over devices stays so.
    per_example: see `fn`.
  """
  size = jax.tree.leaves(rows)[0].shape[0]
  if chunks <= 1:
    return fn(rows)
  whole = size // chunks * chunks
  strided = jax.tree.map(
    lambda x: x[:whole].reshape(size // chunks, chunks, *x.shape[1:]), rows
  )
  take = lambda i: jax.tree.map(
    lambda x: lax.dynamic_index_in_dim(x, i, 1, keepdims=False), strided
  )
  rest = jax.tree.map(lambda x: x[whole:], rows) if whole < size else None
  index = jnp.arange(chunks)
  if not per_example:
    shapes = jax.eval_shape(lambda: fn(take(0)))
    total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    if rest is not None:
      total = fn(rest)
    add = lambda total, i: (jax.tree.map(jnp.add, total, fn(take(i))), None)
    return lax.scan(add, total, index)[0]
  _, values = lax.scan(lambda _, i: (None, fn(take(i))), None, index)
  values = join(values)
  if rest is None:
    return values
  append = lambda x, y: jnp.concatenate([x, y])
  return jax.tree.map(append, values, fn(rest))


def split(rows: PyTree, steps: int) -> PyTree:
  """Rows [B, ...] as [steps, B / steps, ...]; every `steps`-th to a part.

  So a leading axis that is spread over devices stays so within every part.
  """
  return jax.tree.map(
    lambda x: x.reshape(len(x) // steps, steps, *x.shape[1:]).swapaxes(0, 1),
    rows,
  )


def join(parts: PyTree) -> PyTree:
  """The rows that `split` took apart."""
  return jax.tree.map(
    lambda x: x.swapaxes(0, 1).reshape(math.prod(x.shape[:2]), *x.shape[2:]),
    parts,
  )
