use sha2::{Digest, Sha256};

/// Bytes taken at the start, in the middle and at the end of a tensor.
const SAMPLE: usize = 4096;

/// `sha256:` and the hex digest over (name, shape, type, bytes) of the tensors; of the bytes, three samples.
/// Everything is preceded by its length, so that no two lists of tensors read the same.
pub(super) fn of<'a>(
    tensors: impl Iterator<Item = (String, &'a [usize], safetensors::Dtype, &'a [u8])>,
) -> String {
    let mut hash = Sha256::new();
    for (name, shape, dtype, bytes) in tensors {
        let mut field = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        field(name.as_bytes());
        field(format!("{dtype} {shape:?}").as_bytes());
        let sample = SAMPLE.min(bytes.len());
        let middle = (bytes.len() - sample) / 2;
        for start in [0, middle, bytes.len() - sample] {
            field(&bytes[start..start + sample]);
        }
    }
    let digest: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{digest}")
}
