"""Tiny decoders of every family, with parameters drawn in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from tda.models import config as configs
from tda.models import decoder

VOCAB = 13
SIZES = {"width": 8, "layers": 2, "heads": 4, "mlp_width": 12, "max_length": 16}
EXTRA = {
  "gpt2": {"mlp_width": None},
  "llama": {"kv_heads": 2, "head_width": 4},
  "mistral": {"kv_heads": 1, "tie_embeddings": True},
  "mixtral": {"kv_heads": 2, "experts": 3},
  "qwen2": {"kv_heads": 2, "tie_embeddings": True},
  "gpt_neox": {"heads": 2, "rotary_fraction": 0.5},
}


def tiny(family, **fields):
  return configs.like(family, VOCAB, **{**SIZES, **EXTRA[family], **fields})


def draw(config, seed=0, scale=0.4):
  """Scales near 1, the rest normal: `init` itself is slow to compile."""
  rng = np.random.default_rng(seed)

  def leaf(path, like):
    centre = path[-1].key == "scale"
    values = centre + scale * rng.normal(size=like.shape)
    return jnp.asarray(values, like.dtype)

  return jax.tree_util.tree_map_with_path(leaf, decoder.shapes(config))


def tokens(length=10, seed=1):
  return np.random.default_rng(seed).integers(0, VOCAB, length, np.int32)
