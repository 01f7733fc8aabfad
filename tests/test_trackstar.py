"""TrackStar against explicit matrices, and the projections it makes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from tda import likelihoods, meshes, projections
from tda.attribution import adam, trackstar
from tda.inverse import whitening
from tda.streams import Loop

KEY, K, Q = jax.random.key(0), 3, 4


@pytest.fixture(autouse=True)
def exactly():
  with jax.enable_x64(True):
    yield


def second_moments(p):
  """Of no rank in particular, and zero for two leaves."""
  rng = np.random.default_rng(3)
  leaves, treedef = jax.tree.flatten(p.params)
  drawn = [jnp.asarray(rng.gamma(0.5, size=x.shape)) for x in leaves]
  for i in (0, -1):
    drawn[i] = jnp.zeros_like(drawn[i])
  return jax.tree.unflatten(treedef, drawn)


def problem(name):
  p = oracles.problem(name)
  return p, {k: x[:Q] + 0 for k, x in p.data.items()}


def projected(p, grads, dimension, v):
  """Features [N, modules, D] by block from explicit matrices."""
  sides = projections.two_sided(p.found, KEY, dimension)
  features = {}
  for name, x in grads.items():
    outputs, inputs = x.shape[-2:]
    grad = np.array(x).reshape(len(x), -1, outputs, inputs)
    if v is not None:
      rows = np.asarray(v[name]).reshape(-1, outputs, inputs)
      mean = rows.mean(axis=(1, 2), keepdims=True)
      rows = np.where(mean > 0, rows + 1e-8 * mean, 1)
      total = rows.sum(axis=(1, 2), keepdims=True)
      rows = rows.sum(2, keepdims=True) * rows.sum(1, keepdims=True) / total
      grad /= np.sqrt(rows)
    right, left = (
      np.broadcast_to(np.eye(size), (grad.shape[1], size, size))
      if x is None
      else np.asarray(x).reshape(grad.shape[1], size, -1)
      for x, size in zip(sides[name], (inputs, outputs), strict=True)
    )
    product = np.einsum("nmoi,mip,mos->nmsp", grad, right, left)
    features[name] = product.reshape(*product.shape[:2], -1)
  return features


def whitened(features, matrices, damping):
  """Rows at unit length, each module times its R^(-1/2)."""
  parts = []
  for name, x in features.items():
    for m in range(x.shape[1]):
      values, vectors = np.linalg.eigh(matrices[name][m])
      damped = values + damping * values.mean()
      parts.append(x[:, m] @ (vectors / np.sqrt(damped)) @ vectors.T)
  rows = np.concatenate(parts, axis=1)
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def expected(p, queries, dimension, v=None, mixing=None, damping=0.1, m=None):
  v = v and jax.tree.map(np.asarray, adam.in_blocks(p.found, v))
  ours = projected(p, oracles.gradients(p), dimension, v)
  asked = projected(p, oracles.gradients(p, queries, m), dimension, v)
  mean = lambda x: np.einsum("nmd,nme->mde", x, x) / len(x)
  both = [{k: mean(x) for k, x in side.items()} for side in (ours, asked)]
  if mixing is None:
    train, query = (
      np.sort(np.concatenate([np.linalg.eigvalsh(x).ravel() for x in r]))[::-1]
      for r in (both[0].values(), both[1].values())
    )
    # Every module of the queries' R has their number as its rank, or D.
    count = sum(min(Q, x.shape[2]) * x.shape[1] for x in asked.values())
    mixing = train[count - 1] / (train[count - 1] + query[count - 1])
  mixed = {k: mixing * both[1][k] + (1 - mixing) * both[0][k] for k in ours}
  rows = [whitened(x, mixed, damping) for x in (ours, asked)]
  return rows[0] @ rows[1].T


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", ["tanh", "pooled", "tied", "mixed"])
def test_scores_are_those_of_the_formula(name, corrected):
  p, queries = problem(name)
  v = second_moments(p) if corrected else None
  find = functools.partial(
    trackstar.attribute, p.objective, p.params, p.data, queries, key=KEY
  )
  for dimension, mixing in ((2, 0.9), (50, 0.0)):
    options = {"dimension": dimension, "mixing": mixing}
    found = find(second_moments=v, **options)
    want = expected(p, queries, v=v, **options)
    np.testing.assert_allclose(found.values, want, rtol=1e-5, atol=1e-6)
  assert found.method == "trackstar" and found.coverage == 1
  assert found.normaliser == 1 and str(found.damping) == "0.1 relative"


def test_the_spectra_cross():
  p, queries = problem("tanh")
  found = trackstar.attribute(
    p.objective, p.params, p.data, queries, key=KEY, dimension=K
  )
  want = expected(p, queries, K)
  np.testing.assert_allclose(found.values, want, rtol=1e-5, atol=1e-6)
  train, asked = np.array([8.0, 4, 2, 1]), np.array([9.0, 6, 3])
  assert whitening.crossing(train[::-1], asked, 2) == 4 / (4 + 6)
  assert whitening.crossing(train, asked) == 2 / (2 + 3)  # of 1000: the rank
  with pytest.raises(ValueError, match=r"ranks \[0, 3\].*Give `mixing`"):
    whitening.crossing(0 * train, asked)


def test_a_measurement_and_unit_length():
  """A query that is a training example, by the loss, scores 1 with itself."""
  p, queries = problem("mixed")
  options = {"key": KEY, "dimension": K, "second_moments": second_moments(p)}
  find = functools.partial(
    trackstar.attribute, p.objective, p.params, p.data, queries, **options
  )
  margin = likelihoods.margin(p.objective)
  found = find(measurement=margin, mixing=0.5)
  want = expected(
    p, queries, K, options["second_moments"], mixing=0.5, m=margin
  )
  np.testing.assert_allclose(found.values, want, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(np.diag(find().values), 1, rtol=1e-6)
  same = find(measurement=p.objective.loss)
  np.testing.assert_allclose(same.values, find().values, rtol=1e-5, atol=1e-6)


def test_batches_and_devices_do_not_matter():
  p, queries = problem("mixed")
  find = lambda loop: (
    trackstar.attribute(
      p.objective,
      p.params,
      p.data,
      queries,
      key=KEY,
      dimension=2,
      second_moments=second_moments(p),
      loop=loop,
    ).values
  )
  plain = find(Loop())
  over = meshes.mesh(8)
  for loop in (Loop(3), Loop(8, mesh=over), Loop(8, microbatch=2)):
    np.testing.assert_allclose(find(loop), plain, rtol=1e-5, atol=1e-6)
  draw = lambda key: projections.two_sided(p.found, key, 2)
  where = jax.sharding.NamedSharding(over, jax.sharding.PartitionSpec())
  spread = jax.jit(draw, out_shardings=where)(KEY)
  jax.tree.map(np.testing.assert_array_equal, spread, draw(KEY))
  sides = [x for x in jax.tree.leaves(draw(KEY)) if x.size > 8]
  assert len({np.asarray(x).tobytes() for x in sides}) == len(sides)


def test_projections_of_both_sides_are_unbiased():
  """Over 400 keys the mean product is within five of its standard errors.

  With W = V M Uᵀ for the second moment M of the right side, the product has
  variance (‖W‖² + tr W² − 2 Σ W_oo²) / K over the left side for given W, and
  that of its mean ⟨U, V⟩_M over the right one.
  """
  p = oracles.problem("tanh")
  rng = np.random.default_rng(0)
  u, v = rng.normal(size=(2, 5, 13)) + 0.3
  draw = lambda key: projections.two_sided(p.found, key, K)["in/w"]
  right, left = jax.vmap(draw)(jax.random.split(KEY, 400))
  side = lambda x: np.einsum("noi,kgip,kgos->knsp", [u, v], right, x)
  products = np.einsum("ksp,ksp->k", *np.moveaxis(side(left), 1, 0))
  w = np.einsum("oi,kgip,kgjp,rj->kor", v, right, right, u)
  spread = (w**2).sum((1, 2)) + np.einsum("kor,kro->k", w, w)
  spread -= 2 * (np.einsum("koo->ko", w) ** 2).sum(1)
  x = u.T @ v
  outer = (x**2).sum() + (x * x.T).sum() - 2 * (np.diag(x) ** 2).sum()
  error = np.sqrt((spread.mean() + outer) / K / 400)
  assert abs(products.mean() - (u * v).sum()) < 5 * error
  assert abs(left).max() == abs(right).min() == np.float32(K**-0.5)


@pytest.mark.parametrize(
  "optimizer, names",
  [
    (optax.adamw(optax.linear_schedule(0.1, 0.0, 9)), True),
    (optax.chain(optax.clip(1.0), optax.scale_by_rms(0.9)), False),
  ],
)
def test_second_moments_are_those_of_the_optimizer(optimizer, names):
  params = {"nu": jnp.ones(3), "w": jnp.zeros((2, 3))}
  grads = jax.tree.map(lambda x: 0.5 + x, params)
  state = optimizer.init(params)
  for _ in range(2):
    state = optimizer.update(grads, state, params)[1]
  found = adam.second_moments(state, 0.999 if names else None)
  scale = 1 if names else 1 - 0.9**2
  clipped = grads if names else jax.tree.map(lambda g: g.clip(-1, 1), grads)
  want = jax.tree.map(lambda g: scale * g**2, clipped)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6), found, want
  )


def test_bad_arguments():
  p, queries = problem("tanh")
  find = lambda **options: trackstar.attribute(
    p.objective, p.params, p.data, queries, **{"key": KEY, **options}
  )
  moments = second_moments(p)
  bad = lambda value: jax.tree.map(lambda x: x.at[0].set(value), moments)
  data = {"x": p.data["x"].copy(), "y": p.data["y"]}
  data["x"][7] = np.nan
  for match, options in (
    ("1 dimension or more, not 0", {"dimension": 0}),
    ("mixing=1.5", {"mixing": 1.5}),
    ("damping=0", {"damping": 0}),
    (r"those of \['in'\]\['b'\] are not", {"second_moments": bad(np.nan)}),
    ("0 or more", {"second_moments": bad(-1.0)}),
    ("moments are those of the parameters", {"second_moments": moments["in"]}),
    ("matches none", {"select": "absent*"}),
  ):
    with pytest.raises(ValueError, match=match):
      find(**options)
  for match, args in (
    ("train: .* 7", (data, queries)),
    ("queries: .* 7", (p.data, data)),
  ):
    with pytest.raises(ValueError, match=match):
      trackstar.attribute(p.objective, p.params, *args, key=KEY)
  with pytest.raises(ValueError, match=r"0 members .* keep nu, and one"):
    adam.second_moments(optax.sgd(0.1, 0.9).init(p.params))
  with pytest.raises(ValueError, match="count=0"):
    adam.second_moments(optax.adam(0.1).init(p.params), 0.999)
