//! Files mapped into memory: the only unsafe code of the crate.
#![allow(unsafe_code)]

use std::fs;
use std::ops::{Deref, Range};
use std::path::Path;

use super::{FileError, check_regular};

#[cfg(not(miri))]
type Bytes = memmap2::Mmap;
/// Miri has no mappings of files: what stands on them is interpreted over bytes that were read.
#[cfg(miri)]
type Bytes = Vec<u8>;

/// A regular file, mapped read-only; dereferences to its bytes.
#[derive(Debug)]
pub(crate) struct Mapped(Bytes);

impl Mapped {
    /// Maps the whole file.
    ///
    /// # Safety
    /// Safe to call, on one condition that no program can check: nobody shortens or rewrites the file while it
    /// is mapped. Shortening it would end the process (SIGBUS) at the next access; rewriting it could change
    /// bytes behind a shared reference. Every value read from the mapping is decoded from plain bytes, for
    /// which any bit pattern is valid, and lengths and offsets are copied out before they are checked, so that
    /// a change can spoil numbers but not memory. This crate itself only writes new files and renames them.
    pub(crate) fn open(path: &Path) -> Result<Self, FileError> {
        let failed = |source| FileError::io("read", path, source);
        check_regular(path)?;
        // SAFETY: a read-only mapping of an open regular file; see above for the one condition.
        #[cfg(not(miri))]
        let bytes = unsafe { Bytes::map(&fs::File::open(path).map_err(failed)?) };
        #[cfg(miri)]
        let bytes = fs::read(path);
        bytes.map(Self).map_err(failed)
    }

    /// Gives back the memory of some of its bytes, which are read from the file again when they are asked for: what was read
    /// once would else count as this process's own until the system needs the memory. A hint: where it cannot be taken,
    /// nothing happens.
    pub(crate) fn forget(&self, range: Range<usize>) {
        #[cfg(all(unix, not(miri)))]
        {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the mapping is shared and read-only, so nothing was written that could be lost: its pages are filled from
            // the file again at the next access.
            let _ = unsafe { self.0.unchecked_advise_range(advice, range.start, range.len()) };
        }
        #[cfg(not(all(unix, not(miri))))]
        let _ = range;
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
