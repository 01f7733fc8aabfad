"""Influence: inner products of training gradients with responses of queries.

    score(z, q) = (1/N) ⟨R ∇m(q), ∇ℓ(z)⟩

For R = (C + δ)⁻¹ this is the first-order change of the measurement m when z is
left out of the N training examples whose mean loss was minimised: the
parameters move by +(1/N) R ∇ℓ(z) (Grosse et al. 2023, §2, with the sign of
removal). Any number of responses is scored in one pass over the training set.

Notation: N training examples, Q queries, B batch.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from tda import factors, gradients, meshes, streams, taps
from tda.blocks import Blocks, Trace
from tda.inverse.spectral import Response
from tda.likelihoods import Objective
from tda.scores import CHANGE, Scores
from tda.streams import Batch, Loop

Array = jax.Array
PyTree: TypeAlias = Any
Operator: TypeAlias = Callable[[Blocks], Blocks]
"""A response: blocks [Q, *stack, G, O, I] -> the same."""


class Identity(NamedTuple):
  """The response of gradient dot products."""

  def __call__(self, blocks: Blocks) -> Blocks:
    """The same blocks."""
    return blocks


def scorer(
  found: Trace,
  objective: Objective,
  *,
  measurement: Callable[[PyTree, PyTree], Array] | None = None,
  query_batch: int = 64,
  by_site: bool = False,
) -> Callable[..., dict[str, Scores]]:
  """Scores of every training example for every query.

  Args:
    found: trace of `objective.outputs`; its blocks are those of the responses.
    objective: model and likelihood; ℓ is its loss.
    measurement: m(params, query) -> scalar; the loss unless given, in which
      case a query need not look like a training example.
    query_batch: queries held at a time. The training set is passed over once
      for each such batch, at the memory of `query_batch` copies of the
      parameters for each response.
    by_site: also return the scores of each block.

  Returns:
    score(params, train, queries, responses, *, loop=Loop()) -> {name: Scores},
    values [N, Q]. Train and queries are pytrees of arrays with leading axes N
    and Q; responses are linear operators on block coordinates, by name. A
    second call compiles nothing again.
  """
  dot = gradients.backward_pass(found, objective, DOT)
  query_gradients = jax.jit(_query_gradients(found, objective, measurement))

  def run(operands, batch):
    values, finite = dot(operands[0], batch, operands[1])
    return (values if by_site else {"": _sum_sites(values)}), finite

  @jax.jit
  def stacked(responses, grads):
    return _stack(found, [operator(grads) for operator in responses])

  def directions(params, queries, index, responses, loop):
    """Responses of the queries [*stack, responses * Q, G, O, I], by block."""
    rows = jax.tree.map(lambda x: np.asarray(x)[index], queries)
    batch = Batch(rows, index.astype(np.int32), None)
    batch = meshes.replicate(batch, loop.mesh)
    grads, finite = query_gradients(params, batch)
    finite = meshes.fetch(finite)
    if not finite.all():
      bad = index[int(np.argmin(finite))]
      raise ValueError(f"the measurement of query {bad} is not finite")
    operators = list(responses.values())
    if any(callable(leaf) for leaf in jax.tree.leaves(operators)):
      return _stack(found, [operator(grads) for operator in operators])
    return stacked(operators, grads)

  def score(params, train, queries, responses, *, loop=Loop()):
    n, total = streams.rows(train), streams.rows(queries)
    _check_blocks(found, responses)
    _check_rows(found, "train", train)
    if measurement is None:
      _check_rows(found, "queries", queries)
    pieces = []
    splits = np.array_split(np.arange(total), math.ceil(total / query_batch))
    for i, index in enumerate(splits):
      operands = (params, directions(params, queries, index, responses, loop))
      stage = _stage(loop, i, len(splits))
      values = streams.each(run, operands, train, stage)
      # [N, *stack, responses, queries]: the leading axes of blocks come first.
      shape = (len(responses), len(index))
      pieces.append(
        {k: x.reshape(*x.shape[:-1], *shape) / n for k, x in values.items()}
      )
    sites = {
      name: np.concatenate([piece[name] for piece in pieces], axis=-1)
      for name in pieces[0]
    }
    summed = _sum_sites(sites, keep=2)
    return {
      name: Scores(
        summed[:, i],
        method=name,
        unit=CHANGE,
        normaliser=n,
        damping=getattr(operator, "damping", None),
        labels=getattr(operator, "labels", None),
        coverage=coverage(found),
        by_site=_site_scores(sites, i) if by_site else None,
      )
      for i, (name, operator) in enumerate(responses.items())
    }

  return score


def self_influence(
  found: Trace,
  objective: Objective,
  params: PyTree,
  train: PyTree,
  response: Response,
  *,
  loop: Loop = Loop(),
) -> Scores:
  """(1/N) ∇ℓᵀ R ∇ℓ of every training example, [N].

  How much an example's own loss rises when it is left out; large for examples
  that are mislabelled or that nothing else teaches.
  """
  n = streams.rows(train)
  _check_blocks(found, {"response": response})
  score = gradients.backward_pass(found, objective, SELF)

  def run(operands, batch):
    params, response = operands
    pairs = {
      name: (response.basis[name], response.weights[name])
      for name in found.blocks
    }
    values, finite = score(params, batch, pairs)
    total = sum(x.reshape(x.shape[0], -1).sum(axis=1) for x in values.values())
    return total, finite

  values = streams.each(run, (params, response), train, loop)
  return Scores(
    values / n,
    method="self-influence",
    unit=CHANGE,
    normaliser=n,
    damping=response.damping,
    labels=response.labels,
    coverage=coverage(found),
  )


def coverage(found: Trace) -> float:
  """Share of the parameters in tracked blocks."""
  tracked = sum(block.size for block in found.blocks.values())
  return tracked / sum(math.prod(leaf.shape) for leaf in found.leaves)


DOT = taps.Statistic(
  lambda block, parts, lanes, directions: factors.dot(parts, directions),
  per_example=True,
  linear=lambda block: True,
)
"""Inner products with directions [*stack, Q, G, O, I]."""

SELF = taps.Statistic(
  lambda block, parts, lanes, pair: factors.weighted_norm(
    factors.rotate(parts, *pair[0]), pair[1]
  ),
  per_example=True,
  linear=lambda block: False,
)
"""Quadratic form of each example's gradient in (basis, weights)."""


def _query_gradients(found, objective, measurement) -> Callable:
  """(params, batch) -> ∇m by block [Q, *stack, G, O, I], finite [Q]."""
  if measurement is None:
    return gradients.per_example(found, objective)
  return gradients.of_measurement(found, measurement)


def _stack(found: Trace, many: Sequence[Blocks]) -> Blocks:
  """Blocks of several responses [*stack, responses * Q, G, O, I]."""
  joined = {k: jnp.concatenate([m[k] for m in many]) for k in many[0]}
  return {
    name: jnp.moveaxis(x, 0, len(found.blocks[name].stack))
    for name, x in joined.items()
  }


def _sum_sites(sites: Mapping[str, Any], keep: int = 1) -> Any:
  """Sum over blocks and stacks, of arrays [N, *stack, *kept axes]."""
  return sum(
    x.reshape(x.shape[0], -1, *x.shape[x.ndim - keep :]).sum(axis=1)
    for x in sites.values()
  )


def _site_scores(sites, i: int) -> dict[str, np.ndarray]:
  return {name: x[..., i, :] for name, x in sites.items()}


def _stage(loop: Loop, i: int, count: int) -> Loop:
  """The loop over the training set for one batch of queries."""
  if count == 1:
    return loop
  label = loop.label and f"{loop.label} {i + 1}/{count}"
  directory = loop.directory and os.path.join(loop.directory, f"queries_{i}")
  return loop._replace(label=label, directory=directory)


def _check_blocks(found: Trace, responses: Mapping[str, Operator]) -> None:
  if not responses:
    raise ValueError("no responses were given, so there is nothing to score")
  for name, response in responses.items():
    if isinstance(response, Response):
      other = set(response.weights) ^ set(found.blocks)
      if other:
        raise ValueError(
          f"the response {name!r} was fitted on other blocks than those of "
          f"this trace; they differ in {sorted(other)}"
        )


def _check_rows(found: Trace, name: str, data: PyTree) -> None:
  try:
    taps.check_rows(found, data)
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error
