//! Statements to typed declarations: options and the sections that hold them. Hosts and connections are in `read_host`.
use super::decl::{ConnectionDecl, HostDecl, HostKind, MeshDecl, Place, ResourceDecl};
use super::diagnostics::{Problem, Sink};
use super::lexer::TokenKind;
use super::model::Sections;
use super::options::{Kind, OptionSet, OptionSpec, Section, Setting, Treatment, Value, nearest};
use super::source::{Sources, Span};
use super::table;
use super::tree::{Node, RawConfig, Word, text_of};
use super::value;
use std::collections::{BTreeMap, BTreeSet};

/// Where `disk { }` options of a resource, host or volume may come from; `fencing` moved to `net` in 9.
const DISK: &[Section] = &[Section::Disk, Section::PeerDevice];
const SYNCER: &[Section] = &[Section::Net, Section::PeerDevice, Section::Disk, Section::Options];
const RESOURCE_WORDS: &[&str] = &[
    "protocol",
    "on",
    "floating",
    "stacked-on-top-of",
    "device",
    "disk",
    "meta-disk",
    "flexible-meta-disk",
    "volume",
    "net",
    "syncer",
    "startup",
    "handlers",
    "options",
    "proxy",
    "connection",
    "connection-mesh",
    "template-file",
    "lockstep",
    "tiebreaker",
    "skip",
];

/// Reads the statements of one file.
pub(crate) struct Reader<'a> {
    pub(crate) sources: &'a Sources,
    pub(crate) raw: &'a RawConfig,
    pub(crate) sink: &'a mut Sink,
    /// Options without meaning that were mentioned already.
    pub(crate) warned: &'a mut BTreeSet<&'static str>,
}

/// First places of things that may occur once.
pub(crate) type Seen = BTreeMap<String, Span>;

/// Reports the second use of something.
pub(crate) fn once(sink: &mut Sink, seen: &mut Seen, what: &str, name: &str, span: Span) -> bool {
    // A `disk` statement and a `disk` section are two things.
    let key = format!("{what} {name}");
    match seen.get(&key) {
        None => {
            seen.insert(key, span);
            true
        }
        Some(first) => {
            sink.push(
                Problem::error(span, format!("conflicting use of {what} '{name}' ..."))
                    .note(*first, format!("{what} '{name}' first used here.")),
            );
            false
        }
    }
}

impl Reader<'_> {
    pub(crate) fn words(&self, node: &Node) -> Vec<Word> {
        self.raw.words(node).to_vec()
    }

    pub(crate) fn text(&self, word: Word) -> String {
        text_of(self.sources, word).into_owned()
    }

    pub(crate) fn texts(&self, node: &Node) -> Vec<String> {
        self.raw.words(node).iter().map(|w| self.text(*w)).collect()
    }

    pub(crate) fn error(&mut self, span: Span, message: impl Into<String>) {
        self.sink.push(Problem::error(span, message));
    }

    pub(crate) fn hinted(&mut self, span: Span, (message, hint): (String, String)) {
        let problem = Problem::error(span, message);
        self.sink.push(if hint.is_empty() { problem } else { problem.hint(hint) });
    }

    /// A statement that does not belong here.
    pub(crate) fn unexpected(&mut self, node: &Node, place: &str, known: &[&str]) {
        if self.sink.full() {
            return self.error(node.span, "unexpected statement");
        }
        let Some(first) = self.raw.words(node).first().copied() else { return };
        let word = self.text(first);
        let mut problem = Problem::error(first.span, format!("unexpected '{word}' in {place}"));
        let option_of = table::ALL.iter().find(|o| o.name == word);
        if let Some(name) = nearest(&word, known.iter().copied()).filter(|n| *n != word) {
            problem = problem.hint(format!("did you mean '{name}'?"));
        } else if let Some(option) = option_of {
            problem = problem.hint(format!("'{word}' belongs in section '{}'", option.section.keyword()));
        } else if RESOURCE_WORDS.contains(&word.as_str())
            || matches!(word.as_str(), "resource" | "common" | "global")
        {
            problem = problem.hint("is a '}' missing before it?");
        }
        self.sink.push(problem);
    }

    /// The block of a section; says so when there is none.
    pub(crate) fn block<'n>(&mut self, node: &'n Node) -> Option<&'n [Node]> {
        if node.block.is_none() {
            self.sink.push(
                Problem::error(node.span.after(), "expected '{' here")
                    .hint("this is a section, not a statement"),
            );
        }
        node.block.as_deref()
    }

    /// No block and exactly `count` words after the keyword.
    pub(crate) fn arity(&mut self, node: &Node, words: &[Word], count: usize) -> bool {
        if node.block.is_some() {
            self.sink.push(
                Problem::error(node.span.after(), "expected ';' here")
                    .hint("this is a statement, not a section"),
            );
            return false;
        }
        if let Some(extra) = words.get(count + 1) {
            let before = words[count].span;
            let problem = Problem::error(before.after(), "expected ';' here");
            let hint = if self.sources.same_line(before, extra.span) {
                format!("'{}' is one word too many", self.text(*extra))
            } else {
                "a ';' is missing at the end of this line".into()
            };
            self.sink.push(problem.hint(hint));
            return false;
        }
        if words.len() <= count {
            self.error(node.span.after(), "expected a value here");
            return false;
        }
        true
    }

    /// Reads the options of a section and hands each to `put`.
    pub(crate) fn options(
        &mut self,
        nodes: &[Node],
        sections: &[Section],
        title: &str,
        put: &mut dyn FnMut(Setting) -> bool,
    ) {
        for node in nodes.iter().filter(|n| !n.bad) {
            if let Some(setting) = self.option(node, sections, title) {
                let name = setting.spec.name;
                if put(setting) {
                    self.sink.push(Problem::warning(
                        node.span,
                        format!("this '{name}' replaces the one given before"),
                    ));
                }
            }
        }
    }

    fn option(&mut self, node: &Node, sections: &[Section], title: &str) -> Option<Setting> {
        let words = self.words(node);
        let first = *words.first()?;
        let name = self.text(first);
        if name == "_unknown" {
            return None;
        }
        if sections == [Section::Proxy] && name == "plugin" {
            return None;
        }
        let old_place = title == "syncer" || title == "handlers";
        let alias = table::ALIASES.iter().find(|(old, _)| old_place && *old == name).map(|(_, new)| *new);
        let mut negated = false;
        let spec = table::find(sections, alias.unwrap_or(&name)).or_else(|| {
            let spec = table::find(sections, name.strip_prefix("no-")?)?;
            negated = matches!(spec.kind, Kind::Bool { .. });
            negated.then_some(spec)
        });
        let Some(spec) = spec else {
            self.unknown_option(first.span, &name, sections, title);
            return None;
        };
        let (value, text) = if negated {
            if node.block.is_some() || words.len() > 1 {
                self.arity(node, &words, 0);
                return None;
            }
            (Value::Bool(false), "no".to_owned())
        } else {
            self.value(node, &words, spec)?
        };
        self.warn_without_meaning(node.span, spec, &value);
        // Only the 8.x init script read it; `dump` drops it too.
        if spec.name == table::BECOME_PRIMARY_ON.name {
            return None;
        }
        Some(Setting { spec, value, text })
    }

    fn warn_without_meaning(&mut self, span: Span, spec: &'static OptionSpec, value: &Value) {
        let Treatment::AcceptedWithoutMeaning(why) = spec.treatment else { return };
        let is_default = match (value, spec.kind) {
            (Value::Number(n), Kind::Number { default, .. }) => *n == default,
            (Value::Bool(b), Kind::Bool { default }) => *b == default,
            _ => false,
        };
        if !is_default && self.warned.insert(spec.name) {
            self.sink.push(Problem::warning(span, format!("'{}' has no effect here: {why}", spec.name)));
        }
    }

    fn unknown_option(&mut self, span: Span, name: &str, sections: &[Section], title: &str) {
        if self.sink.full() {
            return self.error(span, "unknown option");
        }
        let mut problem = Problem::error(span, format!("unknown option '{name}' in section '{title}'"));
        let here = table::ALL.iter().filter(|o| sections.contains(&o.section)).map(|o| o.name);
        if let Some(elsewhere) = table::ALL.iter().find(|o| o.name == name) {
            problem = problem.hint(format!("'{name}' belongs in section '{}'", elsewhere.section.keyword()));
        } else if let Some(near) = nearest(name, here) {
            problem = problem.hint(format!("did you mean '{near}'?"));
        } else if RESOURCE_WORDS.contains(&name) {
            problem = problem.hint("is a '}' missing before it?");
        }
        self.sink.push(problem);
    }

    /// The value of an option, checked.
    fn value(&mut self, node: &Node, words: &[Word], spec: &OptionSpec) -> Option<(Value, String)> {
        if matches!(spec.kind, Kind::Bool { .. }) && words.len() == 1 && node.block.is_none() {
            return Some((Value::Bool(true), "yes".into()));
        }
        if spec.kind == Kind::Words {
            let text = words[1..].iter().map(|w| self.text(*w)).collect::<Vec<_>>().join(" ");
            return Some((Value::Text(text.clone()), text));
        }
        if !self.arity(node, words, 1) {
            return None;
        }
        let word = words[1];
        let text = self.text(word);
        let expected = || format!("'{}' takes: {}", spec.name, value::range_text(spec.kind));
        let value = match spec.kind {
            Kind::Bool { .. } => match text.as_str() {
                "yes" => Value::Bool(true),
                "no" => Value::Bool(false),
                _ => {
                    self.hinted(word.span, (format!("'{text}' is neither yes nor no"), expected()));
                    return None;
                }
            },
            Kind::Number { unit, min, max, .. } => match value::number(&text, unit) {
                Ok(n) if (min..=max).contains(&n) => Value::Number(n),
                Ok(_) => {
                    let range = value::range_text(spec.kind);
                    self.hinted(
                        word.span,
                        (
                            format!("'{text}' is out of range for '{}'", spec.name),
                            format!("the range is {range}"),
                        ),
                    );
                    return None;
                }
                Err((message, hint)) => {
                    let hint = if hint.is_empty() {
                        format!("the range is {}", value::range_text(spec.kind))
                    } else {
                        hint
                    };
                    self.hinted(word.span, (message, hint));
                    return None;
                }
            },
            Kind::Choice { values, .. } => match values.iter().find(|v| v.eq_ignore_ascii_case(&text)) {
                Some(v) => return Some((Value::Text((*v).to_owned()), (*v).to_owned())),
                None => {
                    let near = nearest(&text, values.iter().copied());
                    let hint = near.map_or_else(expected, |n| format!("did you mean '{n}'? {}", expected()));
                    self.hinted(word.span, (format!("'{text}' is not a value of '{}'", spec.name), hint));
                    return None;
                }
            },
            Kind::Quorum => match text.parse::<u32>() {
                Ok(1..=32) => Value::Text(text.clone()),
                _ if matches!(text.as_str(), "off" | "majority" | "all") => Value::Text(text.clone()),
                _ => {
                    self.hinted(
                        word.span,
                        (format!("'{text}' is not a value of '{}'", spec.name), expected()),
                    );
                    return None;
                }
            },
            Kind::Text { max_len } if text.chars().count() > max_len => {
                self.hinted(word.span, (format!("the value of '{}' is too long", spec.name), expected()));
                return None;
            }
            Kind::Text { .. } | Kind::ResourceRef | Kind::Words => Value::Text(text.clone()),
        };
        Some((value, text))
    }

    /// Options of one section into one set.
    pub(crate) fn one_set(&mut self, nodes: &[Node], sections: &[Section], title: &str, set: &mut OptionSet) {
        self.options(nodes, sections, title, &mut |s| set.set(s).is_some());
    }

    /// An option section that `common` and `resource` share. False: it is none.
    fn section(
        &mut self,
        node: &Node,
        keyword: &str,
        at: &mut Sections,
        seen: &mut Seen,
        owner: &str,
    ) -> bool {
        let (sections, what): (&[Section], &str) = match keyword {
            "net" => (&[Section::Net], "net section"),
            "disk" => (DISK, "disk section"),
            "syncer" => (SYNCER, "syncer section"),
            "startup" => (&[Section::Startup], "startup section"),
            "handlers" => (&[Section::Handlers], "handlers section"),
            "options" => (&[Section::Options], "resource options section"),
            "proxy" => (&[Section::Proxy], "proxy section"),
            "lockstep" => (&[Section::Lockstep], "lockstep section"),
            _ => return false,
        };
        once(self.sink, seen, what, &format!("{owner}:{keyword}"), node.span);
        if let Some(extra) = self.raw.words(node).get(1).copied() {
            self.error(extra.span, "expected '{' here");
        }
        let Some(nodes) = self.block(node) else { return true };
        let fencing = [Section::Disk, Section::PeerDevice, Section::Net];
        for n in nodes.iter().filter(|n| !n.bad) {
            // 8.4 had `fencing` here; no other net option may come along.
            let old =
                keyword == "disk" && self.raw.words(n).first().is_some_and(|w| self.text(*w) == "fencing");
            let sections = if old { &fencing } else { sections };
            self.options(std::slice::from_ref(n), sections, keyword, &mut |s| put(at, s));
        }
        true
    }

    /// `common { }`
    pub(crate) fn common(&mut self, nodes: &[Node]) -> Sections {
        let mut sections = Sections::default();
        let mut seen = Seen::new();
        for node in nodes.iter().filter(|n| !n.bad) {
            let keyword = self.raw.words(node).first().map(|w| self.text(*w)).unwrap_or_default();
            if keyword == "protocol" {
                self.options(std::slice::from_ref(node), &[Section::Net], "common", &mut |s| {
                    put(&mut sections, s)
                });
            } else if !self.section(node, &keyword, &mut sections, &mut seen, "common") {
                self.unexpected(
                    node,
                    "section 'common'",
                    &["net", "disk", "syncer", "startup", "handlers", "options"],
                );
            }
        }
        sections
    }

    /// `resource NAME { }`
    pub(crate) fn resource(&mut self, nodes: &[Node], name: &str) -> ResourceDecl {
        let mut r = ResourceDecl::default();
        let mut seen = Seen::new();
        for node in nodes.iter().filter(|n| !n.bad) {
            let Some(first) = self.raw.words(node).first().copied() else { continue };
            let keyword = self.text(first);
            let quoted = first.kind == TokenKind::Quoted;
            match keyword.as_str() {
                _ if quoted => self.unexpected(node, &format!("resource '{name}'"), RESOURCE_WORDS),
                "protocol" => {
                    self.options(std::slice::from_ref(node), &[Section::Net], "resource", &mut |s| {
                        put(&mut r.sections, s)
                    });
                }
                "on" | "floating" | "stacked-on-top-of" => {
                    self.host(node, &keyword, name, &mut r.hosts, &mut seen);
                }
                "connection" => {
                    let mut c = ConnectionDecl { span: Place(node.span), ..ConnectionDecl::default() };
                    if let Some(nodes) = self.block(node) {
                        self.connection(nodes, &mut c);
                        r.connections.push(c);
                    }
                }
                "connection-mesh" => {
                    let mut m = MeshDecl { span: Place(node.span), ..MeshDecl::default() };
                    if let Some(nodes) = self.block(node) {
                        self.mesh(nodes, &mut m);
                        r.meshes.push(m);
                    }
                }
                "template-file" => {
                    let words = self.words(node);
                    if self.arity(node, &words, 1) {
                        r.template_file = Some(self.text(words[1]));
                        let message = "'template-file' has no effect here: templates are not read";
                        self.sink.push(Problem::warning(node.span, message));
                    }
                }
                "ignore-on" => {}
                _ if self.volume_statement(node, &keyword, &mut r.volumes, name, &mut seen) => {}
                _ if self.section(node, &keyword, &mut r.sections, &mut seen, name) => {}
                _ => self.unexpected(node, &format!("resource '{name}'"), RESOURCE_WORDS),
            }
        }
        r
    }

    /// `on`, `floating` and `stacked-on-top-of`.
    fn host(
        &mut self,
        node: &Node,
        keyword: &str,
        resource: &str,
        hosts: &mut Vec<HostDecl>,
        seen: &mut Seen,
    ) {
        let mut h = HostDecl { span: Place(node.span), ..HostDecl::default() };
        let words = self.words(node);
        let names: Vec<String> = self.texts(node).split_off(1);
        if names.is_empty() {
            return self.error(node.span.after(), format!("expected a name after '{keyword}'"));
        }
        match keyword {
            "floating" => {
                h.kind = HostKind::Floating;
                let Some(address) = self.address(&words[1..]) else { return };
                h.names = vec![format!("{}:{}", address.value.ip, address.value.port)];
                h.address = Some(address);
            }
            "on" => h.names = names,
            _ => {
                h.kind = HostKind::StackedOnTopOf(names[0].clone());
                h.names = names;
                self.arity_of_header(&words);
            }
        }
        for (name, word) in h.names.clone().iter().zip(words.iter().skip(1)) {
            once(self.sink, seen, "host section", &format!("{resource}: {keyword} {name}"), word.span);
        }
        match &node.block {
            Some(nodes) => self.host_block(nodes, resource, &mut h),
            None if keyword == "floating" => {}
            None => drop(self.block(node)),
        }
        hosts.push(h);
    }

    fn arity_of_header(&mut self, words: &[Word]) {
        if let Some(extra) = words.get(2) {
            self.error(extra.span, "expected '{' here");
        }
    }
}

/// Puts an option into the set it belongs to; true when it replaces another.
fn put(sections: &mut Sections, setting: Setting) -> bool {
    let set = match setting.spec.section {
        Section::Net => &mut sections.net,
        Section::Disk | Section::PeerDevice => &mut sections.disk,
        Section::Options | Section::Global => &mut sections.options,
        Section::Startup => &mut sections.startup,
        Section::Handlers => &mut sections.handlers,
        Section::Proxy => &mut sections.proxy,
        Section::Lockstep => &mut sections.lockstep,
    };
    set.set(setting).is_some()
}
