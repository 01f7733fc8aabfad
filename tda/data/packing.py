"""Tokenised documents in rows of one length, several in a row.

Notation: T positions of a row, N rows, S pieces of documents.

A row is cut from T + 1 tokens: "x" are the first T, "y" the last T, so that
position t predicts y[t] from x[..t]. Pieces of documents stand one after
another; "segments" numbers them from 1 within a row, 0 where nothing stands.
"mask" is 1 where x[t] and y[t] are of the same piece: no prediction crosses
from a document to the next, and the first token of each is not predicted.
"documents" says whose token y[t] is, as a place in the list of documents, and
-1 where the mask is 0: sums over it give each document's share of a row's loss.

A document of more than T + 1 tokens is cut into pieces that share one token,
the last target of one being the first input of the next: every token but the
document's first is predicted exactly once, each piece from its own beginning.
Pieces of which nothing is to be predicted are left out.
"""

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

Rows = dict[str, np.ndarray]


class Piece(NamedTuple):
  """Part of a document: its place in the list, tokens, which are targets."""

  document: int
  tokens: np.ndarray
  targets: np.ndarray


class Source:
  """Packed rows one by one: a `grain.sources.RandomAccessDataSource`.

  `grain.MapDataset.source(Source(rows))` is a data set of them.
  """

  def __init__(self, rows: Rows):
    self._rows = rows

  def __len__(self) -> int:
    return len(self._rows["x"])

  def __getitem__(self, index: int) -> Rows:
    return {name: x[index] for name, x in self._rows.items()}


def pack(
  documents: Sequence[np.ndarray],
  length: int,
  *,
  targets: Sequence[np.ndarray] | None = None,
  seed: int | None = None,
  vocab: int | None = None,
) -> Rows:
  """Rows of `length` positions that hold all documents.

  Pieces are taken in random order by `seed` (None: as they come) and each goes
  into the row with the least room that it fits in: the same arguments give the
  same rows, and few positions stay empty.

  Args:
    documents: token ids [any] of each, two or more.
    length: T.
    targets: for each document, which of its tokens count (a first one never
      does); None: all.
    seed: of the order of the pieces.
    vocab: if given, ids are checked to be below it.

  Returns:
    {"x", "y", "segments", "documents", "mask"}: int32 [N, T].
  """
  targets = targets or [np.ones(len(x), bool) for x in documents]
  _check(documents, targets, length, vocab)
  pieces = list(_pieces(documents, targets, length))
  if seed is not None:
    order = np.random.default_rng(seed).permutation(len(pieces))
    pieces = [pieces[i] for i in order]
  bins = _best_fit([len(piece.tokens) for piece in pieces], length + 1)
  rows = [_row([pieces[i] for i in inside], length) for inside in bins]
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def trimmed(rows: Rows) -> Rows:
  """The rows without the last positions, of which none of them uses one."""
  used = np.flatnonzero(rows["segments"].any(axis=0))
  return {name: x[:, : used[-1] + 1] for name, x in rows.items()}


def completion(
  prompt: Sequence[int], answer: Sequence[int], length: int
) -> Rows:
  """One row [T] whose loss is that of the answer's tokens alone.

  The measurement of Grosse et al. (2023): −log p(answer | prompt), summed.
  """
  size = len(prompt) + len(answer)
  if not len(prompt) or not len(answer) or size > length + 1:
    raise ValueError(
      f"a prompt of {len(prompt)} and an answer of {len(answer)} tokens: each"
      f" needs one or more, and both together at most {length + 1}, one more"
      " than the row's length"
    )
  tokens = np.asarray([*prompt, *answer], np.int32)
  rows = pack([tokens], length, targets=[np.arange(size) >= len(prompt)])
  return {name: x[0] for name, x in rows.items()}


def tokens(rows: Rows) -> list[np.ndarray]:
  """The tokens of each row, which is one document and predicts its last."""
  several = np.flatnonzero(rows["segments"].max(axis=1) > 1)
  if len(several):
    raise ValueError(f"row {several[0]} holds several documents: pack one each")
  whole = np.column_stack([rows["x"], rows["y"][:, -1]])
  kept = np.column_stack([rows["segments"], rows["mask"][:, -1]]) > 0
  return [row[inside] for row, inside in zip(whole, kept, strict=True)]


def filled(rows: Rows) -> float:
  """Share of positions that predict something."""
  return float(rows["mask"].mean())


def _pieces(
  documents: Sequence[np.ndarray], targets: Sequence[np.ndarray], length: int
) -> Iterator[Piece]:
  for number, (x, kept) in enumerate(zip(documents, targets, strict=True)):
    for start in range(0, len(x) - 1, length):
      inside = slice(start, start + length + 1)
      if np.any(kept[inside][1:]):
        yield Piece(number, np.asarray(x[inside]), np.asarray(kept[inside]))


def _best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
  """Places of the pieces in each row, in the order of opening."""
  rows: list[list[int]] = []
  spaces: list[int] = []  # that rows have left, ascending, without repeats
  with_space: dict[int, list[int]] = {}
  for i, size in enumerate(sizes):
    at = bisect.bisect_left(spaces, size)
    if at == len(spaces):
      place, space = len(rows), room
      rows.append([])
    else:
      space = spaces[at]
      place = with_space[space].pop()
      if not with_space[space]:
        del spaces[at]
    rows[place].append(i)
    left = with_space.setdefault(space - size, [])
    if not left:
      bisect.insort(spaces, space - size)
    left.append(place)
  return rows


def _row(pieces: Sequence[Piece], length: int) -> Rows:
  tokens = np.zeros(length + 1, np.int32)
  segments = np.zeros(length + 1, np.int32)
  documents = np.full(length + 1, -1, np.int32)
  targets = np.zeros(length + 1, bool)
  start = 0
  for number, piece in enumerate(pieces, 1):
    inside = slice(start, start + len(piece.tokens))
    tokens[inside], segments[inside] = piece.tokens, number
    documents[inside], targets[inside] = piece.document, piece.targets
    start = inside.stop
  mask = (segments[:-1] == segments[1:]) & targets[1:]
  return {
    "x": tokens[:-1],
    "y": tokens[1:].copy(),
    "segments": segments[:-1],
    "documents": np.where(mask, documents[1:], -1).astype(np.int32),
    "mask": mask.astype(np.int32),
  }


def _check(
  documents: Sequence[np.ndarray],
  targets: Sequence[np.ndarray],
  length: int,
  vocab: int | None,
) -> None:
  if length < 1 or not len(documents):
    raise ValueError(
      f"{len(documents)} documents in rows of {length} positions: one or more"
      " of each are needed"
    )
  if [len(x) for x in targets] != [len(x) for x in documents]:
    raise ValueError("`targets` say for each token of each document: one each")
  hidden = [i for i, x in enumerate(targets) if not np.any(x[1:])]
  if hidden:
    raise ValueError(
      f"nothing is predicted in {len(hidden)} documents, the first of them at"
      f" {hidden[0]}: they have fewer than two tokens, or `targets` hide all."
      " Leave them out; tda.data.text.encode adds an end to every document"
    )
  low = min(int(np.min(x)) for x in documents)
  high = max(int(np.max(x)) for x in documents)
  if low < 0 or (vocab is not None and high >= vocab):
    raise ValueError(
      f"token ids from {low} to {high} for a vocabulary of {vocab}: these"
      " documents are of another tokenizer"
    )
