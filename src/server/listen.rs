//! Listening on an address, for both listeners.

use std::io;
use std::time::Duration;

use tokio::net::TcpListener;

/// How long an acceptor waits when accepting fails, mostly as the process has no descriptor left.
pub(super) const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Listens on a host (IPv6 with or without brackets) and a port. The error names both, and says what to do.
pub(crate) async fn listen(host: &str, port: u16) -> io::Result<TcpListener> {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let shown = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let bound = TcpListener::bind((host, port)).await;
    bound.map_err(|error| {
        let hint = hint(error.kind());
        io::Error::new(error.kind(), format!("cannot listen on {shown}:{port}: {error}{hint}"))
    })
}

fn hint(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::AddrInUse => "; another process listens there, perhaps another router",
        io::ErrorKind::AddrNotAvailable => {
            "; it is no address of this machine (0.0.0.0 stands for all of them)"
        }
        io::ErrorKind::PermissionDenied => "; a port below 1024 needs CAP_NET_BIND_SERVICE",
        _ => "",
    }
}
