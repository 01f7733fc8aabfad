"""Gradient stores on disk: rows in shards that are written once.

    manifest.json          layout of a row, its type, and what it was made of
    parts/000/part.json    the data it is of, and how its shards are cut
    parts/000/rows/        zarr v3, one file a shard, a checksum for every chunk
    parts/000/scales/      of int8
    parts/000/shards/      shard 12 counts once 000012.json says so

A part is the rows of one data set; data that come later are another part, and
nothing is written twice. A shard holds the rows of so many examples of its
part, however many devices, processes and sittings it takes to fill them all.
Rows are numbered through, part after part and shard after shard.

Any reader of zarr v3 opens the arrays; TensorStore does here.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from tda import parts as parts_lib
from tda.store.layout import DTYPES, Span, row_bytes, width

VERSION = 1
CHUNK = 2**19  # bytes, about, that one checksum is of
SHARD = 2**26  # bytes, about, of a shard
ZEROS = {"store_data_equal_to_fill_value": True}  # or zeros are no file


class Part(NamedTuple):
  """The rows of one data set."""

  path: Path
  digest: str
  rows: int
  examples: int
  per_shard: int  # examples
  chunk: int  # rows that one checksum is of
  capacity: int  # rows of a shard at most, whole chunks
  shards: int

  def inside(self, number: int) -> np.ndarray:
    """The examples of a shard."""
    first = number * self.per_shard
    return np.arange(first, min(first + self.per_shard, self.examples))


class Shard(NamedTuple):
  """Rows that were written together."""

  part: Part
  number: int  # in its part
  first: int  # its first row, of the store
  rows: int
  names: tuple[str, ...]  # of the rows

  def __str__(self) -> str:
    return f"shard {self.number} of {self.part.path}"


class Store(NamedTuple):
  """A store as it was when it was opened."""

  path: Path
  layout: tuple[Span, ...]
  dtype: str
  about: dict[str, Any]  # what it was made of
  parts: tuple[Part, ...]
  shards: tuple[Shard, ...]

  @property
  def rows(self) -> int:
    """N."""
    return sum(shard.rows for shard in self.shards)

  @property
  def names(self) -> tuple[str, ...]:
    """Of all rows."""
    return tuple(name for shard in self.shards for name in shard.names)

  @property
  def complete(self) -> bool:
    """Whether no shard of any part is missing."""
    return len(self.shards) == sum(part.shards for part in self.parts)

  def check_complete(self) -> None:
    """Refuses to go by a part of the rows."""
    if not self.complete:
      raise ValueError(
        f"{self.path} has {len(self.shards)} of"
        f" {sum(part.shards for part in self.parts)} shards: build the rest"
      )


def opened(path: str | Path) -> Store:
  """A store that `writing.build` has made or begun.

  Raises:
    ValueError: there is none, or one of another version.
  """
  path = Path(path)
  if not (path / "manifest.json").exists():
    raise ValueError(f"there is no gradient store in {path}: build one first")
  manifest = json.loads((path / "manifest.json").read_text())
  if manifest["version"] != VERSION:
    raise ValueError(
      f"{path} is a store of version {manifest['version']}, and this is"
      f" {VERSION}: build it anew"
    )
  layout = tuple(
    Span(**{**span, "stack": tuple(span["stack"])})
    for span in manifest["layout"]
  )
  found_parts, shards, first = parts(path), [], 0
  for part in found_parts:
    for record in sorted((part.path / "shards").glob("*.json")):
      found = json.loads(record.read_text())
      shard = Shard(
        part, int(record.stem), first, found["rows"], tuple(found["names"])
      )
      shards.append(shard)
      first += shard.rows
  return Store(
    path,
    layout,
    manifest["dtype"],
    manifest["about"],
    found_parts,
    tuple(shards),
  )


def parts(path: Path) -> tuple[Part, ...]:
  """Those of a store, whole or begun."""
  records = sorted((path / "parts").glob("[0-9]*/part.json"))
  return tuple(Part(x.parent, **json.loads(x.read_text())) for x in records)


def create(
  path: Path, layout: Sequence[Span], dtype: str, about: Mapping[str, Any]
) -> None:
  """Makes an empty store, unless there is one of the same.

  Args:
    path: its folder; made if missing.
    layout: of a row.
    dtype: "bfloat16", "float32", or "int8" with a scale for each module.
    about: what the rows are of, as JSON values by name: digests of the model
      and of the projection, at least.

  Raises:
    ValueError: there is one of something else; says in what it differs.
  """
  if dtype not in DTYPES:
    raise ValueError(f"unknown dtype {dtype!r}; choose of {list(DTYPES)}")
  record = path / "manifest.json"
  if not record.exists():
    path.mkdir(parents=True, exist_ok=True)
    manifest = {
      "version": VERSION,
      "dtype": dtype,
      "about": about,
      "layout": [span._asdict() for span in layout],
    }
    _write(record, manifest)
  store = opened(path)
  check(store, about)
  if store.layout != tuple(layout) or store.dtype != dtype:
    raise ValueError(
      f"{path} holds rows of {store.dtype} of other blocks or dimensions: give"
      " this one another folder"
    )


def check(store: Store, about: Mapping[str, Any]) -> None:
  """Refuses what does not fit a store.

  Raises:
    ValueError: it was made of something else; says in what that differs.
  """
  about = json.loads(json.dumps(about))
  names = sorted({*store.about, *about})
  other = [n for n in names if store.about.get(n) != about.get(n)]
  if other:
    raise ValueError(
      f"the store {store.path} is of another {' and '.join(other)}: its rows"
      " cannot be compared with these gradients. Build one of them in another"
      " folder, or ask with what it was built with"
    )


def add(store: Store, digest: str, cut: Mapping[str, int]) -> None:
  """Makes room for a data set: a part with arrays of nothing yet."""
  folder = store.path / "parts" / f"{len(parts(store.path)):03d}"
  (folder / "shards").mkdir(parents=True, exist_ok=True)
  part = Part(folder, digest, **cut)
  for name, dtype, columns in arrays(store):
    _make(folder / name, part, dtype, columns)
  _write(folder / "part.json", {"digest": digest, **cut})


def write(
  part: Part, number: int, name: str, values: np.ndarray
) -> ts.WriteFutures:
  """Begins to write the rows of one shard into an array of its part.

  What a damaged or unfinished one left is not read, and goes.
  """
  file(part, number, name).unlink(missing_ok=True)
  into = array(part.path / name)
  first = number * part.capacity
  return into[first : first + len(values)].write(values)


def file(part: Part, number: int, name: str) -> Path:
  """That of a shard, by the array's name."""
  return part.path / name / "c" / str(number) / "0"


def finish(part: Part, number: int, rows: int, names: Sequence[str]) -> None:
  """Says that a shard is whole."""
  _write(_record(part, number), {"rows": rows, "names": list(names)})


def missing(part: Part) -> list[int]:
  """Shards that are not whole yet."""
  return [i for i in range(part.shards) if not _record(part, i).exists()]


def cut(
  store: Store,
  counts: np.ndarray,
  each: int,
  per_shard: int | None,
  processes: int = 1,
) -> dict[str, int]:
  """How a data set is cut, whose examples have `counts` rows, `each` at most.

  Unless it is said how many examples a shard has, they are as many as make 64
  MiB, and few enough that every process has a shard to fill.
  """
  examples = len(counts)
  row = row_bytes(store.layout, store.dtype)
  if per_shard is None:
    per_shard = max(1, SHARD // (row * each))
    per_shard = min(per_shard, math.ceil(examples / processes))
  if per_shard < 1:
    raise ValueError(f"{per_shard} examples in a shard: take 1 or more")
  per_shard = min(per_shard, examples)
  chunk = min(max(1, CHUNK // row), per_shard * each)
  return {
    "rows": int(counts.sum()),
    "examples": examples,
    "per_shard": per_shard,
    "chunk": chunk,
    "capacity": math.ceil(per_shard * each / chunk) * chunk,
    "shards": math.ceil(examples / per_shard),
  }


def arrays(store: Store) -> list[tuple[str, Any, int]]:
  """Name, type and columns of the arrays of every part."""
  found = [("rows", jnp.dtype(store.dtype), width(store.layout))]
  if store.dtype == "int8":
    modules = sum(span.modules for span in store.layout)
    found.append(("scales", np.dtype(np.float32), modules))
  return found


def _make(path: Path, part: Part, dtype: Any, columns: int) -> None:
  end = [{"name": "bytes", "configuration": {"endian": "little"}}]
  checked = [*end, {"name": "crc32c"}]
  sharding = {
    "chunk_shape": [part.chunk, columns],
    "codecs": checked,
    "index_codecs": checked,
  }
  metadata = {
    "shape": [part.shards * part.capacity, columns],
    "data_type": np.dtype(dtype).name,
    "chunk_grid": {
      "name": "regular",
      "configuration": {"chunk_shape": [part.capacity, columns]},
    },
    "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
  }
  spec = {
    "driver": "zarr3",
    "kvstore": {"driver": "file", "path": str(path)},
    "metadata": metadata,
    **ZEROS,
  }
  ts.open(spec, create=True, delete_existing=True).result()


def array(path: Path) -> ts.TensorStore:
  """One that is there."""
  spec = {
    "driver": "zarr3",
    "kvstore": {"driver": "file", "path": str(path.absolute())},
    "context": {"file_io_mode": {"mode": "memmap"}},  # a copy less
    **ZEROS,
  }
  return ts.open(spec, open=True).result()


def _record(part: Part, number: int) -> Path:
  return part.path / "shards" / f"{number:06d}.json"


def _write(path: Path, value: Any) -> None:
  with parts_lib.replacing(path) as file:
    file.write((json.dumps(value, indent=2) + "\n").encode())
