"""Exact unrolling: derivatives of what training ends in, by replaying it.

    derivative = unrolled.differentiate(init, stages, weights, key, measure)
    derivative.weights[s]   # ∂ measure_q / ∂ weight_n of stage s, [Q, N]

The derivative of any measurements of the final parameters in the weight of
every example, through every step of any differentiable optax chain, equal to
automatic differentiation of the run (Ilyas and Engstrom 2025, MAGIC; Engstrom
et al. 2025, REPLAY), for all measurements in one replay (`tda.replay`).

Memory. A stage of T steps is a tree of `levels` levels and arity
k ≈ T^(1/levels), of which levels · k states are kept at a time: 1 level keeps
all T, 2 keep 2 √T. The work is `levels` forward passes and a backward one. With
a directory the top level's states are on disk, and a run that was stopped is
taken up from the last that was written, on the way back as on the way forth.

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
import optax
import tqdm
from jax.sharding import Mesh

from tda import checkpoints as disk
from tda import meshes, replay, runs, smoothness
from tda.parts import belongs
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
  walked = replay.walks(init, stages, weights, key, mesh)
  trees = [replay.tree(orders, levels) for _, orders in walked]
  walks = [walk for walk, _ in walked]
  params = meshes.replicate(init(jax.random.split(key)[0]), mesh)
  shape = jax.eval_shape(measure, params).shape
  if len(shape) != 1:
    raise ValueError(
      f"measure(params) returns a vector of measurements, not shape {shape}"
    )
  for i, stage in enumerate(stages):
    smoothness.check(stage.optimizer, params, f"stage {i}")
  own = runs.record(init, stages, weights, key) if directory else {}
  kept = _Kept(directory, own | {"levels": levels})
  total = 2 * sum(len(tree) for tree in trees)
  with tqdm.tqdm(
    total=total, desc=label, unit="part", disable=not label
  ) as bar:
    end = _forth(walks, trees, params, kept, bar)
    value, after = _measured(measure, end, mesh)
    kept.measured(value)
    slopes: list[np.ndarray] = []
    for i in reversed(range(len(stages))):
      carry = _back(walks[i], trees[i], i, after, kept, bar)
      slopes.insert(0, meshes.fetch(carry[1])[: len(value)])
      _check_finite(slopes[0], i, stages[i].optimizer, params)
      after = jax.jit(Walk.leave)(walks[i], kept.begun[i].params, carry[0])
  ends = [meshes.fetch(x)[: len(value)] for x in carry[0]]
  start = replay.joined(ends, kept.begun[0], lambda x: None)
  return Derivative(meshes.fetch(value), slopes, start)


def _forth(
  walks: list[Walk],
  trees: list[Array],
  params: PyTree,
  kept: "_Kept",
  bar: tqdm.tqdm,
) -> PyTree:
  """The parameters that the run ends in; keeps the states on the way."""
  forward = jax.jit(Walk.forward)
  for i, (walk, tree) in enumerate(zip(walks, trees, strict=True)):
    state = jax.jit(Walk.enter)(walk, params)
    kept.begin(state)
    for j, part in enumerate(tree):
      ahead = functools.partial(forward, walk, state, part)
      state = kept.state(i, j + 1, ahead)
      bar.update()
    params = state.params
  return params


def _measured(
  measure: Measure, params: PyTree, mesh: Mesh | None
) -> tuple[Array, PyTree]:
  """Measurements, and cotangents of each alone, filled up to the mesh."""

  @jax.jit
  def run(params):
    value, pull = jax.vjp(measure, params)
    lead = len(value) + -len(value) % (mesh.shape["model"] if mesh else 1)
    each = jnp.eye(lead, len(value), dtype=value.dtype)
    return value, replay.spread(jax.vmap(pull)(each)[0], mesh, "model")

  value, after = run(params)
  if not bool(jnp.isfinite(value).all()):
    bad = int(np.argmin(np.isfinite(meshes.fetch(value))))
    raise ValueError(
      f"measurement {bad} is not finite at the end of the run: it diverged, and"
      " needs a smaller learning rate, or the measurement has no value there"
    )
  return value, after


def _back(
  walk: Walk,
  tree: Array,
  stage: int,
  after: PyTree,
  kept: "_Kept",
  bar: tqdm.tqdm,
) -> replay.Carry:
  """Cotangents of what a stage begins with, and slopes in its weights."""
  begun = kept.begun[stage]
  carry, left = kept.carry(stage, _blank(walk, begun, after), len(tree))
  bar.update(len(tree) - left)
  backward = jax.jit(Walk.backward)
  for j in reversed(range(left)):
    carry = backward(walk, kept.taken(stage, j), carry, tree[j])
    kept.save(stage, carry, j)
    bar.update()
  return carry


def _blank(walk: Walk, like: State, after: PyTree) -> replay.Carry:
  """Cotangents of a state of which only the parameters are measured."""
  leaves = jax.tree.leaves(after)
  zeros = lambda x: jnp.zeros((leaves[0].shape[0], *x.shape), x.dtype)
  others = [zeros(x) for x in replay.floats(like._replace(params=()))]
  return [*leaves, *others], zeros(walk.weights)


class _Kept:
  """States by stage and part, and the way back: on disk, or in memory."""

  def __init__(self, directory: str | None, record: dict[str, Any]):
    self.path = directory and pathlib.Path(directory)
    if self.path:
      belongs(self.path, record)
    self.begun: list[State] = []  # by stage
    self.states: dict[tuple[int, int], State] = {}

  def begin(self, state: State) -> None:
    """Takes the state that the next stage begins with."""
    self.begun.append(state)

  def state(self, stage: int, part: int, compute: Callable[[], State]) -> State:
    """A state that was kept, or one that is computed and kept."""
    folder = self._folder(f"state_{stage}_{part}")
    if folder and disk.exists(folder):
      return disk.load(folder, self.begun[stage])
    state = compute()
    if folder:
      disk.save(folder, state)
    else:
      self.states[stage, part] = state
    return state

  def taken(self, stage: int, part: int) -> State:
    """What a part of a stage begins with, for the last time."""
    # The way back needs no later state any more.
    self.states.pop((stage, part + 1), None)
    if part == 0:
      return self.begun[stage]
    folder = self._folder(f"state_{stage}_{part}")
    if folder:
      return disk.load(folder, self.begun[stage])
    return self.states[stage, part]

  def measured(self, value: Array) -> None:
    """Refuses the directory of other measurements."""
    folder = self._folder("value")
    if folder and disk.exists(folder):
      there = disk.load(folder, value)
      if not np.allclose(meshes.fetch(there), meshes.fetch(value), rtol=1e-3):
        raise ValueError(
          f"{self.path} holds the replay of other measurements: their values"
          " differ. Give this one another directory, or delete that one"
        )
    elif folder:
      disk.save(folder, value)

  def carry(
    self, stage: int, begun: replay.Carry, parts: int
  ) -> tuple[replay.Carry, int]:
    """How far the way back through a stage came, and the parts left of it."""
    folder = self._back(stage, begun)
    if not (folder and disk.exists(folder)):
      return begun, parts
    carry, left = disk.load(folder, (begun, jnp.int32(parts)))
    return carry, int(meshes.fetch(left))

  def save(self, stage: int, carry: replay.Carry, left: int) -> None:
    """Keeps how far the way back came."""
    if folder := self._back(stage, carry):
      disk.save(folder, (carry, jnp.int32(left)))

  def _back(self, stage: int, carry: replay.Carry) -> str | None:
    # Meshes that fill the measurements up differently go back on their own.
    return self._folder(f"back_{stage}_{len(carry[1])}")

  def _folder(self, name: str) -> str | None:
    return str(self.path / name) if self.path else None


def _check_finite(
  slopes: np.ndarray,
  stage: int,
  optimizer: optax.GradientTransformation,
  params: PyTree,
) -> None:
  bad = ~np.isfinite(slopes)
  if bad.any():
    raise ValueError(
      f"{int(bad.sum())} of {bad.size} derivatives in the weights of stage"
      f" {stage} are not finite. {smoothness.explained(optimizer, params)}"
    )
