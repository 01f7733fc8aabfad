"""TRAK: a regression on projected gradients of the model's output.

With f(θ, z) a scalar output that the loss is a function of, and φ = P ∇f its
gradient under a random projection P,

    τ(q, i) = ∂ℓ_i/∂f · φ_mᵀ (ΦᵀΦ + λ)⁻¹ φ_i,    φ_m = P ∇m(q),

each factor averaged over an ensemble of models, trained on other subsets or
with other seeds (Park et al. 2023). For classification f is
the margin log(p / (1 − p)) and ∂ℓ/∂f = −(1 − p), for regression the prediction
and its residual.

Signs are those of all scores here: positive where leaving the example out
raises the measurement. The paper's are for the margin as the measurement, and
for including the example.

Notation: N examples, Q queries, K dimensions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tda import blocks, gradients, likelihoods, projections, streams
from tda.attribution.influence import coverage
from tda.attribution.products import DOT
from tda.blocks import Trace
from tda.likelihoods import Loss, Objective
from tda.scores import CHANGE, Scores
from tda.streams import Loop

PyTree = Any


def attribute(
  objective: Objective,
  models: Sequence[PyTree],
  train: PyTree,
  queries: PyTree,
  *,
  key: jax.Array,
  dimension: int = 1024,
  damping: float = 0.0,
  measurement: Loss | None = None,
  output: Loss | None = None,
  slope: Loss | None = None,
  select: str | Sequence[str] | None = None,
  loop: Loop = Loop(),
) -> Scores:
  """Scores [N, Q] by TRAK.

  Args:
    objective: model and likelihood.
    models: parameters of each member of the ensemble; each has a projection of
      its own.
    train: pytree of arrays with leading axis N.
    queries: pytree of arrays with leading axis Q.
    key: of the projections.
    dimension: K. More than N makes ΦᵀΦ singular, which needs damping.
    damping: λ, relative to the mean eigenvalue of ΦᵀΦ.
    measurement: m(params, query) -> scalar; the loss unless given.
    output: f(params, example) -> scalar; unless given the model's output where
      it is one number, and else the margin.
    slope: ∂ℓ/∂f(params, example) -> scalar, given with the output.
    select: patterns of the blocks to attribute to, as in `blocks.trace`.
    loop: how to run over the data.
  """
  if not models:
    raise ValueError("TRAK needs one model or more")
  if (output is None) != (slope is None):
    raise ValueError("an output and its slope come together: give both")
  n, example = streams.rows(train), streams.example(train)
  if output is None or slope is None:
    output, slope = _default(objective, models[0], example)
  if dimension > n and damping == 0:
    raise ValueError(
      f"dimension={dimension} of {n} examples leaves ΦᵀΦ of rank {n}: lower"
      " it, or give a damping"
    )
  found, outputs = _projected(output, models[0], example, select)
  asked = streams.example(queries)
  _, measurements = _projected(
    measurement or objective.loss, models[0], asked, select
  )

  def slopes(params, batch):
    found = jax.vmap(slope, (None, 0))(params, batch.rows)
    return found, jnp.isfinite(found)

  products, weights = [], []
  for i, params in enumerate(models):
    rows = projections.rademacher(found, jax.random.fold_in(key, i), dimension)
    stage = loop.stage(f"model {i + 1}")
    phi_NxK = np.asarray(outputs(params, train, rows, loop=stage), np.float64)
    second = stage.stage("queries")
    query_QxK = np.asarray(
      measurements(params, queries, rows, loop=second), np.float64
    )
    kernel_KxK = phi_NxK.T @ phi_NxK
    level = damping * np.trace(kernel_KxK) / dimension
    kernel_KxK += level * np.eye(dimension)
    products.append(phi_NxK @ np.linalg.solve(kernel_KxK, query_QxK.T))
    third = stage.stage("slopes")
    weights.append(
      streams.each(slopes, params, train, third).astype(np.float64)
    )
  values = np.mean(products, axis=0) * np.mean(weights, axis=0)[:, None]
  return Scores(
    np.asarray(values, np.float32), "trak", CHANGE, 1, coverage=coverage(found)
  )


def _default(
  objective: Objective, params: PyTree, example: PyTree
) -> tuple[Loss, Loss]:
  """f and ∂ℓ/∂f of a model of one output, or of a classifier."""
  if jax.eval_shape(objective.outputs, params, example).size == 1:
    pull = jax.grad(objective.likelihood.loss)

    def slope(params, example):
      outputs = objective.outputs(params, example)
      return pull(outputs, objective.target(example)).sum()

    return lambda p, ex: objective.outputs(p, ex).sum(), slope
  margin = likelihoods.margin(objective)
  return margin, lambda p, ex: -jax.nn.sigmoid(-margin(p, ex))


def _projected(
  function: Loss, params: PyTree, example: PyTree, select: Any
) -> tuple[Trace, Callable[..., np.ndarray]]:
  """Inner products [N, K] of the gradients of a function with K directions."""
  objective = likelihoods.from_loss(function)
  found = blocks.trace(objective.outputs, params, example, select=select)
  run = gradients.summed_over_blocks(found, objective, DOT, keep=1)

  def project(params, data, rows, *, loop):
    lead = {
      name: jnp.moveaxis(rows[name], 0, len(block.stack))
      for name, block in found.blocks.items()
    }
    return run(params, data, lead, loop=loop)

  return found, project
