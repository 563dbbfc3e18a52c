//! What must hold is in `src/fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mini_lb::fuzzing::requests(data));
