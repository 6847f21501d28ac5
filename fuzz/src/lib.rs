//! Targets of cargo-fuzz. What they do is in `targets.rs`, which `tests/fuzz.rs` of the crate runs, too.

#[path = "../../tests/made/mod.rs"]
mod made;
#[path = "../../tests/models/mod.rs"]
mod models;
pub mod mutate;
pub mod seeds;
pub mod targets;

pub use libfuzzer_sys;

/// More memory than any of these inputs backs: what asks for it ends the process.
#[global_allocator]
static MEMORY: cap::Cap<std::alloc::System> = cap::Cap::new(std::alloc::System, 512 << 20);

/// A target by its name in `targets`: mutations are those of `mutate`, and libFuzzer's own.
#[macro_export]
macro_rules! target {
    ($name:ident) => {
        $crate::libfuzzer_sys::fuzz_target!(|data: &[u8]| $crate::targets::$name(data));
        $crate::libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
            if seed % 3 == 0 {
                return $crate::libfuzzer_sys::fuzzer_mutate(data, size, max_size);
            }
            $crate::mutate::in_place(data, size, max_size, u64::from(seed))
        });
    };
}
