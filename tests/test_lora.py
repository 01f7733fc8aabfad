"""Merged and separate adapters are one function, captured like any other."""

import capture_cases
import control_cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import sharing_cases
from capture_checks import check_gradients, first, materialize

from tda import blocks, lora, streams
from tda.attribution import influence
from tda.attribution.responses import Identity

CASES = {
  **{k: capture_cases.LINEAR[k] for k in ("dense_bias", "heads_in", "experts")},
  **{
    k: capture_cases.CONVOLUTIONS[k]
    for k in ("conv2d_strides", "conv2d_groups_bias", "conv2d_channels_first")
  },
  **{
    k: capture_cases.LOOKUPS[k] for k in ("take", "take_fill", "scalar_column")
  },
  **{
    k: control_cases.CONTROL[k]
    for k in ("remat", "scan_of_remat", "nested_scan", "recurrent_stacked")
  },
  **{
    k: sharing_cases.SHARED[k]
    for k in ("siamese", "fused_projections", "sometimes_biased")
  },
}


def drawn(adapt, seed=0):
  """Adapters of which neither matrix is zero."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, x.dtype),
    adapt.init(jax.random.key(seed)),
  )


@pytest.mark.parametrize("name", CASES)
def test_both_forms_agree_and_are_captured_as_sites(name):
  case = CASES[name]
  with jax.enable_x64(True):
    params, batch = materialize(case)
    adapt = lora.adapt(case.loss, params, first(batch), rank=2)
    adapters = drawn(adapt)

    @jax.jit
    def both(params, adapters, batch):
      separate = jax.vmap(adapt.outputs, (None, None, 0))
      merged = adapt.merged(params, adapters)
      moved = jax.vmap(case.loss, (None, 0))(merged, batch)
      return separate(params, adapters, batch), moved

    separate, moved = both(params, adapters, batch)
    np.testing.assert_allclose(separate, moved, rtol=1e-12, atol=1e-12)
    one = lambda adapters, example: adapt.outputs(params, adapters, example)
    found = blocks.trace(one, adapters, first(batch), strict=True)
    kinds = {b.kind for b in found.blocks.values()}
    assert kinds <= {"matrix", "lookup"}
    # The oracle differentiates the merged form, which shares no code with it.
    oracle = lambda adapters, ex: case.loss(adapt.merged(params, adapters), ex)
    check_gradients(found, oracle, adapters, batch)


def test_the_merged_form_hides_the_adapters_from_capture():
  case = CASES["dense_bias"]
  params, batch = materialize(case)
  adapt = lora.adapt(case.loss, params, first(batch), rank=2)
  merged = lambda ad, ex: case.loss(adapt.merged(params, ad), ex)
  found = blocks.trace(merged, adapt.init(jax.random.key(0)), first(batch))
  assert all("another parameter" in b.reason for b in found.blocks.values())


def test_shapes_and_scale_are_those_of_the_definition():
  with jax.enable_x64(True):
    p = oracles.problem("mixed")
    adapt = lora.adapt(
      p.objective.outputs,
      p.params,
      streams.example(p.data),
      rank=3,
      alpha=6.0,
      select=["layers/w", "out/w"],
    )
    adapters = drawn(adapt)
    shapes = {k: (x.a.shape, x.b.shape) for k, x in adapters.items()}
    assert shapes == {
      "layers/w": ((2, 1, 3, 4), (2, 1, 4, 3)),
      "out/w": ((1, 3, 4), (1, 3, 3)),
    }
    assert adapt.scale == 6 / np.sqrt(3)
    moved = adapt.merged(p.params, adapters)
    change = moved["layers"]["w"] - p.params["layers"]["w"]  # [2, I, O]
    a, b = (x[:, 0] for x in adapters["layers/w"])
    expected = 6 / np.sqrt(3) * np.einsum("lor,lri->lio", b, a)
    np.testing.assert_allclose(change, expected, rtol=1e-12, atol=1e-13)
    for leaf in ("table", "scale"):
      np.testing.assert_array_equal(moved[leaf], p.params[leaf])
    np.testing.assert_array_equal(moved["layers"]["b"], p.params["layers"]["b"])
    plain = lora.adapt(
      p.objective.outputs,
      p.params,
      streams.example(p.data),
      rank=3,
      alpha=6.0,
      stabilised=False,
    )
    assert plain.scale == 2.0
    assert set(plain.init(jax.random.key(0))) == {"table", "layers/w", "out/w"}


def test_adapters_start_at_the_model_and_their_variance_is_one_over_inputs():
  params = {"w": jnp.ones((400, 3))}
  example = {"x": jnp.ones(400)}
  fn = lambda p, ex: ex["x"] @ p["w"]
  adapt = lora.adapt(fn, params, example, rank=50)
  for seed in range(3):
    adapters = adapt.init(jax.random.key(seed))
    np.testing.assert_array_equal(
      adapt.outputs(params, adapters, example), fn(params, example)
    )
    a = adapters["w"].a
    # Standard error of the variance of n normal draws: sqrt(2 / n) of it.
    assert abs(400 * jnp.var(a) - 1) < 4 * np.sqrt(2 / a.size)


def test_optax_trains_adapters_and_influence_sees_them_alone():
  with jax.enable_x64(True):
    p = oracles.problem("tanh")
    example = streams.example(p.data)
    adapt = lora.adapt(p.objective.outputs, p.params, example, rank=2)
    objective = lora.tuned(adapt, p.objective)
    data = jax.tree.map(jnp.asarray, p.data)
    optimizer = optax.adam(0.05)

    def loss(adapters):
      params = {"base": p.params, "adapters": adapters}
      return jax.vmap(objective.loss, (None, 0))(params, data).mean()

    def step(state, _):
      adapters, inner = state
      value, grads = jax.value_and_grad(loss)(adapters)
      updates, inner = optimizer.update(grads, inner)
      return (optax.apply_updates(adapters, updates), inner), value

    start = adapt.init(jax.random.key(0))
    state, values = jax.jit(
      lambda a: jax.lax.scan(step, (a, optimizer.init(a)), length=60)
    )(start)
    assert values[-1] < 0.3 * values[0]
    params = {"base": p.params, "adapters": state[0]}
    found = blocks.trace(
      objective.outputs, params, example, select=lora.ADAPTERS
    )
    assert len(found.blocks) == 2 * len(start)
    score = influence.scorer(found, objective)
    dots = score(params, p.data, p.data, {"dot": Identity()})["dot"]

    def gradient(example):
      one = lambda a: objective.loss({"base": p.params, "adapters": a}, example)
      leaves = jax.tree.leaves(jax.grad(one)(state[0]))
      return jnp.concatenate([x.ravel() for x in leaves])

    grads = jax.vmap(gradient)(data)
    expected = grads @ grads.T / len(grads)
    np.testing.assert_allclose(dots.values, expected, rtol=1e-9, atol=1e-13)


def test_half_precision_weights_keep_their_dtype():
  params = {"w": jnp.ones((4, 3), jnp.bfloat16)}
  example = {"x": jnp.ones(4, jnp.bfloat16)}
  fn = lambda p, ex: ex["x"] @ p["w"]
  adapt = lora.adapt(fn, params, example, rank=2, dtype=jnp.float32)
  adapters = drawn(adapt)
  assert adapters["w"].a.dtype == jnp.float32
  separate = adapt.outputs(params, adapters, example)
  merged = adapt.merged(params, adapters)
  assert separate.dtype == merged["w"].dtype == jnp.bfloat16
  # Each form rounds a handful of times, by at most 2⁻⁸ of a term of the sum.
  terms = jnp.abs(merged["w"]).sum(axis=0, dtype=jnp.float32) + jnp.abs(
    fn(params, example)
  )
  error = jnp.abs(separate - fn(merged, example)) / terms
  assert error.max() < 4 * 2.0**-8


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"rank": 0}, "rank=0"),
    ({"rank": 2, "alpha": float("inf")}, "alpha=inf"),
    ({"rank": 2, "select": "nothing"}, "matches none"),
    ({"rank": 2, "select": ["w", "scale"]}, "scale is not a matrix"),
    ({"rank": 2, "select": "twin"}, "twin is used in more than one layout"),
  ],
)
def test_bad_choices_say_why(options, message):
  params = {k: jnp.ones((3, 3)) for k in ("w", "twin")}
  params["scale"] = jnp.ones(3)

  def fn(p, ex):
    h = p["twin"] @ (p["twin"].T @ (p["scale"] * ex["x"]))
    return h @ p["w"]

  with pytest.raises(ValueError, match=message):
    lora.adapt(fn, params, {"x": jnp.ones(3)}, **options)


def test_adapters_of_another_function_are_refused():
  params, example = {"w": jnp.ones((4, 3))}, {"x": jnp.ones(4)}
  fn = lambda p, ex: ex["x"] @ p["w"]
  adapt = lora.adapt(fn, params, example, rank=2)
  other = {"v": adapt.init(jax.random.key(0))["w"]}
  for form in (
    lambda: adapt.merged(params, other),
    lambda: adapt.outputs(params, other, example),
  ):
    with pytest.raises(ValueError, match=r"adapters of \['v'\]"):
      form()
