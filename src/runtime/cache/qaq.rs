use half::f16;
use ndarray::ArrayView3;

use super::attended::{Noted, append_each};
use super::{CachePolicy, Kept, LayerCache};
use crate::error::{Error, Result};
use crate::spec::Spec;

/// Keeps all tokens, each key and each value in the bits that what was attended to it is worth, `qaq`: Quality Adaptive Quantization
/// (Dong et al. 2024, arXiv 2403.04643).
///
/// With a_j the largest weight that any of the last `window` queries gave token j, an error of one in its value moves the output by a_j,
/// and one in its score moves the weights by at most `d_j = max(a_j (1 − a_j), a_j · max_{i≠j} a_i)`. So the value of a token gets
/// `⌈log₂(a_j / value_error)⌉` bits and its key `⌈log₂(d_j / key_error)⌉`, within `least` and 8. The last `window` tokens, which few
/// queries have seen, have 16. Of each row the share `outliers` of its numbers, those farthest from its mean, stay apart in 16 bits.
///
/// What was rounded stays rounded: bits only fall. Departures: the last queries are those of this and the last full run of `window` (`window` to
/// twice that), for which two numbers are held in place of one for each query; steps are uniform for each token and head between its
/// least and largest number, the finer of the paper's forms; outliers are sought in each row and not in the whole cache. The formulas are those
/// of the authors' published program.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Qaq {
    key_error: f64,
    value_error: f64,
    window: usize,
    least: u8,
    outliers: f64,
}

/// Bits at the most, of tokens that were attended to.
const MOST: f64 = 8.0;

impl Default for Qaq {
    fn default() -> Self {
        Self { key_error: 0.002, value_error: 0.01, window: 32, least: 3, outliers: 0.0 }
    }
}

impl Qaq {
    /// With these errors for keys and values.
    pub fn new(key_error: f64, value_error: f64) -> Self {
        Self { key_error, value_error, ..Self::default() }
    }

    /// The policy that a spec describes: `key_error` (0.002 unless said) and `value_error` (0.01), above 0; `window` (32), 1 at least; `least` (3
    /// bits), 1 to 8; `outliers` (0), a share below 1.
    ///
    /// # Errors
    /// [`Error::Setting`], [`Error::UnknownSetting`].
    pub fn from_spec(spec: &Spec) -> Result<Self> {
        spec.only(&["key_error", "value_error", "window", "least", "outliers"])?;
        let unless = Self::default();
        let error = |name, unless| match spec.number(name)?.unwrap_or(unless) {
            error if error > 0.0 => Ok(error),
            error => Err(Error::setting(name, error, "above 0")),
        };
        let (key_error, value_error) =
            (error("key_error", unless.key_error)?, error("value_error", unless.value_error)?);
        let window = spec.count("window")?.unwrap_or(unless.window);
        if window == 0 {
            return Err(Error::setting("window", window, "at least 1 query"));
        }
        let least = spec.count("least")?.unwrap_or(unless.least.into());
        if !(1..=8).contains(&least) {
            return Err(Error::setting("least", least, "1 to 8 bits"));
        }
        let outliers = spec.number("outliers")?.unwrap_or(unless.outliers);
        if !(0.0..1.0).contains(&outliers) {
            return Err(Error::setting("outliers", outliers, "a share, from 0 to below 1"));
        }
        Ok(Self { key_error, value_error, window, least: least as u8, outliers })
    }

    /// Bits for what moves something by `effect` where `error` is allowed.
    fn bits(&self, effect: f32, error: f64) -> u8 {
        (f64::from(effect) / error).log2().ceil().clamp(self.least.into(), MOST) as u8
    }
}

impl CachePolicy for Qaq {
    fn spec(&self) -> Spec {
        let spec = Spec::new("qaq").with("key_error", self.key_error).with("value_error", self.value_error);
        let spec = spec.with("window", self.window).with("least", usize::from(self.least));
        spec.with("outliers", self.outliers)
    }

    fn layer(&self, _layer: usize, kv_heads: usize, head_dim: usize) -> Result<Box<dyn LayerCache>> {
        let outliers = (self.outliers * head_dim as f64).round() as usize;
        let heads = vec![Noted::new(head_dim); kv_heads];
        Ok(Box::new(Weighed { policy: *self, outliers, heads, step: 0, queries: 0 }))
    }
}

/// The largest weights in the run of queries before this one, and in this one.
type Largest = [f16; 2];

/// All tokens, with what the last queries thought of them.
#[derive(Debug)]
struct Weighed {
    policy: Qaq,
    /// Of each row.
    outliers: usize,
    heads: Vec<Noted<Largest>>,
    /// Tokens of this step.
    step: usize,
    /// Queries in this run.
    queries: usize,
}

impl LayerCache for Weighed {
    fn append(&mut self, keys: ArrayView3<'_, f32>, values: ArrayView3<'_, f32>, positions: &[usize]) {
        append_each(&mut self.heads, keys, values, positions, |_| [f16::ZERO; 2]);
        self.step = positions.len();
    }

    fn read(&self, head: usize) -> Kept {
        self.heads[head].read()
    }

    fn wants_weights(&self) -> bool {
        true
    }

    fn attended(&mut self, head: usize, weights: ArrayView3<'_, f32>) {
        let mut largest = vec![0.0f32; weights.dim().2];
        for weights in weights.rows() {
            largest.iter_mut().zip(weights).for_each(|(most, &weight)| *most = weight.max(*most));
        }
        for (note, largest) in self.heads[head].notes.iter_mut().zip(largest) {
            note[1] = f16::from_f32(largest).max(note[1]);
        }
    }

    fn settle(&mut self) {
        let (policy, outliers) = (self.policy, self.outliers);
        self.queries += self.step;
        let ends = self.queries >= policy.window;
        for head in &mut self.heads {
            head.rows.settle(16);
            let older = head.notes.len().saturating_sub(policy.window);
            let largest: Vec<f32> = head.notes.iter().map(|[a, b]| a.max(*b).to_f32()).collect();
            let mut most = [0.0f32; 2];
            for &a in &largest {
                most = if a > most[0] { [a, most[0]] } else { [most[0], a.max(most[1])] };
            }
            for (i, &a) in largest.iter().enumerate().take(older) {
                let other = if a == most[0] { most[1] } else { most[0] };
                let effect = (a * (1.0 - a)).max(a * other);
                let bits = [policy.bits(effect, policy.key_error), policy.bits(a, policy.value_error)];
                head.rows.lower(i, bits, outliers);
            }
            if ends {
                head.notes.iter_mut().for_each(|note| *note = [note[1], f16::ZERO]);
            }
        }
        self.queries = if ends { 0 } else { self.queries };
    }

    fn bytes(&self) -> usize {
        self.heads.iter().map(Noted::bytes).sum()
    }
}
