"""LESS against its formula on explicit gradients and Adam's own moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from tda import blocks, likelihoods, meshes, projections, runs
from tda.attribution import less, logra
from tda.store import lenses, search
from tda.streams import Loop

KEY, K, Q, RATES = jax.random.key(0), 5, 4, (0.05, 0.02)
DECAYS = {"b1": 0.8, "b2": 0.95, "eps": 1e-3}


@pytest.fixture(autouse=True)
def exactly():
  with jax.enable_x64(True):
    yield


@functools.cache
def problem(name):
  """The problem, its queries, and two checkpoints of a run with Adam."""
  p = oracles.problem(name)
  optimizer = optax.adamw(0.05, **DECAYS)
  stage = runs.Stage(p.objective.loss, p.data, optimizer, 2, 4)
  points = runs.checkpoints(
    lambda key: p.params, [stage], [jnp.ones(len(p.data["y"]))], KEY, [2, 5]
  )
  return p, {k: x[:Q] for k, x in p.data.items()}, points


def find(name, train=None, queries=None, **options):
  p, asked, points = problem(name)
  given = {"rates": RATES, "key": KEY, "dimension": K, **DECAYS, **options}
  return less.attribute(
    p.objective,
    given.pop("points", points),
    p.data if train is None else train,
    asked if queries is None else queries,
    **given,
  )


def unit(vectors, rows):
  """Vectors [N, ...] by block along the rows, if given, at unit length."""
  flat = oracles.flat(vectors)
  if rows is None:
    x = np.concatenate([*flat.values()], axis=1)
  else:
    x = sum(b @ oracles.flat(rows)[k].T for k, b in flat.items())
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def expected(name, dimension):
  p, queries, points = problem(name)
  (b1, b2, eps), total = DECAYS.values(), 0
  for i, (point, rate) in enumerate(zip(points, RATES, strict=True)):
    state, here = point.opt_state[0], p._replace(params=point.params)
    mu, nu = (blocks.to_blocks(p.found, x) for x in (state.mu, state.nu))
    updates = {}
    for k, g in oracles.gradients(here).items():
      m = (b1 * mu[k][None] + (1 - b1) * g) / (1 - b1 ** (point.step + 1))
      v = (b2 * nu[k][None] + (1 - b2) * g**2) / (1 - b2 ** (point.step + 1))
      updates[k] = m / (jnp.sqrt(v) + eps)
    rows = None
    if dimension is not None:
      own = jax.random.fold_in(KEY, i)
      rows = projections.rademacher(p.found, own, dimension)
    asked = oracles.gradients(here, queries)
    total += rate * unit(updates, rows) @ unit(asked, rows).T
  return total


@pytest.mark.parametrize("dimension", [K, None])
@pytest.mark.parametrize("name", ["tanh", "tied", "mixed"])
def test_scores_are_those_of_the_formula(name, dimension):
  found = find(name, dimension=dimension)
  want = expected(name, dimension)
  np.testing.assert_allclose(found.values, want, rtol=1e-5, atol=1e-8)
  assert found.method == "less" and found.normaliser == 1
  assert found.coverage == 1


def test_a_step_on_helpful_examples_lowers_the_measurement():
  """By a small step of the optimizer on one example, from the last state."""
  p, queries, points = problem("tanh")
  point, adam = points[-1], optax.adamw(1e-5, weight_decay=0, **DECAYS)
  margin = likelihoods.margin(p.objective)
  options = {"points": [point], "rates": [1.0], "dimension": None}
  found = find("tanh", measurement=margin, **options)

  def change(example, query):
    grads = jax.grad(p.objective.loss)(point.params, example)
    updates, _ = adam.update(grads, point.opt_state, point.params)
    stepped = optax.apply_updates(point.params, updates)
    return margin(stepped, query) - margin(point.params, query)

  over = jax.vmap(jax.vmap(change, (None, 0)), (0, None))
  moved = over(*jax.tree.map(jnp.asarray, (p.data, queries)))
  assert (np.sign(found.values) == -np.sign(moved)).all()


def test_batches_and_devices_do_not_matter():
  plain = find("mixed").values
  over = meshes.mesh(8)
  for loop in (Loop(3), Loop(8, mesh=over), Loop(8, microbatch=2)):
    found = find("mixed", loop=loop).values
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-8)


def test_bad_arguments():
  p, _, points = problem("tanh")
  nans = jax.tree.map(lambda x: x * jnp.nan, points[0].opt_state[0].mu)
  broken = points[0].opt_state[0]._replace(mu=nans)
  data = {"x": p.data["x"].copy(), "y": p.data["y"]}
  data["x"][2] = np.nan
  state = lambda s: [points[0]._replace(opt_state=s), points[1]]
  for match, options in (
    ("not 2 for 0", {"points": []}),
    ("not 1 for 2", {"rates": [0.1]}),
    ("rates=.*nan", {"rates": [0.1, np.nan]}),
    ("dimension=5 needs a key", {"key": None}),
    ("1 dimension or more, not 0", {"dimension": 0}),
    ("b2=1.0", {"b2": 1.0}),
    ("checkpoint 1: 0 members .* mu and nu and count", {"points": state(())}),
    ("checkpoint 1: .*first moments are not all", {"points": state(broken)}),
    ("checkpoint 1, train: .* 2 ", {"train": data}),
    ("checkpoint 1, queries: .* 2 ", {"queries": data}),
  ):
    with pytest.raises(ValueError, match=match):
      find("tanh", **options)


def test_stores_of_updates_give_the_same_scores(tmp_path):
  p, asked, points = problem("tanh")
  seen = []
  log = logra.logger(p.objective, p.params, p.data, key=KEY, dimension=999)
  for i, (point, rate) in enumerate(zip(points, RATES, strict=True)):
    updates = less.updates(p.found, point, **DECAYS)
    store = log.build(
      tmp_path / str(i), point.params, p.data, dtype="float32", updates=updates
    )
    assert store.about["features"].startswith("Adam's updates")
    lens = lenses.lens(store, log.ask(point.params, asked), "cosine")
    seen.append(lens._replace(directions=rate * lens.directions))
  want = find("tanh", dimension=None, key=None).values
  np.testing.assert_allclose(search.scores(seen), want, rtol=1e-4, atol=1e-6)
  with pytest.raises(ValueError, match="of another features"):
    log.build(tmp_path / "0", points[0].params, p.data, dtype="float32")
