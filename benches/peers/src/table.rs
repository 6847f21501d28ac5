//! What is measured of a method, and how it is shown.

use std::fmt;
use std::time::Duration;

use qcqa::FitnessFn;
use qcqa::fitness::WeightSharingError;
use qcqa::front::Front;
use qcqa::partition::Partition;

/// Times of the same work.
#[derive(Debug, Default)]
pub struct Times(Vec<Duration>);

impl Times {
    pub fn add(&mut self, time: Duration) {
        self.0.push(time);
    }
}

/// Median and least, in milliseconds.
impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let (Some(least), Some(median)) = (sorted.first(), sorted.get(sorted.len() / 2)) else {
            return f.write_str("–");
        };
        let shown = |time: &Duration| {
            let ms = time.as_secs_f64() * 1e3;
            let digits = if ms < 1.0 {
                3
            } else if ms < 100.0 {
                2
            } else {
                0
            };
            format!("{ms:.digits$}")
        };
        write!(f, "{}, {}", shown(median), shown(least))
    }
}

/// The quality of a front against the best that is known.
#[derive(Debug, Default, Clone, Copy)]
pub struct Quality {
    /// Mean of `error / best − 1` over the k = 2…H−1 that the front has.
    pub gap: f64,
    /// The largest of them.
    pub worst: f64,
    /// The share of the k = 2…H−1 that the front has.
    pub covered: f64,
    pub hypervolume: f64,
}

impl Quality {
    pub fn of(front: &Front, best: &[f64], layer: &WeightSharingError) -> Self {
        let heads = layer.n_heads();
        let gaps: Vec<f64> =
            (2..heads).filter_map(|k| front.error(k).map(|error| error / best[k] - 1.0)).collect();
        let one_group = Partition::one_group(heads).expect("heads");
        let most = layer.evaluate(&one_group).expect("a partition of this layer");
        Self {
            gap: gaps.iter().sum::<f64>() / gaps.len().max(1) as f64,
            worst: gaps.iter().copied().fold(0.0, f64::max),
            covered: gaps.len() as f64 / (heads - 2) as f64,
            hypervolume: front.hypervolume([1.0 + 1.0 / heads as f64, 1.01 * most]),
        }
    }

    /// Means, but the largest of the worst gaps.
    pub fn mean(all: &[Self]) -> Self {
        let mean = |of: fn(&Self) -> f64| all.iter().map(of).sum::<f64>() / all.len() as f64;
        Self {
            gap: mean(|q| q.gap),
            worst: all.iter().map(|q| q.worst).fold(0.0, f64::max),
            covered: mean(|q| q.covered),
            hypervolume: mean(|q| q.hypervolume),
        }
    }
}
