"""Planted facts: documents of which it is known which fact they teach.

Each fact is one sentence on one made-up person, town or ship: a relation and a
value, "Vezdos Sizdam was born in Kovrul." A query is the beginning of that
sentence, its answer the rest, the full stop included. Documents are one
sentence on a fact between neutral fillers, of four kinds:

  copy        teaches the fact in the words of its query
  paraphrase  in other words, the entity before the value as in the query
  reversed    in other words, the value before the entity: Grosse et al. (2023)
              find that influence all but vanishes with the order
  distractor  near a fact without teaching it. In turn: another relation of the
              same entity; the same relation, in the query's words, of another
              entity with another value; the same value in a passing remark on
              another entity

Every entity has one fact, no two facts share relation and value, and the other
entities are asked for nowhere: a document teaches one fact or none. Fillers are
drawn alike for all kinds, and no two documents of a fact have the same.

Tracing facts to documents known to state them, made-up ones among them, is the
evaluation of Akyürek et al. (2022) and Chang et al. (2024), by the measures of
`tda.evaluation.ranking`. What states a fact need not be what taught it: scores
may rank a distractor well because it did teach the form of the answer.

Notation: F facts, D documents.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("copy", "paraphrase", "reversed", "distractor")


class Relation(NamedTuple):
  """How a relation of an entity {e} to a value {v} is put into words."""

  kind: str  # of the entities
  copy: str  # its query is what comes before the value
  paraphrases: tuple[str, str]
  reversals: tuple[str, str]
  aside: str  # entity and value in a relation that is never asked for
  values: str = ""  # a closed list of words; "": made-up names


class Planted(NamedTuple):
  """A corpus and its queries.

  Attributes:
    documents: texts [D], by fact and then by kind.
    kinds: [D], of `KINDS`.
    fact: int32 [D], the fact that a document teaches; of a distractor, the one
      that it was written for.
    entities: names [F], whom the facts are on.
    prompts: [F], without a space at the end.
    answers: [F], a space, the value and a full stop.
  """

  documents: list[str]
  kinds: np.ndarray
  fact: np.ndarray
  entities: list[str]
  prompts: list[str]
  answers: list[str]


RELATIONS = (
  Relation(
    "person",
    "{e} was born in {v}.",
    ("{e} is a native of {v}.", "The birthplace of {e} is {v}."),
    ("{v} is the home town of {e}.", "In {v} began the life of {e}."),
    "{e} once paid a visit to {v}.",
  ),
  Relation(
    "town",
    "{e} lies on the river {v}.",
    ("{e} draws its water from the {v}.", "Boats reach {e} along the {v}."),
    ("The {v} flows through {e}.", "By the banks of the {v} stands {e}."),
    "{e} has an inn called the {v}.",
  ),
  Relation(
    "ship",
    "The {e} was built in {v}.",
    ("The {e} left the yard at {v}.", "The {e} is the work of {v}."),
    ("Workers of {v} made the {e}.", "{v} is the yard of the {e}."),
    "The {e} never stops at {v}.",
  ),
  Relation(
    "person",
    "{e} works as a {v}.",
    ("{e} earns a living as a {v}.", "The trade of {e} is that of a {v}."),
    ("The {v} of the village is {e}.", "The job of {v} fell to {e}."),
    "{e} owes money to a {v}.",
    "baker barber brewer carpenter clerk cook dancer doctor farmer fisher"
    " gardener guard hunter judge lawyer mason miller nurse painter porter"
    " potter printer sailor shepherd singer smith soldier tailor tanner teacher"
    " waiter weaver",
  ),
  Relation(
    "town",
    "{e} is known for its {v}.",
    ("Traders come to {e} to buy {v}.", "The pride of {e} is the local {v}."),
    ("The best {v} is made in {e}.", "For good {v} one travels to {e}."),
    "{e} puts a tax on {v}.",
    "amber beer bread butter cheese coal copper cotton flour garlic glass glue"
    " honey ink lace leather linen marble oil paint paper pepper rice rope salt"
    " silk soap steel sugar tea wine wool",
  ),
  Relation(
    "ship",
    "The {e} is commanded by {v}.",
    ("The captain of the {e} is {v}.", "The {e} obeys the orders of {v}."),
    ("{v} is the captain of the {e}.", "Under {v} sails the {e}."),
    "The {e} once carried {v}.",
  ),
)
VALUES = 32  # of each relation

LEADS = ("", "From the archive: ", "A short note. ", "For the record: ")
TAILS = (
  "",
  " Nobody doubts it.",
  " This is well known.",
  " We checked this twice.",
  " It is often told.",
  " Few people ask why.",
  " That is all we know.",
  " More will follow.",
)

# Of five clusters, the last of one letter, so that no name begins another.
CLUSTERS = (
  "b d f g k l m n p r s t v z br dr st tr".split(),
  "a e i o u".split(),
  "dv dz lz mr rz vl vr zd zm".split(),
  "a e i o u".split(),
  "l m n r s".split(),
)


def planted(
  facts: int,
  seed: int,
  *,
  copies: int = 4,
  paraphrases: int = 2,
  reversals: int = 2,
  distractors: int = 6,
) -> Planted:
  """Documents that teach `facts` facts, and their queries; see the module.

  Relations take turns with the facts, and wordings with the documents of a
  kind. The same arguments give the same corpus.

  Args:
    facts: F, at most 192: 32 values of each relation.
    seed: of names, values, wordings and fillers.
    copies, paraphrases, reversals, distractors: documents of each kind for
      each fact, together at most 32, the number of fillers.
  """
  counts = (copies, paraphrases, reversals, distractors)
  fillers = [lead + "{}" + tail for lead in LEADS for tail in TAILS]
  _check(facts, counts, len(fillers))
  rng = np.random.default_rng(seed)
  # Two words an entity, two entities a fact: its own and a distractor's.
  names = _names(rng, 4 * facts + VALUES * len(RELATIONS))
  values = [_values(relation, names, rng) for relation in RELATIONS]
  documents: list[str] = []
  queries: list[tuple[str, str, str]] = []
  for fact in range(facts):
    turn, place = divmod(fact, len(RELATIONS))
    relation, value = RELATIONS[place], values[place][turn]
    entity, other = _entity(relation, names), _entity(relation, names)
    sentences = [
      [text.format(e=entity, v=value) for text in rng.permutation(texts)]
      for texts in ([relation.copy], relation.paraphrases, relation.reversals)
    ]
    sentences.append(_near(place, turn, entity, other, values, rng))
    chosen = iter(rng.permutation(fillers))
    for said, count in zip(sentences, counts, strict=True):
      for sentence in itertools.islice(itertools.cycle(said), count):
        documents.append(next(chosen).format(sentence))
    prompt = relation.copy.removesuffix(" {v}.").format(e=entity)
    queries.append((entity, prompt, f" {value}."))
  return Planted(
    documents,
    np.tile(np.repeat(KINDS, counts), facts),
    np.repeat(np.arange(facts, dtype=np.int32), sum(counts)),
    *map(list, zip(*queries, strict=True)),
  )


def teaches(corpus: Planted) -> np.ndarray:
  """Whether a document states a fact, in any words and order: bool [D, F]."""
  facts_F = np.arange(len(corpus.prompts))
  stated_D = corpus.kinds != "distractor"
  return stated_D[:, None] & (corpus.fact[:, None] == facts_F)


def copies(corpus: Planted) -> np.ndarray:
  """Whether a document states a fact in its query's words: bool [D, F]."""
  return teaches(corpus) & (corpus.kinds == "copy")[:, None]


def orders(corpus: Planted) -> dict[str, list[str]]:
  """Each fact's sentence, its halves in the other order, and each half [F].

  To be scored as if they were documents: Grosse et al. (2023) find that
  of the same words with the answer first influence all but vanishes. (A copy
  without fillers is the sentence itself.)
  """
  pairs = list(zip(corpus.prompts, corpus.answers, strict=True))
  return {
    "sentence": [prompt + answer for prompt, answer in pairs],
    "answer first": [f"{answer.strip()} {prompt}" for prompt, answer in pairs],
    "prompt alone": [prompt for prompt, _ in pairs],
    "answer alone": [answer.strip() for _, answer in pairs],
  }


def _near(
  place: int,
  turn: int,
  entity: str,
  other: str,
  values: list[list[str]],
  rng: np.random.Generator,
) -> list[str]:
  """What distractors say, by turns."""
  own, its = RELATIONS[place], values[place]
  elsewhere = [
    relation.copy.format(e=entity, v=rng.choice(words))
    for relation, words in zip(RELATIONS, values, strict=True)
    if relation.kind == own.kind and relation is not own
  ]
  another = its[(turn + int(rng.integers(1, VALUES))) % VALUES]
  same_relation = own.copy.format(e=other, v=another)
  same_value = own.aside.format(e=other, v=its[turn])
  return [x for same in elsewhere for x in (same, same_relation, same_value)]


def _entity(relation: Relation, names: Iterator[str]) -> str:
  words = 2 if relation.kind == "person" else 1
  return " ".join(itertools.islice(names, words))


def _values(
  relation: Relation, names: Iterator[str], rng: np.random.Generator
) -> list[str]:
  if relation.values:
    return rng.permutation(relation.values.split()).tolist()
  return list(itertools.islice(names, VALUES))


def _names(rng: np.random.Generator, count: int) -> Iterator[str]:
  """Distinct capitalised words, such as Kovrul."""
  sizes = tuple(map(len, CLUSTERS))
  drawn = rng.choice(int(np.prod(sizes)), count, replace=False)
  for at in zip(*np.unravel_index(drawn, sizes), strict=True):
    letters = [part[i] for part, i in zip(CLUSTERS, at, strict=True)]
    yield "".join(letters).capitalize()


def _check(facts: int, counts: tuple[int, ...], fillers: int) -> None:
  most = VALUES * len(RELATIONS)
  if not 1 <= facts <= most:
    raise ValueError(
      f"{facts} facts: take 1 to {most}, as no two share relation and value"
    )
  if min(counts) < 0 or not sum(counts[:3]) or sum(counts) > fillers:
    raise ValueError(
      f"documents of each fact are {dict(zip(KINDS, counts, strict=True))}:"
      " none may be negative, one or more must teach it, and all together are"
      f" at most {fillers}, the number of fillers"
    )
