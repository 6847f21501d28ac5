use std::path::Path;

use serde::Deserialize;

use super::scores::scores;
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

impl Choices {
    /// Reads a file; empty lines are passed over, further keys too.
    ///
    /// # Errors
    /// [`FileError::Io`](crate::files::FileError::Io), [`RuntimeError::NotUtf8`]; [`RuntimeError::Choice`] naming the line that is not such an
    /// object, has fewer than two choices, an empty query or choice, or no gold among its choices.
    pub fn read(path: &Path) -> Result<Self, RuntimeError> {
        let text = read_text(path)?;
        let mut items = Vec::new();
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let broken = |rule: String| RuntimeError::Choice { path: path.to_path_buf(), line: i + 1, rule };
            let item: Choice = serde_json::from_str(line).map_err(|e| broken(e.to_string()))?;
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
        }
        if items.is_empty() {
            let (path, line) = (path.to_path_buf(), 1);
            return Err(RuntimeError::Choice { path, line, rule: "there are no items".to_string() });
        }
        Ok(Self { items })
    }

    /// The items.
    pub fn items(&self) -> &[Choice] {
        &self.items
    }

    /// Answers every item with the choice of the highest log-likelihood per character (the `acc_norm` of
    /// EleutherAI's evaluation harness), the first of equals. Where query and choice are longer than the model's
    /// positions, the beginning is dropped. Progress is stage `"choices"`.
    ///
    /// # Errors
    /// What the tokenizer reports; [`RuntimeError::NotFinite`]; [`Error::Cancelled`](crate::error::Error::Cancelled).
    pub fn score(&self, model: &Model, words: &Vocabulary, run: Run<'_>) -> Result<Accuracy, RuntimeError> {
        let total = self.items.len() as u64;
        let mut right = 0;
        for (i, item) in self.items.iter().enumerate() {
            run.step("choices", i as u64, total)?;
            let query = words.encode(&item.query)?;
            let mut best = (f64::NEG_INFINITY, 0);
            for (choice, text) in item.choices.iter().enumerate() {
                let score = log_likelihood(model, words, &query, &item.query, text)?;
                let score = score / text.chars().count() as f64;
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

/// `ln p(choice | query)`: query and choice are tokenised as one text, the choice is what follows as many tokens
/// as the query has alone.
fn log_likelihood(
    model: &Model,
    words: &Vocabulary,
    query: &[u32],
    query_text: &str,
    choice: &str,
) -> Result<f64, RuntimeError> {
    let mut tokens = words.encode(&format!("{query_text}{choice}"))?;
    // A choice may merge into the last token of the query: at least one token is always the choice's.
    let start = query.len().min(tokens.len().saturating_sub(1)).max(1);
    let dropped = tokens.len().saturating_sub(model.positions());
    tokens.drain(..dropped);
    let start = start.saturating_sub(dropped).max(1);
    let mut sum = 0.0;
    for last in model.rows(&tokens, 1)? {
        let scores = scores(&model.head(&last)?, None, &tokens, tokens.len())?;
        sum -= scores[start - 1..].iter().map(|score| score.loss).sum::<f64>();
    }
    if !sum.is_finite() {
        return Err(RuntimeError::NotFinite { what: "the likelihood of a choice".to_string() });
    }
    Ok(sum)
}
