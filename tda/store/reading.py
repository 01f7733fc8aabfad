"""Reading the rows of a gradient store, in turn or a few of them.

Notation: n rows that are read together, F columns, M modules.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorstore as ts

from tda.store import disk
from tda.store.disk import Shard, Store
from tda.store.layout import Encoded, row_bytes

ALIGNED = 64  # bytes
READ = 2**23  # bytes, about, that are read at a time


class Block(NamedTuple):
  """Rows that were read together; their arrays are used again afterwards."""

  first: int
  held: int  # n
  rows: Encoded  # [size, F] and [size, M], zeros from n on


def blocks(
  store: Store, *, rows: int | None = None, lost: list[str] | None = None
) -> Iterator[Block]:
  """All rows in turn, the next ones read ahead.

  All blocks have the same shapes. Their arrays are filled again once the next
  block is asked for, and a CPU device computes on them where they are: wait for
  what is computed of them before, or copy them.

  Args:
    store: which.
    rows: of a block; as many as make 8 MiB unless given.
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
  most = max((shard.rows for shard in store.shards), default=1)
  usual = max(1, READ // row_bytes(store.layout, store.dtype))
  size = min(rows or usual, max(1, most))
  buffers = [[_aligned((size, c), d) for _, d, c in arrays] for _ in range(3)]
  plan = [
    (shard, begin, min(begin + size, shard.rows))
    for shard in store.shards
    for begin in range(0, shard.rows, size)
  ]

  def start(i):
    shard, begin, end = plan[i]
    offset = shard.number * shard.part.capacity
    futures = []
    for (name, _, _), buffer in zip(arrays, buffers[i % 3], strict=True):
      source = sources[shard.part.path, name]
      into = ts.array(buffer[: end - begin])
      futures.append(into.write(source[offset + begin : offset + end]))
    return futures

  names = [name for name, _, _ in arrays]
  waiting = {i: start(i) for i in range(min(2, len(plan)))}
  for i, (shard, begin, end) in enumerate(plan):
    if _settled(shard, (begin, end), waiting.pop(i), names, lost):
      for buffer in buffers[i % 3]:
        buffer[end - begin :] = 0
      yield Block(shard.first + begin, end - begin, _encoded(buffers[i % 3]))
    if i + 2 < len(plan):
      waiting[i + 2] = start(i + 2)


def take(store: Store, rows: Sequence[int]) -> Encoded:
  """Chosen rows [n, F], in the order given.

  Raises:
    ValueError: rows that are not there, or cannot be read.
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
    values = np.zeros((len(rows_n), columns), dtype)
    for row, which, into in zip(rows_n, which_n, values, strict=True):
      shard = store.shards[which]
      begin = int(row - shard.first)
      place = shard.number * shard.part.capacity + begin
      future = ts.array(into).write(sources[shard.part.path][place])
      _settled(shard, (begin, begin + 1), [future], [name], None)
    found.append(values)
  return _encoded(found)


def _aligned(shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
  """Zeros that a CPU device uses where they are; JAX copies others."""
  size = math.prod(shape) * dtype.itemsize
  held = np.zeros(size + ALIGNED, np.uint8)
  start = -held.ctypes.data % ALIGNED
  return held[start : start + size].view(dtype).reshape(shape)


def _encoded(arrays: Sequence[np.ndarray]) -> Encoded:
  values, *scales = arrays
  return Encoded(values, scales[0] if scales else None)


def _settled(
  shard: Shard,
  inside: tuple[int, int],
  futures: Sequence[ts.WriteFutures],
  names: Sequence[str],
  lost: list[str] | None,
) -> bool:
  """Waits until rows of a shard are read; whether they are sound."""
  try:
    for future in futures:
      future.result()
    for name in names:
      if not disk.file(shard.part, shard.number, name).exists():
        raise FileNotFoundError("no file")  # of which zarr reads zeros
    return True
  except Exception as error:  # TensorStore's are of many types
    begin, end = inside
    said = f"rows {shard.first + begin} to {shard.first + end - 1}, {shard}"
    if lost is None:
      raise ValueError(
        f"{said}, cannot be read ({_first_line(error)}): its file is damaged or"
        " gone. Delete its record among the shards and build it again, or ask"
        " for what is left with damaged=True"
      ) from error
    lost.append(said)
    return False


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0]
