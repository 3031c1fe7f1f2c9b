//! `resync-after`: which volumes of this node wait for which (SEM §19.4).
//!
//! The core of a resource knows only that it waits; what it waits for is another resource, so the daemon
//! looks. A volume waits while any volume that it comes after, directly or through others, resyncs,
//! is about to, or is paused. A loop would wait for itself: it is refused (133).
use crate::admin::config::model::{Config, Host};
use crate::admin::config::table;
use crate::core::event::Refusal;
use crate::core::state::ReplState;
use crate::units::VolumeNr;
use std::collections::{BTreeMap, BTreeSet};

/// DRBD's number for a loop.
const ERR_RESYNC_AFTER_CYCLE: i32 = 133;

/// A volume of this node: resource and number.
pub type Place = (String, VolumeNr);

/// What comes after what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Order(BTreeMap<Place, Place>);

impl Order {
    /// The order that the configuration gives the volumes of `node`.
    #[must_use]
    pub fn of(config: &Config, node: &str) -> Self {
        let here: Vec<(&str, &Host)> = config
            .resources
            .iter()
            .filter_map(|resource| Some((resource.name.as_str(), resource.host(node)?)))
            .collect();
        let mut order = BTreeMap::new();
        for (name, host) in &here {
            for volume in &host.volumes {
                let after = volume.disk_options.text(&table::RESYNC_AFTER);
                if let Some(first) = find(&here, after) {
                    order.insert(((*name).to_owned(), VolumeNr(volume.nr)), first);
                }
            }
        }
        Self(order)
    }

    /// From explicit pairs: the first of each comes after the second.
    #[must_use]
    pub fn from_pairs(pairs: impl IntoIterator<Item = (Place, Place)>) -> Self {
        Self(pairs.into_iter().collect())
    }

    /// Nothing comes after anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What this volume comes after, nearest first; ends where a loop closes.
    pub fn chain<'a>(&'a self, from: &'a Place) -> impl Iterator<Item = &'a Place> {
        let mut seen = BTreeSet::from([from]);
        std::iter::successors(self.0.get(from), |place| self.0.get(place))
            .take_while(move |place| seen.insert(place))
    }

    /// The first that `place` waits for, of those that are busy.
    pub fn waits_for<'a>(&'a self, place: &'a Place, busy: impl Fn(&Place) -> bool) -> Option<&'a Place> {
        self.chain(place).find(|first| busy(first))
    }

    /// Whether a volume of `resource` waits, in the end, for itself or for a loop.
    ///
    /// # Errors
    /// The refusal, with the loop.
    pub fn check(&self, resource: &str) -> Result<(), Refusal> {
        for place in self.0.keys().filter(|place| place.0 == resource) {
            let chain: Vec<&Place> = self.chain(place).collect();
            let last = chain.last().copied().unwrap_or(place);
            let Some(back) = self.0.get(last) else { continue };
            let words: Vec<String> = std::iter::once(place)
                .chain(chain)
                .chain([back])
                .map(|(name, nr)| format!("{name}/{}", nr.0))
                .collect();
            return Err(Refusal {
                number: ERR_RESYNC_AFTER_CYCLE,
                text: "Resync-after dependency cycle".into(),
                facts: vec![format!("resync-after: {}", words.join(" after "))],
                advice: "leave out `resync-after` of one of them in the configuration".into(),
            });
        }
        Ok(())
    }
}

/// `RESOURCE`, `RESOURCE/VOLUME` or a minor number.
fn find(here: &[(&str, &Host)], after: &str) -> Option<Place> {
    if after.is_empty() {
        return None;
    }
    let (name, nr) = match after.rsplit_once('/') {
        Some((name, nr)) => (name, Some(nr.parse().ok()?)),
        None => (after, None),
    };
    if let Some((name, host)) = here.iter().find(|(known, _)| *known == name) {
        let nr = nr.or_else(|| host.volumes.first().map(|volume| volume.nr))?;
        return host.volume(nr).map(|_| ((*name).to_owned(), VolumeNr(nr)));
    }
    let minor: u32 = after.parse().ok()?;
    here.iter().find_map(|(name, host)| {
        let volume = host.volumes.iter().find(|volume| volume.minor == minor)?;
        Some(((*name).to_owned(), VolumeNr(volume.nr)))
    })
}

/// A volume in this state keeps those that come after it waiting.
#[must_use]
pub const fn is_busy(replication: ReplState) -> bool {
    match replication {
        ReplState::StartingSyncS
        | ReplState::StartingSyncT
        | ReplState::WFBitMapS
        | ReplState::WFBitMapT
        | ReplState::WFSyncUUID
        | ReplState::SyncSource
        | ReplState::SyncTarget
        | ReplState::PausedSyncS
        | ReplState::PausedSyncT => true,
        ReplState::Off
        | ReplState::Established
        | ReplState::VerifyS
        | ReplState::VerifyT
        | ReplState::Ahead
        | ReplState::Behind => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(name: &str) -> Place {
        (name.into(), VolumeNr(0))
    }

    fn order(pairs: &[(&str, &str)]) -> Order {
        Order::from_pairs(pairs.iter().map(|(later, first)| (at(later), at(first))))
    }

    #[test]
    fn a_volume_waits_for_all_that_come_before_it() {
        let order = order(&[("c", "b"), ("b", "a")]);
        let busy = |names: &'static [&str]| move |place: &Place| names.contains(&place.0.as_str());
        assert_eq!(order.waits_for(&at("c"), busy(&["a"])), Some(&at("a")));
        assert_eq!(order.waits_for(&at("c"), busy(&["a", "b"])), Some(&at("b")));
        assert_eq!(order.waits_for(&at("b"), busy(&["c"])), None, "who comes later is in nobody's way");
        assert_eq!(order.waits_for(&at("a"), busy(&["a", "b", "c"])), None);
    }

    #[test]
    fn a_loop_is_refused_and_named() {
        assert_eq!(order(&[("c", "b"), ("b", "a")]).check("c"), Ok(()));
        let around = order(&[("c", "b"), ("b", "a"), ("a", "c"), ("d", "c")]);
        for name in ["a", "b", "c", "d"] {
            let refused = around.check(name).expect_err("a loop");
            assert_eq!(refused.number, 133);
            assert!(refused.facts[0].contains("a/0 after c/0"), "{:?}", refused.facts);
        }
        let own = order(&[("a", "a")]).check("a").expect_err("after itself");
        assert_eq!(own.facts, ["resync-after: a/0 after a/0"]);
        // A loop elsewhere is not this resource's.
        assert_eq!(around.check("e"), Ok(()));
    }

    #[test]
    fn walking_a_loop_ends() {
        let around = order(&[("a", "b"), ("b", "a")]);
        assert_eq!(around.chain(&at("a")).count(), 1);
        assert_eq!(around.waits_for(&at("a"), |_| false), None);
    }
}
