//! The control socket: a line is a message, which survives being sent on, or it is refused with a reason.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lockstep_replicator::admin::control::{Reply, Request, decode, encode};

fuzz_target!(|line: &[u8]| {
    match decode::<Request>(line) {
        Ok(request) => {
            let again = encode(&request).expect("it came in a line");
            assert_eq!(decode::<Request>(&again).ok().as_ref(), Some(&request));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    // What a client reads: from a daemon it did not start.
    if let Ok(reply) = decode::<Reply>(line) {
        let again = encode(&reply).expect("it came in a line");
        assert_eq!(decode::<Reply>(&again).map(|reply| reply.is_final()).ok(), Some(reply.is_final()));
    }
});
