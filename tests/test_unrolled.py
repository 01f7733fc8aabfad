"""Derivatives of whole runs against automatic and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from tiny import dataset, init, loss

from tda import meshes, runs
from tda.attribution import unrolled
from tda.runs import Stage

KEY = jax.random.key(3)
OPTIMIZERS = {
  "sgd": optax.sgd(0.05),
  "momentum": optax.sgd(0.05, 0.9),
  "adam": optax.adam(0.02, eps_root=1e-8),
  "chain": optax.chain(
    optax.clip_by_global_norm(0.5),
    optax.adamw(
      optax.cosine_decay_schedule(0.05, 9), eps_root=1e-8, weight_decay=0.1
    ),
    optax.ema(0.8),
  ),
}


@pytest.fixture(autouse=True, scope="module")
def exactly():
  with oracles.exactly():
    yield


def stage(name, n=10, epochs=3, seed=0):
  return Stage(loss, dataset(n, seed), OPTIMIZERS[name], epochs, 4)


def measure(params):
  queries = dataset(3, seed=7)
  return jax.vmap(loss, (None, 0))(params, queries)


@functools.cache
def automatic(*names):
  sizes = (10, 7)[: len(names)]
  stages = [
    stage(name, n, seed=n) for name, n in zip(names, sizes, strict=True)
  ]
  weights = [jnp.linspace(0.5, 1.5, len(s.data["y"])) for s in stages]
  train = runs.trainer(init, stages)
  slopes = jax.jit(jax.jacrev(lambda w: measure(train(w, KEY))))(weights)
  return stages, weights, slopes


@pytest.mark.parametrize(
  ("name", "levels"),
  [*((name, 2) for name in OPTIMIZERS), ("adam", 1), ("momentum", 3)],
)
def test_derivatives_in_weights_are_those_of_the_run(name, levels):
  stages, weights, want = automatic(name)
  got = unrolled.differentiate(
    init, stages, weights, KEY, measure, levels=levels
  )
  np.testing.assert_allclose(got.weights[0], want[0], rtol=1e-9, atol=1e-12)
  train = runs.trainer(init, stages)
  np.testing.assert_allclose(
    got.value, measure(train(weights, KEY)), rtol=1e-10
  )


@pytest.mark.parametrize("names", [("momentum", "adam"), ("chain", "sgd")])
def test_later_stages_carry_the_derivatives_of_earlier_ones(names):
  stages, weights, want = automatic(*names)
  got = unrolled.differentiate(init, stages, weights, KEY, measure)
  for i in (0, 1):
    np.testing.assert_allclose(got.weights[i], want[i], rtol=1e-9, atol=1e-12)


def test_finite_differences_and_the_sign_of_scores():
  stages, weights, _ = automatic("momentum")
  got = unrolled.differentiate(init, stages, weights, KEY, measure)
  train = jax.jit(runs.trainer(init, stages))
  step = 1e-5
  up, down = (
    measure(train([weights[0].at[4].add(sign * step)], KEY)) for sign in (1, -1)
  )
  slope = (up - down) / (2 * step)
  np.testing.assert_allclose(got.weights[0][:, 4], slope, rtol=1e-6)
  scores = got.scores()
  np.testing.assert_allclose(scores.values[4], -slope, rtol=1e-6)
  assert scores.values.shape == (10, 3) and scores.method == "unrolled"


def test_an_example_that_takes_no_part_has_no_derivative():
  stages, weights, _ = automatic("sgd")
  weights = [weights[0].at[2].set(0)]
  got = unrolled.differentiate(init, stages, weights, KEY, measure)
  assert (got.weights[0][:, 2] == 0).all()
  assert (got.weights[0][:, 3] != 0).all()


def test_the_metagradient_of_a_learning_rate():
  """A hyperparameter that the optimizer keeps is an input of the run."""
  made = lambda rate: Stage(
    loss,
    dataset(10),
    optax.inject_hyperparams(optax.sgd)(learning_rate=rate, momentum=0.9),
    3,
    4,
  )
  ones = [jnp.ones(10)]
  got = unrolled.differentiate(init, [made(0.05)], ones, KEY, measure)
  slope = got.start.opt_state.hyperparams["learning_rate"]
  measured = lambda rate: measure(runs.trainer(init, [made(rate)])(ones, KEY))
  want = (measured(0.05 + 1e-6) - measured(0.05 - 1e-6)) / 2e-6
  np.testing.assert_allclose(slope, want, rtol=1e-6)
  whole = jax.jacrev(
    lambda p: measure(runs.trainer(lambda key: p, [made(0.05)])(ones, KEY))
  )(init(jax.random.split(KEY)[0]))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-12),
    got.start.params,
    whole,
  )


def test_masked_runs_have_derivatives_at_weights_of_0():
  masked = stage("momentum")._replace(masked=True)
  weights = jnp.ones(10).at[jnp.array([2, 5])].set(0)
  got = unrolled.differentiate(init, [masked], [weights], KEY, measure)
  train = runs.trainer(init, [masked])
  want = jax.jacrev(lambda w: measure(train([w], KEY)))(weights)
  np.testing.assert_allclose(got.weights[0], want, rtol=1e-9, atol=1e-12)
  assert (abs(got.weights[0][:, 2]) > 1e-6).all()


def test_weights_of_every_token():
  def tokens(params, example):
    return jnp.stack([loss(params, example), params["v"].sum() * example["y"]])

  made = stage("adam")._replace(loss=tokens)
  weights = jnp.linspace(0.5, 1.5, 20).reshape(10, 2).at[4].set(0)
  got = unrolled.differentiate(init, [made], [weights], KEY, measure)
  train = runs.trainer(init, [made])
  want = jax.jacrev(lambda w: measure(train([w], KEY)))(weights)
  assert want.shape == (3, 10, 2)
  np.testing.assert_allclose(got.weights[0], want, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(got.scores().values.T, -want.sum(2), rtol=1e-7)


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (4, 2)])
def test_meshes_and_microbatches_change_nothing(shape):
  _, weights, _ = automatic("adam")
  made = stage("adam")._replace(batch_size=8)
  want = unrolled.differentiate(init, [made], weights, KEY, measure)
  got = unrolled.differentiate(
    init,
    [made._replace(microbatch=4)],
    weights,
    KEY,
    measure,
    mesh=meshes.mesh(*shape),
  )
  np.testing.assert_allclose(got.weights[0], want.weights[0], rtol=1e-9)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-12),
    got.start,
    want.start,
  )


def test_a_forward_pass_in_bfloat16():
  """The state and its cotangents stay float32."""
  low = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

  def rounded(params, example):
    return loss(low(params), low(example)).astype(jnp.float32)

  data = jax.tree.map(np.float32, dataset(10))
  made = stage("momentum")._replace(loss=rounded, data=data)
  single = lambda key: jax.tree.map(jnp.float32, init(key))
  weights = jnp.ones(10, jnp.float32)
  got = unrolled.differentiate(single, [made], [weights], KEY, measure)
  assert got.start.params["w"].dtype == np.float32
  train = runs.trainer(single, [made])
  want = jax.jacrev(lambda w: measure(train([w], KEY)))(weights)
  np.testing.assert_allclose(got.weights[0], want, rtol=0.02, atol=2e-3)


class Killed(Exception):
  """As by a scheduler."""


@jax.enable_x64(False)  # as it holds for this thread, and not for Orbax's
@pytest.mark.parametrize("saves", [2, 6, 8, 10])
def test_a_killed_replay_is_taken_up(tmp_path, monkeypatch, saves):
  names = "momentum", "adam"
  data = [jax.tree.map(np.float32, dataset(n, n)) for n in (10, 7)]
  stages = [
    Stage(loss, d, OPTIMIZERS[name], 2, 4)
    for name, d in zip(names, data, strict=True)
  ]
  args = init, stages, [jnp.ones(10), jnp.ones(7)], KEY
  want = unrolled.differentiate(*args, measure)
  folder, save, written = str(tmp_path / "replay"), unrolled.disk.save, []

  def stopping(path, tree):
    if len(written) == saves:
      raise Killed
    save(path, tree)
    written.append(path)

  monkeypatch.setattr(unrolled.disk, "save", stopping)
  with pytest.raises(Killed):
    unrolled.differentiate(*args, measure, directory=folder)
  saves = 100
  got = unrolled.differentiate(*args, measure, directory=folder)
  assert len(written) == len(set(written)) + 3  # of the way back, by stage
  for x, y in zip(got.weights, want.weights, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
  with pytest.raises(ValueError, match="other measurements"):
    unrolled.differentiate(*args, lambda p: 2 * measure(p), directory=folder)
  with pytest.raises(ValueError, match="another run: its weights differ"):
    unrolled.differentiate(
      init, stages, [jnp.ones(10), jnp.zeros(7)], KEY, measure, directory=folder
    )


def test_what_cannot_be_differentiated_is_said():
  data = dataset(10) | {"x": np.zeros((10, 3))}  # w has no gradient
  still = Stage(loss, data, optax.adam(0.02), 1, 4)
  with pytest.raises(
    ValueError, match=r"stage 0 are not finite. scale_by_adam has.*eps_root"
  ):
    unrolled.differentiate(init, [still], [jnp.ones(10)], KEY, measure)
  sound = stage("sgd")
  with pytest.raises(ValueError, match="levels=0"):
    unrolled.differentiate(
      init, [sound], [jnp.ones(10)], KEY, measure, levels=0
    )
  with pytest.raises(ValueError, match="weights of shapes"):
    unrolled.differentiate(init, [sound], [jnp.ones(9)], KEY, measure)
