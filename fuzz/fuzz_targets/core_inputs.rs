//! The core: two of them, and a world that keeps the rules of the runtime but nothing else.
//!
//! The input is a list of steps: what the world does next. IO and metadata writes end in any order, with or without
//! an error, and once each; frames arrive in order, or damaged yet well formed, or invented; transports break; nodes
//! crash and come back with what was durable; operators ask for anything at any time. Whatever happens, the core does
//! not panic, and answers no front end twice.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use lockstep_proto::{Message, MessageType, PayloadKind, frame};
use lockstep_replicator::core::Resource;
use lockstep_replicator::core::config::{NetConfig, Protocol, ResourceConfig, VolumeConfig};
use lockstep_replicator::core::event::{
    AdminCommand, AdminId, BufferId, Digest, DiskIo, DiskOk, DiskOp, Input, IoError, LostReason, MetaId,
    MetaWrite, Output, Payload, Request, RequestId, RequestOp, SessionId,
};
use lockstep_replicator::meta::{
    Attached, BITMAP_PAGE_BYTES, MAGIC_UNCLEAN, Superblock, UUID_JUST_CREATED, flags,
};
use lockstep_replicator::units::{BlockRange, Sector, SectorCount, Time, VolumeNr};
use std::collections::{BTreeSet, VecDeque};

/// Size of each disk: a few activity-log extents.
const DISK_SECTORS: u64 = 40_000;
/// Words of its bitmap, in whole pages.
const BITMAP_WORDS: usize = BITMAP_PAGE_BYTES / 8;
/// Steps of one input; what follows is not looked at.
const MAX_STEPS: usize = 300;
/// Things that a `Settle` lets happen at most.
const MAX_SETTLE: usize = 1500;
const VOLUME: VolumeNr = VolumeNr(0);

fuzz_target!(|input: &[u8]| {
    let mut steps = Steps { rest: input };
    let mut world = World::new(&mut steps);
    for _ in 0..MAX_STEPS {
        if steps.rest.is_empty() {
            break;
        }
        world.step(&mut steps);
    }
});

/// Numbers from the input; zeroes behind its end.
struct Steps<'a> {
    rest: &'a [u8],
}

impl<'a> Steps<'a> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.rest.split_first() else { return 0 };
        self.rest = rest;
        *first
    }

    fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.rest.split_at(len.min(self.rest.len()));
        self.rest = rest;
        taken
    }

    fn index(&mut self, len: usize) -> usize {
        usize::from(self.byte()) % len.max(1)
    }

    fn range(&mut self) -> BlockRange {
        let start = u64::from(self.byte()) * 157 % (DISK_SECTORS - 64);
        let len = u64::from(self.byte()) % 64 + 1;
        // Aligned to what bits cover, or not at all.
        let (start, len) =
            if len.is_multiple_of(2) { (start & !7, len.next_multiple_of(8)) } else { (start, len) };
        BlockRange::new(Sector(start), SectorCount(len)).expect("it is short")
    }
}

struct Node {
    core: Resource,
    /// What a crash leaves, and an attach reads.
    superblock: Superblock,
    bitmap: Vec<u64>,
    hot: BTreeSet<u32>,
    disk_open: bool,
    ios: Vec<DiskIo>,
    metas: VecDeque<(MetaId, MetaWrite)>,
    wants_peer: bool,
    session: Option<SessionId>,
    inbox: VecDeque<(Message, Payload)>,
    requests: BTreeSet<u64>,
    verbs: BTreeSet<u64>,
    opened: u32,
    exported: bool,
}

impl Node {
    fn new(config: ResourceConfig, seed: u64, now: Time) -> Self {
        Self {
            core: Resource::new(config, seed, now),
            superblock: Superblock {
                la_size: SectorCount(0),
                uuid: [UUID_JUST_CREATED, 0, 0, 0],
                device_uuid: 77,
                flags: 0,
                magic: MAGIC_UNCLEAN,
                md_size_sect: 72,
                al_offset: 8,
                al_nr_extents: 67,
                bm_offset: 72,
                bm_bytes_per_bit: 4096,
                la_peer_max_bio_size: 0,
                al_stripes: 1,
                al_stripe_size_4k: 8,
            },
            bitmap: vec![0; BITMAP_WORDS],
            hot: BTreeSet::new(),
            disk_open: false,
            ios: Vec::new(),
            metas: VecDeque::new(),
            wants_peer: false,
            session: None,
            inbox: VecDeque::new(),
            requests: BTreeSet::new(),
            verbs: BTreeSet::new(),
            opened: 0,
            exported: false,
        }
    }

    fn store(&mut self, write: MetaWrite) {
        match write {
            MetaWrite::Superblock(superblock) => self.superblock = *superblock,
            MetaWrite::AlTransaction(transaction) => {
                self.hot
                    .extend(transaction.updates.iter().map(|(_, extent)| *extent).filter(|e| *e != u32::MAX));
            }
            MetaWrite::AlInit => self.hot.clear(),
            MetaWrite::Relocate | MetaWrite::ForgetOldPlace => {}
            MetaWrite::Bitmap(pages) => {
                for page in pages {
                    let at = page.index as usize * page.words.len();
                    self.bitmap[at..at + page.words.len()].copy_from_slice(&page.words[..]);
                }
            }
        }
    }

    fn attached(&self) -> Attached {
        let extents = DISK_SECTORS.div_ceil(8192);
        Attached {
            superblock: self.superblock.clone(),
            hot_extents: self.hot.iter().copied().filter(|extent| u64::from(*extent) < extents).collect(),
            al_unusable: false,
            bitmap: self.bitmap.clone(),
            capacity: SectorCount(DISK_SECTORS),
            discard: true,
            logical_block_bytes: 512,
        }
    }
}

struct World {
    nodes: [Node; 2],
    configs: [ResourceConfig; 2],
    now: Time,
    /// For sessions, buffers, requests and verbs alike.
    next: u32,
}

impl World {
    fn new(steps: &mut Steps<'_>) -> Self {
        let choice = steps.byte();
        let net = NetConfig {
            protocol: [Protocol::C, Protocol::B, Protocol::A][usize::from(choice) % 3],
            max_epoch_size: if choice & 4 == 0 { 2048 } else { 2 },
            allow_two_primaries: choice & 8 != 0,
            ..NetConfig::default()
        };
        let configs = [0, 1].map(|own: u32| ResourceConfig {
            name: "r".into(),
            node_id: own,
            node_name: format!("n{own}"),
            peer_node_id: 1 - own,
            peer_name: format!("n{}", 1 - own),
            net: net.clone(),
            volumes: vec![VolumeConfig {
                al_extents: 67,
                al_updates: choice & 16 == 0,
                ..VolumeConfig::new(VOLUME)
            }],
            options: lockstep_replicator::core::config::ResourceOptions::default(),
        });
        let mut nodes = [0, 1].map(|at: usize| Node::new(configs[at].clone(), at as u64 + 1, Time(0)));
        if choice & 32 == 0 {
            for node in &mut nodes {
                node.superblock.la_size = SectorCount(DISK_SECTORS);
                node.superblock.uuid = [0x1234_5678_9abc_def0, 0, 0, 0];
                node.superblock.flags = flags::CONSISTENT | flags::WAS_UP_TO_DATE;
            }
        }
        let mut world = Self { nodes, configs, now: Time(1), next: 1 };
        if choice & 64 == 0 {
            for at in 0..2 {
                world.attach(at);
                world.verb(at, AdminCommand::Connect { discard_my_data: false, tentative: false });
            }
            world.connect();
            world.settle();
        }
        world
    }

    fn number(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    /// One byte chooses the node and what happens there.
    fn step(&mut self, steps: &mut Steps<'_>) {
        let choice = steps.byte();
        let at = usize::from(choice & 1);
        match (choice >> 1) % 20 {
            0 => self.settle(),
            1 => self.request(at, steps),
            2 => {
                let id = RequestId(self.number().into());
                self.nodes[at].requests.insert(id.0);
                self.handle(at, Input::Flush { id, volume: VOLUME });
            }
            3 => self.disk_done(at, steps.byte(), true),
            4 => self.disk_done(at, steps.byte(), false),
            5 => self.meta_done(at, true),
            6 => self.meta_done(at, steps.byte() & 3 != 0),
            7 => self.deliver(at),
            8 => self.deliver_damaged(at, steps),
            9 => self.invent(at, steps),
            10 => self.connect(),
            11 => self.cut(at, false),
            12 => self.cut(at, true),
            13 => self.timeout(at),
            14 => self.now = self.now.plus_ms(u64::from(steps.byte()) * 10),
            15 => self.attach(at),
            16 => self.open_or_close(at, choice & 128 != 0),
            17 => self.crash(at),
            18 => {
                for _ in 0..steps.byte() % 16 {
                    self.turn(at);
                }
            }
            _ => {
                let command = command(steps);
                self.verb(at, command);
            }
        }
    }

    /// Hands in one input and takes everything that comes out.
    fn handle(&mut self, at: usize, input: Input) {
        self.now.0 += 1000;
        self.nodes[at].core.handle(self.now, input);
        while let Some(output) = self.nodes[at].core.poll_output() {
            self.take(at, output);
        }
        assert!(self.nodes[at].core.status(self.now).volumes.len() == 1);
    }

    fn take(&mut self, at: usize, output: Output) {
        let node = &mut self.nodes[at];
        match output {
            Output::Complete { id, .. } => assert!(node.requests.remove(&id.0), "{id:?} answered twice"),
            Output::Disk(io) => {
                assert!(node.disk_open, "IO on a disk that was given back");
                assert!(node.ios.iter().all(|other| other.id != io.id), "{:?} is in use", io.id);
                if let Some(range) = io.range {
                    assert!(range.within(SectorCount(DISK_SECTORS)), "{range:?} is outside the disk");
                }
                node.ios.push(io);
            }
            Output::Meta { id, write, .. } => {
                assert!(node.disk_open, "metadata of a disk that was given back");
                node.metas.push_back((id, write));
            }
            Output::Connect => node.wants_peer = true,
            Output::StopConnecting => node.wants_peer = false,
            Output::Disconnect { session, .. } => {
                if node.session == Some(session) {
                    // The other side notices when it has read what was sent before, or at the next cut.
                    node.session = None;
                    node.inbox.clear();
                }
            }
            Output::Send { session, message, payload } => {
                if node.session == Some(session) {
                    let peer = &mut self.nodes[1 - at];
                    if peer.session == Some(session) {
                        check_sound(&message, &payload);
                        peer.inbox.push_back((message, payload));
                    }
                }
            }
            Output::Release(_) | Output::Event(_) => {}
            Output::Measure(volume) => self.handle(at, Input::Measured { volume, place: None }),
            Output::AdminReply { id, .. } => assert!(node.verbs.remove(&id.0), "{id:?} answered twice"),
            Output::Export { size, .. } => {
                node.exported = size.is_some();
            }
            Output::RunHandler { token, .. } => {
                let exit_code = Some(4).filter(|_| token.0 % 3 == 0);
                node.core.handle(self.now, Input::HandlerDone { token, exit_code });
            }
            Output::DiskReleased(_) => {
                assert!(node.ios.is_empty() && node.metas.is_empty(), "given back with IO in flight");
                node.disk_open = false;
            }
        }
    }

    /// Everything that is under way comes to an end, without faults.
    fn settle(&mut self) {
        for _ in 0..MAX_SETTLE {
            if !(self.turn(0) | self.turn(1)) {
                return;
            }
        }
    }

    /// One thing that is under way at the node ends.
    fn turn(&mut self, at: usize) -> bool {
        let node = &self.nodes[at];
        if !node.metas.is_empty() {
            self.meta_done(at, true);
        } else if !node.ios.is_empty() {
            self.disk_done(at, 0, true);
        } else if !node.inbox.is_empty() {
            self.deliver(at);
        } else {
            return false;
        }
        true
    }

    fn request(&mut self, at: usize, steps: &mut Steps<'_>) {
        if !self.nodes[at].exported {
            return; // a front end that is not there asks nothing
        }
        let id = RequestId(self.number().into());
        let choice = steps.byte();
        let op = match choice % 8 {
            0 => RequestOp::Discard,
            1 => RequestOp::WriteZeroes { may_unmap: choice & 64 != 0 },
            2 | 3 => RequestOp::Read,
            _ => RequestOp::Write,
        };
        let buffer = matches!(op, RequestOp::Read | RequestOp::Write).then(|| BufferId(self.number()));
        let range = steps.range();
        self.nodes[at].requests.insert(id.0);
        self.handle(
            at,
            Input::Request(Request { id, volume: VOLUME, op, range, fua: choice & 128 != 0, buffer }),
        );
    }

    fn disk_done(&mut self, at: usize, which: u8, good: bool) {
        let len = self.nodes[at].ios.len();
        if len == 0 {
            return;
        }
        let io = self.nodes[at].ios.remove(usize::from(which) % len);
        let result = if good {
            let reads = matches!(io.op, DiskOp::Read | DiskOp::ReadDigest);
            let buffer = (reads && io.buffer.is_none()).then(|| BufferId(self.number()));
            // Two different digests, so that both outcomes of a comparison are met.
            let digest = (io.op == DiskOp::ReadDigest).then_some(Digest([u64::from(which & 1); 4]));
            Ok(DiskOk { buffer, all_zero: which & 64 != 0, digest })
        } else if which & 128 != 0 {
            Err(IoError::Aborted)
        } else {
            Err(IoError::Errno(5))
        };
        self.handle(at, Input::DiskDone { id: io.id, result });
    }

    fn meta_done(&mut self, at: usize, good: bool) {
        let Some((id, write)) = self.nodes[at].metas.pop_front() else { return };
        if good {
            self.nodes[at].store(write);
        }
        let result = if good { Ok(()) } else { Err(IoError::Errno(5)) };
        self.handle(at, Input::MetaDone { id, result });
    }

    fn deliver(&mut self, at: usize) {
        let Some(session) = self.nodes[at].session else { return };
        let Some((message, payload)) = self.nodes[at].inbox.pop_front() else { return };
        let payload = match payload {
            Payload::Buffer { len, .. } => Payload::Buffer { id: BufferId(self.number()), len },
            other => other,
        };
        self.handle(at, Input::PeerMessage { session, message, payload });
    }

    /// The next frame arrives with a byte of its header changed, as a peer with a bug would send it.
    fn deliver_damaged(&mut self, at: usize, steps: &mut Steps<'_>) {
        let (place, change) = (steps.byte(), steps.byte());
        let Some((message, payload)) = self.nodes[at].inbox.front_mut() else { return };
        let mut header = Vec::new();
        message.encode_header(&mut header);
        if header.is_empty() {
            return;
        }
        let place = usize::from(place) % header.len();
        header[place] ^= change;
        if let Ok(changed) = Message::decode_header(message.message_type(), &header)
            && is_sound(&changed, payload)
        {
            *message = changed;
        }
        self.deliver(at);
    }

    /// A frame that nobody sent.
    fn invent(&mut self, at: usize, steps: &mut Steps<'_>) {
        let kind = MessageType::ALL[steps.index(MessageType::ALL.len())];
        let len = steps.index(64);
        let payload_len = steps.byte();
        let Ok(message) = Message::decode_header(kind, steps.bytes(len)) else { return };
        let payload = match kind.payload_kind() {
            PayloadKind::None => Payload::None,
            PayloadKind::Blocks => {
                let len = match &message {
                    Message::DataReply(reply) | Message::RsDataReply(reply) => reply.nr_sectors,
                    _ => u64::from(payload_len % 64) + 1,
                };
                Payload::Buffer { id: BufferId(self.number()), len: SectorCount(len) }
            }
            PayloadKind::BitmapWords => {
                Payload::Bytes(Bytes::from(vec![payload_len; usize::from(payload_len) * 8]))
            }
        };
        // An old session now and then: the core drops what comes on it.
        let session = match self.nodes[at].session {
            Some(session) if payload_len != 255 => session,
            _ => SessionId(1),
        };
        if is_sound(&message, &payload) {
            self.handle(at, Input::PeerMessage { session, message, payload });
        }
    }

    fn connect(&mut self) {
        if self.nodes.iter().all(|node| node.wants_peer && node.session.is_none()) {
            let session = SessionId(u64::from(self.number()) + 1000);
            for node in &mut self.nodes {
                node.session = Some(session);
                node.inbox.clear();
            }
            for at in 0..2 {
                self.handle(at, Input::PeerConnected(session));
            }
        }
    }

    /// The transport breaks, at both ends or as seen by one.
    fn cut(&mut self, at: usize, both: bool) {
        for at in [Some(at), both.then_some(1 - at)].into_iter().flatten() {
            if let Some(session) = self.nodes[at].session.take() {
                self.nodes[at].inbox.clear();
                self.handle(at, Input::PeerLost { session, reason: LostReason::Closed("cut".into()) });
            }
        }
    }

    fn timeout(&mut self, at: usize) {
        if let Some(due) = self.nodes[at].core.poll_timeout() {
            self.now = self.now.max(due);
            self.handle(at, Input::Timeout);
        }
    }

    fn attach(&mut self, at: usize) {
        // The runtime opens a disk once, and keeps it until the core gives it back.
        if !self.nodes[at].disk_open {
            self.nodes[at].disk_open = true;
            let attached = Box::new(self.nodes[at].attached());
            self.verb(at, AdminCommand::Attach { volume: VOLUME, attached });
        }
    }

    fn open_or_close(&mut self, at: usize, close: bool) {
        let node = &mut self.nodes[at];
        if close && node.opened > 0 {
            node.opened -= 1;
            self.handle(at, Input::Closed(VOLUME));
        } else if !close && node.exported && node.opened < 3 {
            node.opened += 1;
            self.handle(at, Input::Opened(VOLUME));
        }
    }

    fn verb(&mut self, at: usize, command: AdminCommand) {
        let id = AdminId(self.number().into());
        self.nodes[at].verbs.insert(id.0);
        self.handle(at, Input::Admin { id, command });
    }

    /// The node loses power and starts again, with what was durable.
    fn crash(&mut self, at: usize) {
        let seed = self.number().into();
        let old = std::mem::replace(&mut self.nodes[at], Node::new(self.configs[at].clone(), seed, self.now));
        let node = &mut self.nodes[at];
        (node.superblock, node.bitmap, node.hot) = (old.superblock, old.bitmap, old.hot);
        self.cut(1 - at, false);
        self.attach(at);
        self.verb(at, AdminCommand::Connect { discard_my_data: false, tentative: false });
    }
}

/// Any verb that needs no disk read before it.
fn command(steps: &mut Steps<'_>) -> AdminCommand {
    let choice = steps.byte();
    let yes = choice & 128 != 0;
    match choice % 12 {
        0 => AdminCommand::Detach { volume: VOLUME, force: yes },
        1 => AdminCommand::Connect { discard_my_data: yes, tentative: choice & 64 != 0 },
        2 => AdminCommand::Disconnect { force: yes },
        3..=5 => AdminCommand::Primary { force: yes },
        6 => AdminCommand::Secondary,
        7 => AdminCommand::Invalidate(VOLUME),
        8 => AdminCommand::InvalidateRemote(VOLUME),
        9 => AdminCommand::Outdate(VOLUME),
        10 => AdminCommand::NewCurrentUuid { volume: VOLUME, clear_bitmap: yes },
        _ => AdminCommand::Down,
    }
}

/// Whether the runtime would have taken this frame off the wire.
fn is_sound(message: &Message, payload: &Payload) -> bool {
    let len = match payload {
        Payload::None => 0,
        Payload::Buffer { len, .. } => usize::try_from(len.0.saturating_mul(512)).unwrap_or(usize::MAX),
        Payload::Bytes(bytes) => bytes.len(),
    };
    frame::encode_head(message, len, Some(0), &mut Vec::new()).is_ok()
}

fn check_sound(message: &Message, payload: &Payload) {
    assert!(is_sound(message, payload), "sends what no peer accepts: {message:?} {payload:?}");
}
