use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::last;
use super::scores::{Read, scores};
use crate::error::Result;
use crate::run::Run;
use crate::runtime::Model;
use crate::text::{RuntimeError, Vocabulary, read_text};

/// A multiple choice item: how a text goes on.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct Choice {
    /// What comes before.
    pub query: String,
    /// What may follow, leading space included.
    pub choices: Vec<String>,
    /// The right one, counted from 0.
    pub gold: usize,
}

/// A file of items, one JSON object `{"query", "choices", "gold"}` a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choices {
    items: Vec<Choice>,
    /// Where each of them stands.
    lines: Vec<usize>,
    path: PathBuf,
}

/// Share of items answered rightly.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Accuracy {
    /// Right answers over items.
    pub accuracy: f64,
    /// Its standard error, √(p(1−p)/(n−1)); 0 for one item.
    pub standard_error: f64,
    /// Items.
    pub items: u64,
}

/// What an item looks like.
const EXAMPLE: &str = r#"{"query": "It was", "choices": [" late", " early"], "gold": 0}"#;

impl Choices {
    /// Reads a file; empty lines are passed over, further keys too.
    ///
    /// # Errors
    /// [`FileError::Io`](crate::files::FileError::Io), [`RuntimeError::NotUtf8`]; [`RuntimeError::Choice`] naming the line that is not such an
    /// object, has fewer than two choices, an empty query or choice, or no gold among its choices.
    pub fn read(path: &Path) -> Result<Self, RuntimeError> {
        let text = read_text(path)?;
        let (mut items, mut lines) = (Vec::new(), Vec::new());
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let broken = |rule: String| RuntimeError::Choice { path: path.to_path_buf(), line: i + 1, rule };
            let item = serde_json::from_str(line);
            let item: Choice = item.map_err(|e| broken(format!("{e}; each line is one item, {EXAMPLE}")))?;
            if item.choices.len() < 2 {
                return Err(broken(format!("{} choices; at least 2 are needed", item.choices.len())));
            }
            if item.query.is_empty() || item.choices.iter().any(String::is_empty) {
                return Err(broken("the query or a choice is empty".to_string()));
            }
            if item.gold >= item.choices.len() {
                let (gold, n) = (item.gold, item.choices.len());
                return Err(broken(format!("gold is {gold}, but the {n} choices count from 0")));
            }
            items.push(item);
            lines.push(i + 1);
        }
        if items.is_empty() {
            let (path, line) = (path.to_path_buf(), 1);
            return Err(RuntimeError::Choice { path, line, rule: "there are no items".to_string() });
        }
        Ok(Self { items, lines, path: path.to_path_buf() })
    }

    /// The items.
    pub fn items(&self) -> &[Choice] {
        &self.items
    }

    /// Answers every item with the choice of the highest log-likelihood per character, the space before it not counted (the
    /// `acc_norm` of EleutherAI's evaluation harness), the first of equals. Query and choice are tokenised as one text; the
    /// tokens of a choice are those that the query alone does not begin with. Where both are longer than the model's
    /// positions, the beginning is dropped. Progress is stage `"choices"`.
    ///
    /// # Errors
    /// What the tokenizer reports; [`RuntimeError::Choice`] naming the line of an item with a choice of which no token can be scored; [`RuntimeError::NotFinite`]; [`Error::Cancelled`](crate::error::Error::Cancelled).
    pub fn score(&self, model: &Model, words: &Vocabulary, run: Run<'_>) -> Result<Accuracy, RuntimeError> {
        let total = self.items.len() as u64;
        let mut right = 0;
        for (i, item) in self.items.iter().enumerate() {
            run.step("choices", i as u64, total)?;
            let query = words.encode_open(&item.query)?;
            let mut best = (f64::NEG_INFINITY, 0);
            for (choice, text) in item.choices.iter().enumerate() {
                let score = log_likelihood(model, words, &query, &item.query, text)?.ok_or_else(|| {
                    let rule =
                        format!("no token of the choice {text:?} can be scored: none stands before it");
                    RuntimeError::Choice { path: self.path.clone(), line: self.lines[i], rule }
                })?;
                let length = text.strip_prefix(' ').unwrap_or(text).chars().count();
                let score = score / length.max(1) as f64;
                if score > best.0 {
                    best = (score, choice);
                }
            }
            right += u64::from(best.1 == item.gold);
        }
        run.step("choices", total, total)?;
        let n = total as f64;
        let accuracy = right as f64 / n;
        let standard_error = (accuracy * (1.0 - accuracy) / (n - 1.0).max(1.0)).sqrt();
        Ok(Accuracy { accuracy, standard_error, items: total })
    }
}

/// `ln p(choice | query)`; `None` where the choice has no token that follows another.
fn log_likelihood(
    model: &Model,
    words: &Vocabulary,
    query: &[u32],
    query_text: &str,
    choice: &str,
) -> Result<Option<f64>, RuntimeError> {
    let mut tokens = words.encode_open(&format!("{query_text}{choice}"))?;
    let start = query.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
    if start == 0 || start == tokens.len() {
        return Ok(None);
    }
    let dropped = tokens.len().saturating_sub(model.positions());
    tokens.drain(..dropped);
    let start = start.saturating_sub(dropped).max(1);
    let mut sum = 0.0;
    let last = last(model, model.rows(&tokens, 1)?)?;
    for scores in scores(&mut [Read::new(model, &last)], &tokens, tokens.len())? {
        sum -= scores[start - 1..].iter().map(|score| score.loss).sum::<f64>();
    }
    if !sum.is_finite() {
        return Err(RuntimeError::NotFinite { what: "the likelihood of a choice".to_string() });
    }
    Ok(Some(sum))
}
