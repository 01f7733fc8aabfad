"""Derivatives of whole runs against automatic and finite differences."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import dataset, init, loss, measure, replayed

from tda import meshes, replay, runs
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
  with jax.enable_x64(True):
    yield


def stage(name, n=10, epochs=3, seed=0):
  return Stage(loss, dataset(n, seed), OPTIMIZERS[name], epochs, 4)


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


def test_trees_hold_all_steps_and_few_more():
  for total in (1, 2, 6, 16, 65, 3125):
    for levels in (1, 2, 3, 5):
      found = replay.tree(jnp.arange(total)[:, None], levels)
      flat = found.ravel()
      assert found.ndim == levels + 1 and len({*found.shape[1:-1]}) <= 1
      np.testing.assert_array_equal(flat[:total], np.arange(total))
      assert (flat[total:] == -1).all()
      below = flat.size // found.shape[0]
      assert flat.size - total < below and found.shape[0] >= 1
  assert replay.tree(jnp.zeros((3125, 1)), 5).shape == (5, 5, 5, 5, 5, 1)


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


@functools.cache
def on_one_device():
  return replayed()


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_meshes_and_microbatches_change_nothing(shape):
  want = on_one_device()
  got = replayed(mesh=meshes.mesh(*shape), microbatch=4)
  for x, y in zip(got.weights, want.weights, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-12)
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
def test_a_killed_replay_is_taken_up(tmp_path, monkeypatch):
  """On the way forth in the second stage, and back in the first."""
  stages = [
    Stage(loss, jax.tree.map(np.float32, dataset(n, n)), sgd, 2, 4)
    for n, sgd in ((10, optax.sgd(0.05, 0.9)), (7, optax.sgd(0.05)))
  ]
  args = init, stages, [jnp.ones(10), jnp.ones(7)], KEY
  want = unrolled.differentiate(*args, measure)
  folder, save = str(tmp_path / "replay"), unrolled.disk.save
  written, most = [], [3, 8, 100]

  def stopping(path, tree):
    if len(written) == most[0]:
      raise Killed
    save(path, tree)
    written.append(pathlib.Path(path).name)

  monkeypatch.setattr(unrolled.disk, "save", stopping)
  for _ in range(2):
    with pytest.raises(Killed):
      unrolled.differentiate(*args, measure, directory=folder)
    most.pop(0)
  got = unrolled.differentiate(*args, measure, directory=folder)
  states = ["state_0_1", "state_0_2", "state_1_1", "state_1_2"]
  back = ["back_1_3"] * 2 + ["back_0_3"] * 2
  assert written == [*states, "value", *back]
  for x, y in zip(got.weights, want.weights, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
  with pytest.raises(ValueError, match="other measurements"):
    unrolled.differentiate(*args, lambda p: 2 * measure(p), directory=folder)
  with pytest.raises(ValueError, match="results of other weights"):
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
  later = stage("adam")._replace(data=data, optimizer=optax.adam(0.02))
  with pytest.raises(ValueError, match=r"stage 1 are not finite. scale_by_a"):
    ones = [jnp.ones(10)] * 2
    unrolled.differentiate(init, [stage("sgd"), later], ones, KEY, measure)
  sound = stage("sgd")
  wild = sound._replace(optimizer=optax.sgd(1e30))
  with pytest.raises(ValueError, match="measurement 0 is not finite at"):
    unrolled.differentiate(init, [wild], [jnp.ones(10)], KEY, measure)
  with pytest.raises(ValueError, match=r"of measurements, not shape \(\)"):
    unrolled.differentiate(
      init, [sound], [jnp.ones(10)], KEY, lambda p: measure(p).sum()
    )
  with pytest.raises(ValueError, match="levels=0"):
    unrolled.differentiate(
      init, [sound], [jnp.ones(10)], KEY, measure, levels=0
    )
  with pytest.raises(ValueError, match="weights of shapes"):
    unrolled.differentiate(init, [sound], [jnp.ones(9)], KEY, measure)
