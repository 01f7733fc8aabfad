"""LoGra: projected gradients of a corpus, stored once and asked many times.

    log = logra.logger(objective, params, train, key=key)
    store = log.build("store", params, train)
    asked = log.ask(params, queries)
    found = search.ends(lenses.lens(store, asked, "relatif"), k=10)

and later, in another program,

    store = disk.opened("store")
    log = logra.reopened(store, objective, params, queries)

Each block's gradient is projected on both sides inside the backward pass (Choe
et al. 2024), so that logging costs less than a gradient: that of the weights is
never formed. Directions are random unless given, see `tda.projections`; those
of a store are kept in it, and queries are projected by them.

Departure: random entries are signs instead of uniform numbers, of mean square
1/K for K directions of a side, so that inner products are right on average.

Notation: N examples, Q queries, F columns of a row, P parts of a row.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tda import blocks, gradients, meshes, parts, projections, records, streams
from tda.attribution import language, products, projected
from tda.attribution.less import Updates
from tda.attribution.responses import Operator
from tda.blocks import Blocks, Trace
from tda.likelihoods import Loss, Objective
from tda.projections import Sides
from tda.store import disk, fisher, layout, writing
from tda.store.disk import Store
from tda.streams import Loop

PyTree = Any
PROJECTION = "projection.npz"


class Logger(NamedTuple):
  """What turns examples and queries into rows; calls after the first of a kind
  compile nothing.

  Attributes:
    build: (folder, params, train, *, dtype, names, updates, append, per_shard,
      loop) -> Store. Writes the rows of all examples in one pass that can be
      stopped; options are those of `disk.create` and `writing.build`, but that
      `names` are of the documents that packed rows hold. `updates`, as of
      `less.updates`, are stored in place of gradients, which are formed, of
      whole rows; queries stay gradients.
    ask: (params, queries, *, measurement=None, loop=Loop()) -> float32 [Q, F].
      The gradients of queries, which look like training examples unless a
      measurement m(params, query) -> scalar is given.
    sides: directions by block.
    layout: of a row.
  """

  build: Callable[..., Store]
  ask: Callable[..., np.ndarray]
  sides: Mapping[str, Sides]
  layout: tuple[layout.Span, ...]


def logger(
  objective: Objective,
  params: PyTree,
  data: PyTree,
  *,
  key: jax.Array | None = None,
  dimension: int = 16,
  sides: Mapping[str, Sides] | None = None,
  select: str | Sequence[str] | None = None,
  shares: str = "rows",
) -> Logger:
  """Traces the objective, and draws directions unless they are given.

  Args:
    objective: model and likelihood. A store does not know its loss: log
      another in another folder.
    params: parameters, or their shapes.
    data: examples, of which only the shapes matter.
    key: of random directions, if none are given.
    dimension: K, of each side of a block; a shorter side is kept as it is.
    sides: directions by block, as of `projections.principal`.
    select: patterns of the blocks, as in `blocks.trace`.
    shares: "rows", or "segments" with a row for each document of packed rows.

  Raises:
    ValueError: neither a key nor directions, or shares that the gradients do
      not have; `build` what `disk.create` and `writing.build` refuse.
  """
  example = streams.example(data)
  found = blocks.trace(objective.outputs, params, example, select=select)
  if sides is None:
    if key is None:
      raise ValueError("random directions need a key; or give `sides`")
    sides = projections.two_sided(found, key, dimension)
  if shares == "tokens":
    raise ValueError("a store has rows or segments, not tokens")
  products.check_shares(found, objective, shares)
  given, spans = dict(sides), layout.spans(found, sides)
  of = functools.cache(functools.partial(_features, found, objective, spans))
  asker = functools.cache(functools.partial(_measured, found, spans))
  updated = functools.cache(
    functools.partial(_updated, found, objective, spans)
  )

  def build(
    folder,
    params,
    train,
    *,
    dtype="bfloat16",
    names=None,
    updates: Updates | None = None,
    **options,
  ):
    if updates is not None and shares != "rows":
      raise ValueError(f"updates are of rows, not of {shares}")
    held, count = None, products.parts_of(shares, objective, train)
    if shares == "segments":
      owners = language.owner(train, count)
      held = owners >= 0
      if names is None and options.get("append"):
        raise ValueError("documents that are added to others need names")
      if names is None:
        names = [str(d) for d in range(owners.max() + 1)]
      names = [names[d] for d in owners[held]]
    about = {
      **_model(params, select),
      "projection": records.digest(given),
      "features": "gradients",
      "shares": shares,
    }
    features = of(shares, count)
    carried: PyTree = given
    if updates is not None:
      state = records.digest(updates.state)
      about["features"] = f"{updates.name} from the state {state}"
      features = updated(updates.step)
      carried = updates.state, given
    whole = json.dumps([about, spans, dtype])
    meshes.check_same("models, directions or options", whole)
    with meshes.together(f"making {folder}"):
      if jax.process_index() == 0:
        disk.create(Path(folder), spans, dtype, about)
        _save(Path(folder) / PROJECTION, given)
    operands = params, carried
    return writing.build(
      folder, features, operands, train, names=names, held=held, **options
    )

  def ask(params, queries, *, measurement=None, loop=Loop()):
    run = of("rows", 0) if measurement is None else asker(measurement)
    return streams.each(run, (params, given), queries, loop)

  return Logger(build, ask, given, spans)


def reopened(
  store: Store, objective: Objective, params: PyTree, data: PyTree
) -> Logger:
  """The logger of a store that is there, to ask it, or to add gradients.

  What is checked of the objective are its parameters and blocks; that its loss
  is the one that was logged is the caller's to see to.

  Args:
    store: that a logger built.
    objective: model and likelihood.
    params: those that the store was built with.
    data: examples or queries that look like them.

  Raises:
    ValueError: another model than the store's, or other blocks.
  """
  select = store.about["select"]
  disk.check(store, store.about | _model(params, select))
  log = logger(
    objective,
    params,
    data,
    sides=directions(store),
    select=select,
    shares=store.about["shares"],
  )
  if log.layout != store.layout:
    raise ValueError(
      f"the gradients have other blocks than the rows of {store.path}"
    )
  return log


def response(log: Logger, inverse: Mapping[str, np.ndarray]) -> Operator:
  """Pᵀ (F + λ)⁻¹ P as a response, for what a store has no rows of.

  With it `influence.scorer` scores tokens, or documents that were not stored,
  as `lenses.lens(store, asked, "logra")` scores rows.

  Args:
    log: the store's.
    inverse: of `fisher.inverted`.
  """

  def apply(grads: Blocks) -> Blocks:
    rows = layout.joined(projected.along(grads, log.sides), log.layout)
    seen = fisher.applied(inverse, np.asarray(rows), log.layout)
    return projected.back(
      layout.split(jnp.asarray(seen), log.layout), log.sides
    )

  return apply


def directions(store: Store) -> dict[str, Sides]:
  """Those that a store was built with, by block."""
  with np.load(store.path / PROJECTION) as found:
    return {
      span.name: Sides(
        *(found.get(f"{side}/{span.name}") for side in Sides._fields)
      )
      for span in store.layout
    }


def _features(
  found: Trace,
  objective: Objective,
  spans: Sequence[layout.Span],
  shares: str,
  count: int,
) -> Callable:
  """Rows of the gradients of the loss."""
  statistic = projected.of_shares(shares, count)
  return _joined(gradients.backward_pass(found, objective, statistic), spans)


def _measured(
  found: Trace, spans: Sequence[layout.Span], measurement: Loss
) -> Callable:
  """Those of the gradients of a function of (params, query)."""
  return _joined(projected.of_measurement(found, measurement), spans)


def _updated(
  found: Trace,
  objective: Objective,
  spans: Sequence[layout.Span],
  step: Callable[[Blocks, PyTree], Blocks],
) -> Callable:
  """Those of what an optimizer makes of the gradients."""
  run = gradients.per_example(found, objective)

  def projected_steps(params, batch, operands):
    state, sides = operands
    grads, finite = run(params, batch)
    return projected.along(step(grads, state), sides), finite

  return _joined(projected_steps, spans)


def _joined(run: Callable, spans: Sequence[layout.Span]) -> Callable:
  def features(operands, batch):
    params, sides = operands
    values, finite = run(params, batch, sides)
    return layout.joined(values, spans), finite

  return features


def _model(params: PyTree, select: Any) -> dict[str, Any]:
  chosen = [select] if isinstance(select, str) else select
  return {
    "model": records.digest(params),
    "select": None if chosen is None else list(chosen),
  }


def _save(path: Path, sides: Mapping[str, Sides]) -> None:
  if path.exists():  # of the same ones, as the store's digest says
    return
  arrays = {
    f"{side}/{name}": np.asarray(x)
    for name, given in sides.items()
    for side, x in zip(Sides._fields, given, strict=True)
    if x is not None
  }
  with parts.replacing(path) as file:
    np.savez(file, allow_pickle=False, **arrays)
