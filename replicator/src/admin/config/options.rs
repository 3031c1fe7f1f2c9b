//! What an option is, and sets of options that were given. The list of all of them is in [`super::table`].
use serde::ser::{Serialize, SerializeMap, Serializer};

/// The section an option belongs to, whatever older place it is also accepted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Section {
    /// `global { }`
    Global,
    /// `net { }`
    Net,
    /// `disk { }` of a resource, host or volume.
    Disk,
    /// `disk { }` of a connection; also accepted in the other `disk` sections.
    PeerDevice,
    /// `options { }`
    Options,
    /// `startup { }`
    Startup,
    /// `handlers { }`
    Handlers,
    /// `proxy { }`
    Proxy,
    /// `lockstep { }`, this program's own section.
    Lockstep,
}

impl Section {
    /// The keyword.
    #[must_use]
    pub const fn keyword(self) -> &'static str {
        match self {
            Self::Global => "global",
            Self::Net => "net",
            Self::Disk | Self::PeerDevice => "disk",
            Self::Options => "options",
            Self::Startup => "startup",
            Self::Handlers => "handlers",
            Self::Proxy => "proxy",
            Self::Lockstep => "lockstep",
        }
    }
}

/// What a bare number counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Things; `K`, `M`, `G` multiply.
    Count,
    /// Seconds; no suffix.
    Seconds,
    /// Tenths of a second; no suffix.
    Deciseconds,
    /// Milliseconds; no suffix.
    Milliseconds,
    /// Microseconds; no suffix.
    Microseconds,
    /// Bytes.
    Bytes,
    /// 512-byte sectors; with a suffix bytes.
    Sectors,
    /// KiB per second; with a suffix bytes per second.
    KibPerSecond,
}

impl Unit {
    /// How a message names it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Count => "",
            Self::Seconds => " s",
            Self::Deciseconds => " x 0.1 s",
            Self::Milliseconds => " ms",
            Self::Microseconds => " us",
            Self::Bytes => " bytes",
            Self::Sectors => " sectors of 512 bytes",
            Self::KibPerSecond => " KiB/s",
        }
    }

    /// Bytes in one unit, `None` for what is not a size.
    pub(crate) const fn bytes(self) -> Option<u64> {
        match self {
            Self::Bytes => Some(1),
            Self::Sectors => Some(512),
            Self::KibPerSecond => Some(1024),
            Self::Count | Self::Seconds | Self::Deciseconds | Self::Milliseconds | Self::Microseconds => None,
        }
    }
}

/// Which values an option takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A number with an optional suffix; limits are inclusive and in `unit`.
    Number {
        /// Unit of a bare number.
        unit: Unit,
        /// When not given.
        default: u64,
        /// Smallest.
        min: u64,
        /// Largest.
        max: u64,
    },
    /// `NAME;`, `NAME yes;`, `NAME no;`, `no-NAME;`.
    Bool {
        /// When not given.
        default: bool,
    },
    /// One of a list; the first character sequence in `values` that is equal, letters compared without case.
    Choice {
        /// All.
        values: &'static [&'static str],
        /// When not given.
        default: &'static str,
    },
    /// `off`, `majority`, `all` or a number 1..=32.
    Quorum,
    /// Anything up to so many characters.
    Text {
        /// Longest, in characters.
        max_len: usize,
    },
    /// `RES`, `RES/VOLUME` or a minor number.
    ResourceRef,
    /// Several words (host names, or arguments nobody reads).
    Words,
}

/// The oldest DRBD that knows an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// 8.3 or 8.4.
    V8,
    /// 8 only: later versions have dropped it.
    V8Only,
    /// 9.
    V9,
    /// None: lockstep's own.
    Lockstep,
}

/// What lockstep makes of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treatment {
    /// Changes what the replication does.
    Used,
    /// Checked and kept for the commands that show it or act on it.
    Known,
    /// Checked; a value other than the default earns one warning with the reason.
    AcceptedWithoutMeaning(&'static str),
}

/// One option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionSpec {
    /// As written.
    pub name: &'static str,
    /// Where it belongs.
    pub section: Section,
    /// Type, default and range.
    pub kind: Kind,
    /// Age.
    pub since: Since,
    /// Effect here.
    pub treatment: Treatment,
}

/// A value that was given and is in range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// In the option's unit.
    Number(u64),
    /// yes or no.
    Bool(bool),
    /// Everything else; several words are joined by one blank.
    Text(String),
}

/// An option with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Which option.
    pub spec: &'static OptionSpec,
    /// Its value.
    pub value: Value,
    /// The value as it was written, without quotes (`40M`), for `dump`.
    pub text: String,
}

/// Options that were given, in the order they were written; each at most once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OptionSet {
    settings: Vec<Setting>,
}

impl OptionSet {
    /// Whether nothing was given.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.settings.is_empty()
    }

    /// Everything that was given.
    pub fn iter(&self) -> impl Iterator<Item = &Setting> {
        self.settings.iter()
    }

    /// What was given for an option, `None` when nothing was.
    #[must_use]
    pub fn get(&self, spec: &OptionSpec) -> Option<&Setting> {
        self.settings.iter().find(|s| s.spec.name == spec.name)
    }

    /// Puts an option in; the value it replaces is returned.
    pub(crate) fn set(&mut self, setting: Setting) -> Option<Setting> {
        match self.settings.iter_mut().find(|s| s.spec.name == setting.spec.name) {
            Some(old) => Some(std::mem::replace(old, setting)),
            None => {
                self.settings.push(setting);
                None
            }
        }
    }

    pub(crate) fn remove(&mut self, spec: &OptionSpec) {
        self.settings.retain(|s| s.spec.name != spec.name);
    }

    /// This set, with everything that `weaker` has and this has not.
    pub(crate) fn or(mut self, weaker: &Self) -> Self {
        for setting in &weaker.settings {
            if self.get(setting.spec).is_none() {
                self.settings.push(setting.clone());
            }
        }
        self
    }

    /// The number given for an option, else its default, in the option's unit. 0 for an option that is no number.
    #[must_use]
    pub fn number(&self, spec: &OptionSpec) -> u64 {
        match (self.get(spec).map(|s| &s.value), spec.kind) {
            (Some(Value::Number(n)), _) => *n,
            (_, Kind::Number { default, .. }) => default,
            _ => 0,
        }
    }

    /// yes or no as given, else the default. False for an option of another type.
    #[must_use]
    pub fn flag(&self, spec: &OptionSpec) -> bool {
        match (self.get(spec).map(|s| &s.value), spec.kind) {
            (Some(Value::Bool(b)), _) => *b,
            (_, Kind::Bool { default }) => default,
            _ => false,
        }
    }

    /// The text given for an option, else the default of its list, else nothing.
    #[must_use]
    pub fn text(&self, spec: &OptionSpec) -> &str {
        match (self.get(spec).map(|s| &s.value), spec.kind) {
            (Some(Value::Text(t)), _) => t,
            (_, Kind::Choice { default, .. }) => default,
            (_, Kind::Quorum) => "off",
            _ => "",
        }
    }
}

impl Serialize for OptionSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.settings.len()))?;
        for setting in &self.settings {
            match &setting.value {
                Value::Number(n) => map.serialize_entry(setting.spec.name, n)?,
                Value::Bool(b) => map.serialize_entry(setting.spec.name, b)?,
                Value::Text(t) => map.serialize_entry(setting.spec.name, t)?,
            }
        }
        map.end()
    }
}

/// The known name closest to a misspelt one, when it is close enough to be meant.
pub(crate) fn nearest<'a>(wrong: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let limit = (wrong.len() / 3).clamp(1, 4);
    if !(3..=40).contains(&wrong.len()) {
        return None;
    }
    known.map(|k| (distance(wrong, k), k)).filter(|(d, _)| *d <= limit).min().map(|(_, k)| k)
}

/// Edits (insert, delete, replace, swap of neighbours) between two short names.
fn distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut before: Vec<usize> = Vec::new();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for i in 0..a.len() {
        let mut next = vec![i + 1];
        for j in 0..b.len() {
            let replace = row[j] + usize::from(!a[i].eq_ignore_ascii_case(&b[j]));
            let mut best = replace.min(row[j + 1] + 1).min(next[j] + 1);
            if i > 0 && j > 0 && a[i] == b[j - 1] && a[i - 1] == b[j] {
                best = best.min(before[j - 1] + 1);
            }
            next.push(best);
        }
        before = std::mem::replace(&mut row, next);
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_finger_finds_the_name_and_a_strange_word_does_not() {
        let known = ["timeout", "ping-timeout", "ping-int"];
        assert_eq!(nearest("timout", known.into_iter()), Some("timeout"));
        assert_eq!(nearest("pign-int", known.into_iter()), Some("ping-int"));
        assert_eq!(nearest("frobnicate", known.into_iter()), None);
        assert_eq!(distance("abcd", "abdc"), 1);
        assert_eq!(distance("", "abc"), 3);
    }
}
