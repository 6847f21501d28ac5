"""A model that people have, compressed, as runtimes serve it: perplexity and bytes of the cache, held against what qcqa says of them.

python served.py QCQA SOURCE IDS [--given DIRECTORY] compresses SOURCE a little, k by layer and groups of any size, or takes DIRECTORY, which
the target remote-code has written. IDS holds tokens, as `qcqa eval --ids` takes them: windows of 512.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch

import llama_cpp
import targets

LENGTH = 512
CLOSE = 1e-3


def loss(logits, ids):
    """Mean of what the tokens behind the first cost."""
    scores = torch.log_softmax(torch.as_tensor(logits).double()[:-1], -1)
    return -scores.gather(-1, torch.as_tensor(np.asarray(ids[1:], dtype=np.int64))[:, None]).mean().item()


def check(run, binary, source, ids_file, root, given=None):
    """What each runtime says, a dictionary each; an error where one says something else than qcqa."""
    if given is None:
        given = root / "remote"
        run(binary, "compress", source, "--method", "qcqa-ac", "--allocation", "exact", "--kv", "0.9", "--target", "remote-code", "--out", given)
    # All heads that are left are kept: the same model in another form.
    run(binary, "compress", given, "--method", "gqa", "--allocation", "exact", "--kv", "1.0", "--target", "gguf-f32", "--out", root / "gguf")
    before = run(binary, "inspect", source)["kv_bytes_per_token"]
    own = run(binary, "eval", given, "--ids", ids_file)
    held = run(binary, "inspect", given)["kv_bytes_per_token"]
    said = [{"runtime": "qcqa", "perplexity": own["perplexity"], "cache": held / before}]
    vocabulary = json.loads((Path(source) / "config.json").read_text())["vocab_size"]
    ids = np.fromfile(ids_file, dtype="<u2" if vocabulary <= 1 << 16 else "<u4")
    rows = ids[: ids.size // LENGTH * LENGTH].reshape(-1, LENGTH)

    model = targets.load(given)
    losses = []
    for row in rows:
        cached, logits = targets.cache_bytes(model, torch.as_tensor(row[None].astype(np.int64)))
        losses.append(loss(logits[0], row))
    # In f32, where the plan counts two bytes a number.
    said.append({"runtime": "transformers", "perplexity": math.exp(np.mean(losses)), "cache": cached / 2 / before})
    del model

    file = root / "gguf" / "model.gguf"
    flash = llama_cpp.Llama(file, kind=llama_cpp.F16, flash=True)
    cached = flash.cache_bytes
    flash.close()
    model = llama_cpp.Llama(file, tokens=LENGTH)
    said.append({"runtime": "llama.cpp", "perplexity": math.exp(np.mean([loss(model.logits(row), row) for row in rows])), "cache": cached / before})
    model.close()
    for row in said[1:]:
        if abs(row["perplexity"] / own["perplexity"] - 1) > CLOSE or abs(row["cache"] * before / held - 1) > 1e-6:
            raise RuntimeError(f"{row} where qcqa says {said[0]}")
    return said


if __name__ == "__main__":
    from run import run

    parser = argparse.ArgumentParser()
    parser.add_argument("qcqa")
    parser.add_argument("source")
    parser.add_argument("ids")
    parser.add_argument("--given", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        for answer in check(run, asked.qcqa, asked.source, asked.ids, Path(place), asked.given):
            print(answer)
