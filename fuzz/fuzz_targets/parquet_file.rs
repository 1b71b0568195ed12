//! See docs/fuzzing.md.
#![no_main]

libfuzzer_sys::fuzz_target!(init: fuzz_bodies::let_contained_panics_pass(), |bytes: &[u8]| fuzz_bodies::datasets::parquet_file(bytes));
