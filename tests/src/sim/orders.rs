//! Every order: a test may pick what happens next, whatever its time.
use super::world::{Ev, US, World};

/// Something that could happen next; two on different nodes may happen in either order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Where it happens.
    pub node: usize,
    /// A message arrives there; else its disk answers, or it learns of a loss.
    pub message: bool,
    seq: u64,
}

impl World {
    /// What could happen next, whatever its time: each disk or metadata answer, the first message of
    /// each direction, each loss notice. Timers and new transports are left to [`World::step`].
    #[must_use]
    pub fn choices(&self) -> Vec<Choice> {
        let mut first = [true; 2];
        let mut choices = Vec::new();
        let mut events: Vec<_> = self.heap.iter().collect();
        events.sort_unstable_by_key(|due| due.seq);
        for due in events {
            let node = match &due.ev {
                Ev::Disk { node, life, .. } | Ev::Meta { node, life, .. }
                    if self.nodes[*node].life == *life =>
                {
                    *node
                }
                Ev::Deliver { session, to, .. }
                    if self.nodes[*to].session == Some(*session)
                        && !self.net.is_dead(*session)
                        && std::mem::take(&mut first[*to]) =>
                {
                    *to
                }
                Ev::Lost { to, .. } => *to,
                _ => continue,
            };
            let message = matches!(due.ev, Ev::Deliver { .. });
            choices.push(Choice { node, message, seq: due.seq });
        }
        choices
    }

    /// Lets one of [`World::choices`] happen now.
    pub fn choose(&mut self, choice: Choice) {
        self.now += US;
        let mut chosen = None;
        for due in std::mem::take(&mut self.heap) {
            if due.seq == choice.seq {
                chosen = Some(due.ev);
            } else {
                self.heap.push(due);
            }
        }
        if let Some(ev) = chosen {
            self.happen(ev);
        }
    }
}
