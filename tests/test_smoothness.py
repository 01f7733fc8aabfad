"""Parts of optimizers without derivatives, and how straight runs move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import dataset, init, loss

from tda import smoothness
from tda.trajectory import trainer


def rounding(gradient, state, params=None):
  return jax.tree.map(jnp.round, gradient), state


def wrapping(tx):
  """A transform of another library, with a state of its own."""

  def update(gradient, state, params=None):
    inner, count = state
    updates, inner = tx.update(gradient, inner, params)
    return updates, (inner, count + 1)

  return optax.GradientTransformation(lambda p: (tx.init(p), 0), update)


PARAMS = {"w": jnp.ones((3, 2)), "v": jnp.ones(2)}


def searching(gradient, state, params=None):
  """Halves a step until it is small: no reverse derivative."""
  size = jax.lax.while_loop(
    lambda s: s > 0.1, lambda s: s / 2, gradient["v"][0]
  )
  return jax.tree.map(lambda g: size * g, gradient), state


SEARCH = optax.GradientTransformation(lambda p: (), searching)


@pytest.mark.parametrize(
  ("optimizer", "name"),
  [
    (optax.lion(0.1), "scale_by_lion"),
    (optax.chain(optax.adam(0.1), optax.scale_by_sign()), "scale_by_sign"),
    (
      optax.chain(
        optax.masked(optax.scale_by_sign(), True),
        optax.masked(optax.scale(0.1), True),
      ),
      "masked",
    ),
    (optax.GradientTransformation(lambda p: (), jax.jit(rounding)), "rounding"),
  ],
)
def test_parts_whose_updates_do_not_move_are_named(optimizer, name):
  with pytest.raises(ValueError, match=f"{name} in the optimizer of stage 3"):
    smoothness.check(optimizer, PARAMS, "stage 3")


def test_parts_without_reverse_derivatives_are_named():
  with pytest.raises(ValueError, match=r"searching .*cannot be differentiated"):
    smoothness.check(optax.chain(optax.sgd(0.1), SEARCH), PARAMS, "the run")


@pytest.mark.parametrize(
  "optimizer",
  [
    optax.sgd(optax.cosine_decay_schedule(0.1, 9), 0.9, nesterov=True),
    optax.chain(
      optax.clip_by_global_norm(0.5),
      optax.adamw(0.1, eps_root=1e-8),
      optax.ema(0.9),
    ),
    optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
    optax.sgd(optax.linear_schedule(0.0, 0.1, 5)),
    optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 9)),
    optax.apply_every(2),
    wrapping(optax.adam(0.1)),
    optax.adafactor(0.1),
    optax.rmsprop(0.1),
  ],
)
def test_smooth_optimizers_pass(optimizer):
  smoothness.check(optimizer, PARAMS, "the run")


def test_what_fails_at_gradients_of_zero_is_explained():
  rough = optax.chain(optax.clip(1.0), optax.adam(0.1))
  text = smoothness.explained(rough, PARAMS)
  assert (
    text.startswith("scale_by_adam has no derivative") and "eps_root" in text
  )
  smooth = optax.adam(0.1, eps_root=1e-8)
  assert "smaller learning rate" in smoothness.explained(smooth, PARAMS)


def run(rate, step, epochs=3):
  with jax.enable_x64(True):
    train = trainer(
      loss, init, optax.sgd(rate), dataset(10), epochs=epochs, batch_size=5
    )
    keys = jax.random.key(1), jax.random.key(2)
    return (
      train,
      keys,
      float(smoothness.metasmoothness(train, jnp.ones(10), *keys, step=step)),
    )


def test_metasmoothness_is_that_of_its_definition():
  train, (key, direction), got = run(0.2, 0.3)
  with jax.enable_x64(True):
    v = jax.random.normal(direction, (10,))
    zero, one, two = (
      np.concatenate([x.ravel() for x in train(1 + k * 0.3 * v, key).values()])
      for k in range(3)
    )
  d = abs(two - zero)
  terms = np.sign(two - one) * np.sign(one - zero) * d / d.sum()
  assert got == pytest.approx(terms.sum(), rel=1e-9)


def test_short_steps_are_straight_and_wild_runs_are_not():
  assert run(0.05, 1e-4)[2] == pytest.approx(1)
  assert run(1.2, 0.3, epochs=20)[2] < 0.9
