//! Options changed while the resource runs (SEM §28).
//!
//! Most act from the next time they are looked at. Two need care:
//!
//! * **The protocol** changes between two epochs: the current one is ended, then `ProtocolUpdate` goes out
//!   in the stream of the writes, and the peer adopts it where it stands there. Every write keeps the
//!   protocol it was sent with until it is acknowledged, so nothing in flight is answered by another rule.
//! * **What is written by the log's rules stays so**: `al-extents` and `al-updates` count from the next
//!   attach. With a running log there is no moment at which they could change without a gap (S14).
//!
//! Options that both nodes must have alike (protocol, two Primaries, after-sb-*) are adopted by a connected
//! peer; its configuration file is for its operator to follow.
use super::config::{NetConfig, Protocol, VolumeConfig};
use super::event::{Payload, Refusal, Severity};
use super::state::{ConnState, Role};
use super::verbs::refusal;
use super::{Reply, Resource, config};
use lockstep_proto::{Message, v1};

impl Resource {
    /// The operator's configuration as it is now.
    pub(super) fn configure(&mut self, reply: Reply, net: NetConfig, volumes: &[VolumeConfig]) {
        if let Err(refused) = self.check_options(&net, volumes) {
            return self.reply(reply, Err(refused));
        }
        for wanted in volumes {
            let Some(at) = self.device_index(wanted.nr) else { continue };
            self.configure_volume(at, wanted);
        }
        let told = self.shared_options(&self.cfg.net) != self.shared_options(&net);
        if told && self.conn == ConnState::Connected {
            // Writes of this epoch were sent by the old rules; the next ones are not.
            self.close_epoch();
            let update = self.shared_options(&net);
            self.send(Message::ProtocolUpdate(update), Payload::None);
        }
        self.cfg.net = net;
        self.reply(reply, Ok(()));
    }

    fn configure_volume(&mut self, at: usize, wanted: &VolumeConfig) {
        let attached = self.devices[at].has_metadata();
        let kept = &self.devices[at].cfg;
        let (al_extents, al_updates) = (kept.al_extents, kept.al_updates);
        let later = attached && (wanted.al_extents != al_extents || wanted.al_updates != al_updates);
        let nr = self.devices[at].nr;
        self.devices[at].cfg = wanted.clone();
        self.timers.bring_forward(super::timer::Timer::Disk, self.now);
        if later {
            self.devices[at].cfg.al_extents = al_extents;
            self.devices[at].cfg.al_updates = al_updates;
            self.note(
                Severity::Info,
                format!("volume {}: al-extents and al-updates count from the next attach", nr.0),
            );
        }
        if let Some(own) = self.cfg.volumes.iter_mut().find(|own| own.nr == nr) {
            *own = self.devices[at].cfg.clone();
        }
    }

    fn check_options(&self, net: &NetConfig, volumes: &[VolumeConfig]) -> Result<(), Refusal> {
        let name = &self.cfg.name;
        if net.allow_two_primaries && net.protocol != Protocol::C {
            let facts = vec![format!("protocol {:?}, allow-two-primaries yes", net.protocol)];
            let text = "Two-primaries need protocol C";
            return Err(refusal(139, text, facts, "say protocol C, or allow-two-primaries no"));
        }
        if net.on_congestion != config::OnCongestion::Block && net.protocol != Protocol::A {
            let facts = vec![format!("protocol {:?}, on-congestion {:?}", net.protocol, net.on_congestion)];
            let text = "Congestion policy needs protocol A";
            return Err(refusal(155, text, facts, "say protocol A, or on-congestion block"));
        }
        if net.fencing == config::Fencing::ResourceAndStonith && net.protocol == Protocol::A {
            let facts = vec!["protocol A, fencing resource-and-stonith".to_owned()];
            let text = "Fencing resource-and-stonith is not possible with protocol A";
            return Err(refusal(154, text, facts, "say protocol B or C, or another fencing policy"));
        }
        if !net.allow_two_primaries && self.two_primaries() {
            let both = format!("{} and {} are Primary", self.cfg.node_name, self.cfg.peer_name);
            let about = self.role != Role::Primary || self.peer_role != Role::Primary;
            let facts = vec![if about { both + ", or becoming so" } else { both }];
            let advice = format!("on one of them: drbdadm secondary {name}; then drbdadm adjust {name}");
            let text = "Can not disable two-primaries while both nodes are Primary";
            return Err(refusal(164, text, facts, &advice));
        }
        let known = |wanted: &VolumeConfig| self.device_index(wanted.nr).is_some();
        if volumes.len() != self.devices.len() || !volumes.iter().all(known) {
            let facts = vec![format!("{name} runs with {} volume(s)", self.devices.len())];
            let advice = format!("drbdadm down {name}, then drbdadm up {name}");
            return Err(refusal(103, "Volumes cannot be added or removed while it runs", facts, &advice));
        }
        Ok(())
    }

    /// The options that both nodes must have alike, for the peer.
    fn shared_options(&self, net: &NetConfig) -> v1::ProtocolUpdate {
        v1::ProtocolUpdate {
            protocol: net.protocol.number(),
            allow_two_primaries: net.allow_two_primaries,
            after_sb_0pri: net.after_sb_0pri.number(),
            after_sb_1pri: net.after_sb_1pri.number(),
            after_sb_2pri: net.after_sb_2pri.number(),
        }
    }

    /// The peer's operator changed them.
    pub(super) fn on_protocol_update(&mut self, update: &v1::ProtocolUpdate) {
        let Some(protocol) = Protocol::from_number(update.protocol) else {
            return self.protocol_error("an unknown protocol");
        };
        let policies = (
            config::AfterSb0Pri::from_number(update.after_sb_0pri),
            config::AfterSb1Pri::from_number(update.after_sb_1pri),
            config::AfterSb2Pri::from_number(update.after_sb_2pri),
        );
        let (Some(zero), Some(one), Some(two)) = policies else {
            return self.protocol_error("an unknown split-brain policy");
        };
        if update.allow_two_primaries && protocol != Protocol::C {
            return self.protocol_error("two Primaries without protocol C");
        }
        // A promotion that was agreed to keeps its node from sending this; one that is asked for will be refused.
        let both = self.role == Role::Primary && self.peer_role == Role::Primary;
        if both && !update.allow_two_primaries {
            return self.protocol_error("no two Primaries, while both nodes are");
        }
        self.close_epoch();
        let net = &mut self.cfg.net;
        net.protocol = protocol;
        net.allow_two_primaries = update.allow_two_primaries;
        net.after_sb_0pri = zero.mirrored();
        net.after_sb_1pri = one;
        net.after_sb_2pri = two;
        let peer = &self.cfg.peer_name;
        let text = format!(
            "{peer} changed shared options: protocol {protocol:?}, allow-two-primaries {}",
            update.allow_two_primaries
        );
        self.note(Severity::Info, text);
    }
}
