//! What a simulated server is told at its start, and the times that SGLang's own timeouts take.
//! Says nothing about what is done with them.

use std::{net::SocketAddr, time::Duration};

/// Which of SGLang's servers is played.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Computes the prompt, hands it over, answers one token.
    Prefill,
    /// Takes the prompt over and answers the whole text.
    Decode,
    /// No disaggregation: answers alone and ignores bootstrap fields.
    Regular,
}

impl Role {
    /// The role's name as `/server_info` reports it (`null`, as text, for a regular server).
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Regular => "null",
        }
    }
}

/// The bootstrap port that a decode server assumes when a request names none.
pub const DEFAULT_BOOTSTRAP_PORT: u16 = 8998;
/// The largest request body that is read; a bigger one is answered 413.
pub const BODY_LIMIT: u64 = 1 << 30;

/// Seconds a prefill leg waits for its decode partner.
pub const BOOTSTRAP_TIMEOUT: f64 = 300.0;
/// Seconds a decode leg waits for its prefill partner.
pub const WAITING_TIMEOUT: f64 = 300.0;
/// Seconds until a decode leg gives up on an unreachable bootstrap server.
pub const HANDSHAKE_TIMEOUT: f64 = 14.0;
/// Seconds until a decode leg notices that its prefill server is dead (two missed heart-beats).
pub const HEARTBEAT_TIMEOUT: f64 = 11.0;
/// Seconds until the loss of a client that has no answer yet is noticed.
pub const DISCONNECT_POLL: f64 = 4.0;
/// Seconds until the loss of a client that reads a stream is noticed.
pub const STREAM_DISCONNECT_POLL: f64 = 2.0;
/// Seconds between a request that kills the server and the end of its connections.
pub const CRASH_DELAY: f64 = 5.0;
/// Seconds that `/health` takes to run its one token.
pub const HEALTH_TIME: f64 = 1.0;

/// The configuration of one simulated server.
#[derive(Clone, Debug)]
pub struct SimConfig {
    /// Which server is played.
    pub role: Role,
    /// Where to listen; a free port of 127.0.0.1 when absent.
    pub addr: Option<SocketAddr>,
    /// Prefill: the port its bootstrap server listens on, a free one when absent or 0.
    /// Decode: the port it assumes when a request carries none, [`DEFAULT_BOOTSTRAP_PORT`] when absent.
    pub bootstrap_port: Option<u16>,
    /// The served model's name.
    pub model: String,
    /// Decode: time from the end of the transfer to the first token.
    pub first_token: Duration,
    /// Decode: time between two tokens.
    pub inter_token: Duration,
    /// Prefill: time between the meeting of both legs and the end of the transfer.
    pub prefill_time: Duration,
    /// Prefill: extra time between the end of the transfer and the HTTP answer.
    pub prefill_answer_delay: Duration,
    /// What the servers' own times (300 s, 14 s, 11 s, 4 s, …) are multiplied by.
    pub time_scale: f64,
    /// How long an idle connection is kept open. It is not scaled.
    pub keep_alive: Duration,
    /// Tokens that prompt and answer may have together.
    pub context_length: usize,
    /// `/generate` streams carry only what is new, as with `--incremental-streaming-output`.
    pub incremental_output: bool,
    /// The bearer token that requests must carry, if any.
    pub api_key: Option<String>,
    /// Whether requests are kept for [`Sim::seen`](super::Sim::seen).
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
            prefill_answer_delay: Duration::ZERO,
            time_scale: 1.0,
            keep_alive: Duration::from_secs(5),
            context_length: 1 << 20,
            incremental_output: false,
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

    pub(crate) fn scaled(&self, seconds: f64) -> Duration {
        Duration::try_from_secs_f64(seconds * self.time_scale).unwrap_or(Duration::MAX)
    }
}
