"""Books, code, speeches, dialogue, maths: which of them taught what?

Question: a small model is trained on documents of five kinds, as many of each,
and asked to go on with others. How much of the positive influence on these
comes from documents of their own kind, and where does the rest come from?

  python -m experiments.corpora --to=corpora ...  (its sources: see there)
  python -m experiments.influence_lm --config=configs/mixed_lm.py \
    --config.documents=corpora --config.tokenizer=corpora
  (--config=configs/mixed_lm.py:smoke for a small run)

Any folder with folders of text does, and any tokenizer.

Hardware: two CPU cores, busy with four other jobs: 830 seconds of training
(1.25 million parameters, at the end 4.3 nats per token), 525 of fitting, 317 of
scanning. 4.57 nats per token, 2.33 bits per byte, on the halves that are asked
for. Shares: see `experiments/README.md`.
"""

from ml_collections import ConfigDict

from configs import planted_lm

SIZES = ("full", "smoke")


def get_config(size: str = "full") -> ConfigDict:
  if size not in SIZES:
    raise ValueError(f"unknown size {size!r}; choose from {SIZES}")
  config = planted_lm.get_config(size)
  config.update(name="mixed_lm", documents="", pattern="*/*.txt", ask=8)
  config.update(length=384, batch_size=8, steps=500, learning_rate=3e-3)
  if size == "smoke":
    config.update(name="mixed_lm_smoke", ask=2, length=512, steps=10)
  return config
