//! The negotiation as a client sees it, byte by byte, and under clients that do not behave.
#![cfg(feature = "runtime")]
#![expect(clippy::unwrap_used, reason = "the helpers of a test fail it by a panic")]
use lockstep_replicator::frontend::nbd::wire::{
    MAX_OPTION_BYTES, MAX_OPTIONS, MAX_SKIPPED_OPTION_BYTES, OPTION_MAGIC, OPTION_REPLY_MAGIC, option, rep,
};
use lockstep_replicator::frontend::nbd::{
    CloseReason, ExportDirectory, ExportInfo, ExportRefusal, ListedExport, NegotiateError, Negotiated,
    Negotiation, RefusalKind, Step, TransmissionFlags, negotiate,
};
use proptest::prelude::*;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const SECONDARY: &str =
    "mail/0 is Secondary on nodo2; nodo1 is Primary. To use it here: lockstep primary mail";

/// Exports with these names are Primary; `mail/0` is Secondary, everything else unknown.
struct Node(&'static [&'static str]);

impl ExportDirectory for Node {
    fn list(&self) -> Vec<ListedExport> {
        let listed = |name: &&str| ListedExport { name: (*name).into(), description: "a volume".into() };
        self.0.iter().map(listed).collect()
    }

    fn lookup(&self, name: &str) -> Result<ExportInfo, ExportRefusal> {
        if self.0.contains(&name) {
            let description = format!("volume {name}");
            return Ok(ExportInfo { description, ..ExportInfo::volume(1 << 30, 4096) });
        }
        Err(match name {
            "mail/0" => ExportRefusal::new(RefusalKind::Policy, SECONDARY),
            "old/0" => ExportRefusal::new(RefusalKind::Shutdown, "old is going down"),
            _ => ExportRefusal::new(RefusalKind::Unknown, format!("no export {name}")),
        })
    }
}

const ONE: Node = Node(&["web-root/0"]);

fn client_flags(flags: u32) -> Vec<u8> {
    flags.to_be_bytes().to_vec()
}

fn opt(option: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap();
    [&OPTION_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &length.to_be_bytes(), data].concat()
}

fn sized(text: &str) -> Vec<u8> {
    [&u32::try_from(text.len()).unwrap().to_be_bytes()[..], text.as_bytes()].concat()
}

fn info_data(name: &str, wants: &[u16]) -> Vec<u8> {
    let mut data = sized(name);
    data.extend_from_slice(&u16::try_from(wants.len()).unwrap().to_be_bytes());
    for want in wants {
        data.extend_from_slice(&want.to_be_bytes());
    }
    data
}

fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = sized(name);
    data.extend_from_slice(&u32::try_from(queries.len()).unwrap().to_be_bytes());
    for query in queries {
        data.extend_from_slice(&sized(query));
    }
    data
}

/// Runs a client's bytes in pieces; answers what the server wrote after its greeting, and its last step.
fn run<'a>(node: &Node, pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<u8>, Step) {
    let mut out = Vec::new();
    let mut negotiation = Negotiation::start(&mut out);
    assert_eq!(out, b"NBDMAGICIHAVEOPT\0\x03");
    out.clear();
    let mut last = Step::NeedInput;
    for piece in pieces {
        last = match last {
            Step::NeedInput => negotiation.handle(piece, node, &mut out),
            // Bytes behind the end belong to the transmission.
            Step::Done(mut negotiated) => {
                negotiated.leftover.extend_from_slice(piece);
                Step::Done(negotiated)
            }
            closed => closed,
        };
        while last == Step::Again {
            last = negotiation.handle(&[], node, &mut out);
        }
    }
    (out, last)
}

fn run_options(node: &Node, options: &[Vec<u8>]) -> (Vec<Answer>, Step) {
    let script = [client_flags(3), options.concat()].concat();
    let (out, step) = run(node, [script.as_slice()]);
    (answers(&out), step)
}

/// An answer to an option: option, reply type, data.
type Answer = (u32, u32, Vec<u8>);

fn answers(mut bytes: &[u8]) -> Vec<Answer> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let field = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(bytes[..8], OPTION_REPLY_MAGIC.to_be_bytes());
        let length = field(16) as usize;
        all.push((field(8), field(12), bytes[20..20 + length].to_vec()));
        bytes = &bytes[20 + length..];
    }
    all
}

fn types(answers: &[Answer]) -> Vec<u32> {
    answers.iter().map(|answer| answer.1).collect()
}

#[track_caller]
fn done(step: Step) -> Negotiated {
    match step {
        Step::Done(negotiated) => *negotiated,
        other => panic!("{other:?}"),
    }
}

#[test]
fn go_describes_the_export_and_starts_the_transmission() {
    let (answers, step) = run_options(
        &ONE,
        &[
            opt(option::STRUCTURED_REPLY, &[]),
            opt(option::SET_META_CONTEXT, &meta_data("web-root/0", &["x-other:a", "base:allocation"])),
            opt(option::GO, &info_data("web-root/0", &[1, 2, 3])),
        ],
    );
    assert_eq!(
        types(&answers),
        [rep::ACK, rep::META_CONTEXT, rep::ACK, rep::INFO, rep::INFO, rep::INFO, rep::INFO, rep::ACK]
    );
    assert_eq!(answers[1].2, b"\0\0\0\x01base:allocation");
    assert_eq!(answers[3].2[..10], [0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0]);
    assert_eq!(answers[4].2, [0, 3, 0, 0, 16, 0, 0, 0, 16, 0, 0, 16, 0, 0]);
    assert_eq!(answers[5].2, b"\0\x01web-root/0");
    assert_eq!(answers[6].2, b"\0\x02volume web-root/0");
    let negotiated = done(step);
    assert_eq!(negotiated.name, "web-root/0");
    assert!(negotiated.structured_replies);
    assert!(negotiated.meta_base_allocation);
    assert!(negotiated.flags.contains(TransmissionFlags::SEND_DF));
    assert!(negotiated.flags.contains(TransmissionFlags::CAN_MULTI_CONN));
    assert_eq!(negotiated.leftover, b"");
}

#[test]
fn the_old_way_to_ask_works_with_and_without_zeroes() {
    for (flags, length) in [(1, 8 + 2 + 124), (3, 8 + 2)] {
        let script =
            [client_flags(flags), opt(option::EXPORT_NAME, b"web-root/0"), b"rest".to_vec()].concat();
        let (out, step) = run(&ONE, [script.as_slice()]);
        assert_eq!(out.len(), length);
        assert_eq!(out[..8], (1u64 << 30).to_be_bytes());
        let negotiated = done(step);
        assert_eq!(negotiated.leftover, b"rest");
        assert!(!negotiated.flags.contains(TransmissionFlags::SEND_DF));
    }
}

#[test]
fn a_secondary_says_why_and_the_client_may_go_on() {
    let (answers, step) = run_options(
        &ONE,
        &[
            opt(option::GO, &info_data("mail/0", &[])),
            opt(option::INFO, &info_data("old/0", &[])),
            opt(option::GO, &info_data("nope", &[])),
            opt(option::GO, &info_data("web-root/0", &[])),
        ],
    );
    assert_eq!(
        types(&answers),
        [rep::ERR_POLICY, rep::ERR_SHUTDOWN, rep::ERR_UNKNOWN, rep::INFO, rep::INFO, rep::ACK]
    );
    assert_eq!(answers[0].2, SECONDARY.as_bytes());
    assert_eq!(answers[2].2, b"no export nope");
    assert_eq!(done(step).name, "web-root/0");
    // The old option has no room for a reason: the connection ends, the log gets the text.
    let (answers, step) = run_options(&ONE, &[opt(option::EXPORT_NAME, b"mail/0")]);
    assert_eq!(answers, []);
    let refusal = ExportRefusal::new(RefusalKind::Policy, SECONDARY);
    assert_eq!(step, Step::Closed(CloseReason::ExportRefused(refusal)));
}

#[test]
fn the_empty_name_is_the_only_export_if_there_is_one() {
    let go = [opt(option::GO, &info_data("", &[1]))];
    assert_eq!(done(run_options(&ONE, &go).1).name, "web-root/0");
    let (answers, _) = run_options(&Node(&["a/0", "b/0"]), &go);
    assert_eq!(types(&answers), [rep::ERR_UNKNOWN]);
    assert_eq!(answers[0].2, b"there is no default export; name one of: a/0, b/0");
    let (answers, _) = run_options(&Node(&[]), &go);
    assert_eq!(types(&answers), [rep::ERR_UNKNOWN]);
    // A context chosen for the default export counts when the export is then named.
    let (_, step) = run_options(
        &ONE,
        &[
            opt(option::STRUCTURED_REPLY, &[]),
            opt(option::SET_META_CONTEXT, &meta_data("", &["base:allocation"])),
            opt(option::GO, &info_data("web-root/0", &[])),
        ],
    );
    assert!(done(step).meta_base_allocation);
}

#[test]
fn list_names_what_is_primary() {
    let (answers, step) =
        run_options(&Node(&["a/0", "b/0"]), &[opt(option::LIST, &[]), opt(option::ABORT, &[])]);
    assert_eq!(types(&answers), [rep::SERVER, rep::SERVER, rep::ACK, rep::ACK]);
    assert_eq!(answers[0].2, b"\0\0\0\x03a/0a volume");
    assert_eq!(step, Step::Closed(CloseReason::Aborted));
}

#[test]
fn contexts_follow_the_rules() {
    let ask = |structured: bool, option, name: &str, queries: &[&str]| {
        let mut options = Vec::new();
        if structured {
            options.push(opt(option::STRUCTURED_REPLY, &[]));
        }
        options.push(opt(option, &meta_data(name, queries)));
        let mut answers = run_options(&ONE, &options).0;
        answers.drain(..usize::from(structured));
        types(&answers)
    };
    let (list, set) = (option::LIST_META_CONTEXT, option::SET_META_CONTEXT);
    assert_eq!(ask(false, set, "", &["base:allocation"]), [rep::ERR_INVALID]);
    assert_eq!(ask(true, list, "", &[]), [rep::META_CONTEXT, rep::ACK]);
    assert_eq!(ask(true, list, "", &["base:"]), [rep::META_CONTEXT, rep::ACK]);
    assert_eq!(ask(true, list, "", &["qemu:"]), [rep::ACK]);
    assert_eq!(ask(true, set, "", &[]), [rep::ACK]);
    assert_eq!(ask(true, set, "", &["base:"]), [rep::ACK]);
    assert_eq!(ask(true, set, "mail/0", &["base:allocation"]), [rep::ERR_POLICY]);
    // A later choice replaces the earlier one, also when it fails.
    let (_, step) = run_options(
        &ONE,
        &[
            opt(option::STRUCTURED_REPLY, &[]),
            opt(set, &meta_data("", &["base:allocation"])),
            opt(set, b"???"),
            opt(option::GO, &info_data("", &[])),
        ],
    );
    assert!(!done(step).meta_base_allocation);
    // Chosen for one export, another one used.
    let (_, step) = run_options(
        &Node(&["a/0", "b/0"]),
        &[
            opt(option::STRUCTURED_REPLY, &[]),
            opt(set, &meta_data("a/0", &["base:allocation"])),
            opt(option::GO, &info_data("b/0", &[])),
        ],
    );
    assert!(!done(step).meta_base_allocation);
}

#[test]
fn unknown_malformed_and_long_options_are_answered_and_the_client_may_go_on() {
    let long = vec![0; MAX_OPTION_BYTES as usize + 1];
    let (answers, step) = run_options(
        &ONE,
        &[
            opt(option::STARTTLS, &[]),
            opt(option::EXTENDED_HEADERS, &[]),
            opt(4711, b"data"),
            opt(option::LIST, b"x"),
            opt(option::STRUCTURED_REPLY, b"x"),
            opt(option::GO, b"\0\0\0\xffshort"),
            opt(option::GO, &long),
            opt(option::GO, &info_data("web-root/0", &[])),
        ],
    );
    assert_eq!(
        types(&answers)[..7],
        [
            rep::ERR_UNSUP,
            rep::ERR_UNSUP,
            rep::ERR_UNSUP,
            rep::ERR_INVALID,
            rep::ERR_INVALID,
            rep::ERR_INVALID,
            rep::ERR_TOO_BIG
        ]
    );
    assert!(!done(step).structured_replies);
}

#[test]
fn broken_rules_end_the_connection() {
    let closed = |script: &[u8]| match run(&ONE, [script]).1 {
        Step::Closed(reason) => reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(closed(&client_flags(4)), CloseReason::UnknownClientFlags(4));
    let http = [client_flags(3), b"GET / HTTP/1.1\r\n".to_vec()].concat();
    assert!(matches!(closed(&http), CloseReason::BadOptionMagic(_)));
    let endless = [
        &client_flags(3)[..],
        &OPTION_MAGIC.to_be_bytes(),
        &9999u32.to_be_bytes(),
        &(MAX_SKIPPED_OPTION_BYTES + 1).to_be_bytes(),
    ]
    .concat();
    let length = MAX_SKIPPED_OPTION_BYTES + 1;
    assert_eq!(closed(&endless), CloseReason::OptionTooLong { option: 9999, length });
    let name = [client_flags(3), opt(option::EXPORT_NAME, &[b'a'; 4097])].concat();
    assert!(matches!(closed(&name), CloseReason::OptionTooLong { .. }));
    let name = [client_flags(3), opt(option::EXPORT_NAME, &[0xff])].concat();
    assert_eq!(closed(&name), CloseReason::MalformedName);
    let many = [client_flags(3), opt(77, &[]).repeat(MAX_OPTIONS as usize + 1)].concat();
    assert_eq!(closed(&many), CloseReason::TooManyOptions);
}

/// A long talk with an answer of every kind.
fn talk() -> Vec<u8> {
    [
        client_flags(3),
        opt(option::STARTTLS, &[]),
        opt(option::STRUCTURED_REPLY, &[]),
        opt(option::LIST, &[]),
        opt(option::INFO, &info_data("mail/0", &[0, 1, 2, 3])),
        opt(option::LIST_META_CONTEXT, &meta_data("", &[])),
        opt(option::SET_META_CONTEXT, &meta_data("web-root/0", &["base:allocation"])),
        opt(option::GO, b"bad"),
        opt(option::GO, &vec![7; MAX_OPTION_BYTES as usize + 3]),
        opt(option::GO, &info_data("", &[1, 2, 3])),
        b"\x25\x60\x95\x13 and so on".to_vec(),
    ]
    .concat()
}

#[test]
fn it_does_not_matter_how_the_bytes_are_cut() {
    let talk = talk();
    let whole = run(&ONE, [talk.as_slice()]);
    assert!(done(whole.1.clone()).leftover.starts_with(b"\x25\x60\x95\x13"));
    for cut in 0..=talk.len() {
        let (front, back) = talk.split_at(cut);
        assert_eq!(run(&ONE, [front, back]), whole, "cut at {cut}");
    }
    assert_eq!(run(&ONE, talk.chunks(1)), whole, "byte by byte");
}

/// Bytes that look like a negotiation often enough to get inside.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let data = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..40),
        Just(info_data("web-root/0", &[3])),
        Just(meta_data("web-root/0", &["base:allocation"])),
        Just(meta_data("", &["base:", ""])),
    ];
    let one = prop_oneof![
        8 => (0u32..13, data).prop_map(|(option, data)| opt(option, &data)),
        1 => proptest::collection::vec(any::<u8>(), 0..40),
        1 => (any::<u32>(), any::<u32>()).prop_map(|(option, length)| {
            [&OPTION_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &length.to_be_bytes()].concat()
        }),
    ];
    (0u32..5, proptest::collection::vec(one, 0..12))
        .prop_map(|(flags, options)| [client_flags(flags), options.concat()].concat())
}

proptest! {
    #[test]
    fn any_bytes_give_an_outcome(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let (_, step) = run(&ONE, [bytes.as_slice()]);
        prop_assert_ne!(step, Step::Again);
    }

    #[test]
    fn hostile_talks_give_the_same_outcome_however_cut(bytes in hostile(), size in 1usize..50) {
        let whole = run(&ONE, [bytes.as_slice()]);
        let cut = run(&ONE, bytes.chunks(size));
        // Every answer is well-formed, unless the old option's bare answer ends the talk.
        if !matches!(whole.1, Step::Done(_)) {
            answers(&whole.0);
        }
        prop_assert_eq!(whole, cut);
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

#[test]
fn the_driver_writes_every_answer_before_it_returns() {
    runtime().block_on(async {
        let (mut client, mut server) = tokio::io::duplex(64);
        let limit = Duration::from_secs(30);
        let talk = talk();
        let (outcome, received) = tokio::join!(
            async {
                let outcome = negotiate(&mut server, &ONE, limit).await;
                drop(server);
                outcome
            },
            async {
                let (mut reader, mut writer) = tokio::io::split(&mut client);
                let mut received = Vec::new();
                // The tail may find the server gone.
                let (_sent, read) = tokio::join!(writer.write_all(&talk), reader.read_to_end(&mut received));
                read.unwrap();
                received
            }
        );
        let (answers, step) = run(&ONE, [talk.as_slice()]);
        assert_eq!(received[18..], answers);
        let (outcome, expected) = (outcome.unwrap(), done(step));
        assert_eq!((outcome.name, outcome.flags), (expected.name, expected.flags));
        assert!(expected.leftover.starts_with(&outcome.leftover));
    });
}

#[test]
fn a_client_that_says_nothing_is_dropped_at_the_deadline() {
    runtime().block_on(async {
        let (_client, mut server) = tokio::io::duplex(64);
        let limit = Duration::from_millis(20);
        let error = negotiate(&mut server, &ONE, limit).await.unwrap_err();
        assert!(matches!(error, NegotiateError::Deadline { .. }), "{error}");
        assert_eq!(error.to_string(), "the negotiation took longer than 20 ms");
    });
}

#[test]
fn a_client_that_goes_away_is_no_error_worth_a_line() {
    runtime().block_on(async {
        let (mut client, mut server) = tokio::io::duplex(64);
        client.write_all(&client_flags(3)).await.unwrap();
        client.shutdown().await.unwrap();
        let error = negotiate(&mut server, &ONE, Duration::from_secs(30)).await.unwrap_err();
        assert!(error.is_polite(), "{error}");
    });
}
