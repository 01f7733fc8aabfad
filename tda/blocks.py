"""Blocks: the matrix-shaped parts of the parameters that methods work on.

A block is one weight with its bias in the coordinates [*stack, G, O, I] of
`tda.sites`, `stack` being the scans it rides. Its uses (several for tied
weights) all contribute to the same gradient. `trace` finds the blocks of a
pure function; `to_blocks` and `to_tree` go between parameter-shaped pytrees
and block coordinates, and are each other's transpose.
"""

import collections
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from tda.tracing import finding
from tda.tracing.uses import Origin, Path, Program, Use

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
    ValueError: parameters that are not floating; a pattern that matches
      nothing; under `strict`, the parameters no site covers and why.
  """
  paths, treedef = jax.tree_util.tree_flatten_with_path(params)
  names = tuple(
    jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths
  )
  _check_floating(names, [leaf for _, leaf in paths])
  program = finding.find(fn, params, example)
  leaves = tuple(
    jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for _, x in paths
  )
  with jax.ensure_compile_time_eval():
    blocks = _assemble(program, names, leaves)
  kept = {b.name: b for b in blocks if _selected(b.name, select)}
  omitted = {b.name: b for b in blocks if b.name not in kept}
  if not kept:
    raise ValueError(
      f"select={select!r} matches none of the blocks {[b.name for b in blocks]}"
    )
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), example
  )
  found = Trace(program, kept, omitted, names, leaves, treedef, shapes)
  if strict:
    _check_covered(found)
  return found


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
  push = jax.linear_transpose(lambda leaf: _pull_use(use, [leaf]), like)
  return push(grad)[0].reshape(block.shape)


def tap_stack(found: Trace, use: Use) -> tuple[int, ...]:
  """Lengths of the scans a use rides."""
  return tuple(found.program.lengths[path] for path in use.origin.scans)


def _pull(block: Block, leaves: Sequence[Array]) -> Array:
  if not block.aligned:
    return leaves[0].reshape(block.shape)
  return _pull_use(block.uses[0], leaves)


def _pull_use(use: Use, leaves: Sequence[Array]) -> Array:
  depth = len(use.origin.scans)
  matrix = _mapped(use.form.matrix, depth)(use.origin.pull(leaves[0]))
  if use.bias is None:
    return matrix
  column = _mapped(use.bias.column, depth)
  bias = column(use.bias.origin.pull(leaves[1]))
  return jnp.concatenate([matrix, bias], axis=-1)


def _mapped(fn: Callable, depth: int) -> Callable:
  for _ in range(depth):
    fn = jax.vmap(fn)
  return fn


# Assembling blocks from uses.


def _assemble(
  program: Program,
  names: Sequence[str],
  leaves: Sequence[jax.ShapeDtypeStruct],
) -> list[Block]:
  """Groups uses that share entries of a leaf; one block per group."""
  cells = _cells(program.uses, leaves)
  uses = _settle_biases(program.uses, cells)
  groups: dict[tuple[int, int], list[Use]] = collections.defaultdict(list)
  for use in sorted(uses, key=lambda use: use.path):
    groups[cells[use.path, use.operand]].append(use)
  parts = collections.Counter(leaf for leaf, _ in groups)
  blocks, seen = [], collections.Counter[int]()
  for (leaf, _), members in groups.items():
    name = names[leaf]
    if parts[leaf] > 1:
      name = f"{name}[{seen[leaf]}]"
      seen[leaf] += 1
    blocks.append(_block(name, members, program, names, leaves[leaf]))
  return blocks


def _block(
  name: str,
  uses: Sequence[Use],
  program: Program,
  names: Sequence[str],
  leaf: jax.ShapeDtypeStruct,
) -> Block:
  first = uses[0]
  shared = len(uses) > 1 or first.origin.repeats
  reason = "; ".join(sorted({use.reason for use in uses if use.reason}))
  covered: tuple[str, ...] = (names[first.origin.leaf],)
  if not _aligned(uses, leaf):
    size = math.prod(leaf.shape)
    reason = reason or "is used in more than one layout"
    return Block(
      name, "diagonal", (), (1, size, 1), False, covered, tuple(uses), True,
      False, reason,
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
    name, kind, stack, (groups, outputs, inputs), bias, covered, tuple(uses),
    shared, True, reason,
  )  # fmt: skip


def _aligned(uses: Sequence[Use], leaf: jax.ShapeDtypeStruct) -> bool:
  """Whether every use sees the same entries at the same coordinates."""
  if len(uses) == 1:
    return True
  first, *rest = (
    (u.form.kind, u.form.shape, len(u.origin.scans)) for u in uses
  )
  if any(kind != first for kind in rest):
    return False
  table = jnp.arange(math.prod(leaf.shape)).reshape(leaf.shape)
  alone = [use._replace(bias=None) for use in uses]
  places = [np.asarray(_pull_use(use, [table])) for use in alone]
  return all(np.array_equal(places[0], other) for other in places[1:])


def _cells(
  uses: Sequence[Use], leaves: Sequence[jax.ShapeDtypeStruct]
) -> dict[tuple[Path, int], tuple[int, int]]:
  """Which uses share entries: (path, operand) -> (leaf, part of the leaf).

  A merged bias counts as a use at the path of its addition.
  """
  by_leaf: dict[int, list[tuple[tuple[Path, int], Origin]]] = {}
  for use in uses:
    for one in (use, use.bias.alone) if use.bias else (use,):
      by_leaf.setdefault(one.origin.leaf, []).append(
        ((one.path, one.operand), one.origin)
      )
  cells: dict[tuple[Path, int], tuple[int, int]] = {}
  for leaf, members in by_leaf.items():
    if len(members) == 1:
      cells[members[0][0]] = (leaf, 0)
      continue
    shape = leaves[leaf].shape
    table = jnp.arange(math.prod(shape)).reshape(shape)
    owner = np.full(math.prod(shape), -1)
    merged = list(range(len(members)))
    for i, (_, origin) in enumerate(members):
      entries = np.asarray(origin.pull(table)).reshape(-1)
      for other in np.unique(owner[entries]):
        if other >= 0:
          merged = [i if m == merged[other] else m for m in merged]
      owner[entries] = i
    for (key, _), part in zip(members, merged, strict=True):
      cells[key] = (leaf, part)
  return cells


def _settle_biases(
  uses: Sequence[Use], cells: Mapping[tuple[Path, int], tuple[int, int]]
) -> list[Use]:
  """Keeps a bias merged only where weight and bias always come together."""
  partners: dict[tuple[int, int], set] = collections.defaultdict(set)
  key = lambda use: cells[use.path, use.operand]
  for use in uses:
    if use.bias is None:
      partners[key(use)].add(None)
    else:
      partners[key(use)].add(key(use.bias.alone))
      partners[key(use.bias.alone)].add(key(use))
  settled = []
  for use in uses:
    if use.bias is None:
      settled.append(use)
      continue
    alone = use.bias.alone
    if len(partners[key(use)]) == len(partners[key(alone)]) == 1:
      settled.append(use)
    else:
      settled += [use._replace(bias=None), alone]
  return settled


# Checks.


def _check_floating(names: Sequence[str], leaves: Sequence[Any]) -> None:
  for name, leaf in zip(names, leaves, strict=True):
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f"parameter {name!r} has dtype {dtype}; only floating parameters have "
        "gradients. Close over it, or move it out of `params`."
      )


def _selected(name: str, select: str | Sequence[str] | None) -> bool:
  patterns = [select] if isinstance(select, str) else select
  return patterns is None or any(fnmatch.fnmatch(name, p) for p in patterns)


def _check_covered(found: Trace) -> None:
  generic = [
    f"{block.name} {block.reason}"
    for block in found.blocks.values()
    if block.reason
  ]
  every = {**found.blocks, **found.omitted}
  used = {leaf for block in every.values() for leaf in block.leaves}
  generic += [
    f"{name} is never used" for name in found.names if name not in used
  ]
  if generic:
    raise ValueError(
      "strict=True, but no site covers: " + "; ".join(generic) + ". Pass "
      "strict=False to treat them as generic, or `select` the others."
    )
