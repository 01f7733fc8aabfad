"""Passes over data: batches, failures, progress, and taking up again."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda import meshes, streams
from tda.streams import Fold, Loop

N = 11


def dataset(n=N):
  rng = np.random.default_rng(0)
  return {
    "x": rng.normal(size=(n, 3)).astype(np.float32),
    "id": np.arange(n, dtype=np.int32),
  }


def of_batch(scale, batch):
  """Values by example; an example is bad if its first entry is not finite."""
  x = batch.rows["x"] * scale
  values = {"x": x, "place": (batch.positions, batch.rows["id"])}
  return values, jnp.isfinite(x).all(axis=1)


def summed():
  """Sum of the rows that count, and how many they are."""

  def update(state, scale, batch):
    total, count = state
    values, finite = of_batch(scale, batch)
    lanes = jnp.ones_like(finite) if batch.lanes is None else batch.lanes
    total = total + lanes @ values["x"]
    return (total, count + lanes.sum(dtype=jnp.int32)), finite

  init = lambda scale: (jnp.zeros(3), jnp.zeros((), jnp.int32))
  return Fold(init, update, lambda state: (2 * state[0], state[1]))


@pytest.fixture
def batches(monkeypatch):
  """The first rows of the batches that were handed out, and a way to stop."""
  seen, spread = [], meshes.spread
  stop = {}

  def spy(batch, over):
    if len(seen) == stop.get("after"):
      stop.clear()
      raise KeyboardInterrupt
    seen.append(int(batch.positions[0]))
    return spread(batch, over)

  monkeypatch.setattr(meshes, "spread", spy)
  seen_and_stop = lambda after=None: stop.update(after=after) or seen
  return seen_and_stop


@pytest.mark.parametrize("size", [1, 4, N, 100])
def test_every_example_counts_once(size):
  data, scale = dataset(), jnp.float32(3)
  total, count = streams.fold(summed(), scale, data, Loop(size))
  np.testing.assert_allclose(total, 6 * data["x"].sum(axis=0), rtol=1e-5)
  assert count == N
  found = streams.each(of_batch, scale, data, Loop(size))
  np.testing.assert_array_equal(found["x"], 3 * data["x"])
  for place in found["place"]:
    np.testing.assert_array_equal(place, np.arange(N))


def test_a_pass_compiles_once_also_when_repeated():
  """The last batch is padded, and a mesh does not move the state."""
  data, stream = dataset(), summed()
  update = chex.assert_max_traces(stream.update, n=1)
  values = chex.assert_max_traces(of_batch, n=1)
  loop = Loop(4, mesh=meshes.mesh(2))
  for scale in map(jnp.float32, (1, 2)):
    streams.fold(stream._replace(update=update), scale, data, loop)
    streams.each(values, scale, data, loop)
  chex.clear_trace_counter()


@pytest.mark.parametrize(("data", "model"), [(1, 1), (2, 4), (8, 1)])
def test_batches_are_split_over_the_data_axis(data, model, batches):
  mesh = meshes.mesh(data, model)
  rows, scale = dataset(), jnp.float32(1)
  count = streams.fold(summed(), scale, rows, Loop(5, mesh=mesh))[1]
  assert count == N
  found = streams.each(of_batch, scale, rows, Loop(5, mesh=mesh))
  np.testing.assert_array_equal(found["x"], rows["x"])
  assert all(start % data == 0 for start in batches())
  placed = meshes.spread(
    streams.Batch(np.zeros((8, 2)), np.arange(8), None), mesh
  )
  assert placed.rows.sharding.shard_shape((8, 2)) == (8 // data, 2)
  assert placed.rows.dtype == np.float32


@pytest.mark.parametrize("size", [3, N])
@pytest.mark.parametrize("run", ["fold", "each"])
def test_the_first_bad_example_is_named(run, size):
  data = dataset()
  data["x"][[6, 9], 1] = [np.inf, np.nan]
  one = jnp.float32(1)
  with pytest.raises(ValueError, match="example 6 are not finite"):
    if run == "fold":
      streams.fold(summed(), one, data, Loop(size))
    else:
      streams.each(of_batch, one, data, Loop(size))


@pytest.mark.parametrize("run", ["fold", "each"])
def test_an_interrupted_pass_is_taken_up(run, tmp_path, batches):
  """With other batches, on another mesh; a finished one does nothing."""
  data, one = dataset(), jnp.float32(1)
  loop = Loop(2, directory=str(tmp_path), save_every=0)

  def go(loop):
    if run == "fold":
      return streams.fold(summed(), one, data, loop)
    return streams.each(of_batch, one, data, loop)

  whole = go(loop._replace(directory=None))
  starts = batches(after=len(batches()) + 4)
  before = len(starts)
  with pytest.raises(KeyboardInterrupt):
    go(loop)
  assert starts[before:] == [0, 2, 4, 6]
  before = len(starts)
  found = go(loop._replace(batch_size=5, mesh=meshes.mesh(2)))
  first = starts[before]
  assert first in (4, 6, 8)  # a batch or two were on their way
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, whole
  )
  before = len(starts)
  again = go(loop)
  assert len(starts) == before
  jax.tree.map(np.testing.assert_array_equal, again, found)


def test_what_was_saved_before_a_bad_example_is_kept(tmp_path, batches):
  data, one = dataset(), jnp.float32(1)
  spoiled = {**data, "x": data["x"].copy()}
  spoiled["x"][7] = np.nan
  loop = Loop(2, directory=str(tmp_path))
  with pytest.raises(ValueError, match="example 7"):
    streams.each(of_batch, one, spoiled, loop)
  before = len(batches())
  found = streams.each(of_batch, one, data, loop)
  np.testing.assert_array_equal(found["x"], data["x"])
  assert batches()[before] == 6


def test_a_folder_belongs_to_one_computation(tmp_path):
  data, one = dataset(), jnp.float32(1)
  loop = Loop(directory=str(tmp_path))
  streams.each(of_batch, one, data, loop)
  with pytest.raises(ValueError, match="results of other examples:"):
    streams.each(of_batch, one, dataset(5), loop)
  with pytest.raises(ValueError, match="results of other values:"):
    streams.each(lambda p, b: (b.positions, b.positions >= 0), one, data, loop)


def test_the_bar_shows_its_label_or_nothing(capsys):
  data, one = dataset(), jnp.float32(1)
  streams.each(of_batch, one, data, Loop(label="scores"))
  shown = capsys.readouterr().err
  assert "scores: 100%" in shown and f"{N}/{N}" in shown
  streams.each(of_batch, one, data, Loop())
  assert not capsys.readouterr().err


def test_a_stage_has_its_own_folder_and_label():
  loop = Loop(label="fit", directory="runs/a").stage("queries 1 of 2")
  assert loop.directory == "runs/a/queries_1_of_2"
  assert loop.label == "fit queries 1 of 2"
  assert Loop().stage("x") == Loop()


@pytest.mark.parametrize(
  "data",
  [{}, {"x": np.zeros((0, 2))}, {"x": np.zeros(3), "y": np.zeros(2)}, 1.0],
)
def test_what_is_no_dataset_is_refused(data):
  with pytest.raises(ValueError, match="one leading axis of examples"):
    streams.each(of_batch, None, data)


def test_bad_sizes_are_refused():
  with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
    streams.each(of_batch, jnp.float32(1), dataset(), Loop(0))
  with pytest.raises(ValueError, match="needs 12 devices; there are 8"):
    meshes.mesh(3, 4)


def test_one_example_has_the_shapes_of_a_row():
  found = streams.example(dataset())
  assert found["x"].shape == (3,) and found["id"].dtype == np.int32
