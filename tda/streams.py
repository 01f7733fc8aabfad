"""Passes over data: the only loops over examples in the library.

`fold` sums something over a dataset, `each` computes something for every
example, and `visit` hands such values on as they come. All cut the data into
batches of one static shape, pad the last one and say which rows count, show
progress, and name the first example whose outputs are not finite. The first two
can save as they go and continue after a kill, with any batch size.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax import lax

from tda import checkpoints, chunks, meshes, parts

Array = jax.Array
PyTree: TypeAlias = Any


class Batch(NamedTuple):
  """Rows of a dataset."""

  rows: PyTree  # leaves [B, ...]
  positions: Array | np.ndarray  # [B] int32, in the dataset
  lanes: Array | np.ndarray | None  # [B] 0/1, 0 for padding; None: all count


class Loop(NamedTuple):
  """How to run over a dataset.

  Attributes:
    batch_size: rows at a time; evened out over the batches.
    label: of the progress bar; None shows none.
    mesh: whose "data" axis each batch is spread over; None: one device.
    directory: where to save as the pass goes; what an interrupted pass left
      there is taken up. It must belong to the same pass, which the caller
      sees to.
    save_every: seconds between saves, more where a save takes long.
    microbatch: rows of a batch that are computed at a time, one microbatch
      after another in the same program: memory is then that of a microbatch.
      None: the whole batch. A multiple of the mesh's "data" axis.
  """

  batch_size: int = 128
  label: str | None = None
  mesh: jax.sharding.Mesh | None = None
  directory: str | None = None
  save_every: float = 60.0
  microbatch: int | None = None

  def stage(self, name: str) -> "Loop":
    """The loop of one pass of several: its own folder and name on the bar."""
    folder = name.replace(" ", "_")
    return self._replace(
      directory=self.directory and os.path.join(self.directory, folder),
      label=self.label and f"{self.label} {name}",
    )


class Fold(NamedTuple):
  """A sum over a dataset as pure functions.

  `update(state, params, batch) -> (state, finite [B])` sees each example once;
  `finite` says whose outputs are finite. Only shapes matter to `init(params)`.
  A fold that is run again is not compiled again.
  """

  init: Callable[[PyTree], PyTree]
  update: Callable[[PyTree, PyTree, Batch], tuple[PyTree, Array]]
  finalize: Callable[[PyTree], PyTree]


def fold(
  stream: Fold, params: PyTree, data: PyTree, loop: Loop = Loop()
) -> PyTree:
  """Runs a fold over a dataset, a pytree of arrays with leading axis N.

  Raises:
    ValueError: the first example whose outputs are not finite, by index.
  """
  params = meshes.replicate(params, loop.mesh)
  state, seen = meshes.replicate(stream.init(params), loop.mesh), 0

  def record(seen):
    count = meshes.replicate(np.int32(seen), loop.mesh)
    return {"state": state, "seen": count}

  if loop.directory is not None and checkpoints.exists(loop.directory):
    found = checkpoints.load(loop.directory, record(seen))
    state, seen = found["state"], int(meshes.fetch(found["seen"]))
  update = functools.partial(_update, stream.update, loop.microbatch)
  unchecked: list[tuple[Array, np.ndarray]] = []
  pace = checkpoints.Pace(loop.save_every)

  def save(seen):
    _check_finite(unchecked)
    if loop.directory is not None:
      with pace.saving():
        checkpoints.save(loop.directory, record(seen))

  for batch, index in _batches(data, _in_turn(rows(data), seen, loop), loop):
    state, finite = update(state, params, batch)
    _check_finite(unchecked)  # of the batch before: the device is kept busy
    unchecked.append((finite, index))
    if loop.directory is not None and pace.due():
      save(int(index.max()) + 1)
  save(rows(data))
  return stream.finalize(state)


def each(
  fn: Callable[[PyTree, Batch], tuple[PyTree, Array]],
  params: PyTree,
  data: PyTree,
  loop: Loop = Loop(),
) -> PyTree:
  """Evaluates `fn(params, batch) -> (values, finite [B])` on every example.

  Returns:
    The values, numpy arrays with leading axis N.

  Raises:
    ValueError: the first example whose outputs are not finite, by index.
  """
  n = rows(data)
  totals: list[np.ndarray] = []
  seen, treedef, shapes = 0, None, []
  if loop.directory is not None:
    probe = jax.eval_shape(fn, params, _slice(data, np.arange(1), None))[0]
    treedef = jax.tree.structure(probe)
    shapes = [(x.shape[1:], str(x.dtype)) for x in jax.tree.leaves(probe)]
  store = parts.opened(loop.directory, {"examples": n, "values": shapes})

  def put(leaves, start, stop):
    if not totals:
      totals.extend(np.empty((n, *x.shape[1:]), x.dtype) for x in leaves)
    for total, part in zip(totals, leaves, strict=True):
      total[start:stop] = part

  def keep(values, index):
    nonlocal treedef
    treedef = jax.tree.structure(values)
    index = index[index >= 0]
    leaves = [meshes.fetch(x)[: len(index)] for x in jax.tree.leaves(values)]
    put(leaves, index[0], index[-1] + 1)
    store.save(index, leaves)

  for index, leaves in store.load():
    if index[0] <= seen:
      put(leaves, index[0], index[-1] + 1)
      seen = max(seen, int(index[-1]) + 1)
  visit(fn, params, data, _in_turn(n, seen, loop), keep, loop)
  return jax.tree.unflatten(treedef, totals)


def visit(
  fn: Callable[[PyTree, Batch], tuple[PyTree, Array]],
  params: PyTree,
  data: PyTree,
  order: np.ndarray,
  keep: Callable[[PyTree, np.ndarray], None],
  loop: Loop = Loop(),
) -> None:
  """Evaluates `fn(params, batch) -> (values, finite [B])` in a given order.

  Args:
    fn: see above.
    params: its first argument.
    data: pytree of arrays with leading axis N.
    order: int [batches, B], which rows each batch holds; -1 for none.
    keep: (values, row of `order`), called batch after batch while the next one
      is computed. The values lie where they were computed, padding included.
    loop: its batch size and directory do not matter here.

  Raises:
    ValueError: the first example whose outputs are not finite, by index.
  """
  run = functools.partial(_values, fn, loop.microbatch)
  params = meshes.replicate(params, loop.mesh)
  waiting: list[tuple[PyTree, Array, np.ndarray]] = []

  def finish():
    while waiting:
      values, finite, index = waiting.pop()
      _check_finite([(finite, index)])
      keep(values, index)

  for batch, index in _batches(data, order, loop):
    values, finite = run(params, batch)
    finish()
    waiting.append((values, finite, index))
  finish()


def rows(data: PyTree) -> int:
  """The number of examples N.

  Raises:
    ValueError: no arrays, leaves of different lengths, or no rows.
  """
  paths, _ = jax.tree_util.tree_flatten_with_path(data)
  lengths = {
    jax.tree_util.keystr(path): jnp.shape(x)[0] if jnp.ndim(x) else 0
    for path, x in paths
  }
  if len(set(lengths.values())) != 1 or 0 in lengths.values():
    raise ValueError(
      "a dataset is a pytree of arrays with one leading axis of examples; got "
      f"leading axes {lengths}"
    )
  return next(iter(lengths.values()))


def example(data: PyTree) -> PyTree:
  """Shapes of one example of a dataset."""
  rows(data)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), data
  )


def batch_size(count: int, loop: Loop) -> int:
  """Rows of each batch, if `count` of them are evened out over the batches."""
  if loop.batch_size < 1:
    raise ValueError(f"batch_size must be positive, got {loop.batch_size}")
  multiple = _multiple(loop)
  batches = max(1, math.ceil(count / loop.batch_size))
  return math.ceil(count / batches / multiple) * multiple


def _in_turn(n: int, seen: int, loop: Loop) -> np.ndarray:
  """The order of a pass from row `seen` on [batches, B]."""
  size = batch_size(n - seen, loop)
  if not size:
    return np.zeros((0, 1), np.int64)
  batches = math.ceil((n - seen) / size)
  order = np.arange(seen, seen + batches * size).reshape(batches, size)
  return np.where(order < n, order, -1)


def _batches(
  data: PyTree, order: np.ndarray, loop: Loop
) -> Iterator[tuple[Batch, np.ndarray]]:
  """Batches of one shape, with the rows they hold."""
  n, left = rows(data), int((order >= 0).sum())
  padded = left < order.size
  data = jax.tree.map(np.asarray, data)
  with tqdm.tqdm(
    total=n,
    initial=n - left,
    desc=loop.label,
    unit="ex",
    disable=not loop.label,
  ) as bar:
    for index in order:
      held = index >= 0
      taken = np.where(held, index, index.max())
      batch = _slice(data, taken, held if padded else None)
      yield meshes.spread(batch, loop.mesh), index
      bar.update(int(held.sum()))


def _multiple(loop: Loop) -> int:
  """What the number of rows of a batch is a multiple of."""
  devices = 1 if loop.mesh is None else loop.mesh.shape["data"]
  if loop.microbatch is None:
    return devices
  if loop.microbatch < 1 or loop.microbatch % devices:
    raise ValueError(
      f"microbatch={loop.microbatch} cannot be spread over {devices} devices: "
      f"it is a positive multiple of {devices}"
    )
  return loop.microbatch


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _update(update, microbatch, state, params, batch):
  if microbatch is None:
    return update(state, params, batch)
  step = lambda state, part: update(state, params, part)
  state, finite = lax.scan(step, state, _microbatches(batch, microbatch))
  return state, chunks.join(finite)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _values(fn, microbatch, params, batch):
  if microbatch is None:
    return fn(params, batch)
  parts = _microbatches(batch, microbatch)
  return chunks.join(lax.map(lambda part: fn(params, part), parts))


def _microbatches(batch: Batch, size: int) -> Batch:
  return chunks.split(batch, len(batch.positions) // size)


def _slice(data: PyTree, index: np.ndarray, lanes: np.ndarray | None) -> Batch:
  taken = jax.tree.map(lambda x: x[index], data)
  weights = None if lanes is None else lanes.astype(np.float32)
  return Batch(taken, index.astype(np.int32), weights)


def _check_finite(unchecked: list[tuple[Array, np.ndarray]]) -> None:
  """Empties the list of (finite [B], rows [B])."""
  while unchecked:
    finite, index = unchecked.pop(0)
    found = meshes.fetch(finite)
    if not found.all():
      first = index[~found & (index >= 0)].min(initial=index.max())
      raise ValueError(
        f"the outputs or gradients of example {first} "
        "are not finite: look at that row of the data and at the parameters. "
        "What was saved before it is kept"
      )


@contextlib.contextmanager
def said_of(name: str) -> Iterator[None]:
  """Says which data a ValueError that is raised inside is about."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error
