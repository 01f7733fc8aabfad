"""Single equations of a jaxpr: how to run them, open them and classify them.

What differs between JAX releases is confined to this file: how functions
inside an equation are bound, what a closed jaxpr is, and how a scan counts its
operands.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from tda import sites

Array = jax.Array

RENAMING = frozenset(
  "reshape transpose squeeze expand_dims slice split rev broadcast_in_dim "
  "convert_element_type reduce_precision copy sharding_constraint "
  "optimization_barrier pvary".split()
)
"""Operations whose output entries are input entries under another index."""

CASTS = frozenset(
  "convert_element_type reduce_precision copy sharding_constraint "
  "optimization_barrier pvary".split()
)
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
REMAT = frozenset({"remat", "remat2", "checkpoint"})


def scan_counts(eqn: Any) -> tuple[int, int]:
  """(constants, carries) of a scan, from shapes: they are named differently
  in different releases, and a scanned operand has one axis more outside."""
  body, _ = opened(eqn.params["jaxpr"])
  pairs = zip(eqn.invars, body.invars, strict=True)
  scanned = sum(len(o.aval.shape) > len(i.aval.shape) for o, i in pairs)
  pairs = zip(eqn.outvars, body.outvars, strict=True)
  carry = sum(len(o.aval.shape) == len(i.aval.shape) for o, i in pairs)
  return len(eqn.invars) - scanned - carry, carry


def run(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
  """Evaluates one equation as it stands.

  Equations that carry functions go through a jaxpr of their own, since how
  their parameters are bound differs between releases.
  """
  if not _carries_function(eqn):
    outputs = eqn.primitive.bind(*inputs, **eqn.params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]
  named = {
    v: x
    for v, x in zip(eqn.invars, inputs, strict=True)
    if not isinstance(v, core.Literal)
  }
  kept = [v for v in eqn.outvars if not isinstance(v, core.DropVar)]
  alone = core.Jaxpr(
    [], list(named), kept, [eqn], eqn.effects, debug_info=_debug_info(eqn)
  )
  fn = core.jaxpr_as_fun(core.ClosedJaxpr(alone, []))
  results = dict(zip(kept, fn(*named.values()), strict=True))
  return [results.get(v) for v in eqn.outvars]


def _carries_function(eqn: Any) -> bool:
  if any(True for _ in core.jaxprs_in_params(eqn.params)):
    return True
  return eqn.primitive.name.startswith("custom_")


def _debug_info(eqn: Any) -> Any:
  return core.DebugInfo("tda", eqn.primitive.name, None, None)


def opened(closed: Any) -> tuple[Any, Sequence[Any]]:
  """A jaxpr and its constants, of one closed or not."""
  return getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())


def called(eqn: Any) -> Any:
  """The jaxpr that an equation calls, or None."""
  return eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))


def first(eqn: Any) -> Any:
  """An equation's first operand, or None if that is a literal."""
  if not eqn.invars or isinstance(eqn.invars[0], core.Literal):
    return None
  return eqn.invars[0]


def permutes(eqn: Any) -> bool:
  """Whether the output has the input's entries, in some order."""
  size = lambda v: math.prod(v.aval.shape)
  return (
    eqn.primitive.name in RENAMING
    and len(eqn.invars) == 1
    and (len(eqn.outvars) == 1 and size(eqn.invars[0]) == size(eqn.outvars[0]))
  )


def stops_gradient(eqn: Any) -> bool:
  """Whether no gradient passes: comparisons, integers, `stop_gradient`."""
  floating = lambda v: jnp.issubdtype(v.aval.dtype, jnp.inexact)
  return eqn.primitive.name == "stop_gradient" or not any(
    map(floating, eqn.outvars)
  )


def shifts(eqn: Any) -> bool:
  """Adds a number, which changes no derivative."""
  if eqn.primitive.name not in ("add", "sub"):
    return False
  left, right = (isinstance(v, core.Literal) for v in eqn.invars)
  return right or (left and eqn.primitive.name == "add")


def partner(eqn: Any, k: int) -> int:
  """Which operand a parameter at operand k meets."""
  if eqn.primitive.name == "dynamic_slice":
    sizes, shape = eqn.params["slice_sizes"], eqn.invars[0].aval.shape
    axis = sites.row_axis(sizes, shape)
    return 1 if axis is None else 1 + axis
  return 1 - k


def rename_step(eqn: Any, k: int) -> Callable[[Any], Any]:
  """Output k as a function of the input, whatever the dtype."""
  if eqn.primitive.name in CASTS:
    return lambda x: x
  return lambda x: run(eqn, [x])[k]
