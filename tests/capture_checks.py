"""Checks that captured statistics are those of the definition."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tda import blocks, factors, moments, taps

BATCH = 4
ROWS = 6  # of every table


class Case(NamedTuple):
  """A loss, and the blocks that capture must find in it.

  Attributes:
    loss: (params, example) -> scalar.
    params: shapes.
    example: shapes; those under "ids" hold integers below ROWS.
    blocks: name -> (kind, [*stack, G, O, I]).
    reasons: name -> words of the reason why a block is generic.
  """

  loss: Callable[[Any, Any], jax.Array]
  params: Any
  example: dict[str, tuple[int, ...]]
  blocks: dict[str, tuple[str, tuple[int, ...]]]
  reasons: dict[str, str] = {}  # noqa: RUF012


def tail(y):
  weights = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
  return jnp.sum(jnp.sin(y) * weights)


def materialize(case: Case, dtype: Any = float, seed: int = 0):
  """Parameters and a batch of a case."""
  rng = np.random.default_rng(seed)
  is_shape = lambda x: (
    isinstance(x, tuple) and all(isinstance(d, int) for d in x)
  )
  params = jax.tree.map(
    lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
    case.params,
    is_leaf=is_shape,
  )
  batch = {
    name: jnp.asarray(rng.integers(0, ROWS, (BATCH, *shape)))
    if name.startswith("ids")
    else jnp.asarray(rng.normal(size=(BATCH, *shape)), dtype)
    for name, shape in case.example.items()
  }
  return params, batch


def first(batch):
  return jax.tree.map(lambda x: x[0], batch)


def collect(found, params, batch, *statistics, lanes=None, operands=None):
  """The statistics of a batch, with cotangents of one."""

  @jax.jit
  def run(params, batch, lanes, operands):
    results = []
    for statistic in statistics:
      outputs, backward = taps.linearize(found, statistic)(
        params, batch, operands, lanes
      )
      results.append(backward(jnp.ones_like(outputs)))
    return results

  return run(params, batch, lanes, operands)


def check_gradients(found, loss, params, batch, *, rtol=1e-11, atol=1e-12):
  """Outputs and gradients of every example are those of `vmap(grad)`."""

  @jax.jit
  def both(params, batch):
    outputs, backward = taps.linearize(found, taps.GRADIENT)(params, batch)
    grads = jax.vmap(lambda g: blocks.to_tree(found, g))(
      backward(jnp.ones_like(outputs))
    )
    expected = jax.vmap(jax.value_and_grad(loss), (None, 0))(params, batch)
    return (outputs, grads), expected

  got, expected = both(params, batch)
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(
      np.asarray(x, float), np.asarray(y, float), rtol=rtol, atol=atol
    )


def check_case(case: Case) -> None:
  """Capture finds the blocks of a case, and their gradients in float64."""
  with jax.enable_x64(True):
    params, batch = materialize(case)
    found = blocks.trace(case.loss, params, first(batch))
    every = found.blocks.values()
    sizes = {b.name: (b.kind, (*b.stack, *b.shape)) for b in every}
    assert sizes == case.blocks
    reasons = {b.name: b.reason for b in every if b.reason}
    assert reasons.keys() == case.reasons.keys()
    assert all(words in reasons[name] for name, words in case.reasons.items())
    check_gradients(found, case.loss, params, batch)


MOMENTS = taps.Statistic(
  lambda block, parts, lanes, operand: moments.moments(
    parts, lanes, diagonal=block.kind == "diagonal"
  ),
  per_example=False,
  linear=lambda block: block.kind in ("matrix", "lookup"),
)
NORMS = taps.Statistic(
  lambda block, parts, lanes, operand: factors.norm(parts),
  per_example=True,
  linear=lambda block: False,
)
