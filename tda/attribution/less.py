"""LESS: cosines with the update that Adam would make of one example.

    τ(z, q) = Σ_k η_k cos(P Γ(z; θ_k), P ∇m(q; θ_k))

over checkpoints k of a run with Adam, η_k the learning rate of the steps that
checkpoint k stands for, and

    Γ(z) = m̂ / (√v̂ + ε),  m = β₁ m_k + (1 − β₁) ∇ℓ(z),
                          v = β₂ v_k + (1 − β₂) ∇ℓ(z)²

the direction of a step on z alone from the moments that Adam has at k (Xia et
al. 2024). Hats are the bias correction of optax, which the paper leaves out.
Weight decay is no part of Γ.

Signs are those of all scores here: positive where leaving the example out
raises the measurement. The paper's queries are means over a subtask, of whose
scores the largest counts: let a query hold the examples of a subtask, give a
measurement that is their mean loss, and take `values.max(axis=1)`.

Notation: N examples, Q queries, B batch, K dimensions.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tda import blocks, gradients, projections, streams
from tda.attribution import adam
from tda.attribution.influence import coverage
from tda.blocks import Blocks, Trace
from tda.likelihoods import Loss, Objective
from tda.runs import Checkpoint
from tda.scores import SIMILARITY, Scores
from tda.streams import Loop

Array = jax.Array
PyTree = Any


class Updates(NamedTuple):
  """What an optimizer makes of the gradient of one example."""

  name: str  # with its settings
  step: Callable[[Blocks, PyTree], Blocks]  # (gradients [B, ...], state)
  state: PyTree


def attribute(
  objective: Objective,
  checkpoints: Sequence[Checkpoint],
  train: PyTree,
  queries: PyTree,
  *,
  rates: Sequence[float],
  key: Array | None = None,
  dimension: int | None = 1024,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  measurement: Loss | None = None,
  select: str | Sequence[str] | None = None,
  loop: Loop = Loop(),
) -> Scores:
  """Scores [N, Q] by LESS.

  Γ is no linear function of the gradient, so that a batch's per-example
  gradients are formed: `Loop.microbatch` bounds how many at a time.

  Args:
    objective: model and likelihood.
    checkpoints: of a run with Adam, as of `runs.checkpoints`.
    train: pytree of arrays with leading axis N.
    queries: pytree of arrays with leading axis Q; they look like training
      examples unless a measurement is given.
    rates: η_k, one for each checkpoint.
    key: of the projections, another for each checkpoint.
    dimension: K (8192 in the paper), with directions of K times the parameters;
      None projects nothing, and holds a gradient of every example.
    b1: β₁ of the run, as are `b2` and `eps` β₂ and ε.
    b2: see `b1`.
    eps: see `b1`.
    measurement: m(params, query) -> scalar; the loss unless given.
    select: patterns of the blocks to attribute to, as in `blocks.trace`.
    loop: how to run over the data.

  Raises:
    ValueError: no checkpoints, or without Adam's moments; rates that are not as
      many or not finite; a projection without a key or of no dimension; data
      whose gradients are not finite.
  """
  _check(checkpoints, rates, key, dimension, b1, b2)
  params, example = checkpoints[0].params, streams.example(train)
  found = blocks.trace(objective.outputs, params, example, select=select)
  ours, theirs = _passes(found, objective, measurement, (b1, b2, eps))
  values: np.ndarray | float = 0.0
  for i, (point, rate) in enumerate(zip(checkpoints, rates, strict=True)):
    name, rows = f"checkpoint {i + 1}", None
    stage = loop.stage(name)
    if key is not None and dimension is not None:
      own = jax.random.fold_in(key, i)
      rows = projections.rademacher(found, own, dimension)
    with streams.said_of(name):
      state = _state(found, point)
    with streams.said_of(f"{name}, train"):
      given = stage.stage("train")
      train_NxK = ours(point.params, train, (state, rows), loop=given)
    with streams.said_of(f"{name}, queries"):
      asked = stage.stage("queries")
      query_QxK = theirs(point.params, queries, rows, loop=asked)
    values = values + float(rate) * (train_NxK @ query_QxK.T)
  return Scores(
    np.asarray(values, np.float32),
    method="less",
    unit=SIMILARITY,
    normaliser=1,
    coverage=coverage(found),
  )


def updates(
  found: Trace,
  point: Checkpoint,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
) -> Updates:
  """Γ of a checkpoint, for a store of it (`build` of `logra.Logger`).

  A lens "cosine" on it, its directions times η_k, is the checkpoint's part of
  the sum, with projections of each side in place of those of all parameters.
  Arguments and errors are those of `attribute`.
  """
  _check([point], [1.0], None, None, b1, b2)
  name = f"Adam's updates, b1={b1}, b2={b2}, eps={eps}"
  return Updates(name, _step(b1, b2, eps), _state(found, point))


@functools.cache  # so that stores of several checkpoints share a program
def _step(b1: float, b2: float, eps: float) -> Callable:
  adam_step = optax.scale_by_adam(b1, b2, eps).update

  def step(grads: Blocks, state: PyTree) -> Blocks:
    return jax.vmap(lambda one: adam_step(one, state)[0])(grads)

  return step


def _state(found: Trace, point: Checkpoint) -> optax.ScaleByAdamState:
  """Adam's moments in blocks."""
  first, second, steps = adam.moments(point.opt_state)
  first, second = (adam.in_blocks(found, x) for x in (first, second))
  return optax.ScaleByAdamState(steps, first, second)


def _passes(found, objective, measurement, decays):
  """Unit updates of training examples, and unit gradients of queries.

  Operands are (Adam's state in blocks, rows), and rows.
  """
  plain = gradients.per_example(found, objective)
  ask = plain
  if measurement is not None:
    ask = gradients.of_measurement(found, measurement)
  adam_step = optax.scale_by_adam(*decays).update

  def updates(grads, operands):
    state, rows = operands
    step = lambda one: adam_step(one, state)[0]
    return _unit(jax.vmap(step)(grads), rows)

  return (
    gradients.kept(lambda params, batch, _: plain(params, batch), updates),
    gradients.kept(lambda params, batch, _: ask(params, batch), _unit),
  )


def _unit(vectors: Blocks, rows: Blocks | None) -> Array:
  """Blocks of a batch along rows, or as they are, at unit length [B, K]."""
  flat = lambda x: x.reshape(x.shape[0], -1)
  if rows is None:
    joined_BxK = jnp.concatenate([*map(flat, jax.tree.leaves(vectors))], axis=1)
  else:
    joined_BxK = sum(flat(x) @ flat(rows[k]).T for k, x in vectors.items())
  squares = jnp.square(joined_BxK).sum(axis=1, keepdims=True)
  return joined_BxK * jnp.where(squares > 0, jax.lax.rsqrt(squares), 0)


def _check(checkpoints, rates, key, dimension, b1, b2) -> None:
  if not checkpoints or len(checkpoints) != len(rates):
    raise ValueError(
      f"LESS needs a rate for each of one checkpoint or more, not {len(rates)}"
      f" for {len(checkpoints)}"
    )
  if not np.isfinite(np.asarray(rates, float)).all():
    raise ValueError(f"rates={list(rates)}: they are finite learning rates")
  if dimension is not None and key is None:
    raise ValueError(
      f"a projection to dimension={dimension} needs a key; dimension=None"
      " projects nothing"
    )
  if not (0 <= b1 < 1 and 0 <= b2 < 1):
    raise ValueError(f"b1={b1}, b2={b2}: decays are at least 0 and below 1")
