"""Responses: the linear operators that tell attribution methods apart.

A response maps the blocks of queries [Q, *stack, G, O, I] to the same. It is
one of three things: a pytree that can be called inside jit (`Identity`,
`spectral.Response`, ...), a solver that also says how each query ended (its
`solve` returns (blocks, Info) and runs from Python), or any Python function.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from tda.blocks import Blocks
from tda.curvature.labels import Labels
from tda.inverse import iterative
from tda.inverse.iterative import Info

Operator: TypeAlias = Callable[[Blocks], Blocks]


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=(), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Identity:
  """The response of gradient dot products."""

  def __call__(self, blocks: Blocks) -> Blocks:
    """The same blocks."""
    return blocks


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("operator",), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Cosine:
  """The cosine of ∇ℓ and R ∇m instead of their product, for any response R.

  Zero where either vanishes. Its scores are similarities, not changes.
  """

  operator: Operator

  def __call__(self, blocks: Blocks) -> Blocks:
    """The operator's result, each query's divided by its norm."""
    return _unit(self.operator(blocks))


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("factors",), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Scaled:
  """Every coordinate times a factor of its own, [*stack, G, O, I] by block."""

  factors: Blocks

  def __call__(self, blocks: Blocks) -> Blocks:
    """The products."""
    return {name: v * self.factors[name][None] for name, v in blocks.items()}


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("operators",),
  meta_fields=("labels",),
)
@dataclasses.dataclass(frozen=True)
class Chain:
  """Operators one after the other, the first applied first."""

  operators: tuple[Operator, ...]
  labels: Labels | None = None

  def __call__(self, blocks: Blocks) -> Blocks:
    """The last operator's result."""
    for operator in self.operators:
      blocks = operator(blocks)
    return blocks


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("operators",), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Sum:
  """Operators side by side, their results added."""

  operators: tuple[Operator, ...]

  def __call__(self, blocks: Blocks) -> Blocks:
    """The sum."""
    first, *others = (operator(blocks) for operator in self.operators)
    for other in others:
      first = {name: x + other[name] for name, x in first.items()}
    return first


def apply(operator: Operator, grads: Blocks) -> tuple[Blocks, Info | None]:
  """The response to blocks [Q, ...], and what a solver says of it."""
  inner = operator.operator if isinstance(operator, Cosine) else operator
  if hasattr(inner, "solve"):
    found, info = inner.solve(grads)
    return (_unit(found) if isinstance(operator, Cosine) else found), info
  if any(callable(leaf) for leaf in jax.tree.leaves(operator)):
    return operator(grads), None
  return _call(operator, grads), None


@jax.jit
def _call(operator: Operator, grads: Blocks) -> Blocks:
  return operator(grads)


@jax.jit
def _unit(blocks: Blocks) -> Blocks:
  """Each query's divided by its norm; zeros stay."""
  squares = iterative.inner(blocks, blocks)
  return iterative.scaled(
    jnp.where(squares > 0, jax.lax.rsqrt(squares), 0), blocks
  )
