"""An experiment's scores by the methods that look at the whole run."""

from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from tda import blocks, runs, streams
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


def attributed(problem: Problem, params: PyTree, workdir: Workdir) -> Arrays:
  """Scores [N, Q] of those of `METHODS` that the setting has."""
  setting, data = problem.setting, problem.dataset.train
  queries, scores = dict(problem.queries), dict[str, np.ndarray]()
  if "unrolled" in setting.methods:
    measurements = jax.vmap(problem.measurement, (None, 0))
    derivative = unrolled.differentiate(
      problem.init,
      problem.stages,
      [jnp.ones(streams.rows(data))],
      problem.key_for("attributed model"),
      lambda params: measurements(params, queries),
    )
    scores["unrolled"] = derivative.scores().values
  if not {"tracin", "source", "fast_source"} & {*setting.methods}:
    return scores
  found = blocks.trace(problem.objective.outputs, params, streams.example(data))
  points = passed(problem, workdir)
  loop = streams.Loop(setting.fit_batch_size)
  if "tracin" in setting.methods:
    trace = tracin.scorer(
      found,
      problem.objective,
      measurement=problem.measurement,
      query_batch=setting.query_batch,
    )
    tracin_loop = loop._replace(label="tracin")
    scores["tracin"] = trace(points, data, queries, loop=tracin_loop).values
  if not {"source", "fast_source"} & {*setting.methods}:
    return scores
  score = source.scorer(
    found,
    problem.objective,
    measurement=problem.measurement,
    query_batch=setting.query_batch,
  )
  parts = source.segments(problem.stages, points, setting.segments)
  cuts = {"source": parts, "fast_source": source.averaged(parts)}
  for name, cut in cuts.items():
    if name in setting.methods:
      by_stage = score(
        cut,
        [data],
        queries,
        params=params,
        key=problem.key_for("labels sampled"),
        loop=loop._replace(label=name),
      )
      scores[name] = by_stage[0].values
  return scores


def passed(problem: Problem, workdir: Workdir) -> list[Checkpoint]:
  """Equally spaced checkpoints of the run that is attributed."""
  total = sum(runs.lengths(problem.stages))
  count = min(problem.setting.checkpoints, total)
  at = np.rint(np.linspace(0, total, count + 1)[1:]).astype(int)
  return runs.checkpoints(
    problem.init,
    problem.stages,
    [jnp.ones(streams.rows(problem.dataset.train))],
    problem.key_for("attributed model"),
    at.tolist(),
    directory=workdir.folder("checkpoints"),
    label="checkpoints",
  )
