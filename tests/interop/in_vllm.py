"""What `deci` writes, run by vLLM on a CPU and held against transformers on the expanded form of the same plan. By hand, as vLLM is large:

    python in_vllm.py make QCQA DIR       # small random Llamas, a plan for each, both forms
    python in_vllm.py run DIR NAME        # where vLLM is: log-probabilities of all tokens at every place, and 20 tokens
    python in_vllm.py compare DIR NAME

NAME is one of 6on2, 9on3, 8on8. docs/targets.md has what came of it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

# Query heads, KV heads, width of a head (vLLM's kernels for CPUs have no 16), and the groups of each layer.
MODELS = {
    "6on2": (6, 2, 32, [[[0, 1]], [[0], [1]], [[0, 1]]]),
    "9on3": (9, 3, 64, [[[0, 2], [1]], [[0, 1, 2]], [[0], [1], [2]]]),
    "8on8": (8, 8, 32, [[[0, 2, 5], [1, 6], [3, 7], [4]], [[0, 1, 2, 3], [4, 5], [6, 7]], [[0, 7], [1, 2], [3], [4], [5], [6]]]),
}


def make(qcqa, root):
    from transformers import LlamaConfig, LlamaForCausalLM

    root.mkdir(parents=True, exist_ok=True)
    ids = torch.randint(3, 96, (2, 64), generator=torch.Generator().manual_seed(7)).tolist()
    (root / "ids.json").write_text(json.dumps(ids))
    for name, (queries, heads, width, groups) in MODELS.items():
        torch.manual_seed(1)
        config = LlamaConfig(vocab_size=96, hidden_size=queries * width, intermediate_size=128, num_hidden_layers=3, num_attention_heads=queries,
                             num_key_value_heads=heads, head_dim=width, max_position_embeddings=256, initializer_range=0.15, bos_token_id=1, eos_token_id=2)
        source, plan = root / name, root / f"{name}.json"
        LlamaForCausalLM(config).save_pretrained(source)
        subprocess.run([qcqa, "search", source, "--method", "qcqa-ac", "--kv", "1.0", "--out", plan, "--force"], check=True, capture_output=True)
        changed, kept = json.loads(plan.read_text()), sum(map(len, groups))
        changed["layers"] = [{"groups": layer, "error": 0.0} for layer in groups]
        changed["budget"] = {"asked": 1.0, "reached": kept / (3 * heads), "kv_heads": kept}
        plan.write_text(json.dumps(changed))
        for target in ("deci", "expanded"):
            out = root / f"{name}-{target}"
            subprocess.run([qcqa, "convert", source, "--plan", plan, "--target", target, "--out", out, "--force"], check=True, capture_output=True)


def run(root, name):
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    from vllm import LLM, SamplingParams

    ids = json.loads((root / "ids.json").read_text())
    model = LLM(str(root / f"{name}-deci"), trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=256, max_logprobs=-1,
                skip_tokenizer_init=True, max_num_seqs=2, max_num_batched_tokens=256)
    asked = SamplingParams(temperature=0, max_tokens=20, detokenize=False, ignore_eos=True, prompt_logprobs=-1, logprobs=0)
    answers = model.generate([{"prompt_token_ids": row} for row in ids], asked)
    scores = [[[place[token].logprob for token in range(len(place))] for place in answer.prompt_logprobs[1:]] for answer in answers]
    torch.save((torch.tensor(scores), [list(answer.outputs[0].token_ids) for answer in answers]), root / f"{name}.pt")


def compare(root, name):
    from transformers import AutoModelForCausalLM

    ids = torch.tensor(json.loads((root / "ids.json").read_text()))
    model = AutoModelForCausalLM.from_pretrained(root / f"{name}-expanded", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.log_softmax(model(ids).logits[:, :-1].double(), -1)
        text = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)[:, ids.shape[1] :].tolist()
    found, written = torch.load(root / f"{name}.pt")
    off = ((found.double() - expected).abs().max() / expected.abs().max()).item()
    print(f"{name}: log-probabilities apart by {off:.0e} of the largest, {'the same' if written == text else 'other'} texts")
    return off < 1e-4 and written == text


if __name__ == "__main__":
    step, *arguments = sys.argv[1:]
    if step == "make":
        make(arguments[0], Path(arguments[1]))
    else:
        done = {"run": run, "compare": compare}[step](Path(arguments[0]), arguments[1])
        sys.exit(done is False)
