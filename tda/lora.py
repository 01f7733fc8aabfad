"""Low-rank adapters on the matrices of any pure function of one example.

    adapt = lora.adapt(outputs, params, example, rank=8, select="*kernel")
    adapters = adapt.init(key)            # {block: Adapter}, B = 0
    adapt.outputs(params, adapters, example)    # y = W x + scale · B (A x)
    adapt.merged(params, adapters)              # params with W + scale · B A

The two forms are one function of the adapters (Hu et al. 2022, §4.1). In the
merged form both matrices meet in a product B A that no example enters, so that
capture can only form the gradient of W, of every example, and treat A and B as
generic. `outputs` rewrites the traced program instead: at each chosen site the
adapter is two more matrix products, which capture finds as ordinary sites, in
the groups, scans and remats of the site they adapt.

Adapters have the coordinates of `tda.blocks`, whatever the layout of the leaf:
A [*stack, G, r, I] and B [*stack, G, O, r], without the bias. A stacked layer
has an adapter for each layer, a grouped one (batched experts, attention heads
that share no input) one for each group; heads that are free axes of a kernel
are outputs, and share their A.

Notation: G groups, T positions, I inputs, O outputs, r rank.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp

from tda import blocks, factors
from tda.blocks import Block, Trace
from tda.likelihoods import Objective
from tda.tracing import evaluating
from tda.tracing.uses import Use

Array = jax.Array
PyTree: TypeAlias = Any

ADAPTERS = "adapters/*"
"""Pattern of the adapters among the parameters of `tuned`."""


class Adapter(NamedTuple):
  """The change scale · B A of one block's matrix."""

  a: Array  # [*stack, G, r, I]
  b: Array  # [*stack, G, O, r]


Adapters: TypeAlias = dict[str, Adapter]
"""Block name -> Adapter."""


class Lora(NamedTuple):
  """Adapters of a function as pure functions.

  Attributes:
    init: key -> adapters; A is normal of variance 1 / I, B zero.
    merged: (params, adapters) -> params, in their own dtypes.
    outputs: (params, adapters, example) -> what the function returns for the
      merged parameters, to rounding.
    scale: what B A is multiplied by.
    found: trace of the function; its blocks are those with an adapter.
  """

  init: Callable[[Array], Adapters]
  merged: Callable[[PyTree, Adapters], PyTree]
  outputs: Callable[[PyTree, Adapters, PyTree], PyTree]
  scale: float
  found: Trace


def adapt(
  fn: Callable[[PyTree, PyTree], PyTree],
  params: PyTree,
  example: PyTree,
  *,
  rank: int,
  alpha: float | None = None,
  stabilised: bool = True,
  select: str | Sequence[str] | None = None,
  dtype: jax.typing.DTypeLike | None = None,
) -> Lora:
  """Adapters of a pure function of ONE example.

  Args:
    fn: (params, example) -> anything; typically a model's outputs.
    params: pytree of floating arrays or shapes.
    example: one example without batch axis, arrays or shapes.
    rank: r. One above min(O, I) of a block spends parameters on nothing.
    alpha: the scale is alpha / √r if `stabilised` (Kalajdzievski 2023), so
      that the learning rate need not change with r, else alpha / r. 2 r unless
      given.
    stabilised: see `alpha`.
    select: patterns of the blocks to adapt, as in `blocks.trace`; None: all
      matrices and lookups.
    dtype: of the adapters; the weight's own unless given.

  Raises:
    ValueError: a rank below 1, a scale that is not finite, no matrix at all,
      or a selected block that is not a matrix used in one layout.
  """
  alpha = 2.0 * rank if alpha is None else alpha
  if rank < 1 or not math.isfinite(alpha):
    raise ValueError(
      f"rank={rank} and alpha={alpha}: a rank is 1 or more, alpha finite"
    )
  scale = alpha / (math.sqrt(rank) if stabilised else rank)
  found = _chosen(blocks.trace(fn, params, example, select=select), select)
  dtypes = dict(zip(found.names, (x.dtype for x in found.leaves), strict=True))

  def init(key: Array) -> Adapters:
    keys = jax.random.split(key, len(found.blocks))
    adapters = {}
    for one, (name, block) in zip(keys, found.blocks.items(), strict=True):
      kind = dtype or dtypes[block.leaves[0]]
      groups, outputs, inputs = block.uses[0].form.shape
      lead = (*block.stack, groups)
      a = jax.random.normal(one, (*lead, rank, inputs), kind)
      b = jnp.zeros((*lead, outputs, rank), kind)
      adapters[name] = Adapter(a / math.sqrt(inputs), b)
    return adapters

  return Lora(
    init,
    functools.partial(_merged, found, scale),
    functools.partial(_outputs, found, scale),
    scale,
    found,
  )


def tuned(adapt: Lora, objective: Objective) -> Objective:
  """The objective whose parameters are {"base": params, "adapters": adapters}.

  Args:
    adapt: adapters of `objective.outputs`.
    objective: model, likelihood and target.

  Trace it with `select=lora.ADAPTERS` to attribute to the adapters alone; the
  base is an argument, and not a constant of the compiled program.
  """

  def outputs(params: PyTree, example: PyTree) -> Array:
    return adapt.outputs(params["base"], params["adapters"], example)

  return Objective(outputs, objective.likelihood, objective.target)


def _chosen(found: Trace, select: str | Sequence[str] | None) -> Trace:
  """The trace with the blocks that can have an adapter."""
  problems = {}
  for name, block in found.blocks.items():
    if block.kind not in ("matrix", "lookup"):
      problems[name] = block.reason or "is not a matrix"
  if select is not None and problems:
    told = "; ".join(f"{name} {reason}" for name, reason in problems.items())
    raise ValueError(
      f"select={select!r} takes in blocks that can have no adapter: {told}. "
      "Select the others"
    )
  kept = {k: b for k, b in found.blocks.items() if k not in problems}
  if not kept:
    raise ValueError(
      f"there is no matrix to adapt among the blocks {list(found.blocks)}"
    )
  rest = {k: found.blocks[k] for k in problems}
  return found._replace(blocks=kept, omitted={**found.omitted, **rest})


def _merged(
  found: Trace, scale: float, params: PyTree, adapters: Adapters
) -> PyTree:
  _check(found, adapters)

  def change(block: Block, adapter: Adapter) -> Array:
    product = scale * jnp.matmul(adapter.b, adapter.a)
    pads = [(0, 0)] * (product.ndim - 1) + [(0, int(block.bias))]
    return jnp.pad(product, pads)

  changes = {k: change(b, adapters[k]) for k, b in found.blocks.items()}
  return jax.tree.map(
    lambda x, dx: (x + dx).astype(x.dtype),
    params,
    blocks.to_tree(found, changes),
  )


def _outputs(
  found: Trace,
  scale: float,
  params: PyTree,
  adapters: Adapters,
  example: PyTree,
) -> PyTree:
  _check(found, adapters)
  by_path: dict[Any, list[Use]] = {}
  names: dict[Any, str] = {}
  riders: dict[Any, set[str]] = {}
  for name, block in found.blocks.items():
    for use in block.uses:
      by_path.setdefault(use.path, []).append(use)
      names[use.path, use.operand] = name
      for scan in use.origin.scans:
        riders.setdefault(scan, set()).add(name)

  def visit(use, equation, w, x, adapters, lane):
    del lane
    y = equation(w, x)
    adapter = adapters[names[use.path, use.operand]]
    return y + (scale * _adapted(use, adapter, x, y)).astype(y.dtype)

  leaves, inputs = jax.tree.leaves(params), jax.tree.leaves(example)
  lane = evaluating.Lane(jnp.zeros(()), None)
  outputs = evaluating.evaluate(
    found.program, by_path, leaves, inputs, adapters, riders, lane, visit
  )
  return jax.tree.unflatten(jax.tree.structure(found.program.outputs), outputs)


def _adapted(use: Use, adapter: Adapter, x: Array, y: Array) -> Array:
  """B (A x) in the layout of the site's output y."""
  a_GxRxI, b_GxOxR = adapter
  parts = use.form.factors(x, jnp.zeros_like(y))
  if isinstance(parts, factors.Lookup):
    table_IxR = a_GxRxI[0].T
    hidden_GxTxR = table_IxR.at[parts.ids].get(
      mode="fill", fill_value=0, wrap_negative_indices=False
    )[None]
  else:
    assert isinstance(parts, factors.Outer)
    hidden_GxTxR = jnp.einsum("gti,gri->gtr", parts.a, a_GxRxI)
  out_GxTxO = jnp.einsum("gtr,gor->gto", hidden_GxTxR, b_GxOxR)

  def normal(dy: Array) -> Array:
    return cast(factors.Outer, use.form.factors(x, dy)).dy

  like = jax.ShapeDtypeStruct(y.shape, out_GxTxO.dtype)
  laid = jax.eval_shape(normal, like)
  (result,) = jax.linear_transpose(normal, like)(out_GxTxO.reshape(laid.shape))
  return result


def _check(found: Trace, adapters: Adapters) -> None:
  if adapters.keys() != found.blocks.keys():
    raise ValueError(
      f"adapters of {sorted(adapters)}, but this function has its on "
      f"{sorted(found.blocks)}"
    )
