"""A decoder of bytes on the source of Python's standard library.

Question: none yet; a language model to attribute, trained in minutes on text
that every machine has.

  python -m experiments.train_lm --config=configs/stdlib_lm.py
  (--config=configs/stdlib_lm.py:smoke for a small run)

Hardware: two CPU cores, busy with other jobs: 560 seconds for 300 steps (792 k
parameters; Python 3.11's 168 files). At the end 1.55 nats per byte in training
and 1.63 on held-out files, 2.35 bits.
"""

from ml_collections import ConfigDict

SIZES = ("full", "smoke")


def get_config(size: str = "full") -> ConfigDict:
  if size not in SIZES:
    raise ValueError(f"unknown size {size!r}; choose from {SIZES}")
  config = ConfigDict()
  config.name = "stdlib_lm"

  # Documents: "stdlib", a folder of text, or a file.jsonl; empty ones are left
  # out.
  config.documents = "stdlib"
  config.pattern = "*.py"  # of a folder's files; the field of a JSONL line
  config.tokenizer = "bytes"  # or the path of a tokenizer.json
  config.end = "<|endoftext|>"  # its token at the end of a document
  config.held_out = 0.05  # fraction of the documents

  # Model.
  config.family = "llama"
  config.width = 128
  config.layers = 4
  config.heads = 4
  config.kv_heads = 2  # 0: as many as heads
  config.mlp_width = 344
  config.experts = 0
  config.length = 256  # tokens
  config.dtype = "float32"  # of activations
  config.remat = "none"

  # Training: AdamW, linear warm-up, cosine to a tenth.
  config.steps = 300
  config.batch_size = 16  # rows
  config.learning_rate = 3e-3
  config.warmup = 30  # steps
  config.weight_decay = 0.1
  config.model_axis = 1  # devices that share a model; the others share a batch

  config.seed = 0  # of split, packing, initialisation and order
  if size == "smoke":
    config.update(
      name="stdlib_lm_smoke",
      pattern="[a-c]*.py",
      width=32,
      layers=2,
      mlp_width=64,
      length=64,
      steps=30,
      batch_size=8,
      warmup=5,
    )
  return config
