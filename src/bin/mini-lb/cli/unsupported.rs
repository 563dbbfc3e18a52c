//! The flags of `sglang_router` that mini-lb does not support, and what a user of
//! one should do instead.
//!
//! Tables only: the parent looks for them on the command line, and `tests/cli.rs`
//! reads this same file. The names are those of sglang-router 0.3.2, a few of later
//! releases, and those of the first `mini_lb` (SGLang 0.4.6).

/// Accepted and without effect, since mini-lb always does what they ask for.
///
/// `--pd-disaggregation` and `--mini-lb` describe this program; `--rust-lb` asked the first `mini_lb` for its
/// Rust version; the other turns off what does not exist here.
pub(crate) const ACCEPTED: &[&str] =
    &["--pd-disaggregation", "--mini-lb", "--disable-circuit-breaker", "--rust-lb"];

/// Accepted with a value, and without effect: the flag, and why. A line of the log says so.
pub(crate) const WITHOUT_EFFECT: &[(&str, &str)] = &[
    ("--cache-threshold", WEIGHED),
    ("--balance-abs-threshold", WEIGHED),
    ("--balance-rel-threshold", WEIGHED),
    ("--eviction-interval-secs", "the prefix index has a fixed size and nothing to evict"),
    ("--max-tree-size", "the prefix index has a fixed size; see --prefix-index-bytes"),
];

/// Policies of `sglang_router` that do not exist here, and what to use instead.
pub(crate) const POLICIES: &[(&str, &str)] = &[
    ("manual", "use consistent_hash, which keeps a key on its server and remembers nothing"),
    ("bucket", "use least_load or cache_aware, which count the bytes of prompts"),
];

/// Refused: the flag, and what to do instead.
pub(crate) const REFUSED: &[(&str, &str)] = &[
    // Servers.
    ("--prefill-bootstrap-ports", "write the port after the URL: --prefill URL PORT"),
    ("--enable-igw", "mini-lb routes to the servers of one model; start one mini-lb for each model"),
    ("--backend", "mini-lb routes to SGLang servers only; leave the flag out"),
    // Choosing servers.
    ("--bucket-adjust-interval-secs", BUCKET),
    ("--max-idle-secs", MANUAL),
    ("--assignment-mode", MANUAL),
    // Limits and timeouts.
    ("--timeout", "use --request-timeout-secs"),
    // Failures.
    ("--retry-initial-backoff-ms", RETRIES),
    ("--retry-max-backoff-ms", RETRIES),
    ("--retry-backoff-multiplier", RETRIES),
    ("--retry-jitter-factor", RETRIES),
    ("--cb-failure-threshold", BREAKER),
    ("--cb-success-threshold", BREAKER),
    ("--cb-timeout-duration-secs", BREAKER),
    ("--cb-window-duration-secs", BREAKER),
    ("--health-check-endpoint", "mini-lb checks /ready, and /health where that is 404; leave the flag out"),
    // Logging and metrics.
    ("--log-interval", "mini-lb writes no periodic log line; leave the flag out"),
    ("--prometheus-duration-buckets", METRICS),
    // TLS and tokens.
    ("--server-cert-path", TLS),
    ("--server-key-path", TLS),
    ("--control-plane-api-keys", ADMIN),
    ("--control-plane-audit-enabled", ADMIN),
    ("--jwt-issuer", ADMIN),
    ("--jwt-audience", ADMIN),
    ("--jwt-jwks-uri", ADMIN),
    ("--jwt-role-mapping", ADMIN),
    // What a router that reads prompts needs.
    ("--model-path", TOKENIZER),
    ("--tokenizer-path", TOKENIZER),
    ("--chat-template", TOKENIZER),
    ("--tokenizer-cache-enable-l0", TOKENIZER),
    ("--tokenizer-cache-l0-max-entries", TOKENIZER),
    ("--tokenizer-cache-enable-l1", TOKENIZER),
    ("--tokenizer-cache-l1-max-memory", TOKENIZER),
    ("--reasoning-parser", PARSER),
    ("--tool-call-parser", PARSER),
    ("--mcp-config-path", "mini-lb calls no tools; run them in the client or in a gateway in front"),
    // Stored conversations.
    ("--history-backend", HISTORY),
    ("--oracle-wallet-path", HISTORY),
    ("--oracle-tns-alias", HISTORY),
    ("--oracle-connect-descriptor", HISTORY),
    ("--oracle-username", HISTORY),
    ("--oracle-password", HISTORY),
    ("--oracle-pool-min", HISTORY),
    ("--oracle-pool-max", HISTORY),
    ("--oracle-pool-timeout-secs", HISTORY),
    ("--postgres-db-url", HISTORY),
    ("--postgres-pool-max", HISTORY),
    ("--redis-url", HISTORY),
    ("--redis-key-prefix", HISTORY),
    ("--redis-pool-max", HISTORY),
    ("--redis-retention-days", HISTORY),
];

const WEIGHED: &str =
    "cache_aware weighs cached bytes against waiting ones and has no threshold between them";
const BUCKET: &str = "it tunes the policy bucket; use --policy cache_aware or least_load";
const MANUAL: &str = "it tunes the policy manual; use --policy consistent_hash, which remembers nothing";
const RETRIES: &str = "mini-lb retries immediately or not at all; see --retry-max-retries";
const BREAKER: &str = "mini-lb has no circuit breaker besides its health checks; see --health-failure-threshold, or leave the flag out";
const METRICS: &str = "the buckets of mini-lb's histograms are fixed (docs/METRICS.md); leave the flag out";
const TLS: &str = "use --tls-cert-path and --tls-key-path";
const ADMIN: &str = "mini-lb has one key for operators and no roles; use --admin-api-key";
const TOKENIZER: &str = "mini-lb does not tokenize; give the flag's value to the servers";
const PARSER: &str = "mini-lb does not parse responses; give this flag to the servers";
const HISTORY: &str = "mini-lb stores no conversations; keep them in the client or in a gateway in front";
