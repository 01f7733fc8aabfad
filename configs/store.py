"""A gradient store of planted facts: built once, asked by many methods.

Question: how much of what EK-FAC finds among documents that teach made-up facts
does a store of projected gradients still find, in how much less space?

  python -m experiments.build_store --config=configs/store.py
  python -m experiments.query --store=workdir/build_store/store
  (--config=configs/store.py:smoke for a small run)

Books, code, speeches, dialogue and maths, as in `configs/mixed_lm.py`, or any
other documents:

  python -m experiments.build_store --config=configs/store.py:mixed \
    --config.documents=corpora --config.tokenizer=corpora
  python -m experiments.procedural --store=workdir/build_store/store_mixed
  python -m experiments.build_store --config=configs/store.py \
    --config.documents=FOLDER --config.pattern="*.txt" --config.model=FILE.gguf

Hardware: two CPU cores. Time and numbers: see `experiments/README.md`.
"""

from ml_collections import ConfigDict

from configs import mixed_lm, planted_lm

SIZES = (*planted_lm.SIZES, "mixed")


def get_config(size: str = "full") -> ConfigDict:
  if size == "mixed":
    config = mixed_lm.get_config()
  else:
    config = planted_lm.get_config(size)
  config.name = "store" if size == "full" else f"store_{size}"
  config.projection = "random"  # or "sparse"; "principal" after a K-FAC pass
  config.dimension = 16  # of each side of a matrix
  config.kept = "bfloat16"  # or "float32", or "int8" with scales
  config.per_shard = 0  # rows of the corpus; 0: as many as make 64 MiB
  return config
