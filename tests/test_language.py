"""Packed documents are attributed as if each stood alone."""

import functools

import jax
import jax.numpy as jnp
import language_models
import numpy as np
import pytest

from tda import blocks, gradients, streams
from tda.attribution import influence, language, logra, projected
from tda.attribution.responses import Cosine, Identity
from tda.curvature import fitting, kronecker
from tda.data import packing, text
from tda.inverse import spectral
from tda.models import decoder
from tda.store import layout, lenses, search
from tda.streams import Loop

LENGTH = 12
SIZES = (5, 4, 9, 17, 3, 6)  # the fourth is cut in two
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


@functools.cache
def model(family="llama", sites="mlp"):
  config = language_models.tiny(family, max_length=16)
  params = language_models.draw(config)
  rng = np.random.default_rng(0)
  draw = lambda n: rng.integers(0, language_models.VOCAB, n)
  documents = [draw(n) for n in SIZES]
  rows = packing.pack(documents, LENGTH, seed=0)
  made = [packing.completion(draw(4), draw(2), LENGTH) for _ in range(3)]
  queries = {name: np.stack([x[name] for x in made]) for name in made[0]}
  aim = decoder.objective(config)
  found = blocks.trace(
    aim.outputs, params, streams.example(rows), select=decoder.SITES[sites]
  )
  return aim, params, documents, rows, queries, found


@functools.cache
def fit(family="llama", sites="mlp"):
  aim, params, _, rows, _, found = model(family, sites)
  curvature = fitting.fitter(found, aim, methods=["ekfac"])(params, rows)
  return spectral.inverse(curvature["ekfac"], spectral.relative(0.1))


def alone(documents):
  """Every document in rows of its own."""
  each = [packing.pack([x], LENGTH) for x in documents]
  owner = [i for i, rows in enumerate(each) for _ in rows["x"]]
  rows = {k: np.concatenate([r[k] for r in each]) for k in each[0]}
  rows["documents"] = np.where(
    rows["documents"] < 0, -1, np.asarray(owner)[:, None]
  ).astype(np.int32)
  return rows


@functools.cache
def scored(family="llama", sites="mlp", apart=False, **options):
  aim, params, documents, rows, queries, found = model(family, sites)
  score = influence.scorer(found, aim, **options)
  responses = {"ekfac": fit(family, sites), "dot": Identity()}
  data = alone(documents) if apart else rows
  return score(params, data, queries, responses, loop=Loop(2))


@pytest.mark.parametrize(
  ("family", "sites"),
  [
    ("llama", "linear"),
    ("gpt2", "mlp"),
    ("mixtral", "mlp"),
  ],
)
def test_scores_of_documents_and_tokens_add_up(family, sites):
  rows = model(family, sites)[3]
  options = {"by_site": True}
  whole = scored(family, sites, **options)
  parts = scored(family, sites, shares="segments", **options)
  tokens = scored(family, sites, shares="tokens", **options)
  own = scored(family, sites, apart=True)
  for name in ("ekfac", "dot"):
    close(parts[name].values.sum(axis=1), whole[name].values)
    segments = jax.nn.one_hot(
      rows["segments"] - 1, parts[name].values.shape[1], dtype=float
    )
    summed = np.einsum("ntp,ntq->npq", segments, tokens[name].values)
    close(summed, parts[name].values)
    for block, values in whole[name].by_site.items():
      close(parts[name].by_site[block].sum(axis=-2), values)
      close(tokens[name].by_site[block].sum(axis=-2), values)
    found = language.by_document(parts[name], rows)
    sites_of = [
      x.reshape(len(SIZES), -1, 3).sum(axis=1) for x in found.by_site.values()
    ]
    close(sum(sites_of), found.values)
    # Divided by the number of rows: there are more of them where all are alone.
    expected = np.zeros_like(found.values)
    separate = alone(model(family, sites)[2])
    np.add.at(expected, separate["documents"].max(axis=1), own[name].values)
    close(found.values * len(rows["x"]), expected * len(separate["x"]))


def test_a_document_s_score_is_the_derivative_of_its_own_loss():
  aim, params, documents, rows, queries, found = model()
  parts = scored(shares="segments")["dot"]
  scores = language.by_document(parts, rows).values
  grads = jax.vmap(jax.grad(aim.loss), (None, 0))
  of_blocks = jax.vmap(functools.partial(blocks.to_blocks, found))
  gradient = jax.jit(lambda data: of_blocks(grads(params, data)))
  asked = gradient(queries)
  for i in range(len(documents)):
    mine = {**rows, "mask": (rows["documents"] == i).astype(np.int32)}
    given = jax.tree.map(lambda x: x.sum(axis=0), gradient(mine))
    products = jax.tree.map(
      lambda g, m: jnp.einsum("q...,...->q", m, g), given, asked
    )
    expected = sum(jax.tree.leaves(products)) / len(rows["x"])
    close(scores[i], expected)


def test_low_rank_queries_score_alike_and_full_rank_equally():
  """A query of 6 tokens has a gradient of rank 6 at most."""
  exact = scored()
  close(scored(rank=6)["dot"].values, exact["dot"].values)
  errors = [
    np.linalg.norm(scored(rank=r)["ekfac"].values - exact["ekfac"].values)
    for r in (1, 3)
  ]
  assert errors[0] > errors[1] > 0


def test_padding_is_no_part_of_the_curvature():
  """Rows filled up to another length have the same curvature."""
  aim, params, _, rows, _, _ = model()
  covariances = []
  wide = {
    k: np.pad(x, ((0, 0), (0, 4)), constant_values=-(k == "documents"))
    for k, x in rows.items()
  }
  for data in (rows, wide):
    found = blocks.trace(
      aim.outputs,
      params,
      streams.example(data),
      select=decoder.SITES["mlp"],
    )
    run = gradients.backward_pass(found, aim, kronecker.MOMENTS)
    args = (params, None, None)
    fold = gradients.total(found, run)
    covariances.append(streams.fold(fold, args, data)[0])
  jax.tree.map(close, *covariances)
  positions = covariances[0]["blocks/mlp_in/kernel"].positions
  assert (positions == (rows["segments"] > 0).sum()).all()


def test_self_influence_and_relatif_of_documents():
  aim, params, documents, rows, queries, found = model()
  own = influence.self_influence(
    found, aim, params, rows, fit(), shares="segments"
  )
  with pytest.raises(ValueError, match="self-influence of 1 documents that"):
    language.by_document(own, rows)
  at = language.owner(rows, own.values.shape[1])
  separate = alone(documents)
  expected = influence.self_influence(found, aim, params, separate, fit())
  whole = separate["documents"].max(axis=1)
  for i, size in enumerate(SIZES):
    if size <= LENGTH + 1:
      n, others = len(rows["x"]), len(separate["x"])
      close(own.values[at == i] * n, expected.values[whole == i] * others)
  parts = scored(shares="segments", by_site=True)["ekfac"]
  fair = influence.relative(parts, own)
  filled = own.values > 0
  size = np.sqrt(own.values[filled] * own.normaliser)
  close(fair.values[filled], parts.values[filled] / size[:, None])
  assert (fair.values[~filled] == 0).all()
  with pytest.raises(ValueError, match="by `self_influence`"):
    influence.relative(scored()["ekfac"], own)
  cosine = influence.scorer(found, aim, shares="segments")(
    params, rows, queries, {"cosine": Cosine(Identity())}
  )["cosine"]
  lone = influence.scorer(found, aim)(
    params, separate, queries, {"cosine": Cosine(Identity())}
  )["cosine"]
  with pytest.raises(ValueError, match="cosine of 1 documents that"):
    language.by_document(cosine, rows)
  for i in (0, 1, 2, 4, 5):
    close(cosine.values[at == i][0], lone.values[whole == i][0])


def test_contrastive_queries_are_differences():
  aim, params, _, rows, queries, found = model()
  turn = lambda x: x[::-1].copy()
  pairs = {"wanted": queries, "other": jax.tree.map(turn, queries)}
  measured = language.contrastive(aim)
  score = influence.scorer(found, aim, measurement=measured)
  got = score(params, rows, pairs, {"ekfac": fit()})["ekfac"].values
  plain = scored()["ekfac"].values
  close(got, plain - plain[:, ::-1])


def test_completions_measure_the_answer_alone():
  tokenizer = text.tokenizer("bytes")
  rows = language.completions([("ab", "cde"), ("a", "b")], tokenizer)
  assert rows["x"].shape == (2, 4)
  np.testing.assert_array_equal(rows["mask"], [[0, 1, 1, 1], [1, 0, 0, 0]])
  for pairs, message in (
    ([], "no queries"),
    ([("ab", "c"), ("a", "")], r"query 1, \('a', ''\).*answer of 0"),
    ([("", "a")], "a prompt of 0"),
    ([("abc", "def")], "at most 5"),
  ):
    with pytest.raises(ValueError, match=message):
      language.completions(pairs, tokenizer, 4 if pairs else None)


def test_scores_of_other_rows_are_refused():
  rows = model()[3]
  scores = scored(shares="segments", by_site=True)["dot"]
  with pytest.raises(ValueError, match=r"scores of rows \(4, 3\)"):
    language.by_document(scored()["dot"], rows)
  fewer = {k: x[:2] for k, x in rows.items()}
  with pytest.raises(ValueError, match=r"wanted those of segments \[2, "):
    language.by_document(scores, fewer)
  with pytest.raises(ValueError, match="the rows hold document 5, and D=3"):
    language.by_document(scores, rows, 3)


def test_shares_that_do_not_exist():
  aim, params, _, rows, queries, found = model()
  with pytest.raises(ValueError, match=r"unknown shares 'words'"):
    influence.scorer(found, aim, shares="words")
  with pytest.raises(ValueError, match="does not say which part"):
    influence.scorer(found, aim._replace(segments=None), shares="tokens")
  with pytest.raises(ValueError, match="rank=0"):
    influence.scorer(found, aim, rank=0)
  with pytest.raises(ValueError, match="cosines are of rows or segments"):
    influence.scorer(found, aim, shares="tokens")(
      params, rows, queries, {"cosine": Cosine(Identity())}
    )
  with pytest.raises(ValueError, match="a token has no self-influence"):
    influence.self_influence(
      found, aim, params, rows, Identity(), shares="tokens"
    )
  for family, lost in (("gpt2", "tokens/embedding"), ("llama", "norm/scale")):
    aim, *_, found = model(family, "all")
    with pytest.raises(ValueError, match=f"'{lost}'.*sums over the 12 pos"):
      influence.scorer(found, aim, shares="segments")


def test_completions_of_token_ids_are_those_of_the_text():
  by = text.byte_tokenizer()
  pairs = [("a b", " c"), ("d", "ef")]
  ids = [(by.encode(prompt), by.encode(answer)) for prompt, answer in pairs]
  jax.tree.map(
    np.testing.assert_array_equal,
    language.completions(pairs, by),
    language.completions(ids, by),
  )


def test_a_store_has_a_row_for_each_piece_of_a_document(tmp_path):
  """What it holds of packed rows is what it holds of documents alone."""
  aim, params, documents, rows, queries, _ = model()
  names = [f"document {i}" for i in range(len(documents))]

  def scored(folder, train, shares, names):
    log = logra.logger(
      aim,
      params,
      train,
      key=jax.random.key(0),
      dimension=4,
      select=decoder.SITES["mlp"],
      shares=shares,
    )
    options = {"dtype": "float32", "names": names, "per_shard": 2}
    store = log.build(tmp_path / folder, params, train, **options)
    lens = lenses.lens(store, log.ask(params, queries), "logra")
    return store, search.scores(lens), (log, lens)

  store, scores, (log, lens) = scored("packed", rows, "segments", names)
  assert store.rows == len(documents) + 1 > len(rows["x"])
  found, total = search.by_document(scores * store.rows, store.names)
  single, owners = alone(documents), [0, 1, 2, 3, 3, 4, 5]
  repeated = [names[i] for i in owners]
  apart, each, _ = scored("alone", single, "rows", repeated)
  wanted, want = search.by_document(each * apart.rows, apart.names)
  order = [found.index(name) for name in wanted]
  close(total[order], want, atol=1e-4 * np.abs(want).max())
  # By token along the same directions, which is how a report shows them.
  seen = layout.split(jnp.asarray(lens.directions), log.layout)
  fixed = projected.back(seen, log.sides)
  found = model()[-1]
  score = influence.scorer(found, aim, shares="tokens")
  tokens = score(params, rows, queries, {"seen": lambda grads: fixed})["seen"]
  owned = [
    tokens.values[rows["documents"] == i].sum(axis=0) * len(rows["x"])
    for i in range(len(documents))
  ]
  close(np.array(owned), want / apart.rows, atol=1e-4 * np.abs(want).max())
