//! Cache policies against slow forms of themselves.
#![cfg(feature = "runtime")]

mod models;
mod running;

use std::collections::BTreeMap;
use std::sync::Arc;

use ndarray::{Array2, Array3, ArrayView3, Axis, concatenate, s};
use qcqa::Result;
use qcqa::partition::Partition;
use qcqa::plan::SharedHeads;
use qcqa::runtime::{
    CachePolicy, Corm, FullCache, HeadKv, Kept, KvCache, LayerCache, Model, POLICIES, Probe, Qaq,
    SlidingWindow, Steps,
};
use qcqa::spec::Spec;
use running::{novels, opened, planned, runnable};
use safetensors::Dtype;

/// A model of 6 KV heads, one of whose layers has groups of 4, 1 and 1.
fn grouped() -> Model {
    let (_root, checkpoint) = opened(&runnable("qwen2", Dtype::F32, 6, true));
    let groups = [[0, 1, 0, 0, 2, 0], [0, 1, 2, 3, 4, 5]].map(|l| Partition::from_labels(&l).unwrap());
    let plan = models::plan(&checkpoint, &groups);
    planned(&checkpoint, &SharedHeads::new(&plan, &checkpoint).unwrap())
}

fn tokens(rows: usize, len: usize) -> Array2<u32> {
    Array2::from_shape_fn((rows, len), |(row, i)| ((i * i + 3 * row) % 13) as u32)
}

/// Logits of all tokens, read through a cache in steps of these lengths; and what the cache held at the end.
fn through(
    model: &Model,
    policy: Arc<dyn CachePolicy>,
    tokens: &Array2<u32>,
    steps: &[usize],
) -> (Array3<f32>, usize) {
    let mut cache = KvCache::shared(policy);
    let mut from = 0;
    let parts = steps.iter().map(|len| {
        from += len;
        model.extend(&mut cache, tokens.slice(s![.., from - len..from])).unwrap()
    });
    let parts: Vec<_> = parts.collect();
    let parts: Vec<_> = parts.iter().map(|part| part.view()).collect();
    (concatenate(Axis(1), &parts).unwrap(), cache.bytes())
}

fn made(spec: &str) -> Arc<dyn CachePolicy> {
    POLICIES.make(&spec.parse().unwrap()).unwrap().into()
}

/// Apart by at most this share of the largest number.
#[track_caller]
fn near(a: &Array3<f32>, b: &Array3<f32>, within: f32) {
    let largest = |x: &Array3<f32>| x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let apart = largest(&(a - b)) / largest(b);
    assert!(apart <= within, "{apart} apart");
}

/// `full` is the plain forward pass to 1e-5: groups of unequal sizes, sliding windows, rows of a batch, any steps.
#[test]
fn the_full_cache_is_the_plain_pass() {
    let sliding = runnable("mistral", Dtype::F32, 6, false).set("sliding_window", serde_json::json!(3));
    for model in [grouped(), Model::load(&opened(&sliding).1).unwrap(), Model::load(&novels()).unwrap()] {
        let tokens = tokens(2, 12);
        let whole = model.logits(tokens.view()).unwrap();
        for steps in [&[12][..], &[1; 12], &[5, 1, 6]] {
            let (read, bytes) = through(&model, made("full"), &tokens, steps);
            near(&read, &whole, 1e-5);
            assert_eq!(bytes, 2 * 12 * model.kv_bytes_per_token());
            // What keeps all tokens in 16 bits is near, and half as large.
            let (read, bytes) = through(&model, made("window:recent=12:sinks=0"), &tokens, steps);
            near(&read, &whole, 5e-3);
            assert_eq!(bytes, 12 * model.kv_bytes_per_token());
        }
    }
}

/// A policy of somebody else: keeps everything, and shows a head what a rule says of it; the slow form of all that drop tokens.
#[derive(Debug, Clone)]
struct Shows<R> {
    rule: R,
}

/// Which tokens a step that begins at this position may see, by the weights of all earlier queries, (query, token).
trait Rule: std::fmt::Debug + Send + Sync + Clone + 'static {
    fn shows(&self, seen: &BTreeMap<(usize, usize), f32>, token: usize, from: usize) -> bool;
}

#[derive(Debug)]
struct Shown<R> {
    rule: R,
    keys: Vec<Array2<f32>>,
    values: Vec<Array2<f32>>,
    /// The largest weight of a query over the query heads of each KV head.
    seen: Vec<BTreeMap<(usize, usize), f32>>,
    from: usize,
}

impl<R: Rule> CachePolicy for Shows<R> {
    fn spec(&self) -> Spec {
        Spec::new("shows")
    }

    fn layer(&self, _layer: usize, kv_heads: usize, head_dim: usize) -> Result<Box<dyn LayerCache>> {
        let none = vec![Array2::zeros((0, head_dim)); kv_heads];
        let seen = vec![BTreeMap::new(); kv_heads];
        Ok(Box::new(Shown { rule: self.rule.clone(), keys: none.clone(), values: none, seen, from: 0 }))
    }
}

impl<R: Rule> Shown<R> {
    fn shown(&self, head: usize) -> Vec<usize> {
        let all = 0..self.keys[head].nrows();
        all.filter(|&t| t >= self.from || self.rule.shows(&self.seen[head], t, self.from)).collect()
    }
}

impl<R: Rule> LayerCache for Shown<R> {
    fn append(&mut self, keys: ArrayView3<'_, f32>, values: ArrayView3<'_, f32>, positions: &[usize]) {
        self.from = positions[0];
        for head in 0..self.keys.len() {
            self.keys[head].append(Axis(0), keys.index_axis(Axis(0), head)).unwrap();
            self.values[head].append(Axis(0), values.index_axis(Axis(0), head)).unwrap();
        }
    }

    fn read(&self, head: usize) -> Kept {
        let positions = self.shown(head);
        let [keys, values] = [&self.keys, &self.values].map(|all| all[head].select(Axis(0), &positions));
        Kept { keys, values, positions }
    }

    fn wants_weights(&self) -> bool {
        true
    }

    fn attended(&mut self, head: usize, weights: ArrayView3<'_, f32>) {
        let shown = self.shown(head);
        for ((_, t, i), &weight) in weights.indexed_iter() {
            let most = self.seen[head].entry((self.from + t, shown[i])).or_insert(0.0);
            *most = most.max(weight);
        }
    }

    fn settle(&mut self) {}

    fn bytes(&self) -> usize {
        0
    }
}

#[derive(Debug, Clone)]
struct Ends {
    sinks: usize,
    recent: usize,
}

impl Rule for Ends {
    fn shows(&self, _seen: &BTreeMap<(usize, usize), f32>, token: usize, from: usize) -> bool {
        token < self.sinks || token + self.recent >= from
    }
}

#[test]
fn a_window_is_its_ends() {
    for model in [grouped(), Model::load(&novels()).unwrap()] {
        let tokens = tokens(1, 20);
        for (sinks, recent) in [(0, 1), (2, 5), (1, 30)] {
            for steps in [&[1; 20][..], &[6, 7, 7]] {
                let policy = made(&format!("window:sinks={sinks}:recent={recent}:bits=32"));
                let (found, bytes) = through(&model, policy, &tokens, steps);
                let slow = Shows { rule: Ends { sinks, recent } };
                near(&found, &through(&model, Arc::new(slow), &tokens, steps).0, 1e-5);
                assert_eq!(bytes, (sinks + recent).min(20) * model.kv_bytes_per_token());
            }
        }
    }
}

/// A token stays while one of the last queries found it anything but minor: the bits of all of them.
#[derive(Debug, Clone)]
struct Messages {
    window: usize,
    recent: usize,
    threshold: f64,
}

impl Rule for Messages {
    fn shows(&self, seen: &BTreeMap<(usize, usize), f32>, token: usize, from: usize) -> bool {
        // Dropped at the end of a step is dropped for good.
        (token + 1..=from).all(|next| {
            let asked = next.saturating_sub(self.window).max(token)..next;
            let wanted = |t: usize| {
                t == token
                    || seen.get(&(t, token)).is_some_and(|&a| f64::from(a) >= self.threshold / (t + 1) as f64)
            };
            token + self.recent >= next || asked.into_iter().any(wanted)
        })
    }
}

#[test]
fn corm_keeps_what_recent_queries_want() {
    let mut dropped = false;
    for model in [grouped(), Model::load(&novels()).unwrap()] {
        let tokens = tokens(1, 32);
        for (window, recent, threshold) in [(6, 2, 1.0), (3, 1, 2.5), (32, 4, 1.0)] {
            let policy = made(&format!("corm:window={window}:recent={recent}:threshold={threshold}:bits=32"));
            let (found, bytes) = through(&model, policy, &tokens, &[1; 32]);
            let slow = Shows { rule: Messages { window, recent, threshold } };
            near(&found, &through(&model, Arc::new(slow), &tokens, &[1; 32]).0, 1e-5);
            dropped |= bytes < 32 * model.kv_bytes_per_token();
        }
    }
    assert!(dropped, "the rule was never asked to drop anything");
}

/// Keys and values (k, T, h) that differ from token to token.
fn numbers(k: usize, from: usize, len: usize, h: usize) -> Array3<f32> {
    Array3::from_shape_fn((k, len, h), |(head, t, i)| {
        ((head * 31 + (from + t) * 7 + i * i) % 23) as f32 - 11.0
    })
}

/// Feeds tokens one by one, with the weights of two query heads that `weight` gives them, and reads a head at the end.
fn fed(
    policy: &dyn CachePolicy,
    len: usize,
    weight: impl Fn(usize, usize, usize) -> f32,
) -> (Vec<Kept>, usize) {
    let (k, h) = (2, 16);
    let mut cache = policy.layer(1, k, h).unwrap();
    for t in 0..len {
        let new = numbers(k, t, 1, h);
        cache.append(new.view(), new.view(), &[t]);
        for head in 0..k {
            let positions = cache.read(head).positions;
            let weights = Array3::from_shape_fn((2, 1, positions.len()), |(q, _, i)| {
                weight(2 * head + q, t, positions[i])
            });
            cache.attended(head, weights.view());
        }
        cache.settle();
    }
    ((0..k).map(|head| cache.read(head)).collect(), cache.bytes())
}

/// Budgets are b − b/β and the share of the pool; the tokens are those with the largest weights, or beside them.
#[test]
fn headkv_gives_tokens_by_importance() {
    let importance = vec![vec![0.0, 0.0], vec![0.25, 0.5]];
    let policy = HeadKv::from_spec(&"headkv:tokens=18:recent=8:beta=2".parse().unwrap()).unwrap();
    assert_eq!(policy.probe(), Some(Probe::Retrieval));
    let policy = policy.with_importance(&importance).unwrap();
    assert_eq!(policy.probe(), None);
    // Of 10 tokens each 5 are pooled: 20 for four heads, 20/3 and 40/3 of them for these.
    let (kept, bytes) = fed(policy.as_ref(), 60, |_, _, token| if token == 30 { 0.5 } else { 0.001 });
    assert_eq!(kept.iter().map(|kept| kept.positions.len()).collect::<Vec<_>>(), [8 + 12, 8 + 18]);
    assert_eq!(bytes, (20 + 26) * (2 * 16 * 2 + 4 + 4));
    for kept in kept {
        // What lies before it was dropped before anybody knew.
        assert!((30..=33).chain(52..60).all(|t| kept.positions.contains(&t)), "{:?}", kept.positions);
        assert!(kept.positions.is_sorted());
    }
    // What was measured travels with the policy.
    let again = POLICIES.make(&policy.spec()).unwrap();
    assert_eq!(format!("{again:?}"), format!("{policy:?}"));
    for (spec, says) in [("headkv:importance=1 2;3", "of another model"), ("headkv", "not known")] {
        let error = POLICIES.make(&spec.parse().unwrap()).unwrap().layer(0, 3, 4).unwrap_err().to_string();
        models::says(&error, &["importance", says]);
    }
}

/// Bits are what a token's largest weight is worth, for its key and its value; what is read is within half a step.
#[test]
fn qaq_gives_bits_by_what_they_move() {
    let policy =
        Qaq::from_spec(&"qaq:key_error=0.01:value_error=0.02:window=4:least=1".parse().unwrap()).unwrap();
    let weight = |_: usize, _: usize, token: usize| [0.5, 0.1, 0.03, 0.0][token % 4];
    let (kept, bytes) = fed(&policy, 24, weight);
    // a (1 − a) or a times the largest other one, whichever is more: another has 0.5.
    let bits = |effect: f64, error: f64| (effect / error).log2().ceil().clamp(1.0, 8.0) as usize;
    let half = |a: f64| f64::from(half::f16::from_f64(a));
    let mut expected = 2 * 24 * (4 + 2 * 2);
    for token in 0..24 {
        let a = half(f64::from(weight(0, 0, token)));
        let row = |bits: usize| 4 + (16 * bits).div_ceil(8);
        expected += 2 * match token {
            20.. => 2 * 2 * 16,
            _ => row(bits((a * (1.0 - a)).max(a * half(0.5)), 0.01)) + row(bits(a, 0.02)),
        };
        let (exact, step) = (numbers(2, token, 1, 16), |bits: usize| 22.0 / ((1 << bits) - 1) as f32);
        let coarse = if token < 20 { step(bits(a, 0.02)) / 2.0 + 0.1 } else { 0.01 };
        for (x, y) in exact.slice(s![1, 0, ..]).iter().zip(kept[1].values.row(token)) {
            assert!((x - y).abs() <= coarse, "token {token}: {x} read as {y}");
        }
    }
    assert_eq!(bytes, expected);
}

#[test]
fn hostile_settings_are_named() {
    for (spec, says) in [
        ("window:recent=0", "at least 1"),
        ("full:bits=9", "1 to 8, 16 or 32"),
        ("corm:threshold=-1", "0 or more"),
        ("corm:threshold=inf", "a number"),
        ("headkv:tokens=8", "fewer than the tokens"),
        ("headkv:beta=1", "above 1"),
        ("headkv:importance=1 x", "numbers"),
        ("headkv:importance=-1 2", "from 0 on"),
        ("qaq:least=0", "1 to 8 bits"),
        ("qaq:key_error=0", "above 0"),
        ("qaq:outliers=1", "a share"),
        ("window:recents=3", "no setting \"recents\""),
        ("nothing", "no cache policy \"nothing\""),
    ] {
        let error = POLICIES.make(&spec.parse().unwrap()).unwrap_err().to_string();
        models::says(&error, &[says]);
    }
    // Too much of everything is everything.
    let huge = u64::MAX;
    let model = Model::load(&novels()).unwrap();
    for name in ["window:recent", "window:sinks", "corm:window", "corm:recent", "qaq:window"] {
        let (_, bytes) = through(&model, made(&format!("{name}={huge}")), &tokens(1, 9), &[5, 4]);
        assert!(bytes >= 9 * model.kv_bytes_per_token() / 2, "{name}");
    }
    models::says(&"window:4".parse::<Spec>().unwrap_err().to_string(), &["NAME=VALUE"]);
    models::says(&Steps::new(0, 1).unwrap_err().to_string(), &["at least 1 token"]);
    for name in POLICIES.names() {
        let policy = POLICIES.by_name(name).unwrap();
        assert_eq!(POLICIES.make(&policy.spec()).unwrap().spec(), policy.spec());
        assert_eq!(policy.spec().name(), name);
    }
    let policies: [Arc<dyn CachePolicy>; 4] = [
        Arc::new(FullCache::default()),
        Arc::new(SlidingWindow::default()),
        Arc::new(Corm::new(4, 2)),
        Arc::new(Qaq::default()),
    ];
    assert!(policies.iter().all(|policy| policy.with_importance(&[vec![1.0]]).is_err()));
}
