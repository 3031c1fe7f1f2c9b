//! The commands: what each verb of drbdadm asks of the configuration, the metadata or the daemon, and
//! what it prints. Results go to `out`, everything said to a person to `err`.
use crate::admin::cli::{GlobalOptions, OptionalTargets, Target, Targets, Verb};
use crate::admin::client::{Client, ClientError};
use crate::admin::config::{MetaDisk, dump};
use crate::admin::control::{DaemonInfo, Reply, Request, ResourceVerb, VerbRequest};
use crate::admin::drbdmeta;
use crate::admin::explain;
use crate::admin::node::with_causes;
use crate::admin::outcome::{self, Failure};
use crate::admin::plan::{self, Loaded, LocalVolume, Source};
use crate::admin::status_json::status_json;
use crate::admin::status_text::{TextOptions, combined_conn_state, disk_pair, role_pair, status_text};
use crate::admin::view::ResourceView;
use crate::core::state::DiskState;
use crate::meta::flags;
use crate::units::VolumeNr;
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;

/// A verb that changes something may take this long unless `--timeout` says otherwise, seconds
/// (drbdadm's medium limit).
const CHANGE_LIMIT_S: u64 = 121;

/// One run of a command.
pub struct Session<'a> {
    global: &'a GlobalOptions,
    run_dir: PathBuf,
    client: Client,
    /// Asked once; `None` inside when there is no daemon.
    info: Option<Option<DaemonInfo>>,
    loaded: Option<(Source, Loaded)>,
    out: &'a mut dyn Write,
    err: &'a mut dyn Write,
}

impl std::fmt::Debug for Session<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("run_dir", &self.run_dir).finish_non_exhaustive()
    }
}

/// What one step of a verb is about.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Object {
    resource: String,
    volume: Option<VolumeNr>,
}

impl std::fmt::Display for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.volume {
            Some(volume) => write!(f, "{}/{}", self.resource, volume.0),
            None => f.write_str(&self.resource),
        }
    }
}

impl<'a> Session<'a> {
    /// A session with these options.
    #[must_use]
    pub fn new(global: &'a GlobalOptions, out: &'a mut dyn Write, err: &'a mut dyn Write) -> Self {
        let run_dir = plan::run_dir(global);
        let client = Client::new(&run_dir);
        Self { global, run_dir, client, info: None, loaded: None, out, err }
    }

    /// Carries out a verb; answers the exit code. Everything was said.
    pub fn run(&mut self, verb: &Verb) -> u8 {
        match self.try_run(verb) {
            Ok(code) => code,
            Err(failure) => self.complain(&failure),
        }
    }

    /// Says what failed; answers its exit code.
    pub fn complain(&mut self, failure: &Failure) -> u8 {
        say(self.err, &failure.text);
        failure.exit
    }

    fn try_run(&mut self, verb: &Verb) -> Result<u8, Failure> {
        use ResourceVerb as R;
        match verb {
            Verb::Up(targets) => self.change(targets, R::Up { attach: true, connect: true }),
            Verb::Adjust { targets, skip_disk, skip_net } => {
                self.change(targets, R::Up { attach: !skip_disk, connect: !skip_net })
            }
            Verb::NetOptions(targets) | Verb::DiskOptions(targets) => {
                self.change(targets, R::Up { attach: false, connect: false })
            }
            Verb::Down(targets) => self.change(targets, R::Down),
            Verb::Attach(targets) => self.change(targets, R::Attach),
            Verb::Detach { targets, force } => self.change(targets, R::Detach { force: *force }),
            Verb::Connect { targets, discard_my_data, tentative } => {
                self.change(targets, R::Connect { discard_my_data: *discard_my_data, tentative: *tentative })
            }
            Verb::Disconnect { targets, force } => self.change(targets, R::Disconnect { force: *force }),
            Verb::Primary { targets, force } => self.change(targets, R::Primary { force: *force }),
            Verb::Secondary(targets) => self.change(targets, R::Secondary),
            Verb::Invalidate { targets, reset_bitmap } if reset_bitmap == "no" => {
                self.change(targets, R::InvalidateMarked)
            }
            Verb::Invalidate { targets, .. } => self.change_or_meta(targets, R::Invalidate, "invalidate"),
            Verb::InvalidateRemote { targets, reset_bitmap } if reset_bitmap == "no" => {
                self.change(targets, R::InvalidateRemoteMarked)
            }
            Verb::InvalidateRemote { targets, .. } => self.change(targets, R::InvalidateRemote),
            Verb::Verify { targets, start, stop } => {
                self.change(targets, R::Verify { start: *start, stop: *stop })
            }
            Verb::PauseSync(targets) => self.change(targets, R::PauseSync),
            Verb::ResumeSync(targets) => self.change(targets, R::ResumeSync),
            Verb::Outdate(targets) => self.change_or_meta(targets, R::Outdate, "outdate"),
            Verb::NewCurrentUuid { targets, clear_bitmap } => {
                self.change(targets, R::NewCurrentUuid { clear_bitmap: *clear_bitmap })
            }
            Verb::Resize { targets, resize } => self.change(targets, resize.verb()),
            Verb::WaitConnect(targets) => self.change(targets, R::WaitConnect),
            Verb::WaitSync(targets) => self.change(targets, R::WaitSync),
            Verb::Role(targets) => self.query(targets, |view, _| vec![role_pair(view)]),
            Verb::Cstate(targets) => self.query(targets, |view, _| vec![combined_conn_state(view)]),
            Verb::Dstate(targets) => self.dstate(targets),
            Verb::Status { targets, json, statistics } => self.status_verb(targets, *json, *statistics),
            Verb::Explain { targets, json, last } => self.explain(targets, *json, *last),
            Verb::CreateMd { targets, force, al_stripes, al_stripe_size_kib, max_peers } => {
                if max_peers.is_some_and(|peers| peers > 1) {
                    say(self.err, "note: v08 metadata is for one peer; --max-peers is ignored\n");
                }
                let mut extra: Vec<OsString> = Vec::new();
                if *force {
                    extra.push("--force".into());
                }
                if (*al_stripes, *al_stripe_size_kib) != (1, 32) {
                    extra.push(format!("--al-stripes={al_stripes}").into());
                    extra.push(format!("--al-stripe-size-kB={al_stripe_size_kib}").into());
                }
                self.meta(targets, "create-md", &extra)
            }
            Verb::DumpMd(targets) => self.meta(targets, "dump-md", &[]),
            Verb::WipeMd { targets, force } => {
                let extra: &[OsString] = if *force { &["--force".into()] } else { &[] };
                self.meta(targets, "wipe-md", extra)
            }
            Verb::GetGi(targets) => self.gi(targets, "get-gi"),
            Verb::ShowGi(targets) => self.gi(targets, "show-gi"),
            Verb::Dump(targets) => self.dump(targets),
            Verb::ShNop => {
                let _parsed = self.config()?;
                Ok(outcome::OK)
            }
            Verb::ShResources => {
                let (source, loaded) = self.config()?;
                let names = loaded.names(&source.node);
                if !names.is_empty() {
                    self.line(&names.join(" "));
                }
                Ok(outcome::OK)
            }
            Verb::ShResource(targets) => self.per_resource(targets, |name, _| name.to_owned()),
            Verb::ShIp(targets) => self.per_resource(targets, |_, address| {
                address.map_or_else(String::new, |at| at.ip().to_string())
            }),
            Verb::ShDev(targets) => self.per_volume(targets, |volume| volume.device.display().to_string()),
            Verb::ShMinor(targets) => self.per_volume(targets, |volume| volume.minor.to_string()),
            Verb::ShLlDev(targets) => self.per_volume(targets, |volume| {
                volume.disk.as_ref().map_or_else(|| "none".to_owned(), |disk| disk.display().to_string())
            }),
            Verb::ShMdDev(targets) => self.per_volume(targets, |volume| {
                volume.meta_place().map_or_else(|| "none".to_owned(), |(path, _)| path.display().to_string())
            }),
            Verb::ShMdIdx(targets) => self.per_volume(targets, |volume| match &volume.meta_disk {
                MetaDisk::Internal => "internal".into(),
                MetaDisk::External { .. } => "flexible".into(),
                MetaDisk::Indexed { index, .. } => index.to_string(),
            }),
        }
    }

    /// The daemon's description of itself, `None` without a daemon.
    fn info(&mut self) -> Option<DaemonInfo> {
        if self.info.is_none() {
            let info = match self.client.ask(&Request::Info, drop) {
                Ok(Reply::Info(info)) => Some(info),
                Ok(_) | Err(_) => None,
            };
            self.info = Some(info);
        }
        self.info.clone().flatten()
    }

    /// The configuration: `-c`, else the daemon's, else the usual place. Warnings are said once.
    fn config(&mut self) -> Result<(Source, Loaded), Failure> {
        if let Some(known) = &self.loaded {
            return Ok(known.clone());
        }
        let mut global = self.global.clone();
        // A daemon knows best which node this is; standard input is read once, and not by asking twice.
        if (global.config.is_none() || global.node.is_none())
            && let Some(info) = self.info()
        {
            global.config = global.config.or(Some(info.config));
            global.node = global.node.or(Some(info.node));
        }
        let source = plan::source(&global)?;
        let loaded = plan::load(&source)?;
        for warning in &loaded.warnings {
            say(self.err, warning);
        }
        self.loaded = Some((source.clone(), loaded.clone()));
        Ok((source, loaded))
    }

    /// The objects that targets name; `all` = every resource of this node.
    fn objects(&mut self, targets: &[Target]) -> Result<Vec<Object>, Failure> {
        let (source, loaded) = self.config()?;
        let mut objects = Vec::new();
        for target in targets {
            match target {
                Target::All => objects.extend(
                    loaded.names(&source.node).into_iter().map(|resource| Object { resource, volume: None }),
                ),
                Target::One { resource, peer, volume } => {
                    let object = Object { resource: resource.clone(), volume: volume.map(VolumeNr) };
                    match loaded.find(resource, &source.node) {
                        Ok((found, host)) => {
                            if let Some(peer) = peer
                                && !found.peers_of(&source.node).any(|(_, other)| other.names.contains(peer))
                            {
                                let text = format!(
                                    "'{resource}:{peer}' not defined in your config (for this host).\n"
                                );
                                return Err(Failure::new(outcome::USAGE, text));
                            }
                            if let Some(nr) = volume
                                && host.volume(*nr).is_none()
                            {
                                return Err(plan::not_defined(&object.to_string()));
                            }
                        }
                        // Gone from the file but still up: it must be possible to take it down.
                        Err(mut failure) if self.views(Some(resource)).is_err() => {
                            if self.info().is_none() {
                                let note = format!(
                                    "  no lockstepd answers in {}; the names are those of {} for node {}\n",
                                    self.run_dir.display(),
                                    source.config.display(),
                                    source.node
                                );
                                failure.text.push_str(&note);
                            }
                            return Err(failure);
                        }
                        Err(_) => {}
                    }
                    objects.push(object);
                }
            }
        }
        Ok(objects)
    }

    /// The object's volumes of this node with the resource's name, from the configuration.
    fn volumes(&mut self, object: &Object) -> Result<Vec<LocalVolume>, Failure> {
        let (source, loaded) = self.config()?;
        let (_, host) = loaded.find(&object.resource, &source.node)?;
        let volumes = host.volumes.iter().map(LocalVolume::from);
        Ok(volumes.filter(|volume| object.volume.is_none_or(|nr| nr == volume.nr)).collect())
    }

    /// State of one or all resources from the daemon.
    ///
    /// # Errors
    /// No daemon, or no such resource.
    pub fn views(&mut self, resource: Option<&str>) -> Result<Vec<ResourceView>, Failure> {
        let mut views = Vec::new();
        let request = Request::Status { resource: resource.map(ToOwned::to_owned) };
        let last = self.client.ask(&request, |note| {
            if let Reply::Resource(view) = note {
                views.push(*view);
            }
        });
        match last {
            Ok(Reply::Done) => Ok(views),
            Ok(Reply::Failed { exit, text }) => Err(Failure::new(exit, text)),
            Ok(_) => Err(Failure::new(outcome::EXEC, "lockstepd gave an answer to another question\n")),
            Err(error) => Err(self.unreachable(&error)),
        }
    }

    fn unreachable(&self, error: &ClientError) -> Failure {
        let mut text = format!("{}\n", with_causes(error));
        match error {
            ClientError::NoDaemon { .. } => {
                let config = self
                    .global
                    .config
                    .as_ref()
                    .map_or_else(String::new, |path| format!(" -c {}", path.display()));
                let node =
                    self.global.node.as_ref().map_or_else(String::new, |node| format!(" --node {node}"));
                text.push_str(&format!(
                    "next: start it: lockstepd{config}{node} --run-dir {}\n      or, when it runs elsewhere, name its directory: --run-dir DIR or LOCKSTEP_RUN_DIR\n",
                    self.run_dir.display()
                ));
            }
            ClientError::Denied { .. } => text.push_str("next: run this as root or as the daemon's user\n"),
            ClientError::Silent => {
                text.push_str("next: look at its log; `kill -TERM` its pid for an orderly end\n");
            }
            ClientError::Control(_) => {}
        }
        Failure::new(outcome::EXEC, text)
    }

    /// A verb of the daemon on every target; the last code that is not 0 counts.
    fn change(&mut self, targets: &Targets, verb: ResourceVerb) -> Result<u8, Failure> {
        let mut worst = outcome::OK;
        for object in self.objects(&targets.targets)? {
            let code = self.change_one(&object, verb);
            worst = if code == outcome::OK { worst } else { code };
        }
        Ok(worst)
    }

    /// One verb on one object by name, for drbdsetup.
    pub fn change_named(&mut self, resource: &str, volume: Option<VolumeNr>, verb: ResourceVerb) -> u8 {
        self.change_one(&Object { resource: resource.into(), volume }, verb)
    }

    fn change_one(&mut self, object: &Object, verb: ResourceVerb) -> u8 {
        if self.global.dry_run {
            self.line(&format!("lockstepd: {object} {verb:?}"));
            return outcome::OK;
        }
        if self.global.verbose > 0 {
            say(self.err, &format!("lockstepd: {object} {verb:?}\n"));
        }
        let waits = matches!(verb, ResourceVerb::WaitConnect | ResourceVerb::WaitSync);
        let limit_s = self.global.timeout.or((!waits).then_some(CHANGE_LIMIT_S)).filter(|limit| *limit > 0);
        let config = match verb {
            // The file that was named counts, not the one the daemon was started with.
            ResourceVerb::Up { .. } => {
                self.global.config.as_deref().and_then(|path| std::path::absolute(path).ok())
            }
            _ => None,
        };
        let request = Request::Verb(VerbRequest {
            resource: object.resource.clone(),
            volume: object.volume,
            verb,
            timeout_ms: limit_s.map(|limit| limit.saturating_mul(1000)),
            config,
        });
        let err = &mut *self.err;
        let mut said = String::new();
        let last = self.client.ask(&request, |note| match note {
            Reply::Progress(waiting) if !waiting.is_empty() && waiting != said => {
                say(err, &format!("{object}: waiting for {waiting}\n"));
                said = waiting;
            }
            Reply::Warning(text) => say(err, &text),
            _ => {}
        });
        match last {
            Ok(Reply::Done) => outcome::OK,
            Ok(Reply::Refused(refusal)) => {
                say(self.err, &outcome::refusal_text(&object.to_string(), &refusal));
                outcome::exit_code(refusal.number)
            }
            Ok(Reply::Failed { exit, text }) => self.complain(&Failure::new(exit, text)),
            Ok(_) => {
                self.complain(&Failure::new(outcome::EXEC, "lockstepd gave an answer to another question\n"))
            }
            Err(error) => {
                let failure = self.unreachable(&error);
                self.complain(&failure)
            }
        }
    }

    /// Like [`Self::change`], but on metadata when the resource is not up.
    fn change_or_meta(
        &mut self,
        targets: &Targets,
        verb: ResourceVerb,
        command: &str,
    ) -> Result<u8, Failure> {
        let mut worst = outcome::OK;
        for object in self.objects(&targets.targets)? {
            let code = if self.attached(&object) {
                self.change_one(&object, verb)
            } else {
                self.meta_object(&object, command, &[])?
            };
            worst = if code == outcome::OK { worst } else { code };
        }
        Ok(worst)
    }

    /// Whether the daemon uses one of the object's disks.
    fn attached(&mut self, object: &Object) -> bool {
        let views = self.views(Some(&object.resource)).unwrap_or_default();
        let mut volumes = views.iter().flat_map(|view| &view.status.volumes);
        volumes.any(|own| object.volume.is_none_or(|nr| nr == own.volume) && own.disk != DiskState::Diskless)
    }

    fn meta(&mut self, targets: &Targets, command: &str, extra: &[OsString]) -> Result<u8, Failure> {
        let mut worst = outcome::OK;
        for object in self.objects(&targets.targets)? {
            let code = self.meta_object(&object, command, extra)?;
            worst = if code == outcome::OK { worst } else { code };
        }
        Ok(worst)
    }

    /// A command of drbdmeta on each volume of the object. Refused while the daemon has the disk: it
    /// holds the truth in memory.
    fn meta_object(&mut self, object: &Object, command: &str, extra: &[OsString]) -> Result<u8, Failure> {
        let mut worst = outcome::OK;
        for volume in self.volumes(object)? {
            let one = Object { resource: object.resource.clone(), volume: Some(volume.nr) };
            if self.attached(&one) {
                let pid = self.info().map_or_else(String::new, |info| format!(" (pid {})", info.pid));
                let text = format!(
                    "{one}: {command} refused: lockstepd{pid} has this disk attached\nnext: drbdadm down {}\n",
                    object.resource
                );
                worst = self.complain(&Failure::new(outcome::EXEC, text));
                continue;
            }
            let Some((device, index)) = volume.meta_place() else {
                say(self.err, &format!("{one}: `disk none`: no metadata\n"));
                continue;
            };
            let mut args: Vec<OsString> = vec![
                volume.minor.to_string().into(),
                "v08".into(),
                device.into(),
                index.into(),
                command.into(),
            ];
            args.extend(extra.iter().cloned());
            if self.global.dry_run || self.global.verbose > 0 {
                let words: Vec<_> = args.iter().map(|arg| arg.to_string_lossy()).collect();
                let line = format!("drbdmeta {}", words.join(" "));
                if self.global.dry_run {
                    self.line(&line);
                    continue;
                }
                say(self.err, &format!("{line}\n"));
            }
            let code = drbdmeta::run_to(&args, self.out, self.err);
            worst = if code == outcome::OK { worst } else { code };
        }
        Ok(worst)
    }

    /// Generation identifiers: from the daemon while attached, else from the disk.
    fn gi(&mut self, targets: &Targets, command: &str) -> Result<u8, Failure> {
        let mut worst = outcome::OK;
        for object in self.objects(&targets.targets)? {
            if self.attached(&object) {
                for view in self.views(Some(&object.resource))? {
                    let volumes = view.status.volumes.iter();
                    for own in volumes.filter(|own| object.volume.is_none_or(|nr| nr == own.volume)) {
                        let gi = gi_line(own.uuids, own.flags);
                        self.line(&gi);
                    }
                }
            } else {
                let code = self.meta_object(&object, command, &[])?;
                worst = if code == outcome::OK { worst } else { code };
            }
        }
        Ok(worst)
    }

    /// Prints what `lines` makes of each resource; one that is not up exits 10.
    fn query(
        &mut self,
        targets: &Targets,
        lines: impl Fn(&ResourceView, Option<VolumeNr>) -> Vec<String>,
    ) -> Result<u8, Failure> {
        let mut worst = outcome::OK;
        for object in self.objects(&targets.targets)? {
            match self.views(Some(&object.resource)) {
                Ok(views) => {
                    let text: Vec<String> =
                        views.iter().flat_map(|view| lines(view, object.volume)).collect();
                    text.iter().for_each(|line| self.line(line));
                }
                Err(failure) => worst = self.complain(&failure),
            }
        }
        Ok(worst)
    }

    /// Disk states; of a resource that is not up, what its metadata says.
    fn dstate(&mut self, targets: &Targets) -> Result<u8, Failure> {
        let mut worst = outcome::OK;
        for object in self.objects(&targets.targets)? {
            let Ok(views) = self.views(Some(&object.resource)) else {
                let code = self.meta_object(&object, "dstate", &[])?;
                worst = if code == outcome::OK { worst } else { code };
                continue;
            };
            for view in &views {
                let chosen = view.status.volumes.iter();
                for own in chosen.filter(|own| object.volume.is_none_or(|nr| nr == own.volume)) {
                    let pair = disk_pair(view, own);
                    self.line(&pair);
                }
            }
        }
        Ok(worst)
    }

    fn status_verb(
        &mut self,
        targets: &OptionalTargets,
        json: bool,
        statistics: bool,
    ) -> Result<u8, Failure> {
        let mut names = Vec::new();
        for target in &targets.targets {
            match target {
                Target::All => names.clear(),
                Target::One { resource, .. } => names.push(resource.clone()),
            }
        }
        self.status(&names, json, statistics)
    }

    fn explain(&mut self, targets: &OptionalTargets, json: bool, last: usize) -> Result<u8, Failure> {
        let mut views = Vec::new();
        if targets.targets.is_empty() || targets.targets.contains(&Target::All) {
            views = self.views(None)?;
        } else {
            for target in &targets.targets {
                if let Target::One { resource, .. } = target {
                    views.extend(self.views(Some(resource))?);
                }
            }
        }
        let text = if json { explain::as_json(&views, last) } else { explain::as_text(&views, last) };
        say(self.out, &text);
        Ok(outcome::OK)
    }

    /// `status` of the named resources, or of all.
    ///
    /// # Errors
    /// No daemon, or a resource that is not up.
    pub fn status(&mut self, names: &[String], json: bool, statistics: bool) -> Result<u8, Failure> {
        let mut views = Vec::new();
        if names.is_empty() {
            views = self.views(None)?;
        }
        for name in names {
            views.extend(self.views(Some(name))?);
        }
        let text = if json {
            status_json(&views)
        } else {
            let verbose = self.global.verbose > 0;
            let (width, terminal) = terminal();
            status_text(&views, TextOptions { verbose, statistics, width, terminal })
        };
        say(self.out, &text);
        Ok(outcome::OK)
    }

    fn dump(&mut self, targets: &OptionalTargets) -> Result<u8, Failure> {
        let all = targets.targets.is_empty() || targets.targets.contains(&Target::All);
        let (source, loaded) = self.config()?;
        if all {
            say(self.out, &dump(&loaded.config, None, &source.node).unwrap_or_default());
            return Ok(outcome::OK);
        }
        for object in self.objects(&targets.targets)? {
            let text = dump(&loaded.config, Some(&object.resource), &source.node);
            say(self.out, &text.ok_or_else(|| plan::not_defined(&object.resource))?);
        }
        Ok(outcome::OK)
    }

    fn per_resource(
        &mut self,
        targets: &Targets,
        line: impl Fn(&str, Option<std::net::SocketAddr>) -> String,
    ) -> Result<u8, Failure> {
        let (source, loaded) = self.config()?;
        for object in self.objects(&targets.targets)? {
            let (resource, host) = loaded.find(&object.resource, &source.node)?;
            let connection = resource.peers_of(&source.node).next();
            let address = connection.and_then(|(connection, _)| plan::addresses(connection, host));
            self.value(&line(&resource.name, address.map(|(own, _)| own)));
        }
        Ok(outcome::OK)
    }

    fn per_volume(
        &mut self,
        targets: &Targets,
        line: impl Fn(&LocalVolume) -> String,
    ) -> Result<u8, Failure> {
        for object in self.objects(&targets.targets)? {
            for volume in self.volumes(&object)? {
                self.value(&line(&volume));
            }
        }
        Ok(outcome::OK)
    }

    /// A line of a sh-* verb: `value`, or `NAME=value` with `-n NAME`.
    fn value(&mut self, value: &str) {
        match &self.global.sh_varname {
            Some(name) => self.line(&format!("{name}={value}")),
            None => self.line(value),
        }
    }

    /// A line of the result.
    pub fn line(&mut self, line: &str) {
        say(self.out, &format!("{line}\n"));
    }
}

/// Writes; a reader that went away is its own business.
fn say(to: &mut dyn Write, text: &str) {
    let _gone = to.write_all(text.as_bytes()).and_then(|()| to.flush());
}

/// Columns of the terminal on standard output (80 without one), and whether it is one.
fn terminal() -> (usize, bool) {
    use io::IsTerminal as _;
    let stdout = io::stdout();
    let columns = rustix::termios::tcgetwinsize(&stdout).map_or(0, |size| usize::from(size.ws_col));
    (if columns == 0 { 80 } else { columns }, stdout.is_terminal())
}

/// `C:B:H1:H2` and the seven flags of v08 (ADM §10).
fn gi_line(uuids: [u64; 4], found: u32) -> String {
    let shown = [
        flags::CONSISTENT,
        flags::WAS_UP_TO_DATE,
        flags::PRIMARY_IND,
        flags::CONNECTED_IND,
        flags::FULL_SYNC,
        flags::PEER_OUT_DATED,
        flags::CRASHED_PRIMARY,
    ];
    let uuids = uuids.map(|uuid| format!("{uuid:016X}"));
    let bits = shown.map(|flag| if found & flag == 0 { "0" } else { "1" });
    format!("{}:{}", uuids.join(":"), bits.join(":"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fresh_metadata_reads_as_drbdmeta_prints_it() {
        let fresh = "0000000000000004:0000000000000000:0000000000000000:0000000000000000:0:0:0:0:0:0:0";
        assert_eq!(gi_line([4, 0, 0, 0], 0), fresh);
        let used =
            gi_line([0xA1, 2, 3, 4], flags::CONSISTENT | flags::WAS_UP_TO_DATE | flags::CRASHED_PRIMARY);
        assert!(used.starts_with("00000000000000A1:") && used.ends_with(":1:1:0:0:0:0:1"), "{used}");
    }
}
