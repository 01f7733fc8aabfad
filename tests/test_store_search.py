"""Searches of a store against the same in float64 on whole matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import store_cases

from tda import projections
from tda.attribution import influence, logra
from tda.store import disk, fisher, layout, lenses, reading, search
from tda.store.lenses import METHODS
from tda.store.search import Lens


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  store = store_cases.build(tmp_path_factory.mktemp("store") / "s")
  rows = np.concatenate(
    [np.array(b.rows.values)[: b.held] for b in reading.blocks(store)]
  )
  return store, rows.astype(np.float64), store_cases.ask()


def blocks_of(store, rows):
  return [np.asarray(layout.by_module(rows, span)) for span in store.layout]


def fisher_of(store, rows):
  return [
    np.einsum("nmd,nme->mde", x, x) / len(x) for x in blocks_of(store, rows)
  ]


def damped(matrix, damping=0.1):
  size = matrix.shape[-1]
  return np.linalg.inv(
    matrix + damping * np.trace(matrix) / size * np.eye(size)
  )


def products(store, second, left, right):
  """leftᵀ (F + λ)⁻¹ right over all modules [N, Q]."""
  total = 0.0
  pairs = zip(
    second, blocks_of(store, left), blocks_of(store, right), strict=True
  )
  for matrices, x, y in pairs:
    for m in range(len(matrices)):
      total = total + x[:, m] @ damped(matrices[m]) @ y[:, m].T
  return total


def expected(store, rows, asked, method):
  """Scores [N, Q] by the definitions."""
  asked, n = asked.astype(np.float64), len(rows)
  norm = lambda x: np.linalg.norm(x, axis=1)
  if method == "dot":
    return rows @ asked.T / n
  if method == "cosine":
    return rows @ asked.T / np.multiply.outer(norm(rows), norm(asked))
  if method == "trak":
    return rows @ damped(rows.T @ rows / n) @ asked.T / n
  second = fisher_of(store, rows)
  if method == "trackstar":
    theirs = fisher_of(store, asked)
    second = [0.3 * y + 0.7 * x for x, y in zip(second, theirs, strict=True)]
  both = products(store, second, rows, asked)
  if method == "logra":
    return both / n
  own = np.sqrt(np.diag(products(store, second, rows, rows)))
  if method == "relatif":
    return both / own[:, None]
  theirs = np.sqrt(np.diag(products(store, second, asked, asked)))
  return both / np.multiply.outer(own, theirs)


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_what_they_are_defined_to_be(stored, method):
  store, rows, asked = stored
  lens = lenses.lens(store, asked, method, mixing=0.3)
  got = search.scores(lens)
  want = expected(store, rows, asked, method)
  np.testing.assert_allclose(
    got, want, rtol=2e-4, atol=2e-5 * np.abs(want).max()
  )


@pytest.mark.parametrize("method", ["logra", "relatif"])
def test_inverses_by_products_and_of_diagonals(stored, method):
  store, rows, asked = stored
  by = lambda how: search.scores(lenses.lens(store, asked, method, inverse=how))
  scale = np.abs(by("eigen")).max()
  np.testing.assert_allclose(by("hyperpower"), by("eigen"), atol=1e-4 * scale)
  weights = np.square(rows).mean(axis=0)
  inverse = [
    1 / (x + 0.1 * x.mean(axis=-1, keepdims=True))
    for x in blocks_of(store, weights)
  ]
  each = np.concatenate([x.ravel() for x in inverse])
  want = (rows * each) @ asked.T / len(rows)
  if method == "relatif":
    want *= len(rows) / np.sqrt((rows**2 * each).sum(axis=1))[:, None]
  np.testing.assert_allclose(by("diagonal"), want, rtol=1e-4, atol=1e-5 * scale)


def test_whole_projections_give_the_influence_of_the_empirical_fisher(tmp_path):
  """K as long as every side: nothing is projected."""
  log = store_cases.logger(dimension=99)
  store = store_cases.build(tmp_path / "s", log=log)
  train, queries = store_cases.data(), store_cases.data(3, 9)
  got = search.scores(lenses.lens(store, store_cases.ask(log=log), "logra"))
  want, asked = 0.0, store_cases.dense(queries)
  for name, x in store_cases.dense(train).items():
    flat = np.asarray(x, np.float64).reshape(len(x), -1)
    second = damped(flat.T @ flat / len(flat))
    want = want + flat @ second @ np.asarray(asked[name]).reshape(3, -1).T
  np.testing.assert_allclose(got, want / len(got), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("k", [1, 4, 23])
def test_both_ends_are_exact(stored, k):
  store, _, asked = stored
  lens = lenses.lens(store, asked)
  scores = search.scores(lens)
  found = search.ends(lens, k)
  first = np.argsort(-scores, axis=0, kind="stable")[:k].T
  last = np.argsort(scores, axis=0, kind="stable")[:k].T
  np.testing.assert_array_equal(found.top.rows, first)
  np.testing.assert_array_equal(found.bottom.rows, last)
  picked = np.take_along_axis(scores.T, last, axis=1)
  np.testing.assert_allclose(found.bottom.scores, picked, rtol=1e-6)
  assert found.top.names[1][0] == str(first[1][0])


def test_equal_scores_go_by_row(stored):
  store, rows, _ = stored
  zeros = np.zeros((2, rows.shape[1]), np.float32)
  found = search.ends(Lens(store, zeros), 5)
  np.testing.assert_array_equal(found.top.rows, [range(5)] * 2)
  np.testing.assert_array_equal(found.bottom.rows, [range(5)] * 2)


def test_candidates_of_a_first_stage(stored):
  store, _, asked = stored
  lens = lenses.lens(store, asked)
  scores = search.scores(lens)
  among = np.zeros(scores.shape, bool)
  chosen = [[3, 8, 21], [0, 1, 2], [20, 21, 22]]
  for q, inside in enumerate(chosen):
    among[inside, q] = True
  found = search.ends(lens, 3, among=among).top
  for q, inside in enumerate(chosen):
    assert [*found.rows[q]] == sorted(inside, key=lambda i: -scores[i, q])
  with pytest.raises(ValueError, match="the first 4 of 3 rows"):
    search.ends(lens, 4, among=among)


def test_modules_and_documents_add_up(stored):
  store, _, asked = stored
  lens = lenses.lens(store, asked, "relatif")
  scores = search.scores(lens)
  parts = search.by_module(lens, [5, 22, 0])
  assert parts.shape == (3, 3, sum(span.modules for span in store.layout))
  np.testing.assert_allclose(parts.sum(-1), scores[[5, 22, 0]], rtol=1e-4)
  names = ["a", "b", "a", *"c" * 20]
  documents, total = search.by_document(scores, names)
  assert documents == ["a", "b", "c"]
  np.testing.assert_allclose(total[0], scores[0] + scores[2])
  np.testing.assert_allclose(total.sum(0), scores.sum(0), rtol=1e-5)


def test_stores_of_several_models_are_added(stored, tmp_path):
  store, _, asked = stored
  log = store_cases.logger(key=jax.random.key(8))
  other = store_cases.build(tmp_path / "t", log=log)
  pair = [Lens(store, asked), Lens(other, 2 * store_cases.ask(log=log))]
  want = sum(search.scores(lens) for lens in pair)
  np.testing.assert_allclose(search.scores(pair), want, rtol=1e-5, atol=1e-5)
  first = np.argsort(-want, axis=0)[:4].T
  np.testing.assert_array_equal(search.ends(pair, 4).top.rows, first)
  less = store_cases.build(tmp_path / "u", store_cases.data(22))
  with pytest.raises(ValueError, match="the same rows"):
    search.scores([pair[0], Lens(less, asked)])


def test_neighbours_and_outliers(stored):
  store, rows, _ = stored
  near = search.ends(lenses.neighbours(store, [4, 9]), 1).top
  np.testing.assert_array_equal(near.rows[:, 0], [4, 9])
  np.testing.assert_allclose(near.scores, 1, rtol=1e-5)
  want = np.diag(products(store, fisher_of(store, rows), rows, rows)) / len(
    rows
  )
  np.testing.assert_allclose(lenses.own(store), want, rtol=1e-4)


def test_what_was_summed_is_kept_until_rows_are_added(tmp_path, monkeypatch):
  store = store_cases.build(tmp_path / "s")
  look = lambda: {
    "F": fisher.fisher(store),
    "inverse": fisher.inverse(store, 0.1),
    "another": fisher.inverse(store, 0.2),
    "diagonal": fisher.inverse(store, 0.1, "diagonal"),
    "joint": {"all": fisher.joint_inverse(store, 0.1)},
  }
  found = look()
  first = found["F"]
  with monkeypatch.context() as patched:
    patched.setattr(reading, "blocks", None)  # reading would fail
    patched.setattr(fisher, "inverted", None)
    jax.tree.map(np.testing.assert_array_equal, look(), found)
  for name, damping in (("inverse", 0.1), ("another", 0.2)):
    jax.tree.map(
      np.testing.assert_array_equal,
      found[name],
      fisher.inverted(first, damping),
    )
  more = store_cases.build(
    tmp_path / "s", store_cases.data(9, seed=2), append=True
  )
  other = fisher.fisher(more)
  assert any(np.abs(other[k] - x).max() > 0 for k, x in first.items())


def test_damage_is_named_or_passed_over(tmp_path):
  store = store_cases.build(tmp_path / "s")
  lens = lenses.lens(store, store_cases.ask())
  scores = search.scores(lens)
  (tmp_path / "s/parts/000/rows/c/1/0").unlink()
  with pytest.raises(ValueError, match="rows 4 to 7, shard 1 of"):
    search.ends(lens, 3)
  found = search.ends(lens, 19, damaged=True)
  assert len(found.lost) == 1 and not set(range(4, 8)) & {*found.top.rows[0]}
  left = np.delete(np.arange(23), range(4, 8))
  want = left[np.argsort(-scores[left, 0], kind="stable")]
  np.testing.assert_array_equal(found.top.rows[0], want)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_by_what_damage_leaves(tmp_path, method):
  store = store_cases.build(tmp_path / "s")
  asked = store_cases.ask()
  (tmp_path / "s/parts/000/rows/c/1/0").unlink()
  with pytest.raises(ValueError, match="rows 4 to 7, shard 1 of"):
    search.scores(lenses.lens(store, asked, method, mixing=0.3))
  lens = lenses.lens(store, asked, method, mixing=0.3, damaged=True)
  found = search.ends(lens, 19, damaged=True).top
  left = np.delete(np.arange(23), range(4, 8))
  rows = np.concatenate(
    [np.array(b.rows.values)[: b.held] for b in reading.blocks(store, lost=[])]
  ).astype(np.float64)
  want = expected(store, rows, asked, method)
  if method in ("dot", "logra", "trak"):
    want = want * 19 / 23  # of a change by one of all that there were
  order = np.argsort(-want[:, 1], kind="stable")
  np.testing.assert_array_equal(found.rows[1], left[order])
  np.testing.assert_allclose(found.scores[1], want[order, 1], rtol=1e-3)
  assert search.ends(lens, 23, damaged=True).top.rows[0, -1] == -1


def test_shards_of_many_sizes_share_their_programs(tmp_path):
  store = store_cases.build(tmp_path / "s", per_shard=5)  # the last has three
  lens = lenses.lens(store, store_cases.ask())
  search.products.clear_cache()
  search.scores(lens)
  assert search.products._cache_size() == 1


def test_a_store_that_is_not_whole_is_not_searched(tmp_path):
  store_cases.build(tmp_path / "s")
  (tmp_path / "s/parts/000/shards/000003.json").unlink()
  store = disk.opened(tmp_path / "s")
  asked = store_cases.ask()
  for look in (
    lambda: search.ends(Lens(store, asked), 2),
    lambda: lenses.own(store),
  ):
    with pytest.raises(ValueError, match="has 5 of 6 shards: build the rest"):
      look()


def test_what_cannot_be_asked_is_refused(stored):
  store, _, asked = stored
  with pytest.raises(ValueError, match="the first 24 of 23 rows"):
    search.ends(Lens(store, asked), 24)
  with pytest.raises(ValueError, match=r"queries \(3, 7\) of a store of"):
    lenses.lens(store, asked[:, :7])
  with pytest.raises(ValueError, match="unknown method 'ekfac'"):
    lenses.lens(store, asked, "ekfac")
  for method in ("logra", "trackstar", "trak"):
    with pytest.raises(ValueError, match="damping=0"):
      lenses.lens(store, asked, method, damping=0)
  with pytest.raises(ValueError, match="inverse 'diagonal' of 'w', an array"):
    fisher.inverted({"w": np.ones((1, 2, 2))}, 0.1, "diagonal")
  with pytest.raises(ValueError, match="inverse 'qr'"):
    lenses.lens(store, asked, inverse="qr")
  with pytest.raises(ValueError, match="query 1 is not finite"):
    search.scores(Lens(store, np.where([[0], [1], [0]], np.nan, asked)))
  with pytest.raises(ValueError, match="3 weights of the 23 rows"):
    search.scores(Lens(store, asked, np.ones(3)))
  train, aim = store_cases.data(), store_cases.OBJECTIVE
  with pytest.raises(ValueError, match="is of another model"):
    logra.reopened(store, aim, store_cases.model(1), train)


def test_a_store_is_asked_by_another_program(stored):
  store, _, asked = stored
  opened = disk.opened(store.path)
  queries = store_cases.data(3, 9)
  log = logra.reopened(
    opened, store_cases.OBJECTIVE, store_cases.model(), queries
  )
  np.testing.assert_array_equal(log.ask(store_cases.model(), queries), asked)


def test_queries_by_any_measurement(stored):
  _, _, asked = stored
  loss = store_cases.OBJECTIVE.loss
  double = store_cases.ask(measurement=lambda p, q: 2 * loss(p, q))
  np.testing.assert_allclose(double, 2 * asked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("draw", [projections.two_sided, projections.sparse])
def test_random_directions_keep_products_on_average(draw):
  found, grads = store_cases.traced(), store_cases.dense(store_cases.data(2))
  a, b = grads["w"][:, 0]
  want = float((a * b).sum())

  def one(key):
    left, right = draw(found, key, 3)["w"][::-1]
    seen = lambda x: left[0].T @ x @ right[0]
    return (seen(a) * seen(b)).sum()

  got = np.asarray(jax.vmap(one)(jax.random.split(jax.random.key(0), 4000)))
  error = got.std() / np.sqrt(len(got))
  assert abs(got.mean() - want) < 4 * error < 0.3 * jnp.linalg.norm(a) ** 2


def test_rows_that_are_not_stored_are_scored_by_a_response(stored):
  store, _, asked = stored
  log, train = store_cases.logger(), store_cases.data()
  inverse = fisher.inverted(fisher.fisher(store), 0.1)
  score = influence.scorer(store_cases.traced(), store_cases.OBJECTIVE)
  responses = {"logra": logra.response(log, inverse)}
  found = score(store_cases.model(), train, store_cases.data(3, 9), responses)
  want = search.scores(lenses.lens(store, asked))
  # Where terms cancel, float32 is as exact as the largest scores are.
  rounding = 1e-6 * np.abs(want).max()
  np.testing.assert_allclose(found["logra"].values, want, 0, rounding)


def test_products_of_bfloat16_rows_have_the_digits_of_float32():
  rng = np.random.default_rng(0)
  spans = (layout.Span("block", 0, (), 1, 1, 512),)
  rows = jnp.asarray(rng.standard_normal((9, 512)), jnp.bfloat16)
  scales = 10 ** rng.uniform(-9, 9, (3, 512))
  directions = rng.standard_normal((3, 512)) * scales
  directions = directions.astype(np.float32)
  found = search.products(layout.Encoded(rows, None), directions, spans)
  wide = np.asarray(rows).astype(np.float64), directions.astype(np.float64)
  size = np.abs(wide[1]) @ np.abs(wide[0]).T
  # Two parts would leave errors of 2e-6 of the sizes, and one of 1e-3.
  error = np.abs(np.asarray(found).T - wide[1] @ wide[0].T) / size
  assert error.max() < 3e-7


def test_parts_add_up_to_what_they_are_of():
  x = np.random.default_rng(0).standard_normal((4, 100)).astype(np.float32)
  parts = jax.jit(search._parts)(x)
  assert {part.dtype for part in parts} == {jnp.dtype(jnp.bfloat16)}
  total = sum(np.asarray(part).astype(np.float64) for part in parts)
  np.testing.assert_array_equal(total.astype(np.float32), x)
