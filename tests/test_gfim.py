"""GFIM against explicit sums, and against the Fisher where it is exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import N

from tda import blocks, likelihoods, streams
from tda.attribution import influence
from tda.curvature import dense
from tda.inverse import gfim, spectral
from tda.inverse.iterative import Status
from tda.likelihoods import Objective
from tda.streams import Loop

MODELS = ("pooled", "tied", "mixed")
DAMPINGS = (spectral.relative(0.1), spectral.absolute(0.02))


@pytest.fixture(autouse=True, scope="module")
def float64():
  with jax.enable_x64(True):
    yield


@functools.cache
def fitted(name, rows="mean"):
  p = oracles.problem(name)
  fit = gfim.fitter(p.found, p.objective, rows=rows)
  return p, fit(p.params, p.data, loop=Loop(batch_size=4))


def expected(p, name, rows="mean"):
  """Matrices [*stack, G, D, D] from gradients [N, *stack, G, O, I]."""
  block = p.found.blocks[name]
  grads = np.asarray(oracles.gradients(p)[name])
  if gfim.side(block) == "outputs":
    grads = grads.swapaxes(-1, -2)
  gram = np.einsum("n...ri,n...rj->...ij", grads, grads) / N
  return gram / (grads.shape[-2] if rows == "mean" else 1)


@pytest.mark.parametrize(
  ("name", "rows"), [*((name, "mean") for name in MODELS), ("pooled", "sum")]
)
def test_matrices_are_the_mean_of_gradient_products(name, rows):
  p, fisher = fitted(name, rows)
  grads = oracles.gradients(p)
  assert fisher.examples == N and set(fisher.matrices) == set(p.found.blocks)
  for k, block in p.found.blocks.items():
    want = expected(p, k, rows)
    np.testing.assert_allclose(fisher.matrices[k], want, rtol=1e-9, atol=1e-14)
    axes = (0, *range(1 + len(block.stack), grads[k].ndim))
    squares = np.square(np.asarray(grads[k])).mean(axis=axes)
    np.testing.assert_allclose(fisher.squares[k], squares, rtol=1e-9)


def test_the_matrix_is_over_the_larger_side():
  p, fisher = fitted("tanh")
  shapes = {k: x.shape for k, x in fisher.matrices.items()}
  assert shapes == {"in/w": (1, 13, 13), "out/w": (1, 6, 6)}
  wide = lambda o, i, kind="matrix": gfim.side(
    p.found.blocks["in/w"]._replace(kind=kind, shape=(1, o, i))
  )
  assert [wide(3, 5), wide(5, 3), wide(4, 4)] == ["inputs", "outputs", "inputs"]
  assert wide(3, 1000, "lookup") == "outputs"  # not the vocabulary squared
  assert wide(3, 5, "diagonal") == "entries"


@pytest.mark.parametrize(
  ("name", "damping"),
  [*((name, DAMPINGS[0]) for name in MODELS), ("pooled", DAMPINGS[1])],
)
def test_responses_and_self_influence_are_those_of_dense_inverses(
  name, damping
):
  p, fisher = fitted(name)
  response, infos = gfim.inverse(fisher, damping)
  grads = oracles.gradients(p)
  got, total = response(grads), np.zeros(N)
  for k, block in p.found.blocks.items():
    matrix, delta = expected(p, k), damping.value
    g = np.asarray(grads[k])
    if damping.kind == "relative":
      axes = (0, *range(1 + len(block.stack), g.ndim))
      delta = (
        damping.value * np.square(g).mean(axis=axes)[..., None, None, None]
      )
    inverse = np.linalg.inv(matrix + delta * np.eye(matrix.shape[-1]))
    spec = "n...oi,...ij->n...oj"
    if gfim.side(block) == "outputs":
      spec = "n...oi,...op->n...pi"
    want = np.einsum(spec, g, inverse)
    np.testing.assert_allclose(got[k], want, rtol=1e-7, atol=1e-10)
    total += (g * want).reshape(N, -1).sum(axis=1)
    assert (infos[k].status == Status.CONVERGED).all()
  score = gfim.self_influence(p.found, p.objective)
  values = score(p.params, p.data, response, loop=Loop(batch_size=4))
  np.testing.assert_allclose(values, total, rtol=1e-7)


def test_the_fisher_of_independent_rows_is_inverted_exactly():
  """Gaussian labels of a linear model: the Fisher is I_R ⊗ E[x xᵀ]."""
  p = oracles.problem("linear", "gaussian")
  fisher = gfim.fitter(p.found, p.objective, labels="exact")(p.params, p.data)
  damping = spectral.relative(0.1)
  response, _ = gfim.inverse(fisher, damping)
  (name,) = p.found.blocks
  whole = dense.dense_ggn(p.objective, p.params, p.data)
  matrix = oracles.in_blocks(p, whole)[name]
  delta = 0.1 * np.trace(matrix) / len(matrix)
  v = oracles.flat(oracles.gradients(p))[name]
  want = np.linalg.solve(matrix + delta * np.eye(len(matrix)), v.T).T
  got = oracles.flat(response(oracles.gradients(p)))[name]
  np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize("rows", ["mean", "sum"])
def test_one_row_is_the_fisher_itself(rows):
  objective = Objective(
    lambda params, ex: jnp.tanh(params["w"] @ ex["x"]),
    likelihoods.gaussian(),
    lambda ex: ex["y"],
  )
  rng = np.random.default_rng(0)
  data = {"x": rng.normal(size=(N, 4)), "y": rng.normal(size=(N, 1))}
  params = {"w": jnp.asarray(rng.normal(size=(1, 4)))}
  found = blocks.trace(objective.outputs, params, streams.example(data))
  fit = gfim.fitter(found, objective, rows=rows)
  response, _ = gfim.inverse(fit(params, data), spectral.absolute(0.05))
  one = jax.vmap(jax.grad(objective.loss), (None, 0))
  g = np.asarray(one(params, jax.tree.map(jnp.asarray, data))["w"])[:, 0]
  want = np.linalg.solve(g.T @ g / N + 0.05 * np.eye(4), g.T).T
  got = np.asarray(response({"w": jnp.asarray(g)[:, None, None]})["w"])
  np.testing.assert_allclose(got[:, 0, 0], want, rtol=1e-9)


def test_leaving_out_the_one_over_rows_damps_that_much_less():
  p, mean = fitted("tanh")
  _, summed = fitted("tanh", "sum")
  v = oracles.gradients(p)
  (name, rows) = ("in/w", 5)
  plain, _ = gfim.inverse(summed, spectral.relative(0.1))
  less, _ = gfim.inverse(mean, spectral.relative(0.1 / rows))
  np.testing.assert_allclose(rows * plain(v)[name], less(v)[name], rtol=1e-9)


def test_scores_go_through_the_engine():
  p, fisher = fitted("pooled")
  response, _ = gfim.inverse(fisher, DAMPINGS[0])
  score = influence.scorer(p.found, p.objective)
  found = score(p.params, p.data, p.data, {"hyperinf": response})["hyperinf"]
  grads = oracles.gradients(p)
  flat = lambda x: np.concatenate(
    [v for _, v in sorted(oracles.flat(x).items())], 1
  )
  want = flat(grads) @ flat(response(grads)).T / N
  np.testing.assert_allclose(found.values, want, rtol=1e-8, atol=1e-12)
  assert found.damping == DAMPINGS[0] and found.labels.kind == "empirical"


def test_a_layer_without_gradient_responds_with_zero():
  p = oracles.problem("tanh")
  still = p.params | {"out": jax.tree.map(jnp.zeros_like, p.params["out"])}
  fisher = gfim.fitter(p.found, p.objective)(still, p.data)
  response, infos = gfim.inverse(fisher, spectral.relative(0.1))
  got = response(oracles.gradients(p))
  assert not got["in/w"].any() and got["out/w"].any()
  assert np.isfinite(infos["in/w"].residual).all()


def test_diagonal_blocks_keep_their_entries():
  """A kernel and its transpose in one loss have no common coordinates."""
  objective = Objective(
    lambda p, ex: p["w"].T @ jnp.tanh(p["w"] @ ex["x"]),
    likelihoods.gaussian(),
    lambda ex: ex["y"],
  )
  rng = np.random.default_rng(0)
  data = {"x": rng.normal(size=(N, 3)), "y": rng.normal(size=(N, 3))}
  params = {"w": jnp.asarray(rng.normal(size=(3, 3)))}
  found = blocks.trace(objective.outputs, params, streams.example(data))
  fisher = gfim.fitter(found, objective)(params, data)
  response, infos = gfim.inverse(fisher, spectral.relative(0.1))
  one = jax.vmap(jax.grad(objective.loss), (None, 0))
  g = np.asarray(one(params, jax.tree.map(jnp.asarray, data))["w"])
  squares = np.square(g.reshape(N, 9)).mean(axis=0)
  want = g.reshape(N, 9) / (squares + 0.1 * squares.mean())
  got = response({"w": jnp.asarray(g).reshape(N, 1, 9, 1)})["w"]
  np.testing.assert_allclose(got.reshape(N, 9), want, rtol=1e-9)
  assert infos == {}
  values = gfim.self_influence(found, objective)(params, data, response)
  np.testing.assert_allclose(
    values, (want * g.reshape(N, 9)).sum(axis=1), rtol=1e-9
  )


def test_bad_choices_say_what_there_is():
  p = oracles.problem("linear")
  with pytest.raises(ValueError, match=r"rows='median'.*'mean', 'sum'"):
    gfim.fitter(p.found, p.objective, rows="median")
  fit = gfim.fitter(p.found, p.objective, labels="sampled")
  with pytest.raises(ValueError, match="give a key"):
    fit(p.params, p.data)
