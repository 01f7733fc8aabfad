"""Runs of several stages, their checkpoints, and the rates they applied."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import dataset, init, loss

from tda import runs, trajectory
from tda.runs import Stage

KEY = jax.random.key(3)


@pytest.fixture(autouse=True, scope="module")
def exactly():
  with jax.enable_x64(True):
    yield


def stage(n=10, optimizer=None, epochs=3, seed=0):
  optimizer = optimizer or optax.sgd(0.05, 0.9)
  return Stage(loss, dataset(n, seed), optimizer, epochs, 4)


def ones(stages):
  return [jnp.ones(len(s.data["y"])) for s in stages]


def assert_same(a, b):
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12)
  jax.tree.map(close, a, b)


TWO = [stage(), stage(7, optax.adam(0.01), epochs=2, seed=1)]


def test_one_stage_is_a_trajectory():
  first = stage()
  weights = jnp.linspace(0.5, 1, 10).at[3].set(0)
  plain = trajectory.trainer(
    loss, init, first.optimizer, first.data, epochs=3, batch_size=4
  )
  train = jax.jit(runs.trainer(init, [first]))
  assert_same(train([weights], KEY), plain(weights, KEY))


def test_a_second_stage_starts_where_the_first_ended():
  assert runs.lengths(TWO) == [9, 4]
  whole = runs.trainer(init, TWO)(ones(TWO), KEY)
  first = runs.trainer(init, TWO[:1])(ones(TWO[:1]), KEY)
  second = TWO[1]
  parts = trajectory.trajectory(
    loss, init, second.optimizer, 7, epochs=2, batch_size=4
  )
  state = trajectory.State(first, second.optimizer.init(first))
  order_key = runs.stage_key(jax.random.split(KEY)[1], 1)
  data = jax.tree.map(jnp.asarray, second.data)
  state = trajectory.through(parts, state, data, jnp.ones(7), order_key)
  assert_same(whole, state.params)


def test_checkpoints_are_states_of_the_run():
  found = runs.checkpoints(init, TWO, ones(TWO), KEY, [3, 9, 10, 13])
  assert [(c.step, c.stage) for c in found] == [
    (3, 0),
    (9, 0),
    (10, 1),
    (13, 1),
  ]
  for checkpoint, stages in ((found[1], TWO[:1]), (found[3], TWO)):
    assert_same(
      checkpoint.params, runs.trainer(init, stages)(ones(stages), KEY)
    )
  epoch = [TWO[0]._replace(epochs=1)]
  assert_same(found[0].params, runs.trainer(init, epoch)(ones(epoch), KEY))


@pytest.mark.parametrize(
  ("optimizer", "rates"),
  [
    (optax.sgd(0.1), [0.1] * 9),
    (optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)), [0.1] * 9),
    (
      optax.sgd(0.1, 0.8),
      [0.1 * (1 - 0.8 ** (9 - k)) / (1 - 0.8) for k in range(9)],
    ),
    (
      optax.sgd(0.1, 0.8, nesterov=True),
      [0.1 * (1 - 0.8 ** (10 - k)) / (1 - 0.8) for k in range(9)],
    ),
    (
      optax.sgd(optax.linear_schedule(0.1, 0.01, 9)),
      [0.1 - 0.01 * k for k in range(9)],
    ),
  ],
)
def test_rates_are_those_applied(optimizer, rates):
  """A gradient of step k is applied now and, with momentum, at every later."""
  stages = [stage(optimizer=optimizer)]
  (last,) = runs.checkpoints(init, stages, ones(stages), KEY, [9])
  assert last.rate == pytest.approx(sum(rates), rel=1e-7)
  assert last.spread < 1e-7


def test_rates_begin_anew_with_each_stage():
  stages = [stage(optimizer=optax.sgd(0.1)), stage(optimizer=optax.sgd(0.01))]
  found = runs.checkpoints(init, stages, ones(stages), KEY, [4, 9, 12])
  assert [round(c.rate, 9) for c in found] == [0.4, 0.9, 0.03]


def test_adam_does_not_scale_gradients_alike():
  (last,) = runs.checkpoints(init, TWO, ones(TWO), KEY, [13])
  assert last.spread > 0.1


@jax.enable_x64(False)  # as it holds for this thread, and not for Orbax's
def test_a_stopped_run_is_taken_up(tmp_path, monkeypatch):
  at, folder = [3, 9, 10, 13], str(tmp_path / "run")
  saved, save = [], runs._Folders.save

  def stopping(self, step, walk):
    if step == 10 and not saved.count(10):
      saved.append(step)
      raise KeyboardInterrupt
    saved.append(step)
    save(self, step, walk)

  monkeypatch.setattr(runs._Folders, "save", stopping)
  args = init, TWO, ones(TWO), KEY, at
  with pytest.raises(KeyboardInterrupt):
    runs.checkpoints(*args, directory=folder)
  found = runs.checkpoints(*args, directory=folder)
  assert saved == [3, 9, 10, 10, 13]
  for a, b in zip(found, runs.checkpoints(*args), strict=True):
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert a.rate == pytest.approx(b.rate)
  with pytest.raises(ValueError, match="results of other key and start"):
    runs.checkpoints(*args[:3], jax.random.key(4), at, directory=folder)
  faster = [TWO[0], TWO[1]._replace(optimizer=optax.sgd(0.11))]
  with pytest.raises(ValueError, match="of other loss or optimizer"):
    runs.checkpoints(init, faster, ones(TWO), KEY, at, directory=folder)
  other = [TWO[0]._replace(data=dataset(10, seed=5)), TWO[1]]
  with pytest.raises(ValueError, match="of other data"):
    runs.checkpoints(init, other, ones(TWO), KEY, at, directory=folder)


def test_a_directory_knows_the_start_and_the_arrays_of_a_loss():
  scale = lambda c: [
    stage()._replace(loss=lambda p, ex: loss(p, ex) * jnp.asarray(c).sum())
  ]
  begin = lambda key: jax.tree.map(lambda x: 2 * x, init(key))
  made = lambda start, c: runs.record(start, scale(c), [jnp.ones(10)], KEY)
  one = made(init, np.ones(2))
  assert made(init, np.ones(2)) == one
  differ = lambda other: [k for k, x in one.items() if other[k] != x]
  assert differ(made(init, 5 * np.ones(2))) == ["loss or optimizer"]
  assert differ(made(begin, np.ones(2))) == ["start"]


def test_more_examples_than_a_stage_has_room_for():
  small = [TWO[0]._replace(size=6), TWO[1]]
  params = runs.trainer(init, small)(ones(small), KEY)
  assert all(bool(jnp.isnan(x).all()) for x in jax.tree.leaves(params))
  with pytest.raises(ValueError, match=r"stage 0 keeps more .* size=6"):
    runs.checkpoints(init, small, ones(small), KEY, [1])


@pytest.mark.parametrize("at", [[], [0], [3, 3], [5, 2], [14]])
def test_steps_that_are_not_there_are_refused(at):
  with pytest.raises(ValueError, match="ascending steps of 1 to 13"):
    runs.checkpoints(init, TWO, ones(TWO), KEY, at)


def test_bad_runs_are_refused():
  with pytest.raises(ValueError, match="one stage or more"):
    runs.trainer(init, [])
  with pytest.raises(ValueError, match=r"\(10,\), \(10,\).*\(10,\), \(7,\)"):
    runs.trainer(init, TWO)([jnp.ones(10), jnp.ones(10)], KEY)
