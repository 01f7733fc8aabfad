"""How much of the proximal Bregman response does each method predict, and when?

  python -m experiments.pbrf --config=configs/digits_mlp.py

Trains a model, finds by minimisation how its test losses respond to leaving
out each of --chosen training examples (`tda.evaluation.pbrf`), and correlates
that with the scores of every method, over the examples and averaged over test
pictures: gradient dot products, diagonal, K-FAC and EK-FAC; and after each of
several iterations CG with and without EK-FAC as preconditioner, ASTRA and
LiSSA, the last two on minibatches. All are of the exact Gauss-Newton or fitted
to it, at the one --damping of the responses. Seconds are of fits and
iterations for all queries at once, without compilation.

A finished stage is read from --workdir, an interrupted one is taken up.

On two busy CPU cores, in 312 seconds, the command above prints (some rows left
out)

  600 responses with 10.3 gradients and 11.8 products each; 456 ended with no
  gradient, 41 with no fall, 103 in a kink or at the limit (the largest fall of
  these 2.0e-02)

  method                iterations  seconds   pearson  spearman
  gradient dot product                 0.01     0.277     0.067
  diagonal                             0.20     0.283     0.069
  K-FAC                                0.20     0.612     0.487
  EK-FAC                               0.29     0.599     0.454
  CG                             1     1.03     0.802     0.669
  CG                             4     3.30     0.901     0.956
  CG with EK-FAC                 1     1.30     0.809     0.691
  CG with EK-FAC                 4     3.86     0.899     0.938
  CG with EK-FAC                16    12.93     0.901     0.956
  ASTRA                          1     0.60     0.668     0.547
  ASTRA                         16     2.67     0.526     0.651
  ASTRA                        256    31.68     0.893     0.927
  LiSSA                         16     1.48     0.494     0.268
  LiSSA                        256    20.09     0.881     0.820

An iteration of CG multiplies with 100 directions at once and finds the best
answers in the space of them all. ASTRA loses before it gains: the noise of its
first minibatches is larger than what EK-FAC's answer lacks.

What is left to 1 after CG is mostly of higher order in ε: with --chosen=100
--step=0.1 --central, CG with EK-FAC gets to 0.994 and 0.989 in 32 iterations,
EK-FAC to 0.489 and 0.449.

Of a small transformer (an hour on two busy cores:
--config=configs/planted_words.py --chosen=48 --damping=0.1 --step=0.1
--central; pearson and spearman):

  gradient dot product                          0.306     0.199
  diagonal                                      0.341     0.203
  K-FAC                                         0.377     0.250
  EK-FAC                                        0.396     0.259
  CG                             4              0.624     0.449
  CG                            16              0.979     0.914
  CG                            32              1.000     0.998
  CG with EK-FAC                 4              0.692     0.472
  CG with EK-FAC                16              0.982     0.945
  ASTRA                         64              0.975     0.916
  ASTRA                        256              0.996     0.985
  LiSSA                        256              0.888     0.811

The exact Gauss-Newton predicts all that happens, and its Kronecker-factored
approximations correlate with it by less than a half.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.tree_util import Partial
from tqdm import tqdm

from experiments import launch, reports
from tda import blocks, gradients, streams
from tda.attribution.responses import Identity
from tda.blocks import Blocks, Trace
from tda.curvature import fitting, operators
from tda.evaluation import lds, pbrf, problem, stages
from tda.evaluation.problem import Problem
from tda.evaluation.workdir import Arrays, Workdir
from tda.inverse import krylov, solvers, spectral
from tda.inverse.krylov import LowRank
from tda.report import cost
from tda.report.cost import Curve

CHOSEN = flags.DEFINE_integer(
  "chosen", None, "Training examples; as many as the LDS retrains models."
)
DAMPING = flags.DEFINE_float("damping", 0.01, "Absolute, of all parameters.")
STEP = flags.DEFINE_float("step", 1.0, "Of an example's weight that is removed")
CENTRAL = flags.DEFINE_bool("central", False, "Add it as well, and subtract.")

WHOLE = (1, 2, 4, 8, 16, 32)  # iterations on all of the data
PARTIAL = (*WHOLE, 64, 128, 256)  # on minibatches
SHOWN = (1, 4, 16, 64)  # of them in the table
DEFLATED = 200  # leading directions that precondition the responses' solves
CLOSED = ("gradient_dot", "diagonal", "kfac", "ekfac")
ITERATED = {
  "cg": ("cg", WHOLE),
  "CG with EK-FAC": ("cg", WHOLE),
  "astra": ("astra", PARTIAL),
  "lissa": ("lissa", PARTIAL),
}


class Task(NamedTuple):
  """What all methods are given."""

  problem: Problem
  params: Any
  found: Trace
  train: dict[str, jax.Array]
  queries: Blocks  # ∇m [Q, *stack, G, O, I]
  chosen: np.ndarray  # [n]
  grads: Blocks  # ∇ℓ of the chosen [n, *stack, G, O, I]


def main(_) -> None:
  started = time.monotonic()
  setting = launch.setting()
  workdir = launch.workdir("pbrf", setting)
  built = problem.build(setting)
  task = _task(built, stages.trained(built, workdir))
  suffix = f"{DAMPING.value:g}_{len(task.chosen)}"
  kind = f"{suffix}_{STEP.value:g}{'_central' if CENTRAL.value else ''}"
  truth = workdir.stage(
    f"responses_{kind}", lambda: _responses(task, workdir, kind)
  )
  found = {
    name: workdir.stage(f"{name.replace(' ', '_')}_{suffix}", compute)
    for name, compute in _methods(task)
  }
  curves = {
    which: {
      name: _curve(built, which, x, truth["change"])
      for name, x in found.items()
    }
    for which in ("pearson", "spearman")
  }
  for which, by_method in curves.items():
    cost.figure(
      workdir.path / f"{which}_{kind}.png",
      by_method,
      accuracy=f"{which.title()} correlation with the response",
    )
    workdir.record(
      f"{which}_{kind}",
      {k: np.asarray(c).tolist() for k, c in by_method.items()},
    )
  workdir.say(_account(truth))
  workdir.say(cost.text(curves, SHOWN))
  total = round(time.monotonic() - started, 1)
  workdir.record("seconds", {"total": total})
  print(f"\n{total:.0f} seconds; figures and metrics.json in {workdir.path}")
  reports.write(workdir, __doc__)


def _task(built: Problem, params: Any) -> Task:
  train = jax.tree.map(jnp.asarray, dict(built.dataset.train))
  n = streams.rows(train)
  found = blocks.trace(built.objective.outputs, params, streams.example(train))
  retrained = built.setting.subsets * built.setting.retrain_seeds
  count = min(CHOSEN.value or retrained, n)
  order = jax.random.permutation(built.key_for("chosen"), n)
  chosen = np.sort(np.asarray(order)[:count])
  rows = jax.tree.map(lambda x: x[chosen], train)
  batch = lambda rows: streams.Batch(
    rows, np.arange(streams.rows(rows), dtype=np.int32), None
  )
  grads = jax.jit(gradients.per_example(found, built.objective))
  asked = jax.jit(gradients.of_measurement(found, built.measurement))
  queries = jax.tree.map(jnp.asarray, dict(built.queries))
  return Task(
    built,
    params,
    found,
    train,
    asked(params, batch(queries))[0],
    chosen,
    grads(params, batch(rows))[0],
  )


# The truth.


def _responses(task: Task, workdir: Workdir, name: str) -> Arrays:
  first = jax.block_until_ready(_deflation(task))
  built, n = task.problem, streams.rows(task.train)
  with jax.enable_x64(True):
    solve = pbrf.solver(
      task.found,
      built.objective,
      task.params,
      task.train,
      damping=DAMPING.value,
      precondition=first,
    )
    found = pbrf.responses(
      solve,
      Partial(_value, built.measure),
      task.chosen,
      n,
      step=STEP.value,
      central=CENTRAL.value,
      directory=workdir.folder(f"responses_{name}_parts"),
      label="responses",
    )
  return found._asdict()


def _value(measure: Partial, params: Any) -> jax.Array:
  return measure(params)["value"]


def _deflation(task: Task) -> LowRank:
  """(G + λ)⁻¹ but for directions of little curvature, which all count alike."""
  kept = min(DEFLATED, streams.rows(task.train) // 2)
  key = task.problem.key_for("lanczos")
  start = {
    name: jax.random.normal(jax.random.fold_in(key, i), (1, *x.shape[1:]))
    for i, (name, x) in enumerate(task.queries.items())
  }

  @jax.jit
  def run(params, train, start):
    matvec = operators.curvature(
      task.found, task.problem.objective, params, train
    )
    return krylov.lanczos(matvec, start, 3 * kept // 2, kept)

  spectrum = run(task.params, task.train, start)
  rest = 1 / (spectrum.values[-1] / 2 + DAMPING.value)
  weights = 1 / (jnp.maximum(spectrum.values, 0) + DAMPING.value)
  return LowRank(spectrum.vectors, weights, rest)


# The methods: each a stage {"scores" [K, n, Q], "iterations", "seconds" [K]}.


def _methods(task: Task) -> Iterator[tuple[str, Callable[[], Arrays]]]:
  fits = functools.cache(functools.partial(_fitted, task))
  for name in CLOSED:
    yield name, functools.partial(_closed, task, name, fits)
  for name in ITERATED:
    yield name, functools.partial(_iterated, task, name, fits)


def _fitted(task: Task, name: str) -> tuple[Any, float]:
  """A response (C + λ)⁻¹ with C fitted to the Gauss-Newton, and its seconds.

  Of tokens labels are sampled: each has as many exact ones as there are words.
  """
  objective, setting = task.problem.objective, task.problem.setting
  loop, key = streams.Loop(setting.fit_batch_size), None
  labels = "exact"
  if setting.likelihood == "tokens":
    labels, key = "sampled:4", task.problem.key_for("labels")
  fit = fitting.fitter(task.found, objective, methods=(name,), labels=labels)
  for _ in range(2):  # the second compiles nothing
    began = time.monotonic()
    curvature = fit(task.params, task.train, key=key, loop=loop)[name]
    jax.block_until_ready(curvature.eigenvalues)
  response = spectral.inverse(curvature, spectral.absolute(DAMPING.value))
  return response, time.monotonic() - began


def _closed(task: Task, name: str, fits: Callable) -> Arrays:
  response, seconds = Identity(), 0.0
  if name != "gradient_dot":
    response, seconds = fits(name)
  apply = jax.jit(lambda response, b: response(b))
  jax.block_until_ready(apply(response, task.queries))
  began = time.monotonic()
  x = jax.block_until_ready(apply(response, task.queries))
  seconds += time.monotonic() - began
  return _record([_scores(task, x)], [0], [seconds])


def _iterated(task: Task, name: str, fits: Callable) -> Arrays:
  method, counts = ITERATED[name]
  first, before = None, 0.0
  if name != "cg" and method != "lissa":
    first, before = fits("ekfac")
  budget = solvers.Budget(limit=counts[-1], tolerance=1e-6, microbatch=None)
  make = solvers.maker(
    task.found, task.problem.objective, method, budget=budget
  )
  key = None if method == "cg" else task.problem.key_for(name)
  for _ in range(2):  # the second compiles nothing
    began = time.monotonic()
    solver = make(task.params, task.train, DAMPING.value, first, key=key)
    jax.block_until_ready(solver.operands)
    spent = time.monotonic() - began  # on the step of LiSSA and ASTRA
  before += spent
  program = solver.build, solver.operands
  state = solvers.start(*program, task.queries)
  jax.block_until_ready(solvers.advance(*program, state, 0))
  scores, seconds, done = [], [], 0
  for count in tqdm(counts, desc=name):
    began = time.monotonic()
    state, _ = jax.block_until_ready(
      solvers.advance(*program, state, count - done)
    )
    before, done = before + time.monotonic() - began, count
    scores.append(_scores(task, solvers.result(*program, state)[0]))
    seconds.append(before)
  return _record(scores, counts, seconds)


def _scores(task: Task, responses: Blocks) -> np.ndarray:
  """⟨x_q, ∇ℓ_m⟩ / N of the chosen examples, [n, Q]."""
  flat = lambda x: x.reshape(x.shape[0], -1)
  products = [
    flat(task.grads[name]) @ flat(x).T for name, x in responses.items()
  ]
  return np.asarray(sum(products)) / streams.rows(task.train)


def _record(scores: list, iterations: Any, seconds: list) -> Arrays:
  return {
    "scores": np.stack(scores),
    "iterations": np.asarray(iterations),
    "seconds": np.maximum(seconds, 1e-6),
  }


# The report.


def _curve(
  built: Problem, which: str, found: Arrays, change: np.ndarray
) -> Curve:
  """Correlations, averaged over the queries."""
  each = [pbrf.correlations(x, change)[which] for x in found["scores"]]
  per_query = np.stack(each, axis=1)
  interval = lds.bootstrap(per_query, built.key_for("bootstrap"))
  return Curve(found["iterations"], found["seconds"], *interval)


def _account(truth: Arrays) -> str:
  gradient, fall = truth["gradient"], truth["fall"]
  steep = gradient > pbrf.TOLERANCE
  kinked = steep & (fall <= pbrf.FLAT)
  counts = truth["gradients"], truth["products"]
  each = " and ".join(
    f"{np.mean(x):.1f} {what}"
    for x, what in zip(counts, ("gradients", "products"), strict=True)
  )
  return (
    f"{len(gradient)} responses with {each} each; {np.sum(~steep)} ended with"
    f" no gradient, {np.sum(kinked)} with no fall,"
    f" {np.sum(steep & ~kinked)} in a kink or at the limit (the largest"
    f" fall of these {np.max(fall[steep & ~kinked], initial=0):.1e})\n"
  )


if __name__ == "__main__":
  app.run(main)
