"""Trains the 28M Llama of docs/finetuning.md: 8 layers of 16 heads of 32, width 512, no heads shared, with the vocabulary of a smaller
teacher and by its predictions, which hold more than the text alone.

    python train.py TEACHER OUT TEXT… [--tokens 60M]

Needs torch, transformers and a GPU.
"""

import argparse
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

WINDOW, BATCH, RATE, WARM_UP = 512, 64, 1e-3, 200

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("teacher", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("texts", type=Path, nargs="+")
parser.add_argument("--tokens", default="60M", type=lambda text: int(float(text.rstrip("M")) * 1e6))
args = parser.parse_args()

torch.manual_seed(0)
torch.set_float32_matmul_precision("high")
words = Tokenizer.from_file(str(args.teacher / "tokenizer.json"))
text = torch.tensor([token for path in args.texts for token in words.encode(path.read_text("utf-8")).ids], device="cuda")
teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).cuda().requires_grad_(False)
model = LlamaForCausalLM(LlamaConfig(
    hidden_size=512, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=16, head_dim=32, intermediate_size=1408,
    vocab_size=teacher.config.vocab_size, max_position_embeddings=WINDOW, tie_word_embeddings=True, rms_norm_eps=1e-5,
    bos_token_id=teacher.config.bos_token_id, eos_token_id=teacher.config.eos_token_id,
)).cuda()
print(f"{model.num_parameters() / 1e6:.1f} M parameters, {len(text)} tokens of text")
matrices = [p for p in model.parameters() if p.ndim == 2]
others = [p for p in model.parameters() if p.ndim != 2]
optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95), fused=True)
total = args.tokens // (BATCH * WINDOW)
for step in range(total):
    begins = torch.randint(len(text) - WINDOW, (BATCH, 1), device="cuda")
    ids = text[begins + torch.arange(WINDOW, device="cuda")]
    with torch.autocast("cuda", torch.bfloat16):
        with torch.no_grad():
            theirs = teacher(input_ids=ids, use_cache=False).logits
        own = model(input_ids=ids, use_cache=False).logits
    loss = F.kl_div(own.float().log_softmax(-1), theirs.float().log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = RATE * min((step + 1) / WARM_UP, 1.0) * 0.5 * (1 + math.cos(math.pi * step / total))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if step % 100 == 0 or step + 1 == total:
        print(f"step {step + 1} of {total}: KL to the teacher {loss.item():.4f}", flush=True)
model.bfloat16().save_pretrained(args.out)
shutil.copy(args.teacher / "tokenizer.json", args.out)
