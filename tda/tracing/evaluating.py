"""Running a program with every use handed to a callback."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.extend import core

from tda.tracing import equations
from tda.tracing.uses import Path, Program, Use

Array = jax.Array


class Lane(NamedTuple):
  """The example that is running, one lane of the batch.

  Attributes:
    token: any scalar of the example, so that what is computed from it is known
      to differ from example to example.
    counts: 0 for padding and in the branch of a cond that is not taken, else
      1; None where it is always 1.
    segments: [T] which part of a sequence each position belongs to, 0: none;
      None where the example is one.
  """

  token: Array
  counts: Array | None
  segments: Array | None = None


Taps: TypeAlias = Mapping[Any, Any]
Visit: TypeAlias = Callable[
  [Use, Callable[[Array, Any], Array], Array, Any, Taps, Lane], Array
]
"""(use, equation(parameter, activation), parameter, activation, taps, lane)."""


def evaluate(
  program: Program,
  uses: Mapping[Path, Sequence[Use]],
  leaves: Sequence[Array],
  inputs: Sequence[Array],
  taps: Taps,
  riders: Mapping[Path, Collection[Any]],
  lane: Lane,
  visit: Visit,
) -> list[Array]:
  """Runs the program, handing each of `uses` to `visit`.

  Args:
    program: from `find`.
    uses: those to visit, by path.
    leaves: flattened parameters.
    inputs: the flattened example.
    taps: handed to `visit` after slicing by the scans they ride.
    riders: the keys of the taps stacked over a scan, by the scan's path.
    lane: of this example.
    visit: stands in for the use's equation.
  """
  prefixes = {path[:k] for path in uses for k in range(len(path))}
  walk = _Walk(uses, prefixes, riders, visit)
  args = [*leaves, *inputs]
  return _evaluate(walk, program.jaxpr, program.consts, args, (), taps, lane)


class _Walk(NamedTuple):
  uses: Mapping[Path, Sequence[Use]]
  prefixes: set[Path]  # of the equations that contain a use
  riders: Mapping[Path, Collection[Any]]
  visit: Visit


def _evaluate(walk, jaxpr, consts, args, path, taps, lane) -> list[Any]:
  values = dict(zip(jaxpr.constvars, consts, strict=True))
  values |= dict(zip(jaxpr.invars, args, strict=True))
  read = lambda v: v.val if isinstance(v, core.Literal) else values[v]
  for i, eqn in enumerate(jaxpr.eqns):
    here = (*path, i)
    inputs = [read(v) for v in eqn.invars]
    site = None
    for use in walk.uses.get(here, ()):
      if use.reason:
        _visit_generic(walk, use, inputs, taps, lane)
      else:
        site = use
    if site is not None:
      outputs = [_visit_site(walk, eqn, site, inputs, taps, lane)]
    elif here in walk.prefixes:
      outputs = _enter(walk, eqn, inputs, here, taps, lane)
    else:
      outputs = equations.run(eqn, inputs)
    values |= dict(zip(eqn.outvars, outputs, strict=True))
  outputs = [read(v) for v in jaxpr.outvars]
  for use in walk.uses.get((*path, len(jaxpr.eqns)), ()):
    _visit_generic(walk, use, outputs, taps, lane)
  return outputs


def _visit_generic(walk, use, values, taps, lane) -> None:
  """Replaces the parameter in `values` by one that is followed."""
  k = use.operand
  values[k] = walk.visit(use, lambda w, _: w, values[k], None, taps, lane)


def _visit_site(walk, eqn, use, inputs, taps, lane) -> Array:
  def equation(w, x):
    # A further operand is where a slice along a whole axis starts: at 0.
    given = {use.operand: w, use.partner: x}
    operands = [
      given[k] if k in given else jnp.zeros((), v.aval.dtype)
      for k, v in enumerate(eqn.invars)
    ]
    return equations.run(eqn, operands)[0]

  w, x = inputs[use.operand], inputs[use.partner]
  return walk.visit(use, equation, w, x, taps, lane)


def _enter(walk, eqn, inputs, here, taps, lane) -> list[Any]:
  """Evaluates an equation whose sub-jaxpr holds uses."""
  name, params = eqn.primitive.name, eqn.params
  if name == "scan":
    return _enter_scan(walk, eqn, inputs, here, taps, lane)
  if name == "cond":
    return _enter_cond(walk, eqn, inputs, here, taps, lane)
  body, consts = equations.opened(equations.called(eqn))

  def run(inputs, taps, lane):
    return _evaluate(walk, body, consts, inputs, here, taps, lane)

  if name in equations.REMAT:
    policy, prevent_cse = params["policy"], params["prevent_cse"]
    run = jax.checkpoint(run, policy=policy, prevent_cse=prevent_cse)
  return run(inputs, taps, lane)


def _enter_cond(walk, eqn, inputs, here, taps, lane) -> list[Any]:
  """Where examples disagree all branches run; the lane says which counts.

  A cond would then batch the taps too, and add their statistics up once for
  every example.
  """

  def branch(k):
    body, consts = equations.opened(eqn.params["branches"][k])

    def run(index, taps, lane, operands):
      taken = (index == k).astype(lane.token.dtype)
      counts = taken if lane.counts is None else taken * lane.counts
      inner = lane._replace(counts=counts)
      return _evaluate(walk, body, consts, operands, (*here, k), taps, inner)

    return run

  branches = [branch(k) for k in range(len(eqn.params["branches"]))]

  @custom_vmap
  def fork(index, *rest):
    return jax.lax.switch(index, branches, index, *rest)

  @fork.def_vmap
  def fork_batch(size, batched, index, taps, lane, operands):
    axes = jax.tree.map(lambda b: 0 if b else None, tuple(batched))
    every = [jax.vmap(run, axes, axis_size=size) for run in branches]
    if not batched[0]:
      outputs = jax.lax.switch(index, every, index, taps, lane, operands)
      return outputs, [True] * len(outputs)
    results = []
    for k, run in enumerate(every):
      mask = lambda x, b, taken=index == k: _followed(taken, x) if b else x
      masked = jax.tree.map(mask, operands, batched[-1])
      results.append(run(index, taps, lane, masked))
    outputs = [
      jax.lax.select_n(_wide(index, columns[0]), *columns)
      for columns in zip(*results, strict=True)
    ]
    return outputs, [True] * len(outputs)

  index, *operands = inputs
  return fork(index, taps, lane, operands)


def kept(lanes: Array, x: Array) -> Array:
  """x where lanes [B] are nonzero, else 0."""
  return jnp.where(_wide(lanes, x) != 0, x, jnp.zeros((), x.dtype))


def _followed(lanes: Array, x: Array) -> Array:
  """x, with a gradient only where lanes are true."""
  return jnp.where(_wide(lanes, x), x, jax.lax.stop_gradient(x))


def _wide(lanes: Array, x: Array) -> Array:
  return jnp.broadcast_to(lanes.reshape(-1, *[1] * (x.ndim - 1)), x.shape)


def _enter_scan(walk, eqn, inputs, here, taps, lane) -> list[Any]:
  body, consts = equations.opened(eqn.params["jaxpr"])
  num_consts, num_carry = equations.scan_counts(eqn)
  fixed, rest = inputs[:num_consts], inputs[num_consts:]
  carry, scanned = rest[:num_carry], rest[num_carry:]
  ridden = {key: taps[key] for key in walk.riders.get(here, ())}

  def step(carry, operands):
    scanned, ridden = operands
    args = [*fixed, *carry, *scanned]
    inner = {**taps, **ridden}
    outputs = _evaluate(walk, body, consts, args, here, inner, lane)
    return outputs[:num_carry], outputs[num_carry:]

  options = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
  carry, stacked = jax.lax.scan(step, carry, (scanned, ridden), **options)
  return [*carry, *stacked]
