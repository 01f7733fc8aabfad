"""Labels of a curvature: which output gradients its outer products come from.

The curvature of one example is Σ_k g_k g_kᵀ with g_k = Jᵀ c_k, J the Jacobian
of the outputs and c_k the output cotangents given here, by kind:

  exact      K = outputs.size   Σ_k c_k c_kᵀ = H, the Gauss-Newton Hessian
  sampled:n  K = n              the same in expectation over the drawn labels
  empirical  K = 1              gradients at the data's labels; another matrix

The cost is one forward pass and K backward passes per example.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tda.likelihoods import Objective, PyTree, upcast

KINDS = ("exact", "empirical", "sampled")
Key = jax.Array | None
# (outputs, example, key or None) -> [K, *outputs.shape], float32 or wider
Cotangents = Callable[..., jax.Array]


class Labels(NamedTuple):
  """A kind of label, and how many are drawn per example."""

  kind: str  # one of KINDS
  samples: int = 0  # 1 or more if sampled, else 0


def parse(name: str | Labels) -> Labels:
  """Labels from "exact", "empirical", "sampled" (one draw) or "sampled:K"."""
  if isinstance(name, Labels):
    drawn = name.kind == "sampled"
    if name.kind in KINDS and (name.samples > 0) == drawn:
      return name
  elif name in ("exact", "empirical"):
    return Labels(name)
  elif name == "sampled":
    return Labels(name, 1)
  elif str(name).startswith("sampled:"):
    draws = name.removeprefix("sampled:")
    if draws.isdecimal() and int(draws) > 0:
      return Labels("sampled", int(draws))
  raise ValueError(
    f'labels {name!r}: choose "exact", "empirical", "sampled" (one draw per'
    ' example), or "sampled:K" with a whole number K of 1 or more.'
  )


def count(labels: str | Labels, outputs_shape: tuple[int, ...]) -> int:
  """K, the backward passes per example."""
  labels = parse(labels)
  sizes = {"exact": math.prod(outputs_shape), "empirical": 1}
  return sizes.get(labels.kind, labels.samples)


def cotangents(objective: Objective, labels: str | Labels) -> Cotangents:
  """The K output cotangents of ONE example.

  Only sampled labels use the key, one per example; they raise `ValueError`
  without it. The cotangents are float32 or wider: cast them to the
  outputs' dtype before a backward pass.
  """
  labels = parse(labels)
  likelihood = objective.likelihood
  gradient = jax.grad(likelihood.loss)

  def exact(outputs: jax.Array, target: PyTree, key: Key) -> jax.Array:
    del key
    basis = jnp.eye(outputs.size, dtype=outputs.dtype)
    return jax.vmap(likelihood.sqrt_hessian, (None, None, 0))(
      outputs, target, basis.reshape(-1, *outputs.shape)
    )

  def empirical(outputs: jax.Array, target: PyTree, key: Key) -> jax.Array:
    del key
    return gradient(outputs, target)[None]

  def sampled(outputs: jax.Array, target: PyTree, key: Key) -> jax.Array:
    if key is None:
      raise ValueError(
        f"labels {labels.kind}:{labels.samples} are drawn at random: give a"
        ' key per example, or use "exact" or "empirical".'
      )
    draws = jax.vmap(likelihood.sample, (0, None, None))(
      jax.random.split(key, labels.samples), outputs, target
    )
    drawn = jax.vmap(gradient, (None, 0))(outputs, draws)
    scale = jnp.sqrt(labels.samples * likelihood.factor(target))
    return drawn / scale.astype(drawn.dtype)

  rule = {"exact": exact, "empirical": empirical, "sampled": sampled}

  def apply(outputs: jax.Array, example: PyTree, key: Key = None) -> jax.Array:
    return rule[labels.kind](upcast(outputs), objective.target(example), key)

  return apply
