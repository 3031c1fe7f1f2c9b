//! Statements to typed declarations: hosts, volumes, connections.
use super::decl::{At, ConnectionDecl, HostDecl, MeshDecl, PathHost, Place, ProxyDecl, VolumeDecl};
use super::model::Address;
use super::options::Section;
use super::read::{Reader, Seen, once};
use super::source::Span;
use super::tree::{Node, Word};
use super::value;

const DISK: &[Section] = &[Section::Disk, Section::PeerDevice];
const VOLUME_WORDS: &[&str] = &["device", "disk", "meta-disk", "flexible-meta-disk", "tiebreaker", "skip"];
const HOST_WORDS: &[&str] = &[
    "address",
    "device",
    "disk",
    "meta-disk",
    "flexible-meta-disk",
    "node-id",
    "volume",
    "options",
    "proxy",
    "lockstep",
    "tiebreaker",
    "skip",
];
/// Highest volume number.
const VOLUME_MAX: u16 = 65534;

impl Reader<'_> {
    fn number_word<T>(&mut self, word: Word, what: &str, max: T) -> Option<T>
    where
        T: std::str::FromStr + PartialOrd + std::fmt::Display + Copy,
    {
        let text = self.text(word);
        match text.parse::<T>() {
            Ok(n) if n <= max => Some(n),
            _ => {
                self.hinted(
                    word.span,
                    (format!("'{text}' is not a {what}"), format!("the range is 0..{max}")),
                );
                None
            }
        }
    }

    /// `( family )? ADDRESS` made of all these words.
    pub(crate) fn address(&mut self, words: &[Word]) -> Option<At<Address>> {
        let texts: Vec<String> = words.iter().map(|w| self.text(*w)).collect();
        let family = texts.first().map(String::as_str);
        let family = family.filter(|f| matches!(*f, "ipv4" | "ipv6" | "ssocks" | "sci" | "sdp"));
        let rest = texts[usize::from(family.is_some())..].concat();
        let span = match (words.first(), words.last()) {
            (Some(a), Some(b)) => a.span.to(b.span),
            _ => Span::default(),
        };
        match value::address(family, &rest) {
            Ok(value) => Some(At { value, span }),
            Err(problem) => {
                self.hinted(span, problem);
                None
            }
        }
    }

    /// A statement about a volume, directly in a resource or host or a whole `volume` block. False: it is none.
    pub(crate) fn volume_statement(
        &mut self,
        node: &Node,
        keyword: &str,
        volumes: &mut Vec<VolumeDecl>,
        owner: &str,
        seen: &mut Seen,
    ) -> bool {
        if keyword == "volume" {
            let words = self.words(node);
            let Some(word) = words.get(1).copied() else {
                self.error(node.span.after(), "expected a volume number here");
                return true;
            };
            let Some(nr) = self.number_word(word, "volume number", VOLUME_MAX) else { return true };
            once(self.sink, seen, "volume section", &format!("{owner}:volume {nr}"), node.span);
            let mut volume = VolumeDecl { nr, span: Place(node.span), ..VolumeDecl::default() };
            let mut seen = Seen::new();
            for n in self.block(node).unwrap_or(&[]).iter().filter(|n| !n.bad) {
                let keyword = self.raw.words(n).first().map(|w| self.text(*w)).unwrap_or_default();
                if !self.volstmt(n, &keyword, &mut volume, &format!("{owner}:volume {nr}"), &mut seen) {
                    self.unexpected(n, &format!("volume {nr}"), VOLUME_WORDS);
                }
            }
            volumes.push(volume);
            return true;
        }
        if !VOLUME_WORDS.contains(&keyword) || (keyword == "disk" && node.block.is_some()) {
            return false;
        }
        let at = volumes.iter().position(|v| v.implicit).unwrap_or_else(|| {
            volumes.push(VolumeDecl { implicit: true, span: Place(node.span), ..VolumeDecl::default() });
            volumes.len() - 1
        });
        self.volstmt(node, keyword, &mut volumes[at], owner, seen)
    }

    fn volstmt(
        &mut self,
        node: &Node,
        keyword: &str,
        v: &mut VolumeDecl,
        owner: &str,
        seen: &mut Seen,
    ) -> bool {
        let words = self.words(node);
        let texts = self.texts(node);
        let args: Vec<&str> = texts.iter().skip(1).map(String::as_str).collect();
        if !VOLUME_WORDS.contains(&keyword) {
            return false;
        }
        if keyword == "disk" && node.block.is_some() {
            once(self.sink, seen, "disk section", &format!("{owner}:disk section"), node.span);
            let nodes = self.block(node).unwrap_or(&[]);
            self.one_set(nodes, DISK, "disk", &mut v.options);
            return true;
        }
        let name = if keyword == "flexible-meta-disk" { "meta-disk" } else { keyword };
        once(self.sink, seen, &format!("{name} statement"), &format!("{owner}:{name}"), node.span);
        if args.is_empty() || node.block.is_some() {
            self.arity(node, &words, 1);
            return true;
        }
        let span = words[1].span.to(node.span);
        match keyword {
            "device" => match value::device(&args) {
                Ok(value) => v.device = Some(At { value, span }),
                Err(problem) => self.hinted(span, problem),
            },
            "disk" => {
                if self.arity(node, &words, 1) {
                    let value = (args[0] != "none").then(|| args[0].into());
                    v.disk = Some(At { value, span });
                }
            }
            "tiebreaker" => match args.as_slice() {
                ["yes"] => v.tiebreaker = Some(true),
                ["no"] => v.tiebreaker = Some(false),
                _ => self.error(span, "expected yes or no"),
            },
            _ => match value::meta_disk(&args) {
                Ok(value) => v.meta_disk = Some(At { value, span }),
                Err(problem) => self.hinted(span, problem),
            },
        }
        true
    }

    /// Inside of `on`, `floating`, `stacked-on-top-of`.
    pub(crate) fn host_block(&mut self, nodes: &[Node], resource: &str, h: &mut HostDecl) {
        let owner = format!("{resource}:{}", h.names.first().map_or("", |n| n));
        let mut seen = Seen::new();
        for node in nodes.iter().filter(|n| !n.bad) {
            let words = self.words(node);
            let keyword = words.first().map(|w| self.text(*w)).unwrap_or_default();
            match keyword.as_str() {
                "address" => {
                    once(self.sink, &mut seen, "address statement", &format!("{owner}:address"), node.span);
                    if h.address.is_some() && seen.len() == 1 {
                        self.error(node.span, "a floating host has its address in its head");
                    } else if words.len() < 2 {
                        self.arity(node, &words, 1);
                    } else if let Some(address) = self.address(&words[1..]) {
                        h.address = Some(address);
                    }
                }
                "node-id" => {
                    once(self.sink, &mut seen, "node-id statement", &format!("{owner}:node-id"), node.span);
                    if self.arity(node, &words, 1)
                        && let Some(value) = self.number_word(words[1], "node id", 31)
                    {
                        h.node_id = Some(At { value, span: words[1].span });
                    }
                }
                "options" | "lockstep" | "disk" if node.block.is_some() => {
                    let (sections, set): (&[Section], _) = match keyword.as_str() {
                        "options" => (&[Section::Options], &mut h.options),
                        "disk" => (DISK, &mut h.disk),
                        _ => (&[Section::Lockstep], &mut h.lockstep),
                    };
                    once(
                        self.sink,
                        &mut seen,
                        &format!("{keyword} section"),
                        &format!("{owner}:{keyword} section"),
                        node.span,
                    );
                    self.one_set(node.block.as_deref().unwrap_or(&[]), sections, &keyword, set);
                }
                "proxy" => self.host_proxy(node, h),
                _ if self.volume_statement(node, &keyword, &mut h.volumes, &owner, &mut seen) => {}
                _ => self.unexpected(node, "a host section", HOST_WORDS),
            }
        }
    }

    fn host_proxy(&mut self, node: &Node, h: &mut HostDecl) {
        let texts = self.texts(node);
        let mut proxy = ProxyDecl { hosts: texts.iter().skip(2).cloned().collect(), ..ProxyDecl::default() };
        if texts.get(1).map(String::as_str) != Some("on") || proxy.hosts.is_empty() {
            return self.hinted(
                node.span,
                ("expected host names here".into(), "write proxy on HOST { ... }".into()),
            );
        }
        for n in self.block(node).unwrap_or(&[]).iter().filter(|n| !n.bad) {
            let words = self.words(n);
            let keyword = words.first().map(|w| self.text(*w)).unwrap_or_default();
            match keyword.as_str() {
                "inside" => proxy.inside = self.address(&words[1..]),
                "outside" => proxy.outside = self.address(&words[1..]),
                _ if table_has_proxy(&keyword) => {}
                _ => self.unexpected(n, "section 'proxy'", &["inside", "outside"]),
            }
        }
        h.proxy.push(proxy);
    }

    /// `host NAME ( address ADDRESS | port N )? ( via proxy ... )?`
    fn path_host(&mut self, node: &Node) -> Option<PathHost> {
        let words = self.words(node);
        let texts = self.texts(node);
        let Some(name) = texts.get(1) else {
            self.arity(node, &words, 1);
            return None;
        };
        let mut host = PathHost { name: name.clone(), span: Place(node.span), ..PathHost::default() };
        let end = texts.iter().position(|t| t == "via").unwrap_or(texts.len()).max(2);
        match texts.get(2).map(String::as_str) {
            None | Some("via") => {}
            Some("address") => host.address = Some(self.address(&words[3.min(end)..end])?),
            Some("port") if end == 4 => host.port = self.number_word(words[3], "port", 65535_u16),
            Some(other) => {
                let message = format!("unexpected '{other}' after the host name");
                self.hinted(words[2].span, (message, "write address ADDRESS or port N".into()));
            }
        }
        Some(host)
    }

    /// Inside of `connection`.
    pub(crate) fn connection(&mut self, nodes: &[Node], c: &mut ConnectionDecl) {
        let mut seen = Seen::new();
        for node in nodes.iter().filter(|n| !n.bad) {
            let keyword = self.raw.words(node).first().map(|w| self.text(*w)).unwrap_or_default();
            if matches!(keyword.as_str(), "net" | "disk") {
                once(
                    self.sink,
                    &mut seen,
                    &format!("{keyword} section"),
                    &format!("connection:{keyword}"),
                    node.span,
                );
            }
            match keyword.as_str() {
                "host" => c.hosts.extend(self.path_host(node)),
                "path" => {
                    let mut path = Vec::new();
                    for n in self.block(node).unwrap_or(&[]).iter().filter(|n| !n.bad) {
                        if self.texts(n).first().is_some_and(|t| t == "host") {
                            path.extend(self.path_host(n));
                        } else {
                            self.unexpected(n, "section 'path'", &["host"]);
                        }
                    }
                    if path.len() != 2 {
                        self.error(node.span, format!("a path has two hosts, not {}", path.len()));
                    }
                    c.paths.push(path);
                }
                "net" => {
                    let nodes = self.block(node).unwrap_or(&[]);
                    self.one_set(nodes, &[Section::Net], "net", &mut c.net);
                }
                "disk" => {
                    let nodes = self.block(node).unwrap_or(&[]);
                    self.one_set(nodes, &[Section::PeerDevice], "disk", &mut c.disk);
                }
                "volume" => self.connection_volume(node, c, &mut seen),
                _ => self.unexpected(
                    node,
                    "section 'connection'",
                    &["host", "path", "net", "disk", "volume", "skip"],
                ),
            }
        }
    }

    fn connection_volume(&mut self, node: &Node, c: &mut ConnectionDecl, seen: &mut Seen) {
        let words = self.words(node);
        let Some(word) = words.get(1).copied() else {
            return self.error(node.span.after(), "expected a volume number here");
        };
        let Some(nr) = self.number_word(word, "volume number", VOLUME_MAX) else { return };
        once(self.sink, seen, "volume section", &format!("connection:volume {nr}"), node.span);
        let mut set = super::options::OptionSet::default();
        for n in self.block(node).unwrap_or(&[]).iter().filter(|n| !n.bad) {
            if self.texts(n).first().is_some_and(|t| t == "disk") {
                let nodes = self.block(n).unwrap_or(&[]);
                self.one_set(nodes, &[Section::PeerDevice], "disk", &mut set);
            } else {
                self.unexpected(n, "a volume of a connection", &["disk"]);
            }
        }
        c.volumes.push((nr, set));
    }

    /// Inside of `connection-mesh`.
    pub(crate) fn mesh(&mut self, nodes: &[Node], m: &mut MeshDecl) {
        for node in nodes.iter().filter(|n| !n.bad) {
            let words = self.words(node);
            match words.first().map(|w| self.text(*w)).as_deref() {
                Some("hosts") => {
                    for w in &words[1..] {
                        m.hosts.push(At { value: self.text(*w), span: w.span });
                    }
                }
                Some("net") => {
                    let nodes = self.block(node).unwrap_or(&[]);
                    self.one_set(nodes, &[Section::Net], "net", &mut m.net);
                }
                _ => self.unexpected(node, "section 'connection-mesh'", &["hosts", "net"]),
            }
        }
    }
}

fn table_has_proxy(name: &str) -> bool {
    name == "plugin" || super::table::find(&[Section::Proxy], name).is_some()
}
