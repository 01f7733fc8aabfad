"""Which uses concern the same entries of the parameters."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from tda.tracing.uses import Path, Program, Use, pull

Leaves: TypeAlias = Sequence[jax.ShapeDtypeStruct]
Part: TypeAlias = tuple[int, int]
"""A leaf and its part, by the first entry: no use reads two parts."""


class Group(NamedTuple):
  """The uses of one part of a leaf."""

  leaf: int
  part: int
  uses: tuple[Use, ...]
  aligned: bool  # whether they see the same entries at the same coordinates


def groups(program: Program, leaves: Leaves) -> list[Group]:
  """Groups of uses that share entries, in the order of their first use.

  The uses that are not aligned are the only group of their leaf.
  """
  parts = _parts(program, leaves)
  uses = _settle_biases(program.uses, parts, leaves)
  members: dict[Part, list[Use]] = collections.defaultdict(list)
  for use in sorted(uses, key=lambda use: use.path):
    members[parts[_key(use)]].append(use)
  return [
    Group(leaf, part, tuple(uses), _aligned(uses, leaves))
    for (leaf, part), uses in members.items()
  ]


def _key(use: Use) -> tuple[Path, int]:
  return use.path, use.operand


def _aligned(uses: Sequence[Use], leaves: Leaves) -> bool:
  """Whether every use sees the same entries at the same coordinates."""
  kinds = {
    (u.form.kind, u.form.shape, len(u.origin.scans), u.bias is None)
    for u in uses
  }
  if len(kinds) > 1:
    return False
  if len(uses) == 1:
    return True
  first, *rest = (_places(use, leaves) for use in uses)
  return all(np.array_equal(first, other) for other in rest)


def _places(use: Use, leaves: Leaves) -> np.ndarray:
  """Which entry of the leaf lies at each of a use's coordinates."""
  origins = [use.origin] if use.bias is None else [use.origin, use.bias.origin]
  tables = (leaves[origin.leaf].shape for origin in origins)
  return np.asarray(
    pull(use, [jnp.arange(math.prod(s)).reshape(s) for s in tables])
  )


def _parts(program: Program, leaves: Leaves) -> dict[tuple[Path, int], Part]:
  """The part of its leaf that each use reads, by path and operand.

  A merged bias counts as a use at the path of its addition.
  """
  by_leaf: dict[int, list[Use]] = collections.defaultdict(list)
  for use in program.uses:
    for one in (use, use.bias.alone) if use.bias else (use,):
      by_leaf[one.origin.leaf].append(one._replace(bias=None))
  parts = {}
  for leaf, members in by_leaf.items():
    labels = _overlapping(program, members, leaves[leaf].shape)
    together: dict[int, list[Use]] = collections.defaultdict(list)
    for use, label in zip(members, labels, strict=True):
      together[label].append(use)
    if not all(_aligned(uses, leaves) for uses in together.values()):
      labels = [0] * len(members)
    for use, label in zip(members, labels, strict=True):
      parts[_key(use)] = (leaf, label)
  return parts


def _overlapping(
  program: Program, uses: Sequence[Use], shape: tuple[int, ...]
) -> list[int]:
  """For each use of a leaf the first entry of its part."""
  size = math.prod(shape)
  lengths = lambda use: [program.lengths[path] for path in use.origin.scans]
  reads = lambda use: math.prod((*lengths(use), *use.origin.shape))
  if any(reads(use) == size for use in uses):
    return [0] * len(uses)
  table = jnp.arange(size).reshape(shape)
  owner = np.full(size, -1)
  labels, starts = list(range(len(uses))), []
  for i, use in enumerate(uses):
    entries = np.asarray(use.origin.pull(table)).reshape(-1)
    for other in set(np.unique(owner[entries])) - {-1}:
      labels = [i if label == labels[other] else label for label in labels]
    owner[entries] = i
    starts.append(int(entries.min()))
  return [
    min(s for s, other in zip(starts, labels, strict=True) if other == label)
    for label in labels
  ]


def _settle_biases(
  uses: Sequence[Use], parts: Mapping[tuple[Path, int], Part], leaves: Leaves
) -> list[Use]:
  """Keeps a bias merged only where weight and bias always come together."""
  members: dict[Part, list[Use]] = collections.defaultdict(list)
  partners: dict[Part, set[Any]] = collections.defaultdict(set)
  for use in uses:
    part = parts[_key(use)]
    members[part].append(use)
    other = parts[_key(use.bias.alone)] if use.bias else None
    partners[part].add(other)
    if other is not None:
      partners[other].add(part)
  settled = []
  for use in uses:
    if use.bias is None:
      settled.append(use)
      continue
    part, other = parts[_key(use)], parts[_key(use.bias.alone)]
    apart = part != other
    exclusive = partners[part] == {other} and partners[other] == {part}
    if apart and exclusive and _aligned(members[part], leaves):
      settled.append(use)
    else:
      settled += [use._replace(bias=None), use.bias.alone]
  return settled
