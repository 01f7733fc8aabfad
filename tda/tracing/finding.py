"""Finding the uses of parameters in the jaxpr of a pure function."""

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from tda import sites
from tda.factors import accumulator
from tda.tracing import equations
from tda.tracing.uses import Bias, Origin, Path, Program, Use, expand

PyTree: TypeAlias = Any


def find(
  fn: Callable[[PyTree, PyTree], PyTree], params: PyTree, example: PyTree
) -> Program:
  """Every use of every parameter in `fn(params, example)`.

  Args:
    fn: pure function of one example.
    params: arrays or shapes.
    example: one example (no batch axis), arrays or shapes.
  """
  shape_of = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
  params, example = jax.tree.map(shape_of, (params, example))
  closed, outputs = jax.make_jaxpr(fn, return_shape=True)(params, example)
  jaxpr, consts = equations.opened(closed)
  leaves = jax.tree.leaves(params)
  incoming = [
    Origin(i, lambda leaf: leaf, leaf.shape) for i, leaf in enumerate(leaves)
  ]
  rest = [None] * (len(jaxpr.invars) - len(leaves))
  moves = [i >= len(leaves) for i in range(len(jaxpr.invars))]
  found = _Found([], {})
  with jax.ensure_compile_time_eval():
    outgoing = _find(jaxpr, [*incoming, *rest], moves, (), found)
  _generic_outputs(jaxpr, outgoing, (), found)
  return Program(
    jaxpr, tuple(consts), tuple(found.uses), found.lengths, outputs
  )


class _Found(NamedTuple):
  uses: list[Use]
  lengths: dict[Path, int]


class _OpenSite(NamedTuple):
  """A site whose output nobody has read yet, so that a bias may join it."""

  place: int  # in the list of uses
  shape: tuple[int, ...]  # of the site's output
  chain: Callable[[Any], Any]  # from the output to the variable in question


def _find(
  jaxpr: Any,
  incoming: Sequence[Origin | None],
  moves: Sequence[bool],
  path: Path,
  found: _Found,
) -> list[Origin | None]:
  """Records the uses in a jaxpr; returns the origins of its outputs.

  `moves` says which inputs depend on the example.
  """
  moving = {v for v, moved in zip(jaxpr.invars, moves, strict=True) if moved}
  origins: dict[Any, Origin] = {}
  for var, origin in zip(jaxpr.invars, incoming, strict=True):
    if origin is not None:
      origins[var] = origin
  readers = collections.Counter(
    v
    for atoms in (*(e.invars for e in jaxpr.eqns), jaxpr.outvars)
    for v in atoms
    if _is_var(v)
  )
  open_sites: dict[Any, _OpenSite] = {}
  for i, eqn in enumerate(jaxpr.eqns):
    here = (*path, i)
    moves = [_is_var(v) and v in moving for v in eqn.invars]
    moving.update(eqn.outvars if any(moves) else ())
    held = {
      k: origins[v]
      for k, v in enumerate(eqn.invars)
      if _is_var(v) and v in origins
    }
    name = eqn.primitive.name
    if equations.stops_gradient(eqn):
      continue
    if not held:
      source = equations.first(eqn)
      site = open_sites.get(source)
      if site and readers[source] == 1 and equations.permutes(eqn):
        chain = _then(site.chain, equations.rename_step(eqn, 0))
        open_sites[eqn.outvars[0]] = site._replace(chain=chain)
    elif equations.shifts(eqn):
      origins[eqn.outvars[0]] = next(iter(held.values()))
    elif name in equations.RENAMING and len(eqn.invars) == 1:
      for k, var in enumerate(eqn.outvars):
        origins[var] = _rename(held[0], eqn, k)
    elif name in equations.CALLS or name in equations.REMAT or name == "cond":
      outgoing = _find_call(eqn, held, moves, here, found)
      origins |= {v: o for v, o in zip(eqn.outvars, outgoing, strict=True) if o}
    elif name == "scan":
      _find_scan(eqn, held, moves, here, found)
    else:
      _find_use(eqn, held, moves, here, found, open_sites, readers)
  return [origins.get(v) if _is_var(v) else None for v in jaxpr.outvars]


def _find_call(eqn, held, moves, here, found) -> list[Origin | None]:
  if eqn.primitive.name == "cond":
    for k, branch in enumerate(eqn.params["branches"]):
      body, _ = equations.opened(branch)
      incoming = [held.get(j + 1) for j in range(len(body.invars))]
      inner = (*here, k)
      outgoing = _find(body, incoming, moves[1:], inner, found)
      _generic_outputs(body, outgoing, inner, found)
    return [None] * len(eqn.outvars)
  body, _ = equations.opened(equations.called(eqn))
  incoming = [held.get(j) for j in range(len(body.invars))]
  return _find(body, incoming, moves, here, found)


def _find_scan(eqn, held, moves, here, found) -> None:
  body, _ = equations.opened(eqn.params["jaxpr"])
  num_consts, num_carry = equations.scan_counts(eqn)
  found.lengths[here] = eqn.params["length"]
  incoming: list[Origin | None] = []
  for k, inner in enumerate(body.invars):
    origin = held.get(k)
    if origin is not None and k < num_consts:
      incoming.append(origin._replace(repeats=True))
    elif (
      origin is not None
      and k >= num_consts + num_carry
      and origin.expand is None
    ):
      incoming.append(
        origin._replace(scans=(*origin.scans, here), shape=inner.aval.shape)
      )
    else:
      if origin is not None:
        starts = k < num_consts + num_carry
        why = "starts a loop" if starts else "is broadcast into a loop"
        var = eqn.invars[k]
        found.uses.append(_generic(here, k, var, origin, why))
      incoming.append(None)
  loops = range(num_consts, num_consts + num_carry)
  moves = [any(moves) if k in loops else m for k, m in enumerate(moves)]
  outgoing = _find(body, incoming, moves, here, found)
  _generic_outputs(body, outgoing, here, found)


def _find_use(eqn, held, moves, here, found, open_sites, readers) -> None:
  name = eqn.primitive.name
  if len(held) > 1:
    for k, origin in held.items():
      var = eqn.invars[k]
      why = f"meets another parameter in {name}"
      found.uses.append(_generic(here, k, var, origin, why))
    return
  ((k, origin),) = held.items()
  form = _form(eqn, k, origin)
  if isinstance(form, str):
    found.uses.append(_generic(here, k, eqn.invars[k], origin, form))
    return
  partner = equations.partner(eqn, k)
  other, out = eqn.invars[partner], eqn.outvars[0]
  if form.kind == "vector" and not moves[partner]:
    why = f"meets only constants in {name}"
    found.uses.append(_generic(here, k, eqn.invars[k], origin, why))
    return
  use = Use(here, k, origin, form, _struct(other), _struct(out), partner)
  if name == "add" and _is_var(other) and other.aval.shape == out.aval.shape:
    site = open_sites.get(other)
    if site is not None and readers[other] == 1:
      bias = _bias(found.uses[site.place], use, site, out.aval.shape)
      if bias is not None:
        found.uses[site.place] = found.uses[site.place]._replace(bias=bias)
        return
  found.uses.append(use)
  if form.output is not None:
    open_sites[out] = _OpenSite(len(found.uses) - 1, out.aval.shape, _same)


def _form(eqn: Any, k: int, origin: Origin) -> sites.Form | str:
  """The equation's normal form for operand k, or why it has none."""
  name, params = eqn.primitive.name, eqn.params
  shapes = [v.aval.shape for v in eqn.invars]
  if name in ("add", "sub", "mul") or (name == "div" and k == 0):

    def transpose(x, dy):
      x, dy = (jnp.asarray(v, accumulator(dy.dtype)) for v in (x, dy))

      def apply(w):
        pair = [expand(origin, w), x]
        return equations.run(eqn, pair if k == 0 else pair[::-1])[0]

      return jax.vjp(apply, jnp.zeros(origin.shape, dy.dtype))[1](dy)[0]

    return sites.vector(math.prod(origin.shape), transpose)
  form: sites.Form | None = None
  if origin.expand is not None:
    return f"is broadcast into {name}"
  if name == "dot_general":
    form = sites.dot_general(params["dimension_numbers"], k, shapes)
  elif name == "conv_general_dilated" and k == 1:
    form = sites.convolution(params, shapes)
  elif name == "gather" and k == 0:
    form = sites.gather(params, shapes)
  elif name == "dynamic_slice" and k == 0:
    form = sites.dynamic_slice(params, shapes)
  return f"enters {name}" if form is None else form


def _generic(path: Path, k: int, var: Any, origin: Origin, reason: str) -> Use:
  def transpose(_, dy):
    dy = dy.astype(accumulator(dy.dtype))
    zeros = jnp.zeros(origin.shape, dy.dtype)
    return jax.vjp(lambda w: expand(origin, w), zeros)[1](dy)[0]

  form = sites.vector(math.prod(origin.shape), transpose)
  return Use(path, k, origin, form, None, _struct(var), reason=reason)


def _generic_outputs(jaxpr, outgoing, path, found) -> None:
  """Parameters that leave a loop, a branch or the function untouched."""
  here = (*path, len(jaxpr.eqns))
  for k, origin in enumerate(outgoing):
    if origin is not None:
      var, why = jaxpr.outvars[k], "is returned as it is"
      found.uses.append(_generic(here, k, var, origin, why))


def _bias(
  use: Use, alone: Use, site: _OpenSite, shape: tuple[int, ...]
) -> Bias | None:
  """Merges an addition that is the same for every position of a site.

  Indices are pushed through the same operations as the values: which entry of
  the bias meets which entry of the site's output follows from their places.
  """
  origin = alone.origin
  loops = lambda o: (o.scans, o.repeats)
  if use.bias is not None or loops(use.origin) != loops(origin):
    return None
  groups, outputs, _ = use.form.shape
  if not math.prod(origin.shape) == groups * outputs > 0:
    return None
  table = jnp.arange(groups * outputs).reshape(origin.shape)
  met = np.broadcast_to(np.asarray(expand(origin, table)), shape)
  if site.chain is not _same:  # else no copy is made of a large output
    size = math.prod(site.shape)
    places = np.asarray(site.chain(jnp.arange(size).reshape(site.shape)))
    back = np.empty(size, met.dtype)
    back[places.reshape(-1)] = met.reshape(-1)
    met = back.reshape(site.shape)
  assert use.form.output is not None
  met_GxTxO = use.form.output(met)
  order_GxO = met_GxTxO[:, 0]
  if (met_GxTxO != order_GxO[:, None]).any():
    return None
  if (np.sort(order_GxO, axis=None) != np.arange(groups * outputs)).any():
    return None
  return Bias(origin, lambda b: b.reshape(-1)[order_GxO][..., None], alone)


def _rename(origin: Origin, eqn: Any, k: int) -> Origin:
  """The origin of output k of an operation that only renames entries."""
  step = equations.rename_step(eqn, k)
  shape = eqn.outvars[k].aval.shape
  grows = math.prod(shape) > math.prod(eqn.invars[0].aval.shape)
  if grows or origin.expand is not None:
    return origin._replace(expand=_then(origin.expand or _same, step))
  for _ in origin.scans:
    step = jax.vmap(step)
  return origin._replace(pull=_then(origin.pull, step), shape=shape)


def _is_var(atom: Any) -> bool:
  return not isinstance(atom, core.Literal)


def _struct(var: Any) -> jax.ShapeDtypeStruct:
  """Shape and dtype of a variable or literal."""
  return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)


def _then(first: Callable, second: Callable) -> Callable:
  return lambda x: second(first(x))


def _same(x: Any) -> Any:
  return x
