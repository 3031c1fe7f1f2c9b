//! The configuration: any text is read or refused with places that exist; what was read can be printed and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lockstep_replicator::admin::config::{dump, parse_bytes, render_all};

fuzz_target!(|input: &[u8]| {
    match parse_bytes("fuzz.conf", input) {
        Err(diagnostics) => {
            assert!(!diagnostics.is_empty(), "a refusal says why");
            assert!(!render_all(&diagnostics).is_empty(), "and can be shown");
        }
        Ok((config, _)) => {
            let text = dump(&config, None, "alpha").expect("all of it is there");
            if let Err(diagnostics) = parse_bytes("dump.conf", text.as_bytes()) {
                panic!("our own dump is refused:\n{}\n{text}", render_all(&diagnostics));
            }
        }
    }
});
