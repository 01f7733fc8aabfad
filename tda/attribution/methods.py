"""Every method by its name, for any objective, in the fewest passes.

    scores = methods.attribute(loss, params, train, queries)
    scores["ekfac"].values  # [N, Q]

Curvatures share the passes of their fits, and all scores that are products of
gradients share one pass over the training data for each batch of queries.

Notation: N training examples, Q queries.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax

from tda import blocks, likelihoods, streams
from tda.attribution import baselines, influence, inverses
from tda.attribution.responses import Cosine, Identity, Operator
from tda.curvature import labels as labels_lib
from tda.curvature.labels import Labels
from tda.inverse import solvers, spectral
from tda.inverse.solvers import Budget
from tda.inverse.spectral import Damping
from tda.likelihoods import Loss, Objective, PyTree
from tda.scores import Scores
from tda.streams import Loop

METHODS: Mapping[str, str] = MappingProxyType(
  {
    "random": "standard normal draws",
    "representation": "cosine of what enters the last matrix",
    "gradient_dot": "⟨∇m, ∇ℓ⟩ / N",
    "gradient_cosine": "⟨∇m, ∇ℓ⟩ / (‖∇m‖ ‖∇ℓ‖)",
    "diagonal": "⟨(D + δ)⁻¹ ∇m, ∇ℓ⟩ / N, D the mean squared gradient",
    "kfac": "the same with (A ⊗ S + δ)⁻¹",
    "ekfac": "the same with the eigenvalues refitted in that eigenbasis",
    "cg": "⟨(G + δ)⁻¹ ∇m, ∇ℓ⟩ / N, G the exact Gauss-Newton Hessian, solved by "
    "conjugate gradients in one space of all queries",
    "astra": "the same by a stochastic series from EK-FAC's answer",
    "lissa": "the same by the plain stochastic series",
    "arnoldi": "the same on the leading eigenvectors alone, by Lanczos",
    "hyperinf": "⟨(M + δ)⁻¹ ∇m, ∇ℓ⟩ / N, M the second moment of the rows of a "
    "layer's gradient",
    "datainf": "the mean over examples of inverses, in place of the inverse of "
    "the mean, of the empirical Fisher",
  }
)
"""The names that `attribute` takes, and how each is computed."""


def attribute(
  objective: Objective | Loss,
  params: PyTree,
  train: PyTree,
  queries: PyTree,
  *,
  methods: Sequence[str] = ("ekfac",),
  labels: str | Labels = "empirical",
  dampings: Sequence[Damping] = (spectral.relative(0.1),),
  key: jax.Array | None = None,
  measurement: Loss | None = None,
  select: str | Sequence[str] | None = None,
  query_batch: int = 64,
  budget: Budget = solvers.DEFAULT,
  loop: Loop = Loop(),
) -> dict[str, Scores]:
  """How much every training example matters to every query, by each method.

  Args:
    objective: model and likelihood, or just loss(params, example) -> scalar
      of ONE example, for which `labels` must be "empirical".
    params: trained parameters, floating.
    train: pytree of arrays with leading axis N.
    queries: pytree of arrays with leading axis Q.
    methods: of `METHODS`.
    labels: of the fitted curvatures: "empirical", "exact", "sampled" or
      "sampled:K". Solvers and "arnoldi" always have the exact Gauss-Newton
      Hessian, "datainf" the empirical Fisher.
    dampings: of the inverses; several cost no further pass, but a solve each.
    key: for sampled labels, minibatches, "arnoldi" and "random".
    measurement: m(params, query) -> scalar that the scores are about; the loss
      unless given.
    select: patterns of the blocks to attribute to, as in `blocks.trace`.
    query_batch: queries held at a time, as in `influence.scorer`.
    budget: of the solvers, "cg", "astra", "lissa", and of "arnoldi".
    loop: how to run over the data. Its directory keeps each pass in a folder
      of its own, and must belong to these arguments.

  Returns:
    {name: scores [N, Q]} in the order of `methods`. With several dampings the
    names of inverses are "ekfac@0.1 relative", "ekfac@0.01", ...
  """
  _check(methods, labels, dampings, key)
  if not isinstance(objective, Objective):
    objective = likelihoods.from_loss(objective)
  example = streams.example(train)
  found = blocks.trace(objective.outputs, params, example, select=select)
  keys = [None] * 3 if key is None else jax.random.split(key, 3)
  responses = _products(methods) | inverses.responses(
    inverses.Problem(
      found,
      objective,
      params,
      train,
      labels,
      dampings,
      keys[0],
      keys[2],
      budget,
      loop,
    ),
    methods,
  )
  scores: dict[str, Scores] = {}
  if responses:
    score = influence.scorer(
      found, objective, measurement=measurement, query_batch=query_batch
    )
    stage = loop.stage("scores")
    scores = score(params, train, queries, responses, loop=stage)
  if "representation" in methods:
    stage = loop.stage("representation")
    scores["representation"] = baselines.representation(
      found, objective, params, train, queries, loop=stage
    )
  random_key = keys[1]
  if random_key is not None and "random" in methods:
    scores["random"] = baselines.random(random_key, train, queries)
  belongs = lambda name, method: name.partition("@")[0] == method
  return {k: v for m in methods for k, v in scores.items() if belongs(k, m)}


def _products(methods: Sequence[str]) -> dict[str, Operator]:
  """The responses of methods that are products of gradients as they are."""
  plain: dict[str, Operator] = {
    "gradient_dot": Identity(),
    "gradient_cosine": Cosine(Identity()),
  }
  return {name: plain[name] for name in methods if name in plain}


def _check(
  methods: Sequence[str],
  labels: str | Labels,
  dampings: Sequence[Damping],
  key: jax.Array | None,
) -> None:
  labels_lib.parse(labels)
  unknown = [name for name in methods if name not in METHODS]
  if unknown or not methods:
    raise ValueError(f"unknown methods {unknown}; choose of {list(METHODS)}")
  values = [str(damping) for damping in dampings]
  if not values or len(set(values)) < len(values):
    raise ValueError(f"dampings name scores, and must differ; got {values}")
  drawing = {"random", *inverses.EXACT} & set(methods)
  if drawing and key is None:
    raise ValueError(f"{sorted(drawing)} draw at random: give a key")
