"""What Adam keeps of a run, read from the state of an optax chain.

Methods that follow the optimizer's metric need the moments of the gradients
that it averaged: the second alone (TrackStar), or both (LESS).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tda import blocks, likelihoods
from tda.blocks import Blocks, Trace

Array = jax.Array
PyTree = Any


class Moments(NamedTuple):
  """Running means of gradients and of their squares, not bias-corrected."""

  first: PyTree
  second: PyTree
  steps: Array  # [] how many gradients they have seen


def moments(opt_state: PyTree) -> Moments:
  """Adam's moments in an optax state, wherever they are in the chain.

  Raises:
    ValueError: none, several (as of `optax.multi_transform`), or moments that
      are not finite.
  """
  found = Moments(*_fields(opt_state, ("mu", "nu", "count")))
  check_second(found.second)
  if not _all(jnp.isfinite, found.first):
    raise ValueError("the optimizer's first moments are not all finite")
  return found


def second_moments(opt_state: PyTree, b2: float | None = None) -> PyTree:
  """Running means of squared gradients in an optax state, such as RMSProp's.

  Args:
    opt_state: of any chain of which one member keeps `nu` like the parameters.
    b2: their decay, if they started at zero and are to be corrected for it by
      1 / (1 − b2^count).

  Raises:
    ValueError: as of `moments`; no step was taken, if they are corrected.
  """
  if b2 is None:
    (second,) = _fields(opt_state, ("nu",))
  else:
    second, count = _fields(opt_state, ("nu", "count"))
    if int(count) < 1:
      raise ValueError(
        f"second moments after count={int(count)} steps: read them from a state"
        " after training"
      )
    second = jax.tree.map(lambda v: v / (1 - b2**count), second)
  check_second(second)
  return second


def check_second(second: PyTree) -> None:
  """Raises ValueError if second moments are negative or not finite."""
  for path, x in jax.tree_util.tree_leaves_with_path(second):
    if not _all(lambda v: jnp.isfinite(v) & (v >= 0), x):
      raise ValueError(
        f"second moments are finite and 0 or more; those of "
        f"{jax.tree_util.keystr(path)} are not"
      )


def in_blocks(found: Trace, tree: PyTree) -> Blocks:
  """Moments in block coordinates, in float32 or wider.

  Raises:
    ValueError: they have not the structure and shapes of the parameters.
  """
  shapes = [jnp.shape(x) for x in jax.tree.leaves(tree)]
  expected = [x.shape for x in found.leaves]
  if jax.tree.structure(tree) != found.treedef or shapes != expected:
    raise ValueError(
      f"moments are those of the parameters, {found.treedef} of shapes "
      f"{expected}; these are {jax.tree.structure(tree)} of {shapes}"
    )
  return blocks.to_blocks(found, jax.tree.map(likelihoods.upcast, tree))


def _all(holds, tree: PyTree) -> bool:
  return all(bool(holds(jnp.asarray(x)).all()) for x in jax.tree.leaves(tree))


def _fields(opt_state: PyTree, names: Sequence[str]) -> list[PyTree]:
  """The fields of the one member of the chain that has them all."""
  # Parameters may have such names too, but are not fields of a NamedTuple.
  is_field = lambda path, value: isinstance(
    path[-1], optax.tree_utils.NamedTupleKey
  )
  places = [
    {
      path[:-1]: value
      for path, value in optax.tree.get_all_with_path(opt_state, name, is_field)
    }
    for name in names
  ]
  complete = set.intersection(*map(set, places))
  if len(complete) != 1:
    raise ValueError(
      f"{len(complete)} members of the optimizer's state "
      f"{jax.tree.structure(opt_state)} keep {' and '.join(names)}, and one "
      "must: pass that of a chain with one Adam, or the like, for all "
      "parameters"
    )
  (place,) = complete
  return [kept[place] for kept in places]
