//! How a verb ended: exit codes and the lines an operator sees (ADM §3.1, §4.2).
//!
//! Cluster managers branch on the exit code, so the numbers are part of the interface: 17 from
//! `primary` means "no good data, do not retry", 11 means "may succeed later".
use crate::core::event::Refusal;
use std::fmt::Write as _;

/// Done, or nothing to do.
pub const OK: u8 = 0;
/// Usage: unknown verb, unknown option, a resource the configuration does not name.
pub const USAGE: u8 = 1;
/// Disk state lower than Outdated; a wait that timed out.
pub const LOWER_THAN_OUTDATED: u8 = 5;
/// A wait that timed out (same number as [`LOWER_THAN_OUTDATED`], as in DRBD).
pub const WAIT_TIMED_OUT: u8 = 5;
/// Invalid configuration, or an object that does not exist.
pub const CONFIG: u8 = 10;
/// State change refused; may succeed later.
pub const STATE_CHANGE: u8 = 11;
/// Needs a local disk.
pub const NO_LOCAL_DISK: u8 = 16;
/// Needs UpToDate data; retrying is no use.
pub const NEED_UP_TO_DATE: u8 = 17;
/// Could not be carried out: no daemon, no answer in time, files that cannot be opened.
pub const EXEC: u8 = 20;

/// DRBD's number for "need access to UpToDate data".
pub const SS_NO_UP_TO_DATE_DISK: i32 = -2;
/// DRBD's number for "no local disk".
pub const SS_NO_LOCAL_DISK: i32 = -4;
/// DRBD's number for "device is held open".
pub const SS_DEVICE_IN_USE: i32 = -12;
/// DRBD's number for "disk state is lower than outdated".
pub const SS_LOWER_THAN_OUTDATED: i32 = -16;
/// DRBD's number for "no valid meta-data".
pub const ERR_NO_META: i32 = 119;
/// DRBD's number for "already has a disk".
pub const ERR_DISK_CONFIGURED: i32 = 124;
/// DRBD's number for "unknown resource".
pub const ERR_RES_NOT_KNOWN: i32 = 158;

/// The exit code that belongs to DRBD's answer number (ADM §4.2).
#[must_use]
pub const fn exit_code(number: i32) -> u8 {
    match number {
        1..=4 | 101 => OK,
        102..=176 => CONFIG,
        SS_NO_UP_TO_DATE_DISK => NEED_UP_TO_DATE,
        SS_LOWER_THAN_OUTDATED => LOWER_THAN_OUTDATED,
        SS_NO_LOCAL_DISK => NO_LOCAL_DISK,
        -28..=0 => STATE_CHANGE,
        _ => EXEC,
    }
}

/// A refusal as an operator reads it: DRBD's line first, then the facts, then the safe next command.
/// Ends in a newline.
#[must_use]
pub fn refusal_text(object: &str, refusal: &Refusal) -> String {
    let kind = if refusal.number > 101 { "Failure" } else { "State change failed" };
    let mut text = format!("{object}: {kind}: ({}) {}\n", refusal.number, refusal.text.trim_end());
    for fact in &refusal.facts {
        push_line(&mut text, "  ", fact);
    }
    if !refusal.advice.is_empty() {
        push_line(&mut text, "next: ", &refusal.advice);
    }
    text
}

fn push_line(text: &mut String, prefix: &str, line: &str) {
    // Writing to a String cannot fail.
    let _infallible = writeln!(text, "{prefix}{}", line.trim_end());
}

/// A verb that failed before or beside the core: what to print and how to exit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Failure {
    /// Exit code.
    pub exit: u8,
    /// Complete text for stderr, possibly several lines.
    pub text: String,
}

impl Failure {
    /// A failure with this exit code and text.
    #[must_use]
    pub fn new(exit: u8, text: impl Into<String>) -> Self {
        Self { exit, text: text.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_drbdsetups() {
        let table = [
            (1, OK),
            (2, OK),
            (101, OK),
            (102, CONFIG),
            (158, CONFIG),
            (176, CONFIG),
            (0, STATE_CHANGE),
            (-1, STATE_CHANGE),
            (-12, STATE_CHANGE),
            (-28, STATE_CHANGE),
            (-2, NEED_UP_TO_DATE),
            (-16, LOWER_THAN_OUTDATED),
            (-4, NO_LOCAL_DISK),
            (-29, EXEC),
            (177, EXEC),
            (5, EXEC),
        ];
        for (number, code) in table {
            assert_eq!(exit_code(number), code, "answer {number}");
        }
    }

    #[test]
    fn a_refusal_says_what_why_and_what_next() {
        let refusal = Refusal {
            number: -2,
            text: "Need access to UpToDate data".into(),
            facts: vec!["here: disk Inconsistent".into(), "peer bravo: not connected".into()],
            advice: "drbdadm connect r0".into(),
        };
        assert_eq!(
            refusal_text("r0", &refusal),
            "r0: State change failed: (-2) Need access to UpToDate data\n\
             \x20 here: disk Inconsistent\n  peer bravo: not connected\nnext: drbdadm connect r0\n"
        );
        let refusal = Refusal {
            number: 124,
            text: "Device is attached to a disk".into(),
            facts: vec![],
            advice: String::new(),
        };
        assert_eq!(refusal_text("1", &refusal), "1: Failure: (124) Device is attached to a disk\n");
    }
}
