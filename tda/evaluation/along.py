"""An experiment's scores by the methods that look at the whole run."""

from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from tda import blocks, runs, smoothness, streams
from tda.attribution import source, tracin, unrolled
from tda.evaluation.problem import Problem
from tda.evaluation.workdir import Arrays, Workdir
from tda.runs import Checkpoint

PyTree = object
METHODS = MappingProxyType(
  {
    "tracin": "",
    "source": "sampled",
    "fast_source": "sampled",
    "unrolled": "",
  }
)
"""Their names, and the labels of their curvatures."""


def attributed(
  problem: Problem, params: PyTree, member: int, workdir: Workdir
) -> Arrays:
  """Scores [N, Q] of those of `METHODS` that the setting has, of one model."""
  wanted = [name for name in METHODS if name in problem.setting.methods]
  scores = dict[str, np.ndarray]()
  if "unrolled" in wanted:
    scores["unrolled"] = _unrolled(problem, member, workdir)
  if not {"tracin", "source", "fast_source"} & {*wanted}:
    return scores
  setting, data = problem.setting, [s.data for s in problem.stages]
  example = streams.example(data[0])
  found = blocks.trace(problem.objective.outputs, params, example)
  points = passed(problem, member, workdir)
  loop = streams.Loop(setting.fit_batch_size)
  queries = dict(problem.queries)
  options: dict[str, Any] = {
    "measurement": problem.measurement,
    "query_batch": setting.query_batch,
  }
  if "tracin" in wanted:
    score = tracin.scorer(found, problem.objective, **options)
    first = [point for point in points if point.stage == 0]
    named = loop._replace(label="tracin")
    scores["tracin"] = score(first, data[0], queries, loop=named).values
  if not {"source", "fast_source"} & {*wanted}:
    return scores
  run = source.scorer(found, problem.objective, **options)
  parts = source.segments(problem.stages, points, setting.segments)
  cuts = {"source": parts, "fast_source": source.averaged(parts)}
  for name, cut in cuts.items():
    if name in wanted:
      by_stage = run(
        cut,
        data,
        queries,
        params=params,
        key=problem.key_for("labels sampled"),
        loop=loop._replace(label=name),
      )
      scores[name] = by_stage[0].values
  return scores


def _unrolled(problem: Problem, member: int, workdir: Workdir) -> np.ndarray:
  measurements = jax.vmap(problem.measurement, (None, 0))
  queries = dict(problem.queries)
  derivative = unrolled.differentiate(
    problem.init,
    problem.stages,
    problem.weights(),
    problem.run_key(member),
    lambda params: measurements(params, queries),
    directory=workdir.folder(f"replay_{member}"),
    label="replay",
  )
  if not member:
    straight = jax.jit(smoothness.metasmoothness)(
      problem.train,
      problem.weights()[0],
      problem.run_key(),
      problem.key_for("metasmoothness"),
    )
    workdir.record("metasmoothness", round(float(straight), 4))
  return derivative.scores().values


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
