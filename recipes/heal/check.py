#!/usr/bin/env python3
"""Holds heal.py against `qcqa distill` and against itself, on the model of the repository, on the CPU.

    python check.py QCQA

QCQA is the binary. Prints what was compared, and fails where anything differs.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# What comes with a model is copied there before it is run. One thread: on a busy machine several wait for each other.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="qcqa-heal")
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import forms
import heal

HERE = Path(__file__).resolve().parent
NOVELS = HERE.parent.parent / "tests" / "data" / "novels-1m"
TEXT = ["--calibration", str(NOVELS / "calibration.txt"), "--calibration-windows", "32"]
STEPS, FEW, MANY = 20, "10240", "1M"
# Relative: of losses here and in the binary, of the way that weights have gone, and of losses that are one.
CLOSE, WAY, SAME = 1e-3, 1e-2, 1e-4


class Differs(Exception):
    pass


def near(what, found, expected, most):
    if len(found) != len(expected):
        raise Differs(f"{what}: {len(found)} figures beside {len(expected)}")
    off = max(abs(a - b) / abs(b) for a, b in zip(found, expected))
    if not off <= most:
        raise Differs(f"{what} differ by {off:.1e}, more than {most:.0e}: {found} beside {expected}")
    return off


class Check:
    def __init__(self, binary, root, source):
        self.binary, self.root, self.source = binary, root, source

    def prepare(self):
        # In f32, so that nothing is rounded between the two.
        shutil.copytree(NOVELS, self.source)
        tensors = load_file(self.source / "model.safetensors")
        save_file({name: t.float() for name, t in tensors.items()}, self.source / "model.safetensors", {"format": "pt"})
        config = json.loads((self.source / "config.json").read_text())
        (self.source / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
        self.stock = self.root / "stock"
        self.qcqa("compress", self.source, "--method", "gqa", "--kv", "0.5", "--out", self.stock)

    def qcqa(self, *arguments, seconds=None):
        """What the binary says; broken off after some seconds."""
        command = [self.binary, *map(str, arguments), "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                out, err = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                out, err = process.communicate()
        try:
            answer = json.loads(out)
        except json.JSONDecodeError:
            answer = {"error": f"{out[-300:]}{err[-300:]}"}
        if "error" in answer and "losses" not in answer and process.returncode != 0:
            raise Differs(f"qcqa {' '.join(map(str, arguments))}: exit {process.returncode}: {answer['error']}")
        return answer

    def heal(self, converted, name, *arguments):
        """The divergence of every step of the recipe; the output is `name`."""
        given = self.given(converted, name, *arguments)
        heal.run(heal.arguments(given), Accelerator(cpu=True))
        return self.figures(name)

    def given(self, converted, name, *arguments):
        figures = ["--figures", self.root / f"{name}.figures"]
        return [str(a) for a in [self.source, converted, *TEXT, "--out", self.root / name, *figures, *arguments]]

    def figures(self, name):
        lines = map(json.loads, (self.root / f"{name}.figures").read_text().splitlines())
        return [line["kl"] for line in lines if "kl" in line]

    def record(self, name):
        return json.loads((self.root / name / forms.RECORD).read_text())

    def adamw(self):
        """Few tokens: AdamW. Losses, validation and weights."""
        told = self.qcqa("distill", self.stock, "--source", self.source, "--for", FEW, *TEXT, "--out", self.root / "distilled")
        losses = self.heal(self.stock, "few", "--tokens", FEW)
        off = near("the losses under AdamW", losses, told["losses"], CLOSE)
        records = [self.record(name) for name in ("few", "distilled")]
        course = records[0]["healed"][0]["validation"]
        near("the divergences on validation", [kl for _, kl in course], [kl for _, kl in told["course"]], CLOSE)
        if records[0]["plan"] != records[1]["plan"]:
            raise Differs(f"the plans differ: {records[0]['plan']['pooling']} beside {records[1]['plan']['pooling']}")
        before, here, there = (load_file(self.root / name / "model.safetensors") for name in ("stock", "few", "distilled"))
        moved = {name: (there[name] - before[name]).norm() for name in there if not torch.equal(there[name], before[name])}
        if len(moved) != 16:
            raise Differs(f"{len(moved)} tensors moved, of 4 layers with 4")
        apart = max(((here[name] - there[name]).norm() / way).item() for name, way in moved.items())
        if apart > WAY:
            raise Differs(f"weights differ by {apart:.1e} of the way that they have gone")
        return f"{len(losses)} steps of AdamW as qcqa distill: losses within {off:.0e}, weights within {apart:.0e} of their way"

    def muon(self):
        """Many tokens: Muon, and hidden states are pulled. The binary is broken off when it has gone far enough."""
        there, seconds = [], 12
        while len(there) < STEPS:
            if seconds > 100:
                raise Differs(f"qcqa distill has done {len(there)} steps in {seconds} seconds")
            out = ["--out", self.root / "broken-off", "--force"]
            there = self.qcqa("distill", self.stock, "--source", self.source, "--for", MANY, *TEXT, *out, seconds=seconds)["losses"]
            seconds *= 2
        losses = self.heal(self.stock, "many", "--tokens", MANY, "--steps", STEPS)
        off = near("the losses under Muon", losses, there[:STEPS], CLOSE)
        return f"{STEPS} steps of Muon as qcqa distill: losses within {off:.0e}"

    def forms(self):
        """One plan in three forms learns alike, stays in its form, and is read by both."""
        plan = self.root / "plan.json"
        self.qcqa("search", self.source, "--method", "qcqa-ac", "--kv", "0.5", "--target", "padded", "--out", plan)
        first = None
        for target in ("padded", "remote-code", "expanded"):
            converted = self.root / target
            self.qcqa("convert", self.source, "--plan", plan, "--target", target, "--out", converted)
            for train in ("attention", "lora"):
                name = f"{target}-{train}"
                asked = ["--rate", "5e-3"] if train == "lora" else []
                losses = self.heal(converted, name, "--tokens", FEW, "--steps", "3", "--train", train, "--trust-remote-code", *asked)
                out = self.root / name
                (_, start), (_, end) = self.record(name)["healed"][0]["validation"]
                if not end < 0.95 * start:
                    raise Differs(f"{name}: the divergence does not fall: from {start} to {end}")
                if train == "attention":
                    first = first or losses
                    near(f"the losses of {target} and padded", losses, first, SAME)
                if {p.name for p in out.iterdir()} != {p.name for p in converted.iterdir()}:
                    raise Differs(f"{out} does not hold the files of {converted}")
                self.zeros_and_copies(converted, out, target)
                self.read(out)
        return "padded, remote-code and expanded of one plan learn alike and keep their forms, LoRA too"

    def zeros_and_copies(self, converted, out, target):
        """What was zero is zero, and what was a copy is one."""
        models = [forms.load(path, True, torch.float32) for path in (converted, out)]
        for name, layer in forms.linears(models[0]).items():
            other = forms.linears(models[1])[name]
            for one, two in zip(forms.laid(layer, target), forms.laid(other, target)):
                if (one is None) != (two is None) or one and not torch.equal(one[0] < len(one[1]), two[0] < len(two[1])):
                    raise Differs(f"{out}: {name} has other zeros than before")
                if one and [(one[0] == i).sum() for i in one[0]] != [(two[0] == i).sum() for i in two[0]]:
                    raise Differs(f"{out}: {name} has other copies than before")

    def read(self, out):
        """The binary and transformers find one loss."""
        text = self.root / "evaluation.txt"
        text.write_text((NOVELS / "evaluation.txt").read_text()[:3000])
        answer = self.qcqa("eval", out, "--text", text)
        ids = heal.Tokenizer.from_file(str(out / "tokenizer.json")).encode(text.read_text()).ids
        ids = torch.tensor(ids[: len(ids) // 256 * 256]).reshape(-1, 256)
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True).eval()
        with torch.no_grad():
            logits = model(ids).logits[:, :-1].transpose(1, 2)
        near(f"the losses of {out.name}", [answer["loss"]], [torch.nn.functional.cross_entropy(logits, ids[:, 1:]).item()], SAME)

    def processes(self):
        """Two processes go the way of one, and so they do with sharded weights."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        worst = 0.0
        for script, converted, alone in [("heal.py", self.stock, "few"), ("sharded.py", self.root / "padded", "padded-attention")]:
            given = self.given(converted, script, "--tokens", FEW, "--steps", "3", "--micro", "1")
            done = subprocess.run([*command, HERE / script, *given], env=os.environ | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True)
            if done.returncode != 0:
                raise Differs(f"two processes of {script}: {done.stderr[-1500:]}")
            worst = max(worst, near(f"the losses of two processes of {script} and one", self.figures(script), self.figures(alone)[:3], SAME))
            weights = [load_file(self.root / name / "model.safetensors") for name in (script, alone)]
            if script == "sharded.py" and not all(torch.allclose(weights[0][name], weights[1][name], atol=1e-5) for name in weights[1]):
                raise Differs("two processes with sharded weights write others")
        return f"two processes go the way of one, with sharded weights too: losses within {worst:.0e}"

    def refusals(self):
        """What cannot be done is said before it is begun, and nothing is left of it."""
        before = sorted(self.root.iterdir())
        for converted, name, words in [(self.stock, "few", "exists"), (self.source, "never", "qcqa.json"), (self.root / "remote-code", "never", "--trust-remote-code")]:
            try:
                self.heal(converted, name, "--tokens", FEW)
            except heal.Wrong as error:
                if words not in str(error):
                    raise Differs(f"{words} is not said: {error}") from error
            else:
                raise Differs(f"{converted} was taken, {words} should be said")
        if sorted(self.root.iterdir()) != before:
            raise Differs(f"something is left: {sorted(set(self.root.iterdir()) - set(before))}")
        return "refusals say what was expected and leave nothing"


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="qcqa-heal") as root:
        check = Check(sys.argv[1], Path(root), Path(root) / "source")
        check.prepare()
        for step in (check.adamw, check.muon, check.forms, check.processes, check.refusals):
            began = time.monotonic()
            try:
                print(f"{step()} ({time.monotonic() - began:.0f} s)", flush=True)
            except Differs as error:
                sys.exit(f"FAILED: {error}")


if __name__ == "__main__":
    main()
