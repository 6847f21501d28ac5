#!/usr/bin/env python3
"""Holds heal.py against `qcqa distill` on a small model of every family: five steps of AdamW.

    python families.py QCQA [NAME]

Not part of CI: it takes five minutes on two cores. NAME looks at models whose names hold it.
"""

import sys
import tempfile
from pathlib import Path

import check

sys.path.insert(0, str(check.HERE.parent.parent / "tests" / "interop"))
import models

# The tokenizer of novels-1m has so many words.
WORDS = 1024


def worded(described):
    """What differs from a small model, with enough words."""
    texts = {"text_config": worded(described["text_config"])} if "text_config" in described else {}
    return described | texts | {"vocab_size": WORDS}


def held(binary, name, root):
    source, converted = root / "source", root / "converted"
    models.make(name).float().save_pretrained(source)
    check.shutil.copy(check.NOVELS / "tokenizer.json", source)
    at = check.Check(binary, root, source)
    compress = ["compress", source, "--method", "gqa", "--kv", "0.5", "--out", converted]
    try:
        at.qcqa(*compress, "--target", "stock")
    except check.Differs as error:
        if "no grouped form of their own" not in str(error):
            raise
        at.qcqa(*compress, "--target", "expanded")
    told = at.qcqa("distill", converted, "--source", source, "--for", "2560", *check.TEXT, "--out", root / "distilled")
    return check.near("the losses", at.heal(converted, "healed", "--tokens", "2560"), told["losses"], check.CLOSE)


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    check.logging.disable_progress_bar()
    check.torch.set_num_threads(1)
    worst, failed = 0.0, []
    for name, (kind, described) in list(models.MODELS.items()):
        if sys.argv[2:] and sys.argv[2] not in name:
            continue
        models.MODELS[name] = (kind, worded(described))
        with tempfile.TemporaryDirectory() as root:
            try:
                off = held(sys.argv[1], name, Path(root))
                worst = max(worst, off)
                print(f"{name:36} {off:.0e}", flush=True)
            except Exception as error:  # the next family is still looked at
                failed.append(name)
                print(f"{name:36} FAILED: {type(error).__name__}: {str(error)[:400]}", flush=True)
    print(f"at most {worst:.0e}")
    sys.exit(f"failed: {failed}" if failed else 0)


if __name__ == "__main__":
    main()
