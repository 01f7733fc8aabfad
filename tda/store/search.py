"""Which rows of a store score highest and lowest, read once from disk.

A lens says what a query's score of a row f is: ⟨d, f⟩ with a direction d of the
query, times a weight of the row if there are any. Scores of several stores of
the same rows, as of several checkpoints or models, are added.

A search is exact. Beside the names of the rows it holds a few blocks of 8 MiB,
of int8 one in float32 too, and 2 k numbers for each query; it reads ahead while
it multiplies, and sums in float32. Equal scores go by row.

Notation: N rows, Q queries, F columns, M modules, n rows of a block.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from tda.store import layout, reading
from tda.store.disk import Store
from tda.store.layout import Encoded, Span
from tda.store.reading import Block

Array = jax.Array
_HIGHEST = jax.lax.Precision.HIGHEST


class Lens(NamedTuple):
  """How queries see the rows of a store."""

  store: Store
  directions: np.ndarray  # [Q, F] float32
  weights: np.ndarray | None = None  # [N] float32


class Found(NamedTuple):
  """The first rows of each query, best first.

  Where damage leaves fewer than k, rows are -1, scores infinite and names "".
  """

  scores: np.ndarray  # [Q, k] float32
  rows: np.ndarray  # [Q, k] int64
  names: list[list[str]]  # of the rows


class Ends(NamedTuple):
  """Both ends of what was found, and the rows that could not be read."""

  top: Found
  bottom: Found  # lowest first
  lost: list[str]


class Best(NamedTuple):
  """The k best so far of each query, best first."""

  scores: np.ndarray  # [Q, k], −∞ for none
  rows: np.ndarray  # [Q, k], -1 for none


def ends(
  lenses: Lens | Sequence[Lens],
  k: int,
  *,
  among: np.ndarray | None = None,
  damaged: bool = False,
  label: str | None = None,
) -> Ends:
  """The k rows that score highest and lowest for each query.

  Args:
    lenses: one, or several whose stores hold the same rows.
    k: how many, at most N.
    among: bool [N, Q], the candidates of a first stage such as BM25, which are
      ranked alone, though all rows are read; None: all.
    damaged: search the rest where shards of one store cannot be read, and say
      which.
    label: of a progress bar; None shows none.

  Raises:
    ValueError: k of too many; a store that is not whole or damaged; lenses that
      do not fit their store or each other.
  """
  lenses = _checked(lenses)
  store, queries = lenses[0].store, len(lenses[0].directions)
  if among is not None and among.shape != (store.rows, queries):
    raise ValueError(
      f"candidates {among.shape} of {store.rows} rows and {queries} queries"
    )
  most = store.rows if among is None else int(among.sum(axis=0).min())
  if not 1 <= k <= most:
    raise ValueError(f"the first {k} of {most} rows: ask for 1 or more of them")
  if damaged and len(lenses) > 1:
    raise ValueError(
      "several stores are searched together only where none is damaged: their"
      " rows would no longer be the same"
    )
  top, bottom = (
    Best(
      np.full((queries, k), -np.inf, np.float32),
      np.full((queries, k), -1, np.int64),
    )
    for _ in range(2)
  )
  lost: list[str] | None = [] if damaged else None
  for inside, scores in _scores(lenses, lost, label):
    outside = None if among is None else ~among[inside].T
    _merge(top, scores, outside, inside.start)
    _merge(bottom, -scores, outside, inside.start)
  bottom = Best(-bottom.scores, bottom.rows)
  names = store.names
  return Ends(_found(names, top), _found(names, bottom), lost or [])


def scores(
  lenses: Lens | Sequence[Lens], *, label: str | None = None
) -> np.ndarray:
  """All scores [N, Q], held on the host."""
  lenses = _checked(lenses)
  found = [scores.T for _, scores in _scores(lenses, None, label)]
  return np.concatenate(found)


def by_module(lens: Lens, rows: Sequence[int]) -> np.ndarray:
  """Scores [n, Q, M] of chosen rows, by module; they add up to the row's."""
  encoded = reading.take(lens.store, rows)
  values = _by_module(encoded, lens.directions, lens.store.layout)
  values = np.asarray(values)
  if lens.weights is not None:
    values = values * lens.weights[np.asarray(rows)][:, None, None]
  return values


def by_document(
  scores: np.ndarray, names: Sequence[str]
) -> tuple[list[str], np.ndarray]:
  """Documents in the order of their first row, and the sums of their rows.

  Rows of one name are of one document; scores [N, Q] become [D, Q].
  """
  documents = {name: i for i, name in enumerate(dict.fromkeys(names))}
  total = np.zeros((len(documents), scores.shape[1]), scores.dtype)
  np.add.at(total, [documents[name] for name in names], scores)
  return list(documents), total


def _found(names: Sequence[str], best: Best) -> Found:
  said = [[names[i] if i >= 0 else "" for i in row] for row in best.rows]
  return Found(best.scores, best.rows, said)


def _checked(lenses: Lens | Sequence[Lens]) -> list[Lens]:
  lenses = [lenses] if isinstance(lenses, Lens) else list(lenses)
  if not lenses:
    raise ValueError("a search needs a store and directions")
  for lens in lenses:
    store, shape = lens.store, np.shape(lens.directions)
    store.check_complete()
    columns = layout.width(store.layout)
    if len(shape) != 2 or shape[1] != columns:
      raise ValueError(
        f"directions {shape} for rows of {columns} numbers: they are those of"
        " queries, projected as the store was"
      )
    if not np.isfinite(lens.directions).all():
      bad = np.argmin(np.isfinite(lens.directions).all(axis=1))
      raise ValueError(f"the direction of query {bad} is not finite")
    if lens.weights is not None and len(lens.weights) != store.rows:
      raise ValueError(
        f"{len(lens.weights)} weights of the {store.rows} rows of {store.path}"
      )
  first = lenses[0]
  cuts = lambda lens: [s._replace(part=None) for s in lens.store.shards]
  if any(
    len(lens.directions) != len(first.directions) or cuts(lens) != cuts(first)
    for lens in lenses[1:]
  ):
    raise ValueError(
      "stores that are searched together hold the same rows in the same shards,"
      " for the same queries; these do not"
    )
  return lenses


def _scores(
  lenses: Sequence[Lens], lost: list[str] | None, label: str | None
) -> Iterator[tuple[slice, np.ndarray]]:
  """Rows, and their scores [Q, n], block by block."""
  total = lenses[0].store.rows
  if len(lenses) == 1:
    streams = [reading.blocks(lenses[0].store, lost=lost)]
  else:
    size = max(layout.row_bytes(x.store.layout, x.store.dtype) for x in lenses)
    rows = max(1, reading.READ // size)
    streams = [reading.blocks(lens.store, rows=rows) for lens in lenses]
  directions = [jnp.asarray(lens.directions) for lens in lenses]
  with tqdm.tqdm(total=total, desc=label, unit="row", disable=not label) as bar:
    for blocks in zip(*streams, strict=True):
      count = blocks[0].held
      inside = slice(blocks[0].first, blocks[0].first + count)
      parts = zip(lenses, directions, blocks, strict=True)
      each = [_scored(*part, inside) for part in parts]
      yield inside, np.sum(each, axis=0)
      bar.update(count)


def _scored(
  lens: Lens, directions: Array, block: Block, inside: slice
) -> np.ndarray:
  """Scores [Q, n] of a block, which nothing reads afterwards."""
  scores = np.asarray(products(block.rows, directions, lens.store.layout))
  scores = np.ascontiguousarray(scores[: block.held].T)
  return scores if lens.weights is None else scores * lens.weights[inside]


@functools.partial(jax.jit, static_argnums=2)
def products(
  rows: Encoded, directions: Array, spans: tuple[Span, ...]
) -> Array:
  """⟨d, f⟩ [n, Q] of rows that are held in memory, exact but for rounding."""
  if rows.values.dtype == jnp.bfloat16:
    # As they are: to convert them takes longer than to multiply three times.
    parts = jnp.concatenate(_parts(directions))
    each = jax.lax.dot_general(
      rows.values,
      parts,
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    return each.reshape(len(each), 3, -1).sum(axis=1)
  decoded = layout.decode(rows, spans)
  return jnp.matmul(decoded, directions.T, precision=_HIGHEST)


def _parts(x: Array) -> list[Array]:
  """Three bfloat16 numbers for each, whose sum has all digits of float32."""
  parts = []
  for _ in range(3):
    # A plain conversion there and back may be optimised away.
    part = jax.lax.reduce_precision(x, 8, 7)
    parts.append(part.astype(jnp.bfloat16))
    x = x - part
  return parts


def _merge(
  best: Best, scores: np.ndarray, outside: np.ndarray | None, first: int
) -> None:
  """Puts those of a block's scores [Q, n] that are better in their places.

  Later rows enter only with more, so that equal ones go by row.
  """
  if outside is not None:
    scores = np.where(outside, -np.inf, scores)
  better = scores > best.scores[:, -1:]
  for q in np.flatnonzero(better.any(axis=1)):
    places = np.flatnonzero(better[q])
    both = np.concatenate([best.scores[q], scores[q, places]])
    rows = np.concatenate([best.rows[q], first + places])
    kept = np.argsort(-both, kind="stable")[: len(best.rows[q])]
    best.scores[q], best.rows[q] = both[kept], rows[kept]


@functools.partial(jax.jit, static_argnums=2)
def _by_module(
  rows: Encoded, directions: Array, spans: tuple[Span, ...]
) -> Array:
  decoded = layout.decode(rows, spans)
  parts = [
    jnp.einsum(
      "nmd,qmd->nqm",
      layout.by_module(decoded, span),
      layout.by_module(directions, span),
      precision=_HIGHEST,
    )
    for span in spans
  ]
  return jnp.concatenate(parts, axis=-1)
