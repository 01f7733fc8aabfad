"""Uses of one parameter by one equation, with the blocks they must give."""

import jax
import jax.numpy as jnp
from capture_checks import ROWS, Case, tail
from jax import lax


def _linear(spec: str, x, w, b, block, bias=lambda b: b, swap=False) -> Case:
  """An einsum of the input with one parameter, and perhaps a bias."""

  def loss(p, ex):
    operands = (p["w"], ex["x"]) if swap else (ex["x"], p["w"])
    y = jnp.einsum(spec, *operands)
    return tail(y if b is None else y + bias(p["b"]))

  params = {"w": w} if b is None else {"w": w, "b": b}
  return Case(loss, params, {"x": x}, {"w": ("matrix", block)})


def _conv(
  x, w, block, *, layout="NHWC", b=None, bias=lambda b: b, **options
) -> Case:
  """A convolution of one image, with a batch axis of one as models have it."""
  spatial = layout.replace("N", "").replace("C", "")
  kernel = spatial + "IO" if layout[1] != "C" else "OI" + spatial
  options = {
    "window_strides": (1,) * len(spatial),
    "padding": "SAME",
    **options,
  }

  def loss(p, ex):
    y = lax.conv_general_dilated(
      ex["x"][None],
      p["w"],
      dimension_numbers=(layout, kernel, layout),
      **options,
    )
    return tail(y if b is None else y + bias(p["b"]))

  params = {"w": w} if b is None else {"w": w, "b": b}
  return Case(loss, params, {"x": x}, {"w": ("matrix", block)})


def _lookup(read, ids, table=(ROWS, 3), block=(1, 3, ROWS)) -> Case:
  loss = lambda p, ex: tail(read(p["table"], ex["ids"]))
  return Case(
    loss, {"table": table}, {"ids": ids}, {"table": ("lookup", block)}
  )


def _leaf(use, w, x, blocks, *, reasons=None, **more) -> Case:
  """A use of a leaf that is no product with an activation's inputs."""
  loss = lambda p, ex: tail(use(p, ex["x"]))
  return Case(loss, {"w": w, **more}, {"x": x}, blocks, reasons or {})


def _vmapped_linear(p, x):
  return jax.vmap(lambda x: p["w"] @ x + p["b"])(x)


def _read_twice(p, x):
  y = x @ p["w"]
  return y * (y + p["b"][None])


LINEAR = {
  "dense_bias": _linear("i,io->o", (3,), (3, 2), (2,), (1, 2, 4)),
  "positions": _linear(
    "ti,io->to", (5, 3), (3, 2), (2,), (1, 2, 4), lambda b: b[None]
  ),
  "weight_on_left": _linear(
    "oi,it->ot",
    (3, 5),
    (2, 3),
    (2,),
    (1, 2, 4),
    lambda b: b[:, None],
    swap=True,
  ),
  "transposed_weight": _linear("ti,oi->to", (5, 3), (2, 3), None, (1, 2, 3)),
  "inner_product": _linear("ti,ti->", (5, 3), (5, 3), (), (1, 1, 16)),
  "outer_product": _linear("t,o->to", (5,), (2,), None, (1, 2, 1)),
  "heads_out": _linear(
    "td,dhk->thk", (5, 3), (3, 2, 4), (2, 4), (1, 8, 4), lambda b: b[None]
  ),
  "heads_in": _linear(
    "thk,hkd->td", (5, 2, 3), (2, 3, 4), (4,), (1, 4, 7), lambda b: b[None]
  ),
  "per_head": _linear("thk,hkd->thd", (5, 2, 3), (2, 3, 4), None, (2, 4, 3)),
  "experts": _linear(
    "etd,edf->etf",
    (2, 5, 3),
    (2, 3, 4),
    (2, 4),
    (2, 4, 4),
    lambda b: b[:, None],
  ),
  "experts_on_left": _linear(
    "edf,etd->eft", (2, 5, 3), (2, 3, 4), None, (2, 4, 3), swap=True
  ),
  "two_batch_axes": _linear(
    "abtd,bdaf->abtf", (2, 3, 5, 2), (3, 2, 2, 4), None, (6, 4, 2)
  ),
  "vmapped_linear": _leaf(
    _vmapped_linear, (2, 3), (5, 3), {"w": ("matrix", (1, 2, 4))}, b=(2,)
  ),
}

CONVOLUTIONS = {
  "conv1d": _conv(
    (6, 2),
    (3, 2, 3),
    (1, 3, 7),
    layout="NWC",
    b=(3,),
    bias=lambda b: b[None, None],
  ),
  "conv2d_strides": _conv(
    (5, 6, 2), (3, 2, 2, 3), (1, 3, 12), window_strides=(2, 3)
  ),
  "conv2d_valid": _conv((5, 4, 2), (3, 2, 2, 3), (1, 3, 12), padding="VALID"),
  "conv2d_explicit_padding": _conv(
    (5, 4, 1),
    (3, 3, 1, 2),
    (1, 2, 9),
    window_strides=(2, 1),
    padding=((2, 1), (-1, 3)),
  ),
  "conv2d_dilated_kernel": _conv(
    (6, 5, 2), (3, 2, 2, 2), (1, 2, 12), rhs_dilation=(2, 1)
  ),
  "conv2d_transposed": _conv(
    (3, 4, 2),
    (3, 3, 2, 2),
    (1, 2, 18),
    lhs_dilation=(2, 3),
    padding=((1, 2), (2, 2)),
    rhs_dilation=(1, 2),
  ),
  "conv2d_groups_bias": _conv(
    (4, 4, 4),
    (2, 3, 2, 6),
    (2, 3, 13),
    feature_group_count=2,
    b=(6,),
    bias=lambda b: b[None, None, None],
  ),
  "conv2d_depthwise": _conv(
    (4, 4, 3), (3, 3, 1, 3), (3, 1, 9), feature_group_count=3
  ),
  "conv2d_channels_first": _conv(
    (2, 4, 5),
    (3, 2, 3, 2),
    (1, 3, 13),
    layout="NCHW",
    b=(3,),
    bias=lambda b: b[None, :, None, None],
  ),
}

LOOKUPS = {
  "take": _lookup(lambda w, ids: jnp.take(w, ids, axis=0), (5,)),
  "index": _lookup(lambda w, ids: w[ids], (2, 3)),
  "take_clip": _lookup(
    lambda w, ids: jnp.take(w, 2 * ids - 4, axis=0, mode="clip"), (7,)
  ),
  "take_fill": _lookup(
    lambda w, ids: jnp.take(w, 2 * ids - 9, axis=0, mode="fill", fill_value=0),
    (9,),
  ),
  "gather_fill_negative": _lookup(
    lambda w, ids: lax.gather(
      w,
      (2 * ids - 5)[:, None],
      lax.GatherDimensionNumbers((1,), (0,), (0,)),
      (1, 3),
      mode="fill",
      fill_value=0,
    ),
    (9,),
  ),
  "take_columns": _lookup(
    lambda w, ids: jnp.take(w, ids, axis=1), (5,), (3, ROWS)
  ),
  "scalar_index": _lookup(lambda w, ids: w[ids], ()),
  "scalar_column": _lookup(lambda w, ids: w[:, ids], (), (3, ROWS)),
  "vmapped_index": _lookup(lambda w, ids: jax.vmap(lambda i: w[i])(ids), (5,)),
  "vector_table": _lookup(lambda w, ids: w[ids], (5,), (ROWS,), (1, 1, ROWS)),
  "transposed_table": _lookup(
    lambda w, ids: jnp.take(w.T, ids, axis=0), (5,), (3, ROWS)
  ),
}

ELEMENTWISE = {
  "scale": _leaf(
    lambda p, x: x * p["w"], (3,), (3,), {"w": ("vector", (1, 3, 1))}
  ),
  "scale_broadcast": _leaf(
    lambda p, x: p["w"][None, :, None] * x,
    (3,),
    (2, 3, 4),
    {"w": ("vector", (1, 3, 1))},
  ),
  "scale_plus_one": _leaf(
    lambda p, x: x * (1 + p["w"])[None],
    (3,),
    (2, 3),
    {"w": ("vector", (1, 3, 1))},
  ),
  "scalar": _leaf(
    lambda p, x: x / p["v"] * p["w"],
    (),
    (2, 3),
    {"w": ("vector", (1, 1, 1)), "v": ("vector", (1, 1, 1))},
    reasons={"v": "enters div"},
    v=(),
  ),
  "divided_by": _leaf(
    lambda p, x: p["w"][None] / (2 + x**2),
    (3,),
    (2, 3),
    {"w": ("vector", (1, 3, 1))},
  ),
  "difference": _leaf(
    lambda p, x: p["w"][None] - x - p["v"],
    (3,),
    (2, 3),
    {"w": ("vector", (1, 3, 1)), "v": ("vector", (1, 6, 1))},
    v=(2, 3),
  ),
  "lone_bias": _leaf(
    lambda p, x: jnp.tanh(x) + p["w"][None],
    (3,),
    (2, 3),
    {"w": ("vector", (1, 3, 1))},
  ),
  "bias_per_position": _leaf(
    lambda p, x: x @ p["w"] + p["b"],
    (3, 2),
    (5, 3),
    {"w": ("matrix", (1, 2, 3)), "b": ("vector", (1, 10, 1))},
    b=(5, 2),
  ),
  "bias_shared_by_outputs": _leaf(
    lambda p, x: x @ p["w"] + p["b"],
    (3, 2),
    (5, 3),
    {"w": ("matrix", (1, 2, 3)), "b": ("vector", (1, 1, 1))},
    b=(),
  ),
  "bias_wider_than_the_output": _leaf(
    lambda p, x: x @ p["w"] + p["b"][:, None],
    (3, 2),
    (1, 3),
    {"w": ("matrix", (1, 2, 3)), "b": ("vector", (1, 2, 1))},
    b=(2,),
  ),
  "bias_after_another_reader": _leaf(
    _read_twice,
    (3, 2),
    (5, 3),
    {"w": ("matrix", (1, 2, 3)), "b": ("vector", (1, 2, 1))},
    b=(2,),
  ),
  "bias_in_the_weight": _leaf(
    lambda p, x: x @ p["w"][:-1] + p["w"][-1][None],
    (4, 2),
    (5, 3),
    {"w": ("matrix", (1, 2, 4))},
  ),
}

SITES = {**LINEAR, **CONVOLUTIONS, **LOOKUPS, **ELEMENTWISE}
