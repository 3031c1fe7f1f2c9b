//! The first message of a session: do the two nodes fit together (SEM §13 "before the table", §28)?
//!
//! Versions, names and the options that must be equal on both nodes. Who does not fit is refused for good:
//! StandAlone with both values, and never a retry in a loop.
use super::Resource;
use super::config::{AfterSb0Pri, AfterSb1Pri, AfterSb2Pri, Protocol, RrConflict};
use super::event::{Payload, Severity};
use lockstep_proto::{Message, limits, v1};

impl Resource {
    pub(super) fn start_handshake(&mut self) {
        let net = &self.cfg.net;
        let hello = v1::Hello {
            version_min: limits::PROTOCOL_VERSION_MIN,
            version_max: limits::PROTOCOL_VERSION_MAX,
            features: limits::FEATURES,
            node_id: self.cfg.node_id,
            node_name: self.cfg.node_name.clone(),
            resource: self.cfg.name.clone(),
            protocol: net.protocol.number(),
            after_sb_0pri: net.after_sb_0pri.number(),
            after_sb_1pri: net.after_sb_1pri.number(),
            after_sb_2pri: net.after_sb_2pri.number(),
            always_asbp: net.always_asbp,
            rr_conflict: net.rr_conflict.number(),
            allow_two_primaries: net.allow_two_primaries,
            discard_my_data: self.discard_my_data,
            tentative: self.tentative,
            session_nonce: self.life,
            max_payload_bytes: u32::try_from(limits::MAX_PAYLOAD_BYTES).unwrap_or(u32::MAX),
        };
        self.send(Message::Hello(hello), Payload::None);
    }

    pub(super) fn on_hello(&mut self, hello: &v1::Hello) {
        if self.session.as_ref().is_some_and(|session| session.handshake.hello_seen) {
            return self.protocol_error("a second Hello");
        }
        let _spoken = hello.version_max.min(limits::PROTOCOL_VERSION_MAX);
        if hello.version_min > limits::PROTOCOL_VERSION_MAX
            || hello.version_max < limits::PROTOCOL_VERSION_MIN
        {
            let why = format!(
                "the peer speaks protocol versions {}-{}, this node {}-{}",
                hello.version_min,
                hello.version_max,
                limits::PROTOCOL_VERSION_MIN,
                limits::PROTOCOL_VERSION_MAX
            );
            return self.refuse_peer(&why, "upgrade the older node");
        }
        if hello.resource != self.cfg.name
            || hello.node_id != self.cfg.peer_node_id
            || hello.node_id == self.cfg.node_id
        {
            let why = format!(
                "the peer is resource {:?}, node id {} ({}); expected {:?}, node id {}",
                hello.resource, hello.node_id, hello.node_name, self.cfg.name, self.cfg.peer_node_id
            );
            return self.refuse_peer(&why, "make the configuration equal on both nodes");
        }
        if let Some((option, theirs, ours)) = self.incompatible_option(hello) {
            let why = format!("incompatible {option} settings: {theirs} on {}, {ours} here", hello.node_name);
            return self.refuse_peer(&why, "make the configuration equal on both nodes");
        }
        if hello.discard_my_data && self.discard_my_data {
            return self.refuse_peer(
                "both nodes were told to discard their data",
                "connect one of them without --discard-my-data",
            );
        }
        let Some(rr_conflict) = RrConflict::from_number(hello.rr_conflict) else {
            return self.protocol_error("an unknown rr-conflict policy");
        };
        if let Some(session) = &mut self.session {
            session.handshake.hello_seen = true;
            session.handshake.peer_always_asbp = hello.always_asbp;
            session.handshake.peer_rr_conflict = rr_conflict;
            session.handshake.peer_features = hello.features;
            session.handshake.peer_tentative = hello.tentative;
            session.peer_life = hello.session_nonce;
        }
        self.handshake_try_send();
    }

    fn incompatible_option(&self, hello: &v1::Hello) -> Option<(&'static str, String, String)> {
        let net = &self.cfg.net;
        let yes_no = |value: bool| if value { "yes" } else { "no" }.to_owned();
        let word = |known: Option<&'static str>, number: u32| {
            known.map_or_else(|| format!("number {number}"), str::to_owned)
        };
        let protocol = |number: u32| {
            Protocol::from_number(number).map_or_else(|| number.to_string(), |known| format!("{known:?}"))
        };
        // discard-local on one node is discard-remote on the other (SEM §15).
        let zero = AfterSb0Pri::from_number(hello.after_sb_0pri);
        let pairs = [
            ("protocol", protocol(hello.protocol), protocol(net.protocol.number())),
            (
                "after-sb-0pri",
                word(zero.map(AfterSb0Pri::name), hello.after_sb_0pri),
                net.after_sb_0pri.mirrored().name().to_owned(),
            ),
            (
                "after-sb-1pri",
                word(
                    AfterSb1Pri::from_number(hello.after_sb_1pri).map(AfterSb1Pri::name),
                    hello.after_sb_1pri,
                ),
                net.after_sb_1pri.name().to_owned(),
            ),
            (
                "after-sb-2pri",
                word(
                    AfterSb2Pri::from_number(hello.after_sb_2pri).map(AfterSb2Pri::name),
                    hello.after_sb_2pri,
                ),
                net.after_sb_2pri.name().to_owned(),
            ),
            ("allow-two-primaries", yes_no(hello.allow_two_primaries), yes_no(net.allow_two_primaries)),
        ];
        pairs.into_iter().find(|(_, theirs, ours)| theirs != ours).map(
            |(option, theirs, ours)| match option {
                // Shown as it is written here.
                "after-sb-0pri" => (option, theirs, net.after_sb_0pri.name().to_owned()),
                _ => (option, theirs, ours),
            },
        )
    }

    /// The two nodes do not fit: StandAlone, and never a retry in a loop.
    pub(super) fn refuse_peer(&mut self, why: &str, advice: &str) {
        let name = self.cfg.name.clone();
        self.note(Severity::Error, format!("{why}; next: {advice}, then drbdadm connect {name}"));
        self.go_stand_alone(why);
    }
}
