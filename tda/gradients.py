"""Backward passes over batches: what every method does to the data.

`backward_pass` joins capture (`tda.taps`), labels (`tda.curvature.labels`) and
a statistic into one pure function of a batch. Curvature fits sum its values
over a dataset (`total`), scores keep them for every example.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from tda import blocks, streams, taps
from tda.blocks import Blocks, Trace
from tda.curvature import labels as labels_lib
from tda.curvature.labels import Labels
from tda.likelihoods import Objective
from tda.streams import Batch, Fold, Loop

Array = jax.Array
PyTree: TypeAlias = Any
Pass: TypeAlias = Callable[..., tuple[dict[str, PyTree], Array]]
"""(params, batch, operands, key) -> (statistics by block, finite [B])."""

EMPIRICAL = Labels("empirical")


def backward_pass(
  found: Trace,
  objective: Objective,
  statistic: taps.Statistic,
  labels: Labels = EMPIRICAL,
) -> Pass:
  """The statistic of the gradients that the labels ask for, on a batch.

  Args:
    found: trace of `objective.outputs`.
    objective: model and likelihood.
    statistic: what is kept. The K gradients of an example are summed after the
      statistic, so one that is per example needs K = 1.
    labels: which gradients. Empirical: those of the loss itself.

  Returns:
    run(params, batch, operands=None, key=None) -> (statistics by block, finite
    [B]): whose outputs and cotangents, and loss if empirical, are finite.
    Operands go to the statistic. Sampled labels need the key; an example's
    draws depend on it and on the example's position in the dataset alone.
  """
  if labels.kind != "empirical" and statistic.per_example:
    raise ValueError(
      f"a statistic per example is of the gradient of the loss, not of "
      f"{labels.kind} labels"
    )
  run = taps.linearize(found, statistic)
  pseudo = labels_lib.cotangents(objective, labels)

  def run_pass(params, batch, operands=None, key=None):
    segments = None
    if objective.segments is not None:
      segments = jax.vmap(objective.segments)(batch.rows)
    outputs, backward = run(params, batch.rows, operands, batch.lanes, segments)
    keys = None
    if labels.kind == "sampled" and key is not None:
      keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch.positions)
    losses_B = _losses(objective, outputs, batch.rows)
    cotangents_BxK = jax.vmap(pseudo)(outputs, batch.rows, keys)
    finite = _finite(outputs) & _finite(cotangents_BxK)
    if labels.kind == "empirical":
      # A label out of range makes the loss NaN and leaves its gradient finite.
      finite &= _finite(losses_B)
    cotangents_KxB = cotangents_BxK.swapaxes(0, 1).astype(outputs.dtype)
    if cotangents_KxB.shape[0] == 1:
      return backward(cotangents_KxB[0]), finite
    shapes = jax.eval_shape(backward, cotangents_KxB[0])
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total, cotangents):
      return jax.tree.map(jnp.add, total, backward(cotangents)), None

    return jax.lax.scan(add, zero, cotangents_KxB)[0], finite

  return run_pass


def total(found: Trace, run: Pass) -> Fold:
  """Sums a backward pass over a dataset.

  Its `params` are the arguments (params, operands, key) of the pass; the
  result is (statistics by block, number of examples).
  """

  def init(args):
    batched = lambda s: jax.ShapeDtypeStruct((1, *s.shape), s.dtype)
    rows = jax.tree.map(batched, found.example)
    batch = Batch(rows, jnp.zeros(1, jnp.int32), None)
    params, operands, key = args
    shapes, _ = jax.eval_shape(run, params, batch, operands, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return zeros, jnp.zeros((), jnp.int32)

  def update(state, args, batch):
    params, operands, key = args
    values, finite = run(params, batch, operands, key)
    sums, count = state
    counted = finite.size if batch.lanes is None else batch.lanes.sum()
    sums = jax.tree.map(jnp.add, sums, values)
    return (sums, count + jnp.asarray(counted, jnp.int32)), finite

  return Fold(init, update, lambda state: state)


def summed_over_blocks(
  found: Trace,
  objective: Objective,
  statistic: taps.Statistic,
  *,
  keep: int = 0,
) -> Callable[..., np.ndarray]:
  """For every example the sum over blocks and stacks of its statistic.

  Args:
    found: trace of `objective.outputs`.
    objective: model and likelihood.
    statistic: one that is per example, [N, *stack, *kept].
    keep: how many axes it has after the stack's.

  Returns:
    run(params, data, operands, *, loop=Loop()) -> [N, *kept]. A second call
    compiles nothing again.
  """

  def summed(values, operands):
    del operands
    return over_blocks(values, keep)

  return kept(backward_pass(found, objective, statistic), summed)


def over_blocks(values: Mapping[str, Any], keep: int = 0) -> Any:
  """Sum over blocks and stacks of arrays [N, *stack, *kept], `keep` axes."""
  return sum(
    x.reshape(x.shape[0], -1, *x.shape[x.ndim - keep :]).sum(axis=1)
    for x in values.values()
  )


def kept(
  run: Pass, finish: Callable[[PyTree, PyTree], PyTree]
) -> Callable[..., PyTree]:
  """What becomes of a pass's statistics, for every example of a dataset.

  Args:
    run: (params, batch, operands) -> (statistics [B, ...] by block, finite
      [B]).
    finish: (statistics, operands) -> pytree of arrays [B, ...], which are
      checked to be finite.

  Returns:
    each(params, data, operands, *, loop=Loop()) -> numpy arrays [N, ...]. A
    second call compiles nothing again.
  """

  def one(args, batch):
    params, operands = args
    values, finite = run(params, batch, operands)
    results = finish(values, operands)
    for x in jax.tree.leaves(results):
      finite &= _finite(x)
    return results, finite

  def each(params, data, operands, *, loop=Loop()):
    return streams.each(one, (params, operands), data, loop)

  return each


def per_example(
  found: Trace, objective: Objective
) -> Callable[[PyTree, Batch], tuple[Blocks, Array]]:
  """Gradients of the loss of each example, [B, *stack, G, O, I] by block."""
  return backward_pass(found, objective, taps.GRADIENT)


def of_measurement(
  found: Trace, measurement: Callable[[PyTree, PyTree], Array]
) -> Callable[[PyTree, Batch], tuple[Blocks, Array]]:
  """Gradients of any scalar function of (params, example), in the blocks of
  `found`, which may be the trace of another function of the same params.

  Tracing raises ValueError if the function fails on one example or returns
  anything but a scalar.
  """

  def scalar(params, example):
    with blocks.on_one_example("the measurement", example):
      value = jnp.asarray(measurement(params, example))
      if value.shape:
        raise ValueError(f"it returned shape {value.shape}, not a scalar")
    return value

  def gradients(params, batch):
    one = jax.value_and_grad(scalar)
    values, grads = jax.vmap(one, (None, 0))(params, batch.rows)
    found_blocks = jax.vmap(lambda g: blocks.to_blocks(found, g))(grads)
    return found_blocks, jnp.isfinite(values)

  return gradients


def _losses(objective: Objective, outputs: Array, rows: PyTree) -> Array:
  targets = jax.vmap(objective.target)(rows)
  losses = jax.vmap(objective.likelihood.loss)(outputs, targets)
  if losses.ndim != 1:
    raise ValueError(
      f"the loss of one example has shape {losses.shape[1:]}, not a scalar: "
      "sum it, or take its mean"
    )
  return losses


def _finite(x: Array) -> Array:
  return jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1)
