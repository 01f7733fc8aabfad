"""Influence: inner products of training gradients with responses of queries.

    score(z, q) = (1/N) ⟨R ∇m(q), ∇ℓ(z)⟩

For R = (C + δ)⁻¹ this is the first-order change of the measurement m when z is
left out of the N training examples whose mean loss was minimised: the
parameters move by +(1/N) R ∇ℓ(z) (Grosse et al. 2023, §2, with the sign of
removal). Any number of responses is scored in one pass over the training set.

Notation: N training examples, Q queries, B batch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from tda import factors, gradients, meshes, streams, taps
from tda.attribution.responses import Cosine, Identity, Operator, apply
from tda.blocks import Blocks, Trace
from tda.inverse.iterative import Info
from tda.inverse.spectral import Response
from tda.likelihoods import Objective
from tda.scores import CHANGE, SIMILARITY, Scores
from tda.streams import Batch, Loop

Array = jax.Array
PyTree: TypeAlias = Any


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
    score(params, train, queries, responses, *, query_params=None, loop=Loop())
    -> {name: Scores}, values [N, Q]. Train and queries are pytrees of arrays
    with leading axes N and Q; responses are linear operators on block
    coordinates, or `Cosine` of one, by name. The queries' gradients are taken
    at `query_params` if these are given. A second call compiles nothing again.
  """
  if query_batch < 1:
    raise ValueError(f"query_batch must be positive, got {query_batch}")
  query_gradients = jax.jit(_query_gradients(found, objective, measurement))

  def products(statistic):
    dot = gradients.backward_pass(found, objective, statistic)

    def run(operands, batch):
      values, finite = dot(operands[0], batch, operands[1])
      total = _sum_sites(values)
      finite &= jnp.isfinite(total).all(axis=1)
      return (values if by_site else {"": total}), finite

    return run

  runs = {False: products(DOT), True: products(DOT_AND_SQUARE)}
  stack = jax.jit(lambda many: _stack(found, many))

  def directions(params, queries, index, responses, loop):
    """Responses of the queries [*stack, responses * Q, G, O, I] by block, and
    how solvers ended by response."""
    rows = jax.tree.map(lambda x: np.asarray(x)[index], queries)
    batch = Batch(rows, index.astype(np.int32), None)
    batch = meshes.replicate(batch, loop.mesh)
    grads, finite = query_gradients(params, batch)
    finite = meshes.fetch(finite)
    if not finite.all():
      bad = index[int(np.argmin(finite))]
      raise ValueError(
        f"the measurement of query {bad}, or its gradient, is not finite"
      )
    answers = {k: apply(r, grads) for k, r in responses.items()}
    infos = {k: info for k, (_, info) in answers.items() if info is not None}
    return stack([blocks for blocks, _ in answers.values()]), infos

  def score(
    params, train, queries, responses, *, query_params=None, loop=Loop()
  ):
    total = streams.rows(queries)
    _check_blocks(found, responses)
    _check_rows(found, "train", train)
    if measurement is None:
      _check_rows(found, "queries", queries)
    params, responses = meshes.replicate((params, responses), loop.mesh)
    asked = params
    if query_params is not None:
      asked = meshes.replicate(query_params, loop.mesh)
    cosine = any(isinstance(r, Cosine) for r in responses.values())
    run, norms, pieces, infos = runs[cosine], None, [], []
    splits = np.array_split(np.arange(total), math.ceil(total / query_batch))
    for i, index in enumerate(splits):
      answers, info = directions(asked, queries, index, responses, loop)
      operands = (params, answers)
      infos.append(info)
      stage = loop
      if len(splits) > 1:
        stage = loop.stage(f"queries {i + 1} of {len(splits)}")
      values = streams.each(run, operands, train, stage)
      if cosine:
        values, norms = _without_squares(values)
      # [N, *stack, responses, queries]: the leading axes of blocks come first.
      shape = (len(responses), len(index))
      pieces.append(
        {k: x.reshape(*x.shape[:-1], *shape) for k, x in values.items()}
      )
    return _results(found, responses, pieces, norms, infos, by_site)

  return score


def self_influence(
  found: Trace,
  objective: Objective,
  params: PyTree,
  train: PyTree,
  response: Response | Identity,
  *,
  loop: Loop = Loop(),
) -> Scores:
  """(1/N) ∇ℓᵀ R ∇ℓ of every training example, [N].

  How much an example's own loss rises when it is left out; large for examples
  that are mislabelled or that nothing else teaches.
  """
  if not isinstance(response, Response | Identity):
    raise ValueError(
      f"self-influence needs a spectral response or Identity(), not {response}"
    )
  n = streams.rows(train)
  _check_blocks(found, {"response": response})
  run = gradients.summed_over_blocks(found, objective, SELF)
  values = run(params, train, pairs(found, response), loop=loop)
  return Scores(
    values / n,
    method="self-influence",
    unit=CHANGE,
    normaliser=n,
    damping=getattr(response, "damping", None),
    labels=getattr(response, "labels", None),
    coverage=coverage(found),
  )


def pairs(found: Trace, response: Response | Identity) -> PyTree:
  """The operands of `SELF` for a response, by block."""
  if isinstance(response, Identity):
    return {}
  return {k: (response.basis[k], response.weights[k]) for k in found.blocks}


def coverage(found: Trace) -> float:
  """Share of the parameters in tracked blocks."""
  tracked = sum(block.size for block in found.blocks.values())
  return tracked / sum(math.prod(leaf.shape) for leaf in found.leaves)


DOT = taps.Statistic(
  lambda block, parts, lanes, directions: factors.dot(parts, directions),
  per_example=True,
  linear=lambda block: True,
  footprint=factors.entries,
)
"""Inner products with directions [*stack, Q, G, O, I]."""


def _dot_and_square(block, parts, lanes, directions):
  del block, lanes
  squares = factors.norm(parts)[:, None]
  return jnp.concatenate([factors.dot(parts, directions), squares], axis=1)


DOT_AND_SQUARE = taps.Statistic(
  _dot_and_square,
  per_example=True,
  linear=lambda block: False,
  footprint=factors.entries,
)
"""The same, then the squared norm of each example's gradient."""


def _quadratic(block, parts, lanes, pair):
  del block, lanes
  if pair is None:
    return factors.norm(parts)
  basis, weights = pair
  return factors.weighted_norm(factors.rotate(parts, *basis), weights)


SELF = taps.Statistic(
  _quadratic,
  per_example=True,
  linear=lambda block: False,
  footprint=lambda parts, pair: factors.entries(parts),
)
"""Quadratic form of each example's gradient in (basis, weights) or in I."""


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


def _stack(found: Trace, many: Sequence[Blocks]) -> Blocks:
  """Blocks of several responses [*stack, responses * Q, G, O, I]."""
  joined = {k: jnp.concatenate([m[k] for m in many]) for k in many[0]}
  return {
    name: jnp.moveaxis(x, 0, len(found.blocks[name].stack))
    for name, x in joined.items()
  }


def _joined(infos: Sequence[Mapping[str, Info]], name: str) -> Info | None:
  """How the solves of all batches of queries ended."""
  known = [info[name] for info in infos if name in info]
  if not known:
    return None
  return jax.tree.map(lambda *parts: np.concatenate(parts), *known)


def _sum_sites(sites: Mapping[str, Any], keep: int = 1) -> Any:
  """Sum over blocks and stacks, of arrays [N, *stack, *kept axes]."""
  return sum(
    x.reshape(x.shape[0], -1, *x.shape[x.ndim - keep :]).sum(axis=1)
    for x in sites.values()
  )


def _results(
  found: Trace,
  responses: Mapping[str, Operator],
  pieces: Sequence[Mapping[str, np.ndarray]],
  norms: np.ndarray | None,
  infos: Sequence[Mapping[str, Info]],
  by_site: bool,
) -> dict[str, Scores]:
  """Scores of every response from the products of each batch of queries."""
  sites = {
    name: np.concatenate([piece[name] for piece in pieces], axis=-1)
    for name in pieces[0]
  }
  results = {}
  for i, (name, response) in enumerate(responses.items()):
    mine = {k: x[..., i, :] for k, x in sites.items()}
    scores = _scores(found, name, response, mine, norms)
    scores = scores._replace(info=_joined(infos, name))
    results[name] = scores if by_site else scores._replace(by_site=None)
  return results


def _scores(
  found: Trace,
  name: str,
  response: Operator,
  products: Mapping[str, np.ndarray],
  norms: np.ndarray | None,
) -> Scores:
  """From inner products by block [N, *stack, Q] and gradient norms [N]."""
  cosine = isinstance(response, Cosine)
  n = len(next(iter(products.values())))
  divisor = norms if cosine and norms is not None else np.full(n, float(n))
  sites = {k: _divided(x, divisor) for k, x in products.items()}
  inner = response.operator if isinstance(response, Cosine) else response
  return Scores(
    _sum_sites(sites),
    method=name,
    unit=SIMILARITY if cosine else CHANGE,
    normaliser=1 if cosine else n,
    damping=getattr(inner, "damping", None),
    labels=getattr(inner, "labels", None),
    coverage=coverage(found),
    by_site=sites,
  )


def _without_squares(
  values: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Splits `DOT_AND_SQUARE`: products by block, norms of the gradients [N]."""
  squares = _sum_sites({k: x[..., -1:] for k, x in values.items()})[:, 0]
  return {k: x[..., :-1] for k, x in values.items()}, np.sqrt(squares)


def _divided(x: np.ndarray, divisor: np.ndarray) -> np.ndarray:
  """x [N, ...] / divisor [N]; zero where the divisor is."""
  divisor = divisor.reshape(-1, *[1] * (x.ndim - 1))
  return np.divide(x, divisor, out=np.zeros_like(x), where=divisor > 0)


def _check_blocks(found: Trace, responses: Mapping[str, Operator]) -> None:
  if not responses:
    raise ValueError("no responses were given, so there is nothing to score")
  shapes = {k: (*b.stack, *b.shape) for k, b in found.blocks.items()}
  for name, response in responses.items():
    inner = response.operator if isinstance(response, Cosine) else response
    if isinstance(inner, Response):
      fitted = {k: x.shape for k, x in inner.weights.items()}
      other = {k for k, _ in fitted.items() ^ shapes.items()}
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
