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
from typing import IO, Any, NamedTuple

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
  features: Features,
  operands: PyTree,
  data: PyTree,
  *,
  names: Sequence[str] | None = None,
  held: np.ndarray | None = None,
  append: bool = False,
  per_shard: int | None = None,
  loop: Loop = Loop(),
) -> Store:
  """Writes the features of every example to disk; goes on where it was stopped.

  Args:
    folder: of a store that `disk.create` made.
    features: what is kept of an example.
    operands: their first argument.
    data: pytree of arrays with leading axis N.
    names: of the examples, or with `held` of the rows that it says are kept;
      their numbers unless given.
    held: bool [N, P], which parts of an example have a row of their own, where
      features are [B, P, F].
    append: whether other data may be in the store already; these come after.
    per_shard: examples of a shard; as many as make 64 MiB unless given.
    loop: how to run over the data. Several processes need a mesh.

  Raises:
    ValueError: other data in the store and no `append`; names that are not as
      many; another process that writes the same shard; a disk that is full.
      What was written is kept.
  """
  process, processes = jax.process_index(), jax.process_count()
  if processes > 1 and loop.mesh is None:
    raise ValueError(f"{processes} processes need a mesh: give `loop` one")
  path = Path(folder)
  with meshes.together(f"a store in {path}"):
    store, n = disk.opened(path), streams.rows(data)
    counts = _counts(n, names, held)
    each = 1 if held is None else held.shape[1]
    cut = disk.cut(store, counts, each, per_shard, processes)
    digest = records.digest(data)
  meshes.check_same("data", digest)
  with meshes.together(f"adding to {path}"):
    if process == 0:
      with (path / "lock").open("w") as file:  # one adds at a time
        fcntl.lockf(file, fcntl.LOCK_EX)
        if _part(path, digest, append) is None:
          disk.add(store, digest, cut)
  with meshes.together(f"room in {path}"):  # before any of them writes
    part = _part(path, digest, append)
    assert part is not None
    todo = disk.missing(part)
    _check_room(store, part, counts, todo)
  names = _numbers(part, path) if names is None else names
  owners = _owners(
    streams.batch_size(min(n, part.per_shard * len(todo)), loop), loop
  )
  writers = np.unique(owners).tolist()
  shards = {who: todo[i :: len(writers)] for i, who in enumerate(writers)}
  order = _order(part, shards, owners)
  firsts = np.concatenate([[0], np.cumsum(counts)])
  run = _encoded(features, store.layout, store.dtype, loop.mesh)
  known = _Known(names, firsts, held, owners)
  with _filling(part, shards.get(process, []), known) as put:
    streams.visit(run, operands, data, order, put, loop)
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


def _counts(
  n: int, names: Sequence[str] | None, held: np.ndarray | None
) -> np.ndarray:
  """Rows of each example [N]; names, if any, are as many as all of them."""
  counts = np.ones(n, np.int64) if held is None else held.sum(axis=1)
  if names is not None and len(names) != counts.sum():
    raise ValueError(
      f"{len(names)} names of {counts.sum()} rows: give one for each"
    )
  return counts


def _numbers(part: Part, path: Path) -> list[str]:
  """Those of the rows of a part, as names."""
  before = [x.rows for x in disk.parts(path) if x.path < part.path]
  return [str(sum(before) + i) for i in range(part.rows)]


def _part(path: Path, digest: str, append: bool) -> Part | None:
  """That of a data set, if it is there."""
  there = disk.parts(path)
  found = [part for part in there if part.digest == digest]
  if found:
    return found[0]
  if there and not append:
    raise ValueError(
      f"{path} holds rows of other data: give this build another folder, or"
      " append=True to add these to them"
    )
  return None


def _owners(size: int, loop: Loop) -> np.ndarray:
  """Which process keeps each row of a batch [B].

  The first of those whose devices hold it.
  """
  owners = np.full(size, jax.process_count())
  for device, place in meshes.places(size, loop.mesh).items():
    owners[place] = np.minimum(owners[place], device.process_index)
  return owners


def _order(
  part: Part, shards: Mapping[int, Sequence[int]], owners: np.ndarray
) -> np.ndarray:
  """Which examples each batch holds [batches, B], where they are kept."""
  nothing = np.zeros(0, np.int64)
  columns = {}
  for who, numbers in shards.items():
    x = np.concatenate([nothing, *map(part.inside, numbers)])
    own = int((owners == who).sum())
    padding = -len(x) % own
    columns[who] = np.pad(x, (0, padding), constant_values=-1).reshape(-1, own)
  batches = max(map(len, columns.values()), default=0)
  order = np.full((batches, len(owners)), -1)
  for who, x in columns.items():
    order[: len(x), owners == who] = x
  return order


class _Known(NamedTuple):
  """What is known of the rows before they are computed."""

  names: Sequence[str]
  firsts: np.ndarray  # [N + 1], the first row of each example
  held: np.ndarray | None
  owners: np.ndarray  # [B]


@contextlib.contextmanager
def _filling(
  part: Part, mine: Sequence[int], known: _Known
) -> Iterator[Callable[[Encoded, np.ndarray], None]]:
  """Takes the rows of examples in the order of `mine`, shard by shard.

  Where one process cannot write, all of them fail.
  """
  writing = f"writing {part.path}"
  with (part.path / "shards" / "lock").open("w") as file:
    with meshes.together(writing):
      writer = _Writer(part, mine, known, file)

    def put(encoded, index):
      with meshes.together(writing):
        writer.put(encoded, index)

    try:
      yield put
    except BaseException:  # what is whole is kept
      writer.settle()
      raise
    with meshes.together(writing):
      writer.settle()


class _Writer:
  """Holds the shard that is being filled, and the one that is being written."""

  def __init__(self, part: Part, mine: Sequence[int], known: _Known, file: IO):
    self.part, self.todo = part, list(mine)
    self.known, self.file = known, file
    self.kept: list[list[np.ndarray]] = []
    self.have = 0  # examples
    self.pending: Callable[[], None] | None = None
    self._lock()

  def put(self, encoded: Encoded, index: np.ndarray) -> None:
    """Takes the rows of a batch; writes the shards that they complete."""
    arrays, local = _local(encoded, index, self.known.owners)
    arrays, local = [x[local >= 0] for x in arrays], local[local >= 0]
    while len(local):
      examples = self.part.inside(self.todo[0])
      assert local[0] == examples[self.have], "rows come in the order of shards"
      count = int(np.searchsorted(local, examples[-1], "right"))
      held = self.known.held
      taken = slice(count) if held is None else held[local[:count]]
      self.kept.append([x[:count][taken] for x in arrays])
      self.have += count
      arrays, local = [x[count:] for x in arrays], local[count:]
      if self.have == len(examples):
        self._write(examples)

  def settle(self) -> None:
    """Waits until what was begun is written."""
    pending, self.pending = self.pending, None
    if pending is not None:
      pending()

  def _write(self, examples: np.ndarray) -> None:
    shard = self.todo.pop(0)
    values = [np.concatenate(x) for x in zip(*self.kept, strict=True)]
    firsts = self.known.firsts
    rows = slice(firsts[examples[0]], firsts[examples[-1] + 1])
    self.settle()
    self.pending = _written(self.part, shard, values, self.known.names[rows])
    self.kept, self.have = [], 0
    self._lock()

  def _lock(self) -> None:
    if self.todo:
      lock(self.file, self.part, self.todo[0])


def _written(
  part: Part,
  shard: int,
  values: Sequence[np.ndarray],
  names: Sequence[str],
) -> Callable[[], None]:
  """Begins to write a shard; what is returned waits for it and says so."""

  def said(error):
    return ValueError(
      f"shard {shard} of {part.path} could not be written: {error}. What was"
      " written before is kept: mend that, make room if the disk is full, and"
      " build again"
    )

  try:
    futures = [
      disk.write(part, shard, name, x)
      for name, x in zip(("rows", "scales"), values, strict=False)
    ]
  except Exception as error:  # TensorStore's are of many types
    raise said(error) from error

  def finish():
    try:
      for future in futures:
        future.result()
    except Exception as error:
      raise said(error) from error
    disk.finish(part, shard, len(values[0]), names)

  return finish


def lock(file: IO, part: Part, shard: int) -> None:
  """Makes a shard one's own until the file is closed, or the process ends."""
  try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard)
  except OSError as error:
    raise ValueError(
      f"another process is writing shard {shard} of {part.path}: wait for it,"
      " or build in another folder"
    ) from error


def _local(
  encoded: Encoded, index: np.ndarray, owners: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
  """The rows that this process keeps, and which examples they are."""
  mine = owners == jax.process_index()
  arrays = []
  for x in encoded:
    if x is None:
      continue
    pieces = {s.index[0].start or 0: s for s in x.addressable_shards}
    kept = [
      np.asarray(s.data)[mine[s.index[0]]] for _, s in sorted(pieces.items())
    ]
    arrays.append(np.concatenate(kept))
  return arrays, index[mine]


def _check_room(
  store: Store, part: Part, counts: np.ndarray, todo: Sequence[int]
) -> None:
  """Refuses to begin what the disk has no room for."""
  rows = sum(int(counts[part.inside(number)].sum()) for number in todo)
  wanted = rows * layout.row_bytes(store.layout, store.dtype)
  free = shutil.disk_usage(part.path).free
  if wanted > free:
    raise ValueError(
      f"{part.path} needs about {wanted / 1e9:.3g} GB for {rows} rows and"
      f" {free / 1e9:.3g} GB are free: make room, or choose a smaller dimension"
      " or int8"
    )
