"""SOURCE against the recursion it approximates, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from tda import blocks, likelihoods, runs, streams
from tda.attribution import influence, source
from tda.attribution.responses import Identity
from tda.attribution.source import Segment
from tda.curvature import fitting
from tda.inverse import spectral
from tda.likelihoods import Objective
from tda.runs import Stage


@pytest.fixture(autouse=True, scope="module")
def exactly():
  with jax.enable_x64(True):
    yield


LINEAR = Objective(
  lambda p, ex: ex["x"] @ p["w"],
  likelihoods.gaussian(),
  lambda ex: ex["y"],
)
KEY = jax.random.key(0)


def regression(seed, n=6):
  """The last example has a gradient that hardly moves, and no curvature."""
  rng = np.random.default_rng(seed)
  x, y = rng.normal(size=(n, 4)), rng.normal(size=(n, 1))
  x[-1], y[-1] = 1e-4 * x[-1], 1e4 * y[-1]
  return {"x": x, "y": y}


def init(key):
  return {"w": jnp.zeros((4, 1))}


def by_entry(rates):
  """Descent with a rate for each of the four inputs, or the same."""
  if len(rates) == 1:
    return optax.sgd(rates[0])
  scale = lambda g, p: {"w": -jnp.asarray(rates)[:, None] * g["w"]}
  return optax.stateless(scale)


@pytest.mark.parametrize(
  "rates",
  [
    ((2e-3,), (1e-3,)),
    ((2e-3, 1e-3, 5e-4, 3e-3), (1e-3, 2e-3, 4e-4, 1e-3)),
    ((2e-3,), (1e-3, 2e-3, 4e-4, 1e-3)),
  ],
)
def test_two_stages_of_a_quadratic_follow_the_exact_recursion(rates):
  """Derivatives of the run itself in the weight of the last example."""
  data = [regression(0), regression(1)]
  stages = [
    Stage(LINEAR.loss, d, by_entry(rate), epochs, 6)
    for d, rate, epochs in zip(data, rates, (300, 400), strict=True)
  ]
  queries = {"x": np.eye(4), "y": np.ones((4, 1))}
  train = jax.jit(runs.trainer(init, stages))
  ones = [jnp.ones(6), jnp.ones(6)]

  def measured(weights):
    params = train(weights, KEY)
    return jax.vmap(LINEAR.loss, (None, 0))(params, queries)

  slopes = jax.jacrev(measured)(ones)
  ends = np.cumsum(runs.lengths(stages))
  points = runs.checkpoints(init, stages, ones, KEY, list(ends))
  parts = source.segments(stages, points, 1)
  assert parts[0].rate == pytest.approx(300 * np.mean(rates[0]))
  assert [part.rates is None for part in parts] == [len(r) == 1 for r in rates]
  found = blocks.trace(LINEAR.outputs, init(KEY), streams.example(data[0]))
  score = source.scorer(found, LINEAR, labels="exact")
  scores = score(parts, data, queries)
  for stage in (0, 1):
    left_out = -np.asarray(slopes[stage])[:, -1]
    got = scores[stage].values[-1]
    np.testing.assert_allclose(got, left_out, rtol=5e-3)
  # Without what the second stage undoes, the first one's are far off.
  alone = score(parts[:1], data[:1], queries, params=points[-1].params)[0]
  off = alone.values[-1] - scores[0].values[-1]
  assert np.linalg.norm(off) > 0.05 * np.linalg.norm(alone.values[-1])


def fitted():
  p = oracles.problem("tanh")
  fit = fitting.fitter(p.found, p.objective, methods=["ekfac"], labels="exact")
  return p, fit(p.params, p.data)["ekfac"]


@pytest.mark.parametrize("rate", [1e-9, 1e12])
def test_one_segment_goes_from_dot_products_to_influence(rate):
  p, curvature = fitted()
  run = source.scorer(p.found, p.objective, labels="exact")
  got = run([Segment((p.params,), rate, 0)], [p.data], p.data)[0]
  score = influence.scorer(p.found, p.objective)
  response = Identity()
  if rate > 1:
    response = spectral.inverse(curvature, spectral.absolute(1 / rate))
  want = score(p.params, p.data, p.data, {"r": response})["r"].values
  scale = rate if rate < 1 else 1.0
  # Where the curvature vanishes the gradients do, but for rounding times c.
  np.testing.assert_allclose(
    got.values, scale * want, rtol=1e-5, atol=1e-5 * scale * np.abs(want).max()
  )


def test_the_response_is_near_a_damping_of_one_over_c():
  """And above it by at most 1.3: both are c at 0 and 1/σ at infinity."""
  _, curvature = fitted()
  rate = 7.0
  got = source.generation(curvature, rate).weights
  near = spectral.inverse(curvature, spectral.absolute(1 / rate)).weights
  for name, x in got.items():
    ratio = np.asarray(x / near[name])
    assert (ratio > 0.999).all() and (ratio < 1.3).all()


def test_flat_directions_and_weight_decay():
  x = jnp.asarray([0.0, 1e-12, 2.0, 1e9])
  plain = source._generated(x, 3.0, 0.0)
  want = [3.0, 3.0, -np.expm1(-6.0) / 2, 1e-9]
  np.testing.assert_allclose(plain, want, rtol=1e-9)
  decayed = source._generated(x, 3.0, 0.5)
  np.testing.assert_allclose(decayed[0], -np.expm1(-1.5) / 0.5, rtol=1e-9)


def test_segments_compose():
  """Three parts of a segment are that segment."""
  p, _ = fitted()
  run = source.scorer(p.found, p.objective, labels="exact", query_batch=3)
  whole = run([Segment((p.params,), 6.0, 0)], [p.data], p.data)[0]
  parts = [Segment((p.params, p.params), rate, 0) for rate in (1.0, 2.0, 3.0)]
  split = run(parts, [p.data], p.data)[0]
  np.testing.assert_allclose(split.values, whole.values, rtol=1e-8, atol=1e-14)
  assert split.method == "source" and split.labels.kind == "exact"
  assert split.normaliser == len(p.data["x"])


def test_fast_segments_are_at_the_mean_of_their_parameters():
  tree = lambda x: {"w": jnp.full(2, x)}
  (got,) = source.averaged([Segment((tree(1.0), tree(4.0)), 0.3, 0)])
  np.testing.assert_allclose(got.params[0]["w"], 2.5)
  assert got.rate == 0.3 and len(got.params) == 1


def test_segments_share_the_checkpoints_and_the_rate():
  stages = [Stage(LINEAR.loss, regression(0), optax.sgd(0.1), 8, 3)]
  at = [4, 8, 12, 16]
  points = runs.checkpoints(init, stages, [jnp.ones(6)], KEY, at)
  parts = source.segments(stages, points, 2)
  assert [len(part.params) for part in parts] == [2, 2]
  assert [round(part.rate, 6) for part in parts] == [0.8, 0.8]
  with pytest.raises(ValueError, match="5 segments of 4 checkpoints"):
    source.segments(stages, points, 5)
  with pytest.raises(
    ValueError, match=r"stage 0 ends after step 16 .* step 12"
  ):
    source.segments(stages, points[:3], 1)
  with pytest.raises(ValueError, match="is of step None"):
    source.segments(stages, [], 1)


@pytest.mark.parametrize("model", ["tanh", "mixed"])
def test_scaled_effects_are_those_of_dense_matrices(model):
  """exp(−H P), and (I − exp(−P H)) H⁻¹, of the H that EK-FAC stands for."""
  p = oracles.problem(model)
  fit = fitting.fitter(p.found, p.objective, methods=["ekfac"], labels="exact")
  keys = iter(jax.random.split(KEY, 2 * len(p.found.blocks)))
  draw = lambda shape: jax.random.uniform(next(keys), shape, minval=0.5)
  scales = {
    k: (
      draw((*b.stack, b.shape[0], b.shape[2])),
      draw((*b.stack, b.shape[0], b.shape[1])),
    )
    for k, b in p.found.blocks.items()
  }
  curvature = fit(p.params, p.data, scales=scales)["ekfac"]
  shapes = {k: (*b.stack, *b.shape) for k, b in p.found.blocks.items()}

  def dense(operator, name):
    size = int(np.prod(shapes[name]))
    unit = {k: jnp.zeros((size, *shape)) for k, shape in shapes.items()}
    unit[name] = jnp.eye(size).reshape(size, *shapes[name])
    return np.asarray(operator(unit)[name]).reshape(size, size).T

  whole = source._response(curvature, lambda x: x, scales)
  for name, (inputs, outputs) in scales.items():
    p_half = (outputs[..., :, None] * inputs[..., None, :]).ravel()
    rates = np.asarray(p_half**2)
    h = dense(whole, name) / rates[:, None] / rates[None]
    left = dense(source.survival(curvature, 1.0, scales=scales), name)
    want = jax.scipy.linalg.expm(-h * rates[None])
    np.testing.assert_allclose(left, want, rtol=1e-7, atol=1e-9)
    grown = dense(source.generation(curvature, 1.0, scales=scales), name)
    np.testing.assert_allclose(
      grown @ h, np.eye(len(h)) - want.T, rtol=1e-7, atol=1e-9
    )


def test_entries_that_do_not_move_keep_their_perturbations():
  """A layer that a later stage freezes carries what an earlier one did."""
  p, _ = fitted()
  run = source.scorer(p.found, p.objective, labels="exact")
  rates = jax.tree.map(lambda x: x * 0 + 2.0, p.params)
  frozen = {**rates, "in": jax.tree.map(jnp.zeros_like, rates["in"])}
  parts = [
    Segment((p.params,), 2.0, i, r) for i, r in enumerate((rates, frozen))
  ]
  scores = run(parts, [p.data, p.data], p.data)
  alone = run(parts[:1], [p.data], p.data)[0].values
  assert np.abs(scores[0].values).max() > 0.3 * np.abs(alone).max()
  still = jax.tree.map(jnp.zeros_like, rates)
  parts[1] = parts[1]._replace(rates=still)
  scores = run(parts, [p.data, p.data], p.data)
  np.testing.assert_allclose(scores[0].values, alone, rtol=1e-9, atol=1e-14)
  assert (scores[1].values == 0).all()
  decaying = source.scorer(
    p.found, p.objective, labels="exact", weight_decay=0.1
  )
  with pytest.raises(ValueError, match=r"weight_decay=0\.1 is of an optimizer"):
    decaying(parts, [p.data, p.data], p.data)


def test_equal_rates_are_one_rate():
  p, _ = fitted()
  run = source.scorer(p.found, p.objective, labels="exact")
  plain = [Segment((p.params,), rate, 0) for rate in (2.0, 3.0)]
  each = [
    s._replace(rates=jax.tree.map(lambda x, c=s.rate: x * 0 + c, p.params))
    for s in plain
  ]
  want, got = (
    run(parts, [p.data], p.data)[0].values for parts in (plain, each)
  )
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8 * abs(want).max())


def test_scales_of_rates_of_rank_one_are_exact():
  rng = np.random.default_rng(0)
  c = rng.uniform(size=(2, 1, 3, 1)) * rng.uniform(size=(2, 1, 1, 4))
  c[0, 0, :, 1] = 0  # an input whose gradients are always 0
  inputs, outputs = source.rank_one({"w": c})["w"]
  product = outputs[..., :, None] * inputs[..., None, :]
  np.testing.assert_allclose(product**2, c, rtol=1e-6)


def test_a_curvature_of_several_parameters_is_their_mean():
  p, _ = fitted()
  other = jax.tree.map(lambda x: 1.5 * x, p.params)
  fit = fitting.fitter(p.found, p.objective, labels="exact")
  both = fit(p.params, p.data, others=[other])
  one, two = fit(p.params, p.data), fit(other, p.data)
  for name, x in both["diagonal"].eigenvalues.items():
    mean = one["diagonal"].eigenvalues[name] + two["diagonal"].eigenvalues[name]
    np.testing.assert_allclose(x, mean / 2, rtol=1e-9, atol=1e-15)
  traces = lambda f: sum(
    float(x.sum()) for x in f["ekfac"].eigenvalues.values()
  )
  assert traces(both) == pytest.approx((traces(one) + traces(two)) / 2)
  assert both["ekfac"].examples == 2 * one["ekfac"].examples
