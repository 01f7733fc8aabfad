"""Documents that teach made-up facts: are they found?

Question: a language model is trained on documents of which it is known which
fact each of them teaches. Asked for a fact, which method ranks those first that
taught it: influence, its baselines, or retrieval by words?

  python -m experiments.influence_lm --config=configs/planted_lm.py
  (--config=configs/planted_lm.py:smoke for a small run)

Hardware: two CPU cores. Time and numbers: see `experiments/README.md`.
"""

from ml_collections import ConfigDict

from configs import stdlib_lm

SIZES = ("full", "smoke")


def get_config(size: str = "full") -> ConfigDict:
  if size not in SIZES:
    raise ValueError(f"unknown size {size!r}; choose from {SIZES}")
  config = stdlib_lm.get_config()
  config.update(name="planted_lm", documents="planted", length=128)
  config.update(steps=330, learning_rate=2e-3, batch_size=16)
  config.model = ""  # a folder, or a .gguf with its tokenizer; "": trained here
  config.tune = False  # train on from that model

  # Facts, and the documents of each kind that go with one.
  config.facts = 48
  config.copies = 4
  config.paraphrases = 2
  config.reversals = 2
  config.distractors = 6

  # Attribution.
  config.prompts = ()  # of documents that are not planted
  config.completions = ()  # one for each, or none: what the model answers
  config.ask = 0  # documents of each folder to hold out, halves as prompts
  config.answer_tokens = 48  # at most, of an answer
  config.limit = 0  # documents, the first; 0 for all
  config.sites = "mlp"  # or "linear": every matrix of the blocks
  config.labels = "sampled"
  config.damping = "0.1 relative"
  config.rank = 0  # of the queries' gradients; 0 keeps them whole
  config.query_batch = 64
  config.top = 5  # documents that are shown of a query
  config.shown = 5  # queries that are shown
  config.prefilter = 100  # documents that a lexical first stage would keep
  if size == "smoke":
    config.update(name="planted_lm_smoke", width=32, layers=2, mlp_width=64)
    config.update(steps=10, batch_size=8, warmup=5, facts=4, prefilter=10)
  return config
