"""Tokens of GGUF files: llama.cpp cuts texts as tokenizer.json does."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models as kinds, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM

import llama_cpp
import models

SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Of every kind that decides how a text is cut.
STRANGE = "It's 12,345.678 o'clock — 'TWAS we'll\tnaïve\n\n\n  three   spaces\r\n été 你好 🙂!!  \n x=[1]; ''quoted''  end "


def split(pattern):
    from tokenizers import Regex

    steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return pre_tokenizers.Sequence(steps)


def byte_level(text, pre, whole=False):
    tokenizer = Tokenizer(kinds.BPE(ignore_merges=whole))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False))
    tokenizer.add_tokens([AddedToken("<more>", normalized=False)])
    return tokenizer


def sentencepiece(text, metaspace):
    """Merges in the order of their tokens, all that lead to one: as files of SentencePiece are converted."""
    tokenizer = Tokenizer(kinds.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>"], show_progress=False))
    learned = json.loads(tokenizer.to_str())["model"]
    order = sorted(learned["vocab"], key=learned["vocab"].get)
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), *(t for t in order if t not in ("<unk>", "<s>"))])}
    merges = [(token[:i], token[i:]) for token in order[2:] for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
    tokenizer = Tokenizer(kinds.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def all_tokenizers(text):
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    yield "bytes", byte_level(text, plain)
    yield "bytes, digits", byte_level(text, digits)
    yield "bytes, three digits", byte_level(text, split(SPLIT % "{1,3}"), whole=True)
    yield "bytes, one digit", byte_level(text, split(SPLIT % ""))
    yield "sentencepiece", sentencepiece(text, metaspace=False)
    yield "sentencepiece, metaspace", sentencepiece(text, metaspace=True)


def check(run, binary, root, text):
    """How many tokenizers agree; the first that does not is an error."""
    held = 0
    for name, tokenizer in all_tokenizers(text):
        place = root / name.replace(",", "").replace(" ", "_")
        sizes = {**models.SMALL, "vocab_size": tokenizer.get_vocab_size(), "num_hidden_layers": 1}
        models.made(AutoModelForCausalLM, AutoConfig.for_model("llama", **sizes)).save_pretrained(place / "source")
        tokenizer.save(str(place / "source" / "tokenizer.json"))
        run(binary, "compress", place / "source", "--method", "mqa", "--kv", "0.5", "--target", "gguf", "--out", place / "out")
        loaded = llama_cpp.Llama(place / "out" / "model.gguf", tokens=256)
        for piece in (text[:20000], STRANGE, "a <more>b"):
            for around in (False, True):
                expected = tokenizer.encode(piece, add_special_tokens=around).ids
                found = loaded.tokenize(piece, around)
                if found != expected:
                    at = next((i for i, (a, b) in enumerate(zip(expected, found)) if a != b), min(len(expected), len(found)))
                    near = [tokenizer.id_to_token(i) for i in expected[max(at - 4, 0) : at + 4]]
                    raise RuntimeError(f"{name}: llama.cpp differs at token {at} of {piece[:30]!r}: {near}, {found[max(at - 4, 0) : at + 4]}")
        loaded.close()
        held += 1
    return held
