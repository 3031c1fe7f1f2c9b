//! The link between the two nodes as the kernel's: each node in a network namespace of its own, a veth pair between
//! them that can be taken down, and netem for loss in one direction, delay and reordering.
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The device, in either namespace.
const DEVICE: &str = "lockstep0";

/// See the module. The namespaces go with it.
#[derive(Debug)]
pub(crate) struct Veth {
    spaces: [String; 2],
    /// Whether the kernel has netem.
    netem: bool,
}

impl Veth {
    /// Makes the namespaces and the pair, or says why it cannot.
    pub(crate) fn make() -> Result<Self, String> {
        let own = std::process::id();
        let mut veth =
            Self { spaces: [format!("lockstep-{own}-a"), format!("lockstep-{own}-b")], netem: false };
        for space in &veth.spaces {
            ip(&["netns", "add", space])?;
        }
        let [a, b] = &veth.spaces;
        ip(&["link", "add", DEVICE, "netns", a, "type", "veth", "peer", "name", DEVICE, "netns", b])?;
        for node in 0..2 {
            let address = format!("{}/24", Self::address(node));
            ip(&["-n", &veth.spaces[node], "addr", "add", &address, "dev", DEVICE])?;
            ip(&["-n", &veth.spaces[node], "link", "set", "lo", "up"])?;
            veth.set(node, "up");
        }
        veth.netem = veth.qdisc(0, "replace", &["netem", "delay", "1ms"]).is_ok();
        veth.clear();
        Ok(veth)
    }

    /// Address of a node.
    pub(crate) fn address(node: usize) -> &'static str {
        ["10.213.77.1", "10.213.77.2"][node]
    }

    /// A program that runs `program` in the namespace of the node that the arguments name.
    pub(crate) fn wrap(&self, dir: &Path, program: &Path) -> PathBuf {
        let path = dir.join("in-its-namespace");
        let [a, b] = &self.spaces;
        let program = program.display();
        let text = format!(
            "#!/bin/sh\ncase \"$*\" in\n\
             daemon*'--node alice'*) exec ip netns exec {a} {program} \"$@\" ;;\n\
             daemon*'--node bob'*) exec ip netns exec {b} {program} \"$@\" ;;\n\
             esac\nexec {program} \"$@\"\n"
        );
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// Takes a node's end down: both sides' packets vanish, no connection is told.
    pub(crate) fn cut(&self, node: usize) {
        self.set(node, "down");
    }

    /// Nothing reaches `node` any more, and nobody is told.
    pub(crate) fn silence(&self, node: usize) {
        if self.netem {
            self.qdisc(1 - node, "replace", &["netem", "loss", "100%"]).unwrap();
        } else {
            self.set(node, "down");
        }
    }

    /// What reaches `node` is late, in another order, twice, or not at all at first.
    pub(crate) fn disturb(&self, node: usize, millis: u64) {
        if self.netem {
            let (delay, jitter) = (format!("{millis}ms"), format!("{}ms", millis / 2));
            let words =
                ["netem", "delay", &delay, &jitter, "loss", "2%", "duplicate", "2%", "reorder", "20%"];
            self.qdisc(1 - node, "replace", &words).unwrap();
        }
    }

    /// What reaches `node` drips.
    pub(crate) fn drip(&self, node: usize) {
        if self.netem {
            self.qdisc(1 - node, "replace", &["netem", "rate", "4mbit"]).unwrap();
        }
    }

    /// Fair weather.
    pub(crate) fn clear(&self) {
        for node in 0..2 {
            if self.netem {
                // None is there at first.
                let _none = self.qdisc(node, "del", &[]);
            }
            self.set(node, "up");
        }
    }

    fn set(&self, node: usize, state: &str) {
        ip(&["-n", &self.spaces[node], "link", "set", DEVICE, state]).unwrap();
    }

    fn qdisc(&self, node: usize, verb: &str, words: &[&str]) -> Result<(), String> {
        let mut all = vec!["-n", &self.spaces[node], "qdisc", verb, "dev", DEVICE, "root"];
        all.extend(words);
        run("tc", &all)
    }
}

impl Drop for Veth {
    fn drop(&mut self) {
        for space in &self.spaces {
            // Perhaps it was never made.
            let _gone = ip(&["netns", "del", space]);
        }
    }
}

fn ip(words: &[&str]) -> Result<(), String> {
    run("ip", words)
}

fn run(program: &str, words: &[&str]) -> Result<(), String> {
    let path = ["/usr/sbin", "/sbin", "/usr/bin"].map(|dir| Path::new(dir).join(program));
    let path =
        path.iter().find(|path| path.is_file()).ok_or_else(|| format!("{program} is not installed"))?;
    let output = Command::new(path).args(words).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program} {}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
}
