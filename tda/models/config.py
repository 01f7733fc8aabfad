"""What a decoder looks like, and the choices of published families."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

POSITIONS = ("learned", "rotary")
NORMS = ("layer", "rms")
MLPS = ("gelu", "gelu_tanh", "swiglu")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Sizes and choices of a decoder; the defaults are GPT-2's, untied.

  Attributes:
    vocab: entries of the vocabulary.
    width: of the residual stream.
    layers: number of blocks.
    heads: query heads.
    kv_heads: key and value heads, each shared by heads / kv_heads query heads
      (Ainslie et al. 2023); None: as many as query heads.
    head_width: channels of a head; None: width / heads.
    mlp_width: hidden units of an MLP; None: 4 · width.
    max_length: the most tokens of a sequence.
    positions: "learned" embeddings or "rotary" (Su et al. 2021), with the two
      halves of the rotated channels as pairs.
    rotary_base: θ, the ratio of the slowest to the fastest wavelength.
    rotary_fraction: share of a head's channels that is rotated.
    norm: "layer" or "rms", at the input of attention, MLP and head.
    norm_eps: added to the variance.
    mlp: "gelu" (exact), "gelu_tanh" or "swiglu" (Shazeer 2020).
    qkv_bias: whether query, key and value have biases.
    output_bias: whether the output of attention has one.
    mlp_bias: whether the MLP has biases.
    parallel: attention and MLP read the same residual and are added together.
    tie_embeddings: the head is the embedding transposed.
    experts: MLPs of a block; 0: one, without a router.
    active_experts: how many a token is given to.
    scan_layers: blocks in one loop, parameters stacked.
    scan_unroll: blocks per iteration of the loop.
    remat: "none", "full" (only the blocks' inputs are kept for the backward
      pass) or the name of a policy in `jax.checkpoint_policies`.
    dtype: of activations. Parameters, softmax, norms and logits are float32.
  """

  vocab: int
  width: int = 256
  layers: int = 6
  heads: int = 4
  kv_heads: int | None = None
  head_width: int | None = None
  mlp_width: int | None = None
  max_length: int = 256
  positions: str = "learned"
  rotary_base: float = 10_000.0
  rotary_fraction: float = 1.0
  norm: str = "layer"
  norm_eps: float = 1e-6
  mlp: str = "gelu_tanh"
  qkv_bias: bool = True
  output_bias: bool = True
  mlp_bias: bool = True
  parallel: bool = False
  tie_embeddings: bool = False
  experts: int = 0
  active_experts: int = 2
  scan_layers: bool = True
  scan_unroll: int = 1
  remat: str = "none"
  dtype: Any = jnp.float32

  def __post_init__(self):
    _one_of("positions", self.positions, POSITIONS)
    _one_of("norm", self.norm, NORMS)
    _one_of("mlp", self.mlp, MLPS)
    policies = [p for p in dir(jax.checkpoint_policies) if p[0] != "_"]
    _one_of("remat", self.remat, ("none", "full", *policies))
    if self.head_width is None and self.width % self.heads:
      raise ValueError(
        f"width={self.width} must be a multiple of heads={self.heads}, or"
        " head_width be given"
      )
    if self.groups < 1 or self.heads % self.groups:
      raise ValueError(
        f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads},"
        " one or more"
      )
    if self.positions == "rotary" and (
      self.rotated % 2 or not 0 < self.rotated <= self.channels
    ):
      raise ValueError(
        f"rotary_fraction={self.rotary_fraction} of {self.channels} channels"
        f" rotates {self.rotated} of them; it must be an even number above 0"
      )
    if self.experts and not 0 < self.active_experts <= self.experts:
      raise ValueError(
        f"active_experts={self.active_experts} must be 1 to"
        f" experts={self.experts}"
      )
    if self.experts and self.mlp_bias:
      raise ValueError("experts have no biases: give mlp_bias=False")

  @property
  def groups(self) -> int:
    """Key and value heads."""
    return self.heads if self.kv_heads is None else self.kv_heads

  @property
  def channels(self) -> int:
    """Of a head."""
    return self.head_width or self.width // self.heads

  @property
  def rotated(self) -> int:
    """Channels of a head that rotary positions act on."""
    return int(self.rotary_fraction * self.channels)

  @property
  def hidden(self) -> int:
    """Hidden units of an MLP."""
    return self.mlp_width or 4 * self.width


_LLAMA: Mapping[str, Any] = {
  "positions": "rotary",
  "norm": "rms",
  "mlp": "swiglu",
  "qkv_bias": False,
  "output_bias": False,
  "mlp_bias": False,
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
  "gpt2": {"tie_embeddings": True, "norm_eps": 1e-5},
  "llama": _LLAMA,
  "mistral": _LLAMA,
  "mixtral": {**_LLAMA, "experts": 8, "norm_eps": 1e-5},
  "qwen2": {**_LLAMA, "qkv_bias": True},
  "gpt_neox": {
    "positions": "rotary",
    "rotary_fraction": 0.25,
    "norm_eps": 1e-5,
    "mlp": "gelu",
    "parallel": True,
  },
}


def like(family: str, vocab: int, **fields: Any) -> DecoderConfig:
  """A decoder with the choices of a family, "gpt2", "llama", ...

  `fields` are sizes, and whatever differs from the family.
  """
  _one_of("family", family, tuple(FAMILIES))
  return DecoderConfig(vocab, **{**FAMILIES[family], **fields})


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ValueError(
      f"unknown {name} {value!r}; choose from {', '.join(choices)}"
    )
