"""Exact unrolling: derivatives of what training ends in, by replaying it.

    derivative = unrolled.differentiate(init, stages, weights, key, measure)
    derivative.weights[s]   # ∂ measure_q / ∂ weight_n of stage s, [Q, N]

The derivative of any measurements of the final parameters in the weight of
every example, through every step of any differentiable optax chain, equal to
automatic differentiation of the run (Ilyas and Engstrom 2025, MAGIC; Engstrom
et al. 2025, REPLAY). A step s_{k+1} = h_k(s_k, w) is linearised once, and its
transpose is applied to the cotangents of all measurements together:

    A_k = A_{k+1} ∂h_k/∂s_k,    ∂m/∂w += A_{k+1} ∂h_k/∂w,    A_T = ∂m/∂s_T.

Memory. States are needed from the last to the first. Steps are grouped in a
tree of `levels` levels and equal arity k ≈ T^(1/levels), the last level padded
with steps that do nothing: a level keeps k states, and replays what lies below
it. Device memory is levels · k states, the work `levels` forward passes and a
backward one: 1 level keeps all T states, 2 keep 2 √T.

The run's state at the start is an input like any other: `start` has its
cotangent. A learning rate that the optimizer keeps in its state
(`optax.inject_hyperparams`) has its metagradient there.

Notation: Q measurements, N examples of a stage, T steps of a stage.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tda import runs
from tda.runs import Stage
from tda.scores import CHANGE, Scores
from tda.trajectory import Init, State, Trajectory

Array = jax.Array
PyTree = Any
Measure = Callable[[PyTree], Array]  # params -> [Q]


class Derivative(NamedTuple):
  """What the measurements of a run depend on.

  Attributes:
    value: the measurements [Q].
    weights: by stage, derivatives in the weights of its examples [Q, N].
    start: derivatives in the floating leaves of the state that the run begins
      with, leaves [Q, ...]; None in place of others.
  """

  value: Array
  weights: list[Array]
  start: State

  def scores(self, stage: int = 0) -> Scores:
    """The predicted change of each measurement when an example is left out."""
    values = -np.asarray(self.weights[stage]).T
    return Scores(values, "unrolled", CHANGE, 1)


def differentiate(
  init: Init,
  stages: Sequence[Stage],
  weights: Sequence[Array],
  key: Array,
  measure: Measure,
  *,
  levels: int = 2,
) -> Derivative:
  """Derivatives of measurements of a run's final parameters.

  Args:
    init: key -> params.
    stages: of the run, in order.
    weights: an array [N] for each stage. In an example of weight 0, which takes
      no part, the derivative is 0.
    key: as of `runs.trainer`.
    measure: params -> [Q].
    levels: of the tree of states that are kept, 1 or more.

  Raises:
    ValueError: levels below 1, weights of other lengths, or derivatives that
      are not finite.
  """
  if levels < 1:
    raise ValueError(f"levels={levels}: a run is kept in 1 level or more")
  walks = [*_walks(init, stages, weights, key)]
  begun, state = [], State(init(jax.random.split(key)[0]), ())
  for walk in walks:
    state = walk.enter(state.params)
    begun.append(state)
    state = jax.jit(_Walk.forward)(walk, state)
  value, pull = jax.vjp(measure, state.params)
  cotangents = jax.vmap(pull)(jnp.eye(value.shape[0], dtype=value.dtype))[0]
  found: list[Array] = []
  for i, (walk, state) in enumerate(zip(walks[::-1], begun[::-1], strict=True)):
    run = jax.jit(_Walk.backward, static_argnames="levels")
    after, slopes = run(walk, state, cotangents, levels=levels)
    found.insert(0, slopes)
    if i < len(walks) - 1:
      cotangents = jax.jit(_Walk.leave)(walk, state.params, after)
  first = _full(begun[0], after)
  _check_finite(found, walks)
  return Derivative(value, found, first)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("data", "weights", "orders"),
  meta_fields=("parts", "optimizer"),
)
@dataclasses.dataclass(frozen=True)
class _Walk:
  """A stage, with the order of its batches."""

  parts: Trajectory
  optimizer: optax.GradientTransformation
  data: PyTree
  weights: Array
  orders: Array  # [T, B]

  def enter(self, params: PyTree) -> State:
    """The state that the stage begins with."""
    return State(params, self.optimizer.init(params))

  def leave(self, params: PyTree, cotangents: list[Array]) -> PyTree:
    """Cotangents of the state that a stage begins with, as of its params."""
    _, pull = jax.vjp(lambda p: _floats(self.enter(p)), params)
    return jax.vmap(pull)(cotangents)[0]

  def step(
    self, floats: list[Array], rest: PyTree, weights_B: Array, batch: Array
  ) -> State:
    """A step as a function of what it can be differentiated in."""
    index = jnp.maximum(batch, 0)
    rows = jax.tree.map(lambda x: jnp.asarray(x)[index], self.data)
    local = jnp.where(batch >= 0, jnp.arange(batch.size), -1)
    state = _joined(floats, rest)
    return self.parts.step(state, rows, weights_B, local)

  def forward(self, state: State) -> State:
    return _scanned(self._plain, state, self.orders)

  def _plain(self, state: State, batch: Array) -> State:
    weights_B = self.weights[jnp.maximum(batch, 0)]
    return self.step(_floats(state), state, weights_B, batch)

  def backward(
    self, state: State, cotangents: PyTree, *, levels: int
  ) -> tuple[list[Array], Array]:
    """Cotangents [Q, ...] of the floats it begins with, and slopes [Q, N]."""
    end = jax.eval_shape(self.forward, state)
    lead = jax.tree.leaves(cotangents)[0].shape[0]
    after = [
      jnp.zeros((lead, *x.shape), x.dtype)
      for x in _floats(end._replace(params=()))
    ]
    after = [*jax.tree.leaves(cotangents), *after]
    total, width = self.orders.shape
    arity = max(2, math.ceil(total ** (1 / levels))) if total > 1 else 1
    while arity**levels < total:
      arity += 1
    filler = jnp.full((arity**levels - total, width), -1, self.orders.dtype)
    orders = jnp.concatenate([self.orders, filler])
    orders = orders.reshape(*[arity] * levels, width)
    slopes = jnp.zeros((lead, self.weights.size), self.weights.dtype)
    return self._back(state, (after, slopes), orders)

  def _back(self, state: State, carry: Any, orders: Array) -> Any:
    """Backwards through the steps of a part of the tree [k, ..., k, B]."""
    if orders.ndim == 1:
      return self._transposed(state, carry, orders)

    def forth(state, part):
      flat = part.reshape(-1, part.shape[-1])
      return _scanned(self._plain, state, flat), state

    def back(carry, kept):
      return self._back(kept[0], carry, kept[1]), None

    _, states = jax.lax.scan(forth, state, orders)
    return jax.lax.scan(back, carry, (states, orders), reverse=True)[0]

  def _transposed(self, state: State, carry: Any, batch: Array) -> Any:
    after, slopes = carry
    index = jnp.maximum(batch, 0)
    _, pull = jax.vjp(
      lambda x, w: _floats(self.step(x, state, w, batch)),
      _floats(state),
      self.weights[index],
    )
    before, slopes_B = jax.vmap(pull)(after)
    # A step that does nothing is the identity, whatever its derivative is.
    taken = batch[0] >= 0
    before = [
      jnp.where(taken, x, y) for x, y in zip(before, after, strict=True)
    ]
    slopes_B = jnp.where((batch >= 0)[None], slopes_B, 0)
    return before, slopes.at[:, index].add(slopes_B)


def _walks(init, stages, weights, key):
  runs.check_weights(stages, weights)
  order_key = jax.random.split(key)[1]
  parts = runs.trajectories(init, stages)
  for i, (stage, part) in enumerate(zip(stages, parts, strict=True)):
    w = jnp.asarray(weights[i])
    orders = runs.orders(part, w, runs.stage_key(order_key, i))
    data = jax.tree.map(jnp.asarray, stage.data)
    yield _Walk(part, stage.optimizer, data, w, orders)


def _scanned(step: Callable, state: State, orders: Array) -> State:
  return jax.lax.scan(lambda s, b: (step(s, b), None), state, orders)[0]


def _floating(x: Any) -> bool:
  return jnp.issubdtype(x.dtype, jnp.inexact)


def _floats(state: State) -> list[Array]:
  """What can be differentiated of a state, parameters first."""
  return [x for x in jax.tree.leaves(state) if _floating(x)]


def _joined(floats: list[Array], like: State) -> State:
  """The state with its floating leaves replaced."""
  leaves, treedef = jax.tree.flatten(like)
  given = iter(floats)
  return jax.tree.unflatten(
    treedef, [next(given) if _floating(x) else x for x in leaves]
  )


def _full(like: State, cotangents: list[Array]) -> State:
  leaves, treedef = jax.tree.flatten(like)
  given = iter(cotangents)
  return jax.tree.unflatten(
    treedef, [next(given) if _floating(x) else None for x in leaves]
  )


def _check_finite(found: list[Array], walks: list[_Walk]) -> None:
  for i, slopes in enumerate(found):
    bad = ~jnp.isfinite(slopes)
    if bad.any():
      raise ValueError(
        f"{int(bad.sum())} of {bad.size} derivatives in the weights of stage"
        f" {i} are not finite. Its optimizer, or the loss, has no derivative"
        " somewhere on the way: Adam's square root has none where a gradient is"
        " exactly 0, unless eps_root is above 0"
      )
