//! The normalised text (ADM §12): columns and order of `drbdadm dump`, and valid input again.
use super::decl::{ConnectionDecl, HostDecl, HostKind, PathHost, VolumeDecl};
use super::lexer::is_word_byte;
use super::model::{Config, MetaDisk, Resource, Sections};
use super::options::{Kind, OptionSet, Section, Value};
use super::table;

/// Everything, or one resource, as seen from the node `node_name`. `None`: there is no such resource.
#[must_use]
pub fn dump(config: &Config, resource: Option<&str>, node_name: &str) -> Option<String> {
    let mut out = Text::default();
    match resource {
        Some(name) => out.resource(config.resource(name)?, node_name),
        None => {
            out.line(0, &format!("# {}", config.files.first().map_or("", |f| f)));
            out.global(&config.global);
            out.common(&config.common);
            for r in &config.resources {
                out.resource(r, node_name);
            }
        }
    }
    Some(out.0)
}

#[derive(Default)]
struct Text(String);

/// Quotes when the bare form would not come back as the same word.
fn quoted(text: &str) -> String {
    let bare = !text.is_empty()
        && text.len() <= super::lexer::WORD_MAX
        && text.bytes().all(|b| is_word_byte(b) && !matches!(b, b'%' | b'+'))
        && !table::ALL.iter().any(|o| o.name == text);
    if bare { text.to_owned() } else { format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")) }
}

impl Text {
    fn line(&mut self, level: usize, text: &str) {
        self.0.push_str(&format!("{}{text}\n", "    ".repeat(level)));
    }

    /// A statement whose value starts at column 25 of the line, whatever the level.
    fn statement(&mut self, level: usize, name: &str, value: &str) {
        let width = 24_usize.saturating_sub(4 * level);
        self.line(level, &format!("{name:<width$} {value};"));
    }

    fn global(&mut self, set: &OptionSet) {
        if set.is_empty() {
            return;
        }
        self.line(0, "global {");
        let order = [&table::DISABLE_IP_VERIFICATION, &table::MINOR_COUNT, &table::DIALOG_REFRESH];
        let first = order.iter().filter_map(|o| set.get(o));
        let is_first = |name: &str| order.iter().any(|o| o.name == name);
        for s in first.chain(set.iter().filter(|s| !is_first(s.spec.name))) {
            match (&s.value, s.spec.kind) {
                (Value::Bool(true), _) => self.line(1, &format!("{};", s.spec.name)),
                _ => self.line(1, &format!("{} {};", s.spec.name, quoted_value(&s.text, s.spec.kind))),
            }
        }
        self.line(0, "}");
        self.line(0, "");
    }

    fn common(&mut self, sections: &Sections) {
        if *sections == Sections::default() {
            return;
        }
        self.line(0, "common {");
        self.sections(1, sections);
        self.line(0, "}");
        self.line(0, "");
    }

    fn options(&mut self, level: usize, set: &OptionSet) {
        // Disk options come before those of the peer device, each in the order they were written.
        let disk = set.iter().filter(|s| s.spec.section != Section::PeerDevice);
        for s in disk.chain(set.iter().filter(|s| s.spec.section == Section::PeerDevice)) {
            let value = quoted_value(&s.text, s.spec.kind);
            self.line(level, format!("{:<16} {value:>3};", s.spec.name).as_str());
        }
    }

    fn section(&mut self, level: usize, keyword: &str, set: &OptionSet) {
        if !set.is_empty() {
            self.line(level, &format!("{keyword} {{"));
            self.options(level + 1, set);
            self.line(level, "}");
        }
    }

    fn sections(&mut self, level: usize, s: &Sections) {
        self.section(level, "options", &s.options);
        self.section(level, "net", &s.net);
        self.section(level, "disk", &s.disk);
        self.section(level, "startup", &s.startup);
        self.section(level, "proxy", &s.proxy);
        self.section(level, "handlers", &s.handlers);
        self.section(level, "lockstep", &s.lockstep);
    }

    fn volume(&mut self, level: usize, v: &VolumeDecl) {
        let level = if v.implicit {
            level
        } else {
            self.line(level, &format!("volume {} {{", v.nr));
            level + 1
        };
        self.section(level, "disk", &v.options);
        if let Some(d) = &v.device {
            let name = d.value.name.as_ref().map(|n| format!("{n} ")).unwrap_or_default();
            self.statement(level, "device", &format!("{name}minor {}", d.value.minor));
        }
        if let Some(d) = &v.disk {
            let path = d.value.as_ref().map_or_else(|| "none".into(), |p| quoted(&p.to_string_lossy()));
            self.statement(level, "disk", &path);
        }
        match v.meta_disk.as_ref().map(|m| &m.value) {
            None => {}
            Some(MetaDisk::Internal) => self.statement(level, "meta-disk", "internal"),
            Some(MetaDisk::External { path }) => {
                self.line(level, &format!("{:<16} {};", "meta-disk", quoted(&path.to_string_lossy())));
            }
            Some(MetaDisk::Indexed { path, index }) => {
                self.line(
                    level,
                    &format!("{:<16} {} [{index}];", "meta-disk", quoted(&path.to_string_lossy())),
                );
            }
        }
        if let Some(t) = v.tiebreaker {
            self.statement(level, "tiebreaker", if t { "yes" } else { "no" });
        }
        if !v.implicit {
            self.line(level - 1, "}");
        }
    }

    fn host(&mut self, h: &HostDecl, node_id: u32) {
        let names = h.names.iter().map(|n| quoted(n)).collect::<Vec<_>>().join(" ");
        let address = h.address.as_ref().map(|a| a.value.to_string()).unwrap_or_default();
        match &h.kind {
            HostKind::On => self.line(1, &format!("on {names} {{")),
            HostKind::Floating => self.line(1, &format!("{:<16} {address} {{", "floating")),
            HostKind::StackedOnTopOf(lower) => {
                self.line(1, &format!("stacked-on-top-of {} {{", quoted(lower)));
            }
        }
        self.line(2, &format!("node-id {node_id};"));
        self.section(2, "options", &h.options);
        self.section(2, "disk", &h.disk);
        for v in &h.volumes {
            self.volume(2, v);
        }
        if h.address.is_some() && h.kind != HostKind::Floating {
            self.line(2, &format!("{:<16} {address};", "address"));
        }
        for p in &h.proxy {
            self.line(
                2,
                &format!("proxy on {} {{", p.hosts.iter().map(|n| quoted(n)).collect::<Vec<_>>().join(" ")),
            );
            for (name, a) in [("inside", &p.inside), ("outside", &p.outside)] {
                if let Some(a) = a {
                    self.line(3, &format!("{name:<16} {};", a.value));
                }
            }
            self.line(2, "}");
        }
        self.section(2, "lockstep", &h.lockstep);
        self.line(1, "}");
    }

    fn path_host(&mut self, level: usize, h: &PathHost) {
        let name = quoted(&h.name);
        match (&h.address, h.port) {
            (Some(a), _) => self.line(level, &format!("host {name} address {};", a.value)),
            (None, Some(port)) => self.line(level, &format!("host {name} port {port};")),
            (None, None) => self.line(level, &format!("host {name};")),
        }
    }

    fn connection(&mut self, c: &ConnectionDecl) {
        self.line(1, "connection {");
        for h in &c.hosts {
            self.path_host(2, h);
        }
        for path in &c.paths {
            self.line(2, "path {");
            for h in path {
                self.path_host(3, h);
            }
            self.line(2, "}");
        }
        self.section(2, "net", &c.net);
        self.section(2, "disk", &c.disk);
        for (nr, set) in &c.volumes {
            self.line(2, &format!("volume {nr} {{"));
            self.section(3, "disk", set);
            self.line(2, "}");
        }
        self.line(1, "}");
    }

    fn resource(&mut self, r: &Resource, node_name: &str) {
        let own = r.host(node_name);
        let ignored = if own.is_some() { "not ignored" } else { "ignored" };
        let stacked = if own.is_some_and(|h| h.stacked_on.is_some()) { "stacked" } else { "not stacked" };
        self.line(0, &format!("# resource {} on {node_name}: {ignored}, {stacked}", r.name));
        self.line(0, &format!("# defined at {}:{}", r.defined_at.file, r.defined_at.line));
        self.line(0, &format!("resource {} {{", quoted(&r.name)));
        for v in &r.decl.volumes {
            self.volume(1, v);
        }
        for (h, host) in r.decl.hosts.iter().zip(&r.hosts) {
            self.host(h, host.node_id);
        }
        for c in &r.decl.connections {
            self.connection(c);
        }
        for m in &r.decl.meshes {
            self.line(1, "connection-mesh {");
            let hosts = m.hosts.iter().map(|h| quoted(&h.value)).collect::<Vec<_>>().join(" ");
            self.line(2, &format!("hosts {hosts};"));
            self.section(2, "net", &m.net);
            self.line(1, "}");
        }
        if let Some(file) = &r.decl.template_file {
            self.line(1, &format!("template-file {};", quoted(file)));
        }
        self.sections(1, &r.decl.sections);
        self.line(0, "}");
        self.line(0, "");
    }
}

/// Only free text needs quotes; numbers and words of a list are bare by construction.
fn quoted_value(text: &str, kind: Kind) -> String {
    match kind {
        Kind::Text { .. } | Kind::ResourceRef => quoted(text),
        Kind::Number { .. } | Kind::Bool { .. } | Kind::Choice { .. } | Kind::Quorum => text.to_owned(),
        Kind::Words => text.split(' ').map(quoted).collect::<Vec<_>>().join(" "),
    }
}
