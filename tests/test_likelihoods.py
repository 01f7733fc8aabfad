"""Likelihoods against automatic differentiation and plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda import likelihoods
from tda.likelihoods import Objective, categorical, gaussian, token_categorical

TOKENS = np.array([3, 1, -1, 4, 0]), np.array([1, 0, 0, 1, 1])
CASES = {
  "categorical": (categorical(), (5,), np.array(2)),
  "gaussian": (gaussian(0.5), (2, 3), np.arange(6.0).reshape(2, 3)),
  "token_sum": (token_categorical("sum"), (5, 6), TOKENS),
  "token_mean": (token_categorical("mean"), (5, 6), TOKENS),
}


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@pytest.fixture(params=CASES)
def case(request):
  likelihood, shape, target = CASES[request.param]
  rng = np.random.default_rng(0)
  return likelihood, jnp.asarray(rng.normal(size=shape)), target


def dense(operator, outputs):
  basis = jnp.eye(outputs.size).reshape(-1, *outputs.shape)
  return jax.jit(jax.vmap(operator))(basis).reshape(outputs.size, -1).T


def test_hessian_is_that_of_the_loss(case):
  likelihood, outputs, target = case
  expected = jax.jit(jax.hessian(likelihood.loss))(outputs, target)
  actual = dense(lambda v: likelihood.hessian(outputs, target, v), outputs)
  np.testing.assert_allclose(
    actual, expected.reshape(actual.shape), rtol=1e-12, atol=1e-15
  )


def test_root_times_its_transpose_is_the_hessian(case):
  likelihood, outputs, target = case
  root = dense(lambda u: likelihood.sqrt_hessian(outputs, target, u), outputs)
  hessian = dense(lambda v: likelihood.hessian(outputs, target, v), outputs)
  np.testing.assert_allclose(root @ root.T, hessian, rtol=1e-12, atol=1e-15)


def test_loss_is_factor_times_negative_log_density(case):
  """Differences of the loss between targets, so that constants drop out."""
  likelihood, outputs, target = case
  other = jax.jit(likelihood.sample)(jax.random.key(1), outputs, target)

  def log_density(target):
    if not isinstance(target, tuple) and target.ndim:
      return -np.sum((outputs - target) ** 2) / (2 * 0.5**2)
    log_p = np.log(np.exp(outputs) / np.exp(outputs).sum(-1, keepdims=True))
    if not isinstance(target, tuple):
      return log_p[target]
    kept = np.flatnonzero(target[1])
    return log_p[kept, target[0][kept]].sum()

  loss = jax.jit(likelihood.loss)
  actual = loss(outputs, target) - loss(outputs, other)
  expected = log_density(other) - log_density(target)
  assert abs(expected) > 0.1
  np.testing.assert_allclose(
    actual, likelihood.factor(target) * expected, rtol=1e-12
  )


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_masked_positions_contribute_exactly_zero(reduction):
  likelihood = token_categorical(reduction)
  tokens, mask = TOKENS
  kept = mask == 1
  logits = np.random.default_rng(1).normal(size=(5, 6))
  spoiled = jnp.asarray(np.where(kept[:, None], logits, np.nan))
  short = jnp.asarray(logits[kept]), (tokens[kept], mask[kept])
  graded = jax.jit(jax.value_and_grad(likelihood.loss))
  loss, gradient = graded(spoiled, TOKENS)
  np.testing.assert_allclose(loss, graded(*short)[0], rtol=1e-14)
  assert not np.any(gradient[~kept])
  for product in map(jax.jit, likelihood[2:4]):
    full = product(spoiled, TOKENS, spoiled)
    np.testing.assert_allclose(full[kept], product(*short, short[0]))
    assert not np.any(full[~kept])

  none = tokens, np.zeros(5, bool)
  value, gradient = graded(spoiled, none)
  assert value == 0 and not np.any(gradient)
  assert not np.any(likelihood.hessian(spoiled, none, spoiled))


def test_mean_over_tokens_is_the_sum_by_their_number():
  outputs = jnp.asarray(np.random.default_rng(2).normal(size=(5, 6)))
  total, mean = (
    jax.jit(token_categorical(r).loss)(outputs, TOKENS) for r in ("sum", "mean")
  )
  np.testing.assert_allclose(mean, total / 3, rtol=1e-14)


def test_samples_keep_mask_and_masked_tokens():
  likelihood = token_categorical()
  tokens, mask = TOKENS
  logits = jnp.full((5, 6), -1e9).at[:, 5].set(0.0)
  drawn, same = likelihood.sample(jax.random.key(0), logits, TOKENS)
  np.testing.assert_array_equal(drawn, np.where(mask == 1, 5, tokens))
  np.testing.assert_array_equal(same, mask)
  assert drawn.dtype == tokens.dtype


@pytest.mark.parametrize("name", CASES)
def test_low_precision_outputs_are_raised_to_float32(name):
  likelihood, shape, target = CASES[name]
  low = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
  high = low.astype(jnp.float32)
  if name == "gaussian":
    target = target.astype(np.float32)
  for v in [(), (low,)]:
    function = jax.jit(likelihood.hessian if v else likelihood.loss)
    actual = function(low, target, *v)
    assert actual.dtype == jnp.float32
    np.testing.assert_array_equal(actual, function(high, target, *v))


def test_margin_is_the_log_odds_of_the_true_class():
  objective = Objective(
    lambda params, example: params @ example["x"],
    categorical(),
    lambda example: example["y"],
  )
  rng = np.random.default_rng(3)
  params, x = jnp.asarray(rng.normal(size=(4, 3))), rng.normal(size=3)
  p = jax.nn.softmax(params @ x)
  for y in range(4):
    actual = likelihoods.margin(objective)(params, {"x": x, "y": y})
    np.testing.assert_allclose(actual, np.log(p[y] / (1 - p[y])), rtol=1e-12)
  with pytest.raises(ValueError, match="one class"):
    likelihoods.margin(objective)(params[:1], {"x": x, "y": 0})
  with pytest.raises(ValueError, match=r"margin: .* \(4,\) .* \(1,\)"):
    likelihoods.margin(objective)(params, {"x": x, "y": np.array([1])})


def test_from_loss_is_the_loss_and_nothing_else():
  def loss(params, example):
    return jnp.sum((params - example) ** 2)

  objective = likelihoods.from_loss(loss)
  params, example = jnp.arange(3.0), jnp.ones(3)
  assert objective.loss(params, example) == loss(params, example)
  np.testing.assert_allclose(
    jax.grad(objective.loss)(params, example), 2 * (params - example)
  )
  for function in objective.likelihood[1:4]:
    with pytest.raises(ValueError, match="empirical"):
      function(params, example, params)
  vector = likelihoods.from_loss(lambda params, example: params - example)
  with pytest.raises(ValueError, match=r"shape \(3,\), not a scalar"):
    vector.loss(params, example)


@pytest.mark.parametrize("target", [-1, 5])
def test_a_class_out_of_range_is_nan(target):
  assert np.isnan(categorical().loss(jnp.zeros(5), target))
  tokens = np.array([0, target]), np.ones(2)
  assert np.isnan(token_categorical().loss(jnp.zeros((2, 5)), tokens))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: gaussian(0.0), r"scale=0\.0"),
    (lambda: gaussian(float("nan")), "scale=nan"),
    (lambda: token_categorical("max"), "'max'.*'sum', 'mean'"),
    (lambda: categorical().loss(np.zeros((2, 3)), 1), r"\(2, 3\).*\(\)"),
    (lambda: categorical().loss(np.zeros(3), np.zeros(3)), r"\(3,\).*\(3,\)"),
    (lambda: categorical().loss(np.zeros(3), 1.0), "float.*integers"),
    (lambda: gaussian().loss(np.zeros(3), np.zeros(2)), r"\(3,\).*\(2,\)"),
    (lambda: token_categorical().loss(np.zeros((2, 3)), 1), "tokens .*mask"),
    (
      lambda: token_categorical().loss(np.zeros((5, 6)), (TOKENS[0], 1)),
      r"\(5, 6\), \(5,\), \(\)",
    ),
    (
      lambda: token_categorical().loss(np.zeros((5, 6)), (np.ones(5),) * 2),
      "float64",
    ),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize("product", ["hessian", "sqrt_hessian"])
def test_many_directions_of_many_examples(product, optimized):
  """XLA has miscompiled this at such sizes: see `_softmax_hessian`."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(1437, 10)).astype(np.float32)
  directions = rng.normal(size=(4, 1437, 10)).astype(np.float32)
  apply = getattr(likelihoods.categorical(), product)
  each = jax.vmap(lambda o, v: apply(o, jnp.int32(0), v))
  found = jax.jit(jax.vmap(each, (None, 0)))(logits, directions)
  expected = np.stack([jax.jit(each)(logits, v) for v in directions])
  assert np.abs(found - expected).max() < 1e-6
