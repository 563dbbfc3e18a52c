//! What must hold for every input is asserted in `src/fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mini_lb::fuzzing::merge_samples(data));
