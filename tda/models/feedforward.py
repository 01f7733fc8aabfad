"""The position-wise half of a block: an MLP, or experts behind a router.

Notation: T positions, D width, F hidden units, E experts.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from tda.models.config import DecoderConfig

Dense = Callable[..., nn.Module]  # (outputs, name=) -> module


def feed_forward(
  config: DecoderConfig, x_TxD: jax.Array, dense: Dense | None = None
) -> jax.Array:
  """mlp_out(gelu(mlp_in x)) or mlp_out(silu(mlp_gate x) ∘ mlp_in x).

  Called in a module, whose parameters the layers become.
  """
  if dense is None:
    dense = functools.partial(
      nn.Dense, use_bias=config.mlp_bias, dtype=config.dtype
    )
  h_TxF = dense(config.hidden, name="mlp_in")(x_TxD)
  if config.mlp == "swiglu":
    h_TxF = nn.silu(dense(config.hidden, name="mlp_gate")(x_TxD)) * h_TxF
  else:
    h_TxF = nn.gelu(h_TxF, approximate=config.mlp == "gelu_tanh")
  return dense(x_TxD.shape[-1], name="mlp_out")(h_TxF)


class Experts(nn.Module):
  """A router's softmax over its best experts weighs their outputs (Mixtral).

  Every token goes through every expert, as zeros where it is not given to it:
  no token is dropped, the cost is that of all experts, and the statistics of an
  expert's inputs are those of its own tokens. Without biases zeros stay zeros.
  """

  config: DecoderConfig

  @nn.compact
  def __call__(self, x_TxD: jax.Array) -> jax.Array:
    config = self.config
    router = nn.Dense(config.experts, False, dtype=jnp.float32, name="router")
    logits_TxE = router(x_TxD.astype(jnp.float32))
    _, best_TxA = jax.lax.top_k(logits_TxE, config.active_experts)
    given_TxE = nn.one_hot(best_TxA, config.experts, dtype=bool).any(axis=1)
    weights_TxE = nn.softmax(jnp.where(given_TxE, logits_TxE, -jnp.inf))
    x_ExTxD = jnp.where(given_TxE.T[..., None], x_TxD[None], 0)
    dense = functools.partial(
      nn.DenseGeneral,
      batch_dims=(0,),
      use_bias=False,
      dtype=config.dtype,
      kernel_init=_each_expert(config.experts),
    )
    y_ExTxD = feed_forward(config, x_ExTxD, dense)
    return jnp.einsum("te,etd->td", weights_TxE.astype(config.dtype), y_ExTxD)


def _each_expert(experts: int) -> nn.initializers.Initializer:
  """LeCun's for one expert: Flax takes all of them for one fan-in."""
  return nn.initializers.variance_scaling(experts, "fan_in", "truncated_normal")
