//! The text of dump-md: any text is read or refused with a place; what was read has a bitmap that can be stored.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lockstep_replicator::meta::restore::{MAX_BITMAP_WORDS, parse};

fuzz_target!(|text: &str| {
    match parse(text) {
        Ok(restored) => {
            // `word 1000000 times` is how a few bytes ask for much.
            assert!(restored.words() <= MAX_BITMAP_WORDS, "{} words", restored.words());
            assert!(restored.bitmap.len() <= text.len(), "a run takes at least a byte of text");
        }
        Err(error) => {
            assert!(error.line >= 1 && error.line <= text.split('\n').count() + 1, "{error}");
            assert!(error.column >= 1, "{error}");
        }
    }
});
