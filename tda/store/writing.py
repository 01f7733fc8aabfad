"""Building a gradient store: one pass that writes what it computes.

Examples go through shard by shard, each process of a run filling shards of its
own with the rows that its devices computed. A shard is written whole, and a
build that was stopped, in whatever way, goes on with those that are missing: on
another number of devices or processes, too.

Notation: N examples, P parts of one, B batch, F columns.
"""

import contextlib
import fcntl
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tda import meshes, records, streams
from tda.store import disk, layout
from tda.store.disk import Part, Store
from tda.store.layout import Encoded, Span
from tda.streams import Batch, Loop

PyTree = Any
Features = Callable[[PyTree, Batch], tuple[jax.Array, jax.Array]]
"""(operands, batch) -> (rows [B, F] or [B, P, F], finite [B])."""


def build(
  folder: str | os.PathLike,
  spans: Sequence[Span],
  features: Features,
  operands: PyTree,
  data: PyTree,
  *,
  about: Mapping[str, Any],
  dtype: str = "bfloat16",
  names: Sequence[str] | None = None,
  held: np.ndarray | None = None,
  append: bool = False,
  per_shard: int | None = None,
  loop: Loop = Loop(),
) -> Store:
  """Writes the features of every example to disk; goes on where it was stopped.

  Args:
    folder: of the store; made if missing.
    spans: layout of a row.
    features: what is kept of an example.
    operands: their first argument.
    data: pytree of arrays with leading axis N.
    about: what the rows are of, as JSON values by name: digests of the model
      and of the projection, at least.
    dtype: "bfloat16", "float32", or "int8" with a scale for each module.
    names: of the examples, or with `held` of the rows that it says are kept;
      their numbers unless given.
    held: bool [N, P], which parts of an example have a row of their own, where
      features are [B, P, F].
    append: whether other data may be in the store already; these come after.
    per_shard: examples of a shard; as many as make 64 MiB unless given.
    loop: how to run over the data. Several processes need a mesh.

  Raises:
    ValueError: a store of another model, projection or layout; other data in it
      and no `append`; names that are not as many; another process that writes
      the same shard; a disk that is full. What was written is kept.
  """
  path, n = Path(folder), streams.rows(data)
  own = jax.process_index(), jax.process_count()
  if own[1] > 1 and loop.mesh is None:
    raise ValueError(f"{own[1]} processes need a mesh: give `loop` one")
  counts = np.ones(n, np.int64) if held is None else held.sum(axis=1)
  names = _named(names, counts)
  if own[0] == 0:
    disk.create(path, spans, dtype, about)
  meshes.together(f"{path} manifest")
  each = 1 if held is None else held.shape[1]
  cut = disk.cut(spans, dtype, n, each, per_shard)
  digest = records.digest(data)
  part = _part(path, digest, append)
  if part is None:
    if own[0] == 0:
      disk.add(path, digest, cut)
    meshes.together(f"{path} part {digest}")
    part = _part(path, digest, append)
    assert part is not None
  todo = disk.missing(part)
  meshes.together(f"{path} missing {digest}")  # before any of them writes
  _check_room(part, spans, dtype, len(todo))
  mine = todo[own[0] :: own[1]]
  order = _order(part, todo, loop)
  firsts = np.concatenate([[0], np.cumsum(counts)])

  run = _encoded(features, tuple(spans), dtype, loop.mesh)
  with _filling(part, mine, names, firsts, held) as put:
    streams.visit(run, operands, data, order, put, loop)
  meshes.together(f"{path} written {digest}")
  return disk.opened(path)


@functools.lru_cache(maxsize=8)  # a second build compiles nothing
def _encoded(
  features: Features,
  spans: tuple[Span, ...],
  dtype: str,
  mesh: jax.sharding.Mesh | None,
) -> Callable[[PyTree, Batch], tuple[Encoded, jax.Array]]:
  """Features as they are kept, each example's where its batch was."""

  def run(operands, batch):
    rows, finite = features(operands, batch)
    finite &= jnp.isfinite(rows).reshape(rows.shape[0], -1).all(axis=1)
    encoded = layout.encode(rows, spans, dtype)
    return meshes.constrained(encoded, mesh), finite

  return run


def _named(names: Sequence[str] | None, counts: np.ndarray) -> Sequence[str]:
  total = int(counts.sum())
  if names is None:
    return [str(i) for i in range(total)]
  if len(names) != total:
    raise ValueError(f"{len(names)} names of {total} rows: give one for each")
  return names


def _part(path: Path, digest: str, append: bool) -> Part | None:
  """That of a data set, if it is there."""
  store = disk.opened(path)
  found = [part for part in store.parts if part.digest == digest]
  if found:
    return found[0]
  if store.parts and not append:
    raise ValueError(
      f"{path} holds rows of other data: give this build another folder, or"
      " append=True to add these to them"
    )
  return None


def _order(part: Part, todo: Sequence[int], loop: Loop) -> np.ndarray:
  """Which examples each batch holds [batches, B], each process's together."""
  processes = jax.process_count()
  nothing = np.zeros(0, np.int64)
  lists = [
    np.concatenate([nothing, *map(part.inside, todo[i::processes])])
    for i in range(processes)
  ]
  size = streams.batch_size(max(map(len, lists)) * processes, loop)
  own = size // processes
  if not own:
    return np.zeros((0, 1), np.int64)
  batches = -(-max(map(len, lists)) // own)
  padded = [
    np.pad(x, (0, batches * own - len(x)), constant_values=-1) for x in lists
  ]
  return np.concatenate([x.reshape(batches, own) for x in padded], axis=1)


@contextlib.contextmanager
def _filling(
  part: Part,
  mine: Sequence[int],
  names: Sequence[str],
  firsts: np.ndarray,
  held: np.ndarray | None,
) -> Iterator[Callable[[Encoded, np.ndarray], None]]:
  """Takes the rows of examples in the order of `mine`, shard by shard."""
  todo = list(mine)
  kept: list[list[np.ndarray]] = []
  pending: list[Callable[[], None]] = []
  have = 0

  def settle():
    while pending:
      pending.pop()()

  with contextlib.ExitStack() as stack:
    lock = stack.enter_context(locked(part, todo[0])) if todo else None

    def put(encoded, index):
      nonlocal kept, have, lock
      arrays, local = _local(encoded, index)
      arrays, local = [x[local >= 0] for x in arrays], local[local >= 0]
      while len(local):
        examples = part.inside(todo[0])
        count = int(np.searchsorted(local, examples[-1], "right"))
        if held is None:
          kept.append([x[:count] for x in arrays])
        else:
          kept.append([x[:count][held[local[:count]]] for x in arrays])
        have += count
        arrays, local = [x[count:] for x in arrays], local[count:]
        if have < len(examples):
          continue
        shard = todo.pop(0)
        values = [np.concatenate(x) for x in zip(*kept, strict=True)]
        said = names[firsts[examples[0]] : firsts[examples[-1] + 1]]
        settle()
        pending.append(_written(part, shard, values, said, lock))
        kept, have = [], 0
        lock = stack.enter_context(locked(part, todo[0])) if todo else None

    try:
      yield put
    finally:  # what is whole is kept when the next example is not finite
      settle()


def _written(
  part: Part,
  shard: int,
  values: Sequence[np.ndarray],
  names: Sequence[str],
  unlock: Callable[[], None] | None,
) -> Callable[[], None]:
  """Begins to write a shard; what is returned waits for it and says so."""
  futures = [
    disk.write(part, shard, name, x)
    for name, x in zip(("rows", "scales"), values, strict=False)
  ]

  def finish():
    try:
      for future in futures:
        future.result()
    except Exception as error:  # TensorStore's are of many types
      raise ValueError(
        f"shard {shard} of {part.path} could not be written: {error}. What was"
        " written before is kept: make room and build again"
      ) from error
    disk.finish(part, shard, len(values[0]), names)
    if unlock:
      unlock()

  return finish


@contextlib.contextmanager
def locked(part: Part, shard: int) -> Iterator[Callable[[], None]]:
  """A shard of one's own until the process ends, or unlocks it."""
  path = part.path / "shards" / f"{shard:06d}.lock"
  file = path.open("w")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    file.close()
    raise ValueError(
      f"another process is writing shard {shard} of {part.path}: wait for it,"
      " or build in another folder"
    ) from error

  def unlock():
    if not file.closed:
      path.unlink(missing_ok=True)
      file.close()

  try:
    yield unlock
  finally:
    unlock()


def _local(encoded: Encoded, index: np.ndarray) -> tuple[list, np.ndarray]:
  """The rows that this process's devices hold, and which examples they are."""
  arrays = [x for x in encoded if x is not None]
  places: list[slice] = []
  parts: list[list[np.ndarray]] = []
  for x in arrays:
    shards = [s for s in x.addressable_shards if s.replica_id == 0]
    shards.sort(key=lambda s: s.index[0].start or 0)
    places = [s.index[0] for s in shards]
    parts.append([np.asarray(s.data) for s in shards])
  local = np.concatenate([index[place] for place in places])
  return [np.concatenate(x) for x in parts], local


def _check_room(
  part: Part, spans: Sequence[Span], dtype: str, shards: int
) -> None:
  """Refuses to begin what the disk has no room for."""
  row = layout.width(spans) * jnp.dtype(dtype).itemsize
  wanted = row * part.per_shard * shards
  free = shutil.disk_usage(part.path).free
  if wanted > free:
    raise ValueError(
      f"{part.path} needs about {wanted / 1e9:.3g} GB for {shards} shards and"
      f" {free / 1e9:.3g} GB are free: make room, or choose a smaller dimension"
      " or int8"
    )
