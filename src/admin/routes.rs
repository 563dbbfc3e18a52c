//! The routes of the client listener: which path does what, with which methods, for whom. The same table is
//! in `docs/API.md`.
//!
//! Every path of SGLang's HTTP server has a row, also those that cannot work on pairs, most of which plain
//! servers get. A path without a row
//! is answered 404 and reaches no server: a generation request that one server gets without a bootstrap room
//! would wait there, or stop the server (an `assert` in the controller of DP ranks).

use std::time::Duration;

use hyper::Method;
use percent_encoding::percent_decode_str;

use Access::*;
use RouteAction::*;
use RouterEndpoint::*;

/// Longest time for a server to answer what it knows. `/health_generate` of SGLang takes a second, everything
/// else milliseconds.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time for one server to compute an answer, such as the tokens of a long text.
const WORK_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time for all servers to make a change, as of a generation request by default: a server that loads
/// weights from a disk, or waits for its requests to end before it pauses, takes minutes.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(1_800);

/// One row: a path with what is done there.
#[derive(Debug)]
pub(crate) struct RouteEntry {
    /// The path. `{id}` stands for one segment, `{*id}` for one or more.
    pub(crate) path: &'static str,
    /// The methods, as in an `Allow` header.
    pub(crate) allow: &'static str,
    pub(crate) access: Access,
    pub(crate) action: RouteAction,
}

/// Who may send a request to a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Load balancers and probes, which have no key.
    Everyone,
    Clients,
    Operators,
    /// Clients for requests of their own, operators for those of others.
    ClientsAndOperators,
}

/// What the router does at a route that is its own, or for which it asks servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RouterEndpoint {
    /// That the router runs, for people.
    Root,
    Version,
    /// Liveness: the router runs.
    Health,
    /// Readiness: the router has healthy servers of each role and is not shutting down.
    Ready,
    /// Whether every server can generate.
    HealthGenerate,
    /// Flushes every server's cache.
    FlushCache,
    /// Aborts a request, or all of them, at every server.
    AbortRequest,
    /// Opens or closes a session with a given id at every server.
    Session,
    /// Passes the request on to every server, and answers what each has answered.
    AllServers {
        /// Longest time for a server, unless the request has a `timeout`.
        within: Duration,
        /// What the servers have cached is of no use afterwards.
        empties_cache: bool,
    },
    /// The descriptions of all servers.
    ServerInfo,
    /// The loads of all servers.
    Loads,
    /// The same as one number for each server, as `sglang_router` tells it.
    WorkerLoads,
    /// The model's description by one server: all serve the same model.
    ModelInfo,
    /// Passes the request on to one server, whose response is the client's.
    OneServer {
        /// Longest time for a server.
        within: Duration,
    },
}

/// What becomes of a request's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyUse {
    /// It is read and discarded.
    Discarded,
    /// The router looks into it: it is small.
    Parsed,
    /// It is passed on as it is.
    Forwarded,
}

/// What is done with a request to a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RouteAction {
    /// A pair of servers or a plain one generates.
    OnPair,
    /// The router answers, from what it knows or what servers say.
    ByRouter(RouterEndpoint),
    /// The workers API.
    ByWorkersApi,
    /// Refused: it cannot be done by pairs, for this reason.
    NotPossible(&'static str),
    /// Refused by pairs for this reason. A plain server gets it as it is, through the proxy.
    OnPlainServer(&'static str),
    /// Not served; the text says what is.
    NotServed(&'static str),
}

const NO_PAIR: &str = "SGLang has no prefill-decode disaggregation for it; send it to a regular server";
const OLLAMA: &str = "SGLang takes no bootstrap fields there; use /v1/chat/completions or /generate";
const ONE_EACH: &str = "each server needs ranks and addresses of its own there; send it to each server";
const ONE_SERVER_ONLY: &str = "it changes one server only; send it to that server";
const OWN_METRICS: &str = "the admin listener has the router's metrics; scrape each server for its own";

const ASK_ALL: RouteAction = ByRouter(AllServers { within: CHANGE_TIMEOUT, empties_cache: false });
const CHANGE_WEIGHTS: RouteAction = ByRouter(AllServers { within: CHANGE_TIMEOUT, empties_cache: true });
const ASK_ONE: RouteAction = ByRouter(OneServer { within: ANSWER_TIMEOUT });
const COMPUTE_ON_ONE: RouteAction = ByRouter(OneServer { within: WORK_TIMEOUT });

const fn row(path: &'static str, allow: &'static str, access: Access, action: RouteAction) -> RouteEntry {
    RouteEntry { path, allow, access, action }
}

/// All routes. `HEAD` is there wherever a `GET` changes nothing.
#[rustfmt::skip]
pub(crate) const ROUTES: &[RouteEntry] = &[
    row("/v1/chat/completions", "POST", Clients, OnPair),
    row("/v1/completions", "POST", Clients, OnPair),
    row("/generate", "POST, PUT", Clients, OnPair),
    row("/v1/responses", "POST", Clients, OnPair),
    row("/v1/messages", "POST", Clients, OnPair),
    row("/invocations", "POST", Clients, OnPair),

    row("/health", "GET, HEAD", Everyone, ByRouter(Health)),
    row("/healthz", "GET, HEAD", Everyone, ByRouter(Health)),
    row("/liveness", "GET, HEAD", Everyone, ByRouter(Health)),
    row("/ping", "GET, HEAD", Everyone, ByRouter(Health)),
    row("/ready", "GET, HEAD", Everyone, ByRouter(Ready)),
    row("/readyz", "GET, HEAD", Everyone, ByRouter(Ready)),
    row("/readiness", "GET, HEAD", Everyone, ByRouter(Ready)),
    row("/", "GET, HEAD", Everyone, ByRouter(Root)),
    row("/version", "GET, HEAD", Clients, ByRouter(Version)),

    row("/server_info", "GET, HEAD", Clients, ByRouter(ServerInfo)),
    row("/get_server_info", "GET, HEAD", Clients, ByRouter(ServerInfo)),
    row("/v1/loads", "GET, HEAD", Clients, ByRouter(Loads)),
    row("/get_loads", "GET, HEAD", Clients, ByRouter(WorkerLoads)),

    row("/v1/models", "GET, HEAD", Clients, ByRouter(ModelInfo)),
    row("/v1/models/{*id}", "GET, HEAD", Clients, ByRouter(ModelInfo)),
    row("/model_info", "GET, HEAD", Clients, ByRouter(ModelInfo)),
    row("/get_model_info", "GET, HEAD", Clients, ByRouter(ModelInfo)),
    row("/v1/tokenize", "POST", Clients, COMPUTE_ON_ONE),
    row("/tokenize", "POST", Clients, COMPUTE_ON_ONE),
    row("/v1/detokenize", "POST", Clients, COMPUTE_ON_ONE),
    row("/detokenize", "POST", Clients, COMPUTE_ON_ONE),
    row("/v1/messages/count_tokens", "POST", Clients, COMPUTE_ON_ONE),
    row("/parse_function_call", "POST", Clients, COMPUTE_ON_ONE),
    row("/separate_reasoning", "POST", Clients, COMPUTE_ON_ONE),
    row("/v1/responses/{id}", "GET, HEAD", Clients, ASK_ONE),
    row("/v1/responses/{id}/cancel", "POST", Clients, ASK_ONE),
    row("/api/tags", "GET, HEAD", Clients, ASK_ONE),
    row("/api/show", "POST", Clients, ASK_ONE),
    row("/list_external_corpora", "GET, HEAD", Clients, ASK_ONE),
    row("/get_hicache_l3_cache_layout", "GET, HEAD", Clients, ASK_ONE),
    row("/openapi.json", "GET, HEAD", Clients, ASK_ONE),
    row("/docs", "GET, HEAD", Clients, ASK_ONE),
    row("/docs/oauth2-redirect", "GET, HEAD", Clients, ASK_ONE),
    row("/redoc", "GET, HEAD", Clients, ASK_ONE),
    row("/get_weights_by_name", "GET, HEAD, POST", Operators, COMPUTE_ON_ONE),
    row("/get_remote_instance_transfer_engine_info", "GET, HEAD", Operators, ASK_ONE),
    row("/remote_instance_transfer_engine_info", "GET, HEAD", Operators, ASK_ONE),

    row("/health_generate", "GET, HEAD", Clients, ByRouter(HealthGenerate)),
    row("/flush_cache", "GET, POST", Clients, ByRouter(FlushCache)),
    row("/abort_request", "POST", ClientsAndOperators, ByRouter(AbortRequest)),
    row("/pause_generation", "POST", Operators, ASK_ALL),
    row("/continue_generation", "POST", Operators, ASK_ALL),
    row("/update_weights_from_disk", "POST", Operators, CHANGE_WEIGHTS),
    row("/update_weights_from_tensor", "POST", Operators, CHANGE_WEIGHTS),
    row("/update_weights_from_distributed", "POST", Operators, CHANGE_WEIGHTS),
    row("/update_weights_from_ipc", "POST", Operators, CHANGE_WEIGHTS),
    row("/update_weight_version", "POST", Operators, ASK_ALL),
    row("/begin_weight_update", "POST", Operators, ASK_ALL),
    row("/end_weight_update", "POST", Operators, CHANGE_WEIGHTS),
    row("/destroy_weights_update_group", "POST", Operators, ASK_ALL),
    row("/weights_checker", "GET, POST", Operators, ASK_ALL),
    row("/load_lora_adapter", "POST", Operators, ASK_ALL),
    row("/load_lora_adapter_from_tensors", "POST", Operators, ASK_ALL),
    row("/unload_lora_adapter", "POST", Operators, ASK_ALL),
    row("/release_memory_occupation", "GET, POST", Operators, CHANGE_WEIGHTS),
    row("/resume_memory_occupation", "GET, POST", Operators, ASK_ALL),
    row("/start_profile", "GET, POST", Operators, ASK_ALL),
    row("/stop_profile", "GET, POST", Operators, ASK_ALL),
    row("/start_expert_distribution_record", "GET, POST", Operators, ASK_ALL),
    row("/stop_expert_distribution_record", "GET, POST", Operators, ASK_ALL),
    row("/dump_expert_distribution_record", "GET, POST", Operators, ASK_ALL),
    row("/configure_logging", "GET, POST", Operators, ASK_ALL),
    row("/set_trace_level", "GET, POST", Operators, ASK_ALL),
    row("/set_internal_state", "POST, PUT", Operators, ASK_ALL),
    row("/slow_down", "GET, POST", Operators, ASK_ALL),
    row("/freeze_gc", "GET, POST", Operators, ASK_ALL),
    row("/hicache/storage-backend", "GET, PUT, DELETE", Operators, ASK_ALL),
    row("/hicache/storage-backend/clear", "POST", Operators, ASK_ALL),
    row("/add_external_corpus", "POST", Operators, ASK_ALL),
    row("/remove_external_corpus", "POST", Operators, ASK_ALL),
    row("/open_session", "GET, POST", Operators, ByRouter(Session)),
    row("/close_session", "GET, POST", Operators, ByRouter(Session)),

    row("/workers", "GET, POST", Operators, ByWorkersApi),
    row("/workers/{*id}", "GET, DELETE", Operators, ByWorkersApi),
    row("/add_worker", "POST", Operators, ByWorkersApi),
    row("/remove_worker", "POST", Operators, ByWorkersApi),
    row("/list_workers", "GET", Operators, ByWorkersApi),
    row("/pd_role_switch", "POST", Operators, ByWorkersApi),

    row("/v1/embeddings", "POST", Clients, OnPlainServer(NO_PAIR)),
    row("/encode", "POST, PUT", Clients, OnPlainServer(NO_PAIR)),
    row("/v1/classify", "POST", Clients, OnPlainServer(NO_PAIR)),
    row("/classify", "POST, PUT", Clients, OnPlainServer(NO_PAIR)),
    row("/v1/rerank", "POST, PUT", Clients, OnPlainServer(NO_PAIR)),
    row("/v1/score", "POST", Clients, OnPlainServer(NO_PAIR)),
    row("/v1/decisions", "POST", Clients, OnPlainServer(NO_PAIR)),
    row("/v1/systemone", "POST", Clients, OnPlainServer(NO_PAIR)),
    row("/v1/audio/transcriptions", "POST", Clients, OnPlainServer(NO_PAIR)),
    // A WebSocket begins with a GET (RFC 6455, section 4.1).
    row("/v1/realtime", "GET", Clients, NotPossible(NO_PAIR)),
    row("/api/chat", "POST", Clients, OnPlainServer(OLLAMA)),
    row("/api/generate", "POST", Clients, OnPlainServer(OLLAMA)),
    row("/vertex_generate", "POST", Clients, OnPlainServer(OLLAMA)),
    row("/init_weights_update_group", "POST", Clients, NotPossible(ONE_EACH)),
    row("/init_weights_send_group_for_remote_instance", "POST", Clients, NotPossible(ONE_EACH)),
    row("/send_weights_to_remote_instance", "POST", Clients, NotPossible(ONE_EACH)),
    row("/scale_elastic_ep", "POST", Clients, NotPossible(ONE_SERVER_ONLY)),
    row("/is_scaling_elastic_ep", "GET, HEAD", Clients, NotPossible(ONE_SERVER_ONLY)),
    row("/dumper/{*method}", "POST", Clients, NotPossible(ONE_SERVER_ONLY)),
    row("/metrics", "GET, HEAD", Clients, NotServed(OWN_METRICS)),
    row("/metrics/{*path}", "GET, HEAD", Clients, NotServed(OWN_METRICS)),
];

impl RouteEntry {
    /// The row of a path.
    pub(crate) fn find(path: &str) -> Option<&'static Self> {
        // A hundred comparisons, most of which end at the length: the paths of generation are found before.
        ROUTES.iter().find(|entry| entry.matches(path))
    }

    fn matches(&self, path: &str) -> bool {
        let Some((before, rest)) = self.path.split_once('{') else { return self.path == path };
        let Some((name, after)) = rest.split_once('}') else { return false };
        let id = path.strip_prefix(before).and_then(|path| path.strip_suffix(after));
        id.is_some_and(|id| !id.is_empty() && (name.starts_with('*') || !id.contains('/')) && is_literal(id))
    }
}

/// Whether a part of a path stands for itself. `.` and `..` are not resolved here, and must reach no server
/// behind another proxy that would, with a path that has no row.
fn is_literal(part: &str) -> bool {
    let decoded = percent_decode_str(part).collect::<Vec<u8>>();
    decoded.split(|byte| *byte == b'/' || *byte == b'\\').all(|segment| segment != b"." && segment != b"..")
}

impl RouterEndpoint {
    pub(crate) fn body_use(self) -> BodyUse {
        match self {
            AbortRequest | Session => BodyUse::Parsed,
            AllServers { .. } | OneServer { .. } => BodyUse::Forwarded,
            Root | Version | Health | Ready | HealthGenerate | FlushCache | ServerInfo | Loads
            | WorkerLoads | ModelInfo => BodyUse::Discarded,
        }
    }
}

/// Whether the value of an `Allow` header has a method.
pub(crate) fn allows(allow: &str, method: &Method) -> bool {
    let method = method.as_str().as_bytes();
    allow.as_bytes().split(|byte| *byte == b',').any(|allowed| allowed.trim_ascii_start() == method)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::fmt::Write;
    use std::path::Path;

    use super::*;

    const BEGIN: &str =
        "<!-- This table is written by `UPDATE_DOCS=1 cargo test --lib admin::routes`. -->\n\n";
    const END: &str = "\n<!-- End of the table. -->\n";

    /// What a row of the documented table says.
    fn says(action: RouteAction) -> String {
        match action {
            OnPair => "a pair or a plain server generates".to_owned(),
            ByRouter(endpoint) => match endpoint {
                Root => "the router says that it runs",
                Version => "the router: its version",
                Health => "the router: 200 while it runs; it asks no server",
                Ready => {
                    "the router: 200 if a server of each role is known to be healthy and the router is not shutting \
                     down; otherwise 503 `not_ready`"
                }
                HealthGenerate => "all servers: 200 if each answers with 2xx, otherwise 503 `unhealthy`",
                FlushCache => "all servers flush their caches",
                AbortRequest => "all servers: aborts the request with this `rid`, at its two servers alone if they are known, or all requests (operators only)",
                Session => "all servers, with the `session_id` of the request",
                AllServers { .. } => "all servers",
                ServerInfo => "all servers: their descriptions",
                Loads => "all servers: their loads",
                WorkerLoads => "as `/v1/loads`, but one number of tokens for each server",
                ModelInfo => "one server",
                OneServer { within } if within == WORK_TIMEOUT => "one server, within 30 s",
                OneServer { .. } => "one server",
            }
            .to_owned(),
            ByWorkersApi => "as on the admin listener".to_owned(),
            NotPossible(reason) => format!("501 `not_possible_with_pd`: {reason}. With `--worker-urls`: 404"),
            OnPlainServer(reason) => {
                format!("501 `not_possible_with_pd`: {reason}. With `--worker-urls`: a plain server")
            }
            NotServed(instead) => format!("404 `not_found`: {instead}"),
        }
    }

    /// The table of `docs/API.md`: paths of which the same is true share a row.
    fn table() -> String {
        let mut rows: Vec<(String, [String; 3])> = Vec::new();
        for entry in ROUTES {
            let access = match entry.access {
                Everyone => "everyone",
                Clients => "clients",
                Operators => "operators",
                ClientsAndOperators => "clients, operators",
            };
            let path = format!("`{}`", entry.path.replace("{*", "{"));
            let rest = [entry.allow.to_owned(), access.to_owned(), says(entry.action)];
            match rows.last_mut().filter(|(_, last)| *last == rest) {
                Some((paths, _)) => *paths += &format!(", {path}"),
                None => rows.push((path, rest)),
            }
        }
        let mut text = "| path | methods | who may call it | what is done |\n|---|---|---|---|\n".to_owned();
        for (paths, [allow, access, what]) in rows {
            writeln!(text, "| {paths} | {allow} | {access} | {what} |").unwrap();
        }
        text
    }

    #[test]
    fn the_documented_table_is_this_one() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/API.md");
        let document = std::fs::read_to_string(&path).unwrap();
        let (before, rest) = document.split_once(BEGIN).expect("the begin of the table");
        let (documented, after) = rest.split_once(END).expect("the end of the table");
        let expected = table();
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, [before, BEGIN, &expected, END, after].concat()).unwrap();
            return;
        }
        assert_eq!(documented, expected, "run with UPDATE_DOCS=1");
    }

    #[test]
    fn every_path_has_one_row() {
        let paths: HashSet<&str> = ROUTES.iter().map(|entry| entry.path).collect();
        assert_eq!(paths.len(), ROUTES.len());
        for entry in ROUTES {
            let path = entry.path.replace("{*", "{");
            let matching = ROUTES.iter().filter(|entry| entry.matches(&path)).count();
            assert_eq!(matching, 1, "{path}");
        }
    }

    #[test]
    fn parts_of_paths_stand_for_themselves() {
        let found = |path: &str| RouteEntry::find(path).map(|entry| entry.path);
        for (path, row) in [
            ("/v1/models/a", Some("/v1/models/{*id}")),
            ("/v1/models/org/a.b", Some("/v1/models/{*id}")),
            ("/v1/models/org%2Fa", Some("/v1/models/{*id}")),
            ("/v1/models/..", None),
            ("/v1/models/a/../../generate", None),
            ("/v1/models/%2e%2E/generate", None),
            ("/v1/models/a%2f..%2fgenerate", None),
            ("/v1/models/a%5c..%5cgenerate", None),
            ("/v1/models/./a", None),
            ("/v1/responses/r", Some("/v1/responses/{id}")),
            ("/v1/responses/r/cancel", Some("/v1/responses/{id}/cancel")),
            ("/v1/responses/r/s", None),
            ("/v1/responses/r/s/cancel", None),
            ("/v1/responses/../cancel", None),
            ("/dumper/a", Some("/dumper/{*method}")),
            ("/nowhere", None),
        ] {
            assert_eq!(found(path), row, "{path}");
        }
    }
}
