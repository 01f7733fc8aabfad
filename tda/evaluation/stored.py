"""An experiment's scores from stores of projected gradients.

A method is written "logra KIND K": its directions are "random", "sparse" or
"principal", K of them for each side of a block.
"""

from collections.abc import Sequence

import numpy as np

from tda import blocks, projections, streams
from tda.attribution import logra
from tda.curvature import fitting
from tda.evaluation.problem import Problem
from tda.evaluation.workdir import Arrays, Workdir
from tda.likelihoods import PyTree
from tda.projections import Sides
from tda.store import lenses, search


def named(methods: Sequence[str]) -> list[str]:
  """Those methods that are from stores.

  Raises:
    ValueError: one that is not written as above.
  """
  found = [name for name in methods if name.split()[0] == "logra"]
  for name in found:
    _, *rest = name.split()
    if (
      len(rest) != 2
      or rest[0] not in projections.KINDS
      or not rest[1].isdecimal()
    ):
      raise ValueError(
        f"unknown method {name!r}: write 'logra KIND K' with a kind of"
        f" {list(projections.KINDS)} and a number, as 'logra random 16'"
      )
  return found


def attributed(
  problem: Problem, params: PyTree, member: int, workdir: Workdir
) -> Arrays:
  """Scores [N, Q] of one model, by "METHOD@DAMPING" for relative dampings."""
  setting, results = problem.setting, {}
  dampings = [setting.damping, *setting.sweep_dampings]
  parsed = {text: problem.damping(text) for text in dict.fromkeys(dampings)}
  train, queries = problem.dataset.train, dict(problem.queries)
  for name in named(setting.methods):
    log = logra.logger(
      problem.objective,
      params,
      train,
      sides=_sides(problem, params, *name.split()[1:]),
    )
    folder = workdir.folder(f"stores_{member}/{name.replace(' ', '_')}")
    loop = streams.Loop(setting.fit_batch_size, label=name)
    store = log.build(folder, params, train, dtype="float32", loop=loop)
    asked = log.ask(params, queries, measurement=problem.measurement, loop=loop)
    for text, damping in parsed.items():
      if damping.kind == "relative":
        lens = lenses.lens(store, asked, damping=damping.value)
        results[f"{name}@{text}"] = search.scores(lens).astype(np.float32)
  return results


def _sides(
  problem: Problem, params: PyTree, kind: str, dimension: str
) -> dict[str, Sides]:
  objective, train = problem.objective, problem.dataset.train
  found = blocks.trace(objective.outputs, params, streams.example(train))

  def basis():
    fit = fitting.fitter(found, objective, methods=["kfac"])
    loop = streams.Loop(problem.setting.fit_batch_size)
    return fit(params, train, loop=loop)["kfac"].basis

  key = problem.key_for("projections")
  return projections.of_kind(kind, found, key, int(dimension), basis)
