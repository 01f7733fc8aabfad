"""Blocks: the matrix-shaped parts of the parameters that methods work on.

A block is one weight with its bias in the coordinates [*stack, G, O, I] of
`tda.sites`, `stack` being the scans it rides. Its uses (several for tied
weights) all contribute to the same gradient. `trace` finds the blocks of a
pure function; `to_blocks` and `to_tree` go between parameter-shaped pytrees
and block coordinates, and are each other's transpose.
"""

import collections
import contextlib
import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from tda.tracing import finding, sharing
from tda.tracing.uses import Program, Use, pull

Array = jax.Array
PyTree: TypeAlias = Any
Blocks: TypeAlias = dict[str, Array]
"""Block name -> [*stack, G, O, I]."""

VECTOR_LIMIT = 1024
"""Longer scales, lone biases and generic leaves keep a diagonal curvature."""


class Block(NamedTuple):
  """One weight, with its bias if it has one.

  Attributes:
    name: path of the weight.
    kind: "matrix", "lookup" (inputs are indices), "vector" (one column) or
      "diagonal" (no Kronecker structure: generic, long or irregularly tied).
    stack: lengths of the scans it rides.
    shape: (G, O, I), the bias included in I.
    bias: whether the last input is a bias.
    leaves: names of the parameters it covers.
    uses: the equations that use it.
    shared: whether one example can use it more than once, so that a nonlinear
      statistic needs the sum over uses first.
    aligned: whether all uses have these coordinates; if not, each use is
      mapped to the leaf by its own transpose.
    reason: why it is generic; empty for a site.
  """

  name: str
  kind: str
  stack: tuple[int, ...]
  shape: tuple[int, int, int]
  bias: bool
  leaves: tuple[str, ...]
  uses: tuple[Use, ...]
  shared: bool
  aligned: bool
  reason: str

  @property
  def size(self) -> int:
    """Number of parameters."""
    return math.prod(self.stack) * math.prod(self.shape)


class Trace(NamedTuple):
  """A function of (params, example) with its blocks.

  Attributes:
    program: the function's jaxpr and uses.
    blocks: those that are tracked, in the order of their first use.
    omitted: those that `select` left out.
    names: of all parameter leaves, in order.
    leaves: their shapes and dtypes.
    treedef: of the parameters.
    example: structure and shapes of one example.
  """

  program: Program
  blocks: Mapping[str, Block]
  omitted: Mapping[str, Block]
  names: tuple[str, ...]
  leaves: tuple[jax.ShapeDtypeStruct, ...]
  treedef: Any
  example: PyTree


def trace(
  fn: Callable[[PyTree, PyTree], PyTree],
  params: PyTree,
  example: PyTree,
  *,
  select: str | Sequence[str] | None = None,
  strict: bool = False,
) -> Trace:
  """Finds the blocks of a pure function of one example.

  Args:
    fn: (params, example) -> anything; typically a loss or a model's outputs.
    params: pytree of floating arrays or shapes.
    example: one example without batch axis, arrays or shapes.
    select: patterns (`fnmatch`, on names such as "params/Dense_0/kernel") of
      the blocks to track; None tracks all.
    strict: raise if a tracked parameter is generic or unused.

  Raises:
    ValueError: parameters that are not floating; a function that fails on one
      example; a pattern that matches nothing; under `strict`, the parameters
      no site covers and why.
  """
  paths, treedef = jax.tree_util.tree_flatten_with_path(params)
  names = tuple(
    jax.tree_util.keystr(path, simple=True, separator="/") or "params"
    for path, _ in paths
  )
  _check_floating(names, [leaf for _, leaf in paths])
  with on_one_example("the function", example):
    program = finding.find(fn, params, example)
  leaves = tuple(
    jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for _, x in paths
  )
  with jax.ensure_compile_time_eval():
    blocks = _assemble(program, names, leaves)
  patterns = _patterns(select, [block.name for block in blocks])
  kept = {b.name: b for b in blocks if _matches(b.name, patterns)}
  omitted = {b.name: b for b in blocks if b.name not in kept}
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), example
  )
  found = Trace(program, kept, omitted, names, leaves, treedef, shapes)
  if strict:
    _check_covered(found, patterns)
  return found


@contextlib.contextmanager
def on_one_example(name: str, example: PyTree) -> Iterator[None]:
  """Says of what fails inside that it was called with ONE example."""
  try:
    yield
  except Exception as error:
    raise ValueError(
      f"{name} failed on ONE example, of shapes "
      f"{jax.tree.map(jnp.shape, example)}: {error}\nIf it takes a batch, pass "
      "`lambda params, example: loss(params, jax.tree.map(lambda x: x[None], "
      "example))` instead, and have it return one number."
    ) from error


def to_blocks(found: Trace, tree: PyTree) -> Blocks:
  """Block coordinates of a parameter-shaped pytree."""
  leaves = dict(zip(found.names, jax.tree.leaves(tree), strict=True))
  return {
    name: _pull(block, [leaves[leaf] for leaf in block.leaves])
    for name, block in found.blocks.items()
  }


def to_tree(found: Trace, blocks: Blocks) -> PyTree:
  """The parameter-shaped pytree of block coordinates; zero where untracked.

  Its leaves have the dtype of the blocks.
  """
  dtype = jnp.result_type(*blocks.values())
  totals = {
    name: jnp.zeros(leaf.shape, dtype)
    for name, leaf in zip(found.names, found.leaves, strict=True)
  }
  shapes = dict(zip(found.names, found.leaves, strict=True))
  for name, block in found.blocks.items():
    like = [
      jax.ShapeDtypeStruct(shapes[leaf].shape, dtype) for leaf in block.leaves
    ]
    push = jax.linear_transpose(lambda x, b=block: _pull(b, x), like)
    (parts,) = push(blocks[name].astype(dtype))
    for leaf, part in zip(block.leaves, parts, strict=True):
      totals[leaf] = totals[leaf] + part
  return jax.tree.unflatten(found.treedef, list(totals.values()))


def leaf_gradient(found: Trace, block: Block, use: Use, grad: Array) -> Array:
  """A use's gradient [*stack of the use, G, O, I] in the block's coordinates.

  For blocks that are not aligned: sums to [1, entries of the leaf, 1].
  """
  shape = found.leaves[use.origin.leaf].shape
  like = jax.ShapeDtypeStruct(shape, grad.dtype)
  push = jax.linear_transpose(lambda leaf: pull(use, [leaf]), like)
  return push(grad)[0].reshape(block.shape)


def tap_stack(found: Trace, use: Use) -> tuple[int, ...]:
  """Lengths of the scans a use rides."""
  return tuple(found.program.lengths[path] for path in use.origin.scans)


def _pull(block: Block, leaves: Sequence[Array]) -> Array:
  if not block.aligned:
    return leaves[0].reshape(block.shape)
  return pull(block.uses[0], leaves)


# Assembling blocks from uses.


def _assemble(
  program: Program,
  names: Sequence[str],
  leaves: Sequence[jax.ShapeDtypeStruct],
) -> list[Block]:
  """One block per group of uses that share entries of a leaf."""
  groups = sharing.groups(program, leaves)
  parts: dict[int, list[int]] = collections.defaultdict(list)
  for group in groups:
    parts[group.leaf].append(group.part)
  blocks = []
  for group in groups:
    name = names[group.leaf]
    if len(parts[group.leaf]) > 1:
      name = f"{name}[{sorted(parts[group.leaf]).index(group.part)}]"
    blocks.append(_block(name, group, program, names, leaves[group.leaf]))
  return blocks


def _block(
  name: str,
  group: sharing.Group,
  program: Program,
  names: Sequence[str],
  leaf: jax.ShapeDtypeStruct,
) -> Block:
  uses, first = group.uses, group.uses[0]
  shared = len(uses) > 1 or first.origin.repeats
  reason = "; ".join(sorted({use.reason for use in uses if use.reason}))
  covered: tuple[str, ...] = (names[first.origin.leaf],)
  if not group.aligned:
    size = math.prod(leaf.shape)
    reason = reason or "is used in more than one layout"
    return Block(
      name, "diagonal", (), (1, size, 1), False, covered, uses, True, False,
      reason,
    )  # fmt: skip
  groups, outputs, inputs = first.form.shape
  bias = first.bias is not None
  if first.bias is not None:
    covered = (*covered, names[first.bias.origin.leaf])
    inputs += 1
  kind = first.form.kind
  if kind == "vector" and outputs > VECTOR_LIMIT:
    kind = "diagonal"
  stack = tuple(program.lengths[path] for path in first.origin.scans)
  return Block(
    name, kind, stack, (groups, outputs, inputs), bias, covered, uses, shared,
    True, reason,
  )  # fmt: skip


# Checks.


def _check_floating(names: Sequence[str], leaves: Sequence[Any]) -> None:
  for name, leaf in zip(names, leaves, strict=True):
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f"parameter {name!r} has dtype {dtype}; only floating parameters have "
        "gradients. Close over it, or move it out of `params`."
      )


def _patterns(
  select: str | Sequence[str] | None, names: Sequence[str]
) -> Sequence[str]:
  if not names:
    raise ValueError("the function has no gradient by any of its parameters")
  if select is None:
    return ["*"]
  patterns = [select] if isinstance(select, str) else select
  for pattern in patterns:
    if not any(_matches(name, [pattern]) for name in names):
      raise ValueError(
        f"select={pattern!r} matches none of the blocks {list(names)}"
      )
  return patterns


def _matches(name: str, patterns: Sequence[str]) -> bool:
  """By pattern or exactly: names of parts of a leaf contain brackets."""
  return any(name == p or fnmatch.fnmatchcase(name, p) for p in patterns)


def _check_covered(found: Trace, patterns: Sequence[str]) -> None:
  generic = [
    f"{block.name} {block.reason}"
    for block in found.blocks.values()
    if block.reason
  ]
  every = {**found.blocks, **found.omitted}
  used = {leaf for block in every.values() for leaf in block.leaves}
  generic += [
    f"{name} is never used"
    for name in found.names
    if name not in used and _matches(name, patterns)
  ]
  if generic:
    raise ValueError(
      "strict=True, but no site covers: " + "; ".join(generic) + ". Pass "
      "strict=False to treat them as generic, or `select` the others."
    )
