//! tokenizer.json in the words of GGUF.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::families::{BYTE_LEVEL, BYTE_LEVEL_WORDS, DIGITS, SENTENCEPIECE, WORDS};
use crate::files::{FileError, is_there, json_where_there};
use crate::model::Unsupported;
use crate::output::Metadata;

const FILE: &str = "tokenizer.json";
/// A map of tokens is a tenth of it.
const LIMIT: u64 = 64 << 20;

/// Kinds of tokens.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// What a file says of the tokens of a model with so many; of a model without tokenizer.json, that there is none.
///
/// # Errors
/// A tokenizer that llama.cpp has no name for.
pub(super) fn metadata(source: &Checkpoint, vocabulary: usize) -> Result<Vec<(String, Metadata)>, FileError> {
    let path = source.path().join(FILE);
    let mut all = Vec::new();
    let Some(json) = json_where_there(&path, LIMIT)? else {
        let other = source.path().join("tokenizer.model");
        if is_there(&other)? {
            let hint =
                "save the tokenizer with transformers (`save_pretrained`), which writes tokenizer.json";
            return Err(unsupported(&other, "a tokenizer without tokenizer.json", hint));
        }
        return Ok(vec![(key("model"), Metadata::Text("none".to_string()))]);
    };
    let tokenizer = Tokenizer::read(&path, &json, vocabulary)?;
    let (model, pre) = tokenizer.kind()?;
    all.push((key("model"), Metadata::Text(model.to_string())));
    all.push((key("pre"), Metadata::Text(pre.to_string())));
    if model == SENTENCEPIECE {
        all.push((key("scores"), Metadata::Numbers(tokenizer.scores()?)));
        all.push((key("add_space_prefix"), Metadata::Flag(tokenizer.begins_with_space())));
    } else {
        let merges = tokenizer.merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
        all.push((key("merges"), Metadata::Texts(merges)));
    }
    all.push((key("token_type"), Metadata::Counts(tokenizer.kinds.clone())));
    all.push((key("tokens"), Metadata::Texts(tokenizer.tokens.clone())));

    let beside = json_where_there(&source.path().join("tokenizer_config.json"), LIMIT)?.unwrap_or_default();
    for (name, short) in [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")] {
        let id = token_id(source, &beside, &tokenizer, name)
            .or_else(|| tokenizer.unknown.filter(|_| name == "unk"));
        all.extend(id.map(|id| (key(&format!("{short}_token_id")), Metadata::Count(id))));
    }
    let [first, last] = tokenizer.around();
    for (name, added) in [("add_bos_token", first), ("add_eos_token", last)] {
        let said = beside.get(name).and_then(Value::as_bool);
        all.push((key(name), Metadata::Flag(said.unwrap_or(added))));
    }
    let template = match std::fs::read_to_string(source.path().join("chat_template.jinja")) {
        Ok(template) => Some(template),
        Err(_) => beside.get("chat_template").and_then(Value::as_str).map(str::to_string),
    };
    all.extend(template.map(|template| ("tokenizer.chat_template".to_string(), Metadata::Text(template))));
    Ok(all)
}

fn unsupported(path: &Path, what: impl Into<String>, hint: &str) -> FileError {
    FileError::Unsupported { path: path.to_path_buf(), unsupported: Unsupported::new(what, hint) }
}

fn key(name: &str) -> String {
    format!("tokenizer.ggml.{name}")
}

/// The id of a token with a role: as config.json has it, or by the content that tokenizer_config.json names.
fn token_id(source: &Checkpoint, beside: &Value, tokenizer: &Tokenizer<'_>, role: &str) -> Option<u32> {
    let id = source.config().raw().get(&format!("{role}_token_id"));
    let id = id.and_then(|id| id.as_array().map_or(Some(id), |ids| ids.first())).and_then(Value::as_u64);
    let named = || {
        let token = beside.get(format!("{role}_token"))?;
        let content = token.as_str().or_else(|| token.get("content")?.as_str())?;
        tokenizer.tokens.iter().position(|token| token == content)
    };
    let id = id.map(|id| id as usize).or_else(named)?;
    u32::try_from(id).ok().filter(|_| id < tokenizer.tokens.len())
}

/// What tokenizer.json says.
struct Tokenizer<'a> {
    path: PathBuf,
    json: &'a Value,
    tokens: Vec<String>,
    kinds: Vec<i32>,
    merges: Vec<(String, String)>,
    unknown: Option<u32>,
}

impl<'a> Tokenizer<'a> {
    fn read(path: &Path, json: &'a Value, vocabulary: usize) -> Result<Self, FileError> {
        let wrong = |key: &'static str, expected: &str, found: String| FileError::ConfigValue {
            path: path.to_path_buf(),
            key,
            expected: expected.to_string(),
            found,
        };
        let model = &json["model"];
        if model.get("type").and_then(Value::as_str).is_some_and(|kind| kind != "BPE") {
            return Err(wrong("model.type", "\"BPE\"", model["type"].to_string()));
        }
        let none = || (String::new(), UNUSED);
        let mut tokens: Vec<_> = (0..vocabulary).map(|_| none()).collect();
        let mut place = |token: &str, id: Option<u64>, kind: i32| {
            let slot = id.and_then(|id| tokens.get_mut(usize::try_from(id).ok()?));
            let slot = slot.ok_or_else(|| {
                let id = id.map_or("no number".to_string(), |id| id.to_string());
                wrong("model.vocab", &format!("numbers below {vocabulary}"), format!("{id} of {token:?}"))
            })?;
            *slot = (token.to_string(), kind);
            Ok::<_, FileError>(())
        };
        let vocab = model.get("vocab").and_then(Value::as_object);
        let vocab =
            vocab.ok_or_else(|| wrong("model.vocab", "tokens with their numbers", "none".to_string()))?;
        let unknown = model.get("unk_token").and_then(Value::as_str);
        let bytes = model.get("byte_fallback").and_then(Value::as_bool).unwrap_or(false);
        for (token, id) in vocab {
            let kind = match () {
                () if unknown == Some(token.as_str()) => UNKNOWN,
                () if bytes && is_byte(token) => BYTE,
                () => NORMAL,
            };
            place(token, id.as_u64(), kind)?;
        }
        for added in json.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
            let content = added.get("content").and_then(Value::as_str).unwrap_or_default();
            let special = added.get("special").and_then(Value::as_bool).unwrap_or(false);
            let kind = match special {
                _ if unknown == Some(content) => UNKNOWN,
                true => CONTROL,
                false => USER_DEFINED,
            };
            place(content, added.get("id").and_then(Value::as_u64), kind)?;
        }
        let unnamed = tokens.iter_mut().enumerate().filter(|(_, (_, kind))| *kind == UNUSED);
        unnamed.for_each(|(id, (token, _))| *token = format!("[PAD{id}]"));
        let mut merges = Vec::new();
        for merge in model.get("merges").and_then(Value::as_array).into_iter().flatten() {
            let pair = match merge {
                Value::String(pair) => pair.split_once(' ').map(|(a, b)| (a.to_string(), b.to_string())),
                Value::Array(pair) => match &pair[..] {
                    [Value::String(a), Value::String(b)] => Some((a.clone(), b.clone())),
                    _ => None,
                },
                _ => None,
            };
            merges.push(pair.ok_or_else(|| wrong("model.merges", "pairs of tokens", merge.to_string()))?);
        }
        let unknown = unknown.and_then(|token| u32::try_from(vocab.get(token)?.as_u64()?).ok());
        let (tokens, kinds) = tokens.into_iter().unzip();
        Ok(Self { path: path.to_path_buf(), json, tokens, kinds, merges, unknown })
    }

    /// What llama.cpp calls the model, and the way in which texts are cut.
    fn kind(&self) -> Result<(&'static str, &'static str), FileError> {
        let flag = |key| self.json["model"].get(key).and_then(Value::as_bool).unwrap_or(false);
        let pre = &self.json["pre_tokenizer"];
        if flag("byte_fallback") && self.is_sentencepiece() {
            return Ok((SENTENCEPIECE, "default"));
        }
        let steps: Vec<&Value> = match pre.get("pretokenizers").and_then(Value::as_array) {
            Some(steps) => steps.iter().collect(),
            None => vec![pre],
        };
        let kind = |step: &&Value| step.get("type").and_then(Value::as_str).unwrap_or_default().to_string();
        let kinds: Vec<_> = steps.iter().map(kind).collect();
        let is =
            |step: &Value, key: &str| step.get(key).and_then(Value::as_bool).unwrap_or(key == "use_regex");
        let last = *steps.last().unwrap_or(&&Value::Null);
        let (spaced, cuts) = (is(last, "add_prefix_space"), is(last, "use_regex"));
        let name = match kinds.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            _ if spaced => None,
            ["ByteLevel"] if cuts => Some((BYTE_LEVEL_WORDS, false)),
            ["Digits", "ByteLevel"] if cuts && is(steps[0], "individual_digits") => Some((DIGITS, false)),
            ["Split", "ByteLevel"] if !cuts && steps[0]["behavior"] == "Isolated" => {
                let pattern = steps[0]["pattern"]["Regex"].as_str();
                WORDS.iter().find(|(known, ..)| pattern == Some(known)).map(|&(_, name, whole)| (name, whole))
            }
            _ => None,
        };
        let normalizer = self.json["normalizer"].get("type").and_then(Value::as_str);
        let plain = self.json["normalizer"].is_null() || normalizer == Some("NFC");
        match name.filter(|&(_, whole)| plain && whole == flag("ignore_merges") && !flag("byte_fallback")) {
            Some((name, _)) => Ok((BYTE_LEVEL, name)),
            None => {
                let hint = "convert the model to another form, and that with llama.cpp's own converter";
                Err(unsupported(&self.path, format!("a tokenizer that cuts texts by {}", told(pre)), hint))
            }
        }
    }

    /// Whether spaces become parts of tokens as SentencePiece has them.
    fn is_sentencepiece(&self) -> bool {
        let (pre, normalizer) = (&self.json["pre_tokenizer"], &self.json["normalizer"]);
        let metaspace = pre["type"] == "Metaspace" && pre["replacement"] == "▁" && pre["split"] != true;
        let replaces = |step: &Value| {
            step["type"] == "Replace" && step["pattern"]["String"] == " " && step["content"] == "▁"
        };
        let prepends = |step: &Value| step["type"] == "Prepend" && step["prepend"] == "▁";
        let steps = normalizer["normalizers"].as_array().map(Vec::as_slice);
        let replaced = match steps {
            Some([first, second]) => prepends(first) && replaces(second),
            Some([only]) => replaces(only),
            _ => replaces(normalizer),
        };
        (pre.is_null() && replaced) || (metaspace && normalizer.is_null())
    }

    fn begins_with_space(&self) -> bool {
        let pre = &self.json["pre_tokenizer"];
        match pre.is_null() {
            true => self.json["normalizer"].to_string().contains("Prepend"),
            false => pre["prepend_scheme"] != "never",
        }
    }

    /// Scores of tokens: the sooner two become one, the higher. In SentencePiece any two neighbours whose text is a token may.
    fn scores(&self) -> Result<Vec<f32>, FileError> {
        let mut ranks: HashMap<String, usize> = HashMap::new();
        for (rank, (a, b)) in self.merges.iter().enumerate() {
            ranks.entry(format!("{a}{b}")).or_insert(rank);
        }
        let known: BTreeSet<&str> = self.tokens.iter().map(String::as_str).collect();
        let pairs: BTreeSet<(&str, &str)> =
            self.merges.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        for token in
            self.tokens.iter().zip(&self.kinds).filter(|(_, kind)| **kind == NORMAL).map(|(token, _)| token)
        {
            let cuts = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
            let mut both = cuts.filter(|(a, b)| known.contains(a) && known.contains(b));
            if let Some((a, b)) = both.find(|pair| !pairs.contains(pair)) {
                let what = format!(
                    "a tokenizer whose merges lack {a:?} and {b:?}, which SentencePiece would merge,"
                );
                return Err(unsupported(&self.path, what, "another target may hold the model"));
            }
        }
        let score = |token: &String| ranks.get(token).map_or(f32::MIN / 2.0, |&rank| -(rank as f32));
        let scored = |(token, kind): (&String, &i32)| if *kind == NORMAL { score(token) } else { 0.0 };
        Ok(self.tokens.iter().zip(&self.kinds).map(scored).collect())
    }

    /// Whether a text gets a special token before it, and one behind it.
    fn around(&self) -> [bool; 2] {
        let post = &self.json["post_processor"];
        let steps = post
            .get("processors")
            .and_then(Value::as_array)
            .map_or(std::slice::from_ref(post), Vec::as_slice);
        let single = steps.iter().find_map(|step| step.get("single")?.as_array());
        let special = |step: Option<&Value>| step.is_some_and(|step| step.get("SpecialToken").is_some());
        single.map_or([false; 2], |single| [special(single.first()), special(single.last())])
    }
}

/// `<0x0A>` and its like.
fn is_byte(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// The kinds of steps, and patterns.
fn told(pre: &Value) -> String {
    let kind = |step: &Value| {
        let pattern =
            step["pattern"]["Regex"].as_str().map_or(String::new(), |pattern| format!(" by {pattern:?}"));
        format!("{}{pattern}", step["type"].as_str().unwrap_or("none"))
    };
    match pre.get("pretokenizers").and_then(Value::as_array) {
        Some(steps) => steps.iter().map(kind).collect::<Vec<_>>().join(", "),
        None => kind(pre),
    }
}
