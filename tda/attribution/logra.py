"""LoGra: projected gradients of a corpus, stored once and asked many times.

    store = logra.build("store", objective, params, train, key=key)
    asked = logra.ask(store, objective, params, queries)
    found = search.ends(lenses.lens(store, asked, "relatif"), k=10)

Each block's gradient is projected on both sides inside the backward pass (Choe
et al. 2024), so that logging costs less than a gradient: that of the weights is
never formed. Directions are random unless given, see `tda.projections`; those
of a store are kept in it, and queries are projected by them.

Departure: random entries are signs instead of uniform numbers, of mean square
1/K for K directions of a side, so that inner products are right on average.

Notation: N examples, Q queries, F columns of a row, P parts of a row.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tda import blocks, gradients, meshes, parts, projections, records, streams
from tda.attribution import language, products, projected
from tda.blocks import Trace
from tda.likelihoods import Loss, Objective
from tda.projections import Sides
from tda.store import disk, layout, writing
from tda.store.disk import Store
from tda.streams import Loop

PyTree = Any
PROJECTION = "projection.npz"


def build(
  folder: str | os.PathLike,
  objective: Objective,
  params: PyTree,
  train: PyTree,
  *,
  key: jax.Array | None = None,
  dimension: int = 16,
  sides: Mapping[str, Sides] | None = None,
  select: str | Sequence[str] | None = None,
  shares: str = "rows",
  dtype: str = "bfloat16",
  names: Sequence[str] | None = None,
  append: bool = False,
  per_shard: int | None = None,
  loop: Loop = Loop(),
) -> Store:
  """Writes the projected gradients of all examples; one pass, resumable.

  Args:
    folder: of the store.
    objective: model and likelihood.
    params: trained parameters.
    train: pytree of arrays with leading axis N.
    key: of random directions, if none are given.
    dimension: K, of each side of a block; a shorter side is kept as it is.
    sides: directions by block, as of `projections.principal`.
    select: patterns of the blocks, as in `blocks.trace`.
    shares: "rows", or "segments" with a row for each document of packed rows.
    dtype: of the store, see `writing.build`, as are the rest.
    names: of the examples, or of the documents that the rows hold.
    append: see `writing.build`.
    per_shard: see `writing.build`.
    loop: how to run over the data.

  Raises:
    ValueError: neither a key nor directions, shares that the gradients do not
      have, and what `writing.build` refuses.
  """
  found = _traced(objective, params, train, select)
  if sides is None:
    if key is None:
      raise ValueError("random directions need a key; or give `sides`")
    sides = projections.two_sided(found, key, dimension)
  if shares == "tokens":
    raise ValueError("a store has rows or segments, not tokens")
  products.check_shares(found, objective, shares)
  held, count = None, products.parts_of(shares, objective, train)
  if shares == "segments":
    owners = language.owner(train, count)
    held = owners >= 0
    if names is not None:
      names = [names[d] for d in owners[held]]
  about = {
    **_model(params, select),
    "projection": records.digest(dict(sides)),
    "features": f"gradients of {shares}",
  }
  spans = layout.spans(found, sides)
  if jax.process_index() == 0:
    disk.create(Path(folder), spans, dtype, about)
    _save(Path(folder) / PROJECTION, sides)
  meshes.together(f"{folder} projection")
  return writing.build(
    folder,
    spans,
    _features(found, objective, shares, count),
    (params, dict(sides)),
    train,
    about=about,
    dtype=dtype,
    names=names,
    held=held,
    append=append,
    per_shard=per_shard,
    loop=loop,
  )


def ask(
  store: Store,
  objective: Objective,
  params: PyTree,
  queries: PyTree,
  *,
  measurement: Loss | None = None,
  loop: Loop = Loop(),
) -> np.ndarray:
  """Gradients of queries along the store's directions, float32 [Q, F].

  Args:
    store: of `build`.
    objective: model and likelihood.
    params: those that the store was built with.
    queries: pytree of arrays with leading axis Q; they look like training
      examples unless a measurement is given.
    measurement: m(params, query) -> scalar; the loss unless given.
    loop: how to run over the queries.

  Raises:
    ValueError: another model than the store's.
  """
  select = store.about["select"]
  model = _model(params, select)
  disk.check(store, store.about | model)
  found = _traced(objective, params, queries, select, measurement)
  if measurement is None:
    run = _features(found, objective, "rows", 0)
  else:
    run = _measured(found, measurement)
  sides = directions(store)
  spans = layout.spans(found, sides)
  if spans != store.layout:
    raise ValueError(
      f"the queries' gradients have other blocks than the rows of {store.path}"
    )
  return streams.each(run, (params, sides), queries, loop)


def directions(store: Store) -> dict[str, Sides]:
  """Those that a store was built with, by block."""
  with np.load(store.path / PROJECTION) as found:
    return {
      span.name: Sides(
        *(found.get(f"{side}/{span.name}") for side in Sides._fields)
      )
      for span in store.layout
    }


def _traced(
  objective: Objective,
  params: PyTree,
  data: PyTree,
  select: Any,
  measurement: Loss | None = None,
) -> Trace:
  example = streams.example(data)
  outputs = objective.outputs if measurement is None else measurement
  return blocks.trace(outputs, params, example, select=select)


def _features(
  found: Trace, objective: Objective, shares: str, count: int
) -> Callable:
  """Rows of the gradients of the loss."""
  statistic = projected.of_shares(shares, count)
  run = gradients.backward_pass(found, objective, statistic)

  def features(operands, batch):
    params, sides = operands
    values, finite = run(params, batch, sides)
    return layout.joined(values, layout.spans(found, sides)), finite

  return features


def _measured(found: Trace, measurement: Loss) -> Callable:
  """The same of a function of (params, query)."""
  run = projected.of_measurement(found, measurement)

  def features(operands, batch):
    params, sides = operands
    values, finite = run(params, batch, sides)
    return layout.joined(values, layout.spans(found, sides)), finite

  return features


def _model(params: PyTree, select: Any) -> dict[str, Any]:
  chosen = [select] if isinstance(select, str) else select
  return {
    "model": records.digest(params),
    "select": None if chosen is None else list(chosen),
  }


def _save(path: Path, sides: Mapping[str, Sides]) -> None:
  arrays = {
    f"{side}/{name}": np.asarray(x)
    for name, given in sides.items()
    for side, x in zip(Sides._fields, given, strict=True)
    if x is not None
  }
  with parts.replacing(path) as file:
    np.savez(file, allow_pickle=False, **arrays)
