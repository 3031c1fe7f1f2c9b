//! Handlers: programs of the operator, run at certain events (ADM §8).
//!
//! The core never waits for one without saying so: a run has a token and a purpose, its answer is an
//! input like any other, and an answer to a token that no longer counts is ignored (S46).
use super::Resource;
use super::event::{HandlerName, HandlerToken, Output, Severity};
use crate::units::VolumeNr;

/// Runs that are remembered at most; an operator's program that hangs must not fill the memory.
const MAX_OPEN: usize = 64;

/// What the answer of a handler is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Somebody is told; nothing depends on the answer.
    Notice,
    /// The fate of the peer (`fencing.rs`).
    Fence,
    /// The resync of this volume starts if the answer allows it.
    BeforeResync(usize),
    /// The disk of this volume failed; nobody is told before the answer.
    LocalIoError(usize),
}

/// The handlers that run.
#[derive(Debug, Default)]
pub(super) struct Handlers {
    last: u64,
    open: Vec<(HandlerToken, HandlerName, Purpose)>,
}

impl Resource {
    /// Has a handler run; its token.
    pub(super) fn run_handler(
        &mut self,
        name: HandlerName,
        volume: Option<VolumeNr>,
        purpose: Purpose,
    ) -> HandlerToken {
        self.handlers.last += 1;
        let token = HandlerToken(self.handlers.last);
        if self.handlers.open.len() >= MAX_OPEN
            && let Some(at) = self.handlers.open.iter().position(|open| open.2 == Purpose::Notice)
        {
            self.handlers.open.remove(at);
        }
        self.handlers.open.push((token, name, purpose));
        self.out.push_back(Output::RunHandler { token, name, volume });
        token
    }

    pub(super) fn on_handler_done(&mut self, token: HandlerToken, exit_code: Option<i32>) {
        let Some(at) = self.handlers.open.iter().position(|open| open.0 == token) else { return };
        let (_, name, purpose) = self.handlers.open.remove(at);
        let how = match exit_code {
            Some(code) => format!("exit code {code}"),
            None => "did not end by itself".to_owned(),
        };
        self.note(Severity::Info, format!("handler {}: {how}", name.name()));
        match purpose {
            Purpose::Notice => {}
            Purpose::Fence => self.on_fence_answer(token, exit_code),
            Purpose::LocalIoError(volume) => self.local_io_error_handled(volume, token),
            Purpose::BeforeResync(volume) => self.before_resync_answered(volume, token, exit_code),
        }
    }

    /// Handlers whose answer has not come yet, for `status`.
    pub(super) fn handlers_running(&self) -> impl Iterator<Item = HandlerName> + '_ {
        self.handlers.open.iter().map(|open| open.1)
    }
}
