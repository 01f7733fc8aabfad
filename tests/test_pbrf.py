"""Proximal Bregman responses against closed forms, dense solves and L-BFGS."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from scipy import stats

from tda import blocks, likelihoods
from tda.curvature import dense
from tda.evaluation import pbrf

DAMPING = 0.05
KEY = jax.random.key(0)


def directions(p, damping):
  """(G + λ)⁻¹ ∇ℓ_m of every example [N, D] by a dense solve."""
  matrix = dense.dense_ggn(p.objective, p.params, p.data)
  apply = dense.solve(matrix, damping)
  grads = jax.vmap(jax.grad(p.objective.loss), (None, 0))(p.params, p.data)
  return jax.vmap(lambda g: ravel_pytree(apply(g))[0])(grads)


def moved(p, solution):
  """θ − θ_s [D]."""
  return ravel_pytree(solution.params)[0] - ravel_pytree(p.params)[0]


def solve_at(p, example, step, **options):
  """The solution with `step` of the example's weight taken off."""
  options = {"damping": DAMPING, "tolerance": 1e-9, "flat": 0.0} | options
  solve = pbrf.solver(p.found, p.objective, p.params, p.data, **options)
  weights = jnp.ones(oracles.N).at[example].add(-step)
  return jax.jit(solve)(weights, KEY)


def explicit(p, weights, damping):
  """F by its definition, as a function of the flat parameters."""
  flat, unravel = ravel_pytree(p.params)
  outputs = jax.vmap(p.objective.outputs, (None, 0))
  at = outputs(p.params, p.data)
  loss = p.objective.likelihood.loss
  slope = jax.vmap(jax.grad(loss))(at, p.data["y"])

  def value(x):
    y = outputs(unravel(x), p.data)
    losses = jax.vmap(loss)(y, p.data["y"])
    bregman = losses - jax.vmap(loss)(at, p.data["y"])
    bregman -= (slope * (y - at)).reshape(len(y), -1).sum(axis=1)
    total = jnp.mean(bregman + (weights - 1) * losses)
    return total + damping / 2 * jnp.sum((x - flat) ** 2)

  return value, flat


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_divergences_by_their_formulas(likelihood):
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    y, at = rng.normal(size=(2, 5))
    if likelihood == "categorical":
      kind, target = likelihoods.categorical(), jnp.int32(3)
      p, q = jax.nn.softmax(at), jax.nn.softmax(y)
      expected = float(jnp.sum(p * jnp.log(p / q)))
    else:
      kind, target = likelihoods.gaussian(0.5), jnp.asarray(rng.normal(size=5))
      expected = np.sum((y - at) ** 2) / (2 * 0.25)
    found = pbrf.divergence(kind)(jnp.asarray(y), jnp.asarray(at), target)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("step", [1.0, 0.25])
def test_linear_regression_moves_by_its_closed_form(step):
  """(G − step G_m / N + λ) δ = step g_m / N, exactly, as F is quadratic."""
  with jax.enable_x64(True):
    p = oracles.problem("linear", "gaussian")
    solution = solve_at(p, 3, step)
    one = jax.tree.map(lambda x: x[3:4], p.data)
    whole = dense.dense_ggn(p.objective, p.params, p.data)
    own = dense.dense_ggn(p.objective, p.params, one)
    grad = ravel_pytree(
      jax.grad(p.objective.loss)(p.params, jax.tree.map(lambda x: x[3], p.data))
    )[0]
    share = step / oracles.N
    matrix = whole - share * own + DAMPING * jnp.eye(len(grad))
    expected = jnp.linalg.solve(matrix, share * grad)
    np.testing.assert_allclose(moved(p, solution), expected, atol=1e-10)
    assert solution.gradient < 1e-9


@pytest.mark.parametrize(
  ("name", "likelihood"), [("tanh", "categorical"), ("tied", "gaussian")]
)
def test_error_of_first_order_has_slope_one_in_epsilon(name, likelihood):
  """δ / ε → −(G + λ)⁻¹ g, with an error that halves with ε."""
  with jax.enable_x64(True):
    p = oracles.problem(name, likelihood)
    first = directions(p, DAMPING)[2] / oracles.N
    errors = []
    for step in (0.01, 0.005):
      found = moved(p, solve_at(p, 2, step)) / step
      errors.append(float(jnp.linalg.norm(found - first)))
    # Of third order in ε: the slope is off by a few times ε.
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), 1, atol=0.05)
    assert errors[-1] < 0.05 * float(jnp.linalg.norm(first))


@pytest.mark.parametrize("step", [0.3, -3.0])
def test_minimum_is_that_of_the_definition(step):
  """Far from first order, against a general optimiser of another formula."""
  with jax.enable_x64(True):
    p = oracles.problem("tanh")
    weights = jnp.ones(oracles.N).at[1].add(-step)
    value, x = explicit(p, weights, DAMPING)
    search = optax.lbfgs()
    state = search.init(x)
    both = jax.jit(optax.value_and_grad_from_state(value))

    @jax.jit
    def update(x, state):
      v, g = both(x, state=state)
      change, state = search.update(
        g, state, x, value=v, grad=g, value_fn=value
      )
      return optax.apply_updates(x, change), state

    for _ in range(200):
      x, state = update(x, state)
    # Values of F, and so steps, are compared to 1e-16: its gradient, to 1e-7.
    solution = solve_at(p, 1, step, tolerance=1e-6, limit=500)
    assert solution.gradient < 1e-6
    found = ravel_pytree(solution.params)[0]
    assert float(jnp.linalg.norm(moved(p, solution))) > 0.02
    np.testing.assert_allclose(found, x, atol=1e-5)


def test_damping_by_block_and_preconditioning():
  """λ of each block is its own; a preconditioner changes only the cost."""
  with jax.enable_x64(True):
    p = oracles.problem("tanh")
    damping = {k: 0.02 * (1 + i) for i, k in enumerate(p.found.blocks)}
    by_block = {k: jnp.full((1, 1, 1), v) for k, v in damping.items()}
    ones = blocks.to_blocks(p.found, jax.tree.map(jnp.ones_like, p.params))
    diagonal = blocks.to_tree(p.found, {k: damping[k] * ones[k] for k in ones})
    matrix = dense.dense_ggn(p.objective, p.params, p.data)
    inverse = jnp.linalg.inv(matrix + jnp.diag(ravel_pytree(diagonal)[0]))

    def precondition(v):
      def one(u):
        flat, back = ravel_pytree(blocks.to_tree(p.found, u))
        return blocks.to_blocks(p.found, back(jnp.float32(inverse) @ flat))

      return jax.vmap(one)(v)

    plain = solve_at(p, 0, 0.01, damping=by_block)
    quick = Partial(precondition)
    quick = solve_at(p, 0, 0.01, damping=by_block, precondition=quick)
    np.testing.assert_allclose(moved(p, plain), moved(p, quick), atol=1e-11)
    assert int(quick.products) < int(plain.products) / 2
    grad = jax.grad(explicit(p, jnp.ones(oracles.N).at[0].add(-1), 0)[0])
    first = -inverse @ grad(ravel_pytree(p.params)[0])
    error = jnp.linalg.norm(moved(p, plain) / 0.01 - first)
    assert error < 0.02 * jnp.linalg.norm(first)


@functools.cache  # one compilation for all
def responding():
  """Solver, measurement, and first order of the changes [N, 4]."""
  p = oracles.problem("tanh")
  solve = pbrf.solver(
    p.found,
    p.objective,
    p.params,
    p.data,
    damping=DAMPING,
    tolerance=1e-8,
    flat=0.0,
  )
  queries = jax.tree.map(lambda x: jnp.asarray(x[:4]), p.data)
  measure = lambda params: jax.vmap(p.objective.loss, (None, 0))(
    params, queries
  )
  grads = jax.vmap(jax.grad(p.objective.loss), (None, 0))(p.params, queries)
  flat = jax.vmap(lambda g: ravel_pytree(g)[0])(grads)
  return solve, measure, directions(p, DAMPING) @ flat.T / oracles.N


CHOSEN = np.array([7, 0, 4])


def test_responses_have_the_sign_of_leaving_out_and_two_orders():
  with jax.enable_x64(True):
    solve, measure, first = responding()
    first, error = np.asarray(first)[CHOSEN], {}
    for central in (False, True):
      for step in (0.1, 0.05):
        found = pbrf.responses(
          solve, measure, CHOSEN, oracles.N, step=step, central=central
        )
        assert found.change.shape == (3, 4)
        assert found.gradient.max() < 1e-8 and found.gradients.min() > 2
        error[central, step] = np.linalg.norm(found.change - first)
      ratio = np.log2(error[central, 0.1] / error[central, 0.05])
      assert abs(ratio - (2 if central else 1)) < 0.15
    assert error[True, 0.05] < error[False, 0.05] / 5
    assert error[True, 0.05] < 0.01 * np.linalg.norm(first)


def test_a_second_call_reads_what_the_first_computed(tmp_path):
  with jax.enable_x64(True):
    solve, measure, _ = responding()
    run = functools.partial(
      pbrf.responses, solve, measure, CHOSEN, oracles.N, directory=tmp_path
    )
    found = run()
    files = sorted(tmp_path.glob("part_*"))
    assert len(files) == 4  # the unchanged model, then the three
    with np.load(files[2]) as arrays:
      altered = {k: x + 100 for k, x in arrays.items() if k != "positions"}
      np.savez(files[2], positions=arrays["positions"], **altered)
    files[3].unlink()
    shift = run().change - found.change
    np.testing.assert_allclose(shift[[0, 2]], 0, atol=1e-12)
    np.testing.assert_allclose(shift[1], 100, rtol=1e-6)


def test_nothing_moves_when_nothing_changes_and_limits_hold():
  with jax.enable_x64(True):
    p = oracles.problem("tanh")
    still = solve_at(p, 0, 0.0)
    assert float(jnp.abs(moved(p, still)).max()) == 0
    assert still.gradient == 0 and still.gradients == 1
    short = solve_at(p, 0, 1.0, limit=2)
    assert short.gradients == 2 and short.gradient > 1e-3


def test_correlations_are_those_of_scipy():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, 30, 3))
  x[:, 2] = 1
  found = pbrf.correlations(x, y)
  for q in range(2):
    pearson = stats.pearsonr(x[:, q], y[:, q]).statistic
    spearman = stats.spearmanr(x[:, q], y[:, q]).statistic
    np.testing.assert_allclose(found["pearson"][q], pearson, rtol=1e-12)
    np.testing.assert_allclose(found["spearman"][q], spearman, rtol=1e-12)
  assert found["pearson"][2] == found["spearman"][2] == 0


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"damping": 0.0}, "damping=0.0"),
    ({"damping": {"out/w": 1.0}}, "for blocks"),
    ({"chosen": np.array([10])}, "example 10 of 10"),
    ({"chosen": np.zeros((2, 2), int)}, "must be"),
    ({"step": 2.0}, "step=2.0"),
  ],
)
def test_bad_input(change, message):
  p = oracles.problem("tanh")
  with pytest.raises(ValueError, match=message):
    solve = pbrf.solver(
      p.found,
      p.objective,
      p.params,
      p.data,
      damping=change.get("damping", DAMPING),
    )
    pbrf.responses(
      solve,
      lambda params: jnp.zeros(1),
      change.get("chosen", np.arange(2)),
      oracles.N,
      step=change.get("step", 1.0),
    )
