//! Going downhill: what a gradient does to weights, how fast, and in which order a text is read.

mod rule;

use std::f64::consts::PI;

use rand::seq::SliceRandom;

use crate::run::Run;

pub use rule::Descent;
pub(crate) use rule::Memory;

/// How a rate falls to 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fall {
    /// Along a line.
    Line,
    /// Along half a cosine.
    Cosine,
}

/// The share of the highest rate at a step: rises over the first `warm_up` steps, or a tenth of all where these are fewer, and
/// falls to 0.
pub(crate) fn share(step: u64, total: Option<u64>, warm_up: u64, fall: Fall) -> f64 {
    let rise = warm_up.min(total.map_or(warm_up, |total| total.div_ceil(10))).max(1);
    let rising = ((step + 1) as f64 / rise as f64).min(1.0);
    let gone = total.map_or(0.0, |total| step as f64 / total as f64);
    rising
        * match fall {
            Fall::Line => 1.0 - gone,
            Fall::Cosine => 0.5 * (1.0 + (PI * gone).cos()),
        }
}

/// The order in which windows are read: all of them, then all of them again in another order.
#[derive(Debug)]
pub(crate) struct Order<'r> {
    run: Run<'r>,
    windows: usize,
    round: Option<(u64, Vec<usize>)>,
}

impl<'r> Order<'r> {
    /// Of so many windows, as the run's seed says.
    pub(crate) fn new(windows: usize, run: Run<'r>) -> Self {
        Self { run, windows, round: None }
    }

    /// The windows of step number `step` of `batch` windows.
    pub(crate) fn batch(&mut self, step: u64, batch: usize) -> Vec<usize> {
        let first = step * batch as u64;
        (first..first + batch as u64).map(|n| self.window(n)).collect()
    }

    /// Window number `n` of all that are read.
    fn window(&mut self, n: u64) -> usize {
        let (round, place) = (n / self.windows as u64, (n % self.windows as u64) as usize);
        if self.round.as_ref().is_none_or(|&(of, _)| of != round) {
            let mut order: Vec<usize> = (0..self.windows).collect();
            order.shuffle(&mut self.run.fork(round).rng());
            self.round = Some((round, order));
        }
        self.round.as_ref().map_or(place, |(_, order)| order[place])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_window_is_read_once_a_round() {
        let mut order = Order::new(7, Run::new(3));
        let mut read: Vec<usize> = (0..7).flat_map(|step| order.batch(step, 3)).collect();
        assert_ne!(read[..7], read[7..14]);
        // A step alone is what it is among others.
        assert_eq!(Order::new(7, Run::new(3)).batch(4, 3), read[12..15]);
        for round in read.chunks_mut(7) {
            round.sort_unstable();
            assert!(round.iter().copied().eq(0..7));
        }
    }

    #[test]
    fn rates_rise_and_fall_to_nothing() {
        for (fall, last) in [(Fall::Line, 0.011), (Fall::Cosine, 1e-3)] {
            let shares: Vec<f64> = (0..100).map(|step| share(step, Some(100), 10, fall)).collect();
            assert!(shares[..10].is_sorted() && shares[10..].iter().rev().is_sorted());
            assert!(shares[9] > 0.9 && shares[99] < last && shares.iter().all(|&s| s > 0.0));
            assert_eq!(share(0, Some(3), 20, fall), 1.0, "no time to warm up");
        }
    }
}
