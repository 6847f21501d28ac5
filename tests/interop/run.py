"""Holds qcqa against transformers: every family opens, runs and converts, and what is written loads and computes the same.

    python run.py QCQA [--only NAME] [--table FILE] [--targets FILE]

QCQA is the binary. Prints a row for each model, writes docs/families.md and the table of docs/targets.md, and fails where anything differs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# What comes with a model is copied there before it is run.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="qcqa-interop")

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import encoders
import models
import served
import targets
import tokens

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

# Relative, of losses and of the largest logit.
CLOSE = 1e-4


def run(binary, *arguments):
    done = subprocess.run([binary, *map(str, arguments), "--json"], capture_output=True, text=True)
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError:
        answer = {"error": f"exit {done.returncode}: {done.stdout[-300:]}{done.stderr[-300:]}"}
    if done.returncode != 0:
        raise RuntimeError(f"qcqa {' '.join(map(str, arguments))}: {answer.get('error')}")
    return answer


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits.double()


def loss_of(model, ids):
    scores = torch.log_softmax(logits_of(model, ids)[:, :-1], -1)
    return -scores.gather(-1, ids[:, 1:, None]).mean().item()


def load(path):
    # Falcon's eager attention adds its linear biases twice, by way of the mask and to the scores.
    kind = AutoConfig.from_pretrained(path).model_type
    attention = "sdpa" if kind == "falcon" else "eager"
    model = AutoModelForImageTextToText if kind in ("gemma3", "mistral3") else AutoModelForCausalLM
    return model.from_pretrained(path, dtype=torch.float32, attn_implementation=attention).eval()


def window(config):
    """Tokens of a window of qcqa."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", 2048)
    rope = getattr(text, "rope_parameters", None) or {}
    return min(512, int(positions * (rope.get("factor", 1) if rope.get("rope_type") == "dynamic" else 1)))


def apart(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


def generated(model, ids):
    prompt = ids[:1, :8]
    length = min(50, window(model.config) - prompt.shape[1])
    with torch.no_grad():
        return model.generate(prompt, max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0)


class Check:
    """One model: what was verified, as words of a table."""

    def __init__(self, binary, name, root):
        self.binary, self.name, self.root = binary, name, Path(root)
        self.row = {}
        model = models.make(name)
        text, self.window = model.config.get_text_config(), window(model.config)
        shape, seed = (4, self.window), torch.Generator().manual_seed(7)
        self.ids = torch.randint(3, min(text.vocab_size, 96), shape, generator=seed)
        self.ids_file = self.root / "text.ids"
        self.ids_file.write_bytes(self.ids.to(torch.int32).numpy().astype("<u2").tobytes())

    def losses(self):
        worst = 0.0
        for kind, dtype, shard in [("f32", torch.float32, "5GB"), ("bf16", torch.bfloat16, "5GB"), ("sharded", torch.float32, "60KB"),
                                   ("older", torch.float32, "5GB")]:
            place = self.root / kind
            models.make(self.name).to(dtype).save_pretrained(place, max_shard_size=shard)
            if kind == "older" and not models.spell_as_before(place / "config.json"):
                continue
            expected = loss_of(load(place), self.ids)
            answer = run(self.binary, "eval", place, "--ids", self.ids_file)
            off = abs(answer["loss"] - expected) / expected
            if off > CLOSE:
                raise RuntimeError(f"{kind}: loss {answer['loss']:.7f}, transformers has {expected:.7f}")
            worst = max(worst, off)
        self.row["loss"] = f"{worst:.0e}"

    def converted(self, source, name, *arguments):
        out = self.root / name
        run(self.binary, "compress", source, *arguments, "--out", out)
        loaded = load(out)
        expected = loss_of(loaded, self.ids)
        answer = run(self.binary, "eval", out, "--ids", self.ids_file)
        if abs(answer["loss"] - expected) / expected > CLOSE:
            raise RuntimeError(f"{name}: loss {answer['loss']:.7f}, transformers has {expected:.7f}")
        return loaded

    def forms(self):
        source = self.root / "f32"
        plan = ("--method", "gqa", "--kv", "0.5")
        expanded = self.converted(source, "expanded", *plan, "--target", "expanded")
        before = logits_of(expanded, self.ids)
        try:
            stock = self.converted(source, "stock", *plan, "--target", "stock")
        except RuntimeError as error:
            if "no grouped form of their own" not in str(error):
                raise
            self.row["stock"] = "has none"
            return
        off = apart(logits_of(stock, self.ids), before)
        if off > CLOSE:
            raise RuntimeError(f"stock and expanded differ by {off:.1e}")
        if not torch.equal(generated(stock, self.ids), generated(expanded, self.ids)):
            raise RuntimeError("stock and expanded write different texts")
        self.row["stock"] = f"{off:.0e}"

    def kept(self):
        """All heads kept, and heads that are equal merged: nothing is lost."""
        source = load(self.root / "f32")
        every = self.converted(self.root / "f32", "every", "--method", "low-rank", "--kv", "1.0", "--target", "expanded")
        off = apart(logits_of(every, self.ids), logits_of(source, self.ids))
        if off > CLOSE:
            raise RuntimeError(f"with all heads kept logits differ by {off:.1e}")
        doubled = self.root / "doubled"
        models.share_heads(models.make(self.name)).save_pretrained(doubled)
        merged = self.converted(doubled, "merged", "--method", "low-rank", "--kv", "0.5", "--target", "expanded")
        off = max(off, apart(logits_of(merged, self.ids), logits_of(load(doubled), self.ids)))
        if off > CLOSE:
            raise RuntimeError(f"merging equal heads changes logits by {off:.1e}")
        self.row["lossless"] = f"{off:.0e}"


NOVELS = Path(__file__).parent.parent / "data" / "novels-1m"


def calibrated(check):
    """The whole road on a text: moments, groups, low-rank sharing, a full refit, the stock form."""
    source = check.root / "f32"
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (NOVELS / file).exists():
            shutil.copy(NOVELS / file, source)
    text = ("--calibration", NOVELS / "calibration.txt", "--calibration-windows", "48")
    loaded = check.converted(source, "calibrated", "--kv", "0.5", *text)
    if loaded.config.num_key_value_heads != loaded.config.num_attention_heads // 8:
        raise RuntimeError(f"{loaded.config.num_key_value_heads} KV heads were written")
    check.row["lossless"] += ", calibrated"


def row_of(binary, name, root):
    if name in encoders.MODELS:
        return encoders.check(run, binary, name, Path(root))
    check = Check(binary, name, root)
    for step in (check.losses, check.forms, check.kept):
        step()
    if name == "llama 3.2 shape":
        calibrated(check)
    return check.row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("qcqa")
    parser.add_argument("--only")
    parser.add_argument("--table")
    parser.add_argument("--targets")
    arguments = parser.parse_args()
    failed, rows = [], []
    for name in [*models.MODELS, *encoders.MODELS]:
        if arguments.only and arguments.only not in name:
            continue
        with tempfile.TemporaryDirectory() as root:
            try:
                row = row_of(arguments.qcqa, name, root)
                rows.append((name, row))
                print(f"{name:36} {row}", flush=True)
            except Exception as error:  # the next family is still looked at
                failed.append(name)
                print(f"{name:36} FAILED: {type(error).__name__}: {str(error)[:400]}", flush=True)
    if not arguments.only or arguments.only == "targets":
        try:
            with tempfile.TemporaryDirectory() as root:
                started = time.monotonic()
                held = list(targets.check(run, arguments.qcqa, Path(root)))
                alike = tokens.check(run, arguments.qcqa, Path(root), (NOVELS / "evaluation.txt").read_text())
                print(f"{alike} tokenizers cut texts in llama.cpp as they do here", flush=True)
            print(f"{len(held)} outputs hold in their runtimes what their plans say, in {time.monotonic() - started:.0f} s", flush=True)
            if arguments.targets:
                Path(arguments.targets).write_text(targets.table(held))
        except Exception as error:
            failed.append("targets")
            print(f"targets FAILED: {type(error).__name__}: {str(error)[:600]}", flush=True)
    smollm2 = os.environ.get("QCQA_SMOLLM2")
    if smollm2 and (not arguments.only or arguments.only == "smollm2"):
        try:
            with tempfile.TemporaryDirectory() as root:
                ids = Path(root) / "text.ids"
                tokenizer = Tokenizer.from_file(str(Path(smollm2) / "tokenizer.json"))
                text = tokenizer.encode((NOVELS / "evaluation.txt").read_text()[:8000]).ids[: 2 * served.LENGTH]
                ids.write_bytes(np.asarray(text, dtype="<u2").tobytes())
                for row in served.check(run, arguments.qcqa, smollm2, ids, Path(root)):
                    print(f"SmolLM2: {row}", flush=True)
        except Exception as error:
            failed.append("smollm2")
            print(f"SmolLM2 FAILED: {type(error).__name__}: {str(error)[:600]}", flush=True)
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)
    if arguments.table:
        Path(arguments.table).write_text(table(rows))
    print(f"{len(rows)} of {len(rows) + len(failed)} models hold against transformers {transformers.__version__}")
    sys.exit(1 if failed else 0)


def table(rows):
    lines = [
        "# Families",
        "",
        f"Made by `tests/interop` with transformers {transformers.__version__} and torch {torch.__version__.split('+')[0]}: small random models of every",
        "family (norm weights 0.5 to 2, biases not 0, 6 query heads on 2 KV heads where nothing else is said), windows of 64 tokens, longer than every sliding",
        "window and original context. `loss`: the largest relative difference of losses in f32, bf16, sharded, and with keys of config.json as they were spelled before. `stock`: how far the logits of the",
        "stock and the expanded form of one plan lie apart, relative to the largest, both in transformers; 50 tokens written by either are the same.",
        "`lossless`: the same for all heads kept, and for equal heads merged, against the source. Of encoders, which have no loss and no",
        "grouped form, `states` is how far apart transformers and this crate find the hidden states of source and expanded form to be.",
        "",
        "| model | loss | stock | lossless |",
        "|---|---|---|---|",
    ]
    lines += [f"| {name} | {row['loss']} | {row['stock']} | {row['lossless']} |" for name, row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
