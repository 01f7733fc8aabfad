"""SOURCE: attribution through training, a few segments at a time.

The run is cut into segments in which the curvature H and the gradients are
taken to be constant. With c = Σ η over a segment (momentum included, see
`tda.runs`), a perturbation that is there when it begins shrinks to exp(−cH) of
itself, and one gradient g of it, taken 1/N of every step, leaves

    r = (1/N) (I − exp(−cH)) H⁻¹ g,

so that the predicted change of a measurement m when an example is left out is

    τ = Σ_ℓ ⟨u_ℓ, ḡ_ℓ⟩ / N,   u_ℓ = (I − exp(−c_ℓ H_ℓ)) H_ℓ⁻¹ v_ℓ,
    v_L = ∇m(θ_T),            v_{ℓ−1} = exp(−c_ℓ H_ℓ) v_ℓ

(Bae et al. 2024). H_ℓ is the EK-FAC mean over the segment's
checkpoints, in one basis, and ḡ_ℓ the mean gradient of the example there. One
segment of a long run is influence with damping near 1/c; a short one is TracIn.

With several stages of data an example belongs to one of them: it is scored by
that stage's segments, and the later ones carry its effect to the end.

An optimizer that gives every entry a rate of its own, as Adam, steps by c ∘ g.
With P = diag(c), in the coordinates P^(−1/2) θ, that is plain descent on
H' = P^(1/2) H P^(1/2), so that

    u_ℓ = P^(1/2) (I − exp(−H')) H'⁻¹ P^(1/2) v_ℓ,
    v_{ℓ−1} = P^(−1/2) exp(−H') P^(1/2) v_ℓ = exp(−H P) v_ℓ.

P of a block is taken to be of rank one, as Adafactor does: then the scaled
gradients are outer products too, and EK-FAC is fitted to H' as it is to H.

Where this departs from the paper. c is measured on the run, not read off a
config, and what Adam's moments do with a perturbation is in it. The paper's
Adam keeps a diagonal of H P for the exponential, and inverts H itself. Weight
decay λ, which the optimizer applies and the loss does not have, can be added to
the eigenvalues. Parameters that no block tracks are not moved.

Notation: N examples of a stage, Q queries, L segments.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tda import blocks, runs
from tda.attribution import influence
from tda.attribution.responses import Chain, Identity, Operator, Scaled, Sum
from tda.blocks import Blocks, Trace
from tda.curvature import fitting
from tda.curvature.kronecker import Curvature, Scales
from tda.curvature.labels import Labels
from tda.inverse import spectral
from tda.likelihoods import Loss, Objective
from tda.runs import Checkpoint, Stage
from tda.scores import Scores
from tda.streams import Loop

PyTree = Any
SPREAD = 0.05  # of the applied rate, beyond which an optimizer does not scale


class Segment(NamedTuple):
  """A part of a run.

  Attributes:
    params: at its checkpoints.
    rate: c, the learning rates that were applied in it.
    stage: which data it saw.
    rates: c of every entry where they differ, else None.
  """

  params: tuple[PyTree, ...]
  rate: float
  stage: int
  rates: PyTree = None


def segments(
  stages: Sequence[Stage], checkpoints: Sequence[Checkpoint], count: int
) -> list[Segment]:
  """Cuts every stage of a run into segments.

  Args:
    stages: of the run.
    checkpoints: of `runs.checkpoints`; the last of each stage is its end.
    count: segments of each stage, each of about as many checkpoints.

  Raises:
    ValueError: checkpoints that do not cover the run, or fewer of them than
      segments.
  """
  ends = np.cumsum(runs.lengths(stages))
  found = []
  for i, end in enumerate(ends):
    mine = [c for c in checkpoints if c.stage == i]
    if not mine or mine[-1].step != end:
      last = mine[-1].step if mine else None
      raise ValueError(
        f"stage {i} ends after step {end} and its last checkpoint is of step"
        f" {last}: segments must cover the run, so take one at {end}"
      )
    if not 1 <= count <= len(mine):
      raise ValueError(
        f"{count} segments of {len(mine)} checkpoints in stage {i}: each needs"
        " one or more"
      )
    alike = mine[-1].spread <= SPREAD
    begun, begun_rates = 0.0, jax.tree.map(jnp.zeros_like, mine[-1].rates)
    for part in np.array_split(np.arange(len(mine)), count):
      last = mine[part[-1]]
      params = tuple(mine[k].params for k in part)
      rates = jax.tree.map(jnp.subtract, last.rates, begun_rates)
      segment = Segment(params, last.rate - begun, i, None if alike else rates)
      found.append(segment)
      begun, begun_rates = last.rate, last.rates
  return found


def averaged(found: Sequence[Segment]) -> list[Segment]:
  """FAST-SOURCE: each segment at the mean of its checkpoints' parameters."""
  mean = lambda *xs: sum(xs) / len(xs)
  return [s._replace(params=(jax.tree.map(mean, *s.params),)) for s in found]


def scorer(
  found: Trace,
  objective: Objective,
  *,
  measurement: Loss | None = None,
  labels: str | Labels = "sampled",
  weight_decay: float = 0.0,
  query_batch: int = 64,
) -> Callable[..., dict[int, Scores]]:
  """Scores by SOURCE.

  Args:
    found: trace of `objective.outputs`.
    objective: model and likelihood, of every stage.
    measurement: m(params, query) -> scalar; the loss unless given.
    labels: of the curvatures: "sampled" as in the paper, "exact" or
      "empirical".
    weight_decay: λ of an optimizer that adds λ θ to the gradient, and gives all
      entries one rate.
    query_batch: queries held at a time, as in `influence.scorer`.

  Returns:
    score(segments, data, queries, *, params=None, key=None, loop=Loop()) ->
    {stage: Scores [N, Q]}. `data` is the training data of each stage; `params`
    where the run ended, the last checkpoint unless given; the key is for
    sampled labels.
  """
  fit = fitting.fitter(found, objective, methods=["ekfac"], labels=labels)
  score = influence.scorer(
    found, objective, measurement=measurement, query_batch=query_batch
  )

  def run(segments, data, queries, *, params=None, key=None, loop=Loop()):
    end = segments[-1].params[-1] if params is None else params
    later: tuple[Operator, ...] = ()
    total: dict[int, Scores] = {}
    for i, segment in reversed([*enumerate(segments)]):
      stage = loop.stage(f"segment {i + 1}")
      scales = None
      if segment.rates is not None:
        scales = rank_one(blocks.to_blocks(found, segment.rates))
      curvature = fit(
        segment.params[0],
        data[segment.stage],
        others=segment.params[1:],
        scales=scales,
        key=None if key is None else jax.random.fold_in(key, i),
        loop=stage,
      )["ekfac"]
      if scales is not None and weight_decay:
        raise ValueError(
          f"weight_decay={weight_decay} is of an optimizer with one rate for"
          f" all entries, and that of stage {segment.stage} has many: give 0"
        )
      rate = segment.rate if scales is None else 1.0
      generated = Chain(
        (*later, generation(curvature, rate, weight_decay, scales)),
        curvature.labels,
      )
      for j, point in enumerate(segment.params):
        scores = score(
          point,
          data[segment.stage],
          queries,
          {"source": generated},
          query_params=end,
          loop=stage.stage(f"checkpoint {j + 1}"),
        )["source"]
        values = scores.values / len(segment.params)
        before = total.get(segment.stage)
        total[segment.stage] = scores._replace(
          values=values if before is None else before.values + values
        )
      later = (*later, survival(curvature, rate, weight_decay, scales))
    return dict(sorted(total.items()))

  return run


def survival(
  curvature: Curvature,
  rate: float,
  weight_decay: float = 0.0,
  scales: Scales | None = None,
) -> Operator:
  """exp(−c (H + λ)): what is left of a perturbation after a segment.

  With scales v + P^(−1/2) (exp(−H') − I) P^(1/2) v, so that entries which do
  not move keep theirs.
  """
  x = lambda values: -rate * (jnp.maximum(values, 0) + weight_decay)
  if scales is None:
    return _response(curvature, lambda values: jnp.exp(x(values)), None)
  lost = _response(curvature, lambda values: jnp.expm1(x(values)), scales)
  inverse = {}
  for name, (inputs, outputs) in scales.items():
    p = (outputs[..., :, None] * inputs[..., None, :]) ** 2
    inverse[name] = jnp.where(p > 0, 1 / jnp.where(p > 0, p, 1), 0)
  return Sum((Identity(), Chain((lost, Scaled(inverse)))))


def generation(
  curvature: Curvature,
  rate: float,
  weight_decay: float = 0.0,
  scales: Scales | None = None,
) -> spectral.Response:
  """(I − exp(−c (H + λ))) (H + λ)⁻¹, which is c where H + λ is 0."""
  grown = functools.partial(_generated, rate=rate, weight_decay=weight_decay)
  return _response(curvature, grown, scales)


def rank_one(rates: Blocks) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Scales of inputs and outputs whose squared products are near the rates.

  Products of the sums of rows and of columns, which they keep (Shazeer and
  Stern 2018), exact where the rates of a group are of rank one. Negative ones
  count as 0.
  """

  def factored(c):
    c = jnp.maximum(c, 0)
    inputs, outputs = c.mean(axis=-2), c.mean(axis=-1)
    mean = inputs.mean(axis=-1, keepdims=True)
    inputs = inputs / jnp.where(mean > 0, mean, 1)
    return jnp.sqrt(inputs), jnp.sqrt(outputs)

  return {name: factored(c) for name, c in rates.items()}


def _response(
  curvature: Curvature,
  function: Callable[[jax.Array], jax.Array],
  scales: Scales | None,
) -> spectral.Response:
  """A function of the curvature, in scaled coordinates if there are scales."""
  if scales is None:
    return spectral.response(curvature, function)
  weights = {}
  for name, values in curvature.eigenvalues.items():
    (inputs, outputs), basis = scales[name], curvature.basis[name]
    # Sides with a basis have their scale in it.
    p = jnp.ones_like(values)
    if basis.inputs is None:
      p = p * inputs[..., None, :] ** 2
    if basis.outputs is None:
      p = p * outputs[..., :, None] ** 2
    weights[name] = function(values * p) * p
  return spectral.Response(curvature.basis, weights, None, curvature.labels)


def _generated(x: jax.Array, rate: float, weight_decay: float) -> jax.Array:
  x = jnp.maximum(x, 0) + weight_decay
  gone = -jnp.expm1(-rate * x)
  return jnp.where(x > 0, gone / jnp.where(x > 0, x, 1), rate)
