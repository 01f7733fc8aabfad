"""What `influence_lm` asks: a corpus, prompts, and the model's answers."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from experiments import language
from experiments.language import Model
from tda import records
from tda.data import facts, retrieval, text
from tda.evaluation.workdir import Workdir
from tda.models import generation

SITES = ("mlp", "linear")


class Task(NamedTuple):
  """A corpus, what is asked of it, and what is known to be right."""

  names: list[str]
  texts: list[str]
  pairs: list[tuple[str, str]]
  kinds: np.ndarray | None = None  # [D], of planted documents
  fact: np.ndarray | None = None  # [D]
  orders: Mapping[str, list[str]] = MappingProxyType(
    {}
  )  # of a fact's words [Q]


def asked(setting: ConfigDict) -> Task:
  """The documents and the queries of a setting."""
  if setting.sites not in SITES:
    raise ValueError(
      f"sites={setting.sites!r}: gradients of documents are those of {SITES}"
    )
  if setting.documents == "planted":
    if setting.facts < 2 or setting.copies < 1:
      raise ValueError(
        f"{setting.facts} facts with {setting.copies} copies: take 2 facts or"
        " more, and 1 copy or more, which are what is looked for"
      )
    corpus = language.planted(setting)
    pairs = list(zip(corpus.prompts, corpus.answers, strict=True))
    known = zip(corpus.kinds, corpus.fact, strict=True)
    return Task(
      [f"{kind} of fact {fact}" for kind, fact in known],
      corpus.documents,
      pairs,
      corpus.kinds,
      corpus.fact,
      facts.orders(corpus),
    )
  prompts = setting.prompts
  completions = setting.completions or [""] * len(prompts)
  if len(prompts) != len(completions) or not prompts:
    raise ValueError(
      f"{len(prompts)} prompts and {len(completions)} completions: give"
      " --config.prompts and --config.completions, tuples of text of the same"
      " length, or prompts alone, for what the model answers"
    )
  texts = text.documents(setting.documents, setting.pattern)
  names = [*texts][: setting.limit or None]
  pairs = list(zip(prompts, completions, strict=True))
  return Task(names, [texts[name] for name in names], pairs)


def answered(
  setting: ConfigDict, workdir: Workdir, model: Model, task: Task
) -> Task:
  """With what the model itself says as completions."""
  by, prompts = model.tokenizer, [prompt for prompt, _ in task.pairs]
  tokens = [by.encode(prompt) for prompt in prompts]

  def compute():
    found = generation.greedy(
      model.config,
      model.params,
      tokens,
      setting.answer_tokens,
      end=by.end,
      label="answers",
    )
    padded = np.full((len(found), setting.answer_tokens), -1)
    for row, one in zip(padded, found, strict=True):
      row[: len(one)] = one
    return {"answers": padded}

  which = records.digest({"prompts": np.array(prompts)})[:8]
  which = f"answers_{which}_{setting.answer_tokens}"
  rows = workdir.stage(which, compute)["answers"]
  said = [by.decode(row[row >= 0].tolist()) for row in rows]
  silent = [
    prompt for prompt, one in zip(prompts, said, strict=True) if not one
  ]
  if silent:
    raise ValueError(
      f"the model ends after {silent[0]!r} without a word: ask otherwise, or"
      " give --config.completions"
    )
  workdir.record("answers", dict(zip(prompts, said, strict=True)))
  return task._replace(pairs=list(zip(prompts, said, strict=True)))


def lexical(task: Task) -> dict[str, np.ndarray]:
  """Scores [D, Q] by the words that documents and queries share."""
  count = len(task.texts)
  words, _ = text.words([*task.texts, *map("".join, task.pairs)])
  of = {"bm25": retrieval.bm25, "tfidf": retrieval.tfidf}
  return {k: score(words[:count], words[count:]) for k, score in of.items()}
