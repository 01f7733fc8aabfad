"""A stage of a run, replayed from its end: states first, then cotangents.

A step s_{k+1} = h_k(s_k, w) is linearised once, and its transpose is applied to
the cotangents of all measurements together:

    A_k = A_{k+1} ∂h_k/∂s_k,    ∂m/∂w += A_{k+1} ∂h_k/∂w,    A_T = ∂m/∂s_T.

States are needed from the last to the first. Steps are grouped in a tree, its
end filled up with steps that do nothing: each level keeps the states that its
parts begin with, and replays what lies below it.

Over a mesh the examples of a batch are spread over the "data" axis and the
measurements over the "model" axis.

Notation: Q measurements, N examples of a stage, T steps, B slots of a batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tda import meshes, runs
from tda.runs import Stage
from tda.trajectory import Init, State, Trajectory

Array = jax.Array
PyTree = Any
Carry = tuple[list[Array], Array]  # cotangents [Q, ...], slopes [Q, N, ...]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("data", "weights"),
  meta_fields=("parts", "optimizer", "mesh"),
)
@dataclasses.dataclass(frozen=True)
class Walk:
  """A stage whose steps can be taken, and taken back."""

  parts: Trajectory
  optimizer: optax.GradientTransformation
  data: PyTree
  weights: Array  # [N, ...]
  mesh: Mesh | None

  def enter(self, params: PyTree) -> State:
    """The state that the stage begins with."""
    return State(params, self.optimizer.init(params))

  def leave(self, params: PyTree, cotangents: list[Array]) -> PyTree:
    """Cotangents of the state that a stage begins with, as of its params."""
    _, pull = jax.vjp(lambda p: floats(self.enter(p)), params)
    return jax.vmap(pull)(cotangents)[0]

  def forward(self, state: State, orders: Array) -> State:
    """The state after the steps of a part of the tree [..., B]."""
    flat = orders.reshape(-1, orders.shape[-1])
    return jax.lax.scan(lambda s, b: (self._plain(s, b), None), state, flat)[0]

  def backward(self, state: State, carry: Carry, orders: Array) -> Carry:
    """Back through the steps of a part of the tree [k, ..., k, B]."""
    if orders.ndim == 1:
      return self._transposed(state, carry, orders)

    def back(carry, kept):
      return self.backward(kept[0], carry, kept[1]), None

    _, states = jax.lax.scan(
      lambda s, part: (self.forward(s, part), s), state, orders
    )
    return jax.lax.scan(back, carry, (states, orders), reverse=True)[0]

  def _step(
    self, leaves: list[Array], rest: PyTree, weights_B: Array, batch: Array
  ) -> State:
    """A step as a function of what it can be differentiated in."""
    rows = jax.tree.map(lambda x: x[jnp.maximum(batch, 0)], self.data)
    local = jnp.where(batch >= 0, jnp.arange(batch.size), -1)
    rows, weights_B = spread((rows, weights_B), self.mesh, "data")
    return self.parts.step(joined(leaves, rest), rows, weights_B, local)

  def _plain(self, state: State, batch: Array) -> State:
    weights_B = self.weights[jnp.maximum(batch, 0)]
    return self._step(floats(state), state, weights_B, batch)

  def _transposed(self, state: State, carry: Carry, batch: Array) -> Carry:
    after, slopes = spread(carry, self.mesh, "model")
    index = jnp.maximum(batch, 0)
    _, pull = jax.vjp(
      lambda x, w: floats(self._step(x, state, w, batch)),
      floats(state),
      self.weights[index],
    )
    before, slopes_B = jax.vmap(pull)(after)
    # A step that does nothing is the identity, whatever its derivative is.
    before = [
      jnp.where(batch[0] >= 0, x, y) for x, y in zip(before, after, strict=True)
    ]
    filled = (batch >= 0).reshape(-1, *[1] * (slopes_B.ndim - 2))
    return before, slopes.at[:, index].add(jnp.where(filled, slopes_B, 0))


def spread(tree: PyTree, mesh: Mesh | None, axis: str) -> PyTree:
  """Inside jit: leading axes split over an axis of the mesh."""
  if mesh is None:
    return tree
  return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P(axis)))


def walks(
  init: Init,
  stages: Sequence[Stage],
  weights: Sequence[Array],
  key: Array,
  mesh: Mesh | None,
) -> list[tuple[Walk, Array]]:
  """Every stage, and the order of its batches [T, B]."""
  weights = runs.checked_weights(stages, weights)
  order_key = jax.random.split(key)[1]
  found = []
  for i, (stage, parts) in enumerate(
    zip(stages, runs.trajectories(init, stages), strict=True)
  ):
    if mesh is not None and stage.batch_size % mesh.shape["data"]:
      raise ValueError(
        f"batches of {stage.batch_size} in stage {i} cannot be spread over"
        f" {mesh.shape['data']} devices: take a multiple of that"
      )
    orders = runs.orders(parts, weights[i], runs.stage_key(order_key, i))
    data = jax.tree.map(jnp.asarray, stage.data)
    data, w, orders = meshes.replicate((data, weights[i], orders), mesh)
    found.append((Walk(parts, stage.optimizer, data, w, mesh), orders))
  return found


def tree(orders: Array, levels: int) -> Array:
  """The steps [T, B] as a tree [k', k, ..., k, B] of so many levels."""
  total, width = orders.shape
  arity = max(1, round(total ** (1 / levels)))
  while arity**levels < total:
    arity += 1
  below = arity ** (levels - 1)
  top = -(-total // below)
  fill = ((0, top * below - total), (0, 0))
  whole = jnp.pad(orders, fill, constant_values=-1)
  return whole.reshape(top, *[arity] * (levels - 1), width)


def floats(state: State) -> list[Array]:
  """What can be differentiated of a state, parameters first."""
  return [x for x in jax.tree.leaves(state) if _floating(x)]


def joined(
  leaves: list[Any], like: State, other: Callable = lambda x: x
) -> Any:
  """A state with its floating leaves replaced, and the others by `other`."""
  old, treedef = jax.tree.flatten(like)
  given = iter(leaves)
  new = [next(given) if _floating(x) else other(x) for x in old]
  return jax.tree.unflatten(treedef, new)


def _floating(x: Any) -> bool:
  return jnp.issubdtype(x.dtype, jnp.inexact)
