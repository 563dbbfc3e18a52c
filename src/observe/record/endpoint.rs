//! The label of a request's path in metrics.

/// What a client asked for. A fixed set whatever paths are sent, so that a client cannot add series to the
/// metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Generate,
    Chat,
    Completions,
    Responses,
    Messages,
    /// `/invocations`: chat completions for SageMaker.
    Invocations,
    Health,
    Ready,
    HealthGenerate,
    FlushCache,
    ServerInfo,
    ModelInfo,
    Loads,
    /// Another request that one server answers.
    OneServer,
    /// Another request that all servers get.
    FanOut,
    /// What pairs cannot do.
    NotPossible,
    /// The admin API for backends: `/workers`, `/pd_role_switch` and the like.
    Workers,
    /// Any other path; most of these requests are answered 404.
    Other,
}

impl Endpoint {
    /// All of them, in the order of their definition, which is the index of their counters. Those that
    /// generate come first, so that arrays for them alone need no gaps.
    pub(crate) const ALL: [Self; 18] = [
        Self::Generate,
        Self::Chat,
        Self::Completions,
        Self::Responses,
        Self::Messages,
        Self::Invocations,
        Self::Health,
        Self::Ready,
        Self::HealthGenerate,
        Self::FlushCache,
        Self::ServerInfo,
        Self::ModelInfo,
        Self::Loads,
        Self::OneServer,
        Self::FanOut,
        Self::NotPossible,
        Self::Workers,
        Self::Other,
    ];

    /// How many of [`ALL`](Self::ALL) generate tokens.
    pub(crate) const GENERATING: usize = 6;

    /// The value of the label `endpoint`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Generate => "generate",
            Self::Chat => "chat_completions",
            Self::Completions => "completions",
            Self::Responses => "responses",
            Self::Messages => "messages",
            Self::Invocations => "invocations",
            Self::Health => "health",
            Self::Ready => "ready",
            Self::HealthGenerate => "health_generate",
            Self::FlushCache => "flush_cache",
            Self::ServerInfo => "server_info",
            Self::ModelInfo => "model_info",
            Self::Loads => "loads",
            Self::OneServer => "one_server",
            Self::FanOut => "fan_out",
            Self::NotPossible => "not_possible",
            Self::Workers => "workers",
            Self::Other => "other",
        }
    }

    /// Whether the request runs on a prefill-decode pair.
    pub(crate) fn generates(self) -> bool {
        (self as usize) < Self::GENERATING
    }
}
