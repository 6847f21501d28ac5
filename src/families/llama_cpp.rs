//! What llama.cpp calls architectures and tokenizers that it knows.

/// The architecture of layers like a Llama's: with norms of queries and keys by head or without, all with as many heads or not.
/// None is known with such norms and layers that differ.
pub fn architecture(head_norms: bool, alike: bool) -> &'static str {
    match (head_norms, alike) {
        (true, _) => "qwen3",
        (false, true) => "llama",
        (false, false) => "deci",
    }
}

/// Tokenizers whose texts are cut into words, of bytes.
pub const BYTE_LEVEL: &str = "gpt2";
/// Tokenizers that merge whole texts, as SentencePiece does.
pub const SENTENCEPIECE: &str = "llama";
/// The way of cutting texts that `ByteLevel` has of its own.
pub const BYTE_LEVEL_WORDS: &str = "gpt-2";
/// That way after every digit was cut off.
pub const DIGITS: &str = "smollm";

/// Other ways of cutting: patterns of `Split`, with their names, and whether words that are tokens as a whole are taken first.
pub const WORDS: [(&str, &str, bool); 3] = [
    (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", BYTE_LEVEL_WORDS, false),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "llama-bpe",
        true,
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "qwen2",
        false,
    ),
];
