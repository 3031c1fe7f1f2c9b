//! The link between the two nodes as a TCP proxy of ours, with what goes wrong on links: cut, silent in one direction,
//! slow, dripping.
//!
//! What travels towards a node is what that node's weather is about, whoever dialled; the end of a connection travels
//! too, so a silent direction hides that the other side is gone.
use super::load::pause;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often a silent direction looks whether it may speak again.
const LOOK: Duration = Duration::from_millis(5);

/// See the module.
#[derive(Debug)]
pub(crate) struct Link {
    /// Where the proxy listens for connections to each node.
    pub(crate) ports: [u16; 2],
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    cut: AtomicBool,
    /// What happens to bytes on their way to each node.
    towards: [Weather; 2],
    open: Mutex<Vec<TcpStream>>,
}

#[derive(Debug, Default)]
struct Weather {
    silent: AtomicBool,
    delay_ms: AtomicU64,
    /// Bytes per millisecond; 0 = as they come.
    drip: AtomicUsize,
}

impl Link {
    /// Between nodes that listen on these ports of the loopback address.
    pub(crate) fn start(nodes: [u16; 2]) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let listen = |node: usize| -> io::Result<u16> {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            let port = listener.local_addr()?.port();
            let (shared, target) = (shared.clone(), nodes[node]);
            std::thread::spawn(move || accept(&listener, node, target, &shared));
            Ok(port)
        };
        Ok(Self { ports: [listen(0)?, listen(1)?], shared })
    }

    /// Cuts every connection and lets none through.
    pub(crate) fn cut(&self) {
        self.shared.cut.store(true, Ordering::SeqCst);
        for socket in self.shared.open().drain(..) {
            // Gone already is as good.
            let _gone = socket.shutdown(Shutdown::Both);
        }
    }

    /// Lets connections through again.
    pub(crate) fn mend(&self) {
        self.shared.cut.store(false, Ordering::SeqCst);
    }

    /// Nothing reaches `node` any more, and nobody is told. What was under way is held, not lost.
    pub(crate) fn silence(&self, node: usize) {
        self.shared.towards[node].silent.store(true, Ordering::SeqCst);
    }

    /// What reaches `node` is late.
    pub(crate) fn delay(&self, node: usize, millis: u64) {
        self.shared.towards[node].delay_ms.store(millis, Ordering::SeqCst);
    }

    /// What reaches `node` comes in small pieces: so many bytes per millisecond.
    pub(crate) fn drip(&self, node: usize, bytes: usize) {
        self.shared.towards[node].drip.store(bytes, Ordering::SeqCst);
    }

    /// Fair weather.
    pub(crate) fn clear(&self) {
        for weather in &self.shared.towards {
            weather.silent.store(false, Ordering::SeqCst);
            weather.delay_ms.store(0, Ordering::SeqCst);
            weather.drip.store(0, Ordering::SeqCst);
        }
        self.mend();
    }
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, Vec<TcpStream>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_cut(&self) -> bool {
        self.cut.load(Ordering::SeqCst)
    }

    /// Waits until something can reach `node`.
    fn wait(&self, node: usize) {
        while self.towards[node].silent.load(Ordering::SeqCst) && !self.is_cut() {
            pause(LOOK);
        }
    }
}

fn accept(listener: &TcpListener, node: usize, target: u16, shared: &Arc<Shared>) {
    for client in listener.incoming().flatten() {
        if shared.is_cut() {
            continue;
        }
        let Ok(server) = TcpStream::connect(("127.0.0.1", target)) else { continue };
        let _quick = (client.set_nodelay(true), server.set_nodelay(true));
        for (from, to, towards) in [(&client, &server, node), (&server, &client, 1 - node)] {
            let (Ok(from), Ok(to), Ok(kept)) = (from.try_clone(), to.try_clone(), from.try_clone()) else {
                continue;
            };
            shared.open().push(kept);
            let shared = shared.clone();
            std::thread::spawn(move || pump(from, to, towards, &shared));
        }
        // Cut between the first look and the list.
        if shared.is_cut() {
            let _gone = (client.shutdown(Shutdown::Both), server.shutdown(Shutdown::Both));
        }
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream, towards: usize, shared: &Shared) {
    let weather = &shared.towards[towards];
    let mut buffer = vec![0; 256 << 10];
    'open: while let Ok(len) = from.read(&mut buffer) {
        if len == 0 {
            break;
        }
        let delay = weather.delay_ms.load(Ordering::SeqCst);
        if delay > 0 {
            pause(Duration::from_millis(delay));
        }
        let mut rest = &buffer[..len];
        while !rest.is_empty() {
            shared.wait(towards);
            let piece = match weather.drip.load(Ordering::SeqCst) {
                0 => rest.len(),
                drip => {
                    pause(Duration::from_millis(1));
                    drip.min(rest.len())
                }
            };
            if to.write_all(&rest[..piece]).is_err() {
                break 'open;
            }
            rest = &rest[piece..];
        }
    }
    // Each side learns of the end only when something can reach it.
    shared.wait(towards);
    let _gone = to.shutdown(Shutdown::Both);
    shared.wait(1 - towards);
    let _gone = from.shutdown(Shutdown::Both);
}
