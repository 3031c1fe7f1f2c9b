//! The way into a resource's thread: a bounded queue and an eventfd that its ring watches.
//!
//! For what happens on a human scale: commands, new sockets. The eventfd is written only when the queue was empty.
use super::backing::Backing;
use crate::core::event::{AdminCommand, HandlerToken, Refusal};
use crate::core::status::ResourceStatus;
use crate::frontend::nbd::{Extent, Negotiated};
use crate::meta::Attached;
use crate::units::VolumeNr;
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use tokio::sync::oneshot;

/// Most items that wait.
const CAPACITY: usize = 4096;

/// Something for the resource's thread.
#[derive(Debug)]
pub(super) enum Item {
    /// An operator's verb.
    Admin { command: AdminCommand, reply: oneshot::Sender<Result<(), Refusal>> },
    /// A backing disk, and the verb that brings it in.
    Attach {
        volume: VolumeNr,
        backing: Box<Backing>,
        attached: Box<Attached>,
        reply: oneshot::Sender<Result<(), Refusal>>,
    },
    /// A snapshot, please.
    Status(oneshot::Sender<ResourceStatus>),
    /// A transport to the peer, blocking mode.
    PeerConnected(OwnedFd),
    /// The peer dialled again: the session we have is dead on its side.
    PeerReplaced,
    /// A client that has finished its negotiation.
    NbdClient { volume: VolumeNr, socket: OwnedFd, negotiated: Box<Negotiated> },
    /// What a volume comes after resyncs, or does no longer.
    ResyncDependency { volume: VolumeNr, waits: bool },
    /// Drop the clients of a volume.
    KickClients(VolumeNr),
    /// The queue of an added ublk device, to be served from now on.
    #[cfg(feature = "ublk")]
    AddUblk {
        volume: VolumeNr,
        queue: Box<lockstep_ublk_frontend::Queue>,
        reply: oneshot::Sender<Result<(), Refusal>>,
    },
    /// A helper thread has looked up a client's block status.
    Extents { client: usize, command: usize, extents: Vec<Extent> },
    /// A handler has ended.
    HandlerDone { token: HandlerToken, exit_code: Option<i32> },
    /// End the thread.
    Stop,
}

/// The queue.
#[derive(Debug)]
pub(super) struct Inbox {
    items: Mutex<VecDeque<Item>>,
    event: EventFd,
}

impl Inbox {
    /// An empty one.
    ///
    /// # Errors
    /// No descriptor is left.
    pub(super) fn new() -> Result<Self, Errno> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self { items: Mutex::default(), event })
    }

    /// Adds an item; gives it back when the queue is full.
    pub(super) fn push(&self, item: Item) -> Result<(), Item> {
        let was_empty = {
            let mut items = self.items.lock().unwrap_or_else(PoisonError::into_inner);
            if items.len() >= CAPACITY {
                return Err(item);
            }
            items.push_back(item);
            items.len() == 1
        };
        if was_empty && let Err(errno) = self.event.write(1) {
            // The counter cannot be full: it is read to zero on every wake-up.
            tracing::error!(%errno, "cannot wake the resource's thread");
        }
        Ok(())
    }

    /// Takes everything and resets the eventfd.
    pub(super) fn take(&self) -> VecDeque<Item> {
        // First the event: what is pushed in between writes it again.
        match self.event.read() {
            Ok(_) | Err(Errno::EAGAIN) => {}
            Err(errno) => tracing::error!(%errno, "cannot reset the event of the resource's thread"),
        }
        std::mem::take(&mut *self.items.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A descriptor that is readable while something waits.
    ///
    /// # Errors
    /// No descriptor is left.
    pub(super) fn event_fd(&self) -> std::io::Result<OwnedFd> {
        self.event.as_fd().try_clone_to_owned()
    }
}
