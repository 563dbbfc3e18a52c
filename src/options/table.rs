//! The table of all options. Its order is that of `--help` and of the documentation; an option that sets
//! several values stands before those that set one of them.

use std::time::Duration;

use super::defaults::*;
use super::spec::OptionDefault::{Number, Seconds, Text, Unset, Words};
use super::spec::ValueKind::{CommaList, Groups, List, Single, Switch};
use super::spec::{OptionSpec, ValueKind};
use super::{Entry, OptionSection};
use crate::observe::report::DEFAULT_HEADERS;

/// The values of the three options of policies. Other names of some of them are accepted, too.
const POLICIES: &str = "cache_aware|least_load|power_of_two|consistent_hash|round_robin|random";

pub(super) static SECTIONS: &[OptionSection] = &[
    OptionSection {
        title: "Servers",
        entries: &[
            // A change of the list of servers is reported as numbers of servers: 100 URLs would be no log
            // line.
            Entry {
                spec: OptionSpec::new("prefill", Groups { names: &["URL", "PORT|none"], required: 1 })
                    .reported_as("servers")
                    .help(
                        "A prefill server and its --disaggregation-bootstrap-port. With none or nothing as PORT, the \
                         server is asked for its port. May be repeated",
                    ),
                field: |options| &mut options.prefill,
            },
            Entry {
                spec: OptionSpec::new("decode", List("URL"))
                    .reported_as("servers")
                    .help("A decode server. May be repeated"),
                field: |options| &mut options.decode,
            },
            Entry {
                spec: OptionSpec::new(
                    "prefill-bootstrap-host",
                    Groups { names: &["URL", "HOST"], required: 2 },
                )
                .reported_as("servers")
                .help(
                    "The host under which decode servers reach the prefill server at URL, if it is not the URL's own \
                     host. May be repeated",
                ),
                field: |options| &mut options.bootstrap_hosts,
            },
            Entry {
                spec: OptionSpec::new(
                    "prefill-dns",
                    Groups { names: &["HOST:PORT", "BOOTSTRAP|none"], required: 1 },
                )
                .help(
                    "A DNS name, such as a headless Kubernetes service, each address of which is a prefill server, and \
                     the bootstrap port of them all. It is looked up again and again. May be repeated",
                ),
                field: |options| &mut options.discovery.prefill,
            },
            Entry {
                spec: OptionSpec::new("decode-dns", List("HOST:PORT")).help(
                    "A DNS name each address of which is a decode server. It is looked up again and again. May be \
                     repeated",
                ),
                field: |options| &mut options.discovery.decode,
            },
            Entry {
                spec: OptionSpec::new("worker-urls", ValueKind::WordList("URL"))
                    .reported_as("servers")
                    .may_be_empty()
                    .help(
                        "Servers without disaggregation: each request goes to one of them, byte for byte, and not to \
                         a pair. Not together with prefill and decode servers. Without a URL the router starts \
                         with none",
                    ),
                field: |options| &mut options.worker_urls,
            },
            Entry {
                spec: OptionSpec::new("worker-dns", List("HOST:PORT")).help(
                    "A DNS name each address of which is such a server. It is looked up again and again. May be \
                     repeated",
                ),
                field: |options| &mut options.discovery.regular,
            },
        ],
    },
    OptionSection {
        title: "Kubernetes",
        entries: &[
            // Without the feature the flags exist, so that the error can name it.
            Entry {
                spec: OptionSpec::new("service-discovery", Switch).help(
                    "Servers are the pods that a selector matches: those that are ready and not terminating. Needs a build \
                     with the feature kubernetes",
                ),
                #[cfg(feature = "kubernetes")]
                field: |options| &mut options.pods.is_on,
                #[cfg(not(feature = "kubernetes"))]
                field: |options| &mut options.without_kubernetes,
            },
            Entry {
                spec: OptionSpec::new("selector", CommaList("KEY=VALUE")).help(
                    "Labels of pods that are servers without disaggregation, as those of --worker-urls. A pod must have all \
                     of them",
                ),
                #[cfg(feature = "kubernetes")]
                field: |options| &mut options.pods.selector,
                #[cfg(not(feature = "kubernetes"))]
                field: |options| &mut options.without_kubernetes,
            },
            Entry {
                spec: OptionSpec::new("prefill-selector", CommaList("KEY=VALUE")).help(
                    "Labels of pods that are prefill servers. Their annotation sglang.ai/bootstrap-port has the bootstrap \
                     port; without it, each is asked",
                ),
                #[cfg(feature = "kubernetes")]
                field: |options| &mut options.pods.prefill_selector,
                #[cfg(not(feature = "kubernetes"))]
                field: |options| &mut options.without_kubernetes,
            },
            Entry {
                spec: OptionSpec::new("decode-selector", CommaList("KEY=VALUE")).help("Labels of pods that are decode servers"),
                #[cfg(feature = "kubernetes")]
                field: |options| &mut options.pods.decode_selector,
                #[cfg(not(feature = "kubernetes"))]
                field: |options| &mut options.without_kubernetes,
            },
            Entry {
                spec: OptionSpec::new("service-discovery-port", Single("PORT")).default(Unset("80")).between(1, 65_535).help("Port on which all pods serve"),
                #[cfg(feature = "kubernetes")]
                field: |options| &mut options.pods.port,
                #[cfg(not(feature = "kubernetes"))]
                field: |options| &mut options.without_kubernetes,
            },
            Entry {
                spec: OptionSpec::new("service-discovery-namespace", Single("NAME")).default(Unset("all namespaces")).help("Namespace of the pods"),
                #[cfg(feature = "kubernetes")]
                field: |options| &mut options.pods.namespace,
                #[cfg(not(feature = "kubernetes"))]
                field: |options| &mut options.without_kubernetes,
            },
        ],
    },
    OptionSection {
        title: "Encoders",
        entries: &[
            Entry {
                spec: OptionSpec::new("encode", List("URL")).help(
                    "An encoder (SGLang's --encoder-only), by the URL under which prefill servers reach it. It is \
                     registered with each language-only prefill server. May be repeated",
                ),
                field: |options| &mut options.encoders.urls,
            },
            Entry {
                spec: OptionSpec::new("encode-dns", List("HOST:PORT")).help(
                    "A DNS name each address of which is an encoder. It is looked up again and again. May be repeated",
                ),
                field: |options| &mut options.encoders.names,
            },
            Entry {
                spec: OptionSpec::new("encoder-bootstrap-port", Single("PORT"))
                    .default(Unset("as each server says, or 8997"))
                    .between(1, 65_535)
                    .help(
                        "Port on which all language-only prefill servers take registrations of encoders, if it is not \
                         the one that they say",
                    ),
                field: |options| &mut options.encoders.bootstrap_port,
            },
        ],
    },
    OptionSection {
        title: "Load balancing",
        entries: &[
            // Sets all roles, so it stands before the options of one role, which override it.
            Entry {
                spec: OptionSpec::new("policy", Single(POLICIES))
                    .default(Text("cache_aware"))
                    .reported_as("prefill-policy, decode-policy")
                    .help(
                        "How servers are chosen. cache_aware is for prefill servers and plain ones; of decode servers \
                         it chooses as least_load",
                    ),
                field: |options| &mut options.policies,
            },
            Entry {
                spec: OptionSpec::new("prefill-policy", Single(POLICIES))
                    .default(Unset("--policy"))
                    .help("How prefill servers are chosen"),
                field: |options| &mut options.policies.prefill,
            },
            Entry {
                spec: OptionSpec::new("decode-policy", Single(POLICIES))
                    .default(Unset("--policy"))
                    .help("How decode servers are chosen"),
                field: |options| &mut options.policies.decode,
            },
            Entry {
                spec: OptionSpec::new("hash-key-headers", ValueKind::WordList("HEADER"))
                    .default(Words(&DEFAULT_HASH_KEY_HEADERS))
                    .help(
                        "Headers that name a request's conversation for consistent_hash; the first that is there \
                         counts, then prompt_cache_key and session_id in the body, then the prompt's first 4 KiB",
                    ),
                field: |options| &mut options.hash_key_headers,
            },
            Entry {
                spec: OptionSpec::new("prefix-index-bytes", Single("BYTES"))
                    .default(Number(DEFAULT_PREFIX_INDEX_BYTES as u64))
                    .between(64 << 10, 1 << 30)
                    .help("Most memory in which cache_aware remembers who has which prompt in its cache"),
                field: |options| &mut options.prefix_index_bytes,
            },
        ],
    },
    OptionSection {
        title: "Listening",
        entries: &[
            // The listener is open for as long as the program runs.
            Entry {
                spec: OptionSpec::new("host", Single("HOST"))
                    .default(Text("0.0.0.0"))
                    .after_restart()
                    .help("Address to listen on"),
                field: |options| &mut options.host,
            },
            // With port 0 the kernel would choose one that no client knows. A user of the library can bind a
            // listener instead.
            Entry {
                spec: OptionSpec::new("port", Single("PORT"))
                    .default(Number(30_000))
                    .between(1, 65_535)
                    .after_restart()
                    .help("Port to listen on"),
                field: |options| &mut options.port,
            },
            // Each worker thread is told at its start what to expect of new connections.
            Entry {
                spec: OptionSpec::new("proxy-protocol", Switch).after_restart().help(
                    "Each connection of a client must begin with a PROXY header (version 1 or 2), by which a load \
                     balancer says who the client is. Not on the admin listener",
                ),
                field: |options| &mut options.proxy_protocol,
            },
        ],
    },
    OptionSection {
        title: "TLS and HTTP/2",
        entries: &[
            Entry {
                spec: OptionSpec::new("tls-cert-path", Single("FILE"))
                    .default(Unset("plain HTTP"))
                    .help("Certificate for clients and its intermediate CAs, in PEM. Clients then speak TLS 1.2 or 1.3"),
                field: |options| &mut options.tls.cert,
            },
            Entry {
                spec: OptionSpec::new("tls-key-path", Single("FILE")).help("Private key of that certificate, in PEM"),
                field: |options| &mut options.tls.key,
            },
            Entry {
                spec: OptionSpec::new("ca-cert-paths", ValueKind::WordList("FILE"))
                    .default(Unset("the system's"))
                    .help("CA certificates that servers with https URLs are checked against, in PEM"),
                field: |options| &mut options.tls.cas,
            },
            Entry {
                spec: OptionSpec::new("client-cert-path", Single("FILE"))
                    .help("Client certificate for servers that ask for one, in PEM"),
                field: |options| &mut options.tls.client_cert,
            },
            Entry {
                spec: OptionSpec::new("client-key-path", Single("FILE"))
                    .help("Private key of the client certificate, in PEM"),
                field: |options| &mut options.tls.client_key,
            },
            // Each worker thread is told at its start whether to look for HTTP/2 on new connections.
            Entry {
                spec: OptionSpec::new("http2", Switch).after_restart().help(
                    "Accept HTTP/2 from clients: negotiated in the TLS handshake, or with prior knowledge \
                     without TLS",
                ),
                field: |options| &mut options.tls.http2,
            },
            Entry {
                spec: OptionSpec::new("http2-max-streams", Single("COUNT"))
                    .default(Number(DEFAULT_HTTP2_MAX_STREAMS as u64))
                    .at_least(1)
                    .after_restart()
                    .help("Concurrent requests on one HTTP/2 connection"),
                field: |options| &mut options.tls.http2_max_streams,
            },
        ],
    },
    OptionSection {
        title: "Limits and timeouts",
        entries: &[
            // Until the first byte of a stream only: a long generation is no failure while tokens arrive.
            Entry {
                spec: OptionSpec::new("request-timeout-secs", Single("SECONDS"))
                    .default(Seconds(DEFAULT_REQUEST_TIMEOUT))
                    .at_least(1)
                    .help("Longest time a request may take. For a stream: until its first byte"),
                field: |options| &mut options.request_timeout,
            },
            Entry {
                spec: OptionSpec::new("stream-idle-timeout-secs", Single("SECONDS"))
                    .default(Seconds(DEFAULT_STREAM_IDLE_TIMEOUT))
                    .at_least(1)
                    .help("Longest time decode may send nothing within a stream"),
                field: |options| &mut options.stream_idle_timeout,
            },
            Entry {
                spec: OptionSpec::new("stream-keepalive-secs", Single("SECONDS"))
                    .default(Seconds(Duration::ZERO))
                    .help(
                        "Sends a comment line into a stream of events that has been silent for this long, so that \
                         clients and proxies in front keep waiting. The head of a stream may go out before decode's \
                         for it: a refusal after that is an error event. 0 is off",
                    ),
                field: |options| &mut options.stream_keepalive,
            },
            Entry {
                spec: OptionSpec::new("abort-on-disconnect", Switch).help(
                    "Ask both servers to abort a request whose client has left, or whose other leg has failed, \
                     instead of waiting until they notice. Requests without a rid get one, which shows as \
                     meta_info.id or id in their responses",
                ),
                field: |options| &mut options.abort_on_disconnect,
            },
            Entry {
                spec: OptionSpec::new("internal-fields", Single("strip|reject|pass"))
                    .default(Unset("strip; pass with --worker-urls"))
                    .help(
                        "What is done with fields of a request by which SGLang takes orders from an orchestrator, \
                         such as encoder_urls, to which a server connects: they are removed, or the request is \
                         refused, or they are passed on. bootstrap_* fields are always removed for pairs",
                    ),
                field: |options| &mut options.orchestration_fields,
            },
            Entry {
                spec: OptionSpec::new("dp-rank-fields", Single("pass|strip|reject"))
                    .default(Text("pass"))
                    .help(
                        "The same for routed_dp_rank, data_parallel_rank and disagg_prefill_dp_rank, by which a \
                         client chooses data-parallel ranks",
                    ),
                field: |options| &mut options.internal_fields.dp_rank,
            },
            Entry {
                spec: OptionSpec::new("dp-aware", Switch).help(
                    "Choose among the data-parallel ranks of decode servers too, and of prefill servers that do not \
                     follow the bootstrap room, and tell them the rank with routed_dp_rank and disagg_prefill_dp_rank \
                     (SGLang 0.5.10 or newer). Those of prefill servers that do, which is SGLang's default, are \
                     chosen in any case",
                ),
                field: |options| &mut options.is_dp_aware,
            },
            // 0 is allowed, and is what `disable-retries` means.
            Entry {
                spec: OptionSpec::new("retry-max-retries", Single("COUNT"))
                    .default(Number(DEFAULT_MAX_RETRIES as u64))
                    .help(
                        "Other pairs that a request may try if a server cannot be connected, before anything is \
                         written",
                    ),
                field: |options| &mut options.max_retries,
            },
            // Error statuses only: a 2xx that is sent again would be work thrown away.
            Entry {
                spec: OptionSpec::new("retry-on-status", CommaList("STATUS")).between(400, 599).help(
                    "Also retry when a server responds with one of these statuses, such as 429,503, and nothing has \
                     been sent to the client. Each attempt may cost the server work",
                ),
                field: |options| &mut options.retry_on,
            },
            Entry {
                spec: OptionSpec::new("disable-retries", Switch)
                    .reported_as("retry-max-retries")
                    .help("Never try another pair"),
                field: |options| &mut options.disable_retries,
            },
            Entry {
                spec: OptionSpec::new("request-head-timeout-secs", Single("SECONDS"))
                    .default(Seconds(DEFAULT_REQUEST_HEAD_TIMEOUT))
                    .at_least(1)
                    .help("Longest time a client may take to send a request's head; then 408"),
                field: |options| &mut options.request_head_timeout,
            },
            Entry {
                spec: OptionSpec::new("request-body-idle-timeout-secs", Single("SECONDS"))
                    .default(Seconds(DEFAULT_REQUEST_BODY_IDLE_TIMEOUT))
                    .at_least(1)
                    .help("Longest pause within a request's body; then 408"),
                field: |options| &mut options.request_body_idle_timeout,
            },
            Entry {
                spec: OptionSpec::new("request-body-timeout-secs", Single("SECONDS"))
                    .default(Seconds(DEFAULT_REQUEST_BODY_TIMEOUT))
                    .at_least(1)
                    .help("Longest time a client may take to send a request's body as a whole; then 408"),
                field: |options| &mut options.request_body_timeout,
            },
            Entry {
                spec: OptionSpec::new("client-idle-timeout-secs", Single("SECONDS"))
                    .default(Seconds(DEFAULT_CLIENT_IDLE_TIMEOUT))
                    .at_least(1)
                    .help(
                        "Idle timeout of client connections: one is closed when no request has begun, or the \
                         client has read nothing of its response, for this long",
                    ),
                field: |options| &mut options.client_idle_timeout,
            },
            // Each worker thread opens connections with the options that it was started with.
            Entry {
                spec: OptionSpec::new("connect-timeout-secs", Single("SECONDS"))
                    .default(Seconds(DEFAULT_CONNECT_TIMEOUT))
                    .at_least(1)
                    .after_restart()
                    .help("Longest time to open a connection to a server"),
                field: |options| &mut options.sockets.connect_timeout,
            },
            // 0 is allowed: a router without a load balancer in front need not wait.
            Entry {
                spec: OptionSpec::new("shutdown-lame-duck-secs", Single("SECONDS"))
                    .default(Seconds(DEFAULT_SHUTDOWN_LAME_DUCK))
                    .help(
                        "Drain delay: after SIGTERM or SIGINT, new connections are accepted for this long while /ready \
                         says 503",
                    ),
                field: |options| &mut options.shutdown_lame_duck,
            },
            Entry {
                spec: OptionSpec::new("shutdown-grace-period-secs", Single("SECONDS"))
                    .default(Seconds(DEFAULT_SHUTDOWN_GRACE_PERIOD))
                    .help(
                        "Time for open requests to finish after the drain delay. A second signal ends the program at \
                         once",
                    ),
                field: |options| &mut options.shutdown_grace_period,
            },
            Entry {
                spec: OptionSpec::new("max-n", Single("COUNT"))
                    .default(Number(DEFAULT_MAX_SAMPLES as u64))
                    .between(1, MAX_SAMPLES_LIMIT as u64)
                    .help(
                        "Most samples of each prompt (n) that a request may ask for. Each is a request of its own to \
                         the servers; with more it is rejected with 400",
                    ),
                field: |options| &mut options.max_samples,
            },
            Entry {
                spec: OptionSpec::new("max-payload-size", Single("BYTES"))
                    .default(Number(DEFAULT_MAX_PAYLOAD_SIZE as u64))
                    .at_least(1)
                    .help("Largest request body; a larger one is rejected with 413"),
                field: |options| &mut options.max_payload_size,
            },
            Entry {
                spec: OptionSpec::new("max-merge-size", Single("BYTES"))
                    .default(Number(DEFAULT_MAX_MERGE_SIZE as u64))
                    .at_least(1)
                    .help("Largest response, or event of a stream, that is buffered to merge logprobs; then 502"),
                field: |options| &mut options.max_merge_size,
            },
            Entry {
                spec: OptionSpec::new("max-buffered-bytes", Single("BYTES"))
                    .default(Unset("a quarter of the memory"))
                    .at_least(1)
                    .help(
                        "Request bodies and merges that are held in memory, over all requests. At the bound further bodies wait, \
                         as long as in the queue; then 503. A body that is larger is rejected with 413. The memory is \
                         the control group's or the machine's",
                    ),
                field: |options| &mut options.admission.max_buffered,
            },
        ],
    },
    OptionSection {
        title: "Concurrency and rate limits",
        entries: &[
            // sglang_router has -1 for no limit, and scripts pass it.
            Entry {
                spec: OptionSpec::new("max-concurrent-requests", Single("COUNT"))
                    .default(Text("-1"))
                    .at_least(1)
                    .minus_one_is_no_limit()
                    .help(
                        "Concurrent generation requests, from the end of a request's head to the end of its response; \
                         others wait in a queue. -1: no limit",
                    ),
                field: |options| &mut options.admission.max_concurrent,
            },
            // 0 is allowed: requests over a limit are then rejected at once.
            Entry {
                spec: OptionSpec::new("queue-size", Single("COUNT"))
                    .default(Number(DEFAULT_QUEUE_SIZE as u64))
                    .help("Requests that may wait while a limit is reached; more are rejected with 429"),
                field: |options| &mut options.admission.queue_size,
            },
            Entry {
                spec: OptionSpec::new("queue-timeout-secs", Single("SECONDS"))
                    .default(Seconds(DEFAULT_QUEUE_TIMEOUT))
                    .at_least(1)
                    .help("Longest time a request may wait in the queue; then 503"),
                field: |options| &mut options.admission.queue_timeout,
            },
            // The name is that of sglang_router, where a token is a request, too.
            Entry {
                spec: OptionSpec::new("rate-limit-tokens-per-second", Single("COUNT"))
                    .default(Unset("no limit"))
                    .at_least(1)
                    .help(
                        "Generation requests per second (a token is one request), with bursts of as many; more are \
                         rejected with 429",
                    ),
                field: |options| &mut options.admission.rate,
            },
            Entry {
                spec: OptionSpec::new("max-in-flight-per-prefill", Single("COUNT"))
                    .default(Unset("no limit"))
                    .at_least(1)
                    .help(
                        "Concurrent requests on one prefill server. A full server is not chosen; if all are full, \
                         requests wait in the queue",
                    ),
                field: |options| &mut options.admission.caps.prefill,
            },
            Entry {
                spec: OptionSpec::new("max-in-flight-per-decode", Single("COUNT"))
                    .default(Unset("no limit"))
                    .at_least(1)
                    .help("Concurrent requests on one decode server"),
                field: |options| &mut options.admission.caps.decode,
            },
            Entry {
                spec: OptionSpec::new("max-in-flight-per-worker", Single("COUNT"))
                    .default(Unset("no limit"))
                    .at_least(1)
                    .help("Concurrent requests on one plain server"),
                field: |options| &mut options.admission.caps.regular,
            },
        ],
    },
    OptionSection {
        title: "Authentication and CORS",
        entries: &[
            Entry {
                spec: OptionSpec::new("api-key", List("KEY")).secret().help(
                    "Key that clients must send (Authorization: Bearer KEY) for all but /health and /ready. May be \
                     repeated: each key is valid",
                ),
                field: |options| &mut options.keys.client,
            },
            // Keys in files are not in the list of processes. They are compared and reported with the keys
            // that were typed.
            Entry {
                spec: OptionSpec::new("api-key-file", Single("FILE"))
                    .reported_as("api-key")
                    .help("File with such keys, one per line"),
                field: |options| &mut options.keys.client_file,
            },
            Entry {
                spec: OptionSpec::new("admin-api-key", Single("KEY"))
                    .secret()
                    .help("Key that operators must send; without one, only operators on loopback are allowed"),
                field: |options| &mut options.keys.admin,
            },
            // A path is no secret, so `--check-config` may print it.
            Entry {
                spec: OptionSpec::new("admin-api-key-file", Single("FILE"))
                    .reported_as("admin-api-key")
                    .help("File with the operators' key"),
                field: |options| &mut options.keys.admin_file,
            },
            Entry {
                spec: OptionSpec::new("worker-api-key", Single("KEY"))
                    .secret()
                    .help("Key that the router sends to servers with its own requests, such as health checks"),
                field: |options| &mut options.keys.worker,
            },
            Entry {
                spec: OptionSpec::new("worker-api-key-file", Single("FILE"))
                    .reported_as("worker-api-key")
                    .help("File with the servers' key"),
                field: |options| &mut options.keys.worker_file,
            },
            Entry {
                spec: OptionSpec::new("worker-api-key-replaces-authorization", Switch).help(
                    "Send the servers' key with clients' requests too, instead of the Authorization that the client \
                     sent",
                ),
                field: |options| &mut options.keys.worker_replaces,
            },
            Entry {
                spec: OptionSpec::new("cors-allowed-origins", CommaList("ORIGIN")).help(
                    "Origins whose pages may read responses (CORS), such as https://chat.example.com; * allows every \
                     origin",
                ),
                field: |options| &mut options.keys.origins,
            },
        ],
    },
    OptionSection {
        title: "Health checks",
        entries: &[
            Entry {
                spec: OptionSpec::new("health-check-interval-secs", Single("SECONDS"))
                    .default(Seconds(DEFAULT_HEALTH_CHECK_INTERVAL))
                    .at_least(1)
                    .help(
                        "Time between health checks of a healthy server with GET /ready; ten times that with GET \
                         /health, which costs a token, where /ready is 404. One that has failed is checked every \
                         second, or more often",
                    ),
                field: |options| &mut options.health.interval,
            },
            // SGLang's /health generates a token and takes a second, so the least value is too short for
            // servers without /ready.
            Entry {
                spec: OptionSpec::new("health-check-timeout-secs", Single("SECONDS"))
                    .default(Seconds(DEFAULT_HEALTH_CHECK_TIMEOUT))
                    .at_least(1)
                    .help("Longest time a server may take to respond to a health check"),
                field: |options| &mut options.health.timeout,
            },
            Entry {
                spec: OptionSpec::new("health-failure-threshold", Single("COUNT"))
                    .default(Number(DEFAULT_HEALTH_FAILURE_THRESHOLD as u64))
                    .at_least(1)
                    .help("Consecutive failures, of health checks and requests, that take a server out of rotation"),
                field: |options| &mut options.health.failure_threshold,
            },
            Entry {
                spec: OptionSpec::new("health-success-threshold", Single("COUNT"))
                    .default(Number(DEFAULT_HEALTH_SUCCESS_THRESHOLD as u64))
                    .at_least(1)
                    .help("Consecutive successes that put it back into rotation"),
                field: |options| &mut options.health.success_threshold,
            },
            Entry {
                spec: OptionSpec::new("load-poll-secs", Single("SECONDS"))
                    .default(Seconds(Duration::ZERO))
                    .help(
                        "Asks each prefill or plain server this often with GET /v1/loads how much waits on it, so that \
                         policies count the work that others give to it. For several routers, or clients that \
                         use none; with one router it costs time to first token. 0 is off",
                    ),
                field: |options| &mut options.health.load_poll_interval,
            },
            Entry {
                spec: OptionSpec::new("disable-health-check", Switch)
                    .help("Run no health checks, and treat every server as healthy"),
                field: |options| &mut options.disable_health_check,
            },
        ],
    },
    OptionSection {
        title: "Discovery and startup",
        entries: &[
            // The task that follows names is started once, with this interval.
            Entry {
                spec: OptionSpec::new("dns-interval-secs", Single("SECONDS"))
                    .default(Seconds(DEFAULT_DNS_INTERVAL))
                    .at_least(1)
                    .after_restart()
                    .help("Time between lookups of DNS names"),
                field: |options| &mut options.discovery.interval,
            },
            Entry {
                spec: OptionSpec::new("worker-startup-timeout-secs", Single("SECONDS"))
                    .default(Seconds(DEFAULT_WORKER_STARTUP_TIMEOUT))
                    .at_least(1)
                    .help(
                        "Time for a server to start. After it, a server that is still down is logged and checked at \
                         the interval of health checks",
                    ),
                field: |options| &mut options.health.startup_timeout,
            },
            // The name is that of sglang_router, which has no unit here.
            Entry {
                spec: OptionSpec::new("worker-startup-check-interval", Single("SECONDS"))
                    .default(Seconds(DEFAULT_WORKER_STARTUP_CHECK_INTERVAL))
                    .at_least(1)
                    .help("Time between health checks of a server that has not started yet"),
                field: |options| &mut options.health.startup_interval,
            },
        ],
    },
    OptionSection {
        title: "Sockets and threads",
        entries: &[
            // The pools of these threads are made at their start, with the options below.
            Entry {
                spec: OptionSpec::new("worker-threads", Single("COUNT"))
                    .default(Unset("one per core"))
                    .at_least(1)
                    .after_restart()
                    .help("Threads that serve requests, each with its own connections"),
                field: |options| &mut options.worker_threads,
            },
            Entry {
                spec: OptionSpec::new("backend-idle-timeout-secs", Single("SECONDS"))
                    .default(Seconds(DEFAULT_BACKEND_IDLE_TIMEOUT))
                    .at_least(1)
                    .after_restart()
                    .help(
                        "Idle timeout of connections to servers. Keep it below the server's own keep-alive \
                         timeout (5 s in SGLang)",
                    ),
                field: |options| &mut options.sockets.idle_timeout,
            },
            // 0 is allowed: a connection for each request.
            Entry {
                spec: OptionSpec::new("max-idle-per-backend", Single("COUNT"))
                    .default(Number(DEFAULT_MAX_IDLE_PER_BACKEND as u64))
                    .after_restart()
                    .help("Idle connections that each thread keeps to one server"),
                field: |options| &mut options.sockets.max_idle,
            },
            // No default: a fixed size turns off the kernel's own tuning (tcp(7)).
            Entry {
                spec: OptionSpec::new("socket-buffer-size", Single("BYTES"))
                    .default(Unset("tuned by the kernel"))
                    .at_least(1)
                    .after_restart()
                    .help("Send and receive buffer of every socket"),
                field: |options| &mut options.sockets.buffer_size,
            },
            // Connections that are open keep the engine that they began with.
            Entry {
                spec: OptionSpec::new("http1-engine", Single("native|hyper"))
                    .default(Text("native"))
                    .after_restart()
                    .help(
                        "HTTP/1.1 implementation towards clients and servers: mini-lb's own, which is faster, or \
                         hyper's",
                    ),
                field: |options| &mut options.sockets.engine,
            },
        ],
    },
    OptionSection {
        title: "Admin listener",
        entries: &[
            // Loopback, because operators without a key are recognised by their loopback address.
            Entry {
                spec: OptionSpec::new("prometheus-host", Single("HOST"))
                    .default(Text("127.0.0.1"))
                    .after_restart()
                    .help("Address of the admin listener: metrics, status page and the operators' endpoints"),
                field: |options| &mut options.admin.host,
            },
            // The program sets 29000 itself, which a library must not: another listener is the choice of its
            // user.
            Entry {
                spec: OptionSpec::new("prometheus-port", Single("PORT"))
                    .default(Unset("29000, or none if that is in use"))
                    .after_restart()
                    .help("Port of the admin listener; 0 turns it off"),
                field: |options| &mut options.admin.port,
            },
        ],
    },
    OptionSection {
        title: "Logging",
        entries: &[
            // The request logger is made once, at the start, with its headers and its exporter of spans.
            Entry {
                spec: OptionSpec::new("access-log", Switch)
                    .after_restart()
                    .help("Log a line at level info for every request, not only for those that failed"),
                field: |options| &mut options.report.access_log,
            },
            Entry {
                spec: OptionSpec::new("request-id-headers", ValueKind::WordList("HEADER"))
                    .default(Words(&DEFAULT_HEADERS))
                    .after_restart()
                    .help("Headers from which a request's id is taken; the first valid one counts"),
                field: |options| &mut options.report.request_id_headers,
            },
        ],
    },
    OptionSection {
        title: "Traces",
        entries: &[
            // Without the feature the flags exist, so that the error can name it.
            Entry {
                spec: OptionSpec::new("enable-trace", Switch)
                    .after_restart()
                    .reported_as("otlp-traces-endpoint")
                    .help("Send spans of requests to an OpenTelemetry collector. Needs a build with the feature otel"),
                #[cfg(feature = "otel")]
                field: |options| &mut options.enable_trace,
                #[cfg(not(feature = "otel"))]
                field: |options| &mut options.without_otel,
            },
            Entry {
                spec: OptionSpec::new("otlp-traces-endpoint", Single("URL"))
                    .default(Unset("http://localhost:4318"))
                    .after_restart()
                    .help("URL of the collector, which takes OTLP over HTTP as JSON. Traces are on with it"),
                #[cfg(feature = "otel")]
                field: |options| &mut options.report.traces,
                #[cfg(not(feature = "otel"))]
                field: |options| &mut options.without_otel,
            },
        ],
    },
];
