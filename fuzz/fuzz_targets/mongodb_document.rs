#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tower_key_rotation_fuzz::mongodb_document::check(input));
