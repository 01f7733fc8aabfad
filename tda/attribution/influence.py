"""Influence: inner products of training gradients with responses of queries.

    score(z, q) = (1/N) ⟨R ∇m(q), ∇ℓ(z)⟩

For R = (C + δ)⁻¹ this is the first-order change of the measurement m when z is
left out of the N training examples whose mean loss was minimised: the
parameters move by +(1/N) R ∇ℓ(z) (Grosse et al. 2023, §2, with the sign of
removal). Any number of responses is scored in one pass over the training set.

Notation: N training examples, Q queries, B batch.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from tda import gradients, meshes, streams, taps
from tda.attribution import directions, products
from tda.attribution.responses import Cosine, Identity, Operator
from tda.blocks import Trace
from tda.inverse.spectral import Response
from tda.likelihoods import Objective
from tda.scores import CHANGE, SIMILARITY, Scores
from tda.streams import Loop

Array = jax.Array
PyTree: TypeAlias = Any


def scorer(
  found: Trace,
  objective: Objective,
  *,
  measurement: Callable[[PyTree, PyTree], Array] | None = None,
  query_batch: int = 64,
  by_site: bool = False,
  rank: int | None = None,
  shares: str = "rows",
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
    rank: holds queries as matrices of this rank, in as much less memory
      (`segments.compress`; Grosse et al. 2023, §3.2.2); None keeps them whole.
      Responses are then computed for 8 queries at a time, solvers' too.
    shares: of what scores are: "rows" of the data, "segments" (the P parts of
      `objective.segments`, as documents of packed rows) or "tokens". Those of a
      row's parts add up to its own, unless they are cosines.

  Returns:
    score(params, train, queries, responses, *, query_params=None, loop=Loop())
    -> {name: Scores}, values [N, Q], of segments [N, P, Q] and of tokens [N, T,
    Q]. Train and queries are pytrees of arrays with leading axes N and Q;
    responses are linear operators on block coordinates, or `Cosine` of one, by
    name. The queries' gradients are taken at `query_params` if these are given.
    A second call compiles nothing again.
  """
  if query_batch < 1:
    raise ValueError(f"query_batch must be positive, got {query_batch}")
  products.check_shares(found, objective, shares)
  ask = directions.asker(found, objective, measurement, rank)
  keep = 1 if shares == "rows" else 2

  def finish(values, operands):
    del operands
    return values if by_site else {"": gradients.over_blocks(values, keep)}

  @functools.cache
  def passing(cosine, count):
    statistic = products.of_shares(shares, cosine, count)
    run = gradients.backward_pass(found, objective, statistic)
    return gradients.kept(run, finish)

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
    cosine = _checked_cosine(responses, shares, rank)
    count = products.parts_of(shares, objective, train)
    run, norms, pieces, infos = passing(cosine, count), None, [], []
    splits = np.array_split(np.arange(total), math.ceil(total / query_batch))
    for i, index in enumerate(splits):
      answers, info = ask(asked, queries, index, responses, loop)
      infos.append(info)
      stage = loop
      if len(splits) > 1:
        stage = loop.stage(f"queries {i + 1} of {len(splits)}")
      values = run(params, train, answers, loop=stage)
      if cosine:
        values, norms = _without_squares(values, keep)
      # [N, *stack, (P,) responses, queries]: leading axes of blocks come first.
      shape = (len(responses), len(index))
      pieces.append(
        {k: x.reshape(*x.shape[:-1], *shape) for k, x in values.items()}
      )
    found_infos = directions.joined(infos)
    results = _results(found, responses, pieces, norms, shares)
    return {
      name: scores._replace(
        info=found_infos.get(name), by_site=scores.by_site if by_site else None
      )
      for name, scores in results.items()
    }

  return score


def self_influence(
  found: Trace,
  objective: Objective,
  params: PyTree,
  train: PyTree,
  response: Response | Identity,
  *,
  shares: str = "rows",
  loop: Loop = Loop(),
) -> Scores:
  """(1/N) ∇ℓᵀ R ∇ℓ of every training example, [N], or [N, P] of its segments.

  How much an example's own loss rises when it is left out; large for examples
  that are mislabelled or that nothing else teaches.
  """
  if not isinstance(response, Response | Identity):
    raise ValueError(
      f"self-influence needs a spectral response or Identity(), not {response}"
    )
  products.check_shares(found, objective, shares)
  if shares == "tokens":
    raise ValueError("a token has no self-influence: ask for rows or segments")
  n = streams.rows(train)
  count = products.parts_of(shares, objective, train)
  _check_blocks(found, {"response": response})
  statistic = products.of_themselves(shares, count)
  keep = 0 if shares == "rows" else 1
  run = gradients.summed_over_blocks(found, objective, statistic, keep=keep)
  values = run(params, train, products.pairs(found, response), loop=loop)
  return Scores(
    values / n,
    method="self-influence",
    unit=CHANGE,
    normaliser=n,
    damping=getattr(response, "damping", None),
    labels=getattr(response, "labels", None),
    coverage=coverage(found),
    shares=shares,
  )


def relative(scores: Scores, own: Scores) -> Scores:
  """ℓ-RelatIF (Barshan et al. 2020): influence for the same change of its own.

  Scores [N, (P,) Q] divided by √(∇ℓᵀ R ∇ℓ) of each training example, from its
  self-influence [N, (P,)] by the same response: examples that move everything,
  themselves first, no longer come first for every query.
  """
  if own.values.shape != scores.values.shape[:-1] or own.unit != CHANGE:
    raise ValueError(
      f"self-influence of shape {own.values.shape} for scores of"
      f" {scores.values.shape}: it is of the same examples, by"
      " `self_influence`"
    )
  size = np.sqrt(own.values * own.normaliser)
  sites = scores.by_site and {
    k: _divided(x, size) for k, x in scores.by_site.items()
  }
  return scores._replace(
    values=_divided(scores.values, size),
    by_site=sites,
    method=f"relative {scores.method}",
    unit=SIMILARITY,
    normaliser=1,
  )


def coverage(found: Trace) -> float:
  """Share of the parameters in tracked blocks."""
  tracked = sum(block.size for block in found.blocks.values())
  return tracked / sum(math.prod(leaf.shape) for leaf in found.leaves)


def _checked_cosine(
  responses: Mapping[str, Operator], shares: str, rank: int | None
) -> bool:
  """Whether any of them is one."""
  cosine = any(isinstance(r, Cosine) for r in responses.values())
  if cosine and (shares == "tokens" or rank is not None):
    raise ValueError(
      "cosines are of rows or segments, and of whole queries: leave out"
      f" shares={shares!r} or rank={rank}"
    )
  return cosine


def _results(
  found: Trace,
  responses: Mapping[str, Operator],
  pieces: Sequence[Mapping[str, np.ndarray]],
  norms: np.ndarray | None,
  shares: str,
) -> dict[str, Scores]:
  """Scores of every response from the products of each batch of queries."""
  sites = {
    name: np.concatenate([piece[name] for piece in pieces], axis=-1)
    for name in pieces[0]
  }
  results = {}
  for i, (name, response) in enumerate(responses.items()):
    mine = {k: x[..., i, :] for k, x in sites.items()}
    results[name] = _scores(found, name, response, mine, norms, shares)
  return results


def _scores(
  found: Trace,
  name: str,
  response: Operator,
  mine: Mapping[str, np.ndarray],
  norms: np.ndarray | None,
  shares: str,
) -> Scores:
  """From inner products [N, *stack, (P,) Q] by block and norms [N, (P)]."""
  cosine = isinstance(response, Cosine)
  n = len(next(iter(mine.values())))
  divisor = norms if cosine and norms is not None else np.full(n, float(n))
  sites = {k: _divided(x, divisor) for k, x in mine.items()}
  inner = response.operator if isinstance(response, Cosine) else response
  return Scores(
    gradients.over_blocks(sites, 1 if shares == "rows" else 2),
    method=name,
    unit=SIMILARITY if cosine else CHANGE,
    normaliser=1 if cosine else n,
    damping=getattr(inner, "damping", None),
    labels=getattr(inner, "labels", None),
    coverage=coverage(found),
    by_site=sites,
    shares=shares,
  )


def _without_squares(
  values: Mapping[str, np.ndarray], keep: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Products by block, and the norms of the gradients [N, (P)] behind them."""
  last = {k: x[..., -1:] for k, x in values.items()}
  squares = gradients.over_blocks(last, keep)[..., 0]
  return {k: x[..., :-1] for k, x in values.items()}, np.sqrt(squares)


def _divided(x: np.ndarray, divisor: np.ndarray) -> np.ndarray:
  """x [N, ..., (P,) Q] / divisor [N, (P)]; zero where the divisor is."""
  n, *parts = divisor.shape
  between = [1] * (x.ndim - 1 - divisor.ndim)
  divisor = divisor.reshape(n, *between, *parts, 1)
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
