"""Kronecker-factored curvature where it is exact, and by its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import N, T

from tda.curvature import dense, fitting, kronecker
from tda.curvature.kronecker import Basis
from tda.moments import Moments
from tda.streams import Loop


@pytest.fixture(autouse=True, scope="module")
def float64():
  with jax.enable_x64(True):
    yield


@functools.cache
def problem(name, likelihood="categorical"):
  return oracles.problem(name, likelihood)


@functools.cache
def fitter(
  name, likelihood="categorical", labels="empirical", methods=fitting.METHODS
):
  p = problem(name, likelihood)
  return fitting.fitter(p.found, p.objective, methods=methods, labels=labels)


@functools.cache
def fitted(name, *which):
  p = problem(name, *which[:1])
  return p, fitter(name, *which)(p.params, p.data)


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name in expected:
    np.testing.assert_allclose(
      found[name], expected[name], rtol=1e-9, atol=1e-12, err_msg=name
    )


def layer_factors(p):
  """Inputs and output gradients [N, T, ·] of the first layer of "pooled"."""

  def one(x, y):
    layer = {"out": p.params["out"]}

    def of_output(s):
      h = jnp.tanh(s).mean(axis=0)
      return p.objective.likelihood.loss(oracles.affine(layer["out"], h), y)

    return jax.grad(of_output)(x @ p.params["in"]["w"])

  return p.data["x"], np.asarray(
    jax.vmap(one)(*map(jnp.asarray, p.data.values()))
  )


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", ["linear", "positions"])
def test_a_linear_model_has_its_exact_ggn(name, method):
  """One position or many: the scale of A ⊗ S is that of the GGN."""
  p, fits = fitted(name, "gaussian", "exact", ("kfac", "ekfac"))
  exact = dense.dense_ggn(p.objective, p.params, p.data)
  assert_same(oracles.explicit(fits[method]), oracles.in_blocks(p, exact))


def test_a_deep_linear_network_has_its_exact_ggn_blocks():
  p, fits = fitted("deep_linear", "gaussian", "exact", ("kfac",))
  exact = dense.dense_ggn(p.objective, p.params, p.data)
  assert_same(oracles.explicit(fits["kfac"]), oracles.in_blocks(p, exact))


@pytest.mark.parametrize("method", ["ekfac", "diagonal"])
@pytest.mark.parametrize("name", ["tanh", "pooled", "tied", "mixed"])
def test_eigenvalues_are_mean_squares_in_the_basis(name, method):
  """Of whole per-example gradients: cross terms of positions and uses.

  The inputs of "tanh" are more than the examples, so A has no full rank, and
  still no gradient is lost: the eigenvalues sum to the mean squared norm.
  """
  p, fits = fitted(name)
  grads = oracles.flat(oracles.gradients(p))
  frames = oracles.basis(fits[method])
  found = {k: np.ravel(x) for k, x in fits[method].eigenvalues.items()}
  expected = {
    k: np.mean((g @ frames[k]) ** 2, axis=0) for k, g in grads.items()
  }
  assert_same(found, expected)
  squares = {k: np.mean(np.sum(g**2, axis=1)) for k, g in grads.items()}
  assert_same({k: np.sum(x) for k, x in found.items()}, squares)


def test_inputs_count_positions_and_eigenvalues_count_examples():
  """Trap: on sequences A is per position and Λ per example.

  The layer is square, so that swapped moments would have the right shapes.
  """
  p, fits = fitted("pooled")
  a_NxTxI, dy_NxTxO = layer_factors(p)
  a = np.einsum("nti,ntj->ij", a_NxTxI, a_NxTxI) / (N * T)
  s = np.einsum("nto,ntp->op", dy_NxTxO, dy_NxTxO) / N
  assert a.shape == s.shape
  kfac = oracles.explicit(fits["kfac"])["in/w"]
  np.testing.assert_allclose(kfac, np.kron(s, a), atol=1e-12)
  g = np.einsum("nto,nti->noi", dy_NxTxO, a_NxTxI).reshape(N, -1)
  diagonal = np.asarray(fits["diagonal"].eigenvalues["in/w"]).reshape(-1)
  np.testing.assert_allclose(diagonal, np.mean(g**2, axis=0))


def test_moments_of_a_shared_weight_count_every_use():
  p, fits = fitted("tied")
  w = np.asarray(p.params["w"])
  x = p.data["x"]
  inputs = np.stack([x, np.tanh(x @ w)], axis=1)

  def one(x, y):
    def of_outputs(s):
      h = jnp.tanh(
        p.params["w"].T @ jnp.tanh(p.params["w"].T @ x + s[0]) + s[1]
      )
      return p.objective.likelihood.loss(oracles.affine(p.params["out"], h), y)

    return jax.grad(of_outputs)(jnp.zeros((2, 4)))

  dy = np.asarray(jax.vmap(one)(*map(jnp.asarray, p.data.values())))
  a = np.einsum("nti,ntj->ij", inputs, inputs) / (2 * N)
  s = np.einsum("nto,ntp->op", dy, dy) / N
  kfac = oracles.explicit(fits["kfac"])["w"]
  np.testing.assert_allclose(kfac, np.kron(s, a), atol=1e-12)


@pytest.mark.parametrize(
  ("labels", "methods"),
  [("empirical", fitting.METHODS), ("sampled:2", ("diagonal",))],
)
def test_fits_do_not_depend_on_the_batches(labels, methods):
  """Trap: inverses are of the whole, and draws belong to examples."""
  p = problem("tanh")
  fit = fitter("tanh", "categorical", labels, methods)
  key = jax.random.key(0)
  several = [fit(p.params, p.data, key=key, loop=Loop(b)) for b in (3, N)]
  for method in methods:
    assert_same(*(oracles.explicit(fits[method]) for fits in several))
  assert several[0]["diagonal"].examples == N


def test_labels_are_exact_or_drawn_from_the_model():
  """Sampled labels are unbiased for the exact ones; the data's are others."""
  p = problem("tanh")
  expected, variance = of_drawn_labels(p)
  _, fits = fitted("tanh", "categorical", "exact", ("diagonal",))
  values = lambda fit: {k: np.ravel(x) for k, x in fit.eigenvalues.items()}
  assert_same(values(fits["diagonal"]), expected)
  sampled = fitter("tanh", "categorical", "sampled:2", ("diagonal",))
  drawn = []
  for seed in range(3):
    found = sampled(p.params, p.data, key=jax.random.key(seed))["diagonal"]
    drawn.append(np.concatenate(list(values(found).values())))
    for name, x in values(found).items():
      z = (x - expected[name]) / np.sqrt(variance[name] / 2)
      assert np.abs(z).max() < 5  # 83 entries: chance 5e-5 were they normal
  assert np.abs(drawn[0] - drawn[1]).max() > 0.01 * drawn[0].max()
  empirical = values(fitted("tanh")[1]["diagonal"])["in/w"]
  assert np.abs(empirical - expected["in/w"]).max() > 0.1 * empirical.max()


def of_drawn_labels(p):
  """Mean square gradient over the model's labels, and its variance if each
  example's label is drawn once."""
  logits = jax.vmap(lambda ex: p.objective.outputs(p.params, ex))(
    jax.tree.map(jnp.asarray, p.data)
  )
  p_NxC = np.asarray(jax.nn.softmax(logits))
  squares = [
    oracles.flat(oracles.gradients(p, {**p.data, "y": np.full(N, c)}))
    for c in range(p_NxC.shape[1])
  ]
  moment = lambda name, power: sum(
    p_NxC[:, c, None] * of_class[name] ** power
    for c, of_class in enumerate(squares)
  )
  spread = lambda name: moment(name, 4) - moment(name, 2) ** 2
  return (
    {k: moment(k, 2).mean(axis=0) for k in squares[0]},
    {k: spread(k).sum(axis=0) / N**2 for k in squares[0]},
  )


def test_a_second_fit_compiles_nothing():
  p, traced = problem("linear"), []
  target = lambda ex: traced.append(ex) or ex["y"]
  objective = p.objective._replace(target=target)
  fit = fitting.fitter(p.found, objective, methods=("diagonal",))
  fit(p.params, p.data, loop=Loop(5))
  before = len(traced)
  fit(jax.tree.map(lambda x: 2 * x, p.params), p.data, loop=Loop(5))
  assert len(traced) == before > 0


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_factor_that_is_not_finite_is_named(side):
  good, bad = jnp.eye(3)[None], jnp.full((1, 3, 3), jnp.nan)
  pair = (bad, good) if side == "inputs" else (good, bad)
  moments = {"layer": Moments(*pair, jnp.ones(()))}
  with pytest.raises(ValueError, match=f"{side} of 'layer' is not finite"):
    kronecker.eigenbasis(moments)


def test_a_solver_that_fails_is_replaced_by_the_host(monkeypatch):
  rng = np.random.default_rng(0)
  root = rng.normal(size=(2, 1, 5, 2))  # of a shape that no other test has
  matrix = jnp.asarray(root @ root.swapaxes(-1, -2))
  monkeypatch.setattr(
    jnp.linalg,
    "eigh",
    lambda x: (jnp.full(x.shape[:-1], jnp.nan), jnp.full(x.shape, jnp.nan)),
  )
  moments = {"layer": Moments(matrix, matrix, jnp.ones(2))}
  bases, spectra = kronecker.eigenbasis(moments)
  basis, (values, _) = bases["layer"], spectra["layer"]
  assert isinstance(basis, Basis) and values.min() >= 0
  restored = jnp.einsum(
    "lgij,lgj,lgkj->lgik", basis.inputs, values, basis.inputs
  )
  np.testing.assert_allclose(restored, matrix, atol=1e-12)


def test_wide_sides_are_cut_along_the_diagonal():
  """Parts have eigenvectors of their own; a side that is not wide is whole."""
  rng = np.random.default_rng(0)
  root = rng.normal(size=(2, 1, 7, 9))
  inputs = jnp.asarray(root @ root.swapaxes(-1, -2))
  moments = {"layer": Moments(inputs, inputs[..., :3, :3], jnp.ones(2))}
  basis, spectra = kronecker.eigenbasis(moments, widest=3)
  cut = np.zeros((7, 7), bool)
  for begin, end in ((0, 2), (2, 5), (5, 7)):
    cut[begin:end, begin:end] = True
  q, values = basis["layer"].inputs, spectra["layer"][0]
  rebuilt = (q * values[..., None, :]) @ q.swapaxes(-1, -2)
  np.testing.assert_allclose(rebuilt, np.where(cut, inputs, 0), atol=1e-12)
  whole = kronecker.eigenbasis(moments, widest=7)[0]["layer"]
  plain = kronecker.eigenbasis(moments)[0]["layer"]
  np.testing.assert_array_equal(whole.inputs, plain.inputs)
  np.testing.assert_array_equal(basis["layer"].outputs, plain.outputs)
  with pytest.raises(ValueError, match="widest=0"):
    kronecker.eigenbasis(moments, widest=0)


@pytest.mark.parametrize(
  ("row", "value", "message"),
  [
    ("x", np.nan, "example 7"),
    ("y", 3, "example 7"),  # the loss of a class that is not there is NaN
    ("x", np.inf, r"\['in/w'\] are not finite"),  # tanh hides it from the loss
  ],
)
def test_what_is_not_finite_is_named(row, value, message):
  p = problem("tanh")
  data = {**p.data, row: p.data[row].copy()}
  data[row][(7, 0) if row == "x" else 7] = value
  fit = fitter("tanh", methods=("diagonal",))
  with pytest.raises(ValueError, match=message):
    fit(p.params, data)


def test_bad_choices_are_refused():
  p = problem("tanh")
  with pytest.raises(ValueError, match=r"\['shampoo'\].*'kfac', 'ekfac'"):
    fitting.fitter(p.found, p.objective, methods=["kfac", "shampoo"])
  with pytest.raises(ValueError, match="labels 'true'"):
    fitting.fitter(p.found, p.objective, labels="true")
  with pytest.raises(ValueError, match="give a key"):
    fitter("tanh", labels="sampled:2", methods=("diagonal",))(p.params, p.data)
  with pytest.raises(ValueError, match="leading axes"):
    empty = jax.tree.map(lambda x: x[:0], p.data)
    fitter("tanh")(p.params, empty)
  likelihood = p.objective.likelihood._replace(loss=lambda out, y: out)
  vector = p.objective._replace(likelihood=likelihood)
  with pytest.raises(ValueError, match=r"example has shape \(3,\), not a sc"):
    fitting.fitter(p.found, vector)(p.params, p.data)
  with pytest.raises(ValueError, match="the batch has structure"):
    fitter("tanh")(p.params, {"x": p.data["x"]})
