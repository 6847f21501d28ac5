"""The windows that `qcqa distill` reads, in the order in which it reads them.

A text is tokenised whole and cut into windows that do not overlap. Of every text some are read, spaced over the whole of it;
of these an eighth fits nothing and validates (docs/calibration.md). What fits is read round after round, every round in an
order of its own, which the seed decides: the generator is the binary's, so that one seed is one order here and there.
"""

import hashlib
from pathlib import Path

# Of so many windows one validates; of a text at least so many, as far as half of it goes (src/text/roles.rs).
VALIDATION_SHARE = 8
LEAST_VALIDATION = 8

U32, U64 = 2**32 - 1, 2**64 - 1


class Wrong(Exception):
    """What people can put right; its message says how."""


def sources(given):
    """(path, share) of every text: PATH, or PATH:SHARE; a path that exists as it stands has no share."""
    for text in given:
        path, _, share = text.rpartition(":")
        if Path(text).exists() or not path or not share.isdecimal():
            path, share = text, 1
        if not Path(path).is_file():
            raise Wrong(f"{path} is no file: --calibration takes texts in UTF-8, or TEXT:SHARE")
        if int(share) == 0:
            raise Wrong(f"{text}: a share of the windows is at least 1")
        yield Path(path), int(share)


def shared_out(total, shares):
    """`total` in whole numbers by shares, at least 1 each."""
    ends = [total * sum(shares[: n + 1]) // sum(shares) for n in range(len(shares))]
    return [max(end - start, 1) for start, end in zip([0, *ends], ends)]


def roles(windows):
    """Windows that fit, and windows that validate: each of these in the middle of one of as many equal stretches."""
    n = len(windows)
    most = min(max(n // VALIDATION_SHARE, LEAST_VALIDATION), n // 2)
    chosen = {(2 * i + 1) * n // (2 * most) for i in range(most)}
    return [w for i, w in enumerate(windows) if i not in chosen], [w for i, w in enumerate(windows) if i in chosen]


def read(tokenizer, given, most, length):
    """Of some texts the windows that fit, and those that validate."""
    texts = list(sources(given))
    seen, fit, validation = set(), [], []
    for (path, _), count in zip(texts, shared_out(most, [share for _, share in texts])):
        try:
            text = path.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Wrong(f"{path} is not UTF-8 at byte {error.start}: convert it") from error
        ids = tokenizer.encode(text).ids
        total = len(ids) // length
        if total == 0:
            raise Wrong(f"{path} has {len(ids)} tokens, and a window {length}: take a longer text")
        count = min(count, total)
        starts = (i * total // count * length for i in range(count))
        # Equal windows count once, over all texts: none that validates is one that fits.
        windows = [w for w in (tuple(ids[start : start + length]) for start in starts) if not (w in seen or seen.add(w))]
        one, other = roles(windows)
        if not one or (len(windows) == 1 and count > 1):
            raise Wrong(f"{path} repeats itself: of {count} windows {len(windows)} differ")
        fit += one
        validation += other
    return fit, validation


def fingerprint(model, fit):
    """What plans call a text: SHA-256 over the model's fingerprint, the length of a window and the tokens, each with its length."""
    tokens = b"".join(token.to_bytes(4, "little") for window in fit for token in window)
    digest = hashlib.sha256()
    for field in (model.encode(), len(fit[0]).to_bytes(8, "little"), tokens):
        digest.update(len(field).to_bytes(8, "little") + field)
    return f"sha256:{digest.hexdigest()}"


class Generator:
    """ChaCha with 8 rounds, seeded by PCG32: rand_chacha's ChaCha8Rng::seed_from_u64."""

    def __init__(self, seed):
        self.key, self.block, self.held = [], 0, []
        for _ in range(8):
            seed = (seed * 6364136223846793005 + 11634580027462260723) & U64
            mixed, turn = ((seed >> 18 ^ seed) >> 27) & U32, seed >> 59
            self.key.append((mixed >> turn | mixed << (32 - turn)) & U32)

    def word(self):
        """32 bits."""
        if not self.held:
            start = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *self.key, self.block & U32, self.block >> 32, 0, 0]
            words = start.copy()
            for _ in range(4):
                for column in range(4):
                    quarter(words, *(column + 4 * row for row in range(4)))
                for column in range(4):
                    quarter(words, *((column + row) % 4 + 4 * row for row in range(4)))
            self.held = [(a + b) & U32 for a, b in zip(words, start)][::-1]
            self.block += 1
        return self.held.pop()

    def below(self, bound):
        """A number below `bound`, which fits 32 bits."""
        high, low = divmod(self.word() * bound, 2**32)
        if low > 2**32 - bound:
            high += low + (self.word() * bound >> 32) > U32
        return high

    def shuffled(self, n):
        """0 … n − 1 in an order by chance: the shuffle of rand 0.9, which draws several places from one number."""
        order, left, drawn = list(range(n)), 1, 0
        for i in range(n):
            if left == 0:
                bound = i + 1
                while bound * (i + 2 + left) <= U32:
                    bound *= i + 2 + left
                    left += 1
                left, drawn = left + 1, self.below(bound)
            left -= 1
            drawn, place = divmod(drawn, i + 1) if left else (drawn, drawn)
            order[i], order[place] = order[place], order[i]
        return order


def quarter(x, a, b, c, d):
    """A quarter round of ChaCha."""
    for p, q, r, turn in [(a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)]:
        x[p] = (x[p] + x[q]) & U32
        mixed = x[r] ^ x[p]
        x[r] = (mixed << turn | mixed >> (32 - turn)) & U32


def fork(seed, stream):
    """The seed of part `stream` of the work (SplitMix64's finaliser, as `Run::fork`)."""
    z = seed ^ ((stream + 1) * 0x9E3779B97F4A7C15 & U64)
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & U64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & U64
    return z ^ z >> 31


class Order:
    """The order in which windows are read: all of them, then all of them again in another order."""

    def __init__(self, windows, seed):
        self.windows, self.seed, self.round, self.order = windows, seed, None, None

    def batch(self, step, size):
        """The windows of a step."""
        return [self.window(n) for n in range(step * size, (step + 1) * size)]

    def window(self, n):
        round, place = divmod(n, self.windows)
        if self.round != round:
            self.round, self.order = round, Generator(fork(self.seed, round)).shuffled(self.windows)
        return self.order[place]
