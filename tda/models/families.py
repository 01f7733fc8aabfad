"""How Hugging Face and llama.cpp name what a decoder has, a table each."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tda.models import weights
from tda.models.weights import Form, Weight


class Family(NamedTuple):
  """A `model_type` of `transformers`.

  Attributes:
    architecture: its class with a head for the next token.
    prefix: of all names but the head's; some published files lack it.
    fields: our field -> theirs in config.json.
    mlps: their activation -> our `mlp`; the first of each is written.
    fixed: their options -> the only value that is understood.
    weights: the table of names.
  """

  architecture: str
  prefix: str
  fields: Mapping[str, str]
  mlps: Mapping[str, str]
  fixed: Mapping[str, Any]
  weights: tuple[Weight, ...]


def _linear(
  theirs: str, *ours: str, form: Form, bias: Form = weights.FLAT
) -> tuple[Weight, Weight]:
  """A kernel and its bias, which a decoder may lack."""
  return (
    Weight(f"{theirs}.weight", tuple(f"{x}/kernel" for x in ours), form),
    Weight(f"{theirs}.bias", tuple(f"{x}/bias" for x in ours), bias),
  )


def _norm(theirs: str, ours: str) -> tuple[Weight, Weight]:
  return (
    Weight(f"{theirs}.weight", (f"{ours}/scale",), weights.AS_IT_IS),
    Weight(f"{theirs}.bias", (f"{ours}/bias",), weights.AS_IT_IS),
  )


def _table(theirs: str, ours: str) -> Weight:
  return Weight(f"{theirs}.weight", (f"{ours}/embedding",), weights.AS_IT_IS)


_QKV = tuple(f"blocks/attention/{name}" for name in ("query", "key", "value"))
_OUTPUT = "blocks/attention/output"


def _gpt2() -> tuple[Weight, ...]:
  block = "transformer.h.{layer}"
  conv, conv_out = weights.CONV, weights.CONV_OUT
  beside = {"form": weights.BESIDE, "bias": weights.BESIDE}
  return (
    _table("transformer.wte", "tokens"),
    _table("transformer.wpe", "positions"),
    *_norm(f"{block}.ln_1", "blocks/norm_attention"),
    *_linear(f"{block}.attn.c_attn", *_QKV, **beside),
    *_linear(f"{block}.attn.c_proj", _OUTPUT, form=conv_out),
    *_norm(f"{block}.ln_2", "blocks/norm_mlp"),
    *_linear(f"{block}.mlp.c_fc", "blocks/mlp_in", form=conv),
    *_linear(f"{block}.mlp.c_proj", "blocks/mlp_out", form=conv),
    *_norm("transformer.ln_f", "norm"),
    *_linear("lm_head", "head", form=weights.LINEAR),
  )


def _gpt_neox() -> tuple[Weight, ...]:
  block, linear = "gpt_neox.layers.{layer}", weights.LINEAR
  by_head = {"form": weights.BY_HEAD, "bias": weights.BY_HEAD}
  out = weights.LINEAR_OUT
  return (
    _table("gpt_neox.embed_in", "tokens"),
    *_norm(f"{block}.input_layernorm", "blocks/norm_attention"),
    *_linear(f"{block}.attention.query_key_value", *_QKV, **by_head),
    *_linear(f"{block}.attention.dense", _OUTPUT, form=out),
    *_norm(f"{block}.post_attention_layernorm", "blocks/norm_mlp"),
    *_linear(f"{block}.mlp.dense_h_to_4h", "blocks/mlp_in", form=linear),
    *_linear(f"{block}.mlp.dense_4h_to_h", "blocks/mlp_out", form=linear),
    *_norm("gpt_neox.final_layer_norm", "norm"),
    *_linear("embed_out", "head", form=linear),
  )


def _llama() -> tuple[Weight, ...]:
  """With the names of Mixtral's experts, which Llama has none of."""
  block, linear = "model.layers.{layer}", weights.LINEAR
  experts = f"{block}.block_sparse_moe"
  mlps = {"gate_proj": "mlp_gate", "up_proj": "mlp_in", "down_proj": "mlp_out"}
  each = {"w1": "mlp_gate", "w3": "mlp_in", "w2": "mlp_out"}
  rows = [
    _table("model.embed_tokens", "tokens"),
    *_norm(f"{block}.input_layernorm", "blocks/norm_attention"),
    *_norm(f"{block}.post_attention_layernorm", "blocks/norm_mlp"),
    *_norm("model.norm", "norm"),
    *_linear("lm_head", "head", form=linear),
    *_linear(f"{experts}.gate", "blocks/experts/router", form=linear),
  ]
  for theirs, ours in zip("qkv", _QKV, strict=True):
    rows += _linear(f"{block}.self_attn.{theirs}_proj", ours, form=linear)
  rows += _linear(f"{block}.self_attn.o_proj", _OUTPUT, form=weights.LINEAR_OUT)
  for theirs, ours in mlps.items():
    rows += _linear(f"{block}.mlp.{theirs}", f"blocks/{ours}", form=linear)
  for theirs, ours in each.items():
    name = f"{experts}.experts.{{expert}}.{theirs}"
    rows += _linear(name, f"blocks/experts/{ours}", form=linear)
  return tuple(rows)


def _llama_cpp() -> tuple[Weight, ...]:
  """GGUF files of the architecture "llama", without biases."""
  block, linear = "blk.{layer}", weights.LINEAR
  rows = [
    _table("token_embd", "tokens"),
    *_norm("output_norm", "norm"),
    *_norm(f"{block}.attn_norm", "blocks/norm_attention"),
    *_norm(f"{block}.ffn_norm", "blocks/norm_mlp"),
    *_linear("output", "head", form=linear),
  ]
  forms = (weights.ADJACENT, weights.ADJACENT, linear)
  for theirs, ours, form in zip("qkv", _QKV, forms, strict=True):
    rows += _linear(f"{block}.attn_{theirs}", ours, form=form)
  out = weights.LINEAR_OUT
  rows += _linear(f"{block}.attn_output", _OUTPUT, form=out)
  for theirs, ours in (("gate", "gate"), ("up", "in"), ("down", "out")):
    rows += _linear(f"{block}.ffn_{theirs}", f"blocks/mlp_{ours}", form=linear)
  return tuple(rows)


_SIZES = {
  "vocab": "vocab_size",
  "width": "hidden_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "mlp_width": "intermediate_size",
  "max_length": "max_position_embeddings",
  "rotary_base": "rope_theta",
  "tie_embeddings": "tie_word_embeddings",
}
_LLAMA_FIELDS = {
  **_SIZES,
  "kv_heads": "num_key_value_heads",
  "head_width": "head_dim",
  "norm_eps": "rms_norm_eps",
}
_BIASES = {
  "qkv_bias": "attention_bias",
  "output_bias": "attention_bias",
  "mlp_bias": "mlp_bias",
}
_SILU = {"silu": "swiglu"}
_GELU = {
  "gelu_new": "gelu_tanh",
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
}
_NO_WINDOW = {"sliding_window": None}
BUFFERS = ("*.attn.bias", "*.attention.bias", "*.masked_bias", "*.inv_freq")
"""Names of what older files hold beside parameters."""


def _like_llama(
  architecture: str, extra: Mapping[str, str], fixed: Mapping[str, Any]
) -> Family:
  return Family(
    architecture,
    "model.",
    {**_LLAMA_FIELDS, **extra},
    _SILU,
    fixed,
    _llama(),
  )


FAMILIES: Mapping[str, Family] = {
  "gpt2": Family(
    "GPT2LMHeadModel",
    "transformer.",
    {
      "vocab": "vocab_size",
      "width": "n_embd",
      "layers": "n_layer",
      "heads": "n_head",
      "mlp_width": "n_inner",
      "max_length": "n_positions",
      "norm_eps": "layer_norm_epsilon",
      "tie_embeddings": "tie_word_embeddings",
    },
    _GELU,
    {
      "scale_attn_weights": True,
      "scale_attn_by_inverse_layer_idx": False,
      "add_cross_attention": False,
    },
    _gpt2(),
  ),
  "llama": _like_llama("LlamaForCausalLM", _BIASES, {}),
  "mistral": _like_llama("MistralForCausalLM", {}, _NO_WINDOW),
  "mixtral": _like_llama(
    "MixtralForCausalLM",
    {"experts": "num_local_experts", "active_experts": "num_experts_per_tok"},
    _NO_WINDOW,
  ),
  "qwen2": _like_llama("Qwen2ForCausalLM", {}, {"use_sliding_window": False}),
  "gpt_neox": Family(
    "GPTNeoXForCausalLM",
    "gpt_neox.",
    {
      **_SIZES,
      "norm_eps": "layer_norm_eps",
      "rotary_fraction": "partial_rotary_factor",
      "parallel": "use_parallel_residual",
      "qkv_bias": "attention_bias",
      "output_bias": "attention_bias",
    },
    _GELU,
    {},
    _gpt_neox(),
  ),
}

LLAMA_CPP = _llama_cpp()
