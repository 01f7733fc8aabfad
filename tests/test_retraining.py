"""The retraining bank, against one call of `train` for each pair."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial

from tda.evaluation import retraining
from tda.evaluation.retraining import bank, subsets
from tda.trajectory import trainer

N, M, R = 12, 5, 3


def loss(params, example):
  return (example["x"] @ params["w"] - example["y"]) ** 2


def init(key):
  return {"w": jax.random.normal(key, (3,))}


def data():
  rng = np.random.default_rng(0)
  return {"x": rng.normal(size=(N, 3)), "y": rng.normal(size=N)}


@functools.cache  # the same functions, so that banks share their programs
def setup():
  train = trainer(
    loss, init, optax.sgd(0.05), data(), epochs=2, batch_size=3, size=6
  )
  queries = {"x": jnp.eye(3), "y": jnp.ones(3)}

  def measure(queries, params):
    losses = jax.vmap(loss, (None, 0))(params, queries)
    return {
      "loss": losses,
      "right": losses < 1,
      "norm": params["w"] @ params["w"],
    }

  weights = subsets(jax.random.key(1), N, M, 0.5)
  keys = jax.random.split(jax.random.key(2), R)
  return train, Partial(measure, queries), weights, keys


def assert_same(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@functools.cache
def one_by_one():
  train, measure, weights, keys = setup()
  one = jax.jit(lambda w, key: measure(train(w, key)))
  rows = [[one(w, key) for key in keys] for w in weights]
  rows = [jax.tree.map(lambda *xs: np.stack(xs), *row) for row in rows]
  return jax.tree.map(lambda *xs: np.stack(xs), *rows)


@pytest.mark.parametrize(
  "options",
  [{}, {"chunk": 1}, {"chunk": 4, "workers": 3}, {"chunk": 64, "workers": 1}],
)
def test_every_chunking_measures_every_pair(options):
  measured = bank(*setup(), **options)
  assert measured["loss"].shape == (M, R, 3)
  assert measured["norm"].shape == (M, R)
  assert measured["right"].dtype == bool
  assert_same(measured, one_by_one(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape, axis", [((8,), 0), ((2, 4), 0), ((2, 4), 1)])
def test_pairs_sharded_over_devices(shape, axis):
  names = ("data", "model")[: len(shape)]
  mesh = jax.make_mesh(
    shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape)
  )
  sharding = NamedSharding(mesh, PartitionSpec(names[axis]))
  measured = bank(*setup(), sharding=sharding)
  assert_same(measured, one_by_one(), rtol=1e-4, atol=1e-6)
  with pytest.raises(ValueError, match=f"{shape[axis]} shards"):
    bank(*setup(), sharding=sharding, chunk=shape[axis] + 1)
  with pytest.raises(ValueError, match="one worker"):
    bank(*setup(), sharding=sharding, workers=2)


def test_float64_survives_the_threads():
  with jax.enable_x64(True):
    train, measure, weights, keys = setup.__wrapped__()
    measured = bank(train, measure, weights, keys, chunk=2, workers=2)
    assert measured["loss"].dtype == np.float64


def test_chunks_shrink_to_memory(monkeypatch, tmp_path):
  def files(room):
    monkeypatch.setattr(retraining, "_needed", lambda program: 800)
    monkeypatch.setattr(retraining, "_memory", lambda device: room)
    folder = tmp_path / str(room)
    measured = bank(*setup(), workers=2, directory=folder)
    assert_same(measured, one_by_one(), rtol=1e-4, atol=1e-6)
    return len(list(folder.glob("part_*.npz")))

  # Of 8 pairs that need 800 bytes, 15 in all and 2 workers.
  assert files(10_000) == 2
  assert files(600) == 5  # room for six pairs: two workers of three
  assert files(100) == M * R


def test_resumes_what_is_missing_in_other_chunks(tmp_path):
  train, measure, weights, keys = setup()
  full = bank(train, measure, weights, keys, chunk=4, directory=tmp_path)
  files = sorted(tmp_path.glob("part_*.npz"))
  assert len(files) == 4
  with np.load(files[1]) as arrays:
    altered = dict(arrays)
  altered["0"] = altered["0"] + 100  # whoever trains this again loses the mark
  np.savez(files[1], **altered)
  files[0].unlink()
  files[3].unlink()
  again = bank(train, measure, weights, keys, chunk=3, directory=tmp_path)
  shift = (again["loss"] - full["loss"]).reshape(M * R, 3)
  np.testing.assert_allclose(shift[4:8], 100, rtol=1e-4)
  np.testing.assert_allclose(np.delete(shift, range(4, 8), 0), 0, atol=1e-5)


def test_a_directory_of_another_bank_is_refused(tmp_path):
  train, measure, weights, keys = setup()
  bank(train, measure, weights, keys, directory=tmp_path)
  other = subsets(jax.random.key(9), N, M, 0.5)
  with pytest.raises(ValueError, match="other weights"):
    bank(train, measure, other, keys, directory=tmp_path)
  with pytest.raises(ValueError, match="other keys"):
    bank(train, measure, weights, keys[::-1], directory=tmp_path)
  with pytest.raises(ValueError, match="other measurement"):
    bank(train, lambda p: p["w"], weights, keys, directory=tmp_path)


def test_a_diverged_run_is_named_and_the_rest_kept(tmp_path):
  train, measure, weights, keys = setup()

  def broken(weights, key):
    # Only mask 3 and seed 1 diverge.
    bad = (weights == mask).all() & (jax.random.key_data(key) == bits).all()
    return jax.tree.map(
      lambda p: jnp.where(bad, jnp.nan, p), train(weights, key)
    )

  mask, bits = weights[3], jax.random.key_data(keys[1])
  options = {"chunk": 1, "workers": 1, "directory": tmp_path}
  with pytest.raises(ValueError, match="mask 3 and seed 1"):
    bank(broken, measure, weights, keys, **options)
  assert len(list(tmp_path.glob("part_*.npz"))) >= 3 * R + 1
  assert not (tmp_path / f"part_{3 * R + 1:010d}.npz").exists()


def test_more_kept_examples_than_size_are_named():
  train, measure, _, keys = setup()
  weights = jnp.ones((2, N)).at[0, :6].set(0)
  with pytest.raises(ValueError, match=r"mask 1 and seed 0.*size"):
    bank(train, measure, weights, keys, chunk=1, workers=1)


SLOW = """
import sys, time
sys.path[:0] = {path!r}
import jax, test_retraining as t
train, measure, weights, keys = t.setup()
def slow(params):
  jax.debug.callback(lambda: time.sleep(0.2))
  return measure(params)
t.bank(train, slow, weights, keys, chunk=1, workers=1, directory={folder!r})
"""


def test_kill_and_resume(tmp_path):
  here = Path(__file__).parent
  path = [str(here), str(here.parent)]
  script = SLOW.format(path=path, folder=str(tmp_path))
  process = subprocess.Popen(
    [sys.executable, "-c", script], env={**os.environ, "JAX_PLATFORMS": "cpu"}
  )
  deadline = time.monotonic() + 120
  while len(list(tmp_path.glob("part_*.npz"))) < 3:
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("part_*")}
  assert len(kept) < M * R
  measured = bank(*setup(), directory=tmp_path)
  assert_same(measured, one_by_one(), rtol=1e-4, atol=1e-6)
  assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_programs_are_compiled_once_for_several_banks():
  train, measure, weights, keys = setup()
  traced = []

  def counted(params):
    traced.append(1)
    return measure(params)

  bank(train, counted, weights, keys, chunk=4)
  once = len(traced)
  bank(train, counted, 1 - weights, keys, chunk=4)
  assert len(traced) == once


def test_subsets_keep_exactly_the_fraction():
  weights = np.asarray(subsets(jax.random.key(0), 101, 400, 0.3))
  assert (weights.sum(1) == 30).all() and set(weights.flat) == {0, 1}
  # Each example is kept 400 · 30/101 times, hypergeometric variance.
  p = 30 / 101
  error = (weights.mean(0) - p) / np.sqrt(p * (1 - p) / 400)
  assert np.abs(error).max() < 4.5
  with pytest.raises(ValueError, match="keeps 0"):
    subsets(jax.random.key(0), 10, 2, 0.01)


def test_bad_weights_and_keys():
  train, measure, weights, keys = setup()
  with pytest.raises(ValueError, match="masks, examples"):
    bank(train, measure, weights[0], keys)
  with pytest.raises(ValueError, match="example 2, mask 1"):
    bank(train, measure, weights.at[1, 2].set(jnp.nan), keys)
  with pytest.raises(ValueError, match=r"jax\.random\.split"):
    bank(train, measure, weights, jax.random.key_data(keys))
