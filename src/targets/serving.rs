//! What keeps runtimes from being fast with some numbers of heads.

use super::runtimes::Runtime;
use crate::output::Target;

/// Query heads to a KV head that FlashInfer's attention kernels are built for; others raise in parts of it
/// (flashinfer-ai/flashinfer issues 996, 2986, 3563).
const RATIOS: [usize; 5] = [1, 2, 3, 4, 8];
/// Devices over which KV heads are dealt out.
const DEVICES: [usize; 3] = [2, 4, 8];

/// What to know before a model written in this form, with these query heads and KV heads of each layer, is served on GPUs: what the
/// runtimes that load it do; nothing where there is nothing.
///
/// - vLLM's kernels are built for some ratios of query heads to KV heads only.
/// - Tensor parallelism, of vLLM and transformers, deals KV heads out over devices; where their number is neither a multiple nor a divisor of
///   the devices', they refuse.
/// - Pages of vLLM's cache must divide one another where layers differ (vllm-project/vllm issue 40388).
///
/// ```
/// use qcqa::targets::{Deci, RemoteCode, serving_notes};
///
/// assert!(serving_notes(&Deci, &[[32, 8], [32, 8]]).is_empty());
/// let heads = [[9, 3], [10, 2]];
/// let notes = serving_notes(&Deci, &heads);
/// assert!(notes[0].contains("5 query heads to a KV head"));
/// assert!(notes[1].contains("3 KV heads"));
/// assert!(notes[2].contains("pages"));
/// // transformers takes any ratio, and has no pages.
/// assert_eq!(serving_notes(&RemoteCode, &heads), notes[1..2]);
/// ```
///
/// # Panics
/// When a layer has no KV heads.
pub fn serving_notes(target: &dyn Target, heads: &[[usize; 2]]) -> Vec<String> {
    let loads = |name: &str| Runtime::by_name(name).is_some_and(|runtime| runtime.loads(target));
    let in_vllm = loads("vllm");
    let sorted = |mut all: Vec<usize>| {
        all.sort_unstable();
        all.dedup();
        all
    };
    let listed = |all: &[usize]| all.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    let mut notes = Vec::new();
    let ratios = sorted(heads.iter().map(|[queries, kv]| queries / kv).collect());
    let unbuilt: Vec<_> = ratios.into_iter().filter(|ratio| !RATIOS.contains(ratio)).collect();
    if in_vllm && !unbuilt.is_empty() {
        notes.push(format!(
            "{} query heads to a KV head: FlashInfer has kernels for {}",
            listed(&unbuilt),
            listed(&RATIOS)
        ));
    }
    let ks = sorted(heads.iter().map(|&[_, kv]| kv).collect());
    let splits = |k: usize, devices: usize| k % devices == 0 || devices % k == 0;
    let unsplit: Vec<_> = ks.iter().copied().filter(|&k| DEVICES.iter().any(|&n| !splits(k, n))).collect();
    if (in_vllm || loads("transformers")) && !unsplit.is_empty() {
        notes.push(format!(
            "{} KV heads in a layer: not to be dealt out evenly over {} devices (tensor parallelism)",
            listed(&unsplit),
            listed(&DEVICES)
        ));
    }
    if in_vllm && ks.windows(2).any(|pair| pair[1] % pair[0] != 0) {
        notes.push(format!(
            "layers cache {} heads: pages of such sizes do not divide one another (vLLM)",
            listed(&ks)
        ));
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::targets::{Deci, Expanded, Gguf, Padded, RemoteCode, Stock};

    #[test]
    fn every_kind_alone() {
        assert_eq!(serving_notes(&Stock, &[[12, 4]; 3]), Vec::<String>::new());
        assert_eq!(
            serving_notes(&Padded, &[[20, 4], [28, 4]]),
            ["5, 7 query heads to a KV head: FlashInfer has kernels for 1, 2, 3, 4, 8"]
        );
        assert_eq!(
            serving_notes(&Stock, &[[12, 6]; 2]),
            ["6 KV heads in a layer: not to be dealt out evenly over 2, 4, 8 devices (tensor parallelism)"]
        );
        // One head is on every device.
        assert!(serving_notes(&Deci, &[[4, 1], [4, 2], [4, 4]]).is_empty());
        assert_eq!(
            serving_notes(&Deci, &[[8, 2], [9, 3]]).last().unwrap(),
            "layers cache 2, 3 heads: pages of such sizes do not divide one another (vLLM)"
        );
    }

    /// Of llama.cpp and for evaluation nothing is to be said, of transformers what it deals out.
    #[test]
    fn of_the_runtimes_that_load_it() {
        let heads = [[8, 2], [15, 3]];
        assert_eq!(serving_notes(&Deci, &heads).len(), 3);
        let ofs: [&dyn Target; 2] = [&Gguf { dtype: None }, &Expanded];
        assert!(ofs.iter().all(|target| serving_notes(*target, &heads).is_empty()));
        let [note] = &serving_notes(&RemoteCode, &heads)[..] else { panic!("one note") };
        assert!(note.starts_with("3 KV heads"), "{note}");
        assert!(!Runtime::by_name("candle").unwrap().loads(&Deci));
    }
}
