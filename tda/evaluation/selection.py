"""One number per training example: what each method thinks it does to a task.

    rank = selection.ranker(found, objective, methods=..., dampings=...)
    harm, residual = rank(params, train, validation, key)
    kept = selection.keep(harm["hyperinf@0.1"], 0.2)      # weights [N] of 0/1

Harm is the predicted fall of the mean validation loss when the example is left
out, times N: minus the influence on the mean validation gradient v̄. For the
"self_" forms it is ⟨R ∇ℓ, ∇ℓ⟩, for "loss" the loss; larger is more suspect for
all.

Damping is the same for every method: λ = value × the mean squared entry of the
layer's gradient, in K-FAC's and EK-FAC's eigenvalues, in HyperINF's M (with the
1/R), in each of DataInf's terms and added to LiSSA's exact Gauss-Newton matrix.
(The published comparison damps HyperINF by 0.001 more than the others, which is
usually most of it.)

Notation: N training examples, V validation.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tda import blocks, gradients, streams
from tda.attribution import influence, products
from tda.attribution.responses import Cosine, Identity, Operator
from tda.blocks import Blocks, Trace
from tda.curvature import fitting, operators
from tda.curvature.kronecker import Curvature
from tda.evaluation.mislabel import Draw, Setting, Subject
from tda.inverse import datainf, gfim, iterative, neumann, spectral
from tda.inverse.iterative import Info
from tda.inverse.spectral import Damping, Response
from tda.likelihoods import Objective
from tda.streams import Batch, Loop

Array = jax.Array
PyTree = Any

METHODS: Mapping[str, str] = MappingProxyType(
  {
    "random": "standard normal draws",
    "loss": "the example's own loss",
    "gradient_dot": "−⟨v̄, ∇ℓ⟩, TracIn at the last checkpoint",
    "gradient_cosine": "the same by the norms of both",
    "datainf": "−⟨R v̄, ∇ℓ⟩, R the mean of inverses",
    "lissa": "R = (G + λ)⁻¹, exact Gauss-Newton, by a Neumann series",
    "hyperinf": "R = (M + λ)⁻¹ on one side of each block",
    "kfac": "R = (A ⊗ S + λ)⁻¹",
    "ekfac": "the same with refitted eigenvalues",
    "self_gradient": "‖∇ℓ‖²",
    "self_hyperinf": "⟨R ∇ℓ, ∇ℓ⟩ with HyperINF's R",
    "self_kfac": "with K-FAC's",
    "self_ekfac": "with EK-FAC's",
  }
)
"""The methods by name; those with an inverse are ranked at every damping."""


class Ranks(NamedTuple):
  """What a ranker returns, by "METHOD" or "METHOD@DAMPING".

  Attributes:
    harm: [N].
    residual: of the methods that iterate, the largest ‖b − A x‖ / ‖b‖ of their
      solves.
  """

  harm: dict[str, np.ndarray]
  residual: dict[str, float]


class Run(NamedTuple):
  """One seed of a subject: what it was made of and its ranks."""

  draw: Draw
  base: PyTree
  params: PyTree
  ranks: Ranks
  key: Array  # for what comes after


def runner(setting: Setting, subject: Subject) -> Callable[..., Run]:
  """Draws, trains and ranks: run(seed, *, loop=Loop()) -> Run.

  Seeds share their compilations.
  """
  draw, key = subject.draw(0), jax.random.key(0)
  weights = jnp.ones(len(draw.flipped))
  base = jax.eval_shape(subject.base, draw.pretrain, key)
  params = jax.eval_shape(subject.fit, draw.train, weights, base, key)
  example = streams.example(draw.train)
  outputs, select = subject.objective.outputs, subject.select
  found = blocks.trace(outputs, params, example, select=select)
  rank = ranker(
    found,
    subject.objective,
    methods=setting.methods,
    dampings=setting.dampings,
    labels=setting.labels,
    lissa_steps=setting.lissa_steps,
  )

  def run(seed, *, loop=Loop()):
    draw = subject.draw(seed)
    keys = jax.random.split(jax.random.key(seed), 4)
    base = subject.base(draw.pretrain, keys[0])
    params = subject.fit(draw.train, weights, base, keys[1])
    ranks = rank(params, draw.train, draw.validation, keys[2], loop=loop)
    return Run(draw, base, params, ranks, keys[3])

  return run


def keep(harm: Array, fraction: float) -> Array:
  """Weights [N] that keep the least harmful fraction of the examples."""
  size = count(len(harm), fraction)
  order = jnp.argsort(jnp.asarray(harm))
  return jnp.zeros(len(harm)).at[order[:size]].set(1.0)


def count(n: int, fraction: float) -> int:
  """How many of n examples a fraction keeps, one at least."""
  if not 0 < fraction <= 1:
    raise ValueError(f"keep a fraction above 0 and up to 1, not {fraction}")
  return max(round(fraction * n), 1)


def ranker(
  found: Trace,
  objective: Objective,
  *,
  methods: Sequence[str] = tuple(METHODS),
  dampings: Sequence[float] = (0.1,),
  labels: str = "empirical",
  lissa_steps: int = 50,
) -> Callable[..., Ranks]:
  """Ranks of training examples by every method.

  Args:
    found: trace of `objective.outputs`.
    objective: model and likelihood.
    methods: of `METHODS`.
    dampings: λ, see above.
    labels: of HyperINF's and the Kronecker-factored curvatures.
    lissa_steps: terms of the Neumann series; its step is 1 / λ_max(G + λ).

  Returns:
    rank(params, train, validation, key, *, loop=Loop()) -> Ranks. A second
    call compiles nothing again.
  """
  unknown = set(methods) - set(METHODS)
  if unknown or not methods:
    raise ValueError(
      f"unknown methods {sorted(unknown)}; choose of {list(METHODS)}"
    )
  respond = _responder(found, objective, methods, dampings, labels, lissa_steps)
  own: dict[str, Callable[..., np.ndarray]] = {
    "hyperinf": gfim.self_influence(found, objective),
    "": _self(found, objective),
  }
  losses = jax.jit(jax.vmap(objective.loss, (None, 0)))
  score = influence.scorer(
    found, objective, measurement=lambda p, q: _mean(objective, p, q)
  )

  def rank(params, train, validation, key, *, loop=Loop()):
    curved, drawn = jax.random.split(key)
    query = jax.tree.map(lambda x: jnp.asarray(x)[None], dict(validation))
    responses = respond(params, train, query, curved, loop)
    pairs = {
      k: r for k, r in responses.items() if k.partition("@")[0] in methods
    }
    harm: dict[str, np.ndarray] = {}
    residual: dict[str, float] = {}
    if pairs:
      stage = loop.stage("scores")
      found_scores = score(params, train, query, pairs, loop=stage)
      for name, scores in found_scores.items():
        harm[name] = -scores.values[:, 0] * scores.normaliser
        if scores.info is not None:
          residual[name] = float(np.max(scores.info.residual))
    for name, response in responses.items():
      method = name.partition("@")[0]
      if f"self_{method}" in methods:
        run = own.get(method, own[""])
        stage = loop.stage(f"self {name}")
        harm[f"self_{name}"] = run(params, train, response, loop=stage)
    if "self_gradient" in methods:
      harm["self_gradient"] = own[""](params, train, Identity(), loop=loop)
    if "loss" in methods:
      harm["loss"] = np.asarray(losses(params, train))
    if "random" in methods:
      shape = (streams.rows(train),)
      harm["random"] = np.asarray(jax.random.normal(drawn, shape))
    return Ranks(harm, residual)

  return rank


def _responder(found, objective, methods, dampings, labels, steps) -> Callable:
  """(params, train, query, key, loop) -> responses by name, all that the
  methods and their self forms need."""
  needs = lambda name: {name, f"self_{name}"} & set(methods)
  kinds = [kind for kind in ("kfac", "ekfac") if needs(kind)]
  scale = [spectral.relative(value) for value in dampings]
  fisher_of = gfim.fitter(found, objective, labels=labels)
  datainf_of = datainf.fitter(found, objective)
  if kinds:
    curvatures_of = fitting.fitter(
      found, objective, methods=kinds, labels=labels
    )
  gradient = jax.jit(
    gradients.of_measurement(found, lambda p, q: _mean(objective, p, q))
  )
  series = jax.jit(_series(found, objective, steps))

  def respond(params, train, query, key, loop):
    responses: dict[str, Operator] = {}
    if "gradient_dot" in methods:
      responses["gradient_dot"] = Identity()
    if "gradient_cosine" in methods:
      responses["gradient_cosine"] = Cosine(Identity())
    fisher = fisher_of(params, train, key=key, loop=loop.stage("GFIM"))
    deltas = {damping: fisher.damping(damping) for damping in scale}
    if needs("hyperinf"):
      for damping in scale:
        name = f"hyperinf@{damping.value:g}"
        responses[name] = gfim.inverse(fisher, damping)[0]
    if "datainf" in methods:
      for damping in scale:
        name, stage = (
          f"datainf@{damping.value:g}",
          loop.stage(f"DataInf {damping.value:g}"),
        )
        responses[name] = datainf_of(
          params, train, damping, squares=fisher.squares, loop=stage
        )
    fits = curvatures_of(params, train, key=key, loop=loop) if kinds else {}
    for kind in kinds:
      for damping, delta in deltas.items():
        responses[f"{kind}@{damping.value:g}"] = inverse(
          fits[kind], damping, delta
        )
    if "lissa" in methods:
      rows = Batch(query, np.zeros(1, np.int32), None)
      v, _ = gradient(params, rows)
      stacked = jax.tree.map(lambda *x: jnp.stack(x), *deltas.values())
      solution, info = series(params, train, v, stacked)
      for i, damping in enumerate(scale):
        mine = lambda tree, i=i: jax.tree.map(lambda x: x[i : i + 1], tree)
        one = _Solved(mine(solution), mine(info), damping)
        responses[f"lissa@{damping.value:g}"] = one
    return responses

  return respond


def inverse(
  curvature: Curvature, damping: Damping, deltas: Mapping[str, Array]
) -> Response:
  """(C + λ)⁻¹ of a Kronecker-factored curvature, with λ by layer [*stack]."""
  weights = {
    name: 1 / (values + deltas[name][..., None, None, None])
    for name, values in curvature.eigenvalues.items()
  }
  return Response(curvature.basis, weights, damping, curvature.labels)


@dataclasses.dataclass(frozen=True)
class _Solved:
  """The response that was solved for already, to the one query there is."""

  blocks: Blocks
  info: Info
  damping: Damping

  def __call__(self, blocks: Blocks) -> Blocks:
    return self.solve(blocks)[0]

  def solve(self, blocks: Blocks) -> tuple[Blocks, Info]:
    del blocks
    return self.blocks, self.info


def _series(found: Trace, objective: Objective, steps: int) -> Callable:
  """LiSSA for one query at several dampings, all at once."""

  def run(params, train, v, deltas):
    curvature = operators.curvature(found, objective, params, train)

    def matvec(x, k):
      del k
      image = curvature(x)
      return {
        name: image[name] + deltas[name][..., None, None, None] * x[name]
        for name in x
      }

    size = len(jax.tree.leaves(deltas)[0])
    b = jax.tree.map(lambda x: jnp.repeat(x, size, axis=0), v)
    largest = 1 / neumann.safe_step(lambda x, k: curvature(x), v)
    most = [x.reshape(size, -1).max(axis=1) for x in jax.tree.leaves(deltas)]
    length = 1 / (largest + jnp.stack(most).max(axis=0))
    return iterative.run(neumann.lissa(matvec, step=length), b, steps)

  return run


def _self(found: Trace, objective: Objective) -> Callable[..., np.ndarray]:
  """⟨R ∇ℓ, ∇ℓ⟩ [N] for spectral responses and `Identity`."""
  quadratic = gradients.summed_over_blocks(found, objective, products.SELF)

  def run(params, train, response, *, loop=Loop()):
    pairs = products.pairs(found, response)
    return quadratic(params, train, pairs, loop=loop)

  return run


def _mean(objective: Objective, params: PyTree, rows: PyTree) -> Array:
  return jnp.mean(jax.vmap(objective.loss, (None, 0))(params, rows))
