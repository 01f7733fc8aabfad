"""Inverses by products alone, against float64 eigenvalues and inverses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.polynomial import chebyshev

from tda import meshes
from tda.inverse import hyperpower, polynomials
from tda.inverse.iterative import Status

D = 24
ORDERS = (2, 3, 9)
PAPER = 5e-5  # HyperINF's start


def turned(values, seed=0):
  """A symmetric float64 matrix of these eigenvalues."""
  values = np.asarray(values, float)
  draw = np.random.default_rng(seed).normal(size=(len(values),) * 2)
  q, _ = np.linalg.qr(draw)
  return (q * values) @ q.T


def simulated(n, dim=512, seed=0):
  """The matrix of Zhou et al. 2024's simulation, A = Σ a aᵀ / N + 0.01 I."""
  rows = np.random.default_rng(seed).normal(size=(n, dim))
  return rows.T @ rows / n + 0.01 * np.eye(dim)


SPECTRA = {
  "flat": np.linspace(1, 2, D),
  "wide": np.geomspace(1, 1e-3, D),
  "one above many": np.r_[1, np.full(D - 1, 0.4)],
  "low rank, damped": np.r_[np.ones(4), np.full(D - 4, 0.01)],
  "identity": np.ones(D),
}


def solve(a, **options):
  """Step by step, which takes less time than compiling the loop."""
  with jax.disable_jit():
    x, info = hyperpower.inverse(jnp.asarray(a), **options)
  return np.asarray(x), jax.tree.map(np.asarray, info)


def trace(method, a, steps):
  """The iterates of so many steps, status or not."""
  with jax.disable_jit():
    states = [method.init(jnp.asarray(a))]
    running = jnp.full_like(states[0].status, int(Status.RUNNING))
    for _ in range(steps):
      states.append(method.step(states[-1]._replace(status=running)))
  return states


@pytest.mark.parametrize("width", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("order", polynomials.ORDERS)
def test_a_step_makes_the_residual_a_power_or_chebyshevs(order, width):
  with jax.enable_x64(True):
    r = turned(np.linspace(-0.9, 1, D))
    s0, rest, bound = polynomials.factor(
      order, jnp.asarray(r), jnp.asarray(width), jnp.matmul
    )
    found = np.eye(D) - (np.eye(D) - r) @ (s0 * np.eye(D) + np.asarray(rest))
  values, q = np.linalg.eigh(r)
  t = lambda x: chebyshev.chebval(x, [0] * order + [1])
  expected = t(values / width) / t(1 / width) if width else values**order
  np.testing.assert_allclose(found, (q * expected) @ q.T, atol=1e-12)
  largest = 1 / t(1 / width) if width else 0
  np.testing.assert_allclose(bound, largest, rtol=1e-12)


@pytest.mark.parametrize("order", [2, 3, 4, 7, 9])
def test_the_residual_becomes_its_power(order):
  with jax.enable_x64(True):
    a = turned(SPECTRA["flat"])
    start = jnp.asarray(turned(np.linspace(0.2, 0.6, D), seed=1) / 2)
    before, after = trace(hyperpower.method(order, start=start), a, 1)
    residual = lambda state: np.eye(D) - a @ np.asarray(state.x)
    expected = np.linalg.matrix_power(residual(before), order)
    np.testing.assert_allclose(residual(after), expected, atol=1e-13)


@pytest.mark.parametrize("order", polynomials.ORDERS)
def test_a_step_takes_the_products_it_says(order):
  method = hyperpower.method(order)
  state = method.init(jnp.eye(D))
  text = str(jax.make_jaxpr(method.step)(state))
  lines = [x for x in text.splitlines() if "= dot_general" in x]
  found = [x for x in lines if f"f32[{D},{D}]" in x.split("= dot_general")[0]]
  assert len(found) == polynomials.products(order)


@pytest.mark.parametrize("order", ORDERS)
def test_inverses_in_float64(order):
  a = np.stack([turned(values) for values in SPECTRA.values()])
  with jax.enable_x64(True):
    x, info = solve(a, order=order)
  norm = lambda x: np.linalg.norm(x, axis=(1, 2))
  assert not info.status.any()
  error = norm(x - np.linalg.inv(a)) / norm(x)
  assert (error < 1e-13 * np.linalg.cond(a)).all()
  true = norm(np.eye(D) - a @ x) / np.sqrt(D)
  np.testing.assert_allclose(info.residual, true, atol=1e-14)


@pytest.mark.parametrize("order", [2, 9])
def test_float32_is_right_to_its_condition_and_does_not_drift(order):
  a = turned(SPECTRA["wide"]).astype(np.float32)
  x, info = solve(a, order=order, floor=1e-3)
  exact = np.linalg.inv(a.astype(float))
  limit = np.finfo(np.float32).eps * np.linalg.cond(a)
  error = lambda x: np.linalg.norm(x - exact) / np.linalg.norm(exact)
  assert info.status == Status.CONVERGED and error(x) < limit
  states = trace(hyperpower.method(order, floor=1e-3), a, 60)
  assert error(np.asarray(states[-1].x)) < limit


def test_the_simulation_of_the_paper():
  """Figures for dimension 512 of the spec; its iteration 0 is the first."""
  expected = {
    12800: {
      0: (22.9, 0.05),
      10: (20.8, 0.05),
      14: (5.5, 0.05),
      16: (0.12, 5e-3),
    },
    200: {0: (1934, 0.5), 20: (678, 0.5), 22: (29, 0.5)},
  }
  for n, figures in expected.items():
    ratios = {k: [] for k in figures}
    for seed in range(3):
      a = simulated(n, seed=seed).astype(np.float32)
      v = np.random.default_rng(seed + 10).normal(size=(512, 32))
      values, q = np.linalg.eigh(a.astype(float))
      projected = q.T @ v
      size = np.linalg.norm(projected / values[:, None], axis=0)
      states = trace(hyperpower.method(2, start=PAPER), a, max(figures) + 1)
      for k in figures:
        left = (1 - PAPER * values) ** (2.0 ** (k + 1)) / values
        exact = (q * left) @ projected  # A⁻¹ v − X v
        found = (q / values) @ projected - np.asarray(states[k + 1].x) @ v
        error = np.linalg.norm(found - exact, axis=0)
        assert (error < 1e-6 * values[-1] / values[0] * size).all()
        ratios[k] += [*(np.linalg.norm(found, axis=0) / size)]
    first = figures[0][0]
    for k, (figure, digits) in figures.items():
      # One draw of v against the spread of 96, and the figures' own digits.
      spread = 4 * np.std(ratios[k]) + digits / first
      assert abs(np.mean(ratios[k]) - figure / first) < spread + 5e-3


@pytest.mark.parametrize("order", ORDERS)
def test_a_start_beyond_two_over_the_largest_diverges_and_is_said(order):
  a = np.stack([turned(np.linspace(0.5, 5, D))] * 2).astype(np.float32)
  start = np.array([1.9, 2.1], np.float32) / 5
  x, info = solve(a, order=order, start=jnp.asarray(start))
  assert [*info.status] == [Status.CONVERGED, Status.DIVERGED]
  assert info.iterations[1] < 10 and np.isfinite(x).all()
  assert np.isfinite(info.residual).all() and info.residual[1] > 0.1
  np.testing.assert_allclose(x[0], np.linalg.inv(a[0]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("n", [200, 12800])
def test_what_the_papers_start_costs(n):
  a = simulated(n).astype(np.float32)
  u = float(hyperpower.largest(jnp.asarray(a)))
  count = lambda **options: int(solve(a, **options)[1].iterations)
  paper, ours = count(order=2, start=PAPER), count(order=2, start=1 / u)
  assert abs(paper - ours - np.log2(1 / (PAPER * u))) <= 1.5
  assert 9 <= paper - ours <= 12 and 20 <= paper <= 26
  for order in ORDERS:
    cost = polynomials.products(order) * count(order=order, floor=0.01)
    assert cost <= 0.55 * 2 * paper


def test_the_papers_start_diverges_above_four_ten_thousand():
  a = turned(np.linspace(0.2, 1, D))
  a = np.stack([3.9e4 * a, 4.1e4 * a]).astype(np.float32)
  _, info = solve(a, order=2, start=PAPER)
  assert [*info.status] == [Status.CONVERGED, Status.DIVERGED]
  assert not solve(a, order=2)[1].status.any()


def test_the_bound_holds_and_betters_the_frobenius_norm():
  tight = {"one above many", "identity"}
  for name, values in SPECTRA.items():
    with jax.enable_x64(True):
      u = float(hyperpower.largest(jnp.asarray(turned(values))))
    assert max(values) <= u * (1 + 1e-12)
    assert u <= np.linalg.norm(values) * (1 + 1e-12)
    assert (u == pytest.approx(max(values))) == (name in tight)


def test_the_scale_of_least_residual_is_not_safe():
  a = turned(SPECTRA["one above many"]).astype(np.float32)
  scale = np.trace(a) / np.linalg.norm(a) ** 2
  assert solve(a, start=scale)[1].status == Status.DIVERGED
  assert solve(a)[1].status == Status.CONVERGED


@pytest.mark.parametrize("order", ORDERS)
def test_any_floor_converges_and_costs_half_a_logarithm(order):
  low = 1e-3
  floors = low * np.array([1, 1e-4, 1e-2, 100, 1e6])
  wrong = np.array([1, 1e4, 100, 100, 1 / low])  # none is above λ_max
  with jax.enable_x64(True):
    a = np.stack([turned(np.geomspace(1, low, D))] * len(floors))
    _, info = solve(a, order=order, floor=jnp.asarray(floors))
  assert not info.status.any()
  cost = 0.5 * np.log(wrong) / np.log(order)
  assert (abs(info.iterations - info.iterations[0] - cost) <= 1.5).all()


def damaged():
  """Matrices [B, D, D] with the status that each should end with."""
  good = turned(SPECTRA["wide"])
  skew = good + np.triu(np.full((D, D), 0.01), 1)
  missing = good.copy()
  missing[2, 3] = np.nan
  return {
    "good": (good, Status.CONVERGED),
    "zero": (0 * good, Status.INDEFINITE),
    "singular": (turned(np.r_[np.ones(D - 1), 0]), Status.INDEFINITE),
    "nearly": (turned(np.geomspace(1, 1e-9, D)), Status.INDEFINITE),
    "low rank": (turned(np.r_[np.ones(5), np.zeros(D - 5)]), Status.INDEFINITE),
    "negative": (turned(np.r_[np.ones(D - 1), -1e-3]), Status.INDEFINITE),
    "opposite": (-good, Status.INDEFINITE),
    "asymmetric": (skew, Status.ASYMMETRIC),
    "not a number": (missing, Status.DIVERGED),
    "tiny": (1e-30 * good, Status.CONVERGED),
    "huge": (1e25 * good, Status.CONVERGED),
    "last": (good, Status.CONVERGED),
  }


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
def test_bad_matrices_are_named_and_leave_the_others_alone(order, dtype):
  cases = damaged()
  a = np.stack([a for a, _ in cases.values()]).astype(np.float32)
  x, info = solve(a, order=order, dtype=dtype)
  found = {k: Status(int(s)) for k, s in zip(cases, info.status, strict=True)}
  assert found == {k: status for k, (_, status) in cases.items()}
  assert np.isfinite(x).all()
  alone, single = solve(a[0], order=order, dtype=dtype)
  np.testing.assert_allclose(x[0], x[-1])
  np.testing.assert_allclose(x[0], alone, rtol=1e-3, atol=1e-3)
  # Rounding, which differs in a batch, may decide on the last iteration.
  assert abs(info.iterations[0] - single.iterations) <= 1


def test_limits_and_tolerances_are_kept():
  a = turned(SPECTRA["wide"]).astype(np.float32)
  _, short = solve(a, start=PAPER, limit=4)
  assert (short.status, short.iterations) == (Status.LIMIT, 4)
  _, rough = solve(a, order=2, tolerance=0.02)
  _, full = solve(a, order=2)
  assert rough.status == Status.CONVERGED and rough.residual <= 0.02
  assert rough.iterations < full.iterations
  _, beyond = solve(a, tolerance=1e-12)
  assert beyond.status == Status.LIMIT and beyond.iterations < 20


@pytest.mark.parametrize("order", ORDERS)
def test_bfloat16_is_corrected_to_float32(order):
  a = np.stack([simulated(n, 128) for n in (60, 200, 3200)]).astype(np.float32)
  exact = np.linalg.inv(a.astype(float))
  norm = lambda x: np.linalg.norm(x, axis=(1, 2))
  x, info = solve(a, order=order, floor=0.01, dtype=jnp.bfloat16)
  plain, _ = solve(a, order=order, floor=0.01)
  assert (info.status == Status.CONVERGED).all()
  assert (norm(x - exact) <= 2 * norm(plain - exact)).all()
  options = {"start": 0.1, "tolerance": 0.0}
  narrow, wide = (
    np.asarray(trace(hyperpower.method(order, **options, dtype=d), a, 1)[1].x)
    for d in (jnp.bfloat16, None)
  )
  difference = norm(narrow - wide) / norm(wide)
  assert ((difference > 1e-5) & (difference < 2e-2)).all()
  assert narrow.dtype == np.float32


@pytest.mark.parametrize("spec", [P("data"), P(None, None, "data")])
def test_sharded_over_eight_devices(spec):
  a = np.stack([turned(SPECTRA["wide"], seed) for seed in range(8)])
  a = a.astype(np.float32)
  where = NamedSharding(meshes.mesh(data=8), spec)
  run = jax.jit(lambda a: hyperpower.inverse(a, order=9))
  x, info = run(jax.device_put(a, where))
  alone, single = solve(a, order=9)
  assert x.sharding.shard_shape(x.shape) != x.shape
  assert (abs(info.iterations - single.iterations) <= 1).all()
  np.testing.assert_allclose(x, alone, rtol=1e-3, atol=1e-2)


def test_matrices_of_equal_size_are_inverted_together():
  rng = np.random.default_rng(0)
  shapes = {"a": (6, 6), "b": (2, 3, 6, 6), "c": (4, 9, 9), "d": (6, 6)}
  draws = {k: rng.normal(size=(*s[:-1], 20)) for k, s in shapes.items()}
  damping = {k: rng.uniform(0.1, 1, s[:-2]) for k, s in shapes.items()}
  matrices = {
    k: jnp.asarray(
      v @ np.swapaxes(v, -1, -2) / 20
      + damping[k][..., None, None] * np.eye(v.shape[-2]),
      jnp.float32,
    )
    for k, v in draws.items()
  }
  floor = {k: jnp.asarray(v, jnp.float32) for k, v in damping.items()}
  x, info = hyperpower.inverses(matrices, floor=floor, order=2)
  assert list(x) == ["a", "b", "d", "c"]
  for k, a in matrices.items():
    expected = np.linalg.inv(np.asarray(a, float))
    np.testing.assert_allclose(x[k], expected, rtol=1e-3, atol=1e-5)
    assert info[k].status.shape == shapes[k][:-2]
    assert not info[k].status.any()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"order": 1}, "got 1"),
    ({"order": 0}, "got 0"),
    ({"order": 10}, "got 10"),
    ({"start": np.ones(3)}, "start must be a scale"),
  ],
)
def test_wrong_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    hyperpower.inverse(jnp.eye(D), **options)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 0, 0)])
def test_wrong_shapes_are_refused(shape):
  with pytest.raises(ValueError, match=r"a must be \[\.\.\., D, D\]"):
    hyperpower.inverse(jnp.zeros(shape))
