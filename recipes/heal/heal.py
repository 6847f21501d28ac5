#!/usr/bin/env python3
"""Lets a converted model learn from its source, as `qcqa distill` does, in stock transformers on any number of GPUs.

    accelerate launch heal.py SOURCE CONVERTED --calibration TEXT… --tokens 10M --out OUT

Minimises the mean KL(source ‖ converted) over the tokens of the windows that `qcqa distill` reads, in its order, at its rates and
by its rules, and writes what had the least of it on the windows that validate, in the form of CONVERTED.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model
from tokenizers import Tokenizer
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers.utils import logging

import forms
import windows
from windows import Wrong

# The rules of src/distil/mod.rs and src/descent/mod.rs.
WARM_UP, MANY_TOKENS, LARGE_TOKENS, FEW_TOKENS = 20, 1_000_000, 4_000_000, 512
TRAINED_PER_VALIDATED, PATIENCE, LONGEST_WINDOW = 3, 3, 512


def arguments(given):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", type=Path, help="directory of the model that CONVERTED was made of")
    add("converted", type=Path, help="directory that qcqa convert, compress or distill has written")
    add("--calibration", nargs="+", required=True, metavar="TEXT", help="texts to learn from: PATH, or PATH:SHARE")
    add("--calibration-windows", type=positive, default=128, metavar="N", help="the most windows of all texts together (128)")
    add("--calibration-context", type=positive, metavar="N", help="tokens of each of them (all that the model has positions for, 512 at most)")
    add("--tokens", type=tokens, required=True, help="how long: 500k, 2M; the same ones again where the texts have fewer")
    add("--out", type=Path, required=True, help="directory of the output, which must not exist")
    add("--train", choices=["attention", "lora", "all"], default="attention", help="what learns (attention)")
    add("--rank", type=positive, default=16, help="of --train lora (16)")
    add("--optimizer", choices=["adamw", "muon"], help="muon from a million tokens on, but adamw for lora")
    add("--rate", type=float, help="the highest rate (5e-4 to 1e-3, by start and length)")
    add("--batch", type=positive, help="windows of a step, of all processes together (4; below a million tokens 512 tokens; on a GPU from four million on 16)")
    add("--micro", type=positive, default=4, help="windows that a process computes at once (4)")
    add("--pull", type=float, help="how strongly hidden states are pulled to the source's at first (3; below a million tokens and with --kl 0: 0)")
    add("--kl", type=float, default=1.0, help="how much KL(source, converted) counts (1)")
    add("--loss", type=float, default=0.0, help="how much the loss on the next token counts (0)")
    add("--steps", type=positive, help="stop after so many steps of those that --tokens makes")
    add("--seed", type=int, default=0, help="of the order of windows and of lora (0)")
    add("--figures", type=Path, help="file for the figures of every step, JSON by line")
    add("--trust-remote-code", action="store_true", help="run the model file that CONVERTED or SOURCE brings")
    return parser.parse_args(given)


def positive(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: a whole number above 0 is expected")
    return int(text)


def tokens(text):
    number, factor = (text[:-1], {"k": 1e3, "M": 1e6, "B": 1e9}[text[-1]]) if text[-1:] in ("k", "M", "B") else (text, 1)
    try:
        count = int(float(number) * factor)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text}: tokens are expected, as 500k or 2M")
    return count


def window(path):
    """Tokens of a window: all that a model has positions for, 512 at most."""
    config = json.loads((path / "config.json").read_text("utf-8"))
    config = config.get("text_config", config)
    named = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    positions = next((config[name] for name in named if config.get(name)), LONGEST_WINDOW)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "dynamic" in (rope.get("rope_type"), rope.get("type")):
        positions = int(positions * rope.get("factor", 1))
    return min(LONGEST_WINDOW, positions)


def usual(args, record, length, on_gpu):
    """Fills in what was not said, as `qcqa distill` would."""
    refitted, many = record["plan"]["pooling"].get("refit") == "full", args.tokens >= MANY_TOKENS
    several, faster = (16, 1.4) if on_gpu and args.tokens >= LARGE_TOKENS else (4, 1.0)
    if many:
        rate, batch, pull = (7e-4 if refitted else 1e-3) * faster, max(1, several // -(-length // LONGEST_WINDOW)), 3.0
    else:
        rate, batch, pull = 4e-4 if refitted else 5e-4, -(-FEW_TOKENS // length), 0.0
    args.optimizer = args.optimizer or ("muon" if many and args.train != "lora" else "adamw")
    args.rate = rate if args.rate is None else args.rate
    args.batch = args.batch or batch
    args.pull = (pull if args.kl > 0 else 0.0) if args.pull is None else args.pull
    if not (args.rate > 0 and math.isfinite(args.rate)):
        raise Wrong(f"--rate {args.rate}: above 0 is expected")
    if not (0 <= args.kl < math.inf and 0 <= args.loss < math.inf and args.kl + args.loss > 0):
        raise Wrong(f"--kl {args.kl} --loss {args.loss}: numbers from 0 up are expected, one of them above 0")


def share(step, total):
    """The share of the highest rate at a step: rises, then falls to 0 along half a cosine."""
    rise = max(1, min(WARM_UP, -(-total // 10)))
    return min((step + 1) / rise, 1.0) * 0.5 * (1 + math.cos(math.pi * step / total))


def optimizers(model, kind):
    """Muon for the matrices of linear layers but the output embedding, and AdamW for the rest; or AdamW for all."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = model.get_output_embeddings()
    linear = {id(p) for m in model.modules() if isinstance(m, (torch.nn.Linear, forms.Conv1D)) and m is not head for p in m.parameters()}
    matrices = [p for p in named.values() if kind == "muon" and p.ndim == 2 and id(p) in linear]
    chosen = {id(p) for p in matrices}
    others = [p for p in named.values() if id(p) not in chosen]
    made = []
    if matrices:
        # Steps as large as Adam's; the rest of its rule is the default.
        made.append(torch.optim.Muon(matrices, lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    if others:
        made.append(torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0))
    return made


class Reader:
    """A model, its logits, and what its output embedding reads."""

    def __init__(self, model):
        self.model, self.hidden = model, None
        model.get_output_embeddings().register_forward_pre_hook(self.keep)

    def keep(self, _, given):
        self.hidden = given[0]

    def __call__(self, ids):
        logits = self.model(input_ids=ids, use_cache=False).logits
        return logits.float(), self.hidden.float()


def divergences(theirs, own):
    """KL(source ‖ own) of every token, in nats."""
    return F.kl_div(own.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none").sum(-1)


def losses(own, ids):
    """The loss on the next token of all but the last, in nats."""
    return F.cross_entropy(own[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


class Healing:
    """The two models on their devices, and how the one follows the other."""

    def __init__(self, args, accelerator, record):
        self.args, self.accelerator = args, accelerator
        half = accelerator.mixed_precision == "bf16"
        source = forms.load(args.source, args.trust_remote_code, torch.bfloat16 if half else torch.float32).requires_grad_(False)
        model = forms.prepared(args.converted, args.trust_remote_code, record["target"], args.train, args.rank)
        if source.config.get_text_config().vocab_size != model.config.get_text_config().vocab_size:
            raise Wrong(f"{args.source} and {args.converted} differ in vocabulary: SOURCE is what CONVERTED was made of")
        for p in model.parameters():
            if half and not p.requires_grad:
                p.data = p.data.bfloat16()
        self.theirs, self.own = Reader(source), Reader(model)
        made = optimizers(model, args.optimizer)
        sharded = accelerator.distributed_type == DistributedType.FSDP
        if sharded and not accelerator.is_fsdp2:
            raise Wrong("FSDP 2 is expected: accelerate launch --use_fsdp --fsdp_version 2")
        plugin = copy.copy(accelerator.state.fsdp_plugin) if sharded else None
        self.own.model, *self.optimizers = accelerator.prepare(model, *made)
        if sharded:
            # Its layers may have another class: a Llama is padded as a Mistral.
            plugin.transformer_cls_names_to_wrap = None
            accelerator.state.fsdp_plugin, plugin = plugin, accelerator.state.fsdp_plugin
            self.theirs.model = fsdp2_prepare_model(accelerator, source)
            accelerator.state.fsdp_plugin = plugin
        else:
            self.theirs.model = source.to(accelerator.device)
        self.trained = {name: p for name, p in accelerator.unwrap_model(self.own.model).named_parameters() if p.requires_grad}

    def mine(self, texts):
        """This process's windows and their weights, by `micro` at a time: as many times in every process, with 0 for what fills up."""
        world, rank, micro = self.accelerator.num_processes, self.accelerator.process_index, self.args.micro
        each = -(-len(texts) // world)
        own = texts[rank::world]
        weights = [1.0] * len(own) + [0.0] * (each - len(own))
        own = [*own, *[texts[0]] * (each - len(own))]
        for i in range(0, each, micro):
            ids, weight = torch.tensor(own[i : i + micro]), torch.tensor(weights[i : i + micro])
            yield ids.to(self.accelerator.device), weight.to(self.accelerator.device)[:, None]

    def sum(self, value):
        return self.accelerator.reduce(value, "sum").item()

    def step(self, texts, rate, pull):
        """Goes one step on some windows, and gives the mean divergence over their tokens before it."""
        world, length = self.accelerator.num_processes, len(texts[0])
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        parts = list(self.mine(texts))
        for n, (ids, weight) in enumerate(parts):
            # Gradients are exchanged once.
            alone = self.accelerator.no_sync(self.own.model) if n + 1 < len(parts) else contextlib.nullcontext()
            with alone:
                with torch.no_grad():
                    theirs, aim = self.theirs(ids)
                own, hidden = self.own(ids)
                kl = (divergences(theirs, own) * weight).sum()
                loss = self.args.kl * kl
                if pull > 0:
                    loss = loss + pull * (((hidden - aim).square().sum(-1) / aim.square().sum(-1)) * weight).sum()
                if self.args.loss > 0:
                    loss = loss + self.args.loss * (losses(own, ids) * weight).sum()
                # Of gradients the mean over all processes is taken.
                self.accelerator.backward(loss * world / (len(texts) * length))
            total += kl.detach()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        return self.sum(total) / (len(texts) * length)

    @torch.no_grad()
    def validate(self, texts):
        """The mean over the tokens predicted, all but the last of each window, of what is minimised: the divergence unless told otherwise."""
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for ids, weight in self.mine(texts):
            own = self.own(ids)[0]
            if self.args.kl > 0:
                total += self.args.kl * (divergences(self.theirs(ids)[0], own)[:, :-1] * weight).sum()
            if self.args.loss > 0:
                total += self.args.loss * (losses(own, ids) * weight).sum()
        return self.sum(total) / (len(texts) * (len(texts[0]) - 1))

    def weights(self):
        """A copy of what is trained, of this process's part of it."""
        return [local(p).detach().to("cpu", copy=True) for p in self.trained.values()]

    @torch.no_grad()
    def put(self, weights):
        for p, held in zip(self.trained.values(), weights):
            local(p).copy_(held)

    def whole(self):
        """What is trained, gathered; every process takes part."""
        def gathered(p):
            p = p.detach()
            return (p.full_tensor() if isinstance(p, DTensor) else p).cpu()
        return {name: gathered(p) for name, p in self.trained.items()}


def local(p):
    return p.to_local() if isinstance(p, DTensor) else p


def train(healing, args, fit, validation, log):
    """Goes on until the end, and leaves the weights that were best; tokens and what validation has, and the best step."""
    order, batch, step_tokens = windows.Order(len(fit), args.seed), args.batch, args.batch * len(fit[0])
    total = max(1, args.tokens // step_tokens)
    until = min(total, args.steps or total)
    interval = max(1, -(-TRAINED_PER_VALIDATED * len(validation) // batch))
    course = [(0, healing.validate(validation))] if validation else []
    best, best_step, worse, began = healing.weights(), 0, 0, time.time()
    bar = tqdm(range(until), unit="step", disable=None if healing.accelerator.is_main_process else True)
    for step in bar:
        rate = args.rate * share(step, total)
        kl = healing.step([fit[n] for n in order.batch(step, batch)], rate, args.pull * (1 - step / total))
        if not math.isfinite(kl):
            raise Wrong(f"the divergence is {kl} at step {step + 1}: choose a lower --rate")
        log({"step": step + 1, "tokens": (step + 1) * step_tokens, "kl": kl, "rate": rate, "seconds": round(time.time() - began, 3)})
        bar.set_postfix_str(f"KL {kl:.4f}" + (f", validation {course[-1][1]:.4f}" if course else ""))
        last = step + 1 == until
        if not (last or (step + 1) % interval == 0):
            continue
        kl = healing.validate(validation) if validation else -math.inf
        if kl < min((kl for _, kl in course), default=math.inf):
            best, best_step, worse = healing.weights(), step + 1, 0
        else:
            worse += 1
        if validation:
            course.append(((step + 1) * step_tokens, kl))
            log({"step": step + 1, "validation": kl})
        if 2 * (step + 1) > total and worse >= PATIENCE:
            break
    seconds = time.time() - began
    healing.put(best)
    return course, best_step, step_tokens, (step + 1) * step_tokens / seconds


def recorded(record, args, fit, course, best_step, step_tokens, accelerator):
    """What qcqa.json says afterwards: the plan as `qcqa distill` leaves it, and what was done here."""
    record = json.loads(json.dumps(record))
    text = windows.fingerprint(record["plan"]["source"].get("fingerprint") or "", fit)
    done = {"tokens": best_step * step_tokens, "steps": best_step, "text": text}
    pooling = record["plan"]["pooling"]
    if best_step:
        # What was trained before is still there.
        whole = args.train == "all" or pooling.get("distilled", {}).get("trained") == "all"
        pooling["distilled"] = done | ({"trained": "all"} if whole else {})
    asked = {name: getattr(args, name) for name in ("train", "optimizer", "rate", "batch", "pull", "kl", "loss", "seed")}
    if args.train == "lora":
        asked["rank"] = args.rank
    ran = {"processes": accelerator.num_processes, "precision": accelerator.mixed_precision}
    record.setdefault("healed", []).append(done | asked | ran | {"validation": course})
    return record


def run(args, accelerator):
    forms.check_out(args.out, args.converted, args.source)
    record = forms.record(args.converted)
    torch.manual_seed(args.seed)
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    words = args.source / "tokenizer.json"
    if not words.is_file():
        raise Wrong(f"{words} does not exist: the tokenizer's fast form is expected there")
    tokenizer = Tokenizer.from_file(str(words))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    length = args.calibration_context or window(args.source)
    fit, validation = windows.read(tokenizer, args.calibration, args.calibration_windows, length)
    usual(args, record, length, accelerator.device.type == "cuda")

    healing = Healing(args, accelerator, record)
    main = accelerator.is_main_process
    file = open(args.figures, "w") if args.figures and main else None
    def log(figures):
        if file:
            print(json.dumps(figures), file=file, flush=True)
    course, best_step, step_tokens, speed = train(healing, args, fit, validation, log)
    whole = healing.whole()
    if main:
        model = forms.prepared(args.converted, args.trust_remote_code, record["target"], args.train, args.rank)
        state = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in whole.items():
                state[name].copy_(tensor)
        record = recorded(record, args, fit, course, best_step, step_tokens, accelerator)
        forms.write(forms.merged(model), args.converted, args.out, record)
        if course:
            what = "KL" if (args.kl, args.loss) == (1, 0) else f"{args.kl:g} KL + {args.loss:g} loss"
            print(f"{what} on validation {course[0][1]:.4f} -> {min(kl for _, kl in course):.4f} (best after {best_step * step_tokens} tokens)")
        print(f"{speed:.0f} tokens a second in {accelerator.num_processes} processes; written to {args.out}")
    accelerator.wait_for_everyone()


def main():
    args = arguments(None)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    # Every process reads the weights: which rows are zero or copies is seen in them.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    try:
        run(args, accelerator := Accelerator())
    except Wrong as error:
        sys.exit(f"error: {error}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
