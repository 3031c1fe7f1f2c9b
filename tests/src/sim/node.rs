//! One node: its core, its disk, its buffers and what is in flight on it.
use super::Rng;
use super::disk::Disk;
use lockstep_replicator::core::Resource;
use lockstep_replicator::core::config::{NetConfig, ResourceConfig, ResourceOptions, VolumeConfig};
use lockstep_replicator::core::event::{
    AdminId, BufferId, DiskIo, IoId, MetaId, MetaWrite, Refusal, RequestId, SessionId,
};
use lockstep_replicator::units::VolumeNr;
use std::collections::BTreeMap;

/// A payload buffer and its counts.
#[derive(Clone, Debug)]
pub struct Buffer {
    /// One number per sector.
    pub data: Vec<u32>,
    /// The core's count: given back by `Complete` or `Release`.
    pub core: bool,
    /// Disk IO that uses it.
    pub disk: u32,
}

/// A disk IO in flight.
#[derive(Clone, Debug)]
pub struct InFlight {
    /// As asked for.
    pub io: DiskIo,
    /// Data of a write.
    pub content: Vec<u32>,
    /// Covered by a flush.
    pub mark: u64,
    /// The write of the application that it is, if it is one.
    pub record: Option<u32>,
}

/// See the module.
#[derive(Debug)]
pub struct Node {
    /// 0 or 1.
    pub index: usize,
    /// Running core; `None` while the node is down.
    pub core: Option<Resource>,
    /// Grows with each start; events of an earlier life are dropped.
    pub life: u64,
    /// By volume; they survive crashes.
    pub disks: Vec<Disk>,
    /// Volume options of this node alone.
    pub volume: Option<VolumeConfig>,
    /// Live buffers.
    pub buffers: BTreeMap<u32, Buffer>,
    next_buffer: u32,
    /// Disk IO in flight.
    pub ios: BTreeMap<u64, InFlight>,
    /// Metadata writes in flight, in order of submission.
    pub metas: BTreeMap<u64, (usize, MetaWrite)>,
    /// The core wants a transport.
    pub wants_peer: bool,
    /// Its current transport, as its runtime sees it.
    pub session: Option<SessionId>,
    /// When the core wants to be told of the time, and the place of that among events of the same time.
    pub timer_at: Option<(u64, u64)>,
    /// Requests of the application in flight: buffer and which record.
    pub requests: BTreeMap<u64, u32>,
    /// Verbs without an answer.
    pub verbs: BTreeMap<u64, &'static str>,
    /// Answers to verbs.
    pub answers: BTreeMap<u64, Result<(), Refusal>>,
    /// The disk of each volume is in use by the core.
    pub disk_open: Vec<bool>,
    /// IO fails with this chance, per thousand.
    pub eio_per_mille: u64,
    /// The next this many data writes / flushes fail.
    pub fail_writes: u32,
    /// See `fail_writes`.
    pub fail_flushes: u32,
    /// Metadata writes submitted in all lives.
    pub metas_total: u64,
    /// Exported now.
    pub exported: bool,
    /// Sectors exported.
    pub export_size: u64,
}

impl Node {
    /// A node that is down, with zeroed disks of these sizes.
    #[must_use]
    pub fn new(index: usize, sizes: &[u64]) -> Self {
        Self {
            index,
            core: None,
            life: 0,
            disks: sizes.iter().map(|size| Disk::new(*size)).collect(),
            volume: None,
            buffers: BTreeMap::new(),
            next_buffer: 0,
            ios: BTreeMap::new(),
            metas: BTreeMap::new(),
            wants_peer: false,
            session: None,
            timer_at: None,
            requests: BTreeMap::new(),
            verbs: BTreeMap::new(),
            answers: BTreeMap::new(),
            disk_open: vec![false; sizes.len()],
            eio_per_mille: 0,
            fail_writes: 0,
            fail_flushes: 0,
            metas_total: 0,
            exported: false,
            export_size: 0,
        }
    }

    /// The configuration of this node.
    #[must_use]
    pub fn config(
        &self,
        net: &NetConfig,
        volume: &VolumeConfig,
        options: &ResourceOptions,
    ) -> ResourceConfig {
        let (own, peer) = if self.index == 0 { (0, 1) } else { (1, 0) };
        ResourceConfig {
            name: "r0".into(),
            node_id: own,
            node_name: format!("n{own}"),
            peer_node_id: peer,
            peer_name: format!("n{peer}"),
            net: net.clone(),
            volumes: vec![volume.clone()],
            options: options.clone(),
        }
    }

    /// A new buffer, counted for the core.
    pub fn new_buffer(&mut self, data: Vec<u32>) -> BufferId {
        self.next_buffer += 1;
        self.buffers.insert(self.next_buffer, Buffer { data, core: true, disk: 0 });
        BufferId(self.next_buffer)
    }

    /// The core lets go of a buffer.
    ///
    /// # Panics
    /// It did not own it.
    pub fn release(&mut self, id: BufferId) {
        let buffer = self.buffers.get_mut(&id.0);
        assert!(
            buffer.as_ref().is_some_and(|buffer| buffer.core),
            "n{}: {id:?} released but not owned by the core",
            self.index
        );
        if let Some(buffer) = buffer {
            buffer.core = false;
        }
        self.collect(id);
    }

    /// Frees a buffer nobody counts.
    pub fn collect(&mut self, id: BufferId) {
        if self.buffers.get(&id.0).is_some_and(|buffer| !buffer.core && buffer.disk == 0) {
            self.buffers.remove(&id.0);
        }
    }

    /// The data of a live buffer that the core owns.
    ///
    /// # Panics
    /// The core uses a buffer it has released.
    #[must_use]
    pub fn data(&self, id: BufferId) -> &[u32] {
        let buffer = self.buffers.get(&id.0);
        assert!(
            buffer.is_some_and(|buffer| buffer.core),
            "n{}: {id:?} used after it was released",
            self.index
        );
        buffer.map_or(&[], |buffer| &buffer.data)
    }

    /// The node stops. `power`: its cache is lost too. What was in flight happened or not. The requests of
    /// the application it leaves unanswered, and the writes that its cache lost.
    pub fn stop(&mut self, power: bool, rng: &mut Rng) -> (BTreeMap<u64, u32>, Vec<u32>) {
        self.core = None;
        self.life += 1;
        for (_, in_flight) in std::mem::take(&mut self.ios) {
            if let (Some(range), false) = (in_flight.io.range, in_flight.content.is_empty()) {
                let volume = usize::from(in_flight.io.volume.0);
                self.disks[volume].maybe_write(range, &in_flight.content, rng);
            }
        }
        for (_, (volume, write)) in std::mem::take(&mut self.metas) {
            self.disks[volume].meta.maybe_apply(&write, rng);
        }
        let mut lost = Vec::new();
        if power {
            for disk in &mut self.disks {
                lost.extend(disk.lose_cache(rng));
            }
        }
        self.buffers.clear();
        self.wants_peer = false;
        self.session = None;
        self.timer_at = None;
        self.verbs.clear();
        self.disk_open.fill(false);
        self.exported = false;
        (std::mem::take(&mut self.requests), lost)
    }
}

/// The first volume of every simulated resource, and the only one of most.
pub const VOLUME: VolumeNr = VolumeNr(0);

/// Ids of the world, one counter for all kinds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ids(u64);

impl Ids {
    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 += 1;
        self.0
    }
    /// As a request.
    pub const fn request(&mut self) -> RequestId {
        RequestId(self.next())
    }
    /// As a verb.
    pub const fn admin(&mut self) -> AdminId {
        AdminId(self.next())
    }
    /// As a transport.
    pub const fn session(&mut self) -> SessionId {
        SessionId(self.next())
    }
}

/// Keys of the in-flight tables.
#[must_use]
pub const fn io_key(id: IoId) -> u64 {
    id.0
}

/// See [`io_key`].
#[must_use]
pub const fn meta_key(id: MetaId) -> u64 {
    id.0
}
