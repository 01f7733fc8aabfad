"""Which rows of a store score highest and lowest, read once from disk.

A lens says what a query's score of a row f is: ⟨d, f⟩ with a direction d of the
query, times a weight of the row if there are any. Scores of several stores of
the same rows, as of several checkpoints or models, are added.

A search is exact. It holds a few blocks of 16 MiB and 2 k rows for each query,
reads ahead while it multiplies, and sums in float32. Equal scores go by row.

Notation: N rows, Q queries, F columns, M modules, n rows of a block.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from tda.store import disk, layout
from tda.store.disk import Store
from tda.store.layout import Encoded, Span

Array = jax.Array
TILE = 256
"""Rows decoded at a time, so that they stay in a cache."""


class Lens(NamedTuple):
  """How queries see the rows of a store."""

  store: Store
  directions: np.ndarray  # [Q, F] float32
  weights: np.ndarray | None = None  # [N] float32


class Found(NamedTuple):
  """The first rows of each query, best first."""

  scores: np.ndarray  # [Q, k] float32
  rows: np.ndarray  # [Q, k] int32
  names: list[list[str]]  # of the rows


class Ends(NamedTuple):
  """Both ends of what was found, and the rows that could not be read."""

  top: Found
  bottom: Found  # lowest first
  lost: list[str]


class State(NamedTuple):
  """The k best so far of each query, of scores and of their negatives."""

  scores: Array  # [2, Q, k]
  rows: Array  # [2, Q, k], -1 for none


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
    among: bool [N, Q], the candidates of a first stage such as BM25; None: all.
    damaged: search the rest where shards cannot be read, and say which.
    label: of a progress bar; None shows none.

  Raises:
    ValueError: k of too many; a store that is not whole or damaged; lenses that
      do not fit their store or each other.
  """
  lenses = _checked(lenses)
  store, queries = lenses[0].store, len(lenses[0].directions)
  most = store.rows if among is None else int(among.sum(axis=0).min())
  if not 1 <= k <= most:
    raise ValueError(f"the first {k} of {most} rows: ask for 1 or more of them")
  if among is not None and among.shape != (store.rows, queries):
    raise ValueError(
      f"candidates {among.shape} of {store.rows} rows and {queries} queries"
    )
  state = State(
    jnp.full((2, queries, k), -jnp.inf), jnp.full((2, queries, k), -1)
  )
  lost: list[str] | None = [] if damaged else None
  for first, blocks in _blocks(lenses, lost, label):
    inside = slice(first, first + len(blocks[0].values))
    mask = None if among is None else jnp.asarray(among[inside].T)
    scores = _scored(lenses, blocks, inside)
    state = jax.block_until_ready(_merged(state, scores, mask, first))
  high, low = (np.asarray(x) for x in state.scores)
  first_rows, last_rows = (np.asarray(x) for x in state.rows)
  return Ends(
    _found(store, high, first_rows), _found(store, -low, last_rows), lost or []
  )


def scores(
  lenses: Lens | Sequence[Lens], *, label: str | None = None
) -> np.ndarray:
  """All scores [N, Q], held on the host."""
  lenses = _checked(lenses)
  found = [
    np.asarray(
      _scored(lenses, blocks, slice(first, first + len(blocks[0].values)))
    ).T
    for first, blocks in _blocks(lenses, None, label)
  ]
  return np.concatenate(found)


def by_module(lens: Lens, rows: Sequence[int]) -> np.ndarray:
  """Scores [n, Q, M] of chosen rows, by module; they add up to the row's."""
  encoded = disk.take(lens.store, rows)
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


def _found(store: Store, scores: np.ndarray, rows: np.ndarray) -> Found:
  names = store.names
  said = [[names[i] if i >= 0 else "" for i in row] for row in rows]
  return Found(scores, rows, said)


def _checked(lenses: Lens | Sequence[Lens]) -> list[Lens]:
  lenses = [lenses] if isinstance(lenses, Lens) else list(lenses)
  if not lenses:
    raise ValueError("a search needs a store and directions")
  for lens in lenses:
    store, shape = lens.store, np.shape(lens.directions)
    if not store.complete:
      raise ValueError(
        f"{store.path} has {len(store.shards)} of"
        f" {sum(part.shards for part in store.parts)} shards: build the rest"
      )
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
  cuts = {
    tuple((s.first, s.rows, s.names) for s in lens.store.shards)
    for lens in lenses
  }
  queries = {len(lens.directions) for lens in lenses}
  if len(cuts) > 1 or len(queries) > 1:
    raise ValueError(
      "stores that are searched together hold the same rows in the same shards,"
      " for the same queries; these do not"
    )
  return lenses


def _blocks(
  lenses: Sequence[Lens], lost: list[str] | None, label: str | None
) -> Iterator[tuple[int, list[Encoded]]]:
  """The same rows of every store, with the first one's number."""
  total = lenses[0].store.rows
  if len(lenses) == 1:
    streams = [disk.blocks(lenses[0].store, lost=lost)]
  else:  # damage in one is damage in all: they would no longer be the same rows
    size = max(_row_bytes(lens.store) for lens in lenses)
    rows = max(1, disk.READ // size)
    streams = [disk.blocks(lens.store, rows=rows) for lens in lenses]
  with tqdm.tqdm(total=total, desc=label, unit="row", disable=not label) as bar:
    for together in zip(*streams, strict=True):
      yield together[0].first, [block.rows for block in together]
      bar.update(len(together[0].rows.values))


def _row_bytes(store: Store) -> int:
  return layout.width(store.layout) * jnp.dtype(store.dtype).itemsize


def _scored(
  lenses: Sequence[Lens], blocks: Sequence[Encoded], inside: slice
) -> Array:
  """Scores [Q, n] of a block."""
  total: Array | None = None
  for lens, rows in zip(lenses, blocks, strict=True):
    weights = None if lens.weights is None else lens.weights[inside]
    one = _products(rows, lens.directions, weights, lens.store.layout)
    total = one if total is None else total + one
  assert total is not None
  return total


@functools.partial(jax.jit, static_argnums=3)
def _products(
  rows: Encoded,
  directions: Array,
  weights: Array | None,
  spans: tuple[Span, ...],
) -> Array:
  """⟨d, f⟩ times the weights of rows, [Q, n]."""
  count = len(rows.values)
  highest = jax.lax.Precision.HIGHEST

  def some(tile):
    decoded = layout.decode(tile, spans)
    return jnp.matmul(decoded, directions.T, precision=highest)

  whole = count // TILE * TILE
  cut = lambda x: x[:whole].reshape(-1, TILE, *x.shape[1:])
  parts = []
  if whole:
    tiles = jax.lax.map(some, jax.tree.map(cut, rows))
    parts.append(tiles.reshape(whole, -1))
  if whole < count:
    parts.append(some(jax.tree.map(lambda x: x[whole:], rows)))
  scores = jnp.concatenate(parts).T
  return scores if weights is None else scores * weights[None]


@functools.partial(jax.jit, donate_argnums=0)
def _merged(
  state: State, scores: Array, mask: Array | None, first: Array | int
) -> State:
  """The best of the state and of a block's scores [Q, n]."""
  k = state.scores.shape[-1]

  def one(best, rows, scores):
    if mask is not None:
      scores = jnp.where(mask, scores, -jnp.inf)
    values, places = jax.lax.top_k(scores, min(k, scores.shape[-1]))
    values = jnp.concatenate([best, values], axis=-1)
    rows = jnp.concatenate([rows, first + places], axis=-1)
    values, kept = jax.lax.top_k(values, k)
    return values, jnp.take_along_axis(rows, kept, axis=-1)

  top = one(state.scores[0], state.rows[0], scores)
  bottom = one(state.scores[1], state.rows[1], -scores)
  return State(*(jnp.stack(x) for x in zip(top, bottom, strict=True)))


@functools.partial(jax.jit, static_argnums=2)
def _by_module(
  rows: Encoded, directions: Array, spans: tuple[Span, ...]
) -> Array:
  decoded = layout.decode(rows, spans)
  highest = jax.lax.Precision.HIGHEST
  parts = [
    jnp.einsum(
      "nmd,qmd->nqm",
      layout.by_module(decoded, span),
      layout.by_module(directions, span),
      precision=highest,
    )
    for span in spans
  ]
  return jnp.concatenate(parts, axis=-1)
