"""Scores against explicit matrices, and against retraining in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import N

from tda import blocks, likelihoods, streams
from tda.attribution import influence
from tda.attribution.responses import Cosine, Identity
from tda.curvature import fitting
from tda.inverse import spectral
from tda.likelihoods import Objective
from tda.scores import CHANGE, SIMILARITY
from tda.streams import Loop

Q = 4
CURVED = ("curved@0.1", "curved@0.01")
RESPONSES = (*CURVED, "dot", "cosine", "curved_cosine")


@pytest.fixture(autouse=True, scope="module")
def float64():
  with jax.enable_x64(True):
    yield


@functools.cache
def problem(name):
  p = oracles.problem(name)
  shapes = {k: (*b.stack, *b.shape) for k, b in p.found.blocks.items()}
  lookups = [k for k, b in p.found.blocks.items() if b.kind == "lookup"]
  curvature = oracles.drawn_curvature(shapes, lookups)
  dampings = spectral.relative(0.1), spectral.absolute(0.01)
  inverses = [spectral.inverse(curvature, d) for d in dampings]
  responses = dict(zip(CURVED, inverses, strict=True))
  responses["dot"] = Identity()
  responses["cosine"] = Cosine(Identity())
  responses["curved_cosine"] = Cosine(inverses[0])
  queries = jax.tree.map(lambda x: x[::-1][:Q], p.data)
  return p, curvature, responses, queries


@functools.cache
def scored(name):
  p, _, responses, queries = problem(name)
  score = influence.scorer(p.found, p.objective, by_site=True)
  return score(p.params, p.data, queries, responses)


def responded(name, which, grads):
  """Responses [Q, size] by block from dense solves."""
  _, curvature, responses, _ = problem(name)
  if which in ("dot", "cosine"):
    return grads
  if which == "curved_cosine":
    which = CURVED[0]
  damping = responses[which].damping
  deltas = oracles.damping(curvature, damping.value)
  found = {}
  for k, matrix in oracles.explicit(curvature).items():
    delta = deltas[k] if damping.kind == "relative" else damping.value
    damped = matrix + delta * np.eye(len(matrix))
    found[k] = np.linalg.solve(damped, grads[k].T).T
  return found


def joined(parts):
  return np.concatenate([parts[k] for k in sorted(parts)], axis=1)


@functools.cache
def gradients(name):
  """Of training examples and queries by block, [N, size] and [Q, size]."""
  p, _, _, queries = problem(name)
  return [oracles.flat(oracles.gradients(p, d)) for d in (p.data, queries)]


@pytest.mark.parametrize("which", RESPONSES)
@pytest.mark.parametrize("name", ["mixed", "tied"])
def test_scores_are_products_with_explicit_matrices(name, which):
  p, *_ = problem(name)
  train, query = gradients(name)
  query = responded(name, which, query)
  found = scored(name)[which]
  divisor = N
  if "cosine" in which:
    norms = [np.linalg.norm(joined(x), axis=1) for x in (train, query)]
    divisor = np.outer(*norms)
  expected = joined(train) @ joined(query).T / divisor
  np.testing.assert_allclose(found.values, expected, rtol=1e-9, atol=1e-12)
  for k, site in found.by_site.items():
    stack = p.found.blocks[k].stack
    assert site.shape == (N, *stack, Q)
    if not stack:
      expected = train[k] @ query[k].T / divisor
      np.testing.assert_allclose(site, expected, rtol=1e-9, atol=1e-12)
  sites = [x.reshape(N, -1, Q).sum(axis=1) for x in found.by_site.values()]
  np.testing.assert_allclose(sum(sites), found.values, rtol=1e-9, atol=1e-12)


def test_scores_say_what_they_are():
  scores = scored("mixed")
  change, alike = scores[CURVED[1]], scores["curved_cosine"]
  assert (change.unit, change.normaliser) == (CHANGE, N)
  assert change.damping == spectral.absolute(0.01)
  assert change.labels.kind == "exact" and change.coverage == 1
  assert (alike.unit, alike.normaliser) == (SIMILARITY, 1)
  assert alike.damping == spectral.relative(0.1)
  assert scores["dot"].damping is None and scores["dot"].labels is None
  p, *_ = problem("mixed")
  found = blocks.trace(
    p.objective.outputs, p.params, streams.example(p.data), select="out/*"
  )
  assert influence.coverage(found) == 15 / 79


def test_batches_and_company_do_not_change_scores():
  """Several query batches, padded training batches, one response alone."""
  p, _, responses, queries = problem("mixed")
  score = influence.scorer(p.found, p.objective, query_batch=3)
  alone = {"dot": responses["dot"]}
  found = score(p.params, p.data, queries, alone, loop=Loop(4))["dot"]
  assert found.by_site is None
  expected = scored("mixed")["dot"].values
  np.testing.assert_allclose(found.values, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("which", [CURVED[0], "dot"])
def test_self_influence_is_the_diagonal(which):
  p, _, responses, _ = problem("tied")
  train, _ = gradients("tied")
  expected = np.sum(joined(train) * joined(responded("tied", which, train)), 1)
  found = influence.self_influence(
    p.found, p.objective, p.params, p.data, responses[which], loop=Loop(4)
  )
  np.testing.assert_allclose(found.values, expected / N, rtol=1e-9)
  assert found.damping == getattr(responses[which], "damping", None)


def test_a_measurement_may_ask_something_else_of_other_queries():
  p, _, responses, queries = problem("tied")
  inner = likelihoods.margin(p.objective)

  def measurement(params, query):
    example = {"x": query["pixels"], "y": query["class"]}
    return inner(params, example)

  score = influence.scorer(p.found, p.objective, measurement=measurement)
  asked = {"pixels": queries["x"], "class": queries["y"]}
  found = score(p.params, p.data, asked, {"dot": responses["dot"]})["dot"]
  query = oracles.flat(oracles.gradients(p, queries, inner))
  train, _ = gradients("tied")
  expected = joined(train) @ joined(query).T / N
  np.testing.assert_allclose(found.values, expected, rtol=1e-9, atol=1e-12)
  with pytest.raises(ValueError, match=r"(?s)measurement failed.*'pixels'"):
    score(p.params, p.data, queries, {"dot": responses["dot"]})


# Retraining in closed form.

RIDGE = 0.3


def ridge(n, copies=1):
  """Data, and weights [N] -> the minimiser of their ridge regression."""
  rng = np.random.default_rng(0)
  x = np.tile(rng.normal(size=(n, 3)), (copies, 1))
  y = x @ np.array([1.0, -2.0, 0.5]) + np.tile(rng.normal(size=n), copies)
  n = n * copies

  def solution(weights):
    weighted = x.T @ jnp.diag(weights)
    gram = weighted @ x / n + RIDGE * jnp.eye(3)
    return jnp.linalg.solve(gram, weighted @ y / n)

  return {"x": x, "y": y[:, None]}, solution


def ridge_scores(data, w, queries):
  """Influence on the predictions at `queries`, by K-FAC, which is exact."""
  objective = Objective(
    lambda p, ex: ex["x"] @ p["w"], likelihoods.gaussian(), lambda ex: ex["y"]
  )
  params = {"w": w[:, None]}
  found = blocks.trace(objective.outputs, params, streams.example(data))
  fit = fitting.fitter(found, objective, methods=("kfac",), labels="exact")
  kfac = fit(params, data)["kfac"]
  predict = lambda p, q: (q @ p["w"])[0]
  score = influence.scorer(found, objective, measurement=predict)
  response = spectral.inverse(kfac, spectral.absolute(RIDGE))
  return score(params, data, queries, {"kfac": response})["kfac"].values


def test_influence_is_leave_one_out_in_ridge_regression():
  """To first order exactly, and to O(1/N²) when one example really leaves."""
  queries = np.random.default_rng(1).normal(size=(Q, 3))
  errors = []
  for copies in (1, 2):
    data, solution = ridge(20, copies)
    n = 20 * copies
    w = solution(jnp.ones(n))
    found = ridge_scores(data, w, queries)
    slope = queries @ jax.jacobian(solution)(jnp.ones(n))
    np.testing.assert_allclose(found, -slope.T, rtol=1e-8, atol=1e-12)
    without = jax.vmap(solution)(1 - jnp.eye(n))
    actual = np.asarray(without - w[None]) @ queries.T
    # In closed form the rest of the series sums to 1 / (1 - leverage).
    gram = data["x"].T @ data["x"] + n * RIDGE * np.eye(3)
    leverage = np.sum(data["x"] * np.linalg.solve(gram, data["x"].T).T, axis=1)
    np.testing.assert_allclose(
      found / (1 - leverage)[:, None], actual, rtol=1e-8, atol=1e-12
    )
    errors.append(np.abs(actual - found)[:20])
  # Twice the data: a quarter of the error, up to the leverages themselves.
  np.testing.assert_allclose(
    errors[0], 4 * errors[1], rtol=2 * leverage.max(), atol=0
  )


# Bad input.


def scoring(name="tied", **replaced):
  p, _, responses, queries = problem(name)
  args = {
    "params": p.params,
    "train": p.data,
    "queries": queries,
    "responses": {"dot": responses["dot"]},
  }
  score = influence.scorer(p.found, p.objective)
  return score(**{**args, **replaced})


def spoiled(data, row, value):
  x = data["x"].copy()
  x[row, 0] = value
  return {**data, "x": x}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_named(value):
  """A hyperbolic tangent hides infinity from the loss, not from gradients."""
  p, _, _, queries = problem("tied")
  with pytest.raises(ValueError, match="example 6 are not finite"):
    scoring(train=spoiled(p.data, 6, value))
  with pytest.raises(ValueError, match="measurement of query 2,"):
    scoring(queries=spoiled(queries, 2, value))


def test_bad_input_is_refused():
  p, _, responses, queries = problem("tied")
  with pytest.raises(ValueError, match="queries: the batch has structure"):
    scoring(queries={"x": queries["x"]})
  with pytest.raises(
    ValueError, match=r"train: batch\['x'\] has shape \(10, 3"
  ):
    scoring(train={**p.data, "x": p.data["x"][:, :3]})
  with pytest.raises(ValueError, match="leading axes"):
    scoring(queries=jax.tree.map(lambda x: x[:0], queries))
  with pytest.raises(ValueError, match="no responses"):
    scoring(responses={})
  with pytest.raises(ValueError, match=r"other blocks.*'table', 'w'\]"):
    scoring(responses={"other": problem("mixed")[2][CURVED[0]]})
  with pytest.raises(ValueError, match="query_batch must be positive, got 0"):
    influence.scorer(p.found, p.objective, query_batch=0)
  with pytest.raises(ValueError, match="spectral response or Identity"):
    influence.self_influence(
      p.found, p.objective, p.params, p.data, responses["cosine"]
    )
  whole = lambda params, query: params["w"].sum(axis=0)
  score = influence.scorer(p.found, p.objective, measurement=whole)
  with pytest.raises(ValueError, match=r"returned shape \(4,\), not a scalar"):
    score(p.params, p.data, queries, {"dot": responses["dot"]})


def test_a_loss_that_is_not_of_one_example_is_explained():
  params = {"w": jnp.ones((3, 2))}
  example = {"x": np.ones(3), "y": np.zeros((), int)}

  def batched(params, batch):
    logits_BxC = batch["x"] @ params["w"]
    rows = jnp.arange(len(batch["y"]))
    return -jax.nn.log_softmax(logits_BxC)[rows, batch["y"]].mean()

  def traced(loss, params=params, **options):
    outputs = likelihoods.from_loss(loss).outputs
    return blocks.trace(outputs, params, example, **options)

  with pytest.raises(ValueError, match=r"(?s)ONE example.*x\[None\], example"):
    traced(batched)
  wrapped = lambda p, ex: batched(p, jax.tree.map(lambda x: x[None], ex))
  assert list(traced(wrapped).blocks) == ["w"]
  with pytest.raises(ValueError, match=r"returned shape \(2,\), not a scalar"):
    traced(lambda p, ex: ex["x"] @ p["w"])
  with pytest.raises(ValueError, match="'steps' has dtype int"):
    traced(batched, {**params, "steps": jnp.zeros((), int)})
  with pytest.raises(ValueError, match=r"strict=True.*w enters sin"):
    traced(lambda p, ex: jnp.sin(p["w"]).sum(), strict=True)
