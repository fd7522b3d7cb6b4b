"""TensorFlow Recommenders' step on the batches of benchmarks/training.py, for an interpreter that has it.

    python benchmarks/training.py --tfrs-python TFRS/bin/python

starts this file, with TFRS made by `python -m venv TFRS; TFRS/bin/pip install tensorflow-cpu tensorflow-recommenders
tf-keras` (TFRS wants Keras 2). It imports nothing of this package: the batches come as files of arrays, whose keys are
KEY/values and KEY/offsets of every bag, user and item numbers.

The same tables under Adagrad with sparse gradients, the same towers under Adam, sums for bags, and
tfrs.tasks.Retrieval: softmax over the batch, temperature .1, no metrics; compiled by tf.function, one thread.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ |= {"TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)


def main() -> None:
    folder, warm = Path(sys.argv[1]), int(sys.argv[2])
    facts = json.loads((folder / "facts.json").read_text())  # tables: name, rows, dim; keys: name, table; hidden, dim
    tables = {
        name: tf.Variable(tf.random.uniform([rows, dim], -0.1, 0.1), name=name) for name, rows, dim in facts["tables"]
    }
    towers = {
        side: tf.keras.Sequential([
            tf.keras.layers.Dense(facts["hidden"], activation="relu"), tf.keras.layers.Dense(facts["dim"])
        ])
        for side in ("user", "item")
    }  # fmt: skip
    task = tfrs.tasks.Retrieval(temperature=0.1)
    legacy = tf.keras.optimizers.legacy
    sparse, dense = legacy.Adagrad(0.05), legacy.Adam(1e-3)

    @tf.function(reduce_retracing=True)
    def step(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        with tf.GradientTape() as tape:
            sides: dict[str, list[tf.Tensor]] = {"user": [], "item": []}
            for key, table in facts["keys"]:
                ids = tf.RaggedTensor.from_row_splits(batch[key + "/values"], batch[key + "/offsets"], validate=False)
                pooled = tf.nn.safe_embedding_lookup_sparse(tables[table], ids.to_sparse(), combiner="sum")
                sides[key[:4]].append(pooled)
            vectors = [
                tf.math.l2_normalize(towers[side](tf.concat([*parts, batch[side]], 1)), axis=1)
                for side, parts in sides.items()
            ]
            loss = task(*vectors, compute_metrics=False)
        used, weights = list(tables.values()), [weight for tower in towers.values() for weight in tower.variables]
        gradients = tape.gradient(loss, used + weights)
        sparse.apply_gradients(zip(gradients[: len(used)], used, strict=True))
        dense.apply_gradients(zip(gradients[len(used) :], weights, strict=True))
        return loss

    made = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            made.append({name: tf.constant(file[name]) for name in file.files})
    for batch in made[:warm]:
        step(batch)
    started = time.perf_counter()
    for batch in made:
        step(batch).numpy()
    print(json.dumps({"step_s": (time.perf_counter() - started) / len(made)}))


main()
