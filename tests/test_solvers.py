"""Responses by solving with the exact curvature, from query to scores."""

import functools

import jax
import numpy as np
import oracles
import pytest

from tda import meshes
from tda.attribution import influence, methods
from tda.attribution.responses import Cosine
from tda.curvature import dense, fitting
from tda.inverse import datainf, gfim, solvers, spectral
from tda.inverse.iterative import Status
from tda.inverse.solvers import Budget
from tda.streams import Loop

N, Q = 10, 4
TIGHT = Budget(limit=200, tolerance=1e-10, microbatch=4, minibatch=N)


@pytest.fixture(autouse=True, scope="module")
def exactly():
  with jax.enable_x64(True):
    yield


@functools.cache
def problem():
  p = oracles.problem("tanh")
  return p, {"x": p.data["x"][:Q] + 1, "y": p.data["y"][:Q]}


def gradients(p, rows):
  one = lambda ex: jax.flatten_util.ravel_pytree(
    jax.grad(p.objective.loss)(p.params, ex)
  )[0]
  return np.asarray(jax.vmap(one)(rows))


def attribute(names, dampings, **options):
  p, queries = problem()
  return methods.attribute(
    p.objective,
    p.params,
    p.data,
    queries,
    methods=names,
    dampings=dampings,
    key=jax.random.key(0),
    **options,
  )


@functools.cache
def expected(damping):
  """Scores by a dense solve."""
  p, queries = problem()
  matrix = dense.dense_ggn(p.objective, p.params, p.data, "exact")
  solved = np.linalg.solve(
    matrix + damping * np.eye(len(matrix)), gradients(p, queries).T
  )
  return gradients(p, p.data) @ solved / N


@pytest.mark.parametrize("loop", [Loop(N), Loop(4, microbatch=2)])
def test_scores_of_conjugate_gradients_are_those_of_a_dense_solve(loop):
  dampings = [spectral.absolute(x) for x in (0.1, 0.01)]
  found = attribute(["cg"], dampings, budget=TIGHT, query_batch=3, loop=loop)
  for damping in dampings:
    scores = found[f"cg@{damping.value:g}"]
    np.testing.assert_allclose(
      scores.values, expected(damping.value), rtol=1e-7, atol=1e-10
    )
    assert scores.damping == damping
    assert scores.labels.kind == "exact"
    assert scores.info.residual.shape == (Q,)
    assert (scores.info.status == Status.CONVERGED).all()


@pytest.mark.parametrize("name", ["none", "diagonal", "kfac"])
def test_any_preconditioner_leads_to_the_same_answer(name):
  budget = TIGHT._replace(preconditioner=name)
  found = attribute(["cg"], [spectral.absolute(0.1)], budget=budget)["cg"]
  np.testing.assert_allclose(found.values, expected(0.1), rtol=1e-7, atol=1e-10)


def test_series_reach_the_same_answer_from_minibatches_of_everything():
  damping = [spectral.absolute(0.1)]
  budget = TIGHT._replace(limit=400)
  found = attribute(["lissa"], damping, budget=budget)["lissa"]
  scale = np.abs(expected(0.1)).max()
  assert np.abs(found.values - expected(0.1)).max() < 1e-3 * scale
  astra = attribute(["astra"], damping, budget=TIGHT)["astra"]
  assert np.abs(astra.values - expected(0.1)).max() < 1e-2 * scale
  assert (astra.info.status == Status.LIMIT).all()


SOLVERS = ("cg", "astra", "lissa", "arnoldi")


@functools.cache
def short(shape=None):
  """A few iterations of every solver, on a mesh or on one device."""
  loop = Loop(8, mesh=meshes.mesh(*shape)) if shape else Loop()
  budget = TIGHT._replace(limit=40, minibatch=4)
  damping = [spectral.absolute(0.1)]
  return attribute(list(SOLVERS), damping, budget=budget, loop=loop)


@pytest.mark.parametrize("shape", [(4, 2), (8, 1)])
def test_solvers_on_devices(shape):
  """Ten rows are filled up to as many on every device of four, or eight."""
  spread, plain = short(shape), short()
  for name in SOLVERS:
    want = plain[name].values
    np.testing.assert_allclose(
      spread[name].values, want, rtol=1e-7, atol=1e-9 * np.abs(want).max()
    )
    info = plain[name].info
    if info is not None:
      # One more or less where rounding decides at the tolerance.
      off = np.abs(spread[name].info.iterations - info.iterations)
      assert off.max() <= 1


def test_a_solver_is_a_response_like_any_other():
  """Also under a cosine, and called for its blocks alone."""
  p, queries = problem()
  make = solvers.maker(p.found, p.objective, "cg", budget=TIGHT)
  solver = make(p.params, p.data, 0.1, label="progress")
  score = influence.scorer(p.found, p.objective)
  found = score(
    p.params, p.data, queries, {"cg": solver, "cosine": Cosine(solver)}
  )
  rows, columns = gradients(p, p.data), found["cg"].values * N
  np.testing.assert_allclose(columns / N, expected(0.1), rtol=1e-7, atol=1e-10)
  ratio = (
    found["cosine"].values
    / columns
    * np.linalg.norm(rows, axis=1, keepdims=True)
  )
  np.testing.assert_allclose(ratio, np.tile(ratio[:1], (N, 1)), rtol=1e-7)
  assert (found["cosine"].info.status == Status.CONVERGED).all()


def test_arnoldi_of_every_eigenvector_is_a_dense_solve():
  damping = [spectral.absolute(0.1)]
  found = attribute(["arnoldi"], damping, budget=TIGHT)["arnoldi"]
  # Where the Hessian is flat the gradients vanish too.
  np.testing.assert_allclose(found.values, expected(0.1), rtol=1e-6, atol=1e-9)
  assert found.damping == damping[0] and found.labels.kind == "exact"
  few = attribute(["arnoldi"], damping, budget=TIGHT._replace(rank=2))
  off = np.abs(few["arnoldi"].values - expected(0.1)).max()
  assert 1e-3 * np.abs(expected(0.1)).max() < off


def test_arnoldi_takes_the_mean_of_relative_dampings():
  p, _ = problem()
  dampings = [spectral.relative(x) for x in (1.0, 0.1)]
  found = attribute(["arnoldi", "diagonal"], dampings, labels="exact")
  fit = fitting.fitter(
    p.found, p.objective, methods=["ekfac"], labels="sampled"
  )
  labels_key = jax.random.split(jax.random.key(0), 3)[0]
  values = fit(p.params, p.data, key=labels_key)["ekfac"].eigenvalues
  mean = np.concatenate([np.ravel(x) for x in values.values()]).mean()
  for damping in dampings:
    scores = found[f"arnoldi@{damping}"].values
    want = expected(float(damping.value * mean))
    np.testing.assert_allclose(scores, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["hyperinf", "datainf"])
def test_other_inverses_by_name_are_those_of_their_fitters(name):
  p, queries = problem()
  damping = spectral.relative(0.1)
  found = attribute([name, "gradient_dot"], [damping], loop=Loop(4))
  if name == "hyperinf":
    fisher = gfim.fitter(p.found, p.objective)(p.params, p.data)
    response = gfim.inverse(fisher, damping)[0]
  else:
    fit = datainf.fitter(p.found, p.objective)
    response = fit(p.params, p.data, damping)
  score = influence.scorer(p.found, p.objective)
  want = score(p.params, p.data, queries, {name: response})[name]
  np.testing.assert_allclose(found[name].values, want.values, rtol=1e-9)
  assert found[name].labels.kind == "empirical"


def test_the_empirical_fisher_can_be_solved_too():
  p, queries = problem()
  make = solvers.maker(
    p.found, p.objective, "cg", kind="empirical", budget=TIGHT
  )
  score = influence.scorer(p.found, p.objective)
  found = score(p.params, p.data, queries, {"cg": make(p.params, p.data, 0.1)})[
    "cg"
  ]
  matrix = dense.dense_ggn(p.objective, p.params, p.data, "empirical")
  solved = np.linalg.solve(
    matrix + 0.1 * np.eye(len(matrix)), gradients(p, queries).T
  )
  np.testing.assert_allclose(
    found.values, gradients(p, p.data) @ solved / N, rtol=1e-7, atol=1e-10
  )
  assert found.labels.kind == "empirical"


def test_bad_arguments():
  p, _ = problem()
  with pytest.raises(ValueError, match="unknown preconditioner 'lbfgs'"):
    attribute(
      ["cg"],
      [spectral.absolute(0.1)],
      budget=TIGHT._replace(preconditioner="lbfgs"),
    )
  with pytest.raises(ValueError, match="unknown solver 'newton'"):
    solvers.maker(p.found, p.objective, "newton")
  astra = solvers.maker(p.found, p.objective, "astra")
  with pytest.raises(ValueError, match="starts from a fitted curvature"):
    astra(p.params, p.data, 0.1, key=jax.random.key(0))
  lissa = solvers.maker(p.found, p.objective, "lissa")
  with pytest.raises(ValueError, match="give a key"):
    lissa(p.params, p.data, 0.1)
  with pytest.raises(ValueError, match="draw at random: give a key"):
    methods.attribute(p.objective, p.params, p.data, p.data, methods=["cg"])
