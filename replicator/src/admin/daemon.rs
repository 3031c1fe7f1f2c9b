//! `lockstepd`: from the command line to the end of the process.
//!
//! Order of life: configuration → process set-up → run directory → control socket → listeners →
//! (`--up`) → serve until SIGTERM or SIGINT → every resource down, users dropped → sockets removed. One
//! thread runs all of this; each resource has one more of its own. It stays in the foreground and never
//! forks.
use crate::admin::cli::{DaemonOptions, FrontendOption, GlobalOptions};
use crate::admin::control::{
    self, CONTROL_VERSION, ControlError, DaemonInfo, MAX_LINE_BYTES, Reply, Request, ResourceVerb,
    SOCKET_NAME, VerbRequest,
};
use crate::admin::node::{Node, VerbError, with_causes};
use crate::admin::outcome::{self, Failure};
use crate::admin::plan::{self, Source};
use crate::admin::process::{self, RunDir};
use crate::frontend::choice::Preference;
use crate::frontend::server::{NbdAddress, NbdServer, Scope};
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Control connections served at the same time.
pub const MAX_CONNECTIONS: usize = 64;
/// A connection that sends nothing is closed after this time.
const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// A client that does not read is given up after this time.
const WRITE_LIMIT: Duration = Duration::from_secs(5);
/// Between two looks at what a verb waits for.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);
/// A sign of life at least this often while a verb runs.
const ALIVE_EVERY: u32 = 10;
/// At the end, every resource gets this long to write its metadata clean.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(30);

/// Runs the daemon; returns when it has been told to end.
///
/// # Errors
/// Why it could not start, with the exit code.
pub fn run(global: &GlobalOptions, options: &DaemonOptions) -> Result<(), Failure> {
    start_log(&options.log)?;
    let source = plan::source(global)?;
    // Read now so that a broken file is a message at the start and not at the first `up`.
    let loaded = plan::load(&source)?;
    for warning in &loaded.warnings {
        tracing::warn!("{}", warning.trim_end());
    }
    for warning in process::prepare(!options.no_mlock) {
        tracing::warn!("{warning}");
    }
    let run_dir = RunDir::take(&plan::run_dir(global))
        .map_err(|error| Failure::new(outcome::EXEC, format!("lockstepd: {error}\n")))?;
    // We hold the lock of the run directory: what bears our mark and is dead was left by a daemon that died.
    #[cfg(feature = "ublk")]
    if options.frontend != FrontendOption::Nbd {
        crate::frontend::ublk::sweep();
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(outcome::EXEC, format!("lockstepd: no runtime: {error}\n")))?;
    let result = runtime.block_on(serve(source, &run_dir, options));
    // A disk that hangs in an open must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

fn start_log(filter: &str) -> Result<(), Failure> {
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .map_err(|error| Failure::new(outcome::USAGE, format!("lockstepd: --log {filter}: {error}\n")))?;
    // Under a service manager the journal has the time already.
    let started = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .try_init();
    started.map_err(|error| Failure::new(outcome::EXEC, format!("lockstepd: no log: {error}\n")))
}

async fn serve(source: Source, run_dir: &RunDir, options: &DaemonOptions) -> Result<(), Failure> {
    let failed = |what: &str, error: &dyn std::error::Error| {
        Failure::new(outcome::EXEC, format!("lockstepd: {what}: {}\n", with_causes(error)))
    };
    // Handlers first: a signal from here on means an orderly end.
    let mut signals = Signals::install().map_err(|error| failed("signals", &error))?;
    let preference = match options.frontend {
        FrontendOption::Auto => Preference::Auto,
        FrontendOption::Ublk => Preference::Ublk,
        FrontendOption::Nbd => Preference::Nbd,
    };
    let node = Arc::new(Node::new(source, run_dir.path(), preference));
    let nbd: Vec<NbdAddress> = options.nbd_listen.map(NbdAddress::Tcp).into_iter().collect();
    let nbd = NbdServer::bind(&nbd, &Scope::Node, node.exports())
        .map_err(|error| failed("--nbd-listen", &error))?;

    let socket = run_dir.path().join(SOCKET_NAME);
    // We hold the lock of the directory: whoever left this is gone.
    let _nothing_there = std::fs::remove_file(&socket);
    let listener =
        UnixListener::bind(&socket).map_err(|error| failed(&socket.display().to_string(), &error))?;
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))
        .map_err(|error| failed(&socket.display().to_string(), &error))?;
    tracing::info!(
        node = %node.source().node, config = %node.source().config.display(), run_dir = %run_dir.path().display(),
        pid = std::process::id(), "lockstepd is ready"
    );

    let mut connections = JoinSet::new();
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let begin = bring_up(Arc::clone(&node), options.up.clone());
    connections.spawn(begin);
    connections.spawn(Arc::clone(&node).keep_order());
    loop {
        tokio::select! {
            () = signals.next() => break,
            accepted = accept(&listener, &places) => {
                match accepted {
                    Ok((stream, place)) => {
                        let node = Arc::clone(&node);
                        connections.spawn(async move {
                            if let Err(error) = connection(stream, &node).await {
                                tracing::debug!(error = %with_causes(&error), "control connection");
                            }
                            drop(place);
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "accepting a control connection failed");
                        tokio::time::sleep(PROGRESS_EVERY).await;
                    }
                }
            }
            Some(_ended) = connections.join_next() => {}
        }
    }
    drop(listener);
    let _gone = std::fs::remove_file(&socket);
    tracing::info!("lockstepd ends: taking every resource down");
    let all_down = tokio::select! {
        all_down = shut_down(&node) => all_down,
        () = signals.next() => {
            tracing::warn!("a second signal: ending at once; the activity log covers what was open");
            false
        }
    };
    connections.shutdown().await;
    nbd.stop().await;
    tracing::info!("lockstepd has ended");
    if all_down {
        Ok(())
    } else {
        Err(Failure::new(outcome::EXEC, "lockstepd: ended with a resource that was not down; see above\n"))
    }
}

/// SIGTERM and SIGINT end the daemon; SIGHUP does nothing (the configuration is read at each `up`).
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn install() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Until the next signal that ends the daemon. Cancel safe.
    async fn next(&mut self) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                _ = self.hangup.recv() => {}
            }
        }
    }
}

/// A place and a connection. Cancel safe: a place not used is given back.
async fn accept(
    listener: &UnixListener,
    places: &Arc<Semaphore>,
) -> std::io::Result<(UnixStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.map_err(std::io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, place))
}

/// `--up`.
async fn bring_up(node: Arc<Node>, names: Vec<String>) {
    let mut wanted = Vec::new();
    for name in names {
        if name == "all" {
            match plan::load(node.source()) {
                Ok(loaded) => wanted.extend(loaded.names(&node.source().node)),
                Err(failure) => tracing::error!("{}", failure.text.trim_end()),
            }
        } else {
            wanted.push(name);
        }
    }
    for resource in wanted {
        let verb = ResourceVerb::Up { attach: true, connect: true };
        let request = VerbRequest { resource, volume: None, verb, timeout_ms: None, config: None };
        if let Err(error) = node.verb(&request).await {
            tracing::error!(resource = %request.resource, "{}", error_text(&request.resource, error).1.trim_end());
        }
    }
}

/// Takes everything down, side by side, users dropped. Answers whether all of it is down.
async fn shut_down(node: &Arc<Node>) -> bool {
    let mut downs = JoinSet::new();
    for name in node.running() {
        let node = Arc::clone(node);
        downs.spawn(async move {
            match tokio::time::timeout(SHUTDOWN_LIMIT, node.down(&name, true)).await {
                Ok(Ok(())) => true,
                Ok(Err(error)) => {
                    tracing::error!(resource = %name, "{}", error_text(&name, error).1.trim_end());
                    false
                }
                Err(_elapsed) => {
                    let waiting = node.waiting_for(&name).await.join("; ");
                    tracing::error!(resource = %name, waiting, "still not down after {} s: left as it is", SHUTDOWN_LIMIT.as_secs());
                    false
                }
            }
        });
    }
    let mut all_down = true;
    while let Some(ended) = downs.join_next().await {
        all_down &= matches!(ended, Ok(true));
    }
    all_down
}

fn error_text(object: &str, error: VerbError) -> (u8, String) {
    match error {
        VerbError::Refused(refusal) => {
            (outcome::exit_code(refusal.number), outcome::refusal_text(object, &refusal))
        }
        VerbError::Failed(failure) => (failure.exit, failure.text),
    }
}

/// One control connection: requests, one after the other.
async fn connection(stream: UnixStream, node: &Arc<Node>) -> Result<(), ControlError> {
    let user = stream.peer_cred()?.uid();
    let (reader, mut writer) = stream.into_split();
    if user != 0 && user != nix::unistd::geteuid().as_raw() {
        let text = format!("user {user} may not control this daemon; only its own user and root may\n");
        return send(&mut writer, &Reply::Failed { exit: outcome::EXEC, text }).await;
    }
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        let limit = MAX_LINE_BYTES as u64 + 1;
        let mut bounded = (&mut reader).take(limit);
        let read = tokio::time::timeout(IDLE_LIMIT, bounded.read_until(b'\n', &mut line)).await;
        match read {
            Ok(Ok(0)) | Err(_) => return Ok(()),
            Ok(result) => result?,
        };
        let request = match control::decode::<Request>(&line) {
            Ok(request) => request,
            Err(error) => {
                let text =
                    format!("lockstepd (control version {CONTROL_VERSION}): {}\n", with_causes(&error));
                return send(&mut writer, &Reply::Failed { exit: outcome::EXEC, text }).await;
            }
        };
        let last = answer(request, node, &mut writer).await;
        send(&mut writer, &last).await?;
    }
}

/// Carries out one request; answers the final reply. Sends what comes before it.
async fn answer(request: Request, node: &Arc<Node>, writer: &mut OwnedWriteHalf) -> Reply {
    match request {
        Request::Info => Reply::Info(DaemonInfo {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            node: node.source().node.clone(),
            config: node.source().config.clone(),
        }),
        Request::Status { resource } => match node.status(resource.as_deref()).await {
            Ok(views) => {
                for view in views {
                    if let Err(error) = send(writer, &Reply::Resource(Box::new(view))).await {
                        return Reply::Failed {
                            exit: outcome::EXEC,
                            text: format!("{}\n", with_causes(&error)),
                        };
                    }
                }
                Reply::Done
            }
            Err(failure) => Reply::Failed { exit: failure.exit, text: failure.text },
        },
        Request::Verb(request) => verb(&request, node, writer).await,
    }
}

/// Runs a verb to its end or its deadline, telling meanwhile what it waits for.
async fn verb(request: &VerbRequest, node: &Arc<Node>, writer: &mut OwnedWriteHalf) -> Reply {
    let deadline = request.timeout_ms.map(Duration::from_millis);
    // No deadline is as good as one in thirty years.
    let deadline = tokio::time::sleep(deadline.unwrap_or(Duration::from_secs(1 << 30)));
    let work = node.verb(request);
    tokio::pin!(deadline, work);
    let mut look = tokio::time::interval(PROGRESS_EVERY);
    look.tick().await;
    let mut said = String::new();
    let mut silent = 0;
    let mut client_here = true;
    loop {
        tokio::select! {
            result = &mut work => return match result {
                Ok(()) => Reply::Done,
                Err(VerbError::Refused(refusal)) => Reply::Refused(refusal),
                Err(VerbError::Failed(failure)) => Reply::Failed { exit: failure.exit, text: failure.text },
            },
            () = &mut deadline => return timed_out(request, node).await,
            _ = look.tick() => {
                let waiting = node.waiting_for(&request.resource).await.join("; ");
                silent += 1;
                if client_here && (waiting != said || silent >= ALIVE_EVERY) {
                    silent = 0;
                    said.clone_from(&waiting);
                    // The verb goes on without its client.
                    client_here = send(writer, &Reply::Progress(waiting)).await.is_ok();
                }
            }
        }
    }
}

async fn timed_out(request: &VerbRequest, node: &Arc<Node>) -> Reply {
    let waiting = node.waiting_for(&request.resource).await;
    let waiting = if waiting.is_empty() {
        String::new()
    } else {
        format!("; still waiting for {}", waiting.join("; "))
    };
    let exit = match request.verb {
        ResourceVerb::WaitConnect | ResourceVerb::WaitSync => outcome::WAIT_TIMED_OUT,
        _ => outcome::EXEC,
    };
    let seconds = request.timeout_ms.unwrap_or_default() / 1000;
    let text = format!("{}: did not finish within {seconds} s{waiting}\n", request.resource);
    Reply::Failed { exit, text }
}

async fn send(writer: &mut OwnedWriteHalf, reply: &Reply) -> Result<(), ControlError> {
    let line = control::encode(reply)?;
    match tokio::time::timeout(WRITE_LIMIT, writer.write_all(&line)).await {
        Ok(result) => Ok(result?),
        Err(_elapsed) => Err(ControlError::Closed),
    }
}
