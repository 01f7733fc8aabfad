"""What tracing finds: the uses of each parameter in a program."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

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
  bias: Bias | None = None
  reason: str = ""  # why the use is generic; empty at a site


class Program(NamedTuple):
  """A function of (params, example) as a jaxpr and the uses found in it."""

  jaxpr: Any
  consts: tuple[Any, ...]
  uses: tuple[Use, ...]
  lengths: Mapping[Path, int]  # of the scans that carry parameters
  outputs: Any  # shapes


def expand(origin: Origin, w: Any) -> Any:
  """The value a use sees, from the entries it stands for."""
  return w if origin.expand is None else origin.expand(w)
