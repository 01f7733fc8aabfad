"""The proximal Bregman response: the truth that influence functions estimate.

Of parameters θ_s, trained to convergence or not, and weights w_i of N examples,

    F(θ; w) = (1/N) Σ_i [D_i(θ) + (w_i − 1) ℓ_i(θ)] + ½ Σ λ (θ − θ_s)²

D_i is the Bregman divergence of the loss of example i as a function of the
outputs h, from those of θ_s, so that θ_s is the minimum for w = 1:

    D_i(θ) = ℓ_i(h(θ)) − ℓ_i(h(θ_s)) − ⟨∇ℓ_i(h(θ_s)), h(θ) − h(θ_s)⟩

The ε of Grosse et al. 2023 (§2) on example m is w_m = 1 + Nε: ε = −1/N, w_m = 0
leaves it out. To first order in ε the minimum moves by −ε (G + λ)⁻¹ ∇ℓ_m with
the exact Gauss-Newton G at θ_s, which is what curvatures and solvers
approximate. The response is thus their ground truth, free of the noise of
retraining; what is of higher order in ε no linear method predicts.

`solver` minimises F as a function of w, which makes it a `train` of
`tda.evaluation.retraining`, whose bank runs many and resumes. `responses` is
that bank with one example changed at a time.

Notation: N training examples, n of them chosen, Q queries.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from tda import blocks, streams
from tda.blocks import Blocks, Trace
from tda.curvature import operators
from tda.evaluation import lds, retraining
from tda.inverse import iterative, krylov
from tda.likelihoods import Likelihood, Objective
from tda.trajectory import Train

Array = jax.Array
PyTree: TypeAlias = Any
Damping: TypeAlias = float | Array | Mapping[str, Array]
"""λ, absolute: of all parameters, or by block, broadcastable to its shape."""

PRODUCTS = 200  # the most for one direction
TOLERANCE, FLAT = 1e-3, 1e-5  # where a solve ends unless told; see `solver`
DECREASE = 1e-4  # of what the slope promises, for a step to be taken (Armijo)
SHORTEST = 1 / 64  # of a direction; if that does not lower F, a kink is there


class Solution(NamedTuple):
  """Where a minimisation ended.

  Attributes:
    params: θ.
    gradient: ‖∇F(θ)‖ / ‖∇F(θ_s)‖, 0 if θ_s is the minimum.
    fall: what the last few steps lowered F by, of all that it fell.
    gradients: of F that were taken, int32.
    products: with the curvature that were taken, int32.
  """

  params: PyTree
  gradient: Array
  fall: Array
  gradients: Array
  products: Array


class Responses(NamedTuple):
  """What leaving out each of the chosen examples does.

  Attributes:
    change: of the measurements, [n, Q]; positive: leaving it out raises m.
    gradient, fall: of `Solution`, the larger of an example's solves, [n].
    gradients, products: of `Solution`, the sum over them, [n].
  """

  change: np.ndarray
  gradient: np.ndarray
  fall: np.ndarray
  gradients: np.ndarray
  products: np.ndarray


class _State(NamedTuple):
  offset: Blocks  # θ − θ_s; its leaves are [1, ...], as are the next two's
  gradient: Blocks  # ∇F there
  direction: Blocks
  value: Array  # F there, [1] as is all below
  rate: Array  # of the direction, for the next trial
  fall: Array
  gradients: Array
  products: Array


class _Problem(NamedTuple):
  value: Callable[[Blocks], tuple[Array, Blocks]]  # offset -> F [1], ∇F
  descend: Callable[[Blocks], tuple[Blocks, Array]]  # ∇F -> direction, products
  place: Callable[[Blocks], PyTree]  # offset -> θ
  start: Blocks
  slack: Array  # rounding error of F


def divergence(likelihood: Likelihood) -> Callable[..., Array]:
  """The Bregman divergence of a loss: (outputs, at, target) -> scalar.

  For squared error ‖outputs − at‖² / (2 scale²); for the categorical the
  Kullback-Leibler divergence of softmax(outputs) from softmax(at).
  """

  def apply(outputs: Array, at: Array, target: PyTree) -> Array:
    value, slope = jax.value_and_grad(likelihood.loss)(at, target)
    linear = jnp.sum(slope * (outputs - at))
    return likelihood.loss(outputs, target) - value - linear

  return apply


def solver(
  found: Trace,
  objective: Objective,
  params: PyTree,
  data: PyTree,
  *,
  damping: Damping,
  precondition: Callable[[Blocks], Blocks] | None = None,
  tolerance: float = TOLERANCE,
  flat: float = FLAT,
  limit: int = 60,
  inner_tolerance: float = 1e-2,
) -> Train:
  """`solve(weights [N], key) -> Solution`, which draws nothing from the key.

  Simplified Newton: each direction is −(G_w + λ)⁻¹ ∇F by conjugate gradients,
  with the Gauss-Newton at θ_s of the weighted examples, halved until F falls
  as it should. F has that curvature at θ_s but for the model's own second
  derivatives, so that three gradients do unless the example's loss is large
  beside N λ. The minimum of a model with kinks (ReLU) can lie in one, where no
  gradient vanishes: there F stops falling.

  F, its gradients and the solution are in float64 where that is enabled,
  whatever the dtypes given, and that is where to run it: float32 measures
  responses of the size of 1/N with few digits. Products with the curvature are
  in float32, which the outer steps correct.

  Args:
    found: trace of `objective.outputs`; only its blocks move.
    objective: model and likelihood.
    params: θ_s.
    data: the N training examples.
    damping: λ.
    precondition: ≈ (G + λ)⁻¹ on blocks [Q, ...], a pytree such as
      `spectral.Response`.
    tolerance: of ‖∇F‖ / ‖∇F(θ_s)‖, at which a solve ends.
    flat: a solve also ends where steps lower F by no more than this much of
      its whole fall; relative to θ − θ_s the error is then about its root.
    limit: gradients of F allowed.
    inner_tolerance: of the residual of a direction.

  Raises:
    ValueError: a damping that is not positive or not by the trace's blocks.
  """
  n = streams.rows(data)
  arrays = _widened((params, data, _by_block(found, damping)))

  def solve(arrays, precondition, weights, key):
    del key
    if weights.shape != (n,):
      raise ValueError(f"weights must have shape ({n},), got {weights.shape}")
    inverse = functools.partial(
      krylov.conjugate_gradients,
      precondition=precondition,
      tolerance=inner_tolerance,
      check=False,
    )
    problem = _problem(found, objective, arrays, weights, inverse)
    value, gradient = problem.value(problem.start)
    # Where nothing changes, rounding would be all that is left of it.
    changed = jnp.any(weights != 1)[None]
    gradient = iterative.scaled(changed.astype(value.dtype), gradient)
    first_value, first = value, iterative.norm(gradient)

    def unfinished(state):
      steep = iterative.norm(state.gradient) > tolerance * first
      falling = (state.fall > flat) & (state.rate >= SHORTEST)
      return (steep & falling & (state.gradients < limit))[0]

    def step(state):
      new = _trial(problem, state)
      whole = first_value - new.value
      fall = iterative.relative(state.value - new.value, whole)
      # One step alone may be short for being across a kink.
      fall = jnp.maximum(fall, 0.1 * state.fall)
      return new._replace(fall=jnp.where(new.rate == 1, fall, state.fall))

    direction, products = problem.descend(gradient)
    one, count = jnp.ones_like(value), jnp.ones(1, jnp.int32)
    state = _State(
      problem.start, gradient, direction, value, one, one, count, products
    )
    state = jax.lax.while_loop(unfinished, step, state)
    size = iterative.relative(iterative.norm(state.gradient), first)
    return Solution(
      problem.place(state.offset),
      *(x[0] for x in (size, state.fall, state.gradients, state.products)),
    )

  return Partial(solve, arrays, _narrowed(precondition))


def responses(
  solve: Train,
  measure: Callable[[PyTree], Array],
  chosen: Array | np.ndarray,
  n: int,
  *,
  step: float = 1.0,
  central: bool = False,
  chunk: int | None = 1,
  **options: Any,
) -> Responses:
  """How the measurements respond to each chosen example's being left out.

  Args:
    solve: of `solver`.
    measure: m(params) -> [Q].
    chosen: indices of training examples, [n].
    n: N, of all training examples.
    step: the weight that is taken off an example, ε = −step / N; the change
      is divided by it.
    central: half the difference to adding it, with no term in ε²; two solves.
    chunk: solves at a time, all as long as the longest of them.
    options: further ones of `retraining.bank`: directory, label, workers.
  """
  chosen = np.asarray(chosen)
  _check_chosen(chosen, n, step)
  signs = (-1.0, 1.0) if central else (-1.0,)
  rows = np.arange(1, 1 + len(chosen))
  weights = np.ones((1 + len(signs) * len(chosen), n))
  for i, sign in enumerate(signs):
    weights[rows + i * len(chosen), chosen] += sign * step
  measure = measure if isinstance(measure, Partial) else Partial(measure)
  bank = retraining.bank(
    solve,
    Partial(_measured, measure),
    weights.astype(jnp.result_type(float)),
    jax.random.split(jax.random.key(0), 1),  # of which nothing is drawn
    chunk=chunk,
    **options,
  )
  bank = {name: x[:, 0] for name, x in bank.items()}
  value_SxnxQ = bank["value"][1:].reshape(len(signs), len(chosen), -1)
  other_nxQ = value_SxnxQ[1] if central else bank["value"][:1]
  change_nxQ = (value_SxnxQ[0] - other_nxQ) / (step * len(signs))
  by_sign = lambda name: bank[name][1:].reshape(len(signs), -1)
  return Responses(
    change_nxQ,
    by_sign("gradient").max(axis=0),
    by_sign("fall").max(axis=0),
    by_sign("gradients").sum(axis=0),
    by_sign("products").sum(axis=0),
  )


def correlations(
  scores: Array | np.ndarray, change: Array | np.ndarray
) -> dict[str, np.ndarray]:
  """{"pearson", "spearman"} [Q] of scores with changes, both [n, Q].

  A query whose scores or changes are all equal gets 0.
  """
  x = lds.finite(scores, "score", ("example", "query"))
  y = lds.finite(change, "change", ("example", "query"))
  spearman = lds.lds(y[:, None], x)  # says which shapes do not fit
  x, y = x - x.mean(0), y - y.mean(0)
  norm = np.sqrt((x**2).sum(0) * (y**2).sum(0))
  pearson = (x * y).sum(0) / np.where(norm > 0, norm, 1)
  return {"pearson": pearson, "spearman": spearman}


def _problem(found, objective, arrays, weights, inverse) -> _Problem:
  """F for given weights, and directions in which it falls."""
  params, data, damping = arrays
  bregman = divergence(objective.likelihood)
  at = jax.vmap(objective.outputs, (None, 0))(params, data)
  losses = jax.vmap(objective.loss, (None, 0))(params, data)

  def place(offset):
    moved = {name: v[0] for name, v in offset.items()}
    return jax.tree.map(jnp.add, params, blocks.to_tree(found, moved))

  def value(offset):
    theta = place(offset)

    def one(example, at, weight):
      outputs = objective.outputs(theta, example)
      target = objective.target(example)
      loss = objective.likelihood.loss(outputs, target)
      return bregman(outputs, at, target) + (weight - 1) * loss

    total = jnp.mean(jax.vmap(one)(data, at, weights))
    squares = jax.tree.map(lambda v, d: jnp.sum(d * v[0] ** 2), offset, damping)
    return total + sum(jax.tree.leaves(squares)) / 2

  def value_and_gradient(offset):
    total, gradient = jax.value_and_grad(value)(offset)
    return total[None], gradient

  # An example that is weighted below 0 would leave it indefinite.
  kept = jnp.maximum(weights, 0)
  operands = _narrowed((params, data))
  mean = operators.curvature(found, objective, *operands, weights=kept)
  share = _narrowed(jnp.mean(kept))  # the mean divides by the sum of weights
  whole = lambda v: jax.tree.map(lambda x: share * x, mean(v))
  method = inverse(operators.damped(whole, _narrowed(damping)))

  def descend(gradient):
    x, info = iterative.run(method, _narrowed(gradient), PRODUCTS)
    back = lambda v, g: -v.astype(g.dtype)
    return jax.tree.map(back, x, gradient), info.iterations

  start = jax.tree.map(
    lambda p: jnp.zeros_like(p)[None], blocks.to_blocks(found, params)
  )
  slack = 4 * jnp.finfo(losses.dtype).eps * jnp.mean(jnp.abs(losses))
  return _Problem(value_and_gradient, descend, place, start, slack)


def _trial(problem: _Problem, state: _State) -> _State:
  """A step if F falls enough, with a new direction; half the rate if not."""
  trial = iterative.plus(state.offset, state.rate, state.direction)
  value, gradient = problem.value(trial)
  slope = iterative.inner(state.gradient, state.direction)
  bound = state.value + DECREASE * state.rate * slope + problem.slack
  good = value <= bound
  nothing = jax.tree.map(jnp.zeros_like, gradient)  # is solved for at once
  direction, products = problem.descend(
    iterative.where(good, gradient, nothing)
  )
  return _State(
    iterative.where(good, trial, state.offset),
    iterative.where(good, gradient, state.gradient),
    iterative.where(good, direction, state.direction),
    jnp.where(good, value, state.value),
    jnp.where(good, 1, state.rate / 2),
    state.fall,
    state.gradients + 1,
    state.products + products,
  )


def _measured(measure: Partial, solution: Solution) -> dict[str, Array]:
  """What the bank keeps of a solution."""
  kept = solution._asdict()
  return {"value": measure(kept.pop("params")), **kept}


def _by_block(found: Trace, damping: Damping) -> Blocks:
  shapes = {k: (*b.stack, *b.shape) for k, b in found.blocks.items()}
  given = damping
  if not isinstance(given, Mapping):
    given = dict.fromkeys(shapes, jnp.asarray(damping))
  if set(given) != set(shapes):
    raise ValueError(f"damping of {sorted(given)} for blocks {sorted(shapes)}")
  lowest = min(float(jnp.min(given[k])) for k in shapes)
  if not lowest > 0:
    raise ValueError(f"damping={lowest}: flat directions need it positive")
  return {k: jnp.broadcast_to(given[k], shape) for k, shape in shapes.items()}


def _check_chosen(chosen: np.ndarray, n: int, step: float) -> None:
  if chosen.ndim != 1 or not len(chosen):
    raise ValueError(f"chosen examples must be [n], got {chosen.shape}")
  wrong = chosen[(chosen < 0) | (chosen >= n)]
  if len(wrong):
    raise ValueError(f"example {wrong[0]} of {n}: indices are 0 to {n - 1}")
  if not 0 < step <= 1:
    raise ValueError(
      f"step={step}: the weight taken off an example is in (0, 1]"
    )


def _widened(tree: PyTree) -> PyTree:
  """Floating leaves in the widest float enabled."""
  return _cast(tree, jnp.result_type(float))


def _narrowed(tree: PyTree) -> PyTree:
  return _cast(tree, jnp.float32)


def _cast(tree: PyTree, dtype: Any) -> PyTree:
  def one(x):
    x = jnp.asarray(x)
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

  return jax.tree.map(one, tree)
