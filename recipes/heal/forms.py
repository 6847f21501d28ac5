"""What is trained of a converted model, and how that is written in the form in which it came."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.pytorch_utils import Conv1D

from windows import Wrong

RECORD = "qcqa.json"
# Where attention lies in the modules of transformers, and where it is not that of the text.
ATTENTION = re.compile(r"(^|\.)(self_attn|self_attention|attention|attn)\.")
ELSEWHERE = re.compile(r"vision|audio|projector")
TARGETS = ("stock", "padded", "remote-code", "expanded")
# Those with query heads of zeros, and with copies of heads (docs/targets.md).
FILLED, COPIED = ("padded", "remote-code"), ("expanded",)


def record(converted):
    """What a converted directory says of how it was made."""
    path = converted / RECORD
    if not path.is_file():
        raise Wrong(f"{converted} has no {RECORD}: CONVERTED is a directory that qcqa convert or compress has written")
    found = json.loads(path.read_text("utf-8"))
    if found["target"] not in TARGETS:
        raise Wrong(f"{converted} has the form {found['target']}, which transformers does not load: convert to {', '.join(TARGETS)}")
    return found


def load(path, trusted, dtype):
    """A model as stock transformers loads it."""
    if not (path / "config.json").is_file():
        raise Wrong(f"{path} has no config.json: a directory of a Hugging Face model is expected")
    if "auto_map" in json.loads((path / "config.json").read_text("utf-8")) and not trusted:
        raise Wrong(f"{path} brings its own model file, which is run: read it, then pass --trust-remote-code")
    failed = None
    # Of models with pictures some are found under the one, some under the other.
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            return kind.from_pretrained(path, dtype=dtype, trust_remote_code=trusted).eval()
        except (ValueError, OSError) as error:
            failed = failed or error
    raise Wrong(f"transformers cannot load {path}: {failed}") from failed


class Held(nn.Module):
    """A matrix or a bias with rows or columns that are zero, or copies of one another, as a smaller one that has each of them once.

    Training the smaller one keeps zeros zero and copies equal, and is what training the shared heads is.
    """

    def __init__(self, places):
        super().__init__()
        # Of each dimension where every row comes from, or nothing for as they stand; and where rows are first.
        for dim, (index, first) in places.items():
            self.register_buffer(f"index{dim}", index, persistent=False)
            self.register_buffer(f"first{dim}", first, persistent=False)
        self.dims = sorted(places)

    def forward(self, held):
        for dim in self.dims:
            zero = held.new_zeros([1 if d == dim else n for d, n in enumerate(held.shape)])
            held = torch.cat([held, zero], dim).index_select(dim, getattr(self, f"index{dim}"))
        return held

    def right_inverse(self, whole):
        for dim in self.dims:
            whole = whole.index_select(dim, getattr(self, f"first{dim}"))
        return whole


def places(matrix, dim, target):
    """Where rows (or columns) of a matrix come from, and where each is first; None where every one stands for itself."""
    rows = matrix.transpose(0, dim)
    n = len(rows)
    index = torch.arange(n)
    if target in COPIED:
        _, index = torch.unique(rows, dim=0, return_inverse=True)
    zero = (rows == 0).all(1) if target in FILLED else torch.zeros(n, dtype=torch.bool)
    if not zero.any() and len(index.unique()) == n:
        return None
    first, numbers = [], {}
    for i, of in enumerate(index.tolist()):
        if not zero[i] and of not in numbers:
            numbers[of] = len(first)
            first.append(i)
    of = [len(first) if zero[i] else numbers[of] for i, of in enumerate(index.tolist())]
    return torch.tensor(of), torch.tensor(first)


def linears(model):
    """Linear layers of the attention of all layers, by name: queries, keys, values and outputs, together or apart."""
    def ours(name, module):
        return isinstance(module, (nn.Linear, Conv1D)) and ATTENTION.search(name) and not ELSEWHERE.search(name)
    return {name: module for name, module in model.named_modules() if ours(name, module)}


def prepared(path, trusted, target, train, rank):
    """The converted model, with gradients for what is trained: `attention`, `lora` or `all`."""
    model = load(path, trusted, torch.float32)
    attention = linears(model)
    if not attention and train != "all":
        raise Wrong(f"in {path} no linear layers lie in self_attn, self_attention, attention or attn: --train all trains whatever there is")
    model.requires_grad_(False)
    if train == "lora":
        found = {name: laid(module, target) for name, module in attention.items()}
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(attention)))
        for name, (rows, columns) in found.items():
            layer = model.base_model.model.get_submodule(name)
            hold(layer.lora_B["default"], "weight", {0: rows} if rows else {})
            hold(layer.lora_A["default"], "weight", {1: columns} if columns else {})
        return model
    if train == "all":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not ELSEWHERE.search(name))
    for module in attention.values():
        module.requires_grad_(True)
        rows, columns = laid(module, target)
        out = 1 if isinstance(module, Conv1D) else 0
        hold(module, "weight", {dim: of for dim, of in [(out, rows), (1 - out, columns)] if of})
        if getattr(module, "bias", None) is not None:
            hold(module, "bias", {0: rows} if rows else {})
    return model


def laid(module, target):
    """Of a linear layer the places of its outputs, and of its inputs; copies are outputs, inputs that are alike are so by chance."""
    weight, out = module.weight.detach(), 1 if isinstance(module, Conv1D) else 0
    return places(weight, out, target), places(weight, 1 - out, target if target in FILLED else None)


def hold(module, name, of):
    if of:
        parametrize.register_parametrization(module, name, Held(of))


def merged(model):
    """The plain model of transformers again."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    for module in model.modules():
        for name in list(getattr(module, "parametrizations", {})) if parametrize.is_parametrized(module) else []:
            parametrize.remove_parametrizations(module, name)
    return model


def check_out(out, converted, source):
    """The output must not exist, and its place must."""
    if out.exists() or out.is_symlink():
        raise Wrong(f"{out} exists: choose another --out, nothing is replaced")
    if not out.absolute().parent.is_dir():
        raise Wrong(f"{out.absolute().parent} is no directory: --out is made in one that exists")
    for path in (converted, source):
        if out.resolve().is_relative_to(path.resolve()):
            raise Wrong(f"{out} lies in {path}: choose another --out")


def write(model, converted, out, record):
    """A plain model in the form of the directory that it came from, whole or not at all."""
    work = Path(tempfile.mkdtemp(prefix=".heal.", dir=out.absolute().parent))
    try:
        made = work / "made"
        model.save_pretrained(made)
        new = {}
        for path in made.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                new |= {name: path for name in file.keys()}
        written = work / "written"
        shutil.copytree(converted, written, ignore=shutil.ignore_patterns("*.safetensors", RECORD))
        known = set()
        for path in sorted(converted.glob("*.safetensors")):
            known |= rewrite(path, new, model.state_dict(), written / path.name)
        if lost := sorted(set(new) - known):
            raise Wrong(f"{converted} has no tensor {lost[0]}, which transformers writes: its form cannot be kept")
        (written / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
        os.rename(written, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def rewrite(path, new, state, to):
    """A file of tensors with the new values of those that there are, in their types; the names in it."""
    with safe_open(path, "pt") as old:
        tensors, names = {}, list(old.keys())
        for name in names:
            like = tensor = old.get_tensor(name)
            if name in new:
                with safe_open(new[name], "pt") as file:
                    tensor = file.get_tensor(name)
            elif name in state:  # tied to another, and stored all the same
                tensor = state[name].detach()
            if tensor.shape != like.shape:
                raise Wrong(f"{name} is {list(tensor.shape)} in transformers, and {list(like.shape)} in {path}")
            tensors[name] = tensor.to(like.dtype).contiguous()
        save_file(tensors, to, metadata=old.metadata())
    return set(names)
