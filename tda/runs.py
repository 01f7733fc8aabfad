"""Training runs of one or several stages, and their states on the way.

A run is a list of stages, each with its data, loss, optimizer and epochs; a
stage starts from the parameters that the one before it ended with, and a new
optimizer state. `trainer` is the run as a pure function of the weights of its
examples; `checkpoints` walks it and keeps the states at chosen steps, with what
its optimizer applied until then. One stage is exactly `trajectory.trainer`.

The applied rate. Methods that approximate training need Σ η over a part of the
run, momentum included, as it was and not as a config says. It is measured: the
run is told that every gradient were g + ε d, with d of random signs, and what
that moves the parameters by, curvature left aside, is −ε c d for an optimizer
that scales gradients. c grows by η / (1 − m) a step once momentum m has built
up. An optimizer that scales entries differently, such as Adam, moves each by
a multiple of its own: `Checkpoint.rates` has them, and `spread` says how much
they differ. An entry whose update has no derivative, as Adam's where gradients
have always been 0, is taken not to move.

Notation: N examples of a stage, S steps, B slots of a batch.
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

from tda import checkpoints as disk
from tda import records, trajectory
from tda.parts import belongs
from tda.trajectory import Init, Loss, State, Trajectory

Array = jax.Array
PyTree = Any
LAST = 2**32 - 1  # epochs are folded into keys from 0, stages from here


class Stage(NamedTuple):
  """A part of a run with data and an optimizer of its own.

  Attributes:
    loss: loss(params, example) -> scalar of one row of the data.
    data: pytree of arrays with N rows.
    optimizer: any optax transformation that needs no extra arguments.
    epochs: passes over the data.
    batch_size: examples of a step.
    size: the most examples that are ever kept; N unless given.
    masked: an example of weight 0 keeps its place, as `trajectory` says.
    microbatch: examples whose gradient is computed at a time; all of a batch
      unless given.
  """

  loss: Loss
  data: PyTree
  optimizer: optax.GradientTransformation
  epochs: int
  batch_size: int
  size: int | None = None
  masked: bool = False
  microbatch: int | None = None


class Checkpoint(NamedTuple):
  """A run after some of its steps.

  Attributes:
    step: how many steps of the run were taken.
    stage: the stage that the last of them belongs to.
    params: the parameters then.
    opt_state: the optimizer's state then.
    rates: c of the steps since the stage began, as the module defines it, of
      every entry of the parameters.
    rate: its mean.
    spread: its standard deviation relative to the mean; 0 where the optimizer
      scales gradients.
  """

  step: int
  stage: int
  params: PyTree
  opt_state: PyTree
  rates: PyTree
  rate: float
  spread: float


class _Walk(NamedTuple):
  """A state, and how it and the parameters move with ε."""

  state: State
  opt_tangent: list[Array]  # of the floating leaves of the optimizer's state
  moved: PyTree


def lengths(stages: Sequence[Stage]) -> list[int]:
  """Steps of each stage of a run over all of its examples."""
  return [
    trajectory.steps(s.size or _rows(s), s.batch_size, s.epochs) for s in stages
  ]


def trainer(
  init: Init, stages: Sequence[Stage]
) -> Callable[[Sequence[Array], Array], PyTree]:
  """train(weights, key) -> params: the whole run as a pure function.

  Args:
    init: key -> params.
    stages: of the run, in order.

  Returns:
    train; `weights` has an array [N] for each stage. The initialisation and the
    first stage's order are those of `trajectory.trainer` for the same key, as
    are the NaN parameters where a stage keeps more examples than its size.
  """
  made = trajectories(init, stages)

  def train(weights, key):
    check_weights(stages, weights)
    init_key, order_key = jax.random.split(key)
    params = init(init_key)
    fits = jnp.bool_(True)
    for i, (stage, part) in enumerate(zip(stages, made, strict=True)):
      state = State(params, stage.optimizer.init(params))
      data = jax.tree.map(jnp.asarray, stage.data)
      w = trajectory.as_weights(weights[i])
      key = stage_key(order_key, i)
      params = trajectory.through(part, state, data, w, key).params
      fits &= _fits(stage, w)
    return jax.tree.map(lambda p: jnp.where(fits, p, jnp.nan), params)

  return train


def checkpoints(
  init: Init,
  stages: Sequence[Stage],
  weights: Sequence[Array],
  key: Array,
  at: Sequence[int],
  *,
  directory: str | None = None,
  label: str | None = None,
) -> list[Checkpoint]:
  """The run's states after chosen numbers of steps.

  Args:
    init: key -> params.
    stages: of the run, in order.
    weights: an array [N] for each stage.
    key: as of `trainer`.
    at: ascending numbers of steps, of the whole run, from 1 on.
    directory: keeps each checkpoint; a run that was stopped is taken up from
      the last of them.
    label: of the progress bar; None shows none.

  Raises:
    ValueError: steps that the run does not have, or a directory of another run.
  """
  made, ends = trajectories(init, stages), np.cumsum(lengths(stages))
  weights = checked_weights(stages, weights)
  if not at or list(at) != sorted({*at}) or at[0] < 1 or at[-1] > ends[-1]:
    raise ValueError(
      f"checkpoints at {list(at)}: they are ascending steps of 1 to {ends[-1]}"
    )
  init_key, order_key = jax.random.split(key)
  walk = _begun(made[0].start(init_key))
  found: list[Checkpoint] = []
  own = record(init, stages, weights, key) if directory else {}
  folders = _Folders(directory, own)
  with tqdm.tqdm(
    total=at[-1], desc=label, unit="step", disable=not label
  ) as bar:
    begin = 0
    for i, (stage, parts) in enumerate(zip(stages, made, strict=True)):
      if i:
        params = walk.state.params
        walk = _begun(State(params, stage.optimizer.init(params)))
      data, first = jax.tree.map(jnp.asarray, stage.data), begin
      advance = jax.jit(functools.partial(_advance, parts, stage.optimizer))
      order = orders(parts, weights[i], stage_key(order_key, i))
      stops = [k for k in at if first < k <= ends[i]]
      for stop in dict.fromkeys([*stops, int(ends[i])]):
        if begin >= at[-1]:
          break
        kept = folders.load(stop, walk)
        if kept is None:
          args = data, weights[i], order
          kept = advance(walk, *args, begin - first, stop - first)
          folders.save(stop, kept)
        walk, begin = kept, stop
        bar.update(stop - bar.n)
        if stop in at:
          found.append(_checkpoint(stop, i, walk))
  return found


def trajectories(init: Init, stages: Sequence[Stage]) -> list[Trajectory]:
  """The start, batches and step of every stage."""
  if not stages:
    raise ValueError("a run needs one stage or more")
  return [
    trajectory.trajectory(
      stage.loss,
      init,
      stage.optimizer,
      _rows(stage),
      epochs=stage.epochs,
      batch_size=stage.batch_size,
      size=stage.size,
      masked=stage.masked,
      microbatch=stage.microbatch,
    )
    for stage in stages
  ]


def _rows(stage: Stage) -> int:
  return trajectory.rows(stage.data)


def stage_key(order_key: Array, stage: int) -> Array:
  """The first stage's is that of a run without others."""
  return jax.random.fold_in(order_key, LAST - stage) if stage else order_key


def orders(parts: Trajectory, weights: Array, key: Array) -> Array:
  """All batches of a stage [S, B]."""
  epochs = jnp.arange(parts.epochs)
  found = jax.lax.map(lambda i: parts.batches(weights, key, i), epochs)
  return found.reshape(-1, found.shape[-1])


def _begun(state: State) -> _Walk:
  zeros = jax.tree.map(jnp.zeros_like, state.params)
  return _Walk(state, _floating(state.opt_state), zeros)


def _floating(opt_state: PyTree) -> list[Array]:
  return [
    jnp.zeros_like(x)
    for x in jax.tree.leaves(opt_state)
    if jnp.issubdtype(x.dtype, jnp.inexact)
  ]


def _advance(
  parts: Trajectory,
  optimizer: optax.GradientTransformation,
  walk: _Walk,
  data: PyTree,
  weights: Array,
  orders: Array,
  begin: Array,
  end: Array,
) -> _Walk:
  """The walk after the steps from begin to end of a stage."""

  def body(k, walk):
    state, batch = walk.state, orders[k]
    grads = parts.gradient(state.params, data, weights, batch)
    leaves, treedef = jax.tree.flatten(state.opt_state)
    given = iter(walk.opt_tangent)
    tangents = [
      next(given)
      if jnp.issubdtype(x.dtype, jnp.inexact)
      else np.zeros(x.shape, jax.dtypes.float0)
      for x in leaves
    ]
    (updates, opt_state), (pushed, tangent) = jax.jvp(
      lambda g, s: optimizer.update(g, s, state.params),
      (grads, state.opt_state),
      (_signs(grads), jax.tree.unflatten(treedef, tangents)),
    )
    following = _Walk(
      State(optax.apply_updates(state.params, updates), opt_state),
      [x for x in jax.tree.leaves(tangent) if x.dtype != jax.dtypes.float0],
      jax.tree.map(_added, walk.moved, pushed),
    )
    keep = batch[0] >= 0
    return jax.tree.map(
      lambda new, old: jnp.where(keep, new, old), following, walk
    )

  return jax.lax.fori_loop(begin, end, body, walk)


def _added(moved: Array, pushed: Array) -> Array:
  return moved + jnp.where(jnp.isfinite(pushed), pushed, 0)


def _signs(like: PyTree) -> PyTree:
  """d: +1 and −1 at random."""
  return optax.tree.random_like(
    jax.random.key(0), like, sampler=jax.random.rademacher
  )


def _checkpoint(step: int, stage: int, walk: _Walk) -> Checkpoint:
  signs = _signs(walk.state.params)
  rates = jax.tree.map(lambda m, d: -m * d, walk.moved, signs)
  each = jnp.concatenate([x.ravel() for x in jax.tree.leaves(rates)])
  rate, deviation = float(each.mean()), float(each.std())
  spread = deviation / abs(rate) if rate else np.inf
  return Checkpoint(step, stage, *walk.state, rates, rate, spread)


class _Folders:
  """A run's states on disk, a folder for each step."""

  def __init__(self, directory: str | None, record: dict[str, Any]):
    self.path = directory and pathlib.Path(directory)
    if self.path:
      belongs(self.path, record)

  def load(self, step: int, like: _Walk) -> _Walk | None:
    folder = self.path and str(self.path / f"step_{step}")
    return disk.load(folder, like) if folder and disk.exists(folder) else None

  def save(self, step: int, walk: _Walk) -> None:
    if self.path:
      disk.save(str(self.path / f"step_{step}"), walk)


def record(
  init: Init, stages: Sequence[Stage], weights: Sequence[Array], key: Array
) -> dict[str, Any]:
  """What tells a run from others, for the directory that it saves in.

  Its key, start, data and weights, and the program of a step, in which the
  loss and the optimizer are, with their numbers.
  """
  params = init(jax.random.split(key)[0])

  def program(stage, parts, w):
    opt_state = jax.eval_shape(stage.optimizer.init, params)
    batch = jax.ShapeDtypeStruct((stage.batch_size,), jnp.int32)
    return records.program(
      parts.step, State(params, opt_state), stage.data, w, batch
    )

  made = trajectories(init, stages)
  return {
    "key": np.asarray(jax.random.key_data(key)).tolist(),
    "start": records.digest(params),
    "steps": [[s.epochs, s.batch_size, s.size, s.masked] for s in stages],
    "data": [records.digest(s.data) for s in stages],
    "weights": [records.digest(w) for w in weights],
    "loss or optimizer": [*map(program, stages, made, weights)],
  }


def check_weights(stages: Sequence[Stage], weights: Sequence[Array]) -> None:
  """Refuses weights of other shapes than the stages' examples."""
  shapes = [jnp.shape(w) for w in weights]
  expected = [(_rows(stage),) for stage in stages]
  if [shape[:1] for shape in shapes] != expected:
    raise ValueError(
      f"weights of shapes {shapes}: each stage's are those of its examples, "
      f"{expected}"
    )


def checked_weights(
  stages: Sequence[Stage], weights: Sequence[Array]
) -> list[Array]:
  """Weights of concrete values as floats; those that do not fit are refused."""
  check_weights(stages, weights)
  found = [trajectory.as_weights(w) for w in weights]
  for i, (stage, w) in enumerate(zip(stages, found, strict=True)):
    if not _fits(stage, w):
      raise ValueError(
        f"stage {i} keeps more examples than its size={stage.size}: raise it"
      )
  return found


def _fits(stage: Stage, weights: Array) -> Array:
  size = stage.size or _rows(stage)
  kept = jnp.count_nonzero(trajectory.present(weights))
  return stage.masked | (kept <= size)
