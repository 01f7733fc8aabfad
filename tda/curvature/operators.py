"""Products with an exact curvature in block coordinates, for many directions.

    matvec = operators.curvature(found, objective, params, data)
    matvec(blocks [Q, *stack, G, O, I]) -> the same

The model is linearised once and the linear part is vmapped over the directions,
so Q products cost one forward pass and Q times the linear part, as matrix
products. Only tracked blocks have directions. Nothing is damped or inverted
here; `damped` adds a damping.

Notation: N examples, Q directions.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp

from tda import blocks
from tda.blocks import Blocks, Trace
from tda.curvature import ggn
from tda.curvature.ggn import Matvec
from tda.likelihoods import Likelihood, Objective, PyTree, upcast

Array = jax.Array
Stochastic: TypeAlias = Callable[[Blocks, Array], Blocks]
"""(v, k) -> C_k v, with the k-th minibatch."""

KINDS = ("gauss_newton", "empirical")


def curvature(
  found: Trace,
  objective: Objective,
  params: PyTree,
  data: PyTree,
  *,
  kind: str = "gauss_newton",
  weights: Array | None = None,
  microbatch: int | None = None,
) -> Matvec:
  """v -> C v, the mean over examples.

  Args:
    found: trace of `objective.outputs`.
    objective: model and likelihood.
    params: trained parameters.
    data: pytree of arrays with leading axis N, in any sharding.
    kind: "gauss_newton": JᵀHJ, or "empirical": ∇ℓ ∇ℓᵀ at the data's labels.
    weights: [N] of the examples, as in `ggn.ggn_vp`.
    microbatch: examples linearised at a time, anew for each product; what is
      held grows with it and with Q. None: all, once.
  """
  if kind not in KINDS:
    raise ValueError(f"unknown curvature {kind!r}; choose of {list(KINDS)}")
  chosen = objective if kind == "gauss_newton" else _gradients(objective)
  widths = {
    name: (*block.stack, *block.shape) for name, block in found.blocks.items()
  }
  dtype = jnp.result_type(*map(upcast, jax.tree.leaves(params)))
  origin = {name: jnp.zeros(shape, dtype) for name, shape in widths.items()}

  def outputs(moved, example):
    shifted = jax.tree.map(
      lambda p, d: p + d.astype(p.dtype), params, blocks.to_tree(found, moved)
    )
    return chosen.outputs(shifted, example)

  moved = chosen._replace(outputs=outputs)
  product = ggn.ggn_vp(
    moved, origin, data, weights=weights, microbatch=microbatch
  )
  return jax.vmap(product)


def minibatches(
  found: Trace,
  objective: Objective,
  params: PyTree,
  data: PyTree,
  *,
  size: int,
  key: Array,
  of: int | None = None,
  kind: str = "gauss_newton",
) -> Stochastic:
  """(v, k) -> C_k v, of `size` examples drawn anew for each k.

  They are drawn of the first `of` rows, or of all: what is drawn does not
  depend on rows that fill up the data.
  """
  n = jax.tree.leaves(data)[0].shape[0] if of is None else of
  if not 1 <= size <= n:
    raise ValueError(f"minibatches of {size} of {n} examples")

  def product(v, k):
    chosen = jax.random.choice(
      jax.random.fold_in(key, k), n, (size,), replace=False
    )
    rows = jax.tree.map(lambda x: jnp.asarray(x)[chosen], data)
    return curvature(found, objective, params, rows, kind=kind)(v)

  return product


def damped(matvec: Matvec, damping: Mapping[str, Array] | float) -> Matvec:
  """v -> C v + δ v, with δ a number or by block [*stack, 1, 1, 1]."""

  def product(v: Blocks) -> Blocks:
    image = matvec(v)
    if isinstance(damping, Mapping):
      return {k: image[k] + damping[k][None] * v[k] for k in image}
    return {k: image[k] + damping * v[k] for k in image}

  return product


def _gradients(objective: Objective) -> Objective:
  """An objective whose Gauss-Newton matrix is the mean of ∇ℓ ∇ℓᵀ.

  Its output is the loss itself, and the Hessian of that is taken to be 1.
  """
  likelihood = Likelihood(
    loss=lambda outputs, target: outputs,
    sample=lambda key, outputs, target: target,
    hessian=lambda outputs, target, v: v,
    sqrt_hessian=lambda outputs, target, u: u,
  )
  return Objective(objective.loss, likelihood, lambda example: jnp.zeros(()))
