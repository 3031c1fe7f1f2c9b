//! The way to the peer: listen, dial, agree on one connection, hand its socket to the resource's thread.
//!
//! A tokio task per resource. What it is to do comes as a [`Wish`]; a connected socket goes into the inbox. Both
//! nodes listen and dial; `preamble.rs` has the exchange and the rule for crossed dials. While a session is up every
//! later dial of the peer is judged too: a fresh one means that the peer has lost the session, which is reported.
use super::inbox::{Inbox, Item};
use super::preamble::{
    Acceptor, AcceptorState, Answer, Dial, HEAD_BYTES, Party, Preamble, Refused, Verdict, judge,
};
use nix::sys::socket::{setsockopt, sockopt};
use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

/// Time for each step of the exchange.
const PREAMBLE_LIMIT: Duration = Duration::from_secs(5);
/// Time for a TCP connection to come up.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Pause after a refusal that will not last.
const SOON: Duration = Duration::from_millis(700);
/// Connections whose first bytes are waited for at once.
const MAX_INCOMING: usize = 16;
/// Seconds of silence before TCP itself probes; the core's pings are faster, this is for a stuck core.
const KEEPALIVE_IDLE_S: u32 = 23;

/// What the resource wants of the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Wish {
    /// A session, please.
    pub(super) connect: bool,
    /// How many of the sessions handed over have ended. (A state and not a message: it may be seen late, or two at
    /// once, and is right all the same.)
    pub(super) sessions_ended: u64,
}

/// Who is who, and where.
#[derive(Clone, Debug)]
pub(super) struct NetConfig {
    pub(super) resource: String,
    pub(super) node_id: u32,
    pub(super) node_name: String,
    pub(super) peer_node_id: u32,
    pub(super) peer_name: String,
    pub(super) local_addr: SocketAddr,
    pub(super) peer_addr: SocketAddr,
    pub(super) connect_int: Duration,
    /// Makes this instance, and its jitter, unlike any other.
    pub(super) seed: u64,
}

/// Opens the resource's own address.
///
/// # Errors
/// It is in use, or not an address of this host.
pub(super) fn listen(address: SocketAddr) -> io::Result<StdListener> {
    let listener = StdListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Runs until the sender of wishes is gone.
pub(super) async fn run(
    config: NetConfig,
    listener: StdListener,
    mut wishes: watch::Receiver<Wish>,
    inbox: Arc<Inbox>,
) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(resource = %config.resource, %error, "cannot listen for the peer");
            return;
        }
    };
    let mut connector = Connector::new(config, inbox);
    let mut incoming = JoinSet::new();
    loop {
        connector.follow(*wishes.borrow_and_update());
        tokio::select! {
            changed = wishes.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            accepted = listener.accept(), if incoming.len() < MAX_INCOMING => match accepted {
                Ok((stream, from)) => {
                    incoming.spawn(read_dial(stream, from));
                }
                // Descriptors have run out, or the client has gone again: nothing to do but to go on slowly.
                Err(error) => {
                    tracing::warn!(resource = %connector.config.resource, %error, "accept failed");
                    tokio::time::sleep(SOON).await;
                }
            },
            Some(done) = incoming.join_next() => {
                if let Ok(Some((stream, dial))) = done {
                    connector.on_dial(stream, &dial);
                }
            }
            outcome = optional(&mut connector.dialling) => connector.on_dialled(outcome),
            outcome = optional(&mut connector.accepting) => connector.on_confirmed(outcome),
            () = sleep_until(connector.next_dial), if connector.wants_to_dial() => connector.dial(),
        }
    }
}

type Pending<T> = Option<Pin<Box<dyn Future<Output = T> + Send>>>;

/// The output of a future that may not be there.
async fn optional<T>(pending: &mut Pending<T>) -> T {
    match pending {
        Some(future) => {
            let output = future.await;
            *pending = None;
            output
        }
        None => std::future::pending().await,
    }
}

/// A step of our own dial.
enum Dialled {
    /// TCP is up; the exchange follows.
    Tcp(TcpStream),
    /// The peer has answered.
    Answered(TcpStream, Answer),
    Failed(String),
}

struct Connector {
    config: NetConfig,
    inbox: Arc<Inbox>,
    wish: Wish,
    /// Sessions handed over.
    handed_over: u64,
    /// The peer when the session began.
    peer: Option<Party>,
    attempt: u64,
    dialling: Pending<Dialled>,
    /// Our dial has reached the peer.
    dial_pending: bool,
    accepting: Pending<io::Result<(TcpStream, Party)>>,
    next_dial: Instant,
    jitter: u64,
    /// What was last logged of a failure, not to repeat it.
    last_failure: String,
}

impl Connector {
    fn new(config: NetConfig, inbox: Arc<Inbox>) -> Self {
        Self {
            jitter: config.seed | 1,
            config,
            inbox,
            wish: Wish::default(),
            handed_over: 0,
            peer: None,
            attempt: 0,
            dialling: None,
            dial_pending: false,
            accepting: None,
            next_dial: now(),
            last_failure: String::new(),
        }
    }

    fn is_connected(&self) -> bool {
        self.handed_over > self.wish.sessions_ended
    }

    fn is_connecting(&self) -> bool {
        self.wish.connect && !self.is_connected()
    }

    fn wants_to_dial(&self) -> bool {
        self.is_connecting() && self.dialling.is_none() && self.accepting.is_none()
    }

    fn follow(&mut self, wish: Wish) {
        let was_connecting = self.is_connecting();
        self.wish = wish;
        if !self.is_connecting() {
            self.give_up_dial();
            self.accepting = None;
        } else if !was_connecting {
            self.next_dial = now();
            self.last_failure.clear();
        }
    }

    fn give_up_dial(&mut self) {
        self.dialling = None;
        self.dial_pending = false;
    }

    fn myself(&self) -> Party {
        Party {
            node_id: self.config.node_id,
            name: self.config.node_name.clone(),
            instance: self.config.seed,
            attempt: self.attempt,
        }
    }

    fn dial(&mut self) {
        self.attempt += 1;
        self.dial_pending = false;
        let (local, peer) = (self.config.local_addr, self.config.peer_addr);
        self.dialling = Some(Box::pin(async move {
            match timeout(CONNECT_LIMIT, connect(local, peer)).await {
                Ok(Ok(stream)) => Dialled::Tcp(stream),
                Ok(Err(error)) => Dialled::Failed(error.to_string()),
                Err(_) => Dialled::Failed("no answer".into()),
            }
        }));
    }

    fn on_dialled(&mut self, outcome: Dialled) {
        match outcome {
            Dialled::Tcp(stream) => {
                self.dial_pending = true;
                let dial = Dial {
                    resource: self.config.resource.clone(),
                    from: self.myself(),
                    to_node_id: self.config.peer_node_id,
                    to_name: self.config.peer_name.clone(),
                };
                self.dialling = Some(Box::pin(ask(stream, dial)));
            }
            Dialled::Answered(stream, answer) => {
                self.dial_pending = false;
                self.on_answer(stream, &answer);
            }
            Dialled::Failed(reason) => {
                self.dial_pending = false;
                self.failed(&reason, self.config.connect_int);
            }
        }
    }

    fn on_answer(&mut self, stream: TcpStream, answer: &Answer) {
        let from = &answer.from;
        if from.node_id != self.config.peer_node_id || from.name != self.config.peer_name {
            let reason = format!(
                "{} answers as {} (node id {}), expected {} (node id {})",
                self.config.peer_addr,
                from.name,
                from.node_id,
                self.config.peer_name,
                self.config.peer_node_id
            );
            self.failed(&reason, self.config.connect_int);
            return;
        }
        match answer.refused {
            None => {
                // Six bytes into an empty socket buffer; if that fails the connection is gone.
                let confirm = Preamble::Confirm.encode();
                match stream.try_write(&confirm) {
                    Ok(written) if written == confirm.len() => self.hand_over(stream, from.clone()),
                    _ => self.failed("the connection broke while it was agreed on", SOON),
                }
            }
            Some(reason @ (Refused::Crossed | Refused::Replaced | Refused::Stale)) => {
                tracing::debug!(resource = %self.config.resource, %reason, "dial refused");
                self.postpone(SOON);
            }
            Some(reason @ Refused::NotConnecting) => {
                self.failed(&reason.to_string(), self.config.connect_int);
            }
            Some(reason @ Refused::Mismatch) => {
                self.failed(&format!("{reason}: {}", answer.text), self.config.connect_int);
            }
        }
    }

    fn on_dial(&mut self, mut stream: TcpStream, dial: &Dial) {
        let state = if self.is_connected() {
            self.peer.as_ref().map_or(AcceptorState::Idle, |peer| AcceptorState::Connected { peer })
        } else if self.wish.connect {
            AcceptorState::Connecting { dial_pending: self.dial_pending }
        } else {
            AcceptorState::Idle
        };
        let acceptor = Acceptor {
            resource: &self.config.resource,
            node_id: self.config.node_id,
            name: &self.config.node_name,
            peer_node_id: self.config.peer_node_id,
            peer_name: &self.config.peer_name,
            state,
        };
        let (refused, text) = match judge(&acceptor, dial) {
            Verdict::Accept => (None, String::new()),
            Verdict::Refuse(reason, text) => (Some(reason), text),
        };
        let answer = Preamble::Answer(Answer { refused, text: text.clone(), from: self.myself() }).encode();
        match refused {
            None => {
                // A dial that has not reached the peer would only cross this one.
                if !self.dial_pending {
                    self.give_up_dial();
                }
                let peer = dial.from.clone();
                self.accepting = Some(Box::pin(async move {
                    timeout(PREAMBLE_LIMIT, confirm(&mut stream, &answer))
                        .await
                        .map_err(io::Error::other)??;
                    Ok((stream, peer))
                }));
            }
            Some(reason) => {
                if reason == Refused::Mismatch {
                    self.complain(&format!("refused a connection: {text}"));
                }
                if reason == Refused::Replaced && self.inbox.push(Item::PeerReplaced).is_err() {
                    tracing::warn!(resource = %self.config.resource, "the resource's inbox is full");
                }
                // A short answer into an empty socket buffer; whether it arrives does not matter to us.
                if let Err(error) = stream.try_write(&answer) {
                    tracing::debug!(resource = %self.config.resource, %error, "refusal not sent");
                }
            }
        }
    }

    fn on_confirmed(&mut self, outcome: io::Result<(TcpStream, Party)>) {
        match outcome {
            Ok((stream, peer)) => self.hand_over(stream, peer),
            // The peer chose its other connection, or has gone.
            Err(error) => {
                tracing::debug!(resource = %self.config.resource, %error, "accepted dial not confirmed");
                self.postpone(SOON);
            }
        }
    }

    fn hand_over(&mut self, stream: TcpStream, peer: Party) {
        self.give_up_dial();
        self.accepting = None;
        let socket = match into_ring_socket(stream) {
            Ok(socket) => socket,
            Err(error) => {
                self.failed(&error.to_string(), SOON);
                return;
            }
        };
        if self.inbox.push(Item::PeerConnected(socket)).is_err() {
            self.failed("the resource's inbox is full", SOON);
            return;
        }
        self.handed_over += 1;
        self.peer = Some(peer);
        self.last_failure.clear();
    }

    fn failed(&mut self, reason: &str, pause: Duration) {
        self.complain(&format!(
            "no connection to {} ({}): {reason}",
            self.config.peer_name, self.config.peer_addr
        ));
        self.postpone(pause);
    }

    /// Says it once, not at every attempt.
    fn complain(&mut self, what: &str) {
        if self.last_failure == what {
            tracing::debug!(resource = %self.config.resource, "{what}");
        } else {
            tracing::info!(resource = %self.config.resource, "{what}");
            what.clone_into(&mut self.last_failure);
        }
    }

    /// The next dial after `pause`, an eighth more or less, so that two nodes do not stay in step.
    fn postpone(&mut self, pause: Duration) {
        // xorshift64: any spread will do.
        self.jitter ^= self.jitter << 13;
        self.jitter ^= self.jitter >> 7;
        self.jitter ^= self.jitter << 17;
        let eighths = u32::try_from(self.jitter % 256).unwrap_or(0);
        self.next_dial = now() + pause * 7 / 8 + pause / 1024 * eighths;
    }
}

fn now() -> Instant {
    Instant::now()
}

async fn connect(local: SocketAddr, peer: SocketAddr) -> io::Result<TcpStream> {
    let socket = if peer.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if !local.ip().is_unspecified() && local.is_ipv4() == peer.is_ipv4() {
        // From the configured address: firewalls and multi-homed peers expect it.
        socket.bind(SocketAddr::new(local.ip(), 0))?;
    }
    let stream = socket.connect(peer).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn ask(mut stream: TcpStream, dial: Dial) -> Dialled {
    let exchange = async {
        stream.write_all(&Preamble::Dial(dial).encode()).await?;
        read_preamble(&mut stream).await
    };
    match timeout(PREAMBLE_LIMIT, exchange).await {
        Ok(Ok(Preamble::Answer(answer))) => Dialled::Answered(stream, answer),
        Ok(Ok(_)) => Dialled::Failed("the peer answered out of turn".into()),
        Ok(Err(error)) => Dialled::Failed(error.to_string()),
        Err(_) => Dialled::Failed("the peer accepts but does not answer".into()),
    }
}

/// Sends the acceptance and waits for the confirmation.
async fn confirm(stream: &mut TcpStream, answer: &[u8]) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.write_all(answer).await?;
    match read_preamble(stream).await? {
        Preamble::Confirm => Ok(()),
        Preamble::Dial(_) | Preamble::Answer(_) => Err(io::Error::other("a confirmation was expected")),
    }
}

/// The dial of somebody who connected; `None` if that is not what it was.
async fn read_dial(mut stream: TcpStream, from: SocketAddr) -> Option<(TcpStream, Dial)> {
    match timeout(PREAMBLE_LIMIT, read_preamble(&mut stream)).await {
        Ok(Ok(Preamble::Dial(dial))) => Some((stream, dial)),
        Ok(Ok(_)) => None,
        Ok(Err(error)) => {
            tracing::debug!(%from, %error, "not a dial");
            None
        }
        Err(_) => {
            tracing::debug!(%from, "connected and said nothing");
            None
        }
    }
}

/// Reads exactly one message, not a byte more: frames follow on the same socket.
async fn read_preamble(stream: &mut TcpStream) -> io::Result<Preamble> {
    let mut bytes = vec![0; HEAD_BYTES];
    stream.read_exact(&mut bytes).await?;
    let head = bytes.first_chunk().ok_or(io::ErrorKind::UnexpectedEof)?;
    let rest = Preamble::rest_len(head).map_err(io::Error::other)?;
    bytes.resize(HEAD_BYTES + rest, 0);
    stream.read_exact(&mut bytes[HEAD_BYTES..]).await?;
    Preamble::decode(&bytes).map_err(io::Error::other)
}

/// Leaves tokio: a blocking socket (the ring waits by itself), without delay, with keepalive.
fn into_ring_socket(stream: TcpStream) -> io::Result<OwnedFd> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    let fd = stream.as_fd();
    setsockopt(&fd, sockopt::KeepAlive, &true)?;
    setsockopt(&fd, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_S)?;
    setsockopt(&fd, sockopt::TcpKeepInterval, &5)?;
    setsockopt(&fd, sockopt::TcpKeepCount, &3)?;
    Ok(stream.into())
}
