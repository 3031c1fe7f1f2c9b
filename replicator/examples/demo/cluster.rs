//! Two daemons on this machine, their disks in files of one folder, driven by the command as an operator would.
use crate::load::pause;
use crate::target::Target;
use serde_json::Value;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Name of the resource.
pub(crate) const RESOURCE: &str = "demo";

/// Minor of the first node's device; high, so that it is nobody else's.
const FIRST_MINOR: usize = 900;

/// One node.
#[derive(Debug)]
pub(crate) struct Node {
    /// Its name in the configuration.
    pub(crate) name: &'static str,
    /// Where its sockets are.
    pub(crate) run_dir: PathBuf,
    /// Its backing file.
    pub(crate) disk: PathBuf,
    daemon: Option<Child>,
}

/// Both nodes. Dropping it ends the daemons it started.
#[derive(Debug)]
pub(crate) struct Cluster {
    /// The folder everything is in.
    pub(crate) dir: PathBuf,
    /// The configuration file.
    pub(crate) config: PathBuf,
    program: PathBuf,
    ublk: bool,
    /// The nodes.
    pub(crate) nodes: [Node; 2],
}

/// What may differ from one cluster to another.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// `A`, `B` or `C`.
    pub(crate) protocol: char,
    /// Size of each backing file, bytes.
    pub(crate) disk_bytes: u64,
    /// Further statements of the resource.
    pub(crate) extra: String,
    /// The daemons' replication addresses; the second node's peer address may be a proxy.
    pub(crate) ports: Option<[u16; 4]>,
    /// ublk disks instead of NBD exports; needs root and the driver.
    pub(crate) ublk: bool,
}

/// Something an operator would have to look at.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClusterError {
    #[error("{what}: {source}")]
    Io {
        what: String,
        #[source]
        source: io::Error,
    },
    #[error("`{command}` ended with {status}: {text}")]
    Failed { command: String, status: String, text: String },
    #[error("waited {seconds} s for {what}; the last status was\n{status}")]
    Waited { what: String, seconds: u64, status: String },
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> ClusterError {
    move |source| ClusterError::Io { what: what.into(), source }
}

/// A free TCP port on the loopback address.
fn free_port() -> io::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

impl Cluster {
    /// Writes configuration and disks into `dir`; nothing runs yet.
    pub(crate) fn new(dir: &Path, program: &Path, options: &Options) -> Result<Self, ClusterError> {
        let here = |what: &str| format!("{what} in {}", dir.display());
        let ports = match options.ports {
            Some(ports) => ports,
            None => {
                let a = free_port().map_err(io_error("finding a free port"))?;
                let b = free_port().map_err(io_error("finding a free port"))?;
                [a, b, a, b]
            }
        };
        let node = |name: &'static str| Node {
            name,
            run_dir: dir.join(name),
            disk: dir.join(format!("{name}.disk")),
            daemon: None,
        };
        let nodes = [node("alice"), node("bob")];
        for node in &nodes {
            fs::create_dir_all(&node.run_dir).map_err(io_error(here("making a run directory")))?;
            let disk = File::create(&node.disk).map_err(io_error(here("making a disk")))?;
            disk.set_len(options.disk_bytes).map_err(io_error(here("sizing a disk")))?;
        }
        // Each node has its own view of the addresses only where a proxy stands between them.
        let config = dir.join("demo.conf");
        for (at, node) in nodes.iter().enumerate() {
            let own = [ports[0], ports[1]];
            let seen = [ports[2], ports[3]];
            let port = |host: usize| if host == at { own[host] } else { seen[host] };
            let hosts: String = nodes
                .iter()
                .enumerate()
                .map(|(host, other)| {
                    format!(
                        "    on {} {{\n        device /dev/drbd{};\n        disk {};\n        address 127.0.0.1:{};\n        meta-disk internal;\n    }}\n",
                        other.name,
                        FIRST_MINOR + host,
                        other.disk.display(),
                        port(host),
                    )
                })
                .collect();
            let front_end = if options.ublk { "ublk" } else { "nbd" };
            let text = format!(
                "resource {RESOURCE} {{\n    protocol {};\n{}    net {{ connect-int 1; }}\n    lockstep {{ front-end {front_end}; }}\n{hosts}}}\n",
                options.protocol, options.extra
            );
            let path = if ports[..2] == ports[2..] { config.clone() } else { node_config(dir, node.name) };
            fs::write(&path, text).map_err(io_error(here("writing the configuration")))?;
        }
        Ok(Self { dir: dir.to_owned(), config, program: program.to_owned(), ublk: options.ublk, nodes })
    }

    fn config_of(&self, node: usize) -> PathBuf {
        let own = node_config(&self.dir, self.nodes[node].name);
        if own.exists() { own } else { self.config.clone() }
    }

    /// Starts a node's daemon and waits until it answers.
    pub(crate) fn start(&mut self, node: usize) -> Result<(), ClusterError> {
        let config = self.config_of(node);
        let dir = self.dir.clone();
        let it = &mut self.nodes[node];
        let log = File::options()
            .create(true)
            .append(true)
            .open(dir.join(format!("{}.log", it.name)))
            .map_err(io_error("opening a log"))?;
        let child = Command::new(&self.program)
            .arg("daemon")
            .arg("-c")
            .arg(&config)
            .args(["--node", it.name, "--run-dir"])
            .arg(&it.run_dir)
            .arg("--no-mlock")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(io_error(format!("starting {}", self.program.display())))?;
        it.daemon = Some(child);
        let name = it.name;
        let begun = now();
        loop {
            if UnixStream::connect(self.nodes[node].run_dir.join("control.sock")).is_ok() {
                return Ok(());
            }
            let exited = self.nodes[node].daemon.as_mut().and_then(|daemon| daemon.try_wait().ok().flatten());
            if exited.is_some() || begun.elapsed() > Duration::from_secs(20) {
                let text = fs::read_to_string(self.dir.join(format!("{name}.log"))).unwrap_or_default();
                let tail: Vec<&str> = text.lines().rev().take(12).collect();
                let text = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
                return Err(ClusterError::Failed {
                    command: format!("daemon of {name}"),
                    status: format!("{exited:?}"),
                    text,
                });
            }
            pause(Duration::from_millis(30));
        }
    }

    /// Kills a node's daemon as a power cut of the process would: SIGKILL, no goodbye.
    pub(crate) fn kill(&mut self, node: usize) -> Result<(), ClusterError> {
        if let Some(mut daemon) = self.nodes[node].daemon.take() {
            daemon.kill().map_err(io_error("kill"))?;
            daemon.wait().map_err(io_error("wait"))?;
        }
        Ok(())
    }

    /// Process id of a node's daemon.
    pub(crate) fn pid(&self, node: usize) -> Option<u32> {
        self.nodes[node].daemon.as_ref().map(Child::id)
    }

    fn command(&self, node: usize) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--run-dir").arg(&self.nodes[node].run_dir).stdin(Stdio::null());
        command
    }

    /// Runs a verb on a node.
    pub(crate) fn run<S: AsRef<OsStr>>(
        &self,
        node: usize,
        args: impl IntoIterator<Item = S>,
    ) -> io::Result<Output> {
        self.command(node).args(args).output()
    }

    /// Runs a verb that must succeed; gives its standard output.
    pub(crate) fn must<S: AsRef<OsStr>>(
        &self,
        node: usize,
        args: impl IntoIterator<Item = S>,
    ) -> Result<String, ClusterError> {
        let mut command = self.command(node);
        command.args(args);
        let shown = format!("{command:?}");
        let output = command.output().map_err(io_error(shown.clone()))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(ClusterError::Failed {
            command: shown,
            status: output.status.to_string(),
            text: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }

    /// `create-md` on a node, without a daemon.
    pub(crate) fn create_md(&self, node: usize) -> Result<String, ClusterError> {
        let config = self.config_of(node);
        let args: Vec<&OsStr> = vec![
            "-c".as_ref(),
            config.as_os_str(),
            "--node".as_ref(),
            self.nodes[node].name.as_ref(),
            "create-md".as_ref(),
            "--force".as_ref(),
            RESOURCE.as_ref(),
        ];
        self.must(node, args)
    }

    /// The `status --json` of a node's resource.
    pub(crate) fn status(&self, node: usize) -> Option<Value> {
        let output = self.run(node, ["status", "--json", RESOURCE]).ok()?;
        let all: Value = serde_json::from_slice(&output.stdout).ok()?;
        all.get(0).cloned()
    }

    /// Waits until a node's status satisfies `wanted`.
    pub(crate) fn wait(
        &self,
        node: usize,
        what: &str,
        seconds: u64,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value, ClusterError> {
        let begun = now();
        loop {
            let status = self.status(node);
            if let Some(status) = &status
                && wanted(status)
            {
                return Ok(status.clone());
            }
            if begun.elapsed() > Duration::from_secs(seconds) {
                let shown = status.map_or_else(|| "no answer".into(), |status| format!("{status:#}"));
                return Err(ClusterError::Waited {
                    what: format!("{what} on {}", self.nodes[node].name),
                    seconds,
                    status: shown,
                });
            }
            pause(Duration::from_millis(20));
        }
    }

    /// Waits until a node says both disks are UpToDate and nothing is out of sync.
    pub(crate) fn wait_in_sync(&self, node: usize, seconds: u64) -> Result<Value, ClusterError> {
        self.wait(node, "both disks UpToDate", seconds, |status| {
            disk(status) == "UpToDate"
                && peer(status, "peer-disk-state") == "UpToDate"
                && peer(status, "replication-state") == "Established"
                && number(status, "out-of-sync") == 0
        })
    }

    /// Waits until nothing that the application wrote is on its way to the peer any more: under protocol A, and in a
    /// part under B, a write is acknowledged before it is on the peer's disk.
    #[allow(dead_code, reason = "for tests that compare the disks")]
    pub(crate) fn wait_arrived(&self, node: usize, seconds: u64) -> Result<Value, ClusterError> {
        self.wait(node, "all writes on both disks", seconds, |status| {
            peer(status, "peer-disk-state") == "UpToDate" && status["connections"][0]["ap-in-flight"] == 0
        })
    }

    /// Where a node serves its NBD export.
    pub(crate) fn nbd_socket(&self, node: usize) -> PathBuf {
        self.nodes[node].run_dir.join(format!("{RESOURCE}.nbd.sock"))
    }

    /// Where a client of a node does its IO.
    pub(crate) fn target(&self, node: usize) -> Target {
        if self.ublk {
            Target::Device(format!("/dev/drbd{}", FIRST_MINOR + node).into())
        } else {
            Target::Nbd { socket: self.nbd_socket(node), export: RESOURCE.to_owned() }
        }
    }

    /// First difference of the two data areas (the first `bytes` of each disk), if any.
    pub(crate) fn first_difference(&self, bytes: u64) -> Result<Option<u64>, ClusterError> {
        let open = |node: usize| File::open(&self.nodes[node].disk).map_err(io_error("opening a disk"));
        let (mut one, mut other) = (open(0)?, open(1)?);
        let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        let mut at = 0;
        while at < bytes {
            let len = usize::try_from((bytes - at).min(1 << 20)).unwrap_or(1 << 20);
            one.read_exact(&mut a[..len]).map_err(io_error("reading a disk"))?;
            other.read_exact(&mut b[..len]).map_err(io_error("reading a disk"))?;
            if let Some(offset) = a[..len].iter().zip(&b[..len]).position(|(x, y)| x != y) {
                return Ok(Some(at + offset as u64));
            }
            at += len as u64;
        }
        Ok(None)
    }
}

fn node_config(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("demo-{name}.conf"))
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            if let Some(mut daemon) = node.daemon.take() {
                // Already gone is fine.
                let _gone = daemon.kill();
                let _reaped = daemon.wait();
            }
        }
    }
}

/// Own disk state in a status.
pub(crate) fn disk(status: &Value) -> &str {
    status["devices"][0]["disk-state"].as_str().unwrap_or_default()
}

/// A text field of the peer's volume in a status.
pub(crate) fn peer<'a>(status: &'a Value, field: &str) -> &'a str {
    status["connections"][0]["peer_devices"][0][field].as_str().unwrap_or_default()
}

/// A number of the peer's volume in a status.
pub(crate) fn number(status: &Value, field: &str) -> u64 {
    status["connections"][0]["peer_devices"][0][field].as_u64().unwrap_or(u64::MAX)
}

/// The time, for measuring how long something takes.
#[expect(clippy::disallowed_methods, reason = "a story told in real time")]
pub(crate) fn now() -> Instant {
    Instant::now()
}
