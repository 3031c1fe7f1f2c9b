//! A peer with a defect says what no node says: each such message ends the connection with a word that names it,
//! and the nodes meet again and lose nothing. (`hostile_peer.rs` says anything at random.)
use lockstep_proto::{Message, v1};
use lockstep_replicator::core::event::{
    AdminCommand, Event, Input, LostReason, Payload, RequestOp, SessionId,
};
use lockstep_replicator::core::state::{ConnState, ReplState};
use lockstep_replicator::units::SectorCount;
use lockstep_tests::sim::net::Wire;
use lockstep_tests::sim::node::VOLUME;
use lockstep_tests::sim::script::{detach, load, open, pair_with, pass, quiet, verb, within};
use lockstep_tests::sim::{Options, World};

/// What is going on when the message comes.
#[derive(Clone, Copy, Debug)]
enum While {
    /// Node 0, Primary, writes.
    Writes,
    /// Node 1 gets what it missed.
    Resync,
    /// The two nodes meet.
    Meet,
    /// Node 0 reads from the peer, for want of a disk.
    RemoteReads,
}

fn options(seed: u64) -> Options {
    let mut options = Options::new(seed);
    options.more_volumes = vec![8192];
    options
}

fn told(world: &World, node: usize, why: &str) -> bool {
    let text = format!("dropping the connection: {why}");
    world
        .log
        .iter()
        .any(|(_, at, event)| *at == node && matches!(event, Event::Note(_, said) if *said == text))
}

/// Changes the first message to `to` that `change` wants.
fn tampered(going_on: While, to: usize, why: &str, change: fn(&mut Message, &mut Wire) -> bool) {
    let mut world = pair_with(options(1));
    if matches!(going_on, While::RemoteReads) {
        detach(&mut world, 0);
    }
    if matches!(going_on, While::Resync) {
        world.cut(true);
        pass(&mut world, 100);
        load(&mut world, 0, 20);
        pass(&mut world, 100);
    }
    world.net.tamper = Some(Box::new(move |at, message, wire| at == to && change(message, wire)));
    match going_on {
        While::Writes => load(&mut world, 0, 5),
        While::Resync => world.heal(),
        While::Meet => world.cut(false),
        While::RemoteReads => {
            world.request(0, RequestOp::Read, 64, 8, false);
        }
    }
    within(&mut world, 5000, |w| told(w, to, why));
    if matches!(going_on, While::RemoteReads) {
        // Without the peer there is nothing to read from.
        within(&mut world, 5000, |w| open(w, 0) == 0);
        within(&mut world, 5000, |w| w.state(0).is_some_and(|state| state.2 == ConnState::Connected));
        world.attach(0);
    }
    quiet(&mut world);
    world.check_content(0);
    world.check_content(1);
}

fn session(world: &World, node: usize) -> SessionId {
    world.nodes[node].session.expect("the nodes are connected")
}

/// Says so many messages at once to a node.
fn flood(world: &mut World, to: usize, count: u64, mut message: impl FnMut(u64) -> (Message, u64)) {
    let session = session(world, to);
    for number in 0..count {
        let (message, sectors) = message(number);
        let payload = if sectors == 0 {
            Payload::None
        } else {
            let data = vec![7; usize::try_from(sectors).expect("a few")];
            Payload::Buffer { id: world.nodes[to].new_buffer(data), len: SectorCount(sectors) }
        };
        world.feed(to, Input::PeerMessage { session, message, payload });
    }
}

fn ask(number: u64) -> v1::BlockRequest {
    v1::BlockRequest { volume: 0, sector: number % 4000 * 8, nr_sectors: 8, request: number }
}

#[test]
fn messages_that_lack_their_data() {
    tampered(While::Writes, 1, "a write without data", |message, wire| {
        let fits = matches!(message, Message::Data(_));
        if fits {
            *wire = Wire::None;
        }
        fits
    });
    tampered(While::Resync, 1, "resync data without data", |message, wire| {
        let fits = matches!(message, Message::RsDataReply(_));
        if fits {
            *wire = Wire::None;
        }
        fits
    });
}

#[test]
fn answers_that_do_not_fit_what_was_asked() {
    let why = "an acknowledgement that does not fit the write it names";
    tampered(While::Writes, 0, why, |message, _| {
        let Message::WriteAck(ack) = message else { return false };
        ack.sector += 8;
        true
    });
    tampered(While::RemoteReads, 0, "data that does not fit the read it answers", |message, _| {
        let Message::DataReply(reply) = message else { return false };
        reply.sector += 8;
        true
    });
    tampered(While::Resync, 1, "a comparison nobody asked for", |message, wire| {
        let Message::RsDataReply(reply) = *message else { return false };
        (*message, *wire) = (Message::RsIsInSync(reply), Wire::None);
        true
    });
    tampered(While::Resync, 1, "a refused resync request nobody made", |message, wire| {
        let Message::RsDataReply(reply) = *message else { return false };
        let refused = v1::BlockAck {
            volume: reply.volume,
            sector: reply.sector,
            nr_sectors: 8,
            request: reply.request ^ (1 << 40),
            set_in_sync: false,
        };
        (*message, *wire) = (Message::NegRsDReply(refused), Wire::None);
        true
    });
}

#[test]
fn greetings_that_no_node_gives() {
    tampered(While::Meet, 0, "an unknown rr-conflict policy", |message, _| {
        let Message::Hello(hello) = message else { return false };
        hello.rr_conflict = 99;
        true
    });
    tampered(While::Meet, 1, "the facts of a volume twice", |message, _| {
        let Message::VolumeInfo(info) = message else { return false };
        let second = info.volume == 1;
        info.volume = 0;
        second
    });
    let why = "an attach or update before the handshake was done";
    tampered(While::Meet, 0, why, |message, _| {
        let Message::VolumeInfo(info) = message else { return false };
        info.phase = v1::volume_info::Phase::Update.into();
        true
    });
    tampered(While::Meet, 0, "Barrier before the handshake was done", |message, _| {
        let early = matches!(message, Message::VolumeInfo(_));
        if early {
            *message = Message::Barrier(v1::Barrier { epoch: 1 });
        }
        early
    });
}

#[test]
fn a_protocol_that_nobody_knows_is_shown_as_its_number() {
    let mut world = pair_with(options(2));
    world.net.tamper = Some(Box::new(|to, message, _| {
        let Message::Hello(hello) = message else { return false };
        hello.protocol = 7;
        to == 0
    }));
    world.cut(false);
    within(&mut world, 5000, |w| w.state(0).is_some_and(|state| state.2 == ConnState::StandAlone));
    let shown = |event: &Event| matches!(event, Event::Note(_, text) if text.contains("incompatible protocol settings: 7 on"));
    assert!(world.log.iter().any(|(_, node, event)| *node == 0 && shown(event)));
    for node in 0..2 {
        if world.state(node).is_some_and(|state| state.2 == ConnState::StandAlone) {
            assert_eq!(
                verb(
                    &mut world,
                    node,
                    "connect",
                    AdminCommand::Connect { discard_my_data: false, tentative: false }
                ),
                Ok(())
            );
        }
    }
    quiet(&mut world);
}

#[test]
fn two_primaries_may_not_be_forbidden_while_both_are() {
    let mut options = options(3);
    options.net.allow_two_primaries = true;
    let mut world = pair_with(options);
    assert_eq!(verb(&mut world, 1, "primary", AdminCommand::Primary { force: false }), Ok(()));
    let update =
        v1::ProtocolUpdate { protocol: 3, allow_two_primaries: false, ..v1::ProtocolUpdate::default() };
    flood(&mut world, 1, 1, |_| (Message::ProtocolUpdate(update), 0));
    assert!(told(&world, 1, "no two Primaries, while both nodes are"));
}

#[test]
fn more_than_any_node_sends_is_refused_and_what_was_taken_ends() {
    const READS: u64 = 1 << 13;
    const WRITES: u64 = 1 << 16;
    let check = |mut world: World, to: usize, why: &str| {
        assert!(told(&world, to, why), "{why}");
        world.check_data = false;
        within(&mut world, 60_000, |w| w.idle());
        assert!(world.nodes[to].ios.is_empty());
    };
    let mut world = pair_with(options(4));
    flood(&mut world, 0, READS + WRITES + 1, |number| (Message::DataRequest(ask(number)), 0));
    check(world, 0, "more reads in flight than any node sends");

    let mut world = pair_with(options(5));
    // Nobody wrote what comes now.
    (world.check_data, world.oracle.check_marks) = (false, false);
    // They stand behind one that has not ended.
    flood(&mut world, 1, WRITES + 1, |number| {
        let data = v1::Data {
            volume: 0,
            sector: number % 4000 * 8,
            request: number,
            epoch: 1,
            ..v1::Data::default()
        };
        (Message::Data(data), 1)
    });
    check(world, 1, "more writes in flight than any node sends");

    let mut world = pair_with(options(6));
    (world.check_data, world.oracle.check_marks) = (false, false);
    let first = v1::Data { volume: 0, sector: 0, request: 1, epoch: 1, ..v1::Data::default() };
    flood(&mut world, 1, 1, |_| (Message::Data(first), 8));
    flood(&mut world, 1, WRITES + 2, |_| (Message::Barrier(v1::Barrier { epoch: 1 }), 0));
    check(world, 1, "more barriers than any node sends");
}

#[test]
fn more_requests_of_a_resync_or_a_verify_than_the_window_allows() {
    const READS: u64 = 1 << 13;
    let mut world = pair_with(options(7));
    world.cut(true);
    pass(&mut world, 100);
    load(&mut world, 0, 200);
    pass(&mut world, 100);
    world.heal();
    within(&mut world, 5000, |w| w.state(0).is_some_and(|state| state.3 == ReplState::SyncSource));
    flood(&mut world, 0, READS + 1, |number| (Message::RsDataRequest(ask(number)), 0));
    assert!(told(&world, 0, "more resync requests than the window allows"));
    quiet(&mut world);

    let mut options = options(8);
    options.net.verify_alg = Some("sha1".into());
    let mut world = pair_with(options);
    world.admin(1, "verify", AdminCommand::Verify { volume: VOLUME, start: None, stop: None });
    within(&mut world, 5000, |w| w.state(0).is_some_and(|state| state.3 == ReplState::VerifyT));
    flood(&mut world, 0, READS + 1, |number| (Message::OvRequest(ask(number)), 0));
    assert!(told(&world, 0, "more verify requests than the window allows"));
    quiet(&mut world);
}

#[test]
fn a_transport_that_nobody_wants_is_refused() {
    let mut world = pair_with(options(9));
    assert_eq!(verb(&mut world, 0, "disconnect", AdminCommand::Disconnect { force: false }), Ok(()));
    let session = world.ids.session();
    world.feed(0, Input::PeerConnected(session));
    assert_eq!(world.state(0).map(|state| state.2), Some(ConnState::StandAlone));
    flood_is_ignored(&mut world, session);
}

/// What comes on a transport that was refused changes nothing.
fn flood_is_ignored(world: &mut World, session: SessionId) {
    let before = world.status(0).map(|status| format!("{status:?}"));
    let message = Message::Barrier(v1::Barrier { epoch: 1 });
    world.feed(0, Input::PeerMessage { session, message, payload: Payload::None });
    assert_eq!(world.status(0).map(|status| format!("{status:?}")), before);
    assert_eq!(world.broken, None);
}

#[test]
fn a_frame_that_does_not_decode_is_named_and_the_nodes_meet_again() {
    let mut world = pair_with(options(10));
    let session = session(&world, 1);
    world.nodes[1].session = None;
    world
        .feed(1, Input::PeerLost { session, reason: LostReason::Protocol("frame 7: a bad checksum".into()) });
    let named =
        |event: &Event| matches!(event, Event::Note(_, text) if text.contains("frame 7: a bad checksum"));
    assert!(world.log.iter().any(|(_, node, event)| *node == 1 && named(event)), "{:?}", world.log.last());
    world.cut(false);
    quiet(&mut world);
}
