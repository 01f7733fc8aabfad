"""Weights of Hugging Face: the same logits as `transformers`, both ways."""

import json
import sys

import jax
import numpy as np
import pytest
from language_models import EXTRA, draw, tiny, tokens

from tda.data import text
from tda.models import config as configs
from tda.models import decoder, gguf, layouts, pretrained

files = pytest.importorskip("safetensors.numpy")
jax_files = pytest.importorskip("safetensors.flax")


def logits(config, params, x):
  apply = jax.jit(decoder.Decoder(config).apply)
  return np.asarray(apply({"params": params}, x))


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def torch():
  pytest.importorskip("transformers")
  return pytest.importorskip("torch")


def theirs(folder, torch, x):
  """Logits of `transformers` for the model in a folder, all weights used."""
  auto = pytest.importorskip("transformers").AutoModelForCausalLM
  model, info = auto.from_pretrained(
    folder, output_loading_info=True, attn_implementation="eager"
  )
  assert not any(info.values()), info
  with torch.no_grad():
    return model(torch.tensor(x[None], dtype=torch.long)).logits[0].numpy()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", EXTRA)
def test_saved_decoders_are_those_of_transformers(
  family, tied, tmp_path, torch
):
  config = tiny(family, tie_embeddings=tied)
  params, x = draw(config), tokens(12)
  pretrained.save(tmp_path, family, config, params)
  np.testing.assert_allclose(
    logits(config, params, x),
    theirs(tmp_path, torch, x),
    rtol=1e-4,
    atol=1e-4,
  )


PUBLISHED = {
  "gpt2": ("GPT2", {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}),
  "llama": (
    "Llama",
    {"num_key_value_heads": 2, "rope_theta": 500.0, "attention_bias": True},
  ),
  "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.25, "rotary_emb_base": 700.0}),
  "mixtral": (
    "Mixtral",
    {"num_key_value_heads": 2, "num_local_experts": 4, "rms_norm_eps": 0.01},
  ),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_models_of_transformers_load(family, tmp_path, torch):
  """From a folder of several files, and back to the same arrays."""
  transformers = pytest.importorskip("transformers")
  name, options = PUBLISHED[family]
  sizes = (
    {}
    if family == "gpt2"
    else dict(
      hidden_size=16,
      num_hidden_layers=2,
      num_attention_heads=2 if family == "gpt_neox" else 4,
      intermediate_size=20,
      max_position_embeddings=16,
    )
  )
  config = getattr(transformers, f"{name}Config")(
    vocab_size=13,
    initializer_range=0.5,
    bos_token_id=None,
    eos_token_id=None,
    **{**sizes, **options},
  )
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config)
  model.save_pretrained(tmp_path, max_shard_size="4KB")
  assert (tmp_path / "model.safetensors.index.json").exists()
  found = pretrained.load(tmp_path, scan_layers=False)
  x = tokens(12)
  ours = logits(found.config, found.params, x)
  np.testing.assert_allclose(
    ours, theirs(tmp_path, torch, x), rtol=1e-4, atol=1e-4
  )
  assert ours.std() > 0.1
  pretrained.save(tmp_path / "again", *found)
  again = pretrained.load(tmp_path / "again", scan_layers=False)
  assert again.config == found.config
  equal(again.params, found.params)


@pytest.fixture
def saved(tmp_path):
  """A Llama's folder, and how to change it."""
  config = tiny("llama")
  pretrained.save(tmp_path, "llama", config, draw(config))

  def change(drop=(), add=(), **raw):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **raw}))
    file = tmp_path / "model.safetensors"
    arrays = {k: v for k, v in files.load_file(file).items() if k not in drop}
    files.save_file({**arrays, **dict.fromkeys(add, np.zeros(2, "f4"))}, file)
    return tmp_path

  return change


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"drop": ["model.norm.weight", "lm_head.weight"], "add": ["x", "y"]},
      r"missing \['lm_head.weight', 'model.norm.weight'\], unexpected"
      r" \['x', 'y'\]",
    ),
    ({"mlp_bias": True}, "missing .*layers.0.mlp.down_proj.bias"),
    ({"vocab_size": 5}, r"embed_tokens.weight of shape \(13, 8\) does not fit"),
    ({"model_type": "bert"}, "type 'bert'; known are gpt2, llama"),
    ({"hidden_act": "relu"}, "llama with {'hidden_act': 'relu'} is not"),
    (
      {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}},
      "type 'yarn' are not supported",
    ),
  ],
)
def test_other_folders_are_refused(changes, message, saved):
  with pytest.raises(ValueError, match=message):
    pretrained.load(saved(**changes))


def test_missing_files_are_named(saved):
  folder = saved()
  (folder / "model.safetensors").unlink()
  with pytest.raises(ValueError, match=r"no .*model\.safetensors; a folder of"):
    pretrained.load(folder)
  with pytest.raises(ValueError, match=r"no .*config\.json"):
    pretrained.load(folder / "nothing")


def test_older_names_and_buffers(tmp_path):
  """GPT-2 as it was published: no prefix, masks among the weights."""
  config = tiny("gpt2")
  params = draw(config)
  pretrained.save(tmp_path, "gpt2", config, params)
  file = tmp_path / "model.safetensors"
  arrays = {
    k.removeprefix("transformer."): v for k, v in files.load_file(file).items()
  }
  files.save_file(
    {**arrays, "h.0.attn.bias": np.ones((1, 1, 16, 16), "f4")}, file
  )
  equal(pretrained.load(tmp_path).params, params)


def test_older_configurations():
  neox = {"model_type": "gpt_neox", "vocab_size": 9, "hidden_size": 32}
  sizes = {"num_attention_heads": 2, "num_hidden_layers": 1}
  found = pretrained.from_json(
    {**neox, **sizes, "rotary_pct": 0.5, "rotary_emb_base": 500}
  )
  assert (found.rotated, found.rotary_base) == (8, 500)
  window = {"sliding_window": 8, "max_position_embeddings": 32}
  mistral = {**neox, **sizes, "model_type": "mistral", **window}
  assert pretrained.from_json(mistral).max_length == 8
  qwen = {**mistral, "model_type": "qwen2", "use_sliding_window": False}
  assert pretrained.from_json(qwen).max_length == 32


def test_what_a_family_lacks_is_not_lost(tmp_path):
  config = tiny("llama", norm="layer", parallel=True)
  with pytest.raises(ValueError, match="llama has no norm='layer', parallel="):
    pretrained.save(tmp_path, "llama", config, draw(config))
  with pytest.raises(ValueError, match="unknown family 'gemma'"):
    pretrained.to_json("gemma", config)
  config = tiny("llama")
  wrong = layouts.unstack(draw(config))
  with pytest.raises(ValueError, match="are not those of the configuration"):
    pretrained.save(tmp_path, "llama", config, wrong)


@pytest.mark.parametrize(
  ("package", "extra", "call"),
  [
    ("safetensors", "lm", lambda path: pretrained.load(path.parent)),
    ("gguf", "smollm2", gguf.load),
    ("tokenizers", "lm", text.tokenizer),
  ],
)
def test_a_missing_package_names_its_extra(
  package, extra, call, saved, monkeypatch
):
  path = saved() / "tokenizer.json"
  path.write_text("{}")
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ImportError, match=rf"tda-jax\[{extra}\]"):
    call(path)


def test_bfloat16_files(tmp_path):
  config = configs.like("gpt_neox", 13, width=16, layers=1, heads=2)
  params = draw(config)
  pretrained.save(tmp_path, "gpt_neox", config, params)
  file = tmp_path / "model.safetensors"
  jax_files.save_file(
    {k: v.astype("bfloat16") for k, v in jax_files.load_file(file).items()},
    file,
  )
  half = jax.tree.map(lambda x: x.astype("bfloat16").astype("f4"), params)
  equal(pretrained.load(tmp_path).params, half)
