"""Directions: what gradients of training examples are multiplied with.

They are responses to the gradients of queries, kept whole or as matrices of low
rank.

Notation: Q queries; else as in `tda.factors`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from tda import gradients, meshes, segments
from tda.attribution.responses import apply
from tda.blocks import Trace
from tda.inverse.iterative import Info
from tda.likelihoods import Objective
from tda.segments import Directions
from tda.streams import Batch

Array = jax.Array
PyTree: TypeAlias = Any
AT_A_TIME = 8  # queries, while they are made low in rank


def asker(
  found: Trace,
  objective: Objective,
  measurement: Callable[[PyTree, PyTree], Array] | None,
  rank: int | None,
) -> Callable[..., tuple[dict[str, Directions], dict[str, Info]]]:
  """Responses to queries, as operands of a pass over the training data.

  Returns:
    ask(params, queries, index, responses, loop) -> (directions [*stack,
    responses * queries, G, O, I] by block, how solvers ended by response), of
    the queries at these places.
  """
  if rank is not None and rank < 1:
    raise ValueError(f"rank={rank} must be 1 or more, or None to keep all")
  gradients_of = jax.jit(_query_gradients(found, objective, measurement))
  stack = jax.jit(functools.partial(_stack, found))

  def some(params, queries, index, responses, loop):
    rows = jax.tree.map(lambda x: np.asarray(x)[index], queries)
    batch = Batch(rows, index.astype(np.int32), None)
    batch = meshes.replicate(batch, loop.mesh)
    grads, finite = gradients_of(params, batch)
    finite = meshes.fetch(finite)
    if not finite.all():
      bad = index[int(np.argmin(finite))]
      raise ValueError(
        f"the measurement of query {bad}, or its gradient, is not finite"
      )
    answers = {k: apply(r, grads) for k, r in responses.items()}
    infos = {k: info for k, (_, info) in answers.items() if info is not None}
    many = [blocks for blocks, _ in answers.values()]
    if rank is not None:
      many = [segments.compress(blocks, rank) for blocks in many]
    return many, infos

  def ask(params, queries, index, responses, loop):
    size = len(index) if rank is None else AT_A_TIME
    cuts = range(0, len(index), size)
    answers = [
      some(params, queries, index[i : i + size], responses, loop) for i in cuts
    ]
    # Of each response all queries, one response after another.
    order = zip(*(many for many, _ in answers), strict=True)
    return stack([x for many in order for x in many]), joined(
      [infos for _, infos in answers]
    )

  return ask


def _query_gradients(found, objective, measurement) -> Callable:
  """(params, batch) -> ∇m by block [Q, *stack, G, O, I], finite [Q]."""
  if measurement is None:
    run = gradients.per_example(found, objective)
  else:
    run = gradients.of_measurement(found, measurement)

  def checked(params, batch):
    grads, finite = run(params, batch)
    for x in grads.values():
      finite &= jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1)
    return grads, finite

  return checked


def _stack(
  found: Trace, many: Sequence[Mapping[str, Directions]]
) -> dict[str, Directions]:
  """One after another, and the axes of the stack in front of them."""

  def whole(name, *xs):
    depth = len(found.blocks[name].stack)
    return jnp.moveaxis(jnp.concatenate(xs), 0, depth)

  return {
    name: jax.tree.map(functools.partial(whole, name), *(m[name] for m in many))
    for name in many[0]
  }


def joined(infos: Sequence[Mapping[str, Info]]) -> dict[str, Info]:
  """How the solves of all batches of queries ended, by response."""
  return {
    name: jax.tree.map(
      lambda *parts: np.concatenate(parts), *(info[name] for info in infos)
    )
    for name in infos[0]
  }
