//! Declarations to the model: inheritance, derived node ids, connections, and everything that may be used only once.
//!
//! Precedence, strongest first. `net`: connection, mesh, resource, common. `disk`: connection volume, connection, volume
//! of the host, volume of the resource, host, resource, common. `options`, `lockstep`: host, resource, common.
use super::decl::{ConnectionDecl, HostDecl, HostKind, PathHost, ResourceDecl, VolumeDecl};
use super::diagnostics::{Problem, Sink};
use super::model::{Address, Connection, Host, HostVolume, MetaDisk, Resource, Sections};
use super::options::{OptionSet, Value};
use super::read::{Seen, once};
use super::source::{Sources, Span};
use super::table;
use std::collections::{BTreeMap, BTreeSet};

/// A resource before it is resolved.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) span: Span,
    pub(crate) decl: ResourceDecl,
    /// An error in it was reported: what is missing may just have been unreadable, so nothing more is said about it.
    pub(crate) broken: bool,
}

/// Resolves all resources.
pub(crate) fn resolve(
    entries: Vec<Entry>,
    common: &Sections,
    sources: &Sources,
    sink: &mut Sink,
) -> Vec<Resource> {
    let mut r = Resolver { common, sources, sink, seen: Seen::new(), addresses: BTreeMap::new() };
    let stacked: BTreeMap<String, Vec<String>> = entries
        .iter()
        .map(|e| (e.name.clone(), e.decl.hosts.iter().flat_map(|h| h.names.clone()).collect()))
        .collect();
    let mut entries = entries;
    r.drop_unknown_dependencies(&mut entries);
    let mut out = Vec::new();
    for e in entries {
        if e.broken {
            let mut silent = Sink::default();
            std::mem::swap(r.sink, &mut silent);
            out.push(r.resource(e, &stacked));
            std::mem::swap(r.sink, &mut silent);
        } else {
            out.push(r.resource(e, &stacked));
        }
    }
    out
}

struct Resolver<'a> {
    common: &'a Sections,
    sources: &'a Sources,
    sink: &'a mut Sink,
    seen: Seen,
    /// Address of a host: resource that uses it, and where.
    addresses: BTreeMap<(String, Address), (String, Span)>,
}

impl Resolver<'_> {
    /// `resync-after` of something that does not exist is left out with a warning, as DRBD does.
    fn drop_unknown_dependencies(&mut self, entries: &mut [Entry]) {
        let names: BTreeSet<String> = entries.iter().map(|e| e.name.clone()).collect();
        let hosts = |e: &Entry| e.decl.hosts.iter().flat_map(|h| h.volumes.clone()).collect::<Vec<_>>();
        let minors: BTreeSet<String> = entries
            .iter()
            .flat_map(|e| e.decl.volumes.iter().cloned().chain(hosts(e)))
            .filter_map(|v| v.device.map(|d| d.value.minor.to_string()))
            .collect();
        for e in entries {
            let span = e.span;
            let mut sets: Vec<&mut OptionSet> = vec![&mut e.decl.sections.disk];
            sets.extend(e.decl.volumes.iter_mut().map(|v| &mut v.options));
            for h in &mut e.decl.hosts {
                sets.push(&mut h.disk);
                sets.extend(h.volumes.iter_mut().map(|v| &mut v.options));
            }
            for set in sets {
                let after = set.text(&table::RESYNC_AFTER).to_owned();
                let resource = after.rsplit_once('/').map_or(after.as_str(), |(r, _)| r);
                if !after.is_empty() && !names.contains(resource) && !minors.contains(&after) {
                    let message = format!(
                        "resource '{after}' mentioned in 'resync-after' of '{}' is not known",
                        e.name
                    );
                    self.sink.push(Problem::warning(span, message).hint("the option is left out"));
                    set.remove(&table::RESYNC_AFTER);
                }
            }
        }
    }

    fn resource(&mut self, e: Entry, stacked: &BTreeMap<String, Vec<String>>) -> Resource {
        let (s, c) = (&e.decl.sections, self.common);
        let mut resource = Resource {
            net: s.net.clone().or(&c.net),
            options: s.options.clone().or(&c.options),
            startup: s.startup.clone().or(&c.startup),
            handlers: s.handlers.clone().or(&c.handlers),
            lockstep: s.lockstep.clone().or(&c.lockstep),
            defined_at: self.sources.location(e.span),
            hosts: Vec::new(),
            connections: Vec::new(),
            name: e.name.clone(),
            decl: ResourceDecl::default(),
        };
        self.volumes_are_of_one_kind(&e);
        let ids = self.node_ids(&e);
        for (h, node_id) in e.decl.hosts.iter().zip(ids) {
            let host = self.host(&e, &resource, h, node_id, stacked);
            resource.hosts.push(host);
        }
        if e.decl.hosts.is_empty() {
            let problem = Problem::error(e.span, format!("resource '{}' has no host", e.name));
            self.sink.push(problem.hint("add a section: on HOST { address IP:PORT; ... }"));
        }
        resource.connections = self.connections(&e, &resource);
        let nets: Vec<&OptionSet> = resource.connections.iter().map(|c| &c.net).collect();
        for net in if nets.is_empty() { vec![&resource.net] } else { nets } {
            self.net_fits_together(&e, net);
        }
        resource.decl = e.decl;
        resource
    }

    fn net_fits_together(&mut self, e: &Entry, net: &OptionSet) {
        let protocol = net.text(&table::PROTOCOL);
        let name = &e.name;
        if net.flag(&table::ALLOW_TWO_PRIMARIES) && protocol != "C" {
            let message =
                format!("resource '{name}': 'allow-two-primaries' needs protocol C, not {protocol}");
            self.sink.push(Problem::error(e.span, message));
        }
        if net.text(&table::FENCING) == "resource-and-stonith" && protocol == "A" {
            let message = format!(
                "resource '{name}': 'fencing resource-and-stonith' freezes IO until the peer's state is known, which \
                 protocol A cannot promise; use protocol B or C"
            );
            self.sink.push(Problem::error(e.span, message));
        }
        let congestion = net.text(&table::ON_CONGESTION);
        if congestion != "block" && protocol != "A" {
            let message =
                format!("resource '{name}': 'on-congestion {congestion}' needs protocol A, not {protocol}");
            self.sink.push(Problem::error(e.span, message));
        }
    }

    /// Statements without a `volume` block mean volume 0; beside explicit volumes only `meta-disk` may stand alone.
    fn volumes_are_of_one_kind(&mut self, e: &Entry) {
        let all = || e.decl.volumes.iter().chain(e.decl.hosts.iter().flat_map(|h| &h.volumes));
        let Some(explicit) = all().find(|v| !v.implicit) else { return };
        if let Some(v) = all().find(|v| v.implicit && (v.device.is_some() || v.disk.is_some())) {
            self.sink.push(
                Problem::error(
                    v.span.0,
                    format!("in resource {}: you must not mix implicit and explicit volumes", e.name),
                )
                .hint("put this statement into volume 0 { }")
                .note(explicit.span.0, "an explicit volume is here"),
            );
        }
    }

    /// Given ids, or for a pair without any: 0 for the name that sorts first. Both nodes see the same names, whatever
    /// the order in the file and whatever their addresses are today.
    fn node_ids(&mut self, e: &Entry) -> Vec<u32> {
        let hosts = &e.decl.hosts;
        let mut seen = Seen::new();
        for id in hosts.iter().filter_map(|h| h.node_id.as_ref()) {
            once(self.sink, &mut seen, "node-id", &format!("{}:{}", e.name, id.value), id.span);
        }
        if let ([a, b], true) = (hosts.as_slice(), hosts.iter().all(|h| h.node_id.is_none())) {
            return if a.names <= b.names { vec![0, 1] } else { vec![1, 0] };
        }
        let mut ids = Vec::new();
        for h in hosts {
            if h.node_id.is_none() {
                let head = h.names.join(" ");
                self.sink.push(
                    Problem::error(
                        h.span.0,
                        format!("in resource {}, on {head} {{ ... }}: 'node-id' keyword missing.", e.name),
                    )
                    .hint("only a pair of hosts without any node-id gets them derived"),
                );
            }
            ids.push(h.node_id.as_ref().map_or(0, |id| id.value));
        }
        ids
    }

    fn host(
        &mut self,
        e: &Entry,
        resource: &Resource,
        h: &HostDecl,
        node_id: u32,
        stacked: &BTreeMap<String, Vec<String>>,
    ) -> Host {
        let (names, stacked_on) = match &h.kind {
            HostKind::StackedOnTopOf(lower) => {
                let names = stacked.get(lower).cloned().unwrap_or_default();
                if names.is_empty() {
                    let message = format!("stacked on top of '{lower}', which is not defined");
                    self.sink.push(Problem::error(h.span.0, message));
                }
                (names, Some(lower.clone()))
            }
            HostKind::On | HostKind::Floating => (h.names.clone(), None),
        };
        let volumes = self.volumes(e, h, stacked_on.as_deref());
        let has_paths = !e.decl.connections.is_empty();
        match &h.address {
            Some(address) => self.address_is_free(e, &names, &address.value, address.span),
            None if has_paths => {}
            None => {
                let message = format!(
                    "in resource {}, on {} {{ ... }}: 'address' keyword missing.",
                    e.name,
                    h.names.join(" ")
                );
                self.sink.push(Problem::error(h.span.0, message).hint("add: address IP:PORT;"));
            }
        }
        Host {
            names,
            floating: h.kind == HostKind::Floating,
            stacked_on,
            node_id,
            address: h.address.as_ref().map(|a| a.value.clone()),
            volumes,
            options: h.options.clone().or(&resource.options),
            lockstep: h.lockstep.clone().or(&resource.lockstep),
        }
    }

    fn address_is_free(&mut self, e: &Entry, names: &[String], address: &Address, span: Span) {
        for name in names {
            let key = (name.clone(), address.clone());
            match self.addresses.get(&key) {
                Some((other, first)) if *other != e.name => {
                    let problem = Problem::error(span, format!("conflicting use of address '{address}' ..."))
                        .note(*first, format!("address '{address}' first used here, by resource {other}."));
                    self.sink.push(problem);
                    return;
                }
                Some(_) => {}
                None => drop(self.addresses.insert(key, (e.name.clone(), span))),
            }
        }
    }

    fn volumes(&mut self, e: &Entry, h: &HostDecl, stacked_on: Option<&str>) -> Vec<HostVolume> {
        // A lone `meta-disk` beside explicit volumes is their default, not a volume.
        let explicit = e.decl.volumes.iter().chain(&h.volumes).any(|v| !v.implicit);
        let real = |v: &&VolumeDecl| !v.implicit || !explicit;
        let bare = |vs: &[VolumeDecl]| vs.iter().find(|v| v.implicit).and_then(|v| v.meta_disk.clone());
        let default_meta = bare(&h.volumes).or_else(|| bare(&e.decl.volumes));
        let mut numbers: Vec<u16> =
            h.volumes.iter().chain(&e.decl.volumes).filter(real).map(|v| v.nr).collect();
        numbers.sort_unstable();
        numbers.dedup();
        if numbers.is_empty() {
            let message = format!("in resource {}, on {} {{ ... }}: no volume", e.name, h.names.join(" "));
            self.sink.push(
                Problem::error(h.span.0, message)
                    .hint("add: device /dev/drbd0; disk PATH; meta-disk internal;"),
            );
        }
        let find = |vs: &[VolumeDecl], nr: u16| {
            vs.iter().filter(real).find(|v| v.nr == nr).cloned().unwrap_or_default()
        };
        let mut out = Vec::new();
        for nr in numbers {
            let (own, base) = (find(&h.volumes, nr), find(&e.decl.volumes, nr));
            let options =
                own.options.or(&base.options).or(&h.disk).or(&e.decl.sections.disk).or(&self.common.disk);
            let place = format!("in resource {}, on {} {{ ... }}, volume {nr}", e.name, h.names.join(" "));
            let device = own.device.or(base.device);
            let disk = own.disk.or(base.disk);
            let meta = own.meta_disk.or(base.meta_disk).or_else(|| default_meta.clone());
            let Some(device) = device else {
                self.sink.push(
                    Problem::error(h.span.0, format!("{place}: 'device' keyword missing."))
                        .hint("add: device /dev/drbd0;"),
                );
                continue;
            };
            if disk.is_none() && stacked_on.is_none() {
                self.sink.push(
                    Problem::error(h.span.0, format!("{place}: 'disk' keyword missing."))
                        .hint("add: disk PATH; or disk none;"),
                );
            }
            let meta_disk = meta.as_ref().map_or(MetaDisk::Internal, |m| m.value.clone());
            for name in &h.names {
                once(
                    self.sink,
                    &mut self.seen,
                    "device-minor",
                    &format!("device-minor:{name}:{}", device.value.minor),
                    device.span,
                );
                if let Some(Some(path)) = disk.as_ref().map(|d| &d.value) {
                    let span = disk.as_ref().map_or(h.span.0, |d| d.span);
                    once(self.sink, &mut self.seen, "disk", &format!("disk:{name}:{}", path.display()), span);
                }
                let (what, slot) = match &meta_disk {
                    MetaDisk::Internal => continue,
                    MetaDisk::External { path } => ("disk", format!("disk:{name}:{}", path.display())),
                    MetaDisk::Indexed { path, index } => {
                        ("meta-disk", format!("meta-disk:{name}:{}[{index}]", path.display()))
                    }
                };
                let span = meta.as_ref().map_or(h.span.0, |m| m.span);
                once(self.sink, &mut self.seen, what, &slot, span);
            }
            out.push(HostVolume {
                nr,
                device: device.value.path(),
                minor: device.value.minor,
                disk: disk.and_then(|d| d.value),
                meta_disk,
                disk_options: options,
            });
        }
        out
    }

    fn connections(&mut self, e: &Entry, resource: &Resource) -> Vec<Connection> {
        let d = &e.decl;
        let pair_of = |a: &Host, b: &Host| [a.name().to_owned(), b.name().to_owned()];
        let plain = |a: &Host, b: &Host, net: OptionSet| Connection {
            hosts: pair_of(a, b),
            paths: a.address.iter().zip(&b.address).map(|(a, b)| [a.clone(), b.clone()]).collect(),
            net,
            peer_device: OptionSet::default(),
            volumes: Vec::new(),
        };
        let mut out: Vec<Connection> = Vec::new();
        if d.connections.is_empty() && d.meshes.is_empty() {
            return match resource.hosts.as_slice() {
                [a, b] => vec![plain(a, b, resource.net.clone())],
                [] | [_] => out,
                _ => {
                    let message = format!("resource '{}' has more than two 'on' sections", e.name);
                    let hint = "use explicit 'connection' sections or a 'connection-mesh' section";
                    self.sink.push(Problem::error(e.span, message).hint(hint));
                    out
                }
            };
        }
        for c in &d.connections {
            out.extend(self.connection(e, resource, c));
        }
        for m in &d.meshes {
            let mut hosts: Vec<&Host> = Vec::new();
            for name in &m.hosts {
                match resource.host(&name.value) {
                    Some(h) => hosts.push(h),
                    None => self.no_such_host(&name.value, name.span, e),
                }
            }
            // Quadratic in hosts of one mesh, of which a resource can have 32: node ids end at 31.
            for (i, a) in hosts.iter().enumerate().take(32) {
                for b in hosts[i + 1..].iter().take(32) {
                    let pair = pair_of(a, b);
                    let known = out
                        .iter()
                        .any(|c| c.hosts == pair || (c.hosts[0] == pair[1] && c.hosts[1] == pair[0]));
                    if !known {
                        out.push(plain(a, b, m.net.clone().or(&resource.net)));
                    }
                }
            }
        }
        out
    }

    fn no_such_host(&mut self, name: &str, span: Span, e: &Entry) {
        let message = format!("there is no 'on {name}' section in resource '{}'", e.name);
        self.sink.push(Problem::error(span, message));
    }

    fn connection(&mut self, e: &Entry, resource: &Resource, c: &ConnectionDecl) -> Option<Connection> {
        let ends: Vec<&PathHost> = if c.hosts.is_empty() {
            c.paths.iter().take(1).flatten().collect()
        } else {
            c.hosts.iter().collect()
        };
        let [a, b] = ends.as_slice() else {
            let message = format!("a connection has two hosts, not {}", ends.len());
            self.sink.push(Problem::error(c.span.0, message).hint("write host NAME; twice"));
            return None;
        };
        let mut pairs = Vec::new();
        let direct = [*a, *b];
        let paths: Vec<Vec<&PathHost>> = if c.paths.is_empty() {
            vec![direct.to_vec()]
        } else {
            c.paths.iter().map(|p| p.iter().collect()).collect()
        };
        for path in paths {
            let addresses: Vec<Address> =
                path.iter().filter_map(|end| self.end_address(e, resource, end)).collect();
            if let [x, y] = addresses.as_slice() {
                pairs.push([x.clone(), y.clone()]);
            }
        }
        let canonical = |n: &PathHost| resource.host(&n.name).map(|h| h.name().to_owned());
        Some(Connection {
            hosts: [canonical(a)?, canonical(b)?],
            paths: pairs,
            net: c.net.clone().or(&resource.net),
            peer_device: c.disk.clone(),
            volumes: c.volumes.clone(),
        })
    }

    fn end_address(&mut self, e: &Entry, resource: &Resource, end: &PathHost) -> Option<Address> {
        let Some(host) = resource.host(&end.name) else {
            self.no_such_host(&end.name, end.span.0, e);
            return None;
        };
        let mut address = end.address.as_ref().map(|a| a.value.clone()).or_else(|| host.address.clone());
        match &mut address {
            Some(address) => address.port = end.port.unwrap_or(address.port),
            None => {
                let message = format!("host '{}' has no address, here or in its section", end.name);
                self.sink.push(Problem::error(end.span.0, message).hint("write host NAME address IP:PORT;"));
            }
        }
        address
    }
}

/// Whether a setting is the number `n`.
pub(crate) fn is_number(set: &OptionSet, spec: &super::options::OptionSpec, n: u64) -> bool {
    set.get(spec).is_some_and(|s| s.value == Value::Number(n))
}
