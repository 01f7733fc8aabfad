"""Decoders from and to folders of Hugging Face: config.json, safetensors.

  family, config, params = pretrained.load(folder)
  pretrained.save(folder, family, config, params)

Needs `safetensors` (extra `lm`), not torch. Weights come as float32. What a
folder says beyond what a `Decoder` can do is refused, not ignored; dropout is
left out.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from tda import extras
from tda.models import config as configs
from tda.models import weights
from tda.models.config import DecoderConfig
from tda.models.families import BUFFERS, FAMILIES, Family

PyTree = Any
Json = Mapping[str, Any]

_RUNNING = ("scan_layers", "scan_unroll", "remat", "dtype")


class Pretrained(NamedTuple):
  """A decoder of a family, with its parameters."""

  family: str
  config: DecoderConfig
  params: PyTree


def load(folder: str | Path, **running: Any) -> Pretrained:
  """Reads a folder, of one safetensors file or of several with an index.

  `running` are fields of the configuration that say how it is run, such as
  dtype or remat; or max_length, to take less of it where positions are rotary.

  Raises:
    ValueError: a model that a `Decoder` cannot be, a missing file, or names of
      weights that are missing or too many, all of them.
  """
  folder = Path(folder)
  raw = json.loads(_file(folder, "config.json").read_text())
  name = raw.get("model_type")
  if name not in FAMILIES:
    raise ValueError(
      f"{folder} holds a model of type {name!r}; known are"
      f" {', '.join(FAMILIES)}"
    )
  config = dataclasses.replace(from_json(raw), **running)
  source = _prefixed(_source(folder), FAMILIES[name])
  table = FAMILIES[name].weights
  return Pretrained(
    name, config, weights.read(config, table, source, ignored=BUFFERS)
  )


def save(
  folder: str | Path, family: str, config: DecoderConfig, params: PyTree
) -> None:
  """Writes a folder that `load` and `transformers` read.

  Raises:
    ValueError: a configuration that the family cannot express.
  """
  folder = Path(folder)
  raw = to_json(family, config)
  arrays = weights.write(config, FAMILIES[family].weights, params)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / "model.safetensors"
  _safetensors("numpy").save_file(arrays, path, metadata={"format": "pt"})
  (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def from_json(raw: Json) -> DecoderConfig:
  """The configuration that a config.json describes."""
  name = raw["model_type"]
  family, raw = FAMILIES[name], _rotary(raw)
  window = raw.pop("sliding_window", None)
  wrong = {
    key: raw[key]
    for key, value in family.fixed.items()
    if key in raw and raw[key] != value
  }
  activation = _activation(family)
  kind = raw.get(activation, next(iter(family.mlps)))
  if kind not in family.mlps:
    wrong[activation] = kind
  if wrong:
    raise ValueError(f"{name} with {wrong} is not what a Decoder can be")
  fields = {
    ours: raw[theirs] for ours, theirs in family.fields.items() if theirs in raw
  }
  if window is not None and raw.get("use_sliding_window", True):
    # Where no sequence is longer than its window, attention sees all of it.
    fields["max_length"] = min(window, fields["max_length"])
  return _resolved(configs.like(name, **{**fields, "mlp": family.mlps[kind]}))


def to_json(name: str, config: DecoderConfig) -> dict[str, Any]:
  """The config.json of a decoder, for a family that can express it."""
  if name not in FAMILIES:
    raise ValueError(
      f"unknown family {name!r}; choose from {', '.join(FAMILIES)}"
    )
  family, whole = FAMILIES[name], _resolved(config)
  raw = {
    "model_type": name,
    "architectures": [family.architecture],
    "dtype": "float32",
    "bos_token_id": None,
    "eos_token_id": None,
    **family.fixed,
  }
  for ours, theirs in family.fields.items():
    raw[theirs] = getattr(whole, ours)
  for theirs, ours in family.mlps.items():
    if ours == config.mlp:
      raw.setdefault(_activation(family), theirs)
  if config.positions == "rotary":
    keys = ("rope_theta", "partial_rotary_factor")
    scale = {key: raw[key] for key in keys if key in raw}
    raw["rope_parameters"] = {"rope_type": "default", **scale}
  expressed = dataclasses.asdict(_resolved(from_json(raw)))
  lost = {
    key: value
    for key, value in dataclasses.asdict(whole).items()
    if key not in _RUNNING and expressed[key] != value
  }
  if lost:
    raise ValueError(
      f"{name} has no {', '.join(f'{k}={v!r}' for k, v in lost.items())}:"
      " save it as another family, or with Orbax (tda.checkpoints)"
    )
  return raw


def _activation(family: Family) -> str:
  gpt2 = "n_embd" in family.fields.values()
  return "activation_function" if gpt2 else "hidden_act"


def _resolved(config: DecoderConfig) -> DecoderConfig:
  """With all sizes said."""
  return dataclasses.replace(
    config,
    kv_heads=config.groups,
    head_width=config.channels,
    mlp_width=config.hidden,
  )


def _rotary(raw: Json) -> dict[str, Any]:
  """A config.json with rotary options where older versions had them."""
  found = dict(raw)
  scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  if kind != "default":
    raise ValueError(f"rotary positions of type {kind!r} are not supported")
  found.update(scaling)
  older = {
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
  }
  for old, new in older.items():
    if old in raw:
      found.setdefault(new, raw[old])
  return found


def _file(folder: Path, name: str) -> Path:
  path = folder / name
  if not path.is_file():
    raise ValueError(
      f"there is no {path}; a folder of Hugging Face holds config.json and"
      " model.safetensors, or model.safetensors.index.json and its parts"
    )
  return path


def _source(folder: Path) -> weights.Source:
  """Name -> reads that array, over all files of the folder."""
  index = folder / "model.safetensors.index.json"
  if index.is_file():
    names = json.loads(index.read_text())["weight_map"]
    files = [_file(folder, name) for name in sorted(set(names.values()))]
  else:
    files = [_file(folder, "model.safetensors")]
  found = {}
  for path in files:
    file = _safetensors().safe_open(path, framework="flax")
    for name in file.keys():
      found[name] = functools.partial(_array, file, name)
  return found


def _array(file: Any, name: str) -> np.ndarray:
  return np.asarray(file.get_tensor(name), np.float32)


def _prefixed(source: weights.Source, family: Family) -> weights.Source:
  """Names in full: GPT-2 was published without the prefix."""
  if any(name.startswith(family.prefix) for name in source):
    return source
  return {
    name if name == "lm_head.weight" else family.prefix + name: read
    for name, read in source.items()
  }


def _safetensors(part: str = "") -> ModuleType:
  name = "safetensors" + (part and f".{part}")
  return extras.package(name, "reading Hugging Face's weights", "lm")
