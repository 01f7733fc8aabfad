"""Functions of a fitted curvature, applied in its eigenbasis.

A response is `f(C) v = Q (f(Λ) ∘ Qᵀ v)`: damped inverses here, and whatever
function of the eigenvalues a method needs. It acts on block coordinates with
any number of leading axes for queries, and is a pytree, so that it can be an
argument of a jitted function.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tda.blocks import Blocks
from tda.curvature.kronecker import Basis, Curvature
from tda.curvature.labels import Labels

Array = jax.Array


class Damping(NamedTuple):
  """What is added to the eigenvalues before they are inverted."""

  kind: str  # "absolute", or "relative" to the mean eigenvalue of each layer
  value: float

  def __str__(self) -> str:
    relative = " relative" if self.kind == "relative" else ""
    return f"{self.value:g}{relative}"

  def of(self, eigenvalues: Array) -> Array:
    """The damping [*stack, 1, 1, 1] of a block's [*stack, G, O, I]."""
    mean = jnp.mean(eigenvalues, axis=(-3, -2, -1), keepdims=True)
    return self.value * (
      mean if self.kind == "relative" else jnp.ones_like(mean)
    )


def absolute(value: float) -> Damping:
  """The same damping in every block, in the units of the eigenvalues."""
  return _checked(Damping("absolute", value))


def relative(value: float = 0.1) -> Damping:
  """A multiple of the mean eigenvalue of each layer (Grosse et al. 2023)."""
  return _checked(Damping("relative", value))


def damping(text: str) -> Damping:
  """A damping as it is written: "0.01", or "0.1 relative"."""
  value, _, kind = text.partition(" ")
  try:
    return {"": absolute, "relative": relative}[kind](float(value))
  except (KeyError, ValueError) as error:
    raise ValueError(
      f"damping {text!r} is not a number of 0 or more, as '0.01' or"
      " '0.1 relative'"
    ) from error


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("basis", "weights"),
  meta_fields=("damping", "labels"),
)
@dataclasses.dataclass(frozen=True)
class Response:
  """A linear operator that is diagonal in a Kronecker-factored basis."""

  basis: dict[str, Basis]
  weights: Blocks  # f(Λ), [*stack, G, O, I]
  damping: Damping | None = None
  labels: Labels | None = None

  def __call__(self, blocks: Blocks) -> Blocks:
    """Applies the operator to blocks [Q, *stack, G, O, I]."""
    return {
      name: _apply(self.basis[name], self.weights[name], v)
      for name, v in blocks.items()
    }


def response(
  curvature: Curvature,
  function: Callable[[Array], Array],
  damping: Damping | None = None,
) -> Response:
  """`function` of the curvature, given what it does to eigenvalues."""
  weights = jax.tree.map(function, curvature.eigenvalues)
  return Response(curvature.basis, weights, damping, curvature.labels)


def inverse(curvature: Curvature, damping: Damping) -> Response:
  """(C + δ)⁻¹.

  Directions without curvature or damping are left out, as in a pseudo-inverse;
  without damping these are eigenvalues below the float's precision relative to
  the largest of the block.
  """

  run = jax.jit(_inverted, static_argnames=("kind", "damped"))
  damped = damping.value > 0
  weights = run(curvature.eigenvalues, damping.value, damping.kind, damped)
  return Response(curvature.basis, weights, damping, curvature.labels)


def _inverted(
  eigenvalues: Blocks, value: float, kind: str, damped: bool
) -> Blocks:
  def invert(values):
    if damped:
      floor, total = 0.0, values + Damping(kind, value).of(values)
    else:
      eps = jnp.finfo(values.dtype).eps * math.sqrt(values.size)
      floor, total = values.max() * eps, values
    return jnp.where(total > floor, 1 / jnp.where(total > floor, total, 1), 0)

  return jax.tree.map(invert, eigenvalues)


def _apply(basis: Basis, weights: Array, v: Array) -> Array:
  highest = jax.lax.Precision.HIGHEST
  product = lambda spec, x, y: jnp.einsum(spec, x, y, precision=highest)
  if basis.inputs is not None:
    v = product("q...oi,...ij->q...oj", v, basis.inputs)
  if basis.outputs is not None:
    v = product("q...oi,...op->q...pi", v, basis.outputs)
  v = v * weights[None]
  if basis.outputs is not None:
    v = product("q...pi,...op->q...oi", v, basis.outputs)
  if basis.inputs is not None:
    v = product("q...oj,...ij->q...oi", v, basis.inputs)
  return v


def _checked(damping: Damping) -> Damping:
  if not (math.isfinite(damping.value) and damping.value >= 0):
    raise ValueError(
      f"damping must be a finite number of 0 or more, got {damping.value}"
    )
  return damping
