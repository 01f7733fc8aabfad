"""Output cotangents of each label kind against the output Hessian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda import likelihoods
from tda.curvature import labels
from tda.curvature.labels import Labels
from tda.likelihoods import Objective

MASK = np.array([1, 0, 1])
CASES = {
  "categorical": (likelihoods.categorical(), (4,), np.array(1)),
  "gaussian": (likelihoods.gaussian(2.0), (2, 2), np.ones((2, 2))),
  "token_sum": (
    likelihoods.token_categorical("sum"),
    (3, 4),
    (np.array([0, 3, 2]), MASK),
  ),
  "token_mean": (
    likelihoods.token_categorical("mean"),
    (3, 4),
    (np.array([0, 3, 2]), MASK),
  ),
}


@pytest.fixture(params=CASES)
def case(request):
  """objective, outputs, target; the target is the example."""
  likelihood, shape, target = CASES[request.param]
  outputs = np.random.default_rng(0).normal(size=shape)
  objective = Objective(lambda params, _: params, likelihood, lambda e: e)
  return objective, outputs, target


@pytest.mark.parametrize(
  ("name", "expected", "passes"),
  [
    ("exact", Labels("exact"), 6),
    ("empirical", Labels("empirical"), 1),
    ("sampled", Labels("sampled", 1), 1),
    ("sampled:12", Labels("sampled", 12), 12),
    (Labels("sampled", 3), Labels("sampled", 3), 3),
  ],
)
def test_names(name, expected, passes):
  assert labels.parse(name) == expected
  assert labels.count(name, (2, 3)) == passes


@pytest.mark.parametrize(
  "name",
  [
    "fisher",
    "sampled:",
    "sampled:0",
    "sampled:-1",
    "sampled:1.5",
    "exact:2",
    Labels("sampled", 0),
    Labels("exact", 2),
    Labels("true", 1),
    None,
  ],
)
def test_an_unknown_name_lists_the_choices(name):
  with pytest.raises(ValueError, match=r'"exact", "empirical", "sampled"'):
    labels.parse(name)


def test_exact_cotangents_square_to_the_hessian(case):
  with jax.enable_x64(True):
    objective, outputs, target = case
    outputs = jnp.asarray(outputs)
    found = jax.jit(labels.cotangents(objective, "exact"))(outputs, target)
    assert found.shape == (outputs.size, *outputs.shape)
    flat = found.reshape(outputs.size, -1)
    hessian = jax.jit(jax.hessian(objective.likelihood.loss))
    expected = hessian(outputs, target)
    np.testing.assert_allclose(
      flat.T @ flat, expected.reshape(flat.shape), rtol=1e-12, atol=1e-15
    )


def test_empirical_cotangent_is_the_gradient_at_the_data(case):
  objective, outputs, target = case
  outputs = jnp.asarray(outputs)
  found = labels.cotangents(objective, "empirical")(outputs, target)
  expected = jax.grad(objective.likelihood.loss)(outputs, target)
  np.testing.assert_array_equal(found, expected[None])


def test_sampled_outer_products_are_the_hessian_in_expectation(case):
  """vᵀ(Σ_k c_k c_kᵀ)w over 4,096 keys, within four standard errors."""
  with jax.enable_x64(True):
    objective, outputs, target = case
    outputs = jnp.asarray(outputs)
    hessian = jax.jit(jax.hessian(objective.likelihood.loss))
    hessian = hessian(outputs, target).reshape(outputs.size, -1)
    function = labels.cotangents(objective, "sampled:3")
    draw = jax.jit(jax.vmap(function, (None, None, 0)))
    for seed in range(3):
      v, w = np.random.default_rng(seed).normal(size=(2, outputs.size))
      keys = jax.random.split(jax.random.key(seed), 4096)
      found = np.asarray(draw(outputs, target, keys)).reshape(4096, 3, -1)
      for left, right in [(v, v), (v, w)]:
        forms = np.sum((found @ left) * (found @ right), axis=1)
        error = forms.std(ddof=1) / np.sqrt(forms.size)
        assert abs(forms.mean() - left @ hessian @ right) < 4 * error
      # So that a forgotten 1/K or factor (3 and 2 here) would be seen.
      assert v @ hessian @ v > 12 * np.std((found @ v) ** 2) / np.sqrt(4096)


@pytest.mark.parametrize("kind", ["exact", "empirical", "sampled:2"])
def test_cotangents_of_low_precision_outputs_are_float32(kind):
  likelihood, shape, target = CASES["token_mean"]
  objective = Objective(lambda params, _: params, likelihood, lambda e: e)
  outputs = jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)
  function = jax.jit(labels.cotangents(objective, kind))
  found = function(outputs, target, jax.random.key(0))
  wide = function(outputs.astype(jnp.float32), target, jax.random.key(0))
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, wide)


def test_sampling_needs_a_key(case):
  objective, outputs, target = case
  with pytest.raises(ValueError, match=r"sampled:2 .* key per example"):
    labels.cotangents(objective, "sampled:2")(outputs, target)


@pytest.mark.parametrize("kind", ["exact", "sampled"])
def test_a_bare_loss_has_empirical_labels_only(kind):
  objective = likelihoods.from_loss(lambda params, example: params * example)
  one = jnp.ones(())
  found = labels.cotangents(objective, "empirical")(one, one)
  np.testing.assert_array_equal(found, [1.0])
  with pytest.raises(ValueError, match="need the model's outputs"):
    labels.cotangents(objective, kind)(one, one, jax.random.key(0))
