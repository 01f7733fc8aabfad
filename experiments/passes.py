"""Passes over one batch of a model, as steps to be timed."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.timing import Step
from tda import blocks, gradients, planning, streams
from tda.blocks import Block, Blocks, Trace
from tda.curvature import kronecker
from tda.likelihoods import Objective, PyTree
from tda.taps import Statistic


class Passes:
  """The plain gradient of a batch, and what is compared with it."""

  def __init__(
    self,
    objective: Objective,
    params: PyTree,
    rows: PyTree,
    select: str | Sequence[str] | None,
  ):
    self.objective, self.params = objective, params
    self.rows, self.select = jax.tree.map(jnp.asarray, rows), select
    self.size = streams.rows(rows)
    self.batch = streams.Batch(self.rows, jnp.arange(self.size), None)
    self.found = self._trace()
    self._random = np.random.default_rng(1)

  def noise(self, block: Block, *shape: int) -> jax.Array:
    """Normal values [*stack, *shape] of length about 1 along the last axis."""
    whole = (*block.stack, *shape)
    values = self._random.standard_normal(whole, np.float32)
    values *= shape[-1] ** -0.5  # in place: the queries are large
    return jnp.asarray(values)

  @functools.cached_property
  def basis(self) -> dict[str, kronecker.Basis]:
    """An eigenbasis in its shapes."""
    found = {}
    for name, block in self.found.blocks.items():
      groups, outputs, inputs = block.shape
      found[name] = kronecker.Basis(
        self.noise(block, groups, inputs, inputs),
        self.noise(block, groups, outputs, outputs),
      )
    return found

  def directions(self, count: int) -> Blocks:
    """Queries [*stack, count, G, O, I]."""
    return {
      name: self.noise(block, count, *block.shape)
      for name, block in self.found.blocks.items()
    }

  def plain(self) -> Step:
    """The gradient of the summed loss."""

    def gradient(params, batch):
      loss = jax.vmap(self.objective.loss, (None, 0))
      return jax.grad(lambda p: loss(p, batch.rows).sum())(params)

    return Step(gradient, (self.params, self.batch), None)

  def captured(
    self, statistic: Statistic, operands: Any, cost: Callable
  ) -> Step:
    """A pass of the engine, with what its operations allow."""

    def run(params, batch, operands):
      # Traced here, since that is part of a step's tracing time.
      one = gradients.backward_pass(self._trace(), self.objective, statistic)
      return one(params, batch, operands)[0]

    args = (self.params, self.batch, operands)
    return Step(run, args, planning.limit(self.found, cost))

  def _trace(self) -> Trace:
    example = streams.example(self.rows)
    outputs = self.objective.outputs
    return blocks.trace(outputs, self.params, example, select=self.select)
