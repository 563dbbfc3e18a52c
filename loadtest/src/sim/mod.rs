//! Simulated SGLang prefill, decode and regular servers and encoders, with the response shapes, errors and
//! timeouts of the real ones. The text is made up; no model runs. Load generation and routing are done
//! elsewhere.
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

mod bootstrap_fields;
mod chat;
mod completions;
mod config;
mod encoder;
mod errors;
mod experts;
mod generate;
mod generation;
mod info;
mod json;
mod messages_api;
mod openai;
mod output;
mod prompt;
mod ranks;
mod rendezvous;
mod request;
mod response;
mod responses_api;
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
    time::Duration,
};

use tokio::{net::TcpListener, sync::watch, task::JoinHandle, time};

pub use config::{
    BODY_LIMIT, BOOTSTRAP_TIMEOUT, CRASH_DELAY, DEFAULT_BOOTSTRAP_PORT, DISCONNECT_POLL, DRAIN_POLL,
    HANDSHAKE_TIMEOUT, HEALTH_TIME, HEARTBEAT_TIMEOUT, LoadBalance, Role, SILENT_TIME,
    STREAM_DISCONNECT_POLL, SimConfig, WAITING_TIMEOUT,
};
pub use encoder::EncoderConfig;
pub use prompt::{hash_ids, hash_text, hash_value};
pub use ranks::RankStats;
pub use state::{RecordedRequest, Stats};

use state::State;

/// A running simulated server. Dropping it stops it as `SIGKILL` stops a real one.
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
            Role::Decode | Role::Regular | Role::Encoder => None,
        };
        let registry = match config.language_only {
            true => Some(TcpListener::bind((addr.ip(), config.encoder_bootstrap_port.unwrap_or(0))).await?),
            false => None,
        };
        let registry_port = match &registry {
            Some(listener) => Some(listener.local_addr()?.port()),
            None => None,
        };
        let bootstrap_port = match &bootstrap {
            Some(listener) => Some(listener.local_addr()?.port()),
            None => config.bootstrap_port,
        };
        let config = SimConfig { encoder_bootstrap_port: registry_port, ..config };
        let (stop, stopped) = watch::channel(false);
        let state = Arc::new(State::new(config, addr, bootstrap_port, stopped.clone()));
        let api = server::accept(listener, Arc::clone(&state), stopped.clone(), server::connection);
        let mut listeners = vec![tokio::spawn(api)];
        if let Some(listener) = bootstrap {
            let serve = rendezvous::bootstrap::connection;
            let stopped = stopped.clone();
            listeners.push(tokio::spawn(server::accept(listener, Arc::clone(&state), stopped, serve)));
        }
        if let Some(listener) = registry {
            let serve = encoder::registry::connection;
            listeners.push(tokio::spawn(server::accept(listener, Arc::clone(&state), stopped, serve)));
        }
        Ok(Self { state, stop, listeners })
    }

    /// Address of the API.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.state.addr
    }

    /// Base URL of the API, without a trailing slash.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.state.addr)
    }

    /// Prefill: port of its bootstrap server. Otherwise the configured port.
    #[must_use]
    pub fn bootstrap_port(&self) -> Option<u16> {
        self.state.bootstrap_port
    }

    /// Language-only: port of its encoder bootstrap server.
    #[must_use]
    pub fn encoder_bootstrap_port(&self) -> Option<u16> {
        self.state.config.encoder_bootstrap_port
    }

    /// Language-only: the encoders that are registered.
    #[must_use]
    pub fn encoder_urls(&self) -> Vec<String> {
        self.state.encoding.urls()
    }

    /// Encoder: `/encode` fails with this status from now on, or succeeds.
    pub fn fail_encodes(&self, status: Option<u16>) {
        self.state.encoding.fail_encodes(status);
    }

    /// Encoder: `/health` answers with this status from now on, or 200.
    pub fn fail_health(&self, status: Option<u16>) {
        self.state.encoding.fail_health(status);
    }

    /// The role.
    #[must_use]
    pub fn role(&self) -> Role {
        self.state.config.role
    }

    /// A snapshot of the counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.state.stats()
    }

    /// What each data-parallel rank was given, by number.
    #[must_use]
    pub fn rank_stats(&self) -> Vec<RankStats> {
        self.state.ranks.stats()
    }

    /// The most recent requests, oldest first; empty if recording is off.
    #[must_use]
    pub fn recorded_requests(&self) -> Vec<RecordedRequest> {
        self.state.recorded_requests()
    }

    /// Ends the server as `SIGTERM` ends a real one. `/health` and `/ready` are 503 at once, and everything
    /// else goes on, new requests too. Every 5 s since its start the server looks whether no request is left.
    /// If so, it accepts connections for another 1.5 s without responding, and resets them when it exits.
    pub async fn terminate(self) {
        self.drain();
        // An interval of zero panics, which `time_scale` 0 would ask for.
        let period = self.state.config.scaled(DRAIN_POLL).max(Duration::from_millis(1));
        let past = self.state.started.elapsed().div_duration_f64(period).ceil();
        let mut polls = time::interval_at(self.state.started + period.mul_f64(past), period);
        loop {
            polls.tick().await;
            if self.state.in_flight() == 0 {
                break;
            }
        }
        self.state.fall_silent();
        time::sleep(self.state.config.scaled(SILENT_TIME)).await;
        self.shutdown().await;
    }

    /// From now on `/health` and `/ready` respond with 503, as after a `SIGTERM`; everything else goes on.
    pub fn drain(&self) {
        self.state.draining.store(true, Ordering::Relaxed);
    }

    /// Stops the server: when this returns, its ports are closed and its connections gone.
    pub async fn shutdown(mut self) {
        self.stop.send_replace(true);
        for listener in self.listeners.drain(..) {
            // An error is a panic in the listener's task, which has been printed already.
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

    /// Stops both.
    pub async fn shutdown(self) {
        self.prefill.shutdown().await;
        self.decode.shutdown().await;
    }
}
