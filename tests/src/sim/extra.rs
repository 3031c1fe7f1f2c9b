//! How the actions of `mixed.rs` are carried out, and what a good operator does about them.
use super::Rng;
use super::mixed::{Extra, Feature, FenceHandler};
use super::plan::pick;
use super::real_area::RealArea;
use super::run::Run;
use super::world::{Asked, MS, World};
use lockstep_replicator::core::config::{Fencing, OnIoError, Protocol, RateControl, VolumeConfig};
use lockstep_replicator::core::event::{AdminCommand, HandlerName};
use lockstep_replicator::core::resize::ResizeOptions;
use lockstep_replicator::core::state::{ConnState, Role};
use lockstep_replicator::units::VolumeNr;

impl World {
    pub(super) fn note_suspension(&mut self, node: usize, command: &AdminCommand) {
        let lease = self.options.resource.suspend_lease_ms;
        match command {
            AdminCommand::SuspendIo => {
                if self.now >= self.lease_ends[node] {
                    self.suspended[node] = None;
                }
                self.suspending[node] = true;
                self.lease_ends[node] = if lease == 0 { u64::MAX } else { self.now + lease * MS };
            }
            AdminCommand::ResumeIo => (self.suspending[node], self.suspended[node]) = (false, None),
            _ => {}
        }
    }

    /// While `suspend-io` holds, nothing gets through that was asked after its answer.
    pub(super) fn check_suspended(&mut self, node: usize, request: u64, ok: bool) {
        let Some(since) = self.suspended[node].filter(|_| self.now < self.lease_ends[node]) else { return };
        let issued = match self.asked.get(&request) {
            Some(Asked::Read { issued, .. } | Asked::Flush { issued, .. }) => *issued,
            Some(Asked::Write { record }) => self.history.record(*record).map_or(0, |record| record.issued),
            None => 0,
        };
        if ok && issued > since {
            self.fail(format!("n{node}: request {request} gets through although IO is suspended"));
        }
    }

    /// What an honest `fence-peer` finds: the code it will answer, and the verb that must have gone well on
    /// the peer for it.
    pub(super) fn fence_honestly(&mut self, node: usize) -> (i32, u64) {
        let peer = 1 - node;
        match self.state(peer) {
            None => (5, 0),
            Some((Role::Primary, ..)) => (6, 0),
            Some(_) => {
                let mut asked = 0;
                for volume in 0..self.volumes() {
                    let nr = VolumeNr(u16::try_from(volume).unwrap_or(0));
                    asked = self.admin(peer, "outdate", AdminCommand::Outdate(nr));
                }
                (4, asked)
            }
        }
    }

    /// The code, unless the verb that it stands on was refused or has not come through.
    pub(super) fn fence_answer(&self, node: usize, code: i32, asked: u64) -> i32 {
        let answer = self.nodes[1 - node].answers.get(&asked);
        if asked == 0 || answer.is_some_and(Result::is_ok) { code } else { 1 }
    }
}

impl Run<'_> {
    pub(super) fn has(&self, feature: Feature) -> bool {
        self.plan.extras.contains(&feature)
    }

    pub(super) fn extra(&mut self, extra: Extra) -> bool {
        let nr = |volume: usize| VolumeNr(u16::try_from(volume).unwrap_or(0));
        let world = &mut self.world;
        match extra {
            Extra::Verify(node, volume) => {
                let verify = AdminCommand::Verify { volume: nr(volume), start: None, stop: None };
                world.admin(node, "verify", verify) != 0
            }
            Extra::PauseSync(node) => world.admin(node, "pause-sync", AdminCommand::PauseSync(nr(0))) != 0,
            Extra::ResumeSync(node) => world.admin(node, "resume-sync", AdminCommand::ResumeSync(nr(0))) != 0,
            Extra::SuspendIo(node) => world.admin(node, "suspend-io", AdminCommand::SuspendIo) != 0,
            Extra::ResumeIo(node) => world.admin(node, "resume-io", AdminCommand::ResumeIo) != 0,
            Extra::FenceHandler(node, handler, ms) => {
                self.fence_handler(node, handler, ms);
                true
            }
            Extra::PromoteOther => {
                self.promote_other();
                true
            }
            Extra::Adjust(number) => self.adjust(number),
            Extra::GrowDisk(node, bytes) => {
                let area = &mut world.nodes[node].disks[0].meta.real;
                area.as_mut().is_some_and(|area| {
                    area.grow_stale(bytes);
                    true
                })
            }
            Extra::Resize(node) => {
                // Alone, or beside a disk that is away, some operators look at the other device and vouch for it.
                let bytes = |node: usize| {
                    world.nodes[node].disks[0].meta.real.as_ref().map_or(0, RealArea::data_bytes)
                };
                let assume_peer_has_space =
                    bytes(1 - node) >= bytes(node) && (world.now / MS).is_multiple_of(2);
                let options = ResizeOptions { assume_peer_has_space, ..ResizeOptions::default() };
                let resize = AdminCommand::Resize { volume: nr(0), options };
                world.admin(node, "resize", resize) != 0
            }
            Extra::Protocol(node, protocol) => self.protocol(node, protocol),
            Extra::AlUpdates(node, on) => {
                let mut volume = world.nodes[node].volume.clone().unwrap_or(world.options.volume.clone());
                volume.al_updates = on;
                world.nodes[node].volume = Some(volume);
                true
            }
        }
    }

    fn fence_handler(&mut self, node: usize, handler: FenceHandler, ms: u64) {
        let world = &mut self.world;
        world.trace(|| format!("n{node}: fence-peer is {handler:?}, {ms} ms"));
        world.honest[node] = handler == FenceHandler::Honest;
        world.handler_delay_ms[node] = ms;
        let answer = match handler {
            FenceHandler::Honest => Some(0),
            FenceHandler::Says(code) => Some(code),
            FenceHandler::Hangs => None,
        };
        world.handler_answers.insert((node, HandlerName::FencePeer), answer);
    }

    /// A second Primary, where there is one and both nodes see each other.
    pub(super) fn promote_other(&mut self) {
        let one = (0..2).any(|node| self.world.is_primary(node));
        let connected = |node| self.world.state(node).is_some_and(|s| s.2 == ConnState::Connected);
        if !one || !connected(0) || !connected(1) {
            return;
        }
        for node in (0..2).filter(|node| !self.world.is_primary(*node)).collect::<Vec<_>>() {
            self.world.admin(node, "primary", AdminCommand::Primary { force: false });
        }
    }

    /// Other options on both nodes, as `drbdadm adjust` brings them.
    fn adjust(&mut self, number: u64) -> bool {
        let mut rng = Rng::new(number);
        let rng = &mut rng;
        let net = &mut self.world.options.net;
        net.max_epoch_size = pick(rng, &[1, 3, 20, 2048]);
        net.ping_int_ms = pick(rng, &[1000, 10_000]);
        net.ping_timeout_ms = pick(rng, &[500, 3000]);
        (net.ko_count, net.timeout_ms) = pick(rng, &[(0, 6000), (7, 6000), (2, 3000)]);
        net.csums_alg = rng.percent(30).then(|| "sha1".to_owned());
        let volume = &mut self.world.options.volume;
        volume.on_io_error = if rng.percent(20) { OnIoError::PassOn } else { OnIoError::Detach };
        volume.resync.control = if rng.percent(20) { RateControl::Fixed } else { RateControl::Adaptive };
        volume.resync.rate_kib_s = 4000 + rng.below(20_000);
        for node in 0..2 {
            let wanted = self.world.options.volume.clone();
            if let Some(own) = self.world.nodes[node].volume.clone() {
                let (al_extents, al_updates) = (own.al_extents, own.al_updates);
                self.world.nodes[node].volume = Some(VolumeConfig { al_extents, al_updates, ..wanted });
            }
        }
        let both = [0, 1].map(|node| self.configure(node));
        both.contains(&true)
    }

    /// What the configuration file of a node says now, told to its daemon.
    fn configure(&mut self, node: usize) -> bool {
        let world = &self.world;
        let first = world.nodes[node].volume.as_ref().unwrap_or(&world.options.volume);
        let volumes = (0..world.volumes())
            .map(|nr| VolumeConfig { nr: VolumeNr(u16::try_from(nr).unwrap_or(0)), ..first.clone() })
            .collect();
        let net = Box::new(world.net_of(node));
        self.world.admin(node, "adjust", AdminCommand::Configure { net, volumes }) != 0
    }

    /// Another protocol in the file of both nodes; told to both daemons, or to one, from which the other hears it.
    fn protocol(&mut self, one: Option<usize>, protocol: Protocol) -> bool {
        let net = &self.world.options.net;
        let stonith = net.fencing == Fencing::ResourceAndStonith;
        // Refused, and no operator would leave it in the file.
        let refused =
            (net.allow_two_primaries && protocol != Protocol::C) || (stonith && protocol == Protocol::A);
        if refused {
            return false;
        }
        self.world.options.net.protocol = protocol;
        self.world.history.set_protocol(protocol);
        let told = [0, 1].map(|node| one.is_none_or(|one| one == node) && self.configure(node));
        told.contains(&true)
    }

    /// A good operator: handlers work, nothing is held back.
    pub(super) fn tend_extras(&mut self) {
        if self.has(Feature::Fencing) {
            for node in 0..2 {
                self.fence_handler(node, FenceHandler::Honest, 1);
            }
        }
        self.move_metadata();
        if self.has(Feature::Protocol) {
            // What one of them was told goes to both in the end.
            for node in 0..2 {
                self.configure(node);
            }
        }
        for node in 0..2 {
            self.let_go(node);
        }
    }

    /// Nodes that parted because a volume grew past the other's disk: that has the room, once its metadata lies at
    /// its end, which `resize` sees to.
    pub(super) fn move_metadata(&mut self) {
        for node in 0..2 {
            let alone = self.world.state(node).is_some_and(|state| state.2 == ConnState::StandAlone);
            if self.has(Feature::Resize) && alone {
                let resize = AdminCommand::Resize { volume: VolumeNr(0), options: ResizeOptions::default() };
                self.world.admin(node, "resize", resize);
            }
        }
    }

    /// What was told to wait on this node goes on.
    pub(super) fn let_go(&mut self, node: usize) {
        if self.has(Feature::Pause) {
            for volume in 0..self.world.volumes() {
                let nr = VolumeNr(u16::try_from(volume).unwrap_or(0));
                self.world.admin(node, "resume-sync", AdminCommand::ResumeSync(nr));
            }
        }
        if self.has(Feature::Suspend) {
            self.world.admin(node, "resume-io", AdminCommand::ResumeIo);
        }
    }
}
