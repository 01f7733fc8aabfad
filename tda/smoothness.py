"""Whether what training ends in depends smoothly on the weights of its data.

Derivatives of a run say nothing where it has none (`check`), and little where
it bends within the change that they shall predict (`metasmoothness`).
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array
PyTree = Any


class _Part(NamedTuple):
  """One transform of a chain."""

  name: str
  update: Callable
  state: PyTree


def metasmoothness(
  train: Callable[[Array, Array], PyTree],
  weights: Array,
  key: Array,
  direction_key: Array,
  *,
  step: float = 0.1,
) -> Array:
  """How straight the parameters move as the weights of the data do.

  With θ_0, θ_1, θ_2 trained at w, w + h v and w + 2 h v, v of random normals,
  the mean of sign(θ_2 − θ_1) sign(θ_1 − θ_0) over entries, weighted by
  |θ_2 − θ_0| (Engstrom et al. 2025, definition 2). 1: every entry keeps its
  direction, and derivatives predict; 0: none.

  Args:
    train: (weights, key) -> params.
    weights: where, [N].
    key: of the run.
    direction_key: of v.
    step: h, in the units of the weights.
  """
  v = jax.random.normal(direction_key, weights.shape, weights.dtype)
  runs = [train(weights + k * step * v, key) for k in range(3)]
  flat = [
    jnp.concatenate([x.ravel() for x in jax.tree.leaves(params)])
    for params in runs
  ]
  first, second = flat[1] - flat[0], flat[2] - flat[1]
  weight = jnp.abs(flat[2] - flat[0])
  agreed = jnp.sign(first) * jnp.sign(second)
  return jnp.sum(weight * agreed) / jnp.sum(weight)


def check(
  optimizer: optax.GradientTransformation, params: PyTree, owner: str
) -> None:
  """Refuses an optimizer with a part that has no useful derivative.

  Each transform of the chain is differentiated at random gradients.

  Raises:
    ValueError: a part that cannot be differentiated in reverse, or whose result
      does not depend on the gradient to first order, by its name.
  """
  normal = functools.partial(optax.tree.random_like, jax.random.key(0))
  for name, dead, _ in _probed(optimizer, params, normal, owner):
    if dead:
      raise ValueError(
        f"{name} in the optimizer of {owner} has no derivative: its updates do"
        " not change with small changes of the gradient. Take a smooth one in"
        " its place"
      )


def explained(optimizer: optax.GradientTransformation, params: PyTree) -> str:
  """Which part of an optimizer has no derivative where gradients are 0."""
  zeros = functools.partial(jax.tree.map, jnp.zeros_like)
  probed = _probed(optimizer, params, zeros, "the run")
  wrong = [name for name, _, finite in probed if not finite]
  if not wrong:
    return (
      "The loss or its gradient has no derivative somewhere on the way, or the"
      " derivatives overflow: take a smaller learning rate"
    )
  return (
    f"{', '.join(wrong)} has no derivative where a gradient is exactly 0, as of"
    " inputs that are always 0: for Adam give an eps_root above 0"
  )


def _probed(
  optimizer: optax.GradientTransformation,
  params: PyTree,
  gradient: Callable[[PyTree], PyTree],
  owner: str,
) -> list[tuple[str, bool, bool]]:
  """Of each part: its name, and whether its derivative is dead, and finite.

  Dead is one of 0 where the update is not: at the rate 0 that a schedule may
  begin with both are.
  """
  names: list[str] = []

  def probed(part, params):
    update = lambda g: part.update(g, part.state, params)[0]
    try:
      value, pull = jax.vjp(update, gradient(params))
      slopes = pull(optax.tree.random_like(jax.random.key(1), value))[0]
    except (ValueError, TypeError, NotImplementedError) as error:
      raise ValueError(
        f"{part.name} in the optimizer of {owner} cannot be differentiated in"
        f" reverse: {error}"
      ) from error
    some = lambda tree: jnp.stack(
      [(x != 0).any() for x in jax.tree.leaves(tree)]
    ).any()
    finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(slopes)])
    return some(value) & ~some(slopes), finite.all()

  @jax.jit
  def run(params):
    parts = [*_parts(optimizer, params)]
    names.extend(part.name for part in parts)
    return [probed(part, params) for part in parts]

  flags = run(params)
  return [
    (name, bool(dead), bool(finite))
    for name, (dead, finite) in zip(names, flags, strict=True)
  ]


def _parts(
  optimizer: optax.GradientTransformation, params: PyTree
) -> Iterator[_Part]:
  """The transforms that an optimizer is a chain of; it alone if it is none."""
  yield from _taken_apart(optimizer.update, optimizer.init(params))


def _taken_apart(update: Callable, state: PyTree) -> Iterator[_Part]:
  name = getattr(update, "__qualname__", repr(update)).partition(".")[0]
  known = getattr(update, "__module__", "").startswith("optax.")
  if known and name in ("chain", "with_extra_args_support"):
    inner = inspect.getclosurevars(update).nonlocals
    if "update_fns" in inner:
      for one, own in zip(inner["update_fns"], state, strict=True):
        yield from _taken_apart(one, own)
      return
    if "tx" in inner:
      yield from _taken_apart(inner["tx"].update, state)
      return
  yield _Part(name, update, state)
