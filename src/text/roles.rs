//! Calibration texts in their roles: windows that fit, and windows that fit nothing and choose.

use std::collections::BTreeSet;

use super::{RuntimeError, Windows};
use crate::error::Error;
use crate::files::{fingerprint, sha256};
use crate::model::ModelId;

/// Of so many windows one is for validation.
const VALIDATION_SHARE: usize = 8;
/// Windows of a text that are for validation at the least, as far as half of it goes.
const LEAST_VALIDATION: usize = 8;

/// Tokens by which a passage is known again.
const PASSAGE: usize = 32;

/// A whole text in windows, and its share of those that a calibration reads.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct WholeText {
    /// What reports call it.
    pub name: String,
    /// All of its windows.
    pub windows: Windows,
    /// Its share, beside those of the other texts.
    pub share: usize,
}

impl WholeText {
    /// A text with one share.
    pub fn new(name: impl Into<String>, windows: Windows) -> Self {
        Self { name: name.into(), windows, share: 1 }
    }

    /// With so many shares.
    pub fn with_share(self, share: usize) -> Self {
        Self { share, ..self }
    }
}

/// What a calibration reads of one text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    name: String,
    read: usize,
    fit: Windows,
    validation: Option<Windows>,
}

impl Text {
    /// What reports call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Windows read of it. Those that were there before, in it or in a text before it, have no role.
    pub fn read(&self) -> usize {
        self.read
    }

    /// The windows that fit.
    pub fn fit(&self) -> &Windows {
        &self.fit
    }

    /// The windows that fit nothing and choose; `None` of a single window.
    pub fn validation(&self) -> Option<&Windows> {
        self.validation.as_ref()
    }

    /// Windows that differ, in both roles.
    pub fn distinct(&self) -> usize {
        self.fit.count() + self.validation.as_ref().map_or(0, Windows::count)
    }
}

/// What a calibration reads, one text or several: of each, windows that fit, and windows that fit nothing and choose
/// everything that is chosen (validation). A third role is no part of this: evaluation text, which decides nothing.
///
/// Of a text with n distinct windows `n/8` are for validation, at least 8 but never more than `n/2`, each in the middle of one of
/// as many equal stretches. Equal windows count once, over all texts: no window for validation is one that fits.
///
/// ```
/// use qcqa::text::{Texts, WholeText, Windows};
///
/// let [novel, manual] = [0, 4000].map(|from| Windows::new((from..from + 4000).collect(), 10).unwrap());
/// let texts = [WholeText::new("novel", novel), WholeText::new("manual", manual).with_share(3)];
/// let texts = Texts::new(&texts, 128)?;
/// let roles = texts.each().iter().map(|t| (t.fit().count(), t.validation().map(Windows::count)));
/// assert!(roles.eq([(24, Some(8)), (84, Some(12))]));
/// assert_eq!((texts.fit().count(), texts.validation().map(Windows::count)), (108, Some(20)));
/// # Ok::<(), qcqa::text::RuntimeError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Texts {
    texts: Vec<Text>,
    fit: Windows,
    validation: Option<Windows>,
}

impl Texts {
    /// Reads at most `most_windows` windows, divided among the texts by their shares, at least one of each; of every text they
    /// are spaced over the whole of it.
    ///
    /// # Errors
    /// [`Error::Setting`] without texts, for a share of 0, and for windows of different lengths;
    /// [`RuntimeError::TextRepeats`] for a text of one window, again and again, or of windows that other texts have.
    pub fn new(texts: &[WholeText], most_windows: usize) -> Result<Self, RuntimeError> {
        let length = texts.first().map(|text| text.windows.length());
        let length = length.ok_or(Error::setting("the number of texts", 0, "at least 1"))?;
        let mut seen = BTreeSet::new();
        let mut all = Vec::with_capacity(texts.len());
        let counts = shared_out(most_windows, &texts.iter().map(|text| text.share).collect::<Vec<_>>())?;
        for (WholeText { name, windows, .. }, count) in texts.iter().zip(counts) {
            if windows.length() != length {
                return Err(Error::setting("window", windows.length(), "as long in every text").into());
            }
            let windows = windows.spaced(count);
            let read = windows.count();
            let distinct: Vec<&[u32]> =
                windows.batches(1).filter(|window| seen.insert(window.to_vec())).collect();
            let (fit, validation) = roles(&distinct, length);
            all.push(match fit {
                Some(fit) if distinct.len() > 1 || read == 1 => {
                    Text { name: name.clone(), read, fit, validation }
                }
                _ => {
                    let (name, distinct) = (name.clone(), distinct.len());
                    return Err(RuntimeError::TextRepeats { name, read, distinct });
                }
            });
        }
        let together = |of: fn(&Text) -> Option<&Windows>| {
            let windows = all.iter().filter_map(of).flat_map(|windows| windows.batches(1));
            Windows::gathered(windows, length)
        };
        let (fit, validation) = (together(|text| Some(&text.fit)), together(Text::validation));
        let fit = fit.ok_or(Error::setting("the number of texts", 0, "at least 1"))?;
        Ok(Self { texts: all, fit, validation })
    }

    /// As these, but every window fits: for a model that has nothing to choose by.
    pub fn all_fit(&self) -> Self {
        let length = self.fit.length();
        let both = |fit: &Windows, validation: Option<&Windows>| {
            let all = [Some(fit), validation].into_iter().flatten().flat_map(|windows| windows.batches(1));
            Windows::gathered(all, length).unwrap_or_else(|| fit.clone())
        };
        let text =
            |text: &Text| Text { fit: both(&text.fit, text.validation()), validation: None, ..text.clone() };
        Self {
            texts: self.texts.iter().map(text).collect(),
            fit: both(&self.fit, self.validation()),
            validation: None,
        }
    }

    /// What is read of every text, in the order given.
    pub fn each(&self) -> &[Text] {
        &self.texts
    }

    /// The windows that fit, of one text after the other.
    pub fn fit(&self) -> &Windows {
        &self.fit
    }

    /// The windows that fit nothing and choose, of one text after the other; `None` where no text has more than one window.
    pub fn validation(&self) -> Option<&Windows> {
        self.validation.as_ref()
    }

    /// How many of these windows fitted or chose here: figures on them flatter.
    pub fn known(&self, windows: &Windows) -> usize {
        let roles = [Some(&self.fit), self.validation()].into_iter().flatten();
        let own: BTreeSet<&[u32]> = roles.flat_map(|windows| windows.batches(1)).collect();
        windows.batches(1).filter(|window| own.contains(window)).count()
    }

    /// Of windows of any length those that share no 32 tokens in a row with windows that fit; `None` where there are none.
    pub fn apart(&self, windows: &Windows) -> Option<Windows> {
        let length = PASSAGE.min(windows.length()).min(self.fit.length());
        let fitted: BTreeSet<&[u32]> =
            self.fit.batches(1).flat_map(|window| window.windows(length)).collect();
        let is_apart = |window: &&[u32]| !window.windows(length).any(|passage| fitted.contains(passage));
        Windows::gathered(windows.batches(1).filter(is_apart), windows.length())
    }

    /// What plans call a calibration of `model` on these texts: SHA-256 over the fingerprint of the model, the length of a
    /// window, and of every text the token ids that fit and those that choose (docs/calibration.md).
    pub fn fingerprint(&self, model: &ModelId) -> String {
        fingerprint(self.digest(model))
    }

    pub(crate) fn digest(&self, model: &ModelId) -> [u8; 32] {
        let ids = |windows: Option<&Windows>| -> Vec<u8> {
            windows.into_iter().flat_map(Windows::tokens).flat_map(|id| id.to_le_bytes()).collect()
        };
        let head = [
            model.fingerprint.clone().unwrap_or_default().into_bytes(),
            (self.fit.length() as u64).to_le_bytes().to_vec(),
        ];
        let texts = self.texts.iter().flat_map(|text| [ids(Some(&text.fit)), ids(text.validation())]);
        sha256(head.into_iter().chain(texts))
    }
}

/// The largest share: products of it and any number of windows have room in 128 bits.
const LARGEST_SHARE: usize = 1 << 31;

/// `total` in whole numbers by shares, at least 1 each.
pub(crate) fn shared_out(total: usize, shares: &[usize]) -> Result<Vec<usize>, Error> {
    if let Some(&share) = shares.iter().find(|share| !(1..=LARGEST_SHARE).contains(share)) {
        return Err(Error::setting("a share of the windows", share, "from 1 to 2147483648"));
    }
    let sum: u128 = shares.iter().map(|&share| share as u128).sum();
    let mut before = 0;
    let mut until = |share: usize| {
        before += share as u128;
        (total as u128 * before / sum.max(1)) as usize
    };
    let ends: Vec<usize> = shares.iter().map(|&share| until(share)).collect();
    let starts = [0].into_iter().chain(ends.iter().copied());
    Ok(ends.iter().zip(starts).map(|(end, start)| (end - start).max(1)).collect())
}

/// Of so many windows of a text, those for validation.
fn for_validation(n: usize) -> usize {
    (n / VALIDATION_SHARE).max(LEAST_VALIDATION).min(n / 2)
}

/// The least number of windows of a text of which `fit` fit.
pub(crate) fn windows_that_fit(fit: usize) -> usize {
    (fit..=2 * fit).find(|n| n - for_validation(*n) >= fit).unwrap_or(2 * fit)
}

/// Windows that fit, and windows that choose.
fn roles(windows: &[&[u32]], length: usize) -> (Option<Windows>, Option<Windows>) {
    let n = windows.len();
    let most = for_validation(n);
    let chosen: BTreeSet<usize> = (0..most).map(|i| (2 * i + 1) * n / (2 * most)).collect();
    let of = |validation: bool| {
        let mine = windows.iter().enumerate().filter(|(i, _)| chosen.contains(i) == validation);
        Windows::gathered(mine.map(|(_, window)| *window), length)
    };
    (of(false), of(true))
}
