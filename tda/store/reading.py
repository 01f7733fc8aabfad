"""Reading the rows of a gradient store, in turn or a few of them.

Notation: n rows that are read together, F columns, M modules.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorstore as ts

from tda.store import disk
from tda.store.disk import Shard, Store
from tda.store.layout import Encoded

READ = 2**24  # bytes, about, that are read at a time


class Block(NamedTuple):
  """Rows that were read together; their arrays are used again afterwards."""

  first: int
  rows: Encoded  # [n, F] and [n, M]


def blocks(
  store: Store,
  *,
  rows: int | None = None,
  depth: int = 3,
  lost: list[str] | None = None,
) -> Iterator[Block]:
  """All rows in turn, read ahead.

  A block's arrays are filled again once the block after it has been asked for
  and `depth` − 2 more: use them before, or copy them.

  Args:
    store: which.
    rows: of a block; as many as make 16 MiB unless given.
    depth: how many blocks there is memory for, 2 or more.
    lost: where to say which rows cannot be read, and go on; None raises.

  Raises:
    ValueError: a shard whose checksums do not hold, or that is not there.
  """
  arrays = disk.arrays(store)
  sources = {
    (part.path, name): disk.array(part.path / name)
    for part in store.parts
    for name, _, _ in arrays
  }
  bytes_of_row = sum(np.dtype(d).itemsize * c for _, d, c in arrays)
  size = rows or max(1, READ // bytes_of_row)
  buffers = [
    [np.zeros((size, c), d) for _, d, c in arrays] for _ in range(depth)
  ]
  plan = [
    (shard, begin, min(begin + size, shard.rows))
    for shard in store.shards
    for begin in range(0, shard.rows, size)
  ]

  def start(i):
    shard, begin, end = plan[i]
    offset = shard.number * shard.part.capacity
    futures = []
    for (name, _, _), buffer in zip(arrays, buffers[i % depth], strict=True):
      source = sources[shard.part.path, name]
      into = ts.array(buffer[: end - begin])
      futures.append(into.write(source[offset + begin : offset + end]))
    return futures

  waiting = {i: start(i) for i in range(min(depth - 1, len(plan)))}
  for i, (shard, begin, end) in enumerate(plan):
    try:
      for future in waiting.pop(i):
        future.result()
      for name, _, _ in arrays:
        _check_there(shard, name)
      intact = True
    except Exception as error:  # TensorStore's are of many types
      intact = False
      said = f"rows {shard.first + begin} to {shard.first + end - 1}, {shard}"
      if lost is None:
        raise ValueError(
          f"{said}, cannot be read ({_first_line(error)}): its file is damaged"
          " or gone. Delete its record among the shards and build it again, or"
          " search the rest on request"
        ) from error
      lost.append(said)
    if intact:
      values, *scales = (x[: end - begin] for x in buffers[i % depth])
      rest = scales[0] if scales else None
      yield Block(shard.first + begin, Encoded(values, rest))
    if i + depth - 1 < len(plan):
      waiting[i + depth - 1] = start(i + depth - 1)


def take(store: Store, rows: Sequence[int]) -> Encoded:
  """Chosen rows [n, F], in the order given.

  Raises:
    ValueError: rows that are not there.
  """
  rows_n = np.asarray(rows, np.int64)
  if len(rows_n) and not 0 <= rows_n.min() <= rows_n.max() < store.rows:
    raise ValueError(
      f"rows {rows_n.min()} to {rows_n.max()} of a store of {store.rows}"
    )
  firsts = np.array([shard.first for shard in store.shards])
  which_n = np.searchsorted(firsts, rows_n, "right") - 1
  found: list[np.ndarray] = []
  for name, dtype, columns in disk.arrays(store):
    sources = {part.path: disk.array(part.path / name) for part in store.parts}
    futures = []
    for row, which in zip(rows_n, which_n, strict=True):
      shard = store.shards[which]
      place = shard.number * shard.part.capacity + row - shard.first
      futures.append(sources[shard.part.path][int(place)].read())
    values = [future.result() for future in futures]
    found.append(np.stack(values) if values else np.zeros((0, columns), dtype))
  return Encoded(found[0], found[1] if len(found) > 1 else None)


def _check_there(shard: Shard, name: str) -> None:
  """Of a file that is gone zarr reads zeros."""
  file = shard.part.path / name / "c" / str(shard.number) / "0"
  if not file.exists():
    raise FileNotFoundError(f"there is no {file}")


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0]
