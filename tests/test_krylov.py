"""Iterative solvers on explicit matrices, in float64 unless said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda.inverse import block_krylov, iterative, krylov, neumann
from tda.inverse.iterative import Status

D, Q = 24, 5


@pytest.fixture(autouse=True, scope="module")
def exactly():
  with jax.enable_x64(True):
    yield


def matrix(condition=1e3, d=D, seed=0):
  rng = np.random.default_rng(seed)
  q, _ = np.linalg.qr(rng.normal(size=(d, d)))
  return (q * np.geomspace(1, 1 / condition, d)) @ q.T


def split(rows):
  """Vectors as a pytree of two leaves."""
  return {"a": rows[:, :9].reshape(-1, 3, 3), "b": rows[:, 9:]}


def joined(tree):
  return np.concatenate([x.reshape(x.shape[0], -1) for x in tree.values()], 1)


def operator(a):
  a = jnp.asarray(a)
  return lambda v: split(
    jnp.concatenate([x.reshape(x.shape[0], -1) for x in v.values()], 1) @ a.T
  )


def right_hand_sides(seed=1):
  return split(jnp.asarray(np.random.default_rng(seed).normal(size=(Q, D))))


ALONE, JOINT = (
  krylov.conjugate_gradients,
  block_krylov.block_conjugate_gradients,
)
each = pytest.mark.parametrize("gradients", [ALONE, JOINT])


def solve(method, b, limit):
  return jax.jit(lambda b: iterative.run(method, b, limit))(b)


@each
@pytest.mark.parametrize("preconditioned", [False, True])
def test_conjugate_gradients_solve(gradients, preconditioned):
  a, b = matrix(), right_hand_sides()
  inverse = np.linalg.inv(a + 1e-2 * matrix(10, seed=3))
  method = gradients(
    operator(a),
    precondition=operator(inverse) if preconditioned else None,
    tolerance=1e-10,
  )
  x, info = solve(method, b, 200)
  expected = np.linalg.solve(a, joined(b).T).T
  np.testing.assert_allclose(joined(x), expected, rtol=1e-6)
  assert (info.status == Status.CONVERGED).all()
  assert (info.residual < 1e-9).all()


def test_a_preconditioner_saves_iterations():
  a, b = matrix(1e4), right_hand_sides()
  near = operator(np.linalg.inv(a + 1e-4 * np.eye(D)))
  plain, helped = (
    solve(ALONE(operator(a), precondition=p), b, 200)[1] for p in (None, near)
  )
  assert (3 * helped.iterations <= plain.iterations).all()


def test_queries_stop_on_their_own():
  """An eigenvector takes one step, zero none; each ends as if alone."""
  a, b = matrix(), right_hand_sides()
  rows = joined(b)
  rows[1], rows[2] = np.linalg.eigh(a)[1][:, 3], 0
  b = split(jnp.asarray(rows))
  method = krylov.conjugate_gradients(operator(a), tolerance=1e-8)
  x, info = solve(method, b, 100)
  assert info.iterations[1] == 1
  assert info.iterations[2] == 0
  assert info.residual[2] == 0
  assert (joined(x)[2] == 0).all()
  for i in range(Q):
    one = jax.tree.map(lambda v, i=i: v[i : i + 1], b)
    alone, said = solve(method, one, 100)
    np.testing.assert_allclose(joined(alone)[0], joined(x)[i], rtol=1e-6)
    assert abs(int(said.iterations[0] - info.iterations[i])) <= 1


@each
def test_tiny_right_hand_sides_in_float32(gradients):
  """Squares of their entries underflow."""
  a = np.float32(matrix(10))
  b = jax.tree.map(lambda v: np.float32(v * 1e-25), right_hand_sides())
  method = gradients(operator(a), tolerance=1e-4)
  x, info = solve(method, b, 50)
  assert (info.status == Status.CONVERGED).all()
  expected = np.linalg.solve(np.float64(a), np.float64(joined(b)).T).T
  errors = np.linalg.norm(np.float64(joined(x)) - expected, axis=1)
  sizes = np.linalg.norm(np.float64(joined(b)), axis=1)
  assert (errors <= 2 * 10 * 1e-4 * sizes).all()  # ‖A⁻¹‖ is 10


@each
def test_what_cannot_be_solved_is_said(gradients):
  b = right_hand_sides()
  a = matrix()
  bent = a - 0.5 * np.eye(D)
  skew = a + 0.3 * np.triu(np.ones((D, D)), 1)
  with_nan = np.full((D, D), np.nan)
  for bad, status in (
    (bent, Status.INDEFINITE),
    (skew, Status.ASYMMETRIC),
    (with_nan, Status.DIVERGED),
  ):
    x, info = solve(gradients(operator(bad)), b, 100)
    assert (info.status == status).all()
    assert np.isfinite(joined(x)).all()
  _, info = solve(gradients(operator(a), tolerance=1e-9), b, 3)
  assert (info.status == Status.LIMIT).all()
  assert (info.iterations == 3).all()


def test_a_block_searches_one_space():
  """D of Q directions each span everything after D / Q products."""
  a, b = matrix(1e3), right_hand_sides()
  method = JOINT(operator(a), tolerance=1e-9)
  _, info = solve(method, b, 100)
  assert (info.iterations <= -(-D // Q) + 1).all()
  assert (info.residual < 1e-8).all()
  _, alone = solve(ALONE(operator(a), tolerance=1e-9), b, 100)
  assert (3 * info.iterations <= alone.iterations).all()


def test_one_query_of_a_block_is_plain_conjugate_gradients():
  a = matrix()
  one = jax.tree.map(lambda v: v[:1], right_hand_sides())
  for steps in (1, 4, 9):
    x, _ = solve(JOINT(operator(a)), one, steps)
    y, _ = solve(ALONE(operator(a)), one, steps)
    np.testing.assert_allclose(joined(x), joined(y), rtol=1e-8)


def test_equal_and_zero_and_broken_right_hand_sides_of_a_block():
  """They share a space with the others without harm to them."""
  a, rows = matrix(), joined(right_hand_sides())
  rows[1], rows[2], rows[3] = 3 * rows[0], 0, np.nan
  b = split(jnp.asarray(rows))
  x, info = solve(JOINT(operator(a), tolerance=1e-10), b, 100)
  expected = np.linalg.solve(a, rows[[0, 1, 2, 4]].T).T
  np.testing.assert_allclose(joined(x)[[0, 1, 2, 4]], expected, rtol=1e-6)
  assert info.status.tolist() == [0, 0, 0, Status.DIVERGED, 0]
  assert info.iterations[2] == 0
  assert np.isnan(info.residual[3])


def test_a_block_in_float32_needs_a_third_of_the_iterations():
  a = np.float32(matrix(1e3, d=120))
  b = jnp.asarray(np.random.default_rng(4).normal(size=(8, 120)), jnp.float32)
  joint, alone = (
    solve(gradients(lambda v: v @ a, tolerance=1e-3), b, 200)[1]
    for gradients in (JOINT, ALONE)
  )
  assert (joint.status == Status.CONVERGED).all()
  assert (joint.residual < 2e-3).all()
  assert 3 * joint.iterations.max() <= alone.iterations.min()


def test_lanczos_finds_the_leading_eigenpairs():
  a = matrix(1e2)
  values, vectors = np.linalg.eigh(a)
  start = jax.tree.map(lambda v: v[:1], right_hand_sides())
  found = krylov.lanczos(operator(a), start, D, 4)
  np.testing.assert_allclose(found.values, values[::-1][:4], rtol=1e-10)
  overlap = np.abs(joined(found.vectors) @ vectors[:, ::-1][:, :4])
  np.testing.assert_allclose(overlap, np.eye(4), atol=1e-8)
  early = krylov.lanczos(operator(a), start, 10, 4)
  errors = np.abs(early.values - values[::-1][:4])
  assert (errors <= early.residuals + 1e-12).all()


@pytest.mark.parametrize("complement", [False, True])
def test_low_rank_inverse(complement):
  a, b = matrix(1e2), right_hand_sides()
  start = jax.tree.map(lambda v: v[:1], right_hand_sides(2))
  spectrum = krylov.lanczos(operator(a), start, D, 4)
  response = krylov.low_rank(spectrum, 0.1, complement=complement)
  values, vectors = np.linalg.eigh(a)
  kept = np.arange(D) >= D - 4
  weights = np.where(kept, 1 / (values + 0.1), 10.0 if complement else 0.0)
  expected = joined(b) @ (vectors * weights) @ vectors.T
  np.testing.assert_allclose(joined(response(b)), expected, atol=1e-7)
  with pytest.raises(ValueError, match="damping=0"):
    krylov.low_rank(spectrum, 0.0)
  with pytest.raises(ValueError, match="keep=5 of steps=4"):
    krylov.lanczos(operator(a), start, 4, 5)


@pytest.mark.parametrize("step", [1.9, 2.1])
def test_the_series_converges_below_two_over_the_largest(step):
  a, b = matrix(10), right_hand_sides()
  method = neumann.lissa(lambda v, k: operator(a)(v), step=step, tolerance=1e-9)
  x, info = solve(method, b, 2000)
  if step > 2:
    assert (info.status == Status.DIVERGED).all()
    assert np.isfinite(joined(x)).all()
    return
  assert (info.status == Status.CONVERGED).all()
  expected = np.linalg.solve(a, joined(b).T).T
  np.testing.assert_allclose(joined(x), expected, rtol=1e-5)


def test_truncating_the_series_is_damping():
  """J steps of size s leave (1 - (1 - s λ)^(J+1)) / λ."""
  a, b = matrix(10), right_hand_sides()
  method = neumann.lissa(lambda v, k: operator(a)(v), step=0.5)
  x, info = solve(method, b, 7)
  values, vectors = np.linalg.eigh(a)
  weights = (1 - (1 - 0.5 * values) ** 8) / values
  expected = joined(b) @ (vectors * weights) @ vectors.T
  np.testing.assert_allclose(joined(x), expected, rtol=1e-9)
  assert (info.status == Status.LIMIT).all()


def test_astra_starts_at_the_preconditioner_and_averages_noise():
  a, b = matrix(1e2), right_hand_sides()
  exact = operator(np.linalg.inv(a))

  def noisy(v, k):
    noise = 1 + 0.2 * jax.random.normal(jax.random.key(k), ())
    return jax.tree.map(lambda x: noise * x, operator(a)(v))

  start = neumann.astra(lambda v, k: operator(a)(v), exact, step=0.1)
  x, info = solve(start, b, 1)
  np.testing.assert_allclose(
    joined(x), np.linalg.solve(a, joined(b).T).T, rtol=1e-8
  )
  method = neumann.astra(noisy, exact, step=0.1, exact=operator(a))
  _, info = solve(method, b, 400)
  assert (info.residual < 0.02).all()


def test_a_safe_step_is_the_inverse_of_the_largest_eigenvalue():
  a, b = matrix(10), right_hand_sides()
  step = neumann.safe_step(lambda v, k: operator(a)(v), b)
  assert 1 <= step < 1.05
  half = operator(np.eye(D) / 2)
  step = neumann.safe_step(
    lambda v, k: operator(a)(v), b, precondition=half, batches=2
  )
  assert 2 <= step < 2.1
