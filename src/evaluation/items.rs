use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use rand::Rng;

use crate::error::Error;
use crate::run::Run;
use crate::text::{RuntimeError, Vocabulary, Windows};

/// Tokens that ask for a needle: its first ones.
const CUE: usize = 8;
/// Tokens of a needle that are asked for.
const ANSWER: usize = 8;
/// Of a cue, its last tokens that another needle has, too, where there is one.
const COMMON: usize = 4;
/// Tokens at the least between a name and when it was said before.
const GAP: usize = 64;

/// A text of which some tokens can be told from what was said long before.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Item {
    /// The text.
    pub tokens: Vec<u32>,
    /// The places of these tokens, ascending.
    pub answers: Vec<usize>,
    /// Where each was said before.
    pub before: Vec<usize>,
}

/// Items of one length, built from a text: what a cache has to keep to know them is long past.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Items {
    pub(super) all: Vec<Item>,
    pub(super) length: usize,
}

impl Items {
    /// `n` needles in the text: each window loses its end for a passage of another window, which is put in at a place drawn by
    /// `run`, and begun again at the end; the rest of it is asked for. With `twins` a second passage is put in somewhere that ends its cue with the
    /// same tokens and goes on otherwise, so that more than the last few words have to be looked at.
    ///
    /// # Errors
    /// [`Error::Setting`] for less than two windows, or windows of less than 96 tokens.
    pub fn needles(windows: &Windows, n: usize, twins: bool, run: Run<'_>) -> Result<Self, RuntimeError> {
        let (length, count) = (windows.length(), windows.count());
        if count < 2 || length < 96 {
            let found = format!("{count} of {length} tokens");
            return Err(Error::setting(
                "the number of windows",
                found,
                "at least 2, of at least 96 tokens each",
            )
            .into());
        }
        let window = |i: usize| &windows.tokens()[i % count * length..][..length];
        let item = |i: usize| {
            let mut rng = run.fork(i as u64).rng();
            let at = i * count / n.max(1);
            let mut passage = |of: usize| {
                let from = rng.random_range(0..length - CUE - ANSWER);
                window(of)[from..from + CUE + ANSWER].to_vec()
            };
            let needle = passage(at + 1 + count / 3);
            let twin = twins.then(|| {
                let mut twin = passage(at + 1 + count / 2);
                twin[CUE - COMMON..CUE].copy_from_slice(&needle[CUE - COMMON..CUE]);
                twin
            });
            let passages: Vec<&Vec<u32>> = [Some(&needle), twin.as_ref()].into_iter().flatten().collect();
            let hay = length - (passages.len() + 1) * needle.len();
            // Far enough from the end to be long past, and the twin anywhere else.
            let mut places: Vec<(usize, usize)> =
                (0..passages.len()).map(|which| (rng.random_range(0..=hay - hay / 8), which)).collect();
            places.sort_unstable();
            let (mut tokens, mut from, mut said) = (Vec::with_capacity(length), 0, 0);
            for (place, which) in places {
                tokens.extend_from_slice(&window(at)[from..place]);
                from = place;
                if which == 0 {
                    said = tokens.len() + CUE;
                }
                tokens.extend_from_slice(passages[which]);
            }
            tokens.extend_from_slice(&window(at)[from..hay]);
            tokens.extend_from_slice(&needle);
            Item {
                answers: (length - ANSWER..length).collect(),
                before: (said..said + ANSWER).collect(),
                tokens,
            }
        };
        Ok(Self { all: (0..n).map(item).collect(), length })
    }

    /// The windows of a text with the names in them that were said at least 64 tokens before in the same window: words of
    /// one token or the first tokens of words that are written large, and stand behind a small letter more often than not.
    /// Windows without any are left out.
    ///
    /// # Errors
    /// What the vocabulary reports.
    pub fn names(windows: &Windows, words: &Vocabulary) -> Result<Self, RuntimeError> {
        let (large, small) = (words.capitalised()?, words.ending_small()?);
        let mut seen: BTreeMap<u32, [usize; 2]> = BTreeMap::new();
        for pair in windows.tokens().windows(2).filter(|pair| large.contains(&pair[1])) {
            let counts = seen.entry(pair[1]).or_default();
            counts[usize::from(small.contains(&pair[0]))] += 1;
        }
        let names: BTreeSet<u32> =
            seen.into_iter().filter(|(_, [others, inside])| inside > others).map(|(id, _)| id).collect();
        let item = |tokens: &[u32]| {
            let mut last: BTreeMap<u32, usize> = BTreeMap::new();
            let (mut answers, mut before) = (Vec::new(), Vec::new());
            for (place, id) in tokens.iter().enumerate().filter(|(_, id)| names.contains(id)) {
                if let Some(said) = last.insert(*id, place).filter(|said| place - said >= GAP) {
                    answers.push(place);
                    before.push(said);
                }
            }
            (!answers.is_empty()).then(|| Item { tokens: tokens.to_vec(), answers, before })
        };
        let length = windows.length();
        Ok(Self { all: windows.tokens().chunks_exact(length).filter_map(item).collect(), length })
    }

    /// The items.
    pub fn all(&self) -> &[Item] {
        &self.all
    }

    /// Tokens of each.
    pub fn length(&self) -> usize {
        self.length
    }
}

impl Item {
    /// The stretch of the text in which the answers were said before.
    pub(super) fn span(&self) -> Range<usize> {
        self.before
            .iter()
            .min()
            .map_or(0..0, |&from| from..self.before.iter().max().map_or(from, |to| to + 1))
    }
}
