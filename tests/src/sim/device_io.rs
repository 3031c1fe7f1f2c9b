//! What becomes of an IO on a simulated disk: how long it takes, whether it fails, what it leaves behind.
use super::Rng;
use super::node::{InFlight, io_key};
use super::options::Weather;
use super::world::{Asked, Ev, MS, US, World};
use lockstep_replicator::core::event::{
    Digest, DiskIo, DiskOk, DiskOp, Input, IoError, IoId, MetaId, RequestId, WriteId,
};

impl World {
    pub(super) fn meta_done(&mut self, node: usize, id: u64) {
        let Some((volume, write)) = self.nodes[node].metas.remove(&id) else { return };
        let disk = &mut self.nodes[node].disks[volume];
        let failed = disk.faults.dead || disk.faults.metas > 0;
        disk.faults.metas = disk.faults.metas.saturating_sub(1);
        let result = if failed {
            disk.meta.maybe_apply(&write, &mut self.rng);
            self.trace(|| format!("n{node} meta {id} fails"));
            Err(IoError::Errno(5))
        } else {
            disk.meta.apply(&write);
            Ok(())
        };
        self.feed(node, Input::MetaDone { id: MetaId(id), result });
    }

    /// Whether this IO fails, as ordered or by chance.
    pub(super) fn io_fails(&mut self, node: usize, volume: usize, io: &DiskIo) -> bool {
        let this = &mut self.nodes[node];
        let write = !matches!(io.op, DiskOp::Read | DiskOp::ReadDigest | DiskOp::Flush);
        let unlucky = this.eio_per_mille > 0 && self.rng.below(1000) < this.eio_per_mille;
        let faults = &mut this.disks[volume].faults;
        let (all, own) = match io.op {
            DiskOp::Read | DiskOp::ReadDigest => (&mut 0, &mut faults.reads),
            DiskOp::Flush => (&mut this.fail_flushes, &mut faults.flushes),
            DiskOp::Write | DiskOp::WriteZeroes { .. } | DiskOp::Discard => {
                (&mut this.fail_writes, &mut faults.writes)
            }
        };
        let ordered = *all > 0 || *own > 0;
        *all = all.saturating_sub(1);
        *own = own.saturating_sub(1);
        let bad = match (io.range, faults.bad) {
            (Some(range), Some((bad, writes_too))) if range.overlaps(bad) => {
                if write && !writes_too {
                    // Writing to a bad sector makes it good.
                    faults.bad = None;
                }
                !write || writes_too
            }
            _ => false,
        };
        unlucky || ordered || bad || faults.dead
    }

    pub(super) fn disk_done(&mut self, node: usize, id: u64) {
        let Some(InFlight { io, content, mark, record }) = self.nodes[node].ios.remove(&id) else { return };
        let volume = usize::from(io.volume.0);
        let write = !matches!(io.op, DiskOp::Read | DiskOp::ReadDigest | DiskOp::Flush);
        let mut result = Ok(DiskOk::default());
        if self.io_fails(node, volume, &io) {
            self.trace(|| format!("n{node} disk io {id} fails"));
            if let Some(record) = record {
                self.oracle.write_failed(record);
            }
            if let (Some(range), false) = (io.range, write) {
                self.oracle.unreadable(volume, range);
            }
            if let (Some(range), true) = (io.range, write) {
                self.oracle.unwritten(volume, range);
                self.nodes[node].disks[volume].maybe_write(range, &content, &mut self.rng);
            }
            result = Err(IoError::Errno(5));
        } else {
            let this = &mut self.nodes[node];
            match (io.op, io.range) {
                (DiskOp::Read | DiskOp::ReadDigest, Some(range)) => {
                    let data = this.disks[volume].read(range);
                    if let Some(buffer) = io.buffer {
                        if let Some(buffer) = this.buffers.get_mut(&buffer.0) {
                            buffer.data = data;
                        }
                    } else {
                        let all_zero = data.iter().all(|value| *value == 0);
                        let digest = (io.op == DiskOp::ReadDigest).then(|| digest(&data));
                        let buffer = this.new_buffer(data);
                        result = Ok(DiskOk { buffer: Some(buffer), all_zero, digest });
                    }
                }
                (DiskOp::Flush, _) => this.disks[volume].flush(mark),
                (_, Some(range)) => {
                    let start = usize::try_from(range.start().0).unwrap_or(usize::MAX);
                    let tag = self.history.land(node, volume, start, &content, record);
                    this.disks[volume].write(range, content, io.fua, tag);
                }
                (_, None) => {}
            }
        }
        if let Some(id) = io.buffer {
            let this = &mut self.nodes[node];
            if let Some(buffer) = this.buffers.get_mut(&id.0) {
                buffer.disk -= 1;
            }
            this.collect(id);
        }
        self.feed(node, Input::DiskDone { id: IoId(id), result });
    }

    pub(super) fn io_delay(&mut self, node: usize, volume: usize) -> Option<u64> {
        self.disk_ios += 1;
        if let Some(stuck) = self.nodes[node].disks[volume].faults.stick.take() {
            self.trace(|| format!("n{node} that IO is stuck"));
            return (stuck != u64::MAX).then_some(stuck);
        }
        let Weather { disk_us, disk_slow_ms, .. } = self.options.weather;
        Some(match self.rng.below(100) {
            0..=1 => self.rng.below(disk_slow_ms * MS),
            2..=20 => disk_us * US + self.rng.below(disk_us * 8 * US),
            _ => 20 * US + self.rng.below(disk_us * US),
        })
    }

    /// Which write of the application an IO of this node carries out.
    fn record_of_io(&self, node: usize, io: IoId) -> Option<u32> {
        match self.nodes[node].core.as_ref()?.write_of_io(io)? {
            WriteId::Own(id) => self.record_of_request(id),
            WriteId::Peer { session, request } => self.wired.get(&(session, 1 - node, request)).copied(),
        }
    }

    pub(super) fn record_of_request(&self, id: RequestId) -> Option<u32> {
        match self.asked.get(&id.0)? {
            Asked::Write { record } => Some(*record),
            Asked::Read { .. } | Asked::Flush { .. } => None,
        }
    }

    pub(super) fn start_io(&mut self, node: usize, io: DiskIo) {
        let life = self.nodes[node].life;
        let volume = usize::from(io.volume.0);
        if !self.nodes[node].disk_open[volume] {
            self.fail(format!("n{node}: IO on a disk that was let go"));
        }
        let this = &mut self.nodes[node];
        let length = io.range.map_or(0, |range| usize::try_from(range.len().0).unwrap_or(0));
        let content = match io.op {
            DiskOp::Write => io.buffer.map(|id| this.data(id)[..length].to_vec()).unwrap_or_default(),
            DiskOp::WriteZeroes { .. } | DiskOp::Discard => vec![0; length],
            DiskOp::Read | DiskOp::ReadDigest | DiskOp::Flush => Vec::new(),
        };
        if let Some(buffer) = io.buffer.and_then(|id| this.buffers.get_mut(&id.0)) {
            buffer.disk += 1;
        }
        let reads = |op: DiskOp| matches!(op, DiskOp::Read | DiskOp::ReadDigest);
        if !reads(io.op) && io.op != DiskOp::Flush && io.range.is_some() {
            let range = io.range;
            let overlap = this.ios.values().any(|other| {
                !reads(other.io.op)
                    && other.io.volume == io.volume
                    && other.io.range.is_some_and(|other| range.is_some_and(|range| range.overlaps(other)))
            });
            if overlap {
                self.fail(format!("n{node}: two writes of {range:?} in flight at once"));
            }
        }
        let mark = self.nodes[node].disks[volume].mark();
        let id = io_key(io.id);
        self.trace(|| match io.range {
            Some(range) => format!("n{node} disk io {id}: {:?} {volume}/{range:?} fua {}", io.op, io.fua),
            None => format!("n{node} disk io {id}: {:?} of volume {volume}", io.op),
        });
        let stuck = io.op == DiskOp::Flush && self.nodes[node].disks[volume].faults.stuck_flushes;
        let record = self.record_of_io(node, io.id);
        self.nodes[node].ios.insert(id, InFlight { io, content, mark, record });
        if stuck {
            return;
        }
        if let Some(delay) = self.io_delay(node, volume) {
            self.schedule(self.now + delay, Ev::Disk { node, life, id });
        }
    }
}

/// What a digest of real data would be here: four different mixes of what the sectors hold.
fn digest(data: &[u32]) -> Digest {
    let words = [1_u64, 2, 3, 4].map(|salt| {
        data.iter().fold(salt, |state, value| {
            let mut rng = Rng::new(state ^ u64::from(*value));
            rng.next()
        })
    });
    Digest(words)
}

pub(super) fn meta_text(write: &lockstep_replicator::core::event::MetaWrite) -> String {
    use lockstep_replicator::core::event::MetaWrite;
    match write {
        MetaWrite::Superblock(sb) => format!("superblock uuid {:x?} flags {:x}", sb.uuid, sb.flags),
        MetaWrite::AlTransaction(t) => format!("al {:?}", t.updates),
        MetaWrite::AlInit => "al init".into(),
        MetaWrite::Relocate => "relocate".into(),
        MetaWrite::ForgetOldPlace => "forget the old place".into(),
        MetaWrite::Bitmap(pages) => format!("{} bitmap pages", pages.len()),
    }
}
