"""What tracing finds: the uses of each parameter in a program."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from tda import sites

Path: TypeAlias = tuple[int, ...]
"""An equation's position in the jaxpr, sub-jaxprs included, outermost first."""


class Origin(NamedTuple):
  """Where a value comes from when it only renames entries of a leaf."""

  leaf: int  # position among the flattened parameters
  pull: Callable[[Any], Any]  # leaf -> [*stack, *shape]
  shape: tuple[int, ...]  # of one iteration, before any broadcast
  scans: tuple[Path, ...] = ()  # the scans it is an operand of
  repeats: bool = False  # held constant by a loop
  expand: Callable[[Any], Any] | None = None  # a broadcast at the end


class Bias(NamedTuple):
  """A parameter added to a site's output: its homogeneous coordinate."""

  origin: Origin
  column: Callable[[Any], Any]  # [*shape] -> [G, O, 1]
  alone: "Use"  # the same addition as a site of its own


class Use(NamedTuple):
  """One equation that uses one parameter."""

  path: Path
  operand: int
  origin: Origin
  form: sites.Form
  activation: Any  # shape and dtype of the other operand; None if generic
  output: Any  # shape and dtype
  partner: int = -1  # which operand the activation is; -1 if generic
  bias: Bias | None = None
  reason: str = ""  # why the use is generic; empty at a site


class Program(NamedTuple):
  """A function of (params, example) as a jaxpr and the uses found in it."""

  jaxpr: Any
  consts: tuple[Any, ...]
  uses: tuple[Use, ...]
  lengths: Mapping[Path, int]  # of the scans that carry parameters
  outputs: Any  # shapes


def pull(use: Use, leaves: Sequence[Any]) -> jax.Array:
  """Block coordinates [*stack, G, O, I] of a use's leaf, and its bias's."""
  depth = len(use.origin.scans)
  matrix = _mapped(use.form.matrix, depth)(use.origin.pull(leaves[0]))
  if use.bias is None:
    return matrix
  column = _mapped(use.bias.column, depth)
  bias = column(use.bias.origin.pull(leaves[1]))
  return jnp.concatenate([matrix, bias], axis=-1)


def _mapped(fn: Callable, depth: int) -> Callable:
  for _ in range(depth):
    fn = jax.vmap(fn)
  return fn


def expand(origin: Origin, w: Any) -> Any:
  """The value a use sees, from the entries it stands for."""
  return w if origin.expand is None else origin.expand(w)
