"""Decoders of every family: packing, layouts, dtypes, experts, capture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capture_checks import check_gradients, first
from language_models import EXTRA, VOCAB, draw, tiny, tokens

from tda import blocks
from tda.models import config as configs
from tda.models import decoder, feedforward, layouts

FAMILIES = ("gpt2", "llama", "mixtral", "gpt_neox")


def logits(config, params, *args):
  apply = jax.jit(decoder.Decoder(config).apply)
  return np.asarray(apply({"params": params}, *args))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_document_is_as_if_alone(family):
  config = tiny(family)
  params, x = draw(config), tokens(10)
  segments = np.array([1, 1, 1, 1, 2, 3, 3, 3, 0, 0])
  packed = logits(config, params, x, segments)
  apply = jax.jit(decoder.Decoder(config).apply)  # one program for each length
  for number in (1, 2, 3):
    inside = segments == number
    alone = apply({"params": params}, x[inside])
    np.testing.assert_allclose(packed[inside], alone, rtol=1e-5, atol=1e-5)
  together = logits(config, params, x)
  assert np.abs(together - packed)[5:].max() > 0.01


@pytest.mark.parametrize("family", EXTRA)
def test_every_parameter_is_captured(family):
  """Per-example gradients of packed rows are those of `vmap(grad)`."""
  config = tiny(family, scan_layers=family != "gpt_neox")
  params, loss = draw(config), decoder.objective(config).loss
  x = np.stack([tokens(6, seed) for seed in range(3)])
  batch = {
    "x": jnp.asarray(x[:, :-1]),
    "y": jnp.asarray(x[:, 1:]),
    "segments": jnp.asarray([[1, 1, 1, 2, 2]] * 3),
    "mask": jnp.asarray([[1, 1, 0, 1, 1], [1, 1, 0, 1, 0], [0, 1, 0, 1, 1]]),
  }
  tied = config.tie_embeddings  # a lookup and a product: no common factors
  found = blocks.trace(loss, params, first(batch), strict=not tied)
  generic = [b.name for b in found.blocks.values() if b.reason]
  assert generic == ["tokens/embedding"] * tied
  covered = sum(block.size for block in found.blocks.values())
  assert covered == sum(leaf.size for leaf in jax.tree.leaves(params))
  if config.experts:
    hidden = found.blocks["blocks/experts/mlp_in/kernel"]
    assert (hidden.stack, hidden.shape) == ((2,), (3, 12, 8))
  check_gradients(found, loss, params, batch, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral"])
def test_loops_and_remat_change_nothing(family):
  segments = np.array([1, 1, 1, 2, 2, 2])

  def gradient(params, **options):
    module = decoder.Decoder(tiny(family, **options))

    def total(params):
      found = module.apply({"params": params}, tokens(6), segments)
      return jnp.sum(jnp.sin(found))

    return jax.jit(jax.grad(total))(params)

  params = draw(tiny(family))
  plain = gradient(params)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
  jax.tree.map(close, gradient(params, remat="full"), plain)
  flat = gradient(
    layouts.unstack(params), scan_layers=False, remat="dots_saveable"
  )
  jax.tree.map(close, layouts.stack(flat), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_near(family):
  params = draw(tiny(family), scale=0.2)
  half = logits(tiny(family, dtype=jnp.bfloat16), params, tokens())
  assert half.dtype == np.float32
  whole = logits(tiny(family), params, tokens())
  assert 0 < np.abs(half - whole).max() < 0.1 * np.abs(whole).max()
  example = {name: jnp.ones(5, int) for name in ("x", "y", "segments", "mask")}
  half = tiny(family, dtype=jnp.bfloat16, tie_embeddings=False)
  loss = decoder.objective(half).loss
  blocks.trace(loss, decoder.shapes(half), example, strict=True)


def test_experts_are_their_formula():
  """Token by token: softmax over the two best experts of three."""
  config = tiny("mixtral", layers=1)
  x = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
  layers = draw(config)["blocks"]["experts"]
  params = jax.tree.map(lambda leaf: np.asarray(leaf[0]), layers)
  got = jax.jit(feedforward.Experts(config).apply)({"params": params}, x)
  weights = {k: params[k]["kernel"] for k in params}
  for t, token in enumerate(x):
    scores = token @ weights["router"]
    best = np.argsort(scores)[-2:]
    shares = np.exp(scores[best]) / np.exp(scores[best]).sum()
    total = 0
    for expert, share in zip(best, shares, strict=True):
      gate = token @ weights["mlp_gate"][expert]
      hidden = gate / (1 + np.exp(-gate)) * (token @ weights["mlp_in"][expert])
      total = total + share * (hidden @ weights["mlp_out"][expert])
    np.testing.assert_allclose(got[t], total, rtol=1e-3, atol=1e-5)


def test_an_expert_begins_as_a_dense_layer_does():
  config = tiny("mixtral", width=64, layers=1, experts=4, scan_layers=False)
  module = feedforward.Experts(config)
  params = module.init(jax.random.key(0), jnp.ones((1, 64)))["params"]
  kernel = params["mlp_in"]["kernel"]
  assert kernel.shape == (4, 64, 12)
  deviation = np.asarray(kernel).std(axis=(1, 2)) * 64**0.5
  np.testing.assert_allclose(deviation, 1, atol=6 / (2 * kernel[0].size) ** 0.5)


def test_rejects_other_inputs():
  module = decoder.Decoder(tiny("llama"))
  with pytest.raises(ValueError, match=r"segments of shape \(3,\)"):
    jax.eval_shape(module.init, jax.random.key(0), tokens(4), np.ones(3, int))
  with pytest.raises(ValueError, match=r"family 'bert'.*gpt2, llama"):
    configs.like("bert", VOCAB)
