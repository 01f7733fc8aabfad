"""Training as a pure function, against plain loops over gathered subsets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tda.trajectory import permutation, resized, steps, trainer

N, BATCH, EPOCHS = 13, 4, 3
OPTIMIZERS = {
  "momentum": lambda count: optax.sgd(0.1, momentum=0.9),
  "adamw": lambda count: optax.chain(
    optax.clip_by_global_norm(0.5),
    optax.adamw(optax.cosine_decay_schedule(0.1, count), weight_decay=0.1),
  ),
}


def loss(params, example):
  hidden = jnp.tanh(example["x"] @ params["w"])
  return (hidden @ params["v"] - example["y"]) ** 2


def init(key):
  return {"w": jax.random.normal(key, (3, 4)), "v": jnp.ones(4) / 2}


def dataset(seed=0):
  rng = np.random.default_rng(seed)
  return {"x": rng.normal(size=(N, 3)), "y": rng.normal(size=N)}


def mask(*excluded):
  return jnp.ones(N).at[jnp.array(excluded, int)].set(0)


def make(optimizer, **options):
  options = {"epochs": EPOCHS, "batch_size": BATCH} | options
  return trainer(loss, init, optimizer, dataset(), **options)


def plain(optimizer, weights, key):
  """A Python loop that sees only the kept examples, in their own order."""
  init_key, order_key = jax.random.split(key)
  kept = np.flatnonzero(np.asarray(weights))
  subset = jax.tree.map(lambda leaf: leaf[kept], dataset())
  params = init(init_key)
  state = optimizer.init(params)
  for epoch in range(EPOCHS):
    full = np.asarray(permutation(order_key, jnp.ones(N), epoch))
    order = [list(kept).index(i) for i in full if i in kept]
    for i in range(0, len(order), BATCH):
      rows = order[i : i + BATCH]

      def mean(params, rows=rows):
        return sum(
          weights[kept[row]]
          * loss(params, jax.tree.map(lambda leaf, row=row: leaf[row], subset))
          for row in rows
        ) / len(rows)

      updates, state = optimizer.update(jax.grad(mean)(params), state, params)
      params = optax.apply_updates(params, updates)
  return params


def assert_same(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("size", [7, 9, N])  # 0, 1 and 2 surplus steps
def test_mask_trains_on_the_subset_alone(name, size):
  with jax.enable_x64(True):
    optimizer = OPTIMIZERS[name](steps(7, BATCH, EPOCHS))
    weights, key = mask(0, 2, 5, 8, 11, 12), jax.random.key(3)
    train = jax.jit(make(optimizer, size=size))
    expected = plain(optimizer, weights, key)
    assert_same(train(weights, key), expected, rtol=1e-11)


def test_weights_scale_gradients_and_the_remainder_divides_by_its_own():
  with jax.enable_x64(True):
    optimizer = OPTIMIZERS["momentum"](0)
    weights = jnp.linspace(0.5, 2, N)  # batches of 4, 4, 4 and 1
    key = jax.random.key(1)
    expected = plain(optimizer, weights, key)
    assert_same(make(optimizer)(weights, key), expected, rtol=1e-11)


def test_excluding_moves_to_the_end_and_changes_no_other_order():
  for seed in range(3):
    key = jax.random.key(seed)
    full = np.asarray(permutation(key, jnp.ones(N), 2))
    part = np.asarray(permutation(key, mask(1, 4), 2))
    assert sorted(full) == list(range(N))
    assert list(part) == [i for i in full if i not in (1, 4)] + [
      i for i in full if i in (1, 4)
    ]
    assert (full != np.asarray(permutation(key, jnp.ones(N), 3))).any()


def test_positions_are_uniform():
  draws = 4000
  orders = jax.vmap(
    lambda epoch: permutation(jax.random.key(0), mask(), epoch)
  )(jnp.arange(draws))
  counts = np.stack([np.bincount(column, minlength=N) for column in orders.T])
  # Chi-squared with (N - 1)² degrees of freedom, mean d and variance 2 d.
  expected, freedom = draws / N, (N - 1) ** 2
  statistic = ((counts - expected) ** 2 / expected).sum()
  assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_derivative_in_weights_is_that_of_finite_differences(name):
  with jax.enable_x64(True):
    train = make(OPTIMIZERS[name](steps(11, BATCH, EPOCHS)), size=11)
    key, weights = jax.random.key(5), mask(3, 7)
    query = jax.tree.map(lambda leaf: leaf[0] + 0.3, dataset())

    def measured(weights):
      return loss(train(weights, key), query)

    slope = jax.jit(jax.grad(measured))(weights)
    assert slope[3] == slope[7] == 0  # excluded examples take no part
    measured = jax.jit(measured)
    for i in (0, 6, 12):
      step = jnp.zeros(N).at[i].set(1e-5)
      up, down = measured(weights + step), measured(weights - step)
      np.testing.assert_allclose(slope[i], (up - down) / 2e-5, rtol=1e-5)


def test_vmap_over_weights_and_keys_is_a_loop():
  train = make(OPTIMIZERS["momentum"](0))
  weights = jnp.stack([mask(), mask(1), mask(2, 3, 4, 5, 6, 7)])
  keys = jax.random.split(jax.random.key(2), 2)
  over_keys = jax.vmap(train, (None, 0))
  together = jax.jit(jax.vmap(over_keys, (0, None)))(weights, keys)
  train = jax.jit(train)
  for m, weight in enumerate(weights):
    for r, key in enumerate(keys):
      one = jax.tree.map(lambda leaf, m=m, r=r: leaf[m, r], together)
      assert_same(one, train(weight, key), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("excluded", [0, N - 1])  # padding may index either
def test_an_excluded_example_cannot_spoil_the_run(excluded):
  data = dataset()
  data["x"][excluded] = np.nan
  train = trainer(
    loss, init, optax.sgd(0.1), data, epochs=EPOCHS, batch_size=BATCH
  )
  params = jax.jit(train)(mask(excluded, 5), jax.random.key(0))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_more_kept_examples_than_size_give_nan():
  train = make(optax.sgd(0.1), size=8)
  params = train(mask(0, 1, 2, 3), jax.random.key(0))
  assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(params))


def test_data_are_arguments_of_a_jitted_caller():
  train = make(optax.sgd(0.1))
  traced = []

  @jax.jit
  def call(train, weights, key):
    traced.append(1)
    return train(weights, key)

  other = jax.tree.map(lambda leaf: leaf + 1, train)
  key = jax.random.key(0)
  a, b = call(train, mask(), key), call(other, mask(), key)
  assert len(traced) == 1
  assert np.abs(a["w"] - b["w"]).max() > 1e-3


@pytest.mark.parametrize(
  "options, message",
  [
    ({"batch_size": 9, "size": 8}, "batch_size .* got 9"),
    ({"batch_size": 0}, "batch_size .* got 0"),
    ({"epochs": 0}, "epochs .* got 0"),
    ({"size": N + 1}, f"size .* got {N + 1}"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    make(optax.sgd(0.1), **options)


def test_bad_data_weights_and_loss():
  options = {"epochs": 1, "batch_size": 2}
  with pytest.raises(ValueError, match="first axis"):
    data = {"x": np.ones((3, 2)), "y": np.ones(4)}
    trainer(loss, init, optax.sgd(0.1), data, **options)
  with pytest.raises(ValueError, match="first axis"):
    trainer(loss, init, optax.sgd(0.1), {"x": np.float32(1)}, **options)
  shape = r"of 13 examples, and not of shape \(5,\)"
  with pytest.raises(ValueError, match=shape):
    make(optax.sgd(0.1))(jnp.ones(5), jax.random.key(0))

  def vector(params, example):
    return example["x"] * params["w"][:, 0]

  train = trainer(vector, init, optax.sgd(0.1), dataset(), **options)
  with pytest.raises(ValueError, match=r"scalar .* got shape \(3,\)"):
    train(mask(), jax.random.key(0))


def test_masked_examples_keep_their_places():
  """A weight of 0 is the limit of small ones, and no batch changes its size."""
  with jax.enable_x64(True):
    key, near = jax.random.key(3), jnp.ones(N).at[jnp.array([2, 7])].set(1e-9)
    train = jax.jit(make(optax.sgd(0.1, 0.9), masked=True))
    assert_same(train(mask(2, 7), key), train(near, key), rtol=1e-7)
    excluded = make(optax.sgd(0.1, 0.9))
    assert_same(train(jnp.ones(N), key), excluded(jnp.ones(N), key), rtol=1e-12)
    gap = jax.tree.map(
      lambda x, y: float(abs(x - y).max()),
      train(mask(2, 7), key),
      excluded(mask(2, 7), key),
    )
    assert max(jax.tree.leaves(gap)) > 1e-4
  with pytest.raises(ValueError, match=r"masked run sees all 13.*size=7"):
    make(optax.sgd(0.1), masked=True, size=7)


@pytest.mark.parametrize("microbatch", [1, 3, 4])
def test_microbatches_sum_to_the_batch(microbatch):
  with jax.enable_x64(True):
    weights, key = mask(0, 5).at[3].set(2.5), jax.random.key(3)
    want = make(optax.adam(0.1))(weights, key)
    got = make(optax.adam(0.1), microbatch=microbatch)(weights, key)
    assert_same(got, want, rtol=1e-10)
    slope = jax.grad(
      lambda w, parts: make(optax.sgd(0.1), microbatch=parts)(w, key)["v"].sum()
    )
    np.testing.assert_allclose(
      slope(weights, microbatch), slope(weights, None), rtol=1e-10
    )
  with pytest.raises(ValueError, match=r"microbatch must be in 1..batch_size"):
    make(optax.sgd(0.1), microbatch=5)


def test_weights_of_every_value_of_a_loss():
  """As one weight where they are equal; all of an example's 0 exclude it."""

  def each(params, example):
    return jnp.stack([loss(params, example), example["y"] * params["v"][0]])

  options = {"epochs": EPOCHS, "batch_size": BATCH}
  with jax.enable_x64(True):
    key = jax.random.key(3)
    values = trainer(each, init, optax.sgd(0.1), dataset(), **options)
    total = trainer(
      lambda p, e: each(p, e).sum(), init, optax.sgd(0.1), dataset(), **options
    )
    both = jnp.broadcast_to(mask(1, 6)[:, None], (N, 2))
    assert_same(values(both, key), total(mask(1, 6), key), rtol=1e-12)
    first = both.at[:, 1].set(0)
    assert_same(
      values(first, key), make(optax.sgd(0.1))(mask(1, 6), key), rtol=1e-12
    )
    shapes = r"shape \(2,\) for weights of shape \(\)"
    with pytest.raises(ValueError, match=shapes):
      values(jnp.ones(N), key)


def test_fewer_examples_are_seen_as_often_in_all():
  assert resized(600, None, 10, 2) == {
    "batch_size": 10, "epochs": 2, "size": 600,
  }  # fmt: skip
  for size in (30, 60, 120):
    assert steps(**resized(600, size, 10, 2)) == 120
  assert resized(600, 4, 10, 1) == {"batch_size": 4, "epochs": 60, "size": 4}
  assert resized(120, 600, 10, 1)["epochs"] == 1
