"""llama.cpp by its C interface, as the wheel of requirements.txt has it: logits, tokens, texts, and the bytes of its cache."""

import ctypes
import importlib.util
import re
from pathlib import Path

import numpy as np

PLACE = importlib.util.find_spec("xllamacpp")
F32, F16 = 0, 1
CACHED = 1 << 16


class ContextParams(ctypes.Structure):
    """The first fields, in the order of llama.h; behind them comes what stays as it is."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq")),
        *((name, ctypes.c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type", "pooling_type", "attention_type", "flash_attn_type")),
        *((name, ctypes.c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        ("cb_eval", ctypes.c_void_p),
        ("cb_eval_user_data", ctypes.c_void_p),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * 256),
    ]


class ModelParams(ctypes.Structure):
    _fields_ = [("all", ctypes.c_uint8 * 256)]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def library():
    """The library, with the types of what is called."""
    lib = ctypes.CDLL(str(next(Path(PLACE.submodule_search_locations[0]).glob("*.so"))))
    pointer = ctypes.c_void_p
    for name, result, arguments in [
        ("llama_context_default_params", ContextParams, []),
        ("llama_model_default_params", ModelParams, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, ModelParams]),
        ("llama_init_from_model", pointer, [pointer, ContextParams]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", ctypes.c_int32, [pointer]),
        ("llama_tokenize", ctypes.c_int32, [pointer, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32, ctypes.c_bool, ctypes.c_bool]),
        ("llama_batch_init", Batch, [ctypes.c_int32] * 3),
        ("llama_batch_free", None, [Batch]),
        ("llama_decode", ctypes.c_int32, [pointer, Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, ctypes.c_int32]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
    ]:
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


LINES = []
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: LINES.append(text.decode(errors="replace")))
LIB = None


class Llama:
    """A GGUF file in llama.cpp."""

    def __init__(self, path, tokens=CACHED, kind=F32, threads=2, flash=False):
        global LIB
        if LIB is None:
            LIB = library()
            LIB.llama_log_set(LOG, None)
        LINES.clear()
        self.model = LIB.llama_model_load_from_file(str(path).encode(), LIB.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}: " + "".join(LINES)[-2000:])
        params = LIB.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = tokens, 2048, 512
        params.type_k = params.type_v = kind
        params.n_threads = params.n_threads_batch = threads
        # With flash attention, its default, scores are rounded; without it values of every layer take as much as those of the largest.
        params.flash_attn_type = int(flash)
        self.context = LIB.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp does not run {path}: " + "".join(LINES)[-2000:])
        self.log = "".join(LINES)
        self.vocab = LIB.llama_model_get_vocab(self.model)
        self.tokens = LIB.llama_vocab_n_tokens(self.vocab)
        # Of all caches that it reports.
        sizes = re.findall(r"llama_kv_cache: size = +([0-9.]+) MiB", self.log)
        self.cache_bytes = round(sum(map(float, sizes)) * 2**20 / tokens)

    def close(self):
        LIB.llama_free(self.context)
        LIB.llama_model_free(self.model)

    def tokenize(self, text, around=False):
        """Numbers of the tokens of a text."""
        data = text.encode()
        out = (ctypes.c_int32 * (len(data) + 8))()
        n = LIB.llama_tokenize(self.vocab, data, len(data), out, len(out), around, True)
        return list(out[:n])

    def feed(self, ids, first=0, keep=True):
        """Logits of tokens that come behind `first` others: of all, or of the last."""
        batch = LIB.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), first + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = keep or i + 1 == len(ids)
        if LIB.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama.cpp does not decode")
        rows = range(len(ids)) if keep else [len(ids) - 1]
        logits = np.stack([np.ctypeslib.as_array(LIB.llama_get_logits_ith(self.context, i), (self.tokens,)).copy() for i in rows])
        LIB.llama_batch_free(batch)
        return logits

    def logits(self, ids):
        """Logits of one window."""
        LIB.llama_memory_clear(LIB.llama_get_memory(self.context), True)
        return self.feed(ids)

    def greedy(self, ids, count):
        """The tokens that it goes on with, through its cache."""
        ids = list(map(int, ids))
        last = self.logits(ids)[-1]
        for _ in range(count):
            ids.append(int(last.argmax()))
            last = self.feed(ids[-1:], len(ids) - 1, keep=False)[-1]
        return ids
