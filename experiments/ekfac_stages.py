"""EK-FAC on a subject, stage by stage with times."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.subjects import Subject
from tda import blocks, gradients, streams
from tda.attribution import influence
from tda.curvature import kronecker
from tda.inverse import spectral
from tda.likelihoods import Objective
from tda.streams import Fold, Loop

STAGES = ("covariances", "eigenbasis", "eigenvalues", "scores")


class Stages:
  """Passes over one subject at one batch size."""

  def __init__(self, given: Subject, batch: int):
    self.given, self.batch, self.loop = given, batch, Loop(batch)
    objective, params = given.objective, given.params
    example = streams.example(given.train)
    self.found = blocks.trace(
      objective.outputs, params, example, select="*kernel"
    )
    one_pass = lambda statistic: gradients.total(
      self.found, gradients.backward_pass(self.found, objective, statistic)
    )
    self.moments = one_pass(kronecker.MOMENTS)
    self.squares = one_pass(kronecker.SQUARES)
    self.scorer = influence.scorer(self.found, objective, query_batch=128)
    self.plain = plain_gradient(objective)

  def run(self, labels: np.ndarray | None = None) -> tuple[Any, dict]:
    """Scores [N, Q] without the factor 1/N, and seconds by stage."""
    _, params, train, queries = self.given
    fitted = train if labels is None else {**train, "y": labels}
    marks = [time.perf_counter()]
    mark = lambda: marks.append(time.perf_counter())
    moments, _ = streams.fold(
      self.moments, (params, None, None), fitted, self.loop
    )
    jax.block_until_ready(moments)
    mark()
    basis, _ = kronecker.eigenbasis(moments)
    jax.block_until_ready(basis)
    mark()
    sums, count = streams.fold(
      self.squares, (params, basis, None), fitted, self.loop
    )
    values = {k: v / count for k, v in sums.items()}
    jax.block_until_ready(values)
    mark()
    curvature = kronecker.Curvature(
      basis, values, "ekfac", gradients.EMPIRICAL, int(count)
    )
    response = spectral.inverse(curvature, spectral.relative(0.1))
    scores = self.scorer(
      params, train, queries, {"ekfac": response}, loop=self.loop
    )["ekfac"]
    mark()
    return scores.values * scores.normaliser, dict(
      zip(STAGES, np.diff(marks).tolist(), strict=True)
    )

  def gradient_seconds(self) -> float:
    start = time.perf_counter()
    params, train = self.given.params, self.given.train
    jax.block_until_ready(streams.fold(self.plain, params, train, self.loop))
    return time.perf_counter() - start


def plain_gradient(objective: Objective) -> Fold:
  """The summed loss's gradient of all parameters over a dataset."""

  def update(state, params, batch):
    def summed(params):
      losses = jax.vmap(objective.loss, (None, 0))(params, batch.rows)
      kept = losses if batch.lanes is None else losses * batch.lanes
      return kept.sum(), losses

    grads, losses = jax.grad(summed, has_aux=True)(params)
    return jax.tree.map(jnp.add, state, grads), jnp.isfinite(losses)

  zeros = lambda params: jax.tree.map(jnp.zeros_like, params)
  return Fold(zeros, update, lambda state: state)
