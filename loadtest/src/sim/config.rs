//! Configuration of a simulated server, and SGLang's own timeouts.

use std::{net::SocketAddr, time::Duration};

use super::encoder::EncoderConfig;

/// Which of SGLang's servers is simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Computes the prompt, transfers its KV cache, responds with one token.
    Prefill,
    /// Receives the KV cache and responds with the whole text.
    Decode,
    /// No disaggregation: responds alone and ignores bootstrap fields.
    Regular,
    /// Encodes images, audio and video for language-only servers.
    Encoder,
}

impl Role {
    /// The role's name as `/server_info` reports it (`null`, as text, for a regular server). An
    /// encoder has no such page.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Regular => "null",
            Self::Encoder => "encode",
        }
    }
}

/// How a server chooses a rank for a request that names none (`--load-balance-method`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadBalance {
    /// By the remainder of the room: the default of prefill servers.
    FollowBootstrapRoom,
    /// One after the other: the default of others.
    RoundRobin,
}

impl LoadBalance {
    /// Its name in `/server_info`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::FollowBootstrapRoom => "follow_bootstrap_room",
            Self::RoundRobin => "round_robin",
        }
    }
}

/// The bootstrap port that a decode server assumes when a request names none.
pub const DEFAULT_BOOTSTRAP_PORT: u16 = 8998;
/// Limit of a request body; a larger one gets a 413.
pub const BODY_LIMIT: u64 = 1 << 30;

/// Seconds a prefill leg waits for its decode partner.
pub const BOOTSTRAP_TIMEOUT: f64 = 300.0;
/// Seconds a decode leg waits for its prefill partner.
pub const WAITING_TIMEOUT: f64 = 300.0;
/// Seconds until a decode leg gives up on an unreachable bootstrap server.
pub const HANDSHAKE_TIMEOUT: f64 = 14.0;
/// Seconds until a decode leg notices that its prefill server is dead (two missed heartbeats).
pub const HEARTBEAT_TIMEOUT: f64 = 11.0;
/// Seconds until the disconnect of a client without a response is noticed.
pub const DISCONNECT_POLL: f64 = 4.0;
/// Seconds until the disconnect of a client that reads a stream is noticed.
pub const STREAM_DISCONNECT_POLL: f64 = 2.0;
/// Seconds between a request that crashes the server and the end of its connections.
pub const CRASH_DELAY: f64 = 5.0;
/// Seconds between two looks of a server that drains whether it has no request left.
pub const DRAIN_POLL: f64 = 5.0;
/// Seconds from when it had none to its exit: it accepts connections and responds to nothing.
pub const SILENT_TIME: f64 = 1.5;
/// Seconds that `/health` takes to run its one token.
pub const HEALTH_TIME: f64 = 1.0;

/// The configuration of one simulated server.
#[derive(Clone, Debug)]
pub struct SimConfig {
    /// Role of the server.
    pub role: Role,
    /// Address to listen on; `None` picks a free port of 127.0.0.1.
    pub addr: Option<SocketAddr>,
    /// Prefill: port of its bootstrap server, `None` or 0 picks a free one. Decode: port that it assumes when
    /// a request has none, [`DEFAULT_BOOTSTRAP_PORT`] if `None`.
    pub bootstrap_port: Option<u16>,
    /// The served model's name.
    pub model: String,
    /// Decode: time from the end of the transfer to the first token.
    pub first_token: Duration,
    /// Decode: time between two tokens.
    pub inter_token: Duration,
    /// Prefill: time from when both legs have met to the end of the transfer.
    pub prefill_time: Duration,
    /// Prefill: time from the end of the transfer to its HTTP response.
    pub prefill_response_delay: Duration,
    /// Factor for SGLang's own timeouts (300 s, 14 s, 11 s, 4 s, …).
    pub time_scale: f64,
    /// How long an idle connection is kept open. Not scaled.
    pub keep_alive: Duration,
    /// Maximum tokens of prompt and output together.
    pub context_length: usize,
    /// `/generate` streams carry only what is new, as with `--incremental-streaming-output`.
    pub incremental_output: bool,
    /// The prompt's empty lists of logprobs are left out but for the first, as by SGLang's Rust front end. On
    /// decode that is all others.
    pub rust_front_end: bool,
    /// It has media encoded by encoders, which are registered with it.
    pub language_only: bool,
    /// Language-only: port of the encoder bootstrap server, `None` or 0 picks a free one.
    pub encoder_bootstrap_port: Option<u16>,
    /// Language-only: the encoders that are registered from the start.
    pub encoder_urls: Vec<String>,
    /// How an encoder behaves.
    pub encoder: EncoderConfig,
    /// Data-parallel ranks.
    pub dp_size: u16,
    /// How they are chosen, if not by the role's default.
    pub load_balance: Option<LoadBalance>,
    /// Each rank remembers whole prompts, and reports them as cached when they come again. Not on decode.
    pub prefix_cache: bool,
    /// Bearer token that requests must have, if any.
    pub api_key: Option<String>,
    /// Whether requests are kept for [`Sim::recorded_requests`](super::Sim::recorded_requests).
    pub record: bool,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            role: Role::Regular,
            addr: None,
            bootstrap_port: None,
            model: "tiny".to_owned(),
            first_token: Duration::ZERO,
            inter_token: Duration::ZERO,
            prefill_time: Duration::ZERO,
            prefill_response_delay: Duration::ZERO,
            time_scale: 1.0,
            keep_alive: Duration::from_secs(5),
            context_length: 1 << 20,
            incremental_output: false,
            rust_front_end: false,
            language_only: false,
            encoder_bootstrap_port: None,
            encoder_urls: Vec::new(),
            encoder: EncoderConfig::default(),
            dp_size: 1,
            load_balance: None,
            prefix_cache: false,
            api_key: None,
            record: true,
        }
    }
}

impl SimConfig {
    /// The defaults of a prefill server.
    #[must_use]
    pub fn prefill() -> Self {
        Self { role: Role::Prefill, ..Self::default() }
    }

    /// The defaults of a decode server.
    #[must_use]
    pub fn decode() -> Self {
        Self { role: Role::Decode, ..Self::default() }
    }

    /// The defaults of an encoder.
    #[must_use]
    pub fn encoder() -> Self {
        Self { role: Role::Encoder, ..Self::default() }
    }

    /// How ranks are chosen.
    #[must_use]
    pub fn balance(&self) -> LoadBalance {
        self.load_balance.unwrap_or(match self.role {
            Role::Decode => LoadBalance::RoundRobin,
            // As it was recorded from a regular server, too.
            Role::Prefill | Role::Regular | Role::Encoder => LoadBalance::FollowBootstrapRoom,
        })
    }

    /// Decode servers are recorded with `disable_radix_cache` beside prefill servers that have a cache.
    pub(crate) fn has_prefix_cache(&self) -> bool {
        self.prefix_cache && self.role != Role::Decode
    }

    pub(crate) fn scaled(&self, seconds: f64) -> Duration {
        Duration::try_from_secs_f64(seconds * self.time_scale).unwrap_or(Duration::MAX)
    }
}
