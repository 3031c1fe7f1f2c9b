//! What a world is made of: sizes, options of the resource, how fast disks and network are.
use super::node::VOLUME;
use lockstep_replicator::core::config::{NetConfig, ResourceOptions, VolumeConfig};
use lockstep_replicator::core::fault::Fault;

/// What a world is made of.
#[derive(Clone, Debug)]
pub struct Options {
    /// Everything random comes from it.
    pub seed: u64,
    /// Size of both disks of volume 0.
    pub sectors: u64,
    /// Sizes of volumes 1 and up.
    pub more_volumes: Vec<u64>,
    /// How fast disks and network are.
    pub weather: Weather,
    /// Network options of both nodes.
    pub net: NetConfig,
    /// Volume options of both nodes.
    pub volume: VolumeConfig,
    /// Options of the resource on both nodes.
    pub resource: ResourceOptions,
    /// The disks of volume 0 begin with this many bytes, and their metadata lies at its real place.
    pub grows_from_bytes: Option<u64>,
    /// The run may have features of `mixed.rs`.
    pub mixed: bool,
    /// Which were ordered, for a person who runs it again.
    pub ordered: String,
    /// Print every event.
    pub verbose: bool,
    /// Look at whole disks too where only what changed is looked at, and compare the answers. Slow.
    pub compare: bool,
    /// Both cores have this defect.
    pub planted: Option<Fault>,
}

impl Options {
    /// Small disks, protocol C, no ko-count: a write that hangs shall be found, not timed out.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let net = NetConfig { ko_count: 0, connect_int_ms: 1000, ..NetConfig::default() };
        let volume = VolumeConfig { al_extents: 67, ..VolumeConfig::new(VOLUME) };
        let verbose = std::env::var_os("SIM_VERBOSE").is_some();
        Self {
            seed,
            sectors: 32 * 2048,
            more_volumes: Vec::new(),
            weather: Weather::default(),
            net,
            volume,
            resource: ResourceOptions::default(),
            grows_from_bytes: None,
            mixed: false,
            ordered: String::new(),
            verbose,
            compare: std::env::var_os("SIM_COMPARE").is_some(),
            planted: planted_from_environment(),
        }
    }

    /// How the run is named, and run again.
    #[must_use]
    pub fn name(&self) -> String {
        format!("seed {}{}{}", self.seed, if self.mixed { "" } else { " --plain" }, self.ordered)
    }
}

/// The defect that a negative control asks for; none in any other build.
fn planted_from_environment() -> Option<Fault> {
    #[cfg(feature = "planted-faults")]
    return crate::planted::from_environment();
    #[cfg(not(feature = "planted-faults"))]
    None
}

/// Latencies: most IO takes the short time, some ten times that, a few in a hundred the long one.
#[derive(Clone, Debug)]
pub struct Weather {
    /// A disk IO, microseconds.
    pub disk_us: u64,
    /// A disk IO of the slow kind, milliseconds.
    pub disk_slow_ms: u64,
    /// A message to each node, microseconds.
    pub net_us: [u64; 2],
    /// A delayed message, milliseconds.
    pub net_slow_ms: u64,
    /// A link that drips: this long for each sector of payload, ns.
    pub drip_ns: u64,
    /// A node learns within this time that a transport is gone, milliseconds.
    pub notice_ms: u64,
    /// A node that loses power may tell nobody for seconds.
    pub quiet_power: bool,
}

impl Default for Weather {
    fn default() -> Self {
        Self {
            disk_us: 400,
            disk_slow_ms: 30,
            net_us: [300; 2],
            net_slow_ms: 40,
            drip_ns: 0,
            notice_ms: 20,
            quiet_power: false,
        }
    }
}
