//! Serves memory over NBD: `cargo run --example nbd_ram -- SOCKET_PATH|HOST:PORT [MIB]`.
//!
//! Try it with `nbdinfo 'nbd+unix:///ram?socket=SOCKET_PATH'` or `nbdinfo nbd://HOST:PORT/ram`.
mod server;

use lockstep_replicator::frontend::nbd::{ExportInfo, ExportRefusal, RefusalKind};
use std::error::Error;
use std::path::Path;
use std::sync::Arc;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().ok_or("usage: nbd_ram SOCKET_PATH|HOST:PORT [MIB]")?;
    let mib: u64 = arguments.next().map_or(Ok(64), |text| text.parse())?;

    let mut exports = server::RamExports::default();
    let size_bytes = mib.checked_mul(1 << 20).ok_or("that is too large")?;
    exports.add("ram", ExportInfo { description: "memory".into(), ..ExportInfo::volume(size_bytes, 512) })?;
    let text = "secondary is Secondary here. To use it: lockstep primary secondary";
    exports.add_refused("secondary", ExportRefusal::new(RefusalKind::Policy, text));

    let exports = Arc::new(exports);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        if address.contains('/') {
            server::serve_unix(Path::new(&address), exports).await
        } else {
            server::serve_tcp(tokio::net::TcpListener::bind(&address).await?, exports).await
        }
    })?;
    Ok(())
}
