"""TracIn: gradient dot products along the run, weighted by what was applied.

    τ = Σ_k c_k ⟨∇m(θ_k), ∇ℓ(θ_k)⟩ / N

over the checkpoints k of a run, with c_k = Σ η since the checkpoint before, of
every entry where an optimizer gives them rates of their own
(Pruthi et al. 2020, TracInCP, whose weight is η alone and whose sum has no 1/N;
with these a score is the predicted change of the measurement when the example
is left out). SOURCE in the limit of many short segments, but for the query's
gradient, which is taken along the run and not carried back through it.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tda import blocks
from tda.attribution import influence
from tda.attribution.responses import Scaled
from tda.blocks import Trace
from tda.likelihoods import Loss, Objective
from tda.runs import Checkpoint
from tda.scores import Scores
from tda.streams import Loop


def scorer(
  found: Trace,
  objective: Objective,
  *,
  measurement: Loss | None = None,
  query_batch: int = 64,
) -> Callable[..., Scores]:
  """Scores by TracInCP.

  Args:
    found: trace of `objective.outputs`.
    objective: model and likelihood.
    measurement: m(params, query) -> scalar; the loss unless given.
    query_batch: queries held at a time, as in `influence.scorer`.

  Returns:
    score(checkpoints, train, queries, *, loop=Loop()) -> Scores [N, Q], of one
    stage's checkpoints in order.
  """
  score = influence.scorer(
    found, objective, measurement=measurement, query_batch=query_batch
  )

  def run(
    checkpoints: Sequence[Checkpoint], train, queries, *, loop: Loop = Loop()
  ) -> Scores:
    if not checkpoints:
      raise ValueError("TracIn needs one checkpoint or more")
    values: np.ndarray | float = 0.0
    before = jax.tree.map(
      jnp.zeros_like, blocks.to_blocks(found, checkpoints[0].rates)
    )
    for i, point in enumerate(checkpoints):
      stage = loop.stage(f"checkpoint {i + 1}")
      rates = blocks.to_blocks(found, point.rates)
      since = Scaled(jax.tree.map(jnp.subtract, rates, before))
      responses = {"tracin": since}
      scores = score(point.params, train, queries, responses, loop=stage)
      values = values + scores["tracin"].values
      before = rates
    return scores["tracin"]._replace(values=np.asarray(values))

  return run
