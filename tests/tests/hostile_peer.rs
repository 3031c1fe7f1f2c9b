//! A peer may say anything that decodes, at any time: no panic, no leak, every request answered.
use lockstep_proto::{Message, v1};
use lockstep_replicator::core::event::{AdminCommand, Input, LostReason, Payload, RequestOp, SessionId};
use lockstep_replicator::core::state::{ConnState, Role};
use lockstep_replicator::units::SectorCount;
use lockstep_tests::sim::node::VOLUME;
use lockstep_tests::sim::{Options, Rng, World};

/// Mostly small numbers that mean something, sometimes huge ones.
fn number(rng: &mut Rng, sensible: u64) -> u64 {
    match rng.below(12) {
        0 => rng.next(),
        1 => u64::MAX - rng.below(3),
        _ => rng.below(sensible),
    }
}

fn pick<T: Copy>(rng: &mut Rng, from: &[T]) -> T {
    from[usize::try_from(rng.below(from.len() as u64)).unwrap_or(0)]
}

fn small(rng: &mut Rng, sensible: u64) -> u32 {
    u32::try_from(number(rng, sensible)).unwrap_or(u32::MAX)
}

fn hello(rng: &mut Rng) -> v1::Hello {
    let mut hello = v1::Hello {
        version_min: 1,
        version_max: 1,
        node_id: 1,
        resource: "r0".into(),
        protocol: 3,
        ..v1::Hello::default()
    };
    if rng.percent(5) {
        hello.node_id = small(rng, 3);
        hello.version_min = small(rng, 3);
    }
    hello
}

fn volume_info(rng: &mut Rng, known: &[u64], phase: u64) -> v1::VolumeInfo {
    let mut uuid = || if rng.percent(70) { pick(rng, known) } else { rng.next() };
    let (uuid_current, uuid_bitmap, uuid_history_0, uuid_history_1) = (uuid(), uuid(), uuid(), uuid());
    v1::VolumeInfo {
        phase: i32::try_from(phase).unwrap_or(0),
        volume: if rng.percent(95) { 0 } else { small(rng, 3) },
        capacity_sectors: if rng.percent(80) { 65536 } else { number(rng, 100_000) },
        agreed_size_sectors: if rng.percent(80) { 65536 } else { number(rng, 100_000) },
        user_size_sectors: if rng.percent(90) { 0 } else { number(rng, 100_000) },
        uuid_current,
        uuid_bitmap,
        uuid_history_0,
        uuid_history_1,
        uuid_flags: small(rng, 16),
        disk_state: pick(rng, &[0, 3, 4, 5, 6, 8, 9, 9, 9]),
        role: if rng.percent(90) { 2 } else { small(rng, 3) },
        out_of_sync_bits: number(rng, 3),
        foreign_bits: number(rng, 3),
        discard_supported: true,
        last_of_handshake: 1,
    }
}

fn message(rng: &mut Rng, known: &[u64], ids: &[u64]) -> (Message, u64) {
    let id = if ids.is_empty() || rng.percent(20) { number(rng, 9) } else { pick(rng, ids) };
    let (volume, sector, nr_sectors) =
        (if rng.percent(95) { 0 } else { small(rng, 2) }, number(rng, 70_000), number(rng, 300));
    let ack = v1::BlockAck { volume, sector, nr_sectors, request: id, set_in_sync: rng.percent(50) };
    let ask = v1::BlockRequest { volume, sector, nr_sectors, request: id };
    let reply = v1::BlockReply { volume, sector, nr_sectors, request: id, window_sectors: 0 };
    let trim = v1::Trim {
        volume,
        sector,
        nr_sectors,
        request: id,
        epoch: small(rng, 4),
        fua: false,
        want_recv_ack: rng.percent(50),
        want_write_ack: rng.percent(50),
        may_unmap: true,
    };
    let data = v1::Data {
        volume,
        sector,
        request: id,
        epoch: small(rng, 4),
        fua: rng.percent(10),
        want_recv_ack: rng.percent(50),
        want_write_ack: rng.percent(50),
    };
    let blocks = 1 + rng.below(64);
    match rng.below(38) {
        0 | 1 => (Message::Data(data), blocks),
        2 => (Message::Discard(trim), 0),
        3 => (Message::WriteZeroes(trim), 0),
        4 | 5 => (Message::Barrier(v1::Barrier { epoch: small(rng, 5) }), 0),
        6 => (Message::BarrierAck(v1::BarrierAck { epoch: small(rng, 5), writes: small(rng, 4) }), 0),
        7 => (Message::RecvAck(ack), 0),
        8 => (Message::WriteAck(ack), 0),
        9 => (Message::NegAck(ack), 0),
        10 => (Message::DataRequest(ask), 0),
        11 => (Message::DataReply(reply), blocks),
        12 => (Message::NegDReply(ack), 0),
        13 | 14 => (Message::RsDataRequest(ask), 0),
        15 => (Message::RsDataReply(reply), blocks),
        16 => (Message::RsDeallocated(reply), 0),
        17 => (Message::RsWriteAck(ack), 0),
        18 => (Message::NegRsDReply(ack), 0),
        19 => (Message::OutOfSync(v1::OutOfSync { volume, sector, nr_sectors }), 0),
        20 | 21 => {
            (Message::Bitmap(v1::Bitmap { volume, first_word: number(rng, 200), last: rng.percent(70) }), 0)
        }
        22 => (
            Message::SyncUuid(v1::SyncUuid {
                volume,
                sync_uuid: rng.next(),
                uuid_current: rng.next(),
                uuid_history_0: 0,
                uuid_history_1: 0,
            }),
            0,
        ),
        23 => (Message::ResyncFinished(v1::ResyncFinished { volume, failed_bits: number(rng, 2) }), 0),
        24 => {
            let phase = rng.below(4);
            (Message::VolumeInfo(volume_info(rng, known, phase)), 0)
        }
        25 => {
            let disk_state = small(rng, 10);
            (
                Message::State(v1::State {
                    role: small(rng, 3),
                    volumes: vec![v1::VolumeState { volume, disk_state, sync_paused: false, ahead: false }],
                }),
                0,
            )
        }
        26 | 27 => (
            Message::StateRequest(v1::StateRequest {
                id: number(rng, 5),
                kind: i32::try_from(rng.below(11)).unwrap_or(0),
                volume,
                uuid_current: rng.next(),
                size_sectors: number(rng, 1 << 17),
                assume_clean: rng.percent(50),
                start_sector: number(rng, 1 << 17),
                stop_sector: number(rng, 1 << 17),
            }),
            0,
        ),
        28 => (
            Message::StateReply(v1::StateReply {
                id: number(rng, 5),
                result: i32::try_from(rng.below(3)).unwrap_or(0),
                text: String::new(),
                value: number(rng, 1 << 17),
            }),
            0,
        ),
        29 => (Message::OvRequest(ask), 0),
        30 => {
            let digest =
                v1::ChecksumReply { volume, request: id, readable: rng.percent(80), ..Default::default() };
            (Message::OvReply(digest), 0)
        }
        31 => (Message::OvResult(v1::OutOfSync { volume, sector, nr_sectors }), 0),
        32 => {
            let (found_bits, skipped_bits) = (number(rng, 3), number(rng, 3));
            (Message::VerifyFinished(v1::VerifyFinished { volume, found_bits, skipped_bits }), 0)
        }
        33 => (Message::RsIsInSync(reply), 0),
        34 => {
            let request =
                v1::ChecksumRequest { volume, sector, nr_sectors, request: id, ..Default::default() };
            (Message::RsChecksumRequest(request), 0)
        }
        35 => (
            Message::ProtocolUpdate(v1::ProtocolUpdate {
                protocol: small(rng, 5),
                allow_two_primaries: rng.percent(30),
                after_sb_0pri: small(rng, 12),
                after_sb_1pri: small(rng, 8),
                after_sb_2pri: small(rng, 6),
            }),
            0,
        ),
        36 => (Message::DataReply(reply), 0),
        _ => (Message::Hello(hello(rng)), 0),
    }
}

fn say(world: &mut World, session: SessionId, message: Message, blocks: u64) {
    let payload = if blocks > 0 {
        let id = world.nodes[0].new_buffer(vec![7; usize::try_from(blocks).unwrap_or(0)]);
        Payload::Buffer { id, len: SectorCount(blocks) }
    } else if matches!(message, Message::Bitmap(_)) {
        Payload::Bytes(vec![0x5a; 64].into())
    } else {
        Payload::None
    };
    world.feed(0, Input::PeerMessage { session, message, payload });
}

/// One run; how many messages it said on a session whose handshake was done.
fn attack(seed: u64) -> u64 {
    let mut heard = 0;
    let mut world = World::new(Options::new(seed));
    world.check_data = false;
    let mut rng = Rng::new(seed ^ 0x5eed);
    world.start(0);
    world.run(50);
    if rng.percent(70) {
        world.admin(0, "primary-force", AdminCommand::Primary { force: true });
        world.run(50);
    }
    let primary = world.is_primary(0);
    for _ in 0..16 {
        let session = world.ids.session();
        world.feed(0, Input::PeerConnected(session));
        world.nodes[0].session = Some(session);
        let known: Vec<u64> = world.status(0).map_or(vec![4], |s| s.volumes[0].uuids.to_vec());
        let greeting = hello(&mut rng);
        say(&mut world, session, Message::Hello(greeting), 0);
        world.run(20);
        let info = volume_info(&mut rng, &known, 0);
        say(&mut world, session, Message::VolumeInfo(info), 0);
        let sent: Vec<u64> = (0..8).flat_map(|seq| (0..6).map(move |key| (seq << 32) | key)).collect();
        for _ in 0..25 {
            match rng.below(8) {
                0 => world.run(1),
                1 if primary => {
                    let start = rng.below(8000) * 8;
                    let op = if rng.percent(50) { RequestOp::Write } else { RequestOp::Read };
                    world.request(0, op, start, 8, false);
                }
                2 if rng.percent(20) => {
                    let command = match rng.below(5) {
                        0 => AdminCommand::Invalidate(VOLUME),
                        1 => AdminCommand::InvalidateRemote(VOLUME),
                        2 => AdminCommand::Detach { volume: VOLUME, force: rng.percent(50) },
                        3 => AdminCommand::Secondary,
                        _ => AdminCommand::Primary { force: rng.percent(50) },
                    };
                    world.admin(0, "any", command);
                }
                _ => {
                    let (message, blocks) = message(&mut rng, &known, &sent);
                    heard += u64::from(world.state(0).is_some_and(|state| state.2 == ConnState::Connected));
                    say(&mut world, session, message, blocks);
                }
            }
        }
        world.nodes[0].session = None;
        world.feed(0, Input::PeerLost { session, reason: LostReason::Closed("enough".into()) });
        world.run(100);
        if world.state(0).is_some_and(|state| state.2 == ConnState::StandAlone) {
            world.admin(0, "connect", AdminCommand::Connect { discard_my_data: false, tentative: false });
        }
    }
    world.run(1000);
    assert_eq!(world.broken, None);
    let core = world.nodes[0].core.as_ref().expect("nothing stopped the node");
    assert!(
        core.is_idle(),
        "seed {seed}: not idle after the peer is gone: {:?}",
        core.status(lockstep_replicator::units::Time(world.now)).waiting_for
    );
    assert!(world.nodes[0].requests.is_empty(), "seed {seed}: requests without an answer");
    assert!(
        world.nodes[0].verbs.is_empty(),
        "seed {seed}: verbs without an answer: {:?}",
        world.nodes[0].verbs
    );
    assert!(world.nodes[0].buffers.is_empty(), "seed {seed}: buffers kept");
    assert!(matches!(world.state(0).expect("the node runs").0, Role::Primary | Role::Secondary));
    heard
}

#[test]
fn nothing_a_peer_says_panics_or_leaks() {
    let mut bad = Vec::new();
    let mut heard = 0;
    for seed in 0..600 {
        match std::panic::catch_unwind(|| attack(seed)) {
            Ok(count) => heard += count,
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
                bad.push(format!("seed {seed}: {text}"));
            }
        }
    }
    assert!(heard > 5_000, "only {heard} messages met an open session");
    assert!(bad.is_empty(), "{} bad runs:\n{}", bad.len(), bad.join("\n"));
}
