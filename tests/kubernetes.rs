//! Servers that are pods (`--service-discovery`): the built program with a kubeconfig, an API server that the
//! test plays, and simulated SGLang servers at the addresses of the pods.
//!
//! Multi-threaded tests: reading the program's log blocks a thread, and the servers need another.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions only, not in what they call")]
#![allow(unreachable_pub, reason = "a test file is a crate of its own")]

#[path = "kubernetes/api_server.rs"]
mod api_server;
mod kit;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use api_server::{ApiServer, Fault, Pod};
use kit::program::{self, Program, free_port};
use kit::{Client, TestCa, with_timeout};
use loadtest::sim::{Role, Sim, SimConfig};
use serde_json::json;

const PAIRS: [&str; 6] = [
    "--prefill-selector",
    "app.kubernetes.io/name=sglang",
    "sglang/role=prefill",
    "--decode-selector",
    "app.kubernetes.io/name=sglang",
    "sglang/role=decode",
];

const FORBIDDEN: &str = include_str!("fixtures/kubernetes/forbidden.json");
const BOOKMARK: &str = include_str!("fixtures/kubernetes/bookmark.json");
/// The version in the bookmark.
const BOOKMARK_VERSION: &str = "190012";

/// The built program, and the port of all pods.
struct Discovering {
    program: Program,
    port: u16,
    metrics_port: u16,
    pod_port: u16,
}

impl Discovering {
    /// Starts the program with `args` besides.
    fn start(api: &ApiServer, args: &[&str]) -> Self {
        Self::start_with(&api.kubeconfig(), args)
    }

    fn start_with(kubeconfig: &Path, args: &[&str]) -> Self {
        let [port, metrics_port, pod_port] = [free_port(), free_port(), free_port()];
        let [port_text, metrics_text, pod_port_text] =
            [port, metrics_port, pod_port].map(|port| port.to_string());
        let own = [
            "--host",
            "127.0.0.1",
            "--port",
            &port_text,
            "--prometheus-port",
            &metrics_text,
            "--shutdown-lame-duck-secs",
            "0",
            "--service-discovery",
            "--service-discovery-port",
            &pod_port_text,
            "--service-discovery-namespace",
            "llm",
        ];
        let variables = [("KUBECONFIG", kubeconfig.to_str().unwrap())];
        let command = program::command(own.iter().chain(args).copied(), &variables);
        Self { program: Program::run(command), port, metrics_port, pod_port }
    }

    /// Starts the program for pairs, and waits until it watches.
    async fn watching(api: &ApiServer) -> Self {
        let router = Self::start(api, &PAIRS);
        api.wait_for_watch().await;
        router
    }

    async fn client(&self) -> Client {
        program::client(self.port).await
    }

    /// The servers in rotation that are from Kubernetes, as role and URL.
    async fn servers(&self) -> Vec<(String, String)> {
        let shown = self.client().await.get("/workers").await.json();
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let entries = shown["workers"].as_array().unwrap().iter();
        let mut servers: Vec<_> = entries
            .filter(|entry| entry["source"] == "kubernetes")
            .map(|entry| (text(&entry["worker_type"]), text(&entry["url"])))
            .collect();
        servers.sort();
        servers
    }

    fn expected(&self, pods: &[Pod]) -> Vec<(String, String)> {
        let mut servers: Vec<_> =
            pods.iter().map(|pod| (pod.role.to_owned(), pod.url(self.pod_port))).collect();
        servers.sort();
        servers
    }

    /// Waits until exactly these pods are servers.
    async fn has(&self, pods: &[Pod]) {
        let expected = self.expected(pods);
        let reached = async {
            while self.servers().await != expected {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        with_timeout(&format!("{expected:?}"), reached).await;
    }

    /// Waits until no request is in flight on a pod that is no server any more.
    async fn has_drained(&self, pod: Pod) {
        let url = pod.url(self.pod_port);
        let reached = async {
            while self.client().await.get("/workers").await.text().contains(&format!("\"{url}\"")) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        with_timeout("a drained server", reached).await;
    }

    async fn is_ready(&self) {
        let reached = async {
            while self.client().await.get("/ready").await.status() != 200 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        with_timeout("a ready router", reached).await;
    }

    /// The value of a metric, with its labels in its name.
    async fn metric(&self, name: &str) -> String {
        let text = program::client(self.metrics_port).await.get("/metrics").await.text().to_owned();
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).to_owned()
    }

    /// The lines of the log so far that have `part`.
    fn lines(&self, part: &str) -> Vec<String> {
        self.program.lines.try_iter().filter(|line| line.contains(part)).collect()
    }
}

/// A simulated SGLang server at the address of a pod.
async fn simulated(pod: Pod, port: u16) -> Sim {
    let role = match pod.role {
        "prefill" => Role::Prefill,
        "decode" => Role::Decode,
        _ => Role::Regular,
    };
    let config = SimConfig {
        role,
        addr: Some(SocketAddr::from((pod.address, port))),
        inter_token: Duration::from_millis(2),
        ..SimConfig::default()
    };
    Sim::start(config).await.expect("a free port")
}

fn generations(server: &Sim) -> usize {
    server.recorded_requests().iter().filter(|seen| format!("{seen:?}").contains("/generate")).count()
}

/// Clients that send one stream after the other until they are stopped.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<tokio::task::JoinHandle<usize>>,
}

impl Load {
    fn start(port: u16) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let client = || {
            let stop = Arc::clone(&stop);
            async move {
                let body = r#"{"text":"hello there","sampling_params":{"max_new_tokens":30},"stream":true}"#;
                let mut client = Client::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await;
                let mut count = 0;
                while !stop.load(Ordering::Relaxed) {
                    let response = client.post("/generate", body).await;
                    let text = response.text();
                    assert_eq!(response.status(), 200, "{text}");
                    assert!(response.complete && text.ends_with("data: [DONE]\n\n"), "{text}");
                    assert!(!text.contains("\"error\""), "{text}");
                    count += 1;
                }
                count
            }
        };
        let clients = (0..4).map(|_| tokio::spawn(client())).collect();
        Self { stop, clients }
    }

    /// How many requests there were, none of which was lost.
    async fn finish(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        let mut total = 0;
        for client in self.clients {
            total += client.await.expect("no request was lost");
        }
        total
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_is_lost_while_pods_come_and_go() {
    let api = ApiServer::start().await;
    let router = Discovering::start(&api, &PAIRS);
    let pods = [
        Pod::ready("p-1", "prefill", 2),
        Pod::ready("p-2", "prefill", 3),
        Pod::ready("d-1", "decode", 4),
        Pod::ready("d-2", "decode", 5),
    ];
    let [p1, p2, d1, d2] = pods;
    let (_p1_server, p2_server) =
        (simulated(p1, router.pod_port).await, simulated(p2, router.pod_port).await);
    let (d1_server, d2_server) = (simulated(d1, router.pod_port).await, simulated(d2, router.pod_port).await);
    // Before they are ready they get nothing.
    api.put_all(pods.map(|pod| Pod { is_ready: false, ..pod }));
    api.wait_for_watch().await;
    assert!(router.servers().await.is_empty());
    api.put_all([p1, d1]);
    router.is_ready().await;
    let load = Load::start(router.port);
    api.put_all([p2, d2]);
    router.has(&pods).await;
    let started = async {
        while generations(&p2_server) == 0 || generations(&d2_server) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    with_timeout("requests on the new pods", started).await;

    // Not ready for a while.
    api.put(Pod { is_ready: false, ..d1 });
    router.has(&[p1, p2, d2]).await;
    router.has_drained(d1).await;
    let before = generations(&d1_server);
    api.put(d1);
    router.has(&pods).await;
    let again = async {
        while generations(&d1_server) == before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    with_timeout("requests on the pod that is ready again", again).await;

    // Its labels are taken away and given back.
    api.put(Pod { role: "none", ..d1 });
    router.has(&[p1, p2, d2]).await;
    router.has_drained(d1).await;
    api.put(d1);
    router.has(&pods).await;

    // A rollout: they terminate, and end once they have no requests.
    for (pod, server) in [(p2, p2_server), (d2, d2_server)] {
        api.put(Pod { is_terminating: true, ..pod });
        router.has_drained(pod).await;
        server.shutdown().await;
        api.delete(pod.name);
    }
    router.has(&[p1, d1]).await;
    let requests = load.finish().await;
    // One of each client at least: how many more depends on how busy the machine is.
    assert!(requests >= 4, "{requests}");
    assert_eq!(router.metric("mini_lb_kubernetes_pods{state=\"server\"}").await, "2");
    assert_eq!(router.metric("mini_lb_kubernetes_watch_up").await, "1");
    assert_eq!(router.metric("mini_lb_kubernetes_lists_total").await, "1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_of_one_selector_are_plain_servers() {
    let api = ApiServer::start().await;
    let router =
        Discovering::start(&api, &["--selector", "app.kubernetes.io/name=sglang,sglang/role=worker"]);
    let pod = Pod::ready("w", "worker", 2);
    let server = simulated(pod, router.pod_port).await;
    api.put(pod);
    api.put(Pod::ready("p", "prefill", 3));
    router.is_ready().await;
    let response = router.client().await.post("/generate", r#"{"text":"a"}"#).await;
    assert_eq!((response.status(), generations(&server)), (200, 1));
    assert_eq!(router.servers().await, [("regular".to_owned(), pod.url(router.pod_port))]);
    let asked = &api.requests()[0];
    assert!(asked.starts_with("/api/v1/namespaces/llm/pods?") && asked.contains("limit=500"), "{asked}");
    assert!(asked.contains("labelSelector=app.kubernetes.io/name=sglang,sglang/role=worker"), "{asked}");
    assert!(router.program.wait_for("Kubernetes: watching").contains("in namespace llm"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_label_moves_a_pod_to_the_other_role() {
    let api = ApiServer::start().await;
    let pod = Pod { bootstrap_port: Some("9001"), ..Pod::ready("a", "prefill", 2) };
    api.put(pod);
    let router = Discovering::watching(&api).await;
    router.has(&[pod]).await;
    let shown = router.client().await.get("/workers").await.json();
    assert_eq!(shown["workers"][0]["bootstrap_port"], 9001, "{shown}");
    for role in ["decode", "prefill"] {
        let moved = Pod { role, ..pod };
        api.put(moved);
        router.has(&[moved]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_belongs_to_the_pod_that_has_it_now() {
    let api = ApiServer::start().await;
    let old = Pod::ready("old", "prefill", 2);
    api.put(old);
    let router = Discovering::watching(&api).await;
    router.has(&[old]).await;
    // The address is given to another pod before the end of the first one is told.
    api.put(Pod { is_terminating: true, is_ready: false, ..old });
    let new = Pod::ready("new", "decode", 2);
    api.put(new);
    router.has(&[new]).await;
    api.delete("old");
    let other = Pod::ready("other", "decode", 3);
    api.put(other);
    router.has(&[new, other]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_annotation_keeps_a_pod_out_and_is_logged_once() {
    let api = ApiServer::start().await;
    let good = Pod::ready("good", "prefill", 3);
    let wrong = Pod { bootstrap_port: Some("89\n98"), ..Pod::ready("wrong", "prefill", 2) };
    api.put_all([good, wrong]);
    let router = Discovering::watching(&api).await;
    router.has(&[good]).await;
    let line = router.program.wait_for("gets no requests");
    let said =
        r"pod llm/wrong gets no requests: its annotation sglang.ai/bootstrap-port 89\\n98 is not a port";
    assert!(line.contains(said) && line.contains("WARN"), "{line}");
    assert_eq!(router.metric("mini_lb_kubernetes_pods{state=\"refused\"}").await, "1");
    // The same again, by an event and by a list.
    api.put(wrong);
    let lists = api.count("limit=");
    api.inject("garbage\n");
    api.wait_for("limit=", lists, 1).await;
    let right = Pod { bootstrap_port: Some("8998"), ..wrong };
    api.wait_for_watch().await;
    api.put(right);
    router.has(&[good, right]).await;
    assert_eq!(router.lines("gets no requests"), Vec::<String>::new());
}

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

fn five() -> [Pod; 5] {
    [0, 1, 2, 3, 4].map(|place| Pod::ready(NAMES[place], ["prefill", "decode"][place % 2], 2 + place as u8))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_pages_are_listed_and_a_watch_goes_on_from_the_last_bookmark() {
    let api = ApiServer::start().await;
    api.set_page(2);
    api.set_faults(Some(Fault::Slow(Duration::from_millis(100))), None);
    api.put_all(five());
    let router = Discovering::watching(&api).await;
    router.has(&five()).await;
    let pages: Vec<String> =
        api.requests().iter().filter(|target| target.contains("limit=")).cloned().collect();
    assert_eq!(pages.len(), 3, "{pages:?}");
    assert!(pages[1].contains("continue=2") && pages[2].contains("continue=4"), "{pages:?}");
    let watches = || -> Vec<String> {
        api.requests().iter().filter(|target| target.contains("watch=true")).cloned().collect()
    };
    assert!(
        watches()[0].contains("resourceVersion=105") && watches()[0].contains("allowWatchBookmarks=true")
    );
    assert!(
        watches()[0].contains("labelSelector=app.kubernetes.io/name=sglang,sglang/role in (decode,prefill)")
    );
    api.inject(BOOKMARK);
    api.end_watches();
    api.wait_for("watch=true", 1, 1).await;
    assert!(watches()[1].contains(&format!("resourceVersion={BOOKMARK_VERSION}")), "{:?}", watches());
    assert_eq!(api.connections(), 1, "for all pages and watches");
    assert_eq!(router.metric("mini_lb_kubernetes_lists_total").await, "1");
    assert_eq!(router.lines("Kubernetes: cannot"), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_is_cut_in_the_middle_comes_again() {
    let api = ApiServer::start().await;
    let [a, b, ..] = five();
    api.put(a);
    let router = Discovering::watching(&api).await;
    router.has(&[a]).await;
    for (name, cut) in [("cut", true), ("ended", false)] {
        let watches = api.count("watch=true");
        api.inject(&format!("{{\"type\":\"ADDED\",\"object\":{{\"metadata\":{{\"name\":\"{name}\""));
        match cut {
            true => api.cut_watches(),
            false => api.end_watches(),
        }
        // Before the next one begins, a second after the last.
        api.wait_for_no_watch().await;
        match cut {
            true => api.put(b),
            false => api.delete(b.name),
        }
        api.wait_for("watch=true", watches, 1).await;
        match cut {
            true => router.has(&[a, b]).await,
            false => router.has(&[a]).await,
        }
    }
    assert_eq!(router.lines("Kubernetes: cannot"), Vec::<String>::new(), "the watch goes on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_gone_the_pods_are_listed_again() {
    let [a, b, c, d, e] = five();
    let api = ApiServer::start().await;
    api.put_all([a, b]);
    let router = Discovering::watching(&api).await;
    router.has(&[a, b]).await;
    // As the status of a watch.
    api.change_unseen(|api| {
        api.delete(a.name);
        api.put(c);
    });
    api.end_watches();
    router.has(&[b, c]).await;
    api.wait_for_watch().await;
    // As an event.
    api.change_unseen(|api| {
        api.delete(b.name);
        api.put_all([d, e]);
    });
    api.inject(&gone());
    router.has(&[c, d, e]).await;
    assert_eq!(router.lines("Kubernetes: cannot"), Vec::<String>::new());
    assert!(router.metric("mini_lb_kubernetes_failures_total{reason=\"gone\"}").await != "0");
}

/// The event that says that the version of a watch is gone.
fn gone() -> String {
    let status = include_str!("fixtures/kubernetes/gone.json").trim();
    format!("{{\"type\":\"ERROR\",\"object\":{status}}}\n")
}

/// Lets the API server fail in one way while its pods are gone: the servers must stay.
async fn servers_stay(list: Fault, watch: Option<Fault>, reason: &str) {
    let api = ApiServer::start().await;
    let pods = five();
    api.put_all(pods);
    let router = Discovering::watching(&api).await;
    router.has(&pods).await;
    router.program.wait_for("Kubernetes: watching");
    // What it would say if it were asked in vain is not what it has.
    api.set_faults(Some(list), watch);
    let (lists, before) = (api.count("/pods"), router.expected(&pods));
    api.inject(&gone());
    api.wait_for("/pods", lists, 2).await;
    assert_eq!(router.servers().await, before, "{reason}");
    let line = router.program.wait_for(&format!("reason={reason}"));
    assert!(line.contains("keeping 5 servers") && line.contains("WARN"), "{line}");
    let counted = router.metric(&format!("mini_lb_kubernetes_failures_total{{reason=\"{reason}\"}}")).await;
    assert_ne!(counted, "0");
    assert_eq!(router.metric("mini_lb_kubernetes_watch_up").await, "0");
    assert_eq!(router.lines(&format!("reason={reason}")), Vec::<String>::new(), "once, not at each attempt");
    // And it is believed again.
    api.change_unseen(|api| api.delete(pods[0].name));
    api.set_faults(None, None);
    router.has(&pods[1..]).await;
    router.program.wait_for(" again: 4 servers");
    assert_eq!(router.metric("mini_lb_kubernetes_watch_up").await, "1");
}

/// A test for each way in which an API server can be blind.
macro_rules! servers_stay {
    ($($name:ident: $list:expr, $watch:expr, $reason:literal;)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            servers_stay($list, $watch, $reason).await;
        }
    )*};
}

/// A list without pods and without a version.
const NO_VERSION: &str = r#"{"kind":"PodList","apiVersion":"v1","metadata":{},"items":[]}"#;
const UNAUTHORIZED: &str =
    r#"{"kind":"Status","status":"Failure","message":"Unauthorized","reason":"Unauthorized","code":401}"#;
const ETCD: &str = r#"{"kind":"Status","code":500,"message":"etcdserver: leader changed"}"#;

servers_stay! {
    servers_stay_when_lists_fail: Fault::Status(500, ETCD.into()), None, "status";
    servers_stay_when_a_proxy_has_no_api_server: Fault::Status(503, "<html>".into()), None, "status";
    servers_stay_when_lists_are_forbidden: Fault::Status(403, FORBIDDEN.into()), None, "forbidden";
    servers_stay_when_the_token_is_not_accepted: Fault::Status(401, UNAUTHORIZED.into()), None, "unauthorized";
    servers_stay_when_an_empty_list_has_no_version: Fault::Body(NO_VERSION.into()), None, "malformed";
    servers_stay_when_lists_are_no_lists: Fault::Body("{}".into()), None, "malformed";
    servers_stay_when_lists_are_no_json: Fault::Body("<html>".into()), None, "malformed";
    servers_stay_when_connections_are_closed: Fault::Close, Some(Fault::Close), "unreachable";
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_list_of_the_api_server_is_a_fact() {
    let api = ApiServer::start().await;
    let pods = five();
    api.put_all(pods);
    let router = Discovering::watching(&api).await;
    router.has(&pods).await;
    api.change_unseen(|api| pods.iter().for_each(|pod| api.delete(pod.name)));
    api.end_watches();
    router.has(&[]).await;
    let line = router.program.wait_for("there are no servers from there");
    assert!(line.contains("WARN"), "{line}");
    api.wait_for_watch().await;
    api.put(pods[0]);
    router.has(&pods[..1]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_permission_is_named_once() {
    let api = ApiServer::start().await;
    let pod = Pod::ready("a", "prefill", 2);
    api.put(pod);
    api.set_faults(Some(Fault::Status(403, FORBIDDEN.into())), None);
    let router = Discovering::start(&api, &PAIRS);
    api.wait_for("limit=", 0, 2).await;
    let line = router.program.wait_for("reason=forbidden");
    for part in [
        "Kubernetes: cannot list pods with",
        "in namespace llm, keeping 0 servers",
        "RBAC does not allow the verb list on pods there (403); the router's account needs get, list and watch",
        "system:serviceaccount:llm:mini-lb",
    ] {
        assert!(line.contains(part), "{line}");
    }
    // Now only to watch: another state, and the list holds.
    api.set_faults(None, Some(Fault::Status(403, FORBIDDEN.replace("list", "watch"))));
    router.has(&[pod]).await;
    let line = router.program.wait_for("cannot watch");
    assert!(line.contains("RBAC does not allow the verb watch"), "{line}");
    api.wait_for("watch=true", 0, 2).await;
    assert_eq!(router.lines("forbid"), Vec::<String>::new(), "once");
    api.set_faults(None, None);
    router.program.wait_for("Kubernetes: watching");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_token_is_read_from_its_file() {
    let api = ApiServer::start().await;
    let [a, b, ..] = five();
    api.put(a);
    let router = Discovering::watching(&api).await;
    router.has(&[a]).await;
    api.set_token("second");
    api.cut_watches();
    router.program.wait_for("reason=unauthorized");
    router.has(&[a]).await;
    api.write_token("second");
    api.put(b);
    router.has(&[a, b]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotated_token_is_used_without_a_failure() {
    let api = ApiServer::start().await;
    let [a, b, c, ..] = five();
    api.put(a);
    let router = Discovering::start(&api, &[&PAIRS[..], &["--log-level", "debug"]].concat());
    router.has(&[a]).await;
    api.wait_for_watch().await;
    // The file is replaced while a watch is open.
    api.write_token("rotated-secret");
    api.set_token("rotated-secret");
    api.end_watches();
    api.put(b);
    router.has(&[a, b]).await;
    // The file is replaced while a request with the old token is under way.
    api.wait_for_watch().await;
    api.replace_token_meanwhile("later-secret");
    api.end_watches();
    api.put(c);
    router.has(&[a, b, c]).await;
    assert_eq!(router.metric("mini_lb_kubernetes_lists_total").await, "1");
    assert_eq!(router.metric("mini_lb_kubernetes_failures_total{reason=\"unauthorized\"}").await, "0");
    let lines: Vec<String> = router.program.lines.try_iter().collect();
    assert!(lines.iter().any(|line| line.contains("Kubernetes: watching")), "{lines:?}");
    let told = lines.iter().any(|line| line.contains("secret") || line.contains("Bearer"));
    assert!(!told, "the log has a token: {lines:?}");
}

/// The line of the failure of a router with this kubeconfig.
fn failure_with(kubeconfig: &Path, reason: &str) -> String {
    let port = free_port().to_string();
    let args = ["--host", "127.0.0.1", "--port", &port, "--prometheus-port", "0", "--service-discovery"];
    let variables = [("KUBECONFIG", kubeconfig.to_str().unwrap())];
    let program = Program::run(program::command(args.iter().chain(&PAIRS).copied(), &variables));
    program.wait_for(&format!("reason={reason}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kubeconfig_that_cannot_be_used_is_refused_by_name() {
    let api = ApiServer::start().await;
    let yaml =
        api.put_file("config", "apiVersion: v1\nkind: Config\nusers: [{name: u, user: {token: secret}}]\n");
    let line = failure_with(&yaml, "configuration");
    for part in [
        "WARN",
        yaml.to_str().unwrap(),
        "it is not JSON, and YAML is not read: write it with",
        "`kubectl config view --raw --minify --flatten -o json`",
    ] {
        assert!(line.contains(part) && !line.contains("secret"), "{line}");
    }
    let insecure = api.kubeconfig_with(&json!({"insecure-skip-tls-verify": true}));
    let line = failure_with(&insecure, "configuration");
    assert!(line.contains("insecure-skip-tls-verify would send the token to anyone"), "{line}");
    assert_eq!(api.requests(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_without_tls_is_asked_without_a_token() {
    let api = ApiServer::start().await;
    let [a, b, ..] = five();
    api.set_token("");
    api.put(a);
    let router = Discovering::start_with(&api.kubeconfig_of_proxy(), &PAIRS);
    router.has(&[a]).await;
    api.wait_for_watch().await;
    api.put(b);
    router.has(&[a, b]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_is_not_trusted_is_named() {
    let api = ApiServer::start().await;
    let other = TestCa::new();
    let kubeconfig = api.kubeconfig_with(&json!({"certificate-authority": other.file()}));
    let line = failure_with(&kubeconfig, "unreachable");
    let said = "TLS: its certificate does not come from a known CA (see ca.crt or certificate-authority)";
    assert!(line.contains(said), "{line}");
    let kubeconfig = api.kubeconfig_with(&json!({"tls-server-name": "another"}));
    let line = failure_with(&kubeconfig, "unreachable");
    assert!(line.contains("TLS: its certificate is for another name"), "{line}");
    assert_eq!(api.requests(), Vec::<String>::new(), "no token was sent");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_without_an_end_does_not_fill_the_memory() {
    let api = ApiServer::start().await;
    let [a, b, ..] = five();
    api.put(a);
    let router = Discovering::watching(&api).await;
    router.has(&[a]).await;
    let lists = api.count("limit=");
    api.inject(&"x".repeat(5 << 20));
    let line = router.program.wait_for("reason=malformed");
    assert!(line.contains("an event has more than 4194304 bytes") && line.contains("keeping 1"), "{line}");
    api.wait_for("limit=", lists, 1).await;
    api.put(b);
    router.has(&[a, b]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_way_to_the_api_server_the_log_says_so_and_the_router_serves() {
    let api = ApiServer::start().await;
    let port = free_port().to_string();
    let args = ["--host", "127.0.0.1", "--port", &port, "--prometheus-port", "0", "--service-discovery"];
    let nowhere = api.kubeconfig().with_file_name("none");
    let variables = [("KUBECONFIG", nowhere.to_str().unwrap()), ("HOME", "/nowhere")];
    let mut command = program::command(args.iter().chain(&PAIRS).copied(), &variables);
    command.env_remove("KUBERNETES_SERVICE_HOST");
    let program = Program::run(command);
    let line = program.wait_for("reason=configuration");
    assert!(line.contains("in all namespaces, keeping 0 servers"), "{line}");
    assert_eq!(program::client(port.parse().unwrap()).await.get("/ready").await.status(), 503);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_changes_which_pods_are_servers() {
    let api = ApiServer::start().await;
    let [a, b, c, ..] = five();
    api.put_all([a, b, Pod { role: "canary", ..c }]);
    let folder = program::Folder::new("reload");
    let file = |role: &str, others: &str| {
        let text = format!("decode_selector = [\"sglang/role={role}\"]\n{others}");
        folder.put("mini-lb.toml", &text).to_str().unwrap().to_owned()
    };
    let path = file("decode", "");
    let router = Discovering::start(&api, &["--config", &path]);
    router.has(&[b]).await;
    api.wait_for_watch().await;
    file("canary", "");
    let line = router.program.reload();
    assert!(line.contains("decode-selector"), "{line}");
    router.has(&[Pod { role: "decode", ..c }]).await;
}
