"""GGN products and the dense curvature against explicit Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from tda import likelihoods
from tda.curvature import dense
from tda.curvature.ggn import ggn_vp
from tda.likelihoods import Objective

N, INPUTS, HIDDEN = 7, 3, 4
T, V = 3, 4
LIKELIHOODS = {
  "categorical": likelihoods.categorical(),
  "gaussian": likelihoods.gaussian(0.5),
  "token_sum": likelihoods.token_categorical("sum"),
  "token_mean": likelihoods.token_categorical("mean"),
}


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def linear(params, x):
  y = x @ params["out"]
  return y + jnp.broadcast_to(params["bias"], y.shape)


def tanh(params, x):
  return linear(params, jnp.tanh(x @ params["in"]))


def remat(params, x):
  return jax.checkpoint(tanh)(params, x)


def scanned(params, x):
  def layer(h, w):
    return jnp.tanh(h @ w), None

  return linear(
    params, jax.lax.scan(layer, x @ params["in"], params["deep"])[0]
  )


def problem(name, model, seed=0):
  """objective, params, data; tokens are the same x at T positions, shifted."""
  rng = np.random.default_rng(seed)
  wide = INPUTS if model is linear else HIDDEN
  shapes = {"out": (wide, V), "bias": (V,)}
  shapes |= {} if model is linear else {"in": (INPUTS, HIDDEN)}
  shapes |= {"deep": (2, HIDDEN, HIDDEN)} if model is scanned else {}
  params = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
  data = {"x": rng.normal(size=(N, INPUTS)), "y": rng.integers(V, size=N)}
  if name == "gaussian":
    data["y"] = rng.normal(size=(N, V))
  if name.startswith("token"):
    data["x"] = rng.normal(size=(N, T, INPUTS))
    data["y"] = rng.integers(V, size=(N, T))
    data["mask"] = (rng.random((N, T)) < 0.7).astype(np.float32)

  def outputs(params, example):
    return model(params, example["x"])

  def target(example):
    y = example["y"]
    return (y, example["mask"]) if "mask" in example else y

  data = jax.tree.map(jnp.asarray, data)
  return Objective(outputs, LIKELIHOODS[name], target), params, data


def mean_loss(objective, params, data):
  flat, unravel = ravel_pytree(params)
  losses = jax.vmap(objective.loss, (None, 0))
  return flat, lambda flat: jnp.mean(losses(unravel(flat), data))


def explicit(objective, params, data):
  """mean JᵀHJ, with J by jacrev and H by autodiff of the loss."""
  flat, unravel = ravel_pytree(params)

  def one(flat, example):
    def model(flat):
      return objective.outputs(unravel(flat), example)

    outputs, target = model(flat), objective.target(example)
    jacobian = jax.jacrev(model)(flat).reshape(outputs.size, -1)
    hessian = jax.hessian(objective.likelihood.loss)(outputs, target)
    return jacobian.T @ hessian.reshape(outputs.size, -1) @ jacobian

  return jnp.mean(jax.jit(jax.vmap(one, (None, 0)))(flat, data), axis=0)


def columns(objective, params, data, **options):
  """The matrix of a matvec, vmapped over the standard basis."""
  flat, unravel = ravel_pytree(params)

  @jax.jit
  def matrix(params, data):
    matvec = ggn_vp(objective, params, data, **options)
    column = jax.vmap(lambda e: ravel_pytree(matvec(unravel(e)))[0])
    return column(jnp.eye(flat.size)).T

  return matrix(params, data)


def close(actual, expected):
  scale = np.max(np.abs(expected))
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_linear_model_ggn_is_the_hessian(name):
  objective, params, data = problem(name, linear)
  flat, loss = mean_loss(objective, params, data)
  expected = jax.jit(jax.hessian(loss))(flat)
  close(columns(objective, params, data), expected)
  close(dense.dense_ggn(objective, params, data), expected)


@pytest.mark.parametrize(
  ("name", "model"),
  [(name, tanh) for name in LIKELIHOODS]
  + [("categorical", remat), ("token_mean", remat)]
  + [("categorical", scanned), ("token_mean", scanned)],
)
def test_nonlinear_model_ggn_is_explicit(name, model):
  problem_ = problem(name, model)
  expected = explicit(*problem_)
  close(columns(*problem_), expected)
  close(columns(*problem_, microbatch=3), expected)  # 7 = 3 + 3 + 1
  close(dense.dense_ggn(*problem_, microbatch=3), expected)


@pytest.mark.parametrize("microbatch", [None, 1, 4, 100])
def test_weights_select_examples(microbatch):
  objective, params, data = problem("token_mean", tanh)
  keep = np.array([1, 0, 1, 1, 0, 0, 1])
  chosen = jax.tree.map(lambda x: x[keep == 1], data)
  found = columns(
    objective, params, data, weights=jnp.asarray(keep), microbatch=microbatch
  )
  close(found, explicit(objective, params, chosen))


def test_the_model_is_linearised_once():
  objective, params, data = problem("categorical", tanh)
  calls = []

  def counted(params, example):
    calls.append(1)
    return objective.outputs(params, example)

  matvec = ggn_vp(objective._replace(outputs=counted), params, data)
  built = len(calls)
  single = matvec(params)
  stacked = jax.vmap(matvec)(jax.tree.map(lambda p: p[None] * 2, params))
  assert built and len(calls) == built
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(2 * a, b[0], rtol=1e-12),
    single,
    stacked,
  )


@pytest.mark.parametrize("microbatch", [None, 3])
def test_low_precision_parameters_give_float32(microbatch):
  """Small integers are exact in bfloat16, so equality is asked for."""
  objective, params, data = problem("gaussian", linear)
  seen = set()

  def outputs(params, example):
    seen.add(params["out"].dtype.name)
    return linear(params, example["x"])

  objective = objective._replace(outputs=outputs)
  whole = jax.tree.map(lambda x: jnp.round(2 * x).astype(jnp.float32), params)
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), whole)
  data = jax.tree.map(lambda x: jnp.round(2 * x).astype(jnp.float32), data)
  weights = jnp.ones(N).at[3:].set(0).at[4].set(1)  # 4: 1/4 is exact
  for dtype in (jnp.float32, jnp.bfloat16):
    rows = data | {"x": data["x"].astype(dtype)}
    options = {"weights": weights, "microbatch": microbatch}
    found = ggn_vp(objective, low, rows, **options)(whole)
    expected = ggn_vp(objective, whole, data, **options)(whole)
    for key in whole:
      assert found[key].dtype == jnp.float32
      if dtype == jnp.float32:
        np.testing.assert_array_equal(found[key], expected[key])
      else:  # the backward pass itself rounds: 8 bits, a few terms
        np.testing.assert_allclose(found[key], expected[key], rtol=2**-6)
  seen.clear()
  found = dense.dense_ggn(objective, low, data)
  ggn_vp(objective, low, data)
  assert seen == {"bfloat16"}  # the model runs at its own precision
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, dense.dense_ggn(objective, whole, data))


def test_empirical_labels_are_the_gradients_second_moment():
  objective, params, data = problem("token_mean", tanh)
  flat, unravel = ravel_pytree(params)
  gradient = jax.grad(lambda x, example: objective.loss(unravel(x), example))
  grads = jax.jit(jax.vmap(gradient, (None, 0)))(flat, data)
  found = dense.dense_ggn(objective, params, data, "empirical", microbatch=2)
  close(found, grads.T @ grads / N)
  bare = likelihoods.from_loss(objective.loss)
  close(dense.dense_ggn(bare, params, data, "empirical"), found)


def test_sampled_labels_are_the_ggn_in_expectation():
  """vᵀCv over 512 keys, within four standard errors, three seeds."""
  objective, params, data = problem("token_mean", tanh)
  ggn = explicit(objective, params, data)

  @jax.jit
  def forms(key, v):
    found = dense.dense_ggn(objective, params, data, "sampled:2", key=key)
    return v @ found @ v

  for seed in range(3):
    v = np.random.default_rng(seed).normal(size=len(ggn))
    keys = jax.random.split(jax.random.key(seed), 512)
    drawn = jax.vmap(forms, (0, None))(keys, jnp.asarray(v))
    error = np.std(drawn, ddof=1) / np.sqrt(drawn.size)
    assert abs(np.mean(drawn) - v @ ggn @ v) < 4 * error
    assert v @ ggn @ v > 12 * error


def test_damped_solves():
  objective, params, data = problem("categorical", tanh)
  matrix = dense.dense_ggn(objective, params, data)
  direction = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
  flat, _ = ravel_pytree(jax.tree.map(lambda p: p.astype(float), direction))
  decomposed = dense.eigen(matrix)
  assert decomposed.values.min() >= 0
  for damping in (1e-3, 1.0):
    expected = np.linalg.solve(matrix + damping * np.eye(len(flat)), flat)
    for found in (
      dense.solve(matrix, damping)(direction),
      jax.jit(lambda d: dense.solve(matrix, d)(direction))(damping),
      dense.spectral(decomposed, lambda x, d=damping: 1 / (x + d))(direction),
    ):
      assert jax.tree.structure(found) == jax.tree.structure(params)
      np.testing.assert_allclose(
        ravel_pytree(found)[0], expected, rtol=1e-9, atol=1e-9
      )
  many = jax.vmap(dense.solve(matrix, 1.0))(
    jax.tree.map(lambda p: jnp.stack([p, 2 * p]), direction)
  )
  np.testing.assert_allclose(many["in"][1], 2 * found["in"], rtol=1e-9)
  assert np.all(np.isnan(dense.solve(-matrix, 0)(direction)["in"]))


def test_bad_input_is_named():
  objective, params, data = problem("categorical", tanh)
  integers = params | {"bias": jnp.zeros(V, jnp.int32)}
  fit = dense.dense_ggn
  for message, call in {
    r"\['bias'\] has dtype int32": lambda: ggn_vp(objective, integers, data),
    r"dtype int32": lambda: fit(objective, integers, data),
    r"weights of shape \(3,\) .* 7": lambda: ggn_vp(
      objective, params, data, weights=jnp.ones(3)
    ),
    "microbatch=0": lambda: ggn_vp(objective, params, data, microbatch=0),
    r"shape \(4,\) .* \(3, 4\)": lambda: ggn_vp(objective, params, data)(
      params | {"in": jnp.ones(4)}
    ),
    r"32 parameters need .* 8\.19e-06 GB.*limit=31": lambda: fit(
      objective, params, data, limit=31
    ),
    "key per example": lambda: fit(objective, params, data, "sampled"),
    '"exact", "empirical"': lambda: fit(objective, params, data, "true"),
    "damping=-1": lambda: dense.solve(jnp.eye(2), -1),
    "3 numbers .* jax.vmap": lambda: dense.solve(jnp.eye(2), 1)(jnp.ones(3)),
  }.items():
    with pytest.raises(ValueError, match=message):
      call()
