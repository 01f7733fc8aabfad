"""Models against oracles written out in NumPy, and layouts of the decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tda.data import sentences
from tda.data.datasets import Dataset
from tda.models import attention, build, decoder, layouts
from tda.models.cnn import CNN
from tda.models.config import DecoderConfig
from tda.models.decoder import Decoder
from tda.models.mlp import MLP

SIZES = {"vocab": 11, "width": 8, "layers": 2, "heads": 2, "max_length": 7}
TOKENS = jnp.array([3, 1, 4, 1, 5])


def draw(init, *args):
  """Parameters of the module's shapes: `init` itself is slow to compile."""
  shapes = jax.eval_shape(init, jax.random.key(0), *args)
  normal = np.random.RandomState(0).normal
  return jax.tree.map(
    lambda leaf: jnp.asarray(0.5 * normal(size=leaf.shape), leaf.dtype),
    shapes.get("params", shapes),
  )


def count(params):
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def dataset(shape, num_classes):
  y = np.zeros((4,) if num_classes else (4, 1))
  part = {"x": np.zeros((4, *shape), np.float32), "y": y}
  return Dataset("made", part, part, ("class",) * num_classes)


def dense(params, x):
  kernel, bias = np.asarray(params["kernel"]), np.asarray(params["bias"])
  return x @ kernel + bias


def test_mlp_is_its_formula():
  x = np.random.RandomState(0).normal(size=(2, 3)).astype(np.float32)
  mlp = MLP((5, 4, 1))
  params = draw(mlp.init, x)
  h = np.maximum(dense(params["layers_0"], x.reshape(-1)), 0)
  h = np.maximum(dense(params["layers_1"], h), 0)
  y = mlp.apply({"params": params}, x)
  assert y.shape == (1,)
  np.testing.assert_allclose(y, dense(params["layers_2"], h), rtol=1e-5)
  hidden = mlp.apply({"params": params}, x, method="represent")
  np.testing.assert_allclose(hidden, h, rtol=1e-5)


@pytest.mark.parametrize("downsampling", ["stride", "average", "max"])
def test_cnn_downsamples_as_it_says(downsampling):
  """With kernels of one pixel the convolutions are plain products."""
  x = np.random.RandomState(0).normal(size=(4, 4, 2)).astype(np.float32)
  cnn = CNN((3,), 5, 2, kernel=1, downsampling=downsampling)
  params = draw(cnn.init, x)
  pixel = params["convolutions_0"]
  pixel = {"kernel": pixel["kernel"][0, 0], "bias": pixel["bias"]}
  h = np.maximum(dense(pixel, x.reshape(16, 2)), 0)
  h = h.reshape(4, 4, 3)
  tiles = h.reshape(2, 2, 2, 2, 3)  # row, row in tile, column, in tile
  h = {
    "stride": h[::2, ::2],
    "average": tiles.mean((1, 3)),
    "max": tiles.max((1, 3)),
  }[downsampling]
  h = np.maximum(dense(params["dense"], h.reshape(-1)), 0)
  y = cnn.apply({"params": params}, x)
  np.testing.assert_allclose(y, dense(params["head"], h), rtol=1e-5)


def test_cnn_rejects_bad_options():
  with pytest.raises(ValueError, match=r"blur.*stride.*average"):
    CNN(downsampling="blur").init(jax.random.key(0), jnp.zeros((8, 8, 1)))
  with pytest.raises(ValueError, match=r"one picture.*\(64,\)"):
    CNN().init(jax.random.key(0), jnp.zeros(64))


@pytest.mark.parametrize(
  ("tied", "remat"),
  [(False, "none"), (True, "full"), (False, "dots_saveable")],
)
def test_scanned_and_unrolled_decoders_agree(tied, remat):
  options = {"tie_embeddings": tied, "remat": remat, **SIZES}
  scanned = Decoder(DecoderConfig(scan_unroll=2, **options))
  unrolled = Decoder(DecoderConfig(scan_layers=False, **options))
  stacked = draw(scanned.init, TOKENS)
  flat = layouts.unstack(stacked)
  shapes = jax.eval_shape(unrolled.init, jax.random.key(0), TOKENS)["params"]
  assert jax.tree.map(jnp.shape, flat) == jax.tree.map(jnp.shape, shapes)
  jax.tree.map(np.testing.assert_array_equal, layouts.stack(flat), stacked)

  def loss(module):
    def surprisal(params):
      logits = module.apply({"params": params}, TOKENS)
      return -jnp.sum(jax.nn.log_softmax(logits)[:, 0])

    return jax.jit(jax.value_and_grad(surprisal))

  value, grad = loss(scanned)(stacked)
  value_flat, grad_flat = loss(unrolled)(flat)
  np.testing.assert_allclose(value, value_flat, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    grad,
    layouts.stack(grad_flat),
  )


def attention_by_hand(params, x, heads):
  """One head and one position at a time."""
  q, k, v = (
    np.einsum("td,dhk->thk", x, params[n]["kernel"]) + params[n]["bias"]
    for n in ("query", "key", "value")
  )
  mixed = np.zeros_like(q)
  for head in range(heads):
    for t in range(len(x)):
      weights = k[: t + 1, head] @ q[t, head] / np.sqrt(q.shape[-1])
      weights = np.exp(weights - weights.max())
      mixed[t, head] = weights @ v[: t + 1, head] / weights.sum()
  out = params["output"]
  return np.einsum("thk,hkd->td", mixed, out["kernel"]) + out["bias"]


@pytest.mark.parametrize("length", [5, 131, 331])  # of 1, 2 and 4 pieces
def test_attention_is_its_formula(length):
  x = np.random.RandomState(0).normal(size=(length, 8)).astype(np.float32)
  config = DecoderConfig(**SIZES)
  at = attention.places(config, length, None)
  module = attention.Attention(config)
  params = draw(module.init, x, at)
  np.testing.assert_allclose(
    module.apply({"params": params}, x, at),
    attention_by_hand(jax.tree.map(np.asarray, params), x, 2),
    rtol=1e-4,
    atol=1e-5,
  )


def test_segments_see_nothing_else_in_any_piece(monkeypatch):
  config = DecoderConfig(**SIZES, positions="rotary")
  segments = np.repeat([1, 2, 3, 4], [70, 61, 150, 50])
  x = np.random.RandomState(0).normal(size=(331, 8)).astype(np.float32)
  at = attention.places(config, 331, segments)
  module = attention.Attention(config)
  variables = {"params": draw(module.init, x, at)}
  found = module.apply(variables, x, at)
  monkeypatch.setattr(attention, "PIECES", 1)
  for one in range(1, 5):
    own = x[segments == one]
    alone = attention.places(config, len(own), None)
    want = module.apply(variables, own, alone)
    np.testing.assert_allclose(
      found[segments == one], want, rtol=1e-4, atol=1e-5
    )


def test_decoder_is_causal_and_knows_positions():
  module = Decoder(DecoderConfig(**SIZES))
  variables = {"params": draw(module.init, TOKENS)}
  apply = jax.jit(module.apply)
  logits = apply(variables, TOKENS)
  assert logits.shape == (5, 11)
  changed = apply(variables, TOKENS.at[3].set(9))
  np.testing.assert_array_equal(changed[:3], logits[:3])
  assert np.abs(changed[3:] - logits[3:]).max(axis=1).min() > 1e-3
  same = apply(variables, jnp.full(5, 1))
  assert np.abs(np.diff(same, axis=0)).max(axis=1).min() > 1e-3


def test_decoder_dtype_and_tied_parameters():
  half = Decoder(
    DecoderConfig(dtype=jnp.bfloat16, tie_embeddings=True, **SIZES)
  )
  tied = draw(half.init, TOKENS)
  assert {leaf.dtype for leaf in jax.tree.leaves(tied)} == {jnp.dtype("f4")}
  logits = jax.eval_shape(half.apply, {"params": tied}, TOKENS)
  assert logits.dtype == jnp.float32
  untied = decoder.shapes(DecoderConfig(**SIZES))
  assert count(untied) - count(tied) == 11 * 8
  jaxpr = str(jax.make_jaxpr(half.apply)({"params": tied}, TOKENS))
  assert "bf16[5,32]" in jaxpr and "f32[5,32]" not in jaxpr


@pytest.mark.parametrize(
  ("options", "length", "message"),
  [
    ({"heads": 3}, 5, "width=8 must be a multiple of heads=3"),
    ({}, 8, "at most 7 tokens"),
    ({"remat": "sometimes"}, 5, "unknown remat 'sometimes'.*dots_saveable"),
    ({"kv_heads": 3}, 5, "heads=2 must be a multiple of kv_heads=3"),
    ({"kv_heads": 0}, 5, "heads=2 must be a multiple of kv_heads=0"),
    ({"positions": "sine"}, 5, "positions 'sine'.*learned, rotary"),
    ({"norm": "batch"}, 5, "norm 'batch'.*layer, rms"),
    ({"mlp": "relu"}, 5, "mlp 'relu'.*gelu, gelu_tanh, swiglu"),
    (
      {"positions": "rotary", "rotary_fraction": 0.25},
      5,
      "of 4 channels rotates 1 of them",
    ),
    ({"experts": 1, "mlp_bias": False}, 5, "active_experts=2 must be 1 to"),
    ({"experts": 3}, 5, "experts have no biases"),
  ],
)
def test_decoder_rejects(options, length, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(
      Decoder(DecoderConfig(**{**SIZES, **options})).init,
      jax.random.key(0),
      jnp.zeros(length, int),
    )


def test_layouts_reject_each_other():
  with pytest.raises(ValueError, match="no stacked 'blocks'"):
    layouts.unstack({"blocks_0": {}})
  with pytest.raises(ValueError, match="no blocks_0"):
    layouts.stack({"blocks": {}})


def test_build_fits_the_dataset():
  digits = dataset((8, 8, 1), 10)
  mlp = build.build("mlp", (128, 128), digits)
  params = draw(mlp.init)
  assert count(params) == 26_122
  assert mlp.apply(params, digits.train["x"][0]).shape == (10,)
  cnn = build.build("cnn", [4, 6, 12], digits)
  params = draw(cnn.init)
  assert params["convolutions_1"]["kernel"].shape == (3, 3, 4, 6)
  assert cnn.apply(params, digits.train["x"][0]).shape == (10,)
  regression = build.build("mlp", (4,), dataset((7,), 0))
  params = draw(regression.init)
  assert regression.apply(params, jnp.zeros(7)).shape == (1,)


def test_build_rejects():
  with pytest.raises(ValueError, match=r"'resnet'.*mlp.*cnn"):
    build.build("resnet", (8,), dataset((8, 8, 1), 10))
  with pytest.raises(ValueError, match="needs pictures"):
    build.build("cnn", (8, 8), dataset((7,), 0))
  with pytest.raises(ValueError, match="planted is for language"):
    build.build("mlp", (8,), sentences.planted(train_size=14))
  with pytest.raises(ValueError, match=r"multiples of 32.*not \(32, 64\)"):
    build.build("decoder", (32, 64), sentences.planted(train_size=14))
