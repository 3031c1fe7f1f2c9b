//! The few bytes with which a new TCP connection says what it is for, before it becomes a session.
//!
//! ```text
//!   dialler                          acceptor
//!   DIAL {resource, who, to whom} ->
//!                                 <- ANSWER {accepted, or why not}
//!   CONFIRM                       ->
//! ```
//!
//! The third step is what makes crossed dials safe: an acceptor gives up nothing before it knows that the dialler
//! still holds this very connection. Every message is `magic, version, kind, body length, body, CRC-32C`, integers
//! big-endian, the body at most [`MAX_BODY_BYTES`]; nothing else is read before the check has passed.
//!
//! [`judge`] is the whole decision of an acceptor, pure.
use std::fmt;

/// "LKS0": the preamble's own, so that it cannot be taken for a frame ("LKS1").
const MAGIC: u32 = 0x4c4b_5330;
/// Version of this exchange.
const VERSION: u8 = 1;
/// Longest body, bytes.
pub(super) const MAX_BODY_BYTES: usize = 1024;
/// Longest name in a dial, bytes.
const MAX_NAME_BYTES: usize = 255;
/// Bytes before the body.
pub(super) const HEAD_BYTES: usize = 8;
/// Bytes behind it.
pub(super) const TAIL_BYTES: usize = 4;

const KIND_DIAL: u8 = 1;
const KIND_ANSWER: u8 = 2;
const KIND_CONFIRM: u8 = 3;

/// One message of the exchange.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Preamble {
    /// I want a session.
    Dial(Dial),
    /// You may, or may not.
    Answer(Answer),
    /// Here it is.
    Confirm,
}

/// Who wants what from whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Dial {
    /// Resource name.
    pub(super) resource: String,
    /// The sender.
    pub(super) from: Party,
    /// Node id of the intended receiver.
    pub(super) to_node_id: u32,
    /// Its name.
    pub(super) to_name: String,
}

/// A node and how to tell its dials apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Party {
    /// Node id.
    pub(super) node_id: u32,
    /// Node name.
    pub(super) name: String,
    /// Drawn when its resource started: another one means that it started anew.
    pub(super) instance: u64,
    /// Number of its latest dial. Grows.
    pub(super) attempt: u64,
}

/// Answer to a dial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// `None`: accepted.
    pub(super) refused: Option<Refused>,
    /// For a person.
    pub(super) text: String,
    /// The acceptor.
    pub(super) from: Party,
}

/// Why a dial was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// Another resource or node was meant: a configuration error.
    Mismatch,
    /// My own dial to you is under way and has precedence.
    Crossed,
    /// I am about to give up the old session: try again.
    Replaced,
    /// You dialled this before the session we have.
    Stale,
    /// I am not connecting.
    NotConnecting,
}

impl Refused {
    const fn to_wire(self) -> u8 {
        match self {
            Self::Mismatch => 1,
            Self::Crossed => 2,
            Self::Replaced => 3,
            Self::Stale => 4,
            Self::NotConnecting => 5,
        }
    }

    const fn from_wire(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Mismatch,
            2 => Self::Crossed,
            3 => Self::Replaced,
            4 => Self::Stale,
            5 => Self::NotConnecting,
            _ => return None,
        })
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mismatch => "the peer expects someone else",
            Self::Crossed => "the peer's own dial has precedence",
            Self::Replaced => "the peer is giving up the old session",
            Self::Stale => "the peer has a newer session",
            Self::NotConnecting => "the peer is not connecting",
        })
    }
}

/// The bytes are no preamble.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PreambleError {
    /// Something else is talking.
    #[error("not a lockstep node: the connection starts with {0:#010x}")]
    Magic(u32),
    /// Of another version.
    #[error("preamble version {got}, expected {VERSION}")]
    Version {
        /// What came.
        got: u8,
    },
    /// Too long.
    #[error("a preamble of {got_bytes} bytes; the limit is {MAX_BODY_BYTES}")]
    TooLong {
        /// What was announced.
        got_bytes: usize,
    },
    /// Damaged.
    #[error("the preamble was damaged on the way")]
    Crc,
    /// Well-framed nonsense.
    #[error("malformed preamble: {0}")]
    Malformed(&'static str),
}

impl Preamble {
    /// The bytes to send.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let kind = match self {
            Self::Dial(dial) => {
                put_name(&mut body, &dial.resource);
                dial.from.encode(&mut body);
                body.extend_from_slice(&dial.to_node_id.to_be_bytes());
                put_name(&mut body, &dial.to_name);
                KIND_DIAL
            }
            Self::Answer(answer) => {
                body.push(answer.refused.map_or(0, Refused::to_wire));
                put_name(&mut body, &answer.text);
                answer.from.encode(&mut body);
                KIND_ANSWER
            }
            Self::Confirm => KIND_CONFIRM,
        };
        debug_assert!(body.len() <= MAX_BODY_BYTES, "three names and a few numbers fit");
        let mut bytes = MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&[VERSION, kind]);
        bytes.extend_from_slice(&u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes());
        bytes.extend_from_slice(&body);
        bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_be_bytes());
        bytes
    }

    /// How many bytes follow the first [`HEAD_BYTES`].
    ///
    /// # Errors
    /// The bytes do not start a preamble.
    pub(super) fn rest_len(head: &[u8; HEAD_BYTES]) -> Result<usize, PreambleError> {
        let [m0, m1, m2, m3, version, _, l0, l1] = *head;
        let magic = u32::from_be_bytes([m0, m1, m2, m3]);
        if magic != MAGIC {
            return Err(PreambleError::Magic(magic));
        }
        if version != VERSION {
            return Err(PreambleError::Version { got: version });
        }
        let body = usize::from(u16::from_be_bytes([l0, l1]));
        if body > MAX_BODY_BYTES {
            return Err(PreambleError::TooLong { got_bytes: body });
        }
        Ok(body + TAIL_BYTES)
    }

    /// Decodes a whole message.
    ///
    /// # Errors
    /// The bytes are not one.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, PreambleError> {
        let head = bytes.first_chunk().ok_or(PreambleError::Malformed("too short"))?;
        let rest = Self::rest_len(head)?;
        let (checked, tail) =
            bytes.split_last_chunk::<TAIL_BYTES>().ok_or(PreambleError::Malformed("too short"))?;
        if bytes.len() != HEAD_BYTES + rest {
            return Err(PreambleError::Malformed("length"));
        }
        if crc32c::crc32c(checked) != u32::from_be_bytes(*tail) {
            return Err(PreambleError::Crc);
        }
        let mut body = Body(&checked[HEAD_BYTES..]);
        let message = match head[5] {
            KIND_DIAL => Self::Dial(Dial {
                resource: body.name()?,
                from: body.party()?,
                to_node_id: body.u32()?,
                to_name: body.name()?,
            }),
            KIND_ANSWER => {
                let refused = match body.take::<1>()? {
                    [0] => None,
                    [number] => Some(Refused::from_wire(number).ok_or(PreambleError::Malformed("reason"))?),
                };
                Self::Answer(Answer { refused, text: body.name()?, from: body.party()? })
            }
            KIND_CONFIRM => Self::Confirm,
            _ => return Err(PreambleError::Malformed("kind")),
        };
        if body.0.is_empty() { Ok(message) } else { Err(PreambleError::Malformed("bytes left over")) }
    }
}

impl Party {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.node_id.to_be_bytes());
        put_name(out, &self.name);
        out.extend_from_slice(&self.instance.to_be_bytes());
        out.extend_from_slice(&self.attempt.to_be_bytes());
    }
}

/// A length byte and at most [`MAX_NAME_BYTES`] of text.
fn put_name(out: &mut Vec<u8>, name: &str) {
    let mut end = name.len().min(MAX_NAME_BYTES);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    out.push(u8::try_from(end).unwrap_or(u8::MAX));
    out.extend_from_slice(&name.as_bytes()[..end]);
}

struct Body<'a>(&'a [u8]);

impl Body<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], PreambleError> {
        let (first, rest) = self.0.split_first_chunk::<N>().ok_or(PreambleError::Malformed("too short"))?;
        self.0 = rest;
        Ok(*first)
    }

    fn u32(&mut self) -> Result<u32, PreambleError> {
        Ok(u32::from_be_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64, PreambleError> {
        Ok(u64::from_be_bytes(self.take()?))
    }

    fn name(&mut self) -> Result<String, PreambleError> {
        let [len] = self.take()?;
        let (name, rest) =
            self.0.split_at_checked(usize::from(len)).ok_or(PreambleError::Malformed("too short"))?;
        self.0 = rest;
        String::from_utf8(name.to_vec()).map_err(|_| PreambleError::Malformed("a name is no UTF-8"))
    }

    fn party(&mut self) -> Result<Party, PreambleError> {
        Ok(Party { node_id: self.u32()?, name: self.name()?, instance: self.u64()?, attempt: self.u64()? })
    }
}

/// What an acceptor is, for [`judge`].
#[derive(Clone, Debug)]
pub(super) struct Acceptor<'a> {
    /// Own resource.
    pub(super) resource: &'a str,
    /// Own node.
    pub(super) node_id: u32,
    /// Own name.
    pub(super) name: &'a str,
    /// The peer's node.
    pub(super) peer_node_id: u32,
    /// The peer's name.
    pub(super) peer_name: &'a str,
    /// What it is doing.
    pub(super) state: AcceptorState<'a>,
}

/// What an acceptor is doing.
#[derive(Clone, Copy, Debug)]
pub(super) enum AcceptorState<'a> {
    /// Not connecting.
    Idle,
    /// Wants a session.
    Connecting {
        /// Its own dial has reached the peer and waits for the answer.
        dial_pending: bool,
    },
    /// Has a session.
    Connected {
        /// The peer as it was when that session began.
        peer: &'a Party,
    },
}

/// What to do with a dial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Take it.
    Accept,
    /// Refuse it, with words for the other side's log.
    Refuse(Refused, String),
}

/// Decides on a dial.
///
/// Crossed dials: both nodes dial at once, and one connection must win on both sides. The node with the lower id wins
/// with its own dial. So the lower one refuses the other's while its own is pending, and the higher one accepts
/// (its own will be refused by the same rule).
///
/// A dial during a session means that the peer has lost it without our noticing, unless the dial is older than the
/// session, as the loser of a crossing is.
pub(super) fn judge(acceptor: &Acceptor<'_>, dial: &Dial) -> Verdict {
    let mismatch = |text| Verdict::Refuse(Refused::Mismatch, text);
    if dial.resource != acceptor.resource {
        return mismatch(format!(
            "this address belongs to resource {}, not {}",
            acceptor.resource, dial.resource
        ));
    }
    if dial.to_node_id != acceptor.node_id || dial.to_name != acceptor.name {
        return mismatch(format!(
            "I am {} (node id {}), not {} (node id {})",
            acceptor.name, acceptor.node_id, dial.to_name, dial.to_node_id
        ));
    }
    if dial.from.node_id != acceptor.peer_node_id || dial.from.name != acceptor.peer_name {
        return mismatch(format!(
            "my peer is {} (node id {}), not {} (node id {})",
            acceptor.peer_name, acceptor.peer_node_id, dial.from.name, dial.from.node_id
        ));
    }
    match acceptor.state {
        AcceptorState::Idle => Verdict::Refuse(Refused::NotConnecting, String::new()),
        AcceptorState::Connecting { dial_pending: true } if acceptor.node_id < dial.from.node_id => {
            Verdict::Refuse(Refused::Crossed, String::new())
        }
        AcceptorState::Connecting { .. } => Verdict::Accept,
        AcceptorState::Connected { peer }
            if peer.instance == dial.from.instance && dial.from.attempt <= peer.attempt =>
        {
            Verdict::Refuse(Refused::Stale, String::new())
        }
        AcceptorState::Connected { .. } => Verdict::Refuse(Refused::Replaced, String::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn party(node_id: u32, instance: u64, attempt: u64) -> Party {
        Party { node_id, name: format!("node{node_id}"), instance, attempt }
    }

    fn dial(from: u32, to: u32) -> Dial {
        Dial { resource: "web".into(), from: party(from, 7, 3), to_node_id: to, to_name: format!("node{to}") }
    }

    fn verdict(node_id: u32, state: AcceptorState<'_>, dial: &Dial) -> Verdict {
        let peer = 1 - node_id;
        let (name, peer_name) = (format!("node{node_id}"), format!("node{peer}"));
        let acceptor = Acceptor {
            resource: "web",
            node_id,
            name: &name,
            peer_node_id: peer,
            peer_name: &peer_name,
            state,
        };
        judge(&acceptor, dial)
    }

    #[test]
    fn messages_survive_the_wire() {
        for message in [
            Preamble::Dial(dial(0, 1)),
            Preamble::Answer(Answer { refused: None, text: String::new(), from: party(1, 9, 0) }),
            Preamble::Answer(Answer {
                refused: Some(Refused::Crossed),
                text: "ünlucky".into(),
                from: party(1, 9, u64::MAX),
            }),
            Preamble::Confirm,
        ] {
            let bytes = message.encode();
            assert_eq!(Preamble::decode(&bytes), Ok(message));
            for at in 0..bytes.len() {
                let mut damaged = bytes.clone();
                damaged[at] ^= 0x10;
                assert!(Preamble::decode(&damaged).is_err(), "byte {at}");
                assert!(Preamble::decode(&bytes[..at]).is_err());
            }
        }
    }

    #[test]
    fn long_names_are_cut_at_a_character() {
        let mut message = dial(0, 1);
        message.resource = "ä".repeat(300);
        let Ok(Preamble::Dial(decoded)) = Preamble::decode(&Preamble::Dial(message).encode()) else {
            panic!()
        };
        assert_eq!(decoded.resource, "ä".repeat(127));
    }

    #[test]
    fn exactly_one_of_two_crossed_dials_wins() {
        let pending = AcceptorState::Connecting { dial_pending: true };
        assert_eq!(verdict(0, pending, &dial(1, 0)), Verdict::Refuse(Refused::Crossed, String::new()));
        assert_eq!(verdict(1, pending, &dial(0, 1)), Verdict::Accept);
        let waiting = AcceptorState::Connecting { dial_pending: false };
        assert_eq!(verdict(0, waiting, &dial(1, 0)), Verdict::Accept);
    }

    #[test]
    fn the_loser_of_a_crossing_does_not_end_the_session() {
        let peer = party(1, 7, 3);
        let connected = AcceptorState::Connected { peer: &peer };
        assert_eq!(verdict(0, connected, &dial(1, 0)), Verdict::Refuse(Refused::Stale, String::new()));
        let mut later = dial(1, 0);
        later.from.attempt = 4;
        assert_eq!(verdict(0, connected, &later), Verdict::Refuse(Refused::Replaced, String::new()));
        let mut restarted = dial(1, 0);
        restarted.from.instance = 8;
        restarted.from.attempt = 1;
        assert_eq!(verdict(0, connected, &restarted), Verdict::Refuse(Refused::Replaced, String::new()));
    }

    #[test]
    fn strangers_are_told_who_is_here() {
        let waiting = AcceptorState::Connecting { dial_pending: false };
        let mut wrong = dial(1, 0);
        wrong.resource = "mail".into();
        let Verdict::Refuse(Refused::Mismatch, text) = verdict(0, waiting, &wrong) else { panic!() };
        assert_eq!(text, "this address belongs to resource web, not mail");
        let mut wrong = dial(1, 0);
        wrong.to_name = "alpha".into();
        assert!(matches!(verdict(0, waiting, &wrong), Verdict::Refuse(Refused::Mismatch, _)));
        let mut wrong = dial(1, 0);
        wrong.from.node_id = 5;
        assert!(matches!(verdict(0, waiting, &wrong), Verdict::Refuse(Refused::Mismatch, _)));
        let idle = verdict(0, AcceptorState::Idle, &dial(1, 0));
        assert_eq!(idle, Verdict::Refuse(Refused::NotConnecting, String::new()));
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            prop_assert!(Preamble::decode(&bytes).is_err());
        }
    }
}
