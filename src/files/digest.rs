use sha2::digest::Output;
use sha2::{Digest, Sha256};

/// SHA-256 over the fields, each with its length before it, so that no two lists of fields read the same.
pub(crate) fn sha256<F: AsRef<[u8]>>(fields: impl IntoIterator<Item = F>) -> [u8; 32] {
    let mut hash = Sha256::new();
    for field in fields {
        hash.update((field.as_ref().len() as u64).to_le_bytes());
        hash.update(field);
    }
    hash.finalize().into()
}

/// A digest as fingerprints are written: `sha256:` and 64 hex digits.
pub(crate) fn fingerprint(digest: [u8; 32]) -> String {
    format!("sha256:{:x}", Output::<Sha256>::from(digest))
}
