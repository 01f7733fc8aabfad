"""An experiment's scores by the methods that look at the whole run."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from tda import blocks, runs, smoothness, streams
from tda.attribution import adam, less, source, tracin, trackstar, unrolled
from tda.evaluation.problem import Problem
from tda.evaluation.workdir import Arrays, Workdir
from tda.runs import Checkpoint
from tda.streams import Loop

PyTree = Any


def attributed(
  problem: Problem, params: PyTree, member: int, workdir: Workdir
) -> Arrays:
  """Scores [N, Q] of those of `METHODS` that the setting has, of one model."""
  run = _Run(problem, params, member, workdir)
  wanted = [name for name in METHODS if name in problem.setting.methods]
  return {name: METHODS[name](run) for name in wanted}


def passed(problem: Problem, member: int, workdir: Workdir) -> list[Checkpoint]:
  """Checkpoints of the run that is attributed, equally spaced in each stage."""
  at: list[int] = []
  begin = 0
  for length in runs.lengths(problem.stages):
    count = min(problem.setting.checkpoints, length)
    steps = np.rint(np.linspace(0, length, count + 1)[1:]).astype(int)
    at += (begin + steps).tolist()
    begin += length
  return runs.checkpoints(
    problem.init,
    problem.stages,
    problem.weights(),
    problem.run_key(member),
    at,
    directory=workdir.folder(f"checkpoints_{member}"),
    label="checkpoints",
  )


@dataclasses.dataclass(frozen=True)
class _Run:
  """A run that is attributed, and what several methods need of it."""

  problem: Problem
  params: PyTree  # where it ended
  member: int
  workdir: Workdir

  @functools.cached_property
  def points(self) -> list[Checkpoint]:
    return passed(self.problem, self.member, self.workdir)

  @functools.cached_property
  def source(self) -> Callable[..., dict[int, Any]]:
    return self.scorer(source.scorer)

  @property
  def first(self) -> list[Checkpoint]:
    """Those of the stage that is attributed."""
    return [point for point in self.points if point.stage == 0]

  @property
  def train(self) -> PyTree:
    return self.problem.dataset.train

  @property
  def queries(self) -> PyTree:
    return dict(self.problem.queries)

  def scorer(self, kind: Callable) -> Callable:
    problem, example = self.problem, streams.example(self.train)
    return kind(
      blocks.trace(problem.objective.outputs, self.params, example),
      problem.objective,
      measurement=problem.measurement,
      query_batch=problem.setting.query_batch,
    )

  def loop(self, name: str) -> Loop:
    return Loop(self.problem.setting.fit_batch_size, label=name)


def _tracin(run: _Run) -> np.ndarray:
  score = run.scorer(tracin.scorer)
  return score(
    run.first, run.train, run.queries, loop=run.loop("tracin")
  ).values


def _source(run: _Run, name: str = "source") -> np.ndarray:
  problem = run.problem
  count = problem.setting.segments
  cut = source.segments(problem.stages, run.points, count)
  by_stage = run.source(
    cut if name == "source" else source.averaged(cut),
    [stage.data for stage in problem.stages],
    run.queries,
    params=run.params,
    key=problem.key_for("labels sampled"),
    loop=run.loop(name),
  )
  return by_stage[0].values


def _trackstar(run: _Run) -> np.ndarray:
  problem, second = run.problem, None
  if problem.setting.optimizer == "adamw":
    second = adam.second_moments(run.points[-1].opt_state)
  return trackstar.attribute(
    problem.objective,
    run.params,
    run.train,
    run.queries,
    key=problem.key_for("projections"),
    second_moments=second,
    measurement=problem.measurement,
    loop=run.loop("trackstar"),
  ).values


def _less(run: _Run) -> np.ndarray:
  setting = run.problem.setting
  steps = np.diff([0, *(point.step for point in run.first)])
  return less.attribute(
    run.problem.objective,
    run.first,
    run.train,
    run.queries,
    rates=(setting.learning_rate * steps).tolist(),
    key=run.problem.key_for("projections"),
    dimension=setting.trak_dimension,
    measurement=run.problem.measurement,
    loop=run.loop("less")._replace(batch_size=64),
  ).values


def _unrolled(run: _Run) -> np.ndarray:
  problem, queries = run.problem, run.queries
  measurements = jax.vmap(problem.measurement, (None, 0))
  derivative = unrolled.differentiate(
    problem.init,
    problem.stages,
    problem.weights(),
    problem.run_key(run.member),
    lambda params: measurements(params, queries),
    directory=run.workdir.folder(f"replay_{run.member}"),
    label="replay",
  )
  if not run.member:
    straight = jax.jit(smoothness.metasmoothness)(
      problem.train,
      problem.weights()[0],
      problem.run_key(),
      problem.key_for("metasmoothness"),
    )
    run.workdir.record("metasmoothness", round(float(straight), 4))
  return derivative.scores().values


METHODS: Mapping[str, Callable[[_Run], np.ndarray]] = MappingProxyType(
  {
    "tracin": _tracin,
    "source": _source,
    "fast_source": functools.partial(_source, name="fast source"),
    "unrolled": _unrolled,
    "trackstar": _trackstar,
    "less": _less,
  }
)
LABELS = MappingProxyType({"source": "sampled", "fast_source": "sampled"})
"""Of the curvatures of those that have one."""
