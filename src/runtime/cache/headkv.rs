use ndarray::{ArrayView3, Axis, s};

use super::attended::{Noted, append_each};
use super::rows::{BITS, bits_of};
use super::{CachePolicy, Kept, LayerCache, Probe};
use crate::error::{Error, Result};
use crate::spec::{Setting, Spec};

/// Gives each head tokens by its importance, `headkv`, or with the importance that reasoning has, `headkv-r2` (Fu et al. 2024, "Not
/// All Heads Matter", arXiv 2410.19258).
///
/// Of `tokens` for each head, `recent` are its last ones; of the b that are left, b/`beta` go into a pool of all heads of the model, which is shared
/// out by importance: head i has `b − b/β + s_i · n·b/β` of n heads, where all importances `s_i` sum to 1. Which tokens a head keeps is decided as in
/// SnapKV (Li et al. 2024, arXiv 2404.14469): those that the last queries attended to most, with neighbours (the largest of 7 around).
///
/// Importance is measured by a [probe](Probe) on calibration text (`evaluation::head_importance`). Departures: the paper drops tokens
/// once, after the prompt, by its last 8 queries; here they are dropped as the text goes on, by an average that forgets at the rate of those
/// 8. Heads are KV heads, with the mean weight of the query heads of a group. The shares and the observation follow the authors'
/// published program and description; the paper's text could not be checked line by line.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadKv {
    probe: Probe,
    tokens: usize,
    recent: usize,
    beta: f64,
    bits: u8,
    importance: Option<Vec<Vec<f64>>>,
}

/// Tokens on which what a token is worth is spread.
const NEIGHBOURS: usize = 7;

impl HeadKv {
    /// So many tokens for a head, on average.
    pub fn new(probe: Probe, tokens: usize) -> Self {
        Self { probe, tokens, recent: 8, beta: 1.2, bits: BITS, importance: None }
    }

    /// The policy that a spec of the name `headkv` or `headkv-r2` describes: `tokens` (256 unless said), `recent` (8), `beta` (1.2, above 1),
    /// `bits` (16; as in [`FullCache`](super::FullCache)), and `importance` where it was measured.
    ///
    /// # Errors
    /// [`Error::Setting`], [`Error::UnknownSetting`].
    pub fn from_spec(spec: &Spec) -> Result<Self> {
        spec.only(&["tokens", "recent", "beta", "bits", "importance"])?;
        let probe = if spec.name() == "headkv" { Probe::Retrieval } else { Probe::Reasoning };
        let unless = Self::new(probe, 256);
        let tokens = spec.count("tokens")?.unwrap_or(unless.tokens);
        let recent = spec.count("recent")?.unwrap_or(unless.recent);
        let beta = spec.number("beta")?.unwrap_or(unless.beta);
        if recent == 0 || recent >= tokens {
            return Err(Error::setting("recent", recent, "at least 1, and fewer than the tokens of a head"));
        }
        if beta <= 1.0 {
            return Err(Error::setting("beta", beta, "above 1"));
        }
        let given = spec.settings().find(|(key, _)| *key == "importance").map(|(_, value)| value);
        let importance = given.map(read_importance).transpose()?;
        let policy = Self { tokens, recent, beta, bits: bits_of(spec, BITS)?, ..unless };
        match importance {
            Some(importance) => policy.knowing(&importance),
            None => Ok(policy),
        }
    }

    /// For heads of this importance.
    fn knowing(self, importance: &[Vec<f64>]) -> Result<Self> {
        if importance.iter().flatten().any(|&s| !(s.is_finite() && s >= 0.0))
            || importance.iter().all(Vec::is_empty)
        {
            return Err(Error::setting(
                "importance",
                "not that",
                "a number from 0 on for every KV head of every layer",
            ));
        }
        Ok(Self { importance: Some(importance.to_vec()), ..self })
    }

    /// Tokens that each head of a layer keeps beside its last ones.
    fn budgets(&self, layer: usize, kv_heads: usize) -> Result<Vec<usize>> {
        let wrong = |found: String, expected| Error::setting("importance", found, expected);
        let all = self.importance.as_ref().ok_or_else(|| {
            wrong("not known".to_string(), "measured on a text first, or part of the policy")
        })?;
        let own = all.get(layer).filter(|own| own.len() == kv_heads).ok_or_else(|| {
            wrong("of another model".to_string(), "one number for every KV head of every layer")
        })?;
        let (n, sum) = (all.iter().map(Vec::len).sum::<usize>() as f64, all.iter().flatten().sum::<f64>());
        let own_part = (self.tokens - self.recent) as f64;
        let pooled = own_part / self.beta;
        let share = |&s: &f64| if sum > 0.0 { s / sum } else { 1.0 / n };
        Ok(own.iter().map(|s| (own_part - pooled + share(s) * n * pooled).round() as usize).collect())
    }
}

/// Importances as a plan or a command line holds them: heads apart by spaces, layers by semicolons.
fn read_importance(setting: &Setting) -> Result<Vec<Vec<f64>>> {
    let wrong =
        || Error::setting("importance", setting, "numbers, heads apart by spaces and layers by semicolons");
    // A single number is no text.
    let text = match setting {
        Setting::Text(text) => text.clone(),
        other => other.to_string(),
    };
    let number = |number: &str| number.parse::<f64>().map_err(|_| wrong());
    text.split(';').map(|layer| layer.split_whitespace().map(number).collect()).collect()
}

impl CachePolicy for HeadKv {
    fn spec(&self) -> Spec {
        let name = if self.probe == Probe::Retrieval { "headkv" } else { "headkv-r2" };
        let spec = Spec::new(name).with("tokens", self.tokens).with("recent", self.recent);
        let spec = spec.with("beta", self.beta).with("bits", usize::from(self.bits));
        let Some(importance) = &self.importance else { return spec };
        let layer = |layer: &Vec<f64>| layer.iter().map(f64::to_string).collect::<Vec<_>>().join(" ");
        spec.with("importance", importance.iter().map(layer).collect::<Vec<_>>().join(";").as_str())
    }

    fn layer(&self, layer: usize, kv_heads: usize, head_dim: usize) -> Result<Box<dyn LayerCache>> {
        let budgets = self.budgets(layer, kv_heads)?;
        let heads = vec![Noted::new(head_dim); kv_heads];
        Ok(Box::new(Important { recent: self.recent, bits: self.bits, budgets, heads }))
    }

    fn probe(&self) -> Option<Probe> {
        self.importance.is_none().then_some(self.probe)
    }

    fn with_importance(&self, importance: &[Vec<f64>]) -> Result<Box<dyn CachePolicy>> {
        Ok(Box::new(self.clone().knowing(importance)?))
    }
}

/// Tokens with the weight that the last queries gave them.
#[derive(Debug)]
struct Important {
    recent: usize,
    bits: u8,
    budgets: Vec<usize>,
    heads: Vec<Noted<f32>>,
}

impl LayerCache for Important {
    fn append(&mut self, keys: ArrayView3<'_, f32>, values: ArrayView3<'_, f32>, positions: &[usize]) {
        append_each(&mut self.heads, keys, values, positions, |_| 0.0);
    }

    fn read(&self, head: usize) -> Kept {
        self.heads[head].read()
    }

    fn wants_weights(&self) -> bool {
        true
    }

    fn attended(&mut self, head: usize, weights: ArrayView3<'_, f32>) {
        let asked = weights.dim().1.min(self.recent);
        let last = weights.slice(s![.., weights.dim().1 - asked.., ..]);
        let Some(mean) = last.mean_axis(Axis(0)).and_then(|of_queries| of_queries.mean_axis(Axis(0))) else {
            return;
        };
        let part = asked as f32 / self.recent as f32;
        for (note, mean) in self.heads[head].notes.iter_mut().zip(mean) {
            *note += part * (mean - *note);
        }
    }

    fn settle(&mut self) {
        for (head, &budget) in self.heads.iter_mut().zip(&self.budgets) {
            head.rows.settle(self.bits);
            let older = head.notes.len().saturating_sub(self.recent);
            if older <= budget {
                continue;
            }
            let around = |i: usize| i.saturating_sub(NEIGHBOURS / 2)..(i + NEIGHBOURS / 2 + 1).min(older);
            let worth: Vec<f32> =
                (0..older).map(|i| head.notes[around(i)].iter().copied().fold(0.0, f32::max)).collect();
            let mut order: Vec<usize> = (0..older).collect();
            order.sort_by(|&a, &b| worth[b].total_cmp(&worth[a]).then(b.cmp(&a)));
            let mut keep = vec![false; older];
            order[..budget].iter().for_each(|&i| keep[i] = true);
            head.retain(|i| keep.get(i).copied().unwrap_or(true));
        }
    }

    fn bytes(&self) -> usize {
        self.heads.iter().map(Noted::bytes).sum()
    }
}
