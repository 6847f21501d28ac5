//! What keeps runtimes from being fast with some numbers of heads.

/// Query heads to a KV head that FlashInfer's attention kernels are built for; others raise in parts of it
/// (flashinfer-ai/flashinfer issues 996, 2986, 3563).
const RATIOS: [usize; 5] = [1, 2, 3, 4, 8];
/// Devices over which KV heads are dealt out.
const DEVICES: [usize; 3] = [2, 4, 8];

/// What to know before a model with these query heads and KV heads of each layer is served on GPUs; nothing where there is nothing.
///
/// - Kernels are built for some ratios of query heads to KV heads only.
/// - Tensor parallelism deals KV heads out over devices; where their number is neither a multiple nor a divisor of the devices', runtimes
///   refuse.
/// - Pages of a cache whose layers differ must divide one another (vllm-project/vllm issue 40388).
///
/// ```
/// use qcqa::targets::serving_notes;
///
/// assert!(serving_notes(&[[32, 8], [32, 8]]).is_empty());
/// let notes = serving_notes(&[[9, 3], [10, 2]]);
/// assert!(notes[0].contains("5 query heads to a KV head"));
/// assert!(notes[1].contains("3 KV heads"));
/// assert!(notes[2].contains("pages"));
/// ```
///
/// # Panics
/// When a layer has no KV heads.
pub fn serving_notes(heads: &[[usize; 2]]) -> Vec<String> {
    let sorted = |mut all: Vec<usize>| {
        all.sort_unstable();
        all.dedup();
        all
    };
    let listed = |all: &[usize]| all.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    let mut notes = Vec::new();
    let ratios = sorted(heads.iter().map(|[queries, kv]| queries / kv).collect());
    let unbuilt: Vec<_> = ratios.into_iter().filter(|ratio| !RATIOS.contains(ratio)).collect();
    if !unbuilt.is_empty() {
        notes.push(format!(
            "{} query heads to a KV head: FlashInfer has kernels for {}",
            listed(&unbuilt),
            listed(&RATIOS)
        ));
    }
    let ks = sorted(heads.iter().map(|&[_, kv]| kv).collect());
    let splits = |k: usize, devices: usize| k % devices == 0 || devices % k == 0;
    let unsplit: Vec<_> = ks.iter().copied().filter(|&k| DEVICES.iter().any(|&n| !splits(k, n))).collect();
    if !unsplit.is_empty() {
        notes.push(format!(
            "{} KV heads in a layer: not to be dealt out evenly over {} devices (tensor parallelism)",
            listed(&unsplit),
            listed(&DEVICES)
        ));
    }
    if ks.windows(2).any(|pair| pair[1] % pair[0] != 0) {
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

    #[test]
    fn every_kind_alone() {
        assert_eq!(serving_notes(&[[12, 4]; 3]), Vec::<String>::new());
        assert_eq!(
            serving_notes(&[[20, 4], [28, 4]]),
            ["5, 7 query heads to a KV head: FlashInfer has kernels for 1, 2, 3, 4, 8"]
        );
        assert_eq!(
            serving_notes(&[[12, 6]; 2]),
            ["6 KV heads in a layer: not to be dealt out evenly over 2, 4, 8 devices (tensor parallelism)"]
        );
        // One head is on every device.
        assert!(serving_notes(&[[4, 1], [4, 2], [4, 4]]).is_empty());
        assert_eq!(
            serving_notes(&[[8, 2], [9, 3]]).last().unwrap(),
            "layers cache 2, 3 heads: pages of such sizes do not divide one another (vLLM)"
        );
    }
}
