"""Encoders, which predict nothing: what comes out of their last layer is compared."""

import copy

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

import models

CLOSE = 1e-4
# name -> (class, what differs)
MODELS = {
    "bert": (AutoModel, dict()),
    "bert, with a head": (AutoModelForMaskedLM, dict(hidden_act="gelu_new", layer_norm_eps=1e-6)),
}


def make(name):
    kind, differs = MODELS[name]
    sizes = {key: value for key, value in models.SMALL.items() if key != "num_key_value_heads"}
    return models.made(kind, AutoConfig.for_model("bert", **{**sizes, **differs}))


def states(path, ids):
    with torch.no_grad():
        return AutoModel.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()(ids).last_hidden_state.double()


def apart(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


def spell_as_first(path):
    """Names the weights of norms as the first files of BERT do."""
    tensors = load_file(path)
    names = {name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta") for name in tensors}
    save_file({names[name]: tensor for name, tensor in tensors.items()}, path, {"format": "pt"})


def check(run, binary, name, root):
    """The row of one encoder."""
    ids = torch.randint(3, 96, (3, 64), generator=torch.Generator().manual_seed(7))
    text = root / "text.ids"
    text.write_bytes(ids.to(torch.int32).numpy().astype("<u2").tobytes())
    model, worst = make(name), 0.0
    for form, dtype, shard in [("f32", torch.float32, "5GB"), ("bf16", torch.bfloat16, "5GB"), ("sharded", torch.float32, "60KB"), ("first", torch.float32, "5GB")]:
        source, out = root / form, root / f"{form}-half"
        copy.deepcopy(model).to(dtype).save_pretrained(source, max_shard_size=shard)
        if form == "first":
            spell_as_first(source / "model.safetensors")
        run(binary, "compress", source, "--method", "gqa", "--kv", "0.5", "--target", "expanded", "--out", out)
        before, after = states(source, ids), states(out, ids)
        expected = ((before - after).square().sum() / before.square().sum()).item()
        found = run(binary, "eval", out, "--source", source, "--ids", text)["hidden_error"]
        worst = max(worst, abs(found - expected) / expected)
        if worst > CLOSE or expected < 1e-3:
            raise RuntimeError(f"{form}: hidden states are {found:.7f} apart, in transformers {expected:.7f}")
    kept, doubled, merged = (root / part for part in ("kept", "doubled", "merged"))
    run(binary, "compress", root / "f32", "--method", "low-rank", "--kv", "1.0", "--target", "expanded", "--out", kept)
    models.share_heads(copy.deepcopy(model)).save_pretrained(doubled)
    run(binary, "compress", doubled, "--method", "low-rank", "--kv", "0.5", "--target", "expanded", "--out", merged)
    off = max(apart(states(kept, ids), states(root / "f32", ids)), apart(states(merged, ids), states(doubled, ids)))
    if off > CLOSE:
        raise RuntimeError(f"without a loss hidden states differ by {off:.1e}")
    return {"loss": f"states {worst:.0e}", "stock": "has none", "lossless": f"{off:.0e}"}
