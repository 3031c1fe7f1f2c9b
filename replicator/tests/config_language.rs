//! The configuration language from outside: every file of the corpus, golden diagnostics, what the core is given, and
//! comparison with an installed `drbdadm`.
#![cfg(feature = "runtime")]
#![expect(clippy::unwrap_used, reason = "helpers of tests: a failure is a failed test")]
use lockstep_replicator::admin::config::options::{Kind, OptionSpec, Section, Treatment};
use lockstep_replicator::admin::config::{Config, Location, dump, load, parse_bytes, render_all, table};
use lockstep_replicator::core::config::{OnIoError, Protocol, RateControl, WriteOrdering};
use std::path::{Path, PathBuf};
use std::process::Command;

fn corpus(kind: &str) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config").join(kind);
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|p| p.extension().is_some_and(|e| e == "conf"));
    files.sort();
    files
}

fn good(name: &str) -> Config {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config/good").join(name);
    load(Some(&path)).unwrap_or_else(|e| panic!("{}", render_all(&e))).0
}

fn without_places(mut config: Config) -> Config {
    config.files.clear();
    for r in &mut config.resources {
        r.defined_at = Location::default();
    }
    config
}

fn assert_dump_is_a_fixed_point(config: &Config) {
    let text = dump(config, None, "alpha").unwrap();
    let again =
        parse_bytes("dump", text.as_bytes()).unwrap_or_else(|e| panic!("{text}\n{}", render_all(&e))).0;
    assert_eq!(
        dump(&again, None, "alpha")
            .unwrap()
            .lines()
            .skip(1)
            .filter(|l| !l.starts_with("# defined"))
            .collect::<Vec<_>>(),
        text.lines().skip(1).filter(|l| !l.starts_with("# defined")).collect::<Vec<_>>()
    );
    // A dump states derived ids, so the second reading has them written; the resolved values are the same.
    let resolved = |c: Config| serde_json::to_value(without_places(c)).unwrap();
    assert_eq!(resolved(again), resolved(config.clone()));
}

#[test]
fn every_good_file_is_accepted_and_its_dump_means_the_same() {
    let files = corpus("good");
    assert!(files.len() >= 16);
    for file in files {
        let (config, _) = load(Some(&file)).unwrap_or_else(|e| panic!("{}", render_all(&e)));
        assert!(!config.resources.is_empty(), "{}", file.display());
        assert_dump_is_a_fixed_point(&config);
    }
}

/// `UPDATE_GOLDEN=1` rewrites the expectations.
#[test]
fn every_bad_file_has_the_diagnostics_that_are_written_beside_it() {
    let files = corpus("bad");
    assert!(files.len() >= 10);
    for file in files {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let errors = parse_bytes(&name, &std::fs::read(&file).unwrap()).expect_err(&name);
        let text = render_all(&errors);
        let golden = file.with_extension("expected");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&golden, &text).unwrap();
        }
        assert_eq!(text, std::fs::read_to_string(&golden).unwrap(), "{name}");
    }
}

#[test]
fn the_web_example_becomes_what_the_core_needs() {
    let config = good("web-root.conf");
    let r = config.resource("web-root").unwrap();
    let core = r.to_core("nodo2").unwrap();
    assert_eq!((core.node_id, core.peer_node_id, core.peer_name.as_str()), (1, 0, "nodo1"));
    assert_eq!(core.net.protocol, Protocol::C);
    // A rate without c-plan-ahead is where DRBD's controller starts.
    assert_eq!(core.volumes[0].resync.control, RateControl::Planned);
    let volume = r.host("nodo1").unwrap().volume(0).unwrap();
    assert_eq!(volume.disk_options.number(&table::RESYNC_RATE), 40 * 1024);
    assert_eq!(volume.device, Path::new("/dev/drbd1"));
    assert!(r.to_core("elsewhere").is_err());
}

#[test]
fn the_stronger_level_wins_and_units_are_converted() {
    let config = good("multi-volume.conf");
    let core = config.resource("r1").unwrap().to_core("vm").unwrap();
    assert_eq!(core.net.timeout_ms, 5000);
    assert!(core.net.allow_two_primaries);
    let [zero, one] = core.volumes.as_slice() else { panic!("two volumes") };
    assert_eq!((zero.al_extents, one.al_extents), (1237, 999));
    assert_eq!((zero.resync.control, zero.resync.rate_kib_s), (RateControl::Fixed, 10 * 1024));
    assert_eq!(zero.user_size.unwrap().0, 8 << 20);
    assert_eq!((zero.on_io_error, zero.write_ordering), (OnIoError::PassOn, WriteOrdering::Drain));
    let of_z = &config.resource("z").unwrap().to_core("vm").unwrap().volumes[0].resync;
    assert_eq!((of_z.control, of_z.rate_kib_s), (RateControl::Fixed, 40 * 1024));
    let connection = good("connection.conf").resource("m").unwrap().connections[0].clone();
    assert_eq!(connection.paths[0][0].to_string(), "ipv4 10.9.0.2:7000");
    assert_eq!(good("include.conf").resources.len(), 2);
}

/// Statements of a dump that say the same in both programs. Left out, with reasons:
/// - comments: they carry paths;
/// - `node-id`: 9.22 derives it from a hash of the addresses, lockstep from the names;
/// - empty `common`: 9.22 prints it when it was written;
/// - order within a block is compared sorted: 9.22 swaps `global`.
fn comparable(dump: &str) -> Vec<String> {
    let lines = dump.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "));
    let mut lines: Vec<String> = lines
        .filter(|l| {
            !l.is_empty() && !l.starts_with('#') && !l.starts_with("node-id") && l != "}" && l != "common {"
        })
        .collect();
    lines.sort();
    lines
}

/// Files that 9.22 cannot be compared on, and why.
const DIFFERENT: &[(&str, &str)] = &[
    ("web-root.conf", "9.22 rejects rate in syncer"),
    ("legacy83.conf", "9.22 rejects rate in syncer"),
    ("stacked.conf", "9.22 does not print the device of a stacked host"),
    ("require.conf", "9.22 asks the kernel module for its version"),
    ("lockstep.conf", "the section is an extension"),
    ("host-options.conf", "9.22 repeats inherited disk statements in a host that has a disk section"),
    ("floating.conf", "9.22 repeats inherited disk statements in a host that has a disk section"),
];

#[test]
fn an_installed_drbdadm_resolves_the_same_values() {
    if Command::new("drbdadm").arg("--version").output().is_err() {
        eprintln!("skipped: drbdadm is not installed");
        return;
    }
    for file in corpus("good") {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        if let Some((_, why)) = DIFFERENT.iter().find(|(f, _)| *f == name) {
            eprintln!("{name}: not compared: {why}");
            continue;
        }
        let output = Command::new("drbdadm").arg("-c").arg(&file).arg("dump").output().unwrap();
        let theirs = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        let ours = dump(&load(Some(&file)).unwrap().0, None, "alpha").unwrap();
        assert_eq!(comparable(&ours), comparable(&theirs), "{name}");
    }
}

#[test]
fn large_and_hostile_texts_end_quickly_with_bounded_reports() {
    let texts: Vec<Vec<u8>> = vec![
        vec![b'{'; 1 << 20],
        vec![b'}'; 1 << 20],
        vec![0; 1 << 20],
        vec![b'a'; 10 << 20],
        b"a ".repeat(1 << 20),
        b"x;".repeat(1 << 20),
        b"resource a { on b {".repeat(1 << 16),
        b"\"\\".repeat(1 << 20),
        (0..20_000)
            .flat_map(|i| format!("resource r{i} {{ net {{ timeot {i}; }} }}\n").into_bytes())
            .collect(),
    ];
    for text in texts {
        let errors = parse_bytes("big", &text).expect_err("none of these is a configuration");
        assert!(errors.len() <= 201);
        assert!(render_all(&errors).len() < 1 << 20);
    }
}

/// A value that an option takes and that is not its default where it has a choice.
fn sample(kind: Kind) -> String {
    match kind {
        Kind::Number { max, .. } => max.to_string(),
        Kind::Bool { default } => if default { "no" } else { "yes" }.into(),
        Kind::Choice { values, .. } => values[values.len() - 1].into(),
        Kind::Quorum => "majority".into(),
        Kind::Text { .. } => "\"a b\"".into(),
        Kind::ResourceRef => "r".into(),
        Kind::Words => "5".into(),
    }
}

#[test]
fn every_option_is_accepted_in_its_section_and_refused_beyond_its_range() {
    let hosts = "device minor 1; disk /dev/a; on a { address 10.0.0.1:1; } on b { address 10.0.0.2:1; }";
    let with = |o: &OptionSpec, value: &str| {
        let section = format!("{} {{ {} {value}; }}", o.section.keyword(), o.name);
        let inside = if o.section == Section::Global { String::new() } else { section.clone() };
        let outside = if o.section == Section::Global { section } else { String::new() };
        // What on-congestion and allow-two-primaries need of the protocol is tested elsewhere.
        let protocol = if o.name == "on-congestion" { "protocol A;" } else { "" };
        parse_bytes(o.name, format!("{outside} resource r {{ {protocol} {hosts} {inside} }}").as_bytes())
    };
    for o in table::ALL {
        let (config, warnings) = with(o, &sample(o.kind)).unwrap_or_else(|e| panic!("{}", render_all(&e)));
        assert_dump_is_a_fixed_point(&config);
        let meaningless = matches!(o.treatment, Treatment::AcceptedWithoutMeaning(_));
        assert_eq!(warnings.len(), usize::from(meaningless), "{}: {}", o.name, render_all(&warnings));
        if let Kind::Number { max, .. } = o.kind {
            let errors = with(o, &(max + 1).to_string()).expect_err(o.name);
            assert!(errors[0].hint.as_ref().is_some_and(|h| h.contains(&max.to_string())), "{}", o.name);
        }
    }
}

mod properties {
    use super::*;
    use proptest::prelude::*;

    fn any_good() -> impl Strategy<Value = Vec<u8>> {
        let texts: Vec<Vec<u8>> = corpus("good").iter().map(|p| std::fs::read(p).unwrap()).collect();
        prop::sample::select(texts)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            if let Err(errors) = parse_bytes("any", &bytes) {
                prop_assert!(!errors.is_empty());
                prop_assert!(!render_all(&errors).is_empty());
            }
        }

        #[test]
        fn a_damaged_configuration_is_answered_the_same_twice(
            text in any_good(), cuts in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4_usize), 1..6)
        ) {
            let mut bytes = text;
            for (at, byte, how) in cuts {
                if bytes.is_empty() { break; }
                let i = at.index(bytes.len());
                match how {
                    0 => bytes[i] = byte,
                    1 => { bytes.remove(i); }
                    2 => bytes.insert(i, byte),
                    _ => bytes.truncate(i),
                }
            }
            let first = parse_bytes("damaged", &bytes);
            prop_assert_eq!(&first, &parse_bytes("damaged", &bytes));
            if let Ok((config, _)) = first {
                assert_dump_is_a_fixed_point(&config);
            }
        }
    }
}
