"""Planted facts: every document teaches what it is said to, and no more."""

import collections

import numpy as np
import pytest

from tda.data import facts, packing, sentences, text

SEEDS = (0, 1, 2)
COUNTS = {"copies": 3, "paraphrases": 2, "reversals": 3, "distractors": 7}
MOST = 192


@pytest.fixture(scope="module", params=SEEDS)
def corpus(request):
  return facts.planted(MOST, request.param, **COUNTS)


def rows(corpus):
  """(document, kind, entity, prompt, value) of every document."""
  for said, kind, fact in zip(
    corpus.documents, corpus.kinds, corpus.fact, strict=True
  ):
    value = corpus.answers[fact][1:-1]
    yield said, kind, corpus.entities[fact], corpus.prompts[fact], value


def test_the_seed_makes_the_corpus():
  one, same, other = (facts.planted(12, seed) for seed in (0, 0, 1))
  for a, b in zip(one, same, strict=True):
    np.testing.assert_array_equal(a, b)
  assert not set(one.documents) & set(other.documents)


def test_counts_and_order(corpus):
  assert len(corpus.documents) == MOST * sum(COUNTS.values())
  assert len(set(corpus.documents)) == len(corpus.documents)
  assert corpus.fact.dtype == np.int32 and np.all(np.diff(corpus.fact) >= 0)
  pairs = zip(corpus.fact.tolist(), corpus.kinds.tolist(), strict=True)
  counted = collections.Counter(pairs)
  expected = dict(zip(facts.KINDS, COUNTS.values(), strict=True))
  assert counted == {
    (fact, kind): n for fact in range(MOST) for kind, n in expected.items()
  }
  taught = facts.teaches(corpus)
  assert taught.dtype == bool and taught.shape == (len(corpus.kinds), MOST)
  np.testing.assert_array_equal(taught.sum(0), 3 + 2 + 3)
  np.testing.assert_array_equal(taught.any(1), corpus.kinds != "distractor")


def test_no_two_facts_are_the_same(corpus):
  assert len(set(corpus.entities)) == MOST
  asked = [
    (prompt.replace(entity, ""), answer)
    for prompt, entity, answer in zip(
      corpus.prompts, corpus.entities, corpus.answers, strict=True
    )
  ]
  assert len({relation for relation, _ in asked}) == len(facts.RELATIONS)
  assert len(set(asked)) == MOST


def test_words_of_each_kind(corpus):
  for said, kind, entity, prompt, value in rows(corpus):
    words = prompt.split(entity)[1]
    states = entity in said and value in said
    if kind == "copy":
      assert f"{prompt} {value}." in said
    elif kind == "distractor":
      assert not states and (entity in said or value in said or words in said)
    else:
      assert states and words not in said
      backwards = said.index(value) < said.index(entity)
      assert backwards == (kind == "reversed")


def test_a_document_states_its_own_fact_and_no_other(corpus):
  by_entity = dict(zip(corpus.entities, corpus.answers, strict=True))
  for said, kind, entity, _, _ in rows(corpus):
    named = [name for name in by_entity if name in said]
    stated = [name for name in named if by_entity[name][1:-1] in said]
    assert stated == ([] if kind == "distractor" else [entity])
    assert set(named) <= {entity}


def test_distractors_take_turns(corpus):
  """The same entity; the same relation; the same value; from the start."""
  place = 0
  for said, kind, entity, prompt, value in rows(corpus):
    place = place + 1 if kind == "distractor" else 0
    near = (entity in said, prompt.split(entity)[1] in said, value in said)
    if place:
      assert near == tuple((place - 1) % 3 == i for i in range(3))


def test_short_and_plain(corpus):
  tokens = text.encode(corpus.documents, text.byte_tokenizer())
  assert max(map(len, tokens)) <= 96
  assert all(x.isascii() for x in corpus.documents)
  assert not any("{" in x or "  " in x for x in corpus.documents)


def test_only_what_is_asked_for():
  made = facts.planted(
    1, 0, copies=0, paraphrases=0, reversals=32, distractors=0
  )
  assert set(made.kinds) == {"reversed"} and len(set(made.documents)) == 32


@pytest.mark.parametrize(
  ("count", "options", "message"),
  [
    (0, {}, "0 facts: take 1 to 192"),
    (193, {}, "193 facts: take 1 to 192"),
    (1, {"copies": -1}, "'copy': -1.*negative"),
    (
      1,
      dict.fromkeys(COUNTS, 0) | {"distractors": 3},
      "one or more must teach",
    ),
    (1, {"copies": 30}, "'copy': 30.*at most 32"),
  ],
)
def test_refuses(count, options, message):
  with pytest.raises(ValueError, match=message):
    facts.planted(count, 0, **options)


def test_as_a_data_set_copies_are_relevant_and_answers_are_asked():
  data = sentences.planted(seed=3, train_size=5 * 14, test_size=4)
  corpus = facts.planted(5, 3)
  assert data.kind == "language" and data.num_outputs == data.vocab
  assert data.train["x"].shape == data.train["y"].shape
  assert len(data.train["x"]) == 5 * 14 and len(data.test["x"]) == 4
  documents, asked = packing.tokens(data.train), packing.tokens(data.test)
  assert all(one[-1] == data.vocab - 1 for one in documents)
  assert max(one.max() for one in documents) == data.vocab - 1
  for q, question in enumerate(asked):
    said = [" ".join(map(str, one)) for one in documents]
    states = [" ".join(map(str, question)) in one for one in said]
    np.testing.assert_array_equal(data.relevant[:, q], states)
    answered = data.test["y"][q][data.test["mask"][q] > 0]
    words = len(corpus.answers[q][1:-1].split()) + 1  # and the full stop
    np.testing.assert_array_equal(answered, question[-words:])
  assert data.relevant.sum(axis=0).tolist() == [4] * 4
  np.testing.assert_array_equal(
    data.train["mask"].sum(axis=1), [len(one) - 1 for one in documents]
  )


def test_a_data_set_has_whole_facts():
  with pytest.raises(ValueError, match=r"train_size=15.*14 documents"):
    sentences.planted(train_size=15)
  with pytest.raises(ValueError, match="test_size=2"):
    sentences.planted(train_size=14, test_size=2)


def test_orders_have_the_same_words():
  corpus = facts.planted(6, 0)
  found = facts.orders(corpus)
  for prompt, answer, whole, turned in zip(
    corpus.prompts,
    corpus.answers,
    found["sentence"],
    found["answer first"],
    strict=True,
  ):
    assert whole == prompt + answer and turned == f"{answer[1:]} {prompt}"
    assert sorted(whole.split()) == sorted(turned.split())
  assert found["prompt alone"] == corpus.prompts
