"""Matrix products of a program, counted from shapes.

One multiply-add is one operation; elementwise work is not counted.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core

from tda.tracing import equations
from tda.tracing.uses import Path, Program


class Counts(NamedTuple):
  """Products of one example.

  Attributes:
    forward: multiply-adds of the products of two activations.
    backward: those of their gradients, for the activations that need one.
    times: how often a site's equation runs, by path; a while loop counts as
      one round, and every branch of a cond counts.
    leading: the sites whose activation depends on no parameter, so that the
      backward pass stops there.
  """

  forward: int
  backward: int
  times: Mapping[Path, int]
  leading: frozenset[Path]


def count(program: Program, leaves: int) -> Counts:
  """Counts the products of a program whose first inputs are the parameters."""
  walk = _Walk({use.path for use in program.uses}, [], {}, {})
  reached = [k < leaves for k in range(len(program.jaxpr.invars))]
  _walk(walk, program.jaxpr, reached, (), 1)
  return Counts(
    sum(work for work, _ in walk.products),
    sum(work * needed for work, needed in walk.products),
    walk.times,
    frozenset(path for path, reached in walk.reached.items() if not reached),
  )


class _Walk(NamedTuple):
  sites: set[Path]
  products: list[tuple[int, int]]  # multiply-adds, operands with a gradient
  times: dict[Path, int]
  reached: dict[Path, bool]  # whether a site's activation is


def _walk(
  walk: _Walk, jaxpr: Any, reached: Sequence[bool], path: Path, times: int
) -> list[bool]:
  """Counts a jaxpr; returns which outputs depend on a parameter."""
  known = dict(zip(jaxpr.invars, reached, strict=True))
  read = lambda v: not isinstance(v, core.Literal) and known.get(v, False)
  for i, eqn in enumerate(jaxpr.eqns):
    here, inputs = (*path, i), [read(v) for v in eqn.invars]
    outputs = [any(inputs)] * len(eqn.outvars)
    if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
      _product(walk, eqn, inputs, here, times)
    elif eqn.primitive.name == "scan":
      outputs = _scan(walk, eqn, inputs, here, times)
    elif eqn.primitive.name == "cond":
      for k, branch in enumerate(eqn.params["branches"]):
        body, _ = equations.opened(branch)
        _walk(walk, body, inputs[1:], (*here, k), times)
    elif (body := _body(eqn)) is not None:
      outputs = _walk(walk, body, inputs, here, times)
    for v, out in zip(eqn.outvars, outputs, strict=True):
      known[v] = out and jnp.issubdtype(v.aval.dtype, jnp.inexact)
  return [read(v) for v in jaxpr.outvars]


def _body(eqn: Any) -> Any:
  """The one jaxpr an equation runs on its own operands, if it does so."""
  for closed in core.jaxprs_in_params(eqn.params):
    body, _ = equations.opened(closed)
    if len(body.invars) == len(eqn.invars):
      return body
  return None


def _scan(walk, eqn, inputs, here, times) -> list[bool]:
  body, _ = equations.opened(eqn.params["jaxpr"])
  fixed, carry = equations.scan_counts(eqn)
  state = inputs[fixed : fixed + carry]
  scanned = inputs[fixed + carry :]
  while True:
    trial = walk._replace(products=[])
    args = [*inputs[:fixed], *state, *scanned]
    outputs = _walk(trial, body, args, here, times * eqn.params["length"])
    grown = [a or b for a, b in zip(state, outputs[:carry], strict=True)]
    if grown == state:
      walk.products.extend(trial.products)
      return outputs
    state = grown


def _product(walk, eqn, inputs, here, times) -> None:
  if here in walk.sites:
    walk.times[here] = times
    walk.reached[here] = all(inputs)
    return
  shapes = [v.aval.shape for v in eqn.invars]
  outputs = math.prod(eqn.outvars[0].aval.shape)
  if eqn.primitive.name == "dot_general":
    (contract, _), _ = eqn.params["dimension_numbers"]
    inner = math.prod(shapes[0][d] for d in contract)
  else:
    numbers = eqn.params["dimension_numbers"].rhs_spec
    inner = math.prod(shapes[1]) // shapes[1][numbers[0]]
  walk.products.append((times * outputs * inner, sum(inputs)))
