//! Stand-ins for SGLang prefill, decode and regular servers. They answer with the shapes and the timeouts of
//! the real ones and invent the text; no model runs. Load generation and routing are not done here.
//!
//! ```
//! # async fn example() -> std::io::Result<()> {
//! use loadtest::sim::{SimConfig, SimPair};
//! let pair = SimPair::start(SimConfig::prefill(), SimConfig::decode()).await?;
//! println!("{} {} {:?}", pair.prefill.url(), pair.decode.url(), pair.prefill.bootstrap_port());
//! pair.shutdown().await;
//! # Ok(())
//! # }
//! ```

mod chat;
mod completions;
mod config;
mod generate;
mod generation;
mod info;
mod json;
mod openai;
mod output;
mod place;
mod prompt;
mod rendezvous;
mod reply;
mod request;
mod sampling;
mod server;
mod state;
pub mod text;
mod transfer;
mod writer;

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, atomic::Ordering},
};

use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

pub use config::{
    BODY_LIMIT, BOOTSTRAP_TIMEOUT, CRASH_DELAY, DEFAULT_BOOTSTRAP_PORT, DISCONNECT_POLL, HANDSHAKE_TIMEOUT,
    HEALTH_TIME, HEARTBEAT_TIMEOUT, Role, STREAM_DISCONNECT_POLL, SimConfig, WAITING_TIMEOUT,
};
pub use prompt::{hash_ids, hash_text, hash_value};
pub use state::{Seen, Stats};

use state::State;

/// One running simulated server. Dropping it ends it, as a `SIGKILL` ends a real one.
pub struct Sim {
    state: Arc<State>,
    stop: watch::Sender<bool>,
    listeners: Vec<JoinHandle<()>>,
}

impl Sim {
    /// Starts a server on the current tokio runtime.
    ///
    /// # Errors
    /// When a port cannot be bound.
    pub async fn start(config: SimConfig) -> io::Result<Self> {
        let wanted = config.addr.unwrap_or_else(|| SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        let listener = TcpListener::bind(wanted).await?;
        let addr = listener.local_addr()?;
        let bootstrap = match config.role {
            Role::Prefill => Some(TcpListener::bind((addr.ip(), config.bootstrap_port.unwrap_or(0))).await?),
            Role::Decode | Role::Regular => None,
        };
        let bootstrap_port = match &bootstrap {
            Some(listener) => Some(listener.local_addr()?.port()),
            None => config.bootstrap_port,
        };
        let (stop, stopped) = watch::channel(false);
        let state = Arc::new(State::new(config, addr, bootstrap_port, stopped.clone()));
        let api = server::accept(listener, Arc::clone(&state), stopped.clone(), server::connection);
        let mut listeners = vec![tokio::spawn(api)];
        if let Some(listener) = bootstrap {
            let serve = rendezvous::bootstrap::connection;
            listeners.push(tokio::spawn(server::accept(listener, Arc::clone(&state), stopped, serve)));
        }
        Ok(Self { state, stop, listeners })
    }

    /// Where the API is served.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.state.addr
    }

    /// The API's base URL, without a slash at its end.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.state.addr)
    }

    /// Prefill: the port of its bootstrap server. Otherwise what the configuration says.
    #[must_use]
    pub fn bootstrap_port(&self) -> Option<u16> {
        self.state.bootstrap_port
    }

    /// The role.
    #[must_use]
    pub fn role(&self) -> Role {
        self.state.config.role
    }

    /// The counters now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.state.stats()
    }

    /// The last requests, oldest first; empty when recording is off.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        self.state.seen()
    }

    /// From now on `/health` and `/ready` answer 503, as after a `SIGTERM`; everything else goes on.
    pub fn drain(&self) {
        self.state.draining.store(true, Ordering::Relaxed);
    }

    /// Ends the server: its ports are closed and its connections gone when this returns.
    pub async fn shutdown(mut self) {
        self.stop.send_replace(true);
        for listener in self.listeners.drain(..) {
            // A listener's task ends by itself; a panic in it has been reported already.
            let _ = listener.await;
        }
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

/// A prefill and a decode server that know each other's bootstrap port.
pub struct SimPair {
    /// The prefill server.
    pub prefill: Sim,
    /// The decode server.
    pub decode: Sim,
}

impl SimPair {
    /// Starts both. A decode configuration without a bootstrap port gets prefill's.
    ///
    /// # Errors
    /// When a port cannot be bound.
    pub async fn start(prefill: SimConfig, mut decode: SimConfig) -> io::Result<Self> {
        let prefill = Sim::start(SimConfig { role: Role::Prefill, ..prefill }).await?;
        decode.bootstrap_port = decode.bootstrap_port.or(prefill.bootstrap_port());
        let decode = Sim::start(SimConfig { role: Role::Decode, ..decode }).await?;
        Ok(Self { prefill, decode })
    }

    /// Starts both with defaults.
    ///
    /// # Errors
    /// When a port cannot be bound.
    pub async fn default_start() -> io::Result<Self> {
        Self::start(SimConfig::prefill(), SimConfig::decode()).await
    }

    /// Ends both.
    pub async fn shutdown(self) {
        self.prefill.shutdown().await;
        self.decode.shutdown().await;
    }
}
