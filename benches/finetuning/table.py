"""The table of benches/finetuning/run.sh, from the figures of its runs."""

import json
import math
import statistics
import sys
from pathlib import Path

work, methods, shares, tokens = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(","), sys.argv[4]
read = lambda path: json.loads(path.read_text())
source = read(work / "source.json")


def spread(values):
    """The mean, and how far single runs are from it."""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def needed(curve, aim):
    """The least cache that makes the perplexity `aim`: a line in the logarithms between two budgets; the whole cache makes the source's."""
    curve = sorted(curve)
    for (a, p), (b, q) in zip(curve, curve[1:]):
        if q <= aim <= p:
            way = math.log(p / aim) / math.log(p / q) if p > q else 0.0
            return f"{math.exp(math.log(a) + (math.log(b) - math.log(a)) * way):.1%}"
    return "> 100%" if aim < min(perplexity for _, perplexity in curve) else f"< {curve[0][0]:.1%}"


print(f"The source: {source['perplexity']:.2f}.", end="")
trained = [read(path)["perplexity"] for path in sorted(work.glob("train_*.json"))]
if trained:
    print(f" The source, its attention trained by the loss for {tokens} tokens: {spread(trained)}.", end="")
print(f"\n\n| | cache | perplexity | KL | + {tokens} tokens: perplexity | KL |\n|---|---|---|---|---|---|")
curves = {}
for method in methods:
    for share in shares:
        before = read(work / f"compress_{method}_{share}.json")
        after = [read(path) for path in sorted(work.glob(f"distill_{method}_{share}_*.json"))]
        bytes_per_token = read(work / f"compress_{method}_{share}.plan")["kv_bytes_per_token"]
        cache = bytes_per_token["after"] / bytes_per_token["before"]
        perplexity = [run["perplexity"] for run in after]
        kl = [run["kl"] for run in after]
        print(
            f"| {method} | {cache:.1%} | {before['perplexity']:.2f} | {before['kl']:.3f} | {spread(perplexity)} "
            f"| {statistics.mean(kl):.4f} |"
        )
        for when, value in (("before", before["perplexity"]), ("after", statistics.mean(perplexity))):
            curves.setdefault((when, method), [(1.0, source["perplexity"])]).append((cache, value))
print("\nThe cache that each needs for one perplexity, between the budgets above by a line in the logarithms:\n")
print(f"| perplexity of | | {' | '.join(methods)} |\n|---|---|{'---|' * len(methods)}")
for when in ("before", "after"):
    first = sorted(curves[when, methods[0]])[:-1]
    aims = [(f"{methods[0]} at {cache:.1%}", perplexity) for cache, perplexity in reversed(first)]
    for name, aim in [("1.02 times the source's", 1.02 * source["perplexity"]), *aims]:
        cells = " | ".join(needed(curves[when, method], aim) for method in methods)
        print(f"| {name}, {when} | {aim:.2f} | {cells} |")
