"""Gradient stores on disk: what is written, resumed, added to and refused."""

import json
import multiprocessing
import shutil

import jax
import numpy as np
import pytest
import store_cases
import tensorstore as ts

from tda import likelihoods, meshes, streams
from tda.attribution import less, logra
from tda.store import disk, layout, reading, writing
from tda.store.layout import DTYPES


def features(rows):
  """What the store should hold: gradients along its directions."""
  grads, flat = store_cases.dense(rows), []
  for name, sides in store_cases.sides().items():
    x = np.asarray(grads[name])
    if sides.inputs is not None:
      x = np.einsum("bgoi,gip->bgop", x, sides.inputs)
    if sides.outputs is not None:
      x = np.einsum("bgoi,gou->bgui", x, sides.outputs)
    flat.append(x.reshape(len(x), -1))
  return np.concatenate(flat, axis=1)


def test_rows_are_projected_gradients(tmp_path):
  store = store_cases.build(tmp_path / "s")
  assert store.rows == 23 and len(store.shards) == 6 and store.complete
  np.testing.assert_allclose(
    store_cases.rows(store), features(store_cases.data()), rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize(
  "dtype, error", [("bfloat16", 2**-8), ("int8", 1 / 254)]
)
def test_narrow_types_round(tmp_path, dtype, error):
  exact = features(store_cases.data())
  store = store_cases.build(tmp_path / "s", dtype=dtype)
  got = store_cases.rows(store)
  for span in store.layout:
    want, mine = (np.asarray(layout.by_module(x, span)) for x in (exact, got))
    unit = (
      np.abs(want) if dtype == "bfloat16" else np.abs(want).max(-1)[..., None]
    )
    assert (np.abs(mine - want) <= 1.01 * error * unit + 1e-6).all()
  assert np.abs(got - exact).max() > 0


def test_any_zarr_reader_opens_it(tmp_path):
  store_cases.build(tmp_path / "s", per_shard=23)
  spec = {"driver": "zarr3", "kvstore": f"file://{tmp_path}/s/parts/000/rows/"}
  array = ts.open(spec).result()
  np.testing.assert_allclose(
    array[:23].read().result(),
    features(store_cases.data()),
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.mark.parametrize("mesh", [(8, 1), (2, 4)])
def test_devices_and_batches_do_not_matter(tmp_path, mesh):
  want = store_cases.rows(store_cases.build(tmp_path / "one"))
  loop = streams.Loop(16, mesh=meshes.mesh(*mesh), microbatch=8)
  store = store_cases.build(tmp_path / "many", loop=loop)
  assert store.about == disk.opened(tmp_path / "one").about
  np.testing.assert_allclose(
    store_cases.rows(store), want, rtol=1e-5, atol=1e-6
  )


def test_a_stopped_build_goes_on_elsewhere(tmp_path, monkeypatch):
  want = store_cases.rows(store_cases.build(tmp_path / "whole"))
  finish, done = disk.finish, []

  def stopping(part, number, rows, names):
    if len(done) == 2:
      raise KeyboardInterrupt
    done.append(number)
    finish(part, number, rows, names)

  monkeypatch.setattr(disk, "finish", stopping)
  with pytest.raises(KeyboardInterrupt):
    store_cases.build(tmp_path / "s")
  begun = disk.opened(tmp_path / "s")
  assert not begun.complete and [s.number for s in begun.shards] == [0, 1]
  monkeypatch.setattr(disk, "finish", finish)
  seen, spread = [], meshes.spread
  monkeypatch.setattr(
    meshes,
    "spread",
    lambda batch, over: seen.append(batch) or spread(batch, over),
  )
  loop = streams.Loop(8, mesh=meshes.mesh(8))
  store = store_cases.build(tmp_path / "s", loop=loop)
  positions = np.concatenate([batch.positions for batch in seen])
  assert positions.min() == 8  # the first two shards of four are not seen again
  np.testing.assert_allclose(
    store_cases.rows(store), want, rtol=1e-5, atol=1e-6
  )
  seen.clear()
  store_cases.build(tmp_path / "s")
  assert not seen


def test_later_data_are_added_and_nothing_is_written_twice(tmp_path):
  first, second = store_cases.data(23), store_cases.data(9, seed=2)
  store_cases.build(tmp_path / "s", first, names=[f"a{i}" for i in range(23)])
  files = {
    path: path.stat().st_mtime_ns
    for path in (tmp_path / "s").rglob("*")
    if path.is_file() and path.name not in ("projection.npz", "lock")
  }
  with pytest.raises(ValueError, match=r"other data.*append=True"):
    store_cases.build(tmp_path / "s", second)
  names = [f"b{i}" for i in range(9)]
  store = store_cases.build(tmp_path / "s", second, append=True, names=names)
  assert all(path.stat().st_mtime_ns == at for path, at in files.items())
  assert store.rows == 32 and store.names[22:24] == ("a22", "b0")
  both = np.concatenate([features(first), features(second)])
  np.testing.assert_allclose(
    store_cases.rows(store), both, rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(
    reading.take(store, [31, 0, 22]).values,
    both[[31, 0, 22]],
    rtol=1e-5,
    atol=1e-6,
  )
  with pytest.raises(ValueError, match="rows 0 to 32 of a store of 32"):
    reading.take(store, [0, 32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_lie_where_a_cpu_computes_on_them(tmp_path, dtype):
  """JAX copies what begins elsewhere, which takes longer than a search."""
  store = store_cases.build(tmp_path / "s", dtype=dtype)
  arrays = [x for b in reading.blocks(store) for x in jax.tree.leaves(b.rows)]
  assert arrays and {x.ctypes.data % 64 for x in arrays} == {0}


def test_a_damaged_shard_is_named(tmp_path):
  store = store_cases.build(tmp_path / "s")
  whole = store_cases.rows(store)
  path = tmp_path / "s/parts/000/rows/c/2/0"
  content = bytearray(path.read_bytes())
  content[40] ^= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r"rows 8 to 11, shard 2 of .*damaged"):
    store_cases.rows(store)
  lost = []
  kept = [
    np.array(b.rows.values)[: b.held] for b in reading.blocks(store, lost=lost)
  ]
  np.testing.assert_array_equal(
    np.concatenate(kept), np.delete(whole, range(8, 12), axis=0)
  )
  assert len(lost) == 1 and "shard 2" in lost[0]
  path.unlink()  # what is not there reads as zeros in zarr, and not here
  for read in (store_cases.rows, lambda store: reading.take(store, [9])):
    with pytest.raises(ValueError, match="shard 2"):
      read(store)


@pytest.mark.parametrize("number", [0, 5])  # a full one, and the last
@pytest.mark.parametrize("size", [0, 40])
def test_a_damaged_shard_is_built_again(tmp_path, number, size):
  store = store_cases.build(tmp_path / "s")
  whole = store_cases.rows(store)
  path = tmp_path / f"s/parts/000/rows/c/{number}/0"
  path.write_bytes(path.read_bytes()[:size])
  (tmp_path / f"s/parts/000/shards/{number:06d}.json").unlink()
  store = store_cases.build(tmp_path / "s")
  np.testing.assert_allclose(  # in batches of another size
    store_cases.rows(store), whole, rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_are_kept(tmp_path, dtype):
  rows = store_cases.data()
  rows["x"][4:8] = 0

  def masked(params, example):  # an example whose gradient vanishes
    return store_cases.OBJECTIVE.loss(params, example) * example["x"].any()

  log = logra.logger(
    likelihoods.from_loss(masked),
    store_cases.model(),
    rows,
    key=store_cases.key(),
    dimension=5,
  )
  store = log.build(
    tmp_path, store_cases.model(), rows, dtype=dtype, per_shard=4
  )
  got = store_cases.rows(store)
  assert (got[4:8] == 0).all() and (np.abs(got).max(axis=1) > 0).sum() == 19


def test_rows_are_numbered_through_all_parts(tmp_path):
  store_cases.build(tmp_path / "s")
  second = store_cases.data(9, seed=2)
  store = store_cases.build(tmp_path / "s", second, append=True)
  assert store.names == tuple(map(str, range(32)))


def test_a_store_is_of_the_updates_that_it_was_built_with(tmp_path):
  point = store_cases.trained()

  def build(**options):
    updates = less.updates(store_cases.traced(), point, **options)
    store_cases.build(tmp_path, updates=updates)

  build(b1=0.9)
  with pytest.raises(ValueError, match="is of another features"):
    build(b1=0.5)


def test_what_does_not_fit_is_refused(tmp_path):
  store_cases.build(tmp_path / "s")
  with pytest.raises(ValueError, match="another projection"):
    store_cases.build(
      tmp_path / "s", log=store_cases.logger(key=jax.random.key(6))
    )
  with pytest.raises(ValueError, match="of float32 of other blocks"):
    store_cases.build(tmp_path / "s", dtype="int8")
  with pytest.raises(ValueError, match="unknown dtype 'int4'"):
    store_cases.build(tmp_path / "t", dtype="int4")
  with pytest.raises(ValueError, match="2 names of 23 rows"):
    store_cases.build(tmp_path / "t", names=["a", "b"])
  with pytest.raises(ValueError, match="need a key"):
    store_cases.logger(key=None)
  with pytest.raises(ValueError, match="0 examples in a shard"):
    store_cases.build(tmp_path / "t", per_shard=0)
  with pytest.raises(ValueError, match=r"no gradient store in .*nowhere"):
    disk.opened(tmp_path / "nowhere")
  record = tmp_path / "s" / "manifest.json"
  record.write_text(json.dumps(json.loads(record.read_text()) | {"version": 0}))
  with pytest.raises(ValueError, match="version 0"):
    disk.opened(tmp_path / "s")


def test_data_that_are_not_finite_are_named_and_the_rest_is_kept(tmp_path):
  rows = store_cases.data()
  rows["x"][13, 2] = np.nan
  with pytest.raises(ValueError, match="example 13 are not finite"):
    store_cases.build(tmp_path / "s", rows)
  begun = disk.opened(tmp_path / "s")
  assert [s.number for s in begun.shards] == [0, 1]


def hold(path, ready, leave):
  (part,) = disk.opened(path).parts
  with (part.path / "shards" / "lock").open("w") as file:
    writing.lock(file, part, 0)
    ready.set()
    leave.wait(60)


def test_two_writers_of_one_shard(tmp_path):
  store = store_cases.build(tmp_path / "s")
  record = store.parts[0].path / "shards" / "000000.json"
  record.unlink()
  context = multiprocessing.get_context("spawn")
  ready, leave = context.Event(), context.Event()
  other = context.Process(target=hold, args=(tmp_path / "s", ready, leave))
  other.start()
  assert ready.wait(60)
  with pytest.raises(ValueError, match="another process is writing shard 0"):
    store_cases.build(tmp_path / "s")
  other.kill()  # a lock ends with its process
  other.join()
  assert store_cases.build(tmp_path / "s").complete


def test_a_full_disk(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)
  room = lambda path: usage._replace(free=1000)
  with monkeypatch.context() as patched:
    patched.setattr(shutil, "disk_usage", room)
    with pytest.raises(ValueError, match="for 23 rows and 1e-06 GB are free"):
      store_cases.build(tmp_path / "s")
  write, count = disk.write, []

  def full(part, number, name, values):
    count.append(number)
    if len(count) == 3:
      # The real thing: TensorStore's error for a place that takes no file.
      shutil.rmtree(part.path / name / "c")
      (part.path / name / "c").write_text("")
    return write(part, number, name, values)

  monkeypatch.setattr(disk, "write", full)
  with pytest.raises(ValueError, match=r"shard 2 of .* could not be written"):
    store_cases.build(tmp_path / "s")
