"""Exact unrolling: derivatives of what training ends in, by replaying it.

    derivative = unrolled.differentiate(init, stages, weights, key, measure)
    derivative.weights[s]   # ∂ measure_q / ∂ weight_n of stage s, [Q, N]

The derivative of any measurements of the final parameters in the weight of
every example, through every step of any differentiable optax chain, equal to
automatic differentiation of the run (Ilyas and Engstrom 2025, MAGIC; Engstrom
et al. 2025, REPLAY), for all measurements in one replay (`tda.replay`).

Memory. A stage of T steps is a tree of `levels` levels and arity
k ≈ T^(1/levels), which keeps k states on each of them. The top level's are on
disk if there is a directory, and then a run that was stopped is taken up from
the last that was written, on the way back as on the way forth. On the device
are levels · k states, and the work is `levels` forward passes and a backward
one: 1 level keeps all T states, 2 keep 2 √T.

The run's state at the start is an input like any other: `start` has its
cotangent. A learning rate that the optimizer keeps in its state
(`optax.inject_hyperparams`) has its metagradient there.

Notation: Q measurements, N examples of a stage, T steps of a stage.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh

from tda import checkpoints as disk
from tda import meshes, records, replay, runs, smoothness
from tda.replay import Walk
from tda.runs import Stage
from tda.scores import CHANGE, Scores
from tda.trajectory import Init, State

Array = jax.Array
PyTree = Any
Measure = Callable[[PyTree], Array]  # params -> [Q]


class Derivative(NamedTuple):
  """What the measurements of a run depend on.

  Attributes:
    value: the measurements [Q].
    weights: by stage, derivatives in the weights of its examples [Q, N, ...].
    start: derivatives in the floating leaves of the state that the run begins
      with, leaves [Q, ...]; None in place of others.
  """

  value: np.ndarray
  weights: list[np.ndarray]
  start: State

  def scores(self, stage: int = 0) -> Scores:
    """The predicted change of each measurement when an example is left out."""
    slopes = self.weights[stage]
    slopes = slopes.reshape(*slopes.shape[:2], -1).sum(axis=2)
    return Scores(-slopes.T, "unrolled", CHANGE, 1)


def differentiate(
  init: Init,
  stages: Sequence[Stage],
  weights: Sequence[Array],
  key: Array,
  measure: Measure,
  *,
  levels: int = 2,
  mesh: Mesh | None = None,
  directory: str | None = None,
  label: str | None = None,
) -> Derivative:
  """Derivatives of measurements of a run's final parameters.

  Args:
    init: key -> params.
    stages: of the run, in order.
    weights: an array [N], or [N, ...] for a loss of several values, for each
      stage. In an example that is left out the derivative is 0.
    key: as of `runs.trainer`.
    measure: params -> [Q].
    levels: of the tree of states that are kept, 1 or more.
    mesh: whose "data" axis batches are spread over, and whose "model" axis
      measurements are.
    directory: keeps the top level of the tree, and how far the replay came.
    label: of the progress bar; None shows none.

  Raises:
    ValueError: levels below 1, weights of other lengths, a directory of another
      run, an optimizer of which a part has no derivative, by name, or
      derivatives that are not finite.
  """
  if levels < 1:
    raise ValueError(f"levels={levels}: a run is kept in 1 level or more")
  walked = replay.walks(init, [*stages], [*weights], key, mesh)
  trees = [replay.tree(orders, levels) for _, orders in walked]
  params = meshes.replicate(init(jax.random.split(key)[0]), mesh)
  for i, stage in enumerate(stages):
    smoothness.check(stage.optimizer, params, f"stage {i}")
  record = runs.record(init, stages, weights, key) | {"levels": levels}
  kept = _Kept(directory, record)
  total = 2 * sum(len(tree) for tree in trees)
  forward, backward = jax.jit(Walk.forward), jax.jit(Walk.backward)
  with tqdm.tqdm(
    total=total, desc=label, unit="part", disable=not label
  ) as bar:
    for i, (walk, _) in enumerate(walked):
      state = jax.jit(Walk.enter)(walk, params)
      kept.first(i, state)
      for j, part in enumerate(trees[i]):
        ahead = functools.partial(forward, walk, state, part)
        state = kept.state(i, j + 1, state, ahead)
        bar.update()
      params = state.params
    value, pull = jax.vjp(measure, params)
    kept.measured(value)
    after = _cotangents(value, pull, mesh)
    slopes: list[np.ndarray] = []
    for i, (walk, _) in reversed([*enumerate(walked)]):
      begun = kept.begun[i]
      blank = _begun(walk, begun, after)
      carry, left = kept.carry(i, blank, len(trees[i]))
      bar.update(len(trees[i]) - left)
      for j in reversed(range(left)):
        carry = backward(walk, kept.state(i, j, begun), carry, trees[i][j])
        kept.save(i, carry, j)
        bar.update()
      slopes.insert(0, meshes.fetch(carry[1])[: len(value)])
      after = jax.jit(Walk.leave)(walk, begun.params, carry[0])
  _check_finite(slopes, stages, params)
  ends = [meshes.fetch(x)[: len(value)] for x in carry[0]]
  start = replay.joined(ends, kept.begun[0], lambda x: None)
  return Derivative(meshes.fetch(value), slopes, start)


def _cotangents(value: Array, pull: Callable, mesh: Mesh | None) -> PyTree:
  """Of each measurement alone, their number filled up to the mesh's."""
  lead = value.shape[0]
  lead += -lead % (1 if mesh is None else mesh.shape["model"])
  each = jnp.eye(lead, value.shape[0], dtype=value.dtype)
  return jax.vmap(pull)(meshes.replicate(np.asarray(each), mesh))[0]


def _begun(walk: Walk, end: State, after: PyTree) -> replay.Carry:
  """What the way back through a stage begins with."""
  leaves = jax.tree.leaves(after)
  lead = leaves[0].shape[0]
  blank = lambda x: jnp.zeros((lead, *x.shape), x.dtype)
  others = [blank(x) for x in replay.floats(end._replace(params=()))]
  return [*leaves, *others], blank(walk.weights)


class _Kept:
  """States by stage and part, and the way back: on disk, or in memory."""

  def __init__(self, directory: str | None, record: dict[str, Any]):
    self.path = directory and pathlib.Path(directory)
    if self.path:
      records.belongs(self.path, record)
    self.begun: list[State] = []
    self.states: dict[tuple[int, int], State] = {}

  def first(self, stage: int, state: State) -> None:
    """The state that a stage begins with."""
    self.begun.append(state)
    self.states[stage, 0] = state

  def state(
    self, stage: int, part: int, like: State, compute: Callable | None = None
  ) -> State:
    """A state that was kept, or one that is computed and kept."""
    if (stage, part) in self.states:
      return self.states[stage, part]
    folder = self._folder(f"state_{stage}_{part}")
    if folder and disk.exists(folder):
      return disk.load(folder, like)
    assert compute is not None
    state = compute()
    if folder:
      disk.save(folder, state)
    else:
      self.states[stage, part] = state
    return state

  def measured(self, value: Array) -> None:
    """Refuses the directory of other measurements."""
    folder = self._folder("value")
    if folder and disk.exists(folder):
      there = disk.load(folder, value)
      if not np.allclose(there, value, rtol=1e-3):
        raise ValueError(
          f"{self.path} holds the replay of other measurements, or of another"
          " run: their values differ. Give this one another directory"
        )
    elif folder:
      disk.save(folder, value)

  def carry(
    self, stage: int, begun: replay.Carry, parts: int
  ) -> tuple[replay.Carry, int]:
    """How far the way back through a stage came, and the parts left of it."""
    folder = self._folder(f"back_{stage}")
    if not (folder and disk.exists(folder)):
      return begun, parts
    carry, left = disk.load(folder, (begun, jnp.int32(parts)))
    return carry, int(meshes.fetch(left))

  def save(self, stage: int, carry: replay.Carry, left: int) -> None:
    """Keeps how far the way back came."""
    if folder := self._folder(f"back_{stage}"):
      disk.save(folder, (carry, jnp.int32(left)))

  def _folder(self, name: str) -> str | None:
    return str(self.path / name) if self.path else None


def _check_finite(
  found: Sequence[np.ndarray], stages: Sequence[Stage], params: PyTree
) -> None:
  for i, slopes in enumerate(found):
    bad = ~np.isfinite(slopes)
    if bad.any():
      raise ValueError(
        f"{int(bad.sum())} of {bad.size} derivatives in the weights of stage"
        f" {i} are not finite. "
        + smoothness.explained(stages[i].optimizer, params)
      )
