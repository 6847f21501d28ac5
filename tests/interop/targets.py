"""Every form of output in its runtime: what a plan says is what is loaded, computed and cached."""

import copy
import json
import re
from importlib.metadata import version

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import llama_cpp
import models

CLOSE = 1e-4
LAYERS = 3

# name -> (model_type, KV heads, what differs from models.SMALL)
MODELS = {
    "llama, 6 on 2": ("llama", 2, dict()),
    "llama 3, 9 on 3": ("llama", 3, dict(hidden_size=90, num_attention_heads=9, tie_word_embeddings=True, rope_parameters=models.llama3())),
    "llama, 8 on 8": ("llama", 8, dict(hidden_size=64, num_attention_heads=8)),
    "mistral, 12 on 6": ("mistral", 6, dict(num_attention_heads=12, head_dim=8, sliding_window=None)),
    "qwen2, 6 on 6, biases": ("qwen2", 6, dict()),
    "qwen3, 12 on 6": ("qwen3", 6, dict(num_attention_heads=12, head_dim=16)),
}

# Other types that take other numbers of heads, as models.py has them, with 6 KV heads.
OTHERS = ["qwen2, windows", "qwen3_moe", "mixtral", "smollm3", "gemma", "gemma2", "gemma3", "granite", "starcoder2", "nemotron", "cohere", "cohere2", "glm", "glm4", "exaone4", "phi", "phi3",
          "cohere, norms of heads", "arcee", "seed_oss", "ernie4_5"]
# Of these llama.cpp runs those that compute as a Llama.
AS_LLAMA = ["seed_oss", "ernie4_5"]
# Of these any number of heads of a layer, but not of the whole.
BY_LAYER = ["phi3, longrope, partial, window"]
# Of these a norm over all heads of a token allows equal groups only.
WIDE = ["olmo2, grouped", "olmo3, yarn by kind"]
# The width of heads, or of their norms, follows from the number of query heads: equal groups, too.
OWN = ["phi, normed", "stablelm", "stablelm, parallel"]

# KV heads -> plan -> groups of every layer
PLANS = {
    2: {"by layer": [[[0, 1]], [[0], [1]], [[0, 1]]]},
    3: {"unequal": [[[0, 2], [1]], [[0, 1], [2]], [[0], [1, 2]]], "by layer": [[[0, 1, 2]], [[0], [1, 2]], [[0], [1], [2]]]},
    6: {
        "equal": [[[0, 3], [1, 4], [2, 5]], [[0, 1], [2, 3], [4, 5]], [[0, 5], [1, 2], [3, 4]]],
        "unequal": [[[0, 1, 4], [2, 3], [5]], [[0], [1, 2], [3, 4, 5]], [[0, 3], [1, 5], [2, 4]]],
        "by layer": [[[0, 1, 2, 3], [4, 5]], [[0, 4, 5], [1], [2], [3]], [[0, 1, 2, 3, 4, 5]]],
        "equal by layer": [[[0, 3], [1, 4], [2, 5]], [[0, 1, 2], [3, 4, 5]], [[0], [1], [2], [3], [4], [5]]],
        "nearly equal by layer": [[[0, 1, 2, 3], [4, 5]], [[0, 4], [1, 5], [2], [3]], [[0, 1, 2, 3, 4, 5]]],
    },
    8: {
        "equal": [[[0, 7], [1, 6], [2, 5], [3, 4]]] * LAYERS,
        "unequal": [[[0, 2, 5], [1, 6], [3, 7], [4]], [[0, 1], [2, 3], [4, 5], [6, 7]], [[0], [1], [2, 3, 4], [5, 6, 7]]],
        "by layer": [[[0, 2, 5, 6, 7], [1], [3, 4]], [[0, 1, 2, 3], [4, 5, 6, 7]], [[0], [1], [2, 3], [4], [5], [6], [7]]],
        "nearly equal by layer": [[[0, 2, 5], [1, 6], [3, 7], [4]], [[0, 1, 2, 3], [4, 5], [6, 7]], [[0, 7], [1, 2], [3], [4], [5], [6]]],
    },
}
ANY = ("remote-code", "gguf")
ONE_SIZE, ONE_K = ("stock", "padded", *ANY), ("padded", *ANY)
HOLD = {"equal": ONE_SIZE, "one group": ONE_SIZE, "all kept": ONE_SIZE, "unequal": ONE_K, "by layer": ANY, "equal by layer": ANY, "nearly equal by layer": ANY}


def all_models():
    """Name, type, KV heads, what differs, and the plans."""
    for name, (model_type, heads, differs) in MODELS.items():
        yield name, model_type, heads, differs, list(plans(heads))
    for name in OTHERS + BY_LAYER + WIDE + OWN:
        model_type, differs = models.MODELS[name]
        # What must divide the width divides this one.
        wider = {"hidden_size": 72} if model_type in ("arcee", "gemma2", "gemma3_text") else {}
        kinds = ["equal by layer"] if name in WIDE + OWN else ["by layer"] if name in BY_LAYER else ["unequal", "by layer"]
        yield name, model_type, 6, {**differs, **wider}, kinds


def plans(heads):
    """Groups of each plan for so many KV heads."""
    return PLANS[heads] | {"one group": [[list(range(heads))]] * LAYERS, "all kept": [[[i] for i in range(heads)]] * LAYERS}


def write_plan(template, groups, path):
    plan = json.loads(template.read_text())
    plan["layers"] = [{"groups": layer, "error": 0.0} for layer in groups]
    kept, source = sum(map(len, groups)), plan["source"]["kv_heads"]
    plan["budget"] = {"asked": 1.0, "reached": kept / (source * LAYERS), "kv_heads": kept}
    path.write_text(json.dumps(plan))


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True).eval()


def cache_bytes(model, ids):
    """Bytes of keys and values of a token (layers with a window hold only the last of them), as the model's own cache says, and its logits."""
    with torch.no_grad():
        out = model(ids, use_cache=True)
    # A layer that reads the one below has nothing.
    held = [tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() // (tensor.shape[0] * tensor.shape[2]) for tensor in held), out.logits.double()


def written(model, ids, cached):
    with torch.no_grad():
        return model.generate(ids[:1, :8], max_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=cached)


def in_transformers(out, ids):
    """Who loads it, bytes of its cache, logits, and texts with and without it."""
    model = load(out)
    cached, logits = cache_bytes(model, ids)
    return type(model).__name__, cached, logits, [written(model, ids, cached) for cached in (True, False)]


def in_llama_cpp(out, ids):
    """The same in llama.cpp."""
    model = llama_cpp.Llama(out / "model.gguf", threads=1, flash=True)
    cached = model.cache_bytes
    model.close()
    model = llama_cpp.Llama(out / "model.gguf", threads=1)
    logits = torch.stack([torch.from_numpy(model.logits(row)) for row in ids]).double()
    alone = ids[0, :8].tolist()
    text = model.greedy(alone, 50)
    while len(alone) < 58:
        alone.append(int(model.logits(alone)[-1].argmax()))
    loaded = re.search(r"arch += (\w+)", model.log).group(1)
    model.close()
    return f"llama.cpp: {loaded}", cached, logits, [torch.tensor([text]), torch.tensor([alone])]


def in_blocks(out, ids):
    """A Llama whose attentions are made as vLLM's DeciLM makes them: by the attributes of its configuration. Not vLLM itself."""
    config = AutoConfig.from_pretrained(out, trust_remote_code=True)
    own = ("block_configs", "model_type", "auto_map", "architectures", "qcqa_heads", "num_attention_heads", "sliding_window")
    plain = LlamaConfig(**{key: value for key, value in config.to_dict().items() if key not in own}, num_attention_heads=1)
    # Afterwards: a Llama of transformers wants a number that divides its width, its attention does not.
    plain.num_attention_heads = config.num_attention_heads
    model = LlamaForCausalLM(plain)
    for i, block in enumerate(config.block_configs):
        if block.attention.no_op or block.ffn.no_op or hasattr(block.ffn, "ffn_mult"):
            raise RuntimeError(f"block {i} says {block}")
        own = copy.copy(plain)
        own.num_key_value_heads = config.num_attention_heads // block.attention.n_heads_in_group
        own.intermediate_size = block.ffn.intermediate_size
        layer = model.model.layers[i]
        layer.self_attn, layer.mlp = type(layer.self_attn)(own, i), type(layer.mlp)(own)
        layer.self_attn.config = plain
    stored = load_file(out / "model.safetensors")
    lacking, beyond = model.load_state_dict(stored, strict=False)
    if beyond or [name for name in lacking if not (plain.tie_word_embeddings and name == "lm_head.weight")]:
        raise RuntimeError(f"{lacking} are missing, {beyond} too many")
    model.tie_weights()
    model.eval()
    cached, logits = cache_bytes(model, ids)
    return "as the loader reads it", cached, logits, [written(model, ids, cached) for cached in (True, False)]


RUNTIMES = {"gguf": in_llama_cpp, "deci": in_blocks}


def one_number(queries, heads, groups):
    """Whether a number of query heads, up to half more than there are, holds all layers."""
    layers = [(len(layer), max(map(len, layer)) * queries // heads) for layer in groups]
    return any(all(n % k == 0 and n // k >= places for k, places in layers) for n in range(queries, queries * 3 // 2 + 1))


def holds(name, model_type, kind, queries, heads):
    """The targets of a plan of such a model."""
    llama = name in AS_LLAMA or name in MODELS and (model_type != "qwen3" or kind in ("equal", "one group", "all kept", "unequal"))
    blocks = name in MODELS and model_type != "qwen3" and one_number(queries, heads, plans(heads)[kind])
    return [target for target in HOLD[kind] if target != "gguf" or llama] + ["deci"] * blocks


def check(run, binary, root):
    """Rows of the table; the first that does not hold is an error."""
    # Matrices so small are only slowed down by threads.
    torch.set_num_threads(1)
    ids = torch.randint(3, 96, (2, 64), generator=torch.Generator().manual_seed(7))
    ids_file = root / "text.ids"
    ids_file.write_bytes(ids.to(torch.int32).numpy().astype("<u2").tobytes())
    for name, model_type, heads, differs, kinds in all_models():
        place = root / name.replace(",", "").replace(" ", "_")
        config = AutoConfig.for_model(model_type, **{**models.SMALL, "num_hidden_layers": LAYERS, **differs, "num_key_value_heads": heads})
        models.made(AutoModelForCausalLM, config).save_pretrained(place / "source")
        template = place / "template.json"
        run(binary, "search", place / "source", "--method", "qcqa-ac", "--kv", "1.0", "--out", template)
        for kind in kinds:
            groups = plans(heads)[kind]
            plan = place / "plan.json"
            write_plan(template, groups, plan)
            width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            says = sum(len(layer) for layer in groups) * 2 * width * 4
            expected = texts = None
            for target in ("expanded", *holds(name, model_type, kind, config.num_attention_heads, heads)):
                out = place / f"{kind}_{target}".replace(" ", "_").replace("-", "_")
                told = run(binary, "convert", place / "source", "--plan", plan, "--target", target, "--out", out)["kv_bytes_per_token"]
                loaded, cached, logits, text = RUNTIMES.get(target, in_transformers)(out, ids)
                if target == "expanded":
                    expected, texts = logits, text[0]
                    continue
                off = ((logits - expected).abs().max() / expected.abs().max()).item()
                if off > CLOSE:
                    raise RuntimeError(f"{name}, {kind}, {target}: logits differ by {off:.1e} from the expanded form's")
                if not cached == told["after"] == says:
                    raise RuntimeError(f"{name}, {kind}, {target}: the cache holds {cached} bytes a token, the plan says {says}, qcqa {told['after']}")
                if not all(torch.equal(one, texts) for one in text):
                    raise RuntimeError(f"{name}, {kind}, {target}: other texts than the expanded form writes")
                if target != "gguf":
                    own = run(binary, "eval", out, "--ids", ids_file)["loss"]
                    scores = torch.log_softmax(logits[:, :-1], -1)
                    loss = -scores.gather(-1, ids[:, 1:, None]).mean().item()
                    if abs(own - loss) > CLOSE * loss:
                        raise RuntimeError(f"{name}, {kind}, {target}: qcqa reads it again with a loss of {own}, transformers has {loss}")
                yield name, kind, target, loaded, f"{cached} of {heads * LAYERS * 2 * width * 4}", f"{off:.0e}"
        if name in MODELS and heads > 2 and model_type != "qwen3":
            yield across(run, binary, place, name, heads, width, ids, ids_file)
        if name in MODELS and heads > 2:
            # What lies in the form of layers can be compressed again.
            again = place / "again"
            run(binary, "compress", place / "by_layer_remote_code", "--method", "gqa", "--allocation", "exact", "--kv", "1.0", "--target", "remote-code", "--out", again)
            off = (cache_bytes(load(again), ids)[1] - cache_bytes(load(place / "by_layer_remote_code"), ids)[1]).abs().max().item()
            if off > CLOSE:
                raise RuntimeError(f"{name}: written again, logits differ by {off:.1e}")


def across(run, binary, place, name, heads, width, ids, ids_file):
    """The second layer reads the first one's cache: half of its heads are shared with it, the others are computed there for it alone."""
    half, plan, out = heads // 2, place / "across.json", place / "across"
    alone = [[i] for i in range(heads)]
    write_plan(place / "template.json", [[[0, 1], *alone[2:]], alone, alone], plan)
    said = json.loads(plan.read_text())
    said["layers"][1]["below"] = [i if i < half else heads - 1 + i - half for i in range(heads)]
    kept = heads - 1 + heads - half + heads
    said["budget"] = {"asked": 1.0, "reached": kept / (heads * LAYERS), "kv_heads": kept}
    said["method"]["name"] = "cla"
    plan.write_text(json.dumps(said))
    told = run(binary, "convert", place / "source", "--plan", plan, "--target", "remote-code", "--out", out)["kv_bytes_per_token"]
    loaded, cached, logits, texts = in_transformers(out, ids)
    loss = -torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None]).mean().item()
    planned, again = run(binary, "eval", place / "source", "--plan", plan, "--ids", ids_file)["loss"], run(binary, "eval", out, "--ids", ids_file)["loss"]
    off = max(abs(loss - own) / loss for own in (planned, again))
    if off > CLOSE:
        raise RuntimeError(f"{name}, across layers: transformers has a loss of {loss}, the plan {planned}, what was written {again}")
    if not cached == told["after"] == kept * 2 * width * 4:
        raise RuntimeError(f"{name}, across layers: the cache holds {cached} bytes a token, qcqa says {told['after']}, the plan keeps {kept} heads")
    if not torch.equal(*texts):
        raise RuntimeError(f"{name}, across layers: other texts with a cache than without")
    return name, "across layers", "remote-code", loaded, f"{cached} of {heads * LAYERS * 2 * width * 4}", f"{off:.0e}"


def table(rows):
    lines = [
        f"With transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]} and llama.cpp as xllamacpp {version('xllamacpp')} has it:",
        "",
        "| model | plan | targets | cache, bytes a token | logits apart, at most |",
        "|---|---|---|---|---|",
    ]
    by_plan = {}
    for name, kind, target, loaded, cached, off in rows:
        by_plan.setdefault((name, kind, cached), []).append((f"{target} ({loaded.removesuffix('ForCausalLM')})", off))
    for (name, kind, cached), outputs in by_plan.items():
        worst = max((off for _, off in outputs), key=float)
        lines.append(f"| {name} | {kind} | {', '.join(target for target, _ in outputs)} | {cached} | {worst} |")
    return "\n".join(lines) + "\n"
