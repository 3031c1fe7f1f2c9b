//! NBD negotiation: whatever a client sends and however it is cut, the outcome is the same, memory stays bounded and
//! nothing panics; requests of the transmission behind it are decoded too.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lockstep_replicator::frontend::nbd::{
    CloseReason, ExportDirectory, ExportInfo, ExportRefusal, ListedExport, Negotiated, Negotiation,
    RefusalKind, Step,
};

/// Answers to one piece of input may not be longer than this many bytes for each option in it.
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// One export that is there, one that is on the other node.
struct Exports;

impl ExportDirectory for Exports {
    fn list(&self) -> Vec<ListedExport> {
        vec![ListedExport { name: "r/0".into(), description: "a volume".into() }]
    }

    fn lookup(&self, name: &str) -> Result<ExportInfo, ExportRefusal> {
        match name {
            "r/0" => Ok(ExportInfo::volume((1 << 30) + 512, 4096)),
            "s/0" => Err(ExportRefusal::new(RefusalKind::Policy, "s/0 is Secondary here")),
            other => Err(ExportRefusal::new(RefusalKind::Unknown, format!("no export {other}"))),
        }
    }
}

#[derive(Debug, PartialEq)]
enum End {
    Waiting,
    Done(Box<Negotiated>),
    Closed(CloseReason),
}

// The first byte says how the rest is cut.
fuzz_target!(|input: &[u8]| {
    let Some((cut, stream)) = input.split_first() else { return };
    let (mut whole, whole_out) = negotiate(stream, stream.len().max(1));
    let (mut pieces, pieces_out) = negotiate(stream, usize::from(*cut).max(1));
    assert_eq!(whole_out, pieces_out, "the same answers");
    // Only what stood behind the last option may differ: in pieces, it was not read yet.
    if let (End::Done(whole), End::Done(pieces)) = (&mut whole, &mut pieces) {
        assert!(whole.leftover.starts_with(&pieces.leftover));
        whole.leftover.clear();
        pieces.leftover.clear();
    }
    assert_eq!(whole, pieces, "the same end");
});

fn negotiate(stream: &[u8], piece_len: usize) -> (End, Vec<u8>) {
    let mut out = Vec::new();
    let mut negotiation = Negotiation::start(&mut out);
    for piece in stream.chunks(piece_len) {
        let mut input = piece;
        loop {
            let before = out.len();
            let step = negotiation.handle(input, &Exports, &mut out);
            assert!(out.len() - before <= MAX_ANSWER_BYTES, "one option, one answer");
            input = &[];
            match step {
                Step::NeedInput => break,
                Step::Again => {}
                Step::Done(negotiated) => return (End::Done(negotiated), out),
                Step::Closed(reason) => return (End::Closed(reason), out),
            }
        }
    }
    (End::Waiting, out)
}
