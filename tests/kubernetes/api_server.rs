//! The part of a Kubernetes API server that discovery talks to: pods are listed and watched over TLS with a
//! token, with label selectors, pages, resource versions and bookmarks, and with the faults of a test.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use percent_encoding::percent_decode_str;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{broadcast, watch};
use tokio::task::{JoinHandle, JoinSet};

use crate::kit::program::Folder;
use crate::kit::{Head, TerminatorOptions, TestCa, TlsTerminator, with_timeout};

/// Like all of that folder written after the documentation of Kubernetes' API, not recorded from a cluster.
const POD: &str = include_str!("../fixtures/kubernetes/pod.json");

/// How requests of one verb are answered instead of as they should be.
#[derive(Debug, Clone)]
pub enum Fault {
    /// This status and body.
    Status(u16, String),
    /// 200 and this body.
    Body(String),
    /// Nothing: the connection is closed.
    Close,
    /// As usual, but later.
    Slow(Duration),
}

#[derive(Default)]
struct State {
    /// By name.
    pods: BTreeMap<String, Value>,
    version: u64,
    /// Each change: its version, and the pod before and after it.
    changes: Vec<(u64, Option<Value>, Option<Value>)>,
    /// Watches from before this version are answered with 410.
    oldest: u64,
    token: String,
    /// What is written to the file of the token before the next 401.
    next_token: Option<(PathBuf, String)>,
    page: usize,
    list_fault: Option<Fault>,
    watch_fault: Option<Fault>,
    /// Paths and queries, decoded.
    requests: Vec<String>,
    connections: usize,
}

/// What all open watches get, apart from events.
#[derive(Clone)]
enum Injected {
    Bytes(String),
    /// The end of the response, as after its timeout.
    End,
    /// The end of the connection.
    Cut,
}

struct Cluster {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
    injected: broadcast::Sender<Injected>,
}

/// An API server with its pods.
pub struct ApiServer {
    cluster: Arc<Cluster>,
    /// Where it is without TLS.
    plain: SocketAddr,
    tls: TlsTerminator,
    authority: TestCa,
    folder: Folder,
    accepting: JoinHandle<()>,
}

impl ApiServer {
    pub async fn start() -> Self {
        let state = State { version: 100, page: 500, token: "first".to_owned(), ..State::default() };
        let cluster = Arc::new(Cluster {
            state: Mutex::new(state),
            changed: watch::Sender::new(0),
            injected: broadcast::channel(16).0,
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound address");
        let authority = TestCa::new();
        let identity = authority.issue("api", &["localhost"]);
        let options = TerminatorOptions { identity, truncates: false, reads_slowly: false, client_ca: None };
        let tls = TlsTerminator::start(address, options).await;
        let accepting = tokio::spawn(accept(listener, Arc::clone(&cluster)));
        let server =
            Self { cluster, plain: address, tls, authority, folder: Folder::new("kubernetes"), accepting };
        server.write_token("first");
        server
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.cluster.state.lock().unwrap()
    }

    /// A kubeconfig for this server, whose token is in a file.
    pub fn kubeconfig(&self) -> PathBuf {
        self.kubeconfig_with(&json!({}))
    }

    /// A kubeconfig for this server without TLS and without a user.
    pub fn kubeconfig_of_proxy(&self) -> PathBuf {
        let config = json!({
            "current-context": "test",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://{}", self.plain)}}],
            "contexts": [{"name": "test", "context": {"cluster": "c"}}],
        });
        self.folder.put("kubeconfig-of-proxy", &config.to_string())
    }

    /// A file next to the kubeconfig.
    pub fn put_file(&self, name: &str, text: &str) -> PathBuf {
        self.folder.put(name, text)
    }

    /// The same, with these fields of the cluster instead.
    pub fn kubeconfig_with(&self, fields: &Value) -> PathBuf {
        let mut cluster = json!({"server": self.tls.url(), "certificate-authority": self.authority.file()});
        let fields = fields.as_object().expect("an object").clone();
        cluster.as_object_mut().expect("an object").extend(fields);
        let config = json!({
            "kind": "Config",
            "apiVersion": "v1",
            "current-context": "test",
            "clusters": [{"name": "c", "cluster": cluster}],
            // From the folder of the kubeconfig.
            "users": [{"name": "u", "user": {"tokenFile": "token"}}],
            "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u"}}],
        });
        self.folder.put("kubeconfig", &config.to_string())
    }

    pub fn write_token(&self, token: &str) {
        self.folder.put("token", token);
    }

    /// Accepts this token only. Empty: none is wanted, as by `kubectl proxy`.
    pub fn set_token(&self, token: &str) {
        token.clone_into(&mut self.state().token);
    }

    /// Accepts this token only, and writes it to the file when a request with another one is under way.
    pub fn replace_token_meanwhile(&self, token: &str) {
        let mut state = self.state();
        state.next_token = Some((self.folder.path("token"), token.to_owned()));
        token.clone_into(&mut state.token);
    }

    /// At most this many pods in one response.
    pub fn set_page(&self, pods: usize) {
        self.state().page = pods;
    }

    pub fn set_faults(&self, list: Option<Fault>, watch: Option<Fault>) {
        let mut state = self.state();
        (state.list_fault, state.watch_fault) = (list, watch);
    }

    /// Adds a pod or replaces it.
    pub fn put(&self, pod: Pod) {
        let name = pod.name.to_owned();
        self.change(name, Some(pod.to_json()));
    }

    pub fn put_all(&self, pods: impl IntoIterator<Item = Pod>) {
        pods.into_iter().for_each(|pod| self.put(pod));
    }

    pub fn delete(&self, name: &str) {
        self.change(name.to_owned(), None);
    }

    fn change(&self, name: String, mut pod: Option<Value>) {
        let mut state = self.state();
        state.version += 1;
        let version = state.version;
        if let Some(pod) = &mut pod {
            pod["metadata"]["resourceVersion"] = json!(version.to_string());
        }
        let before = match &pod {
            Some(pod) => state.pods.insert(name, pod.clone()),
            None => state.pods.remove(&name),
        };
        state.changes.push((version, before, pod));
        drop(state);
        self.cluster.changed.send_replace(version);
    }

    /// Changes the pods without anyone being told: the versions from before are gone.
    pub fn change_unseen(&self, change: impl FnOnce(&Self)) {
        change(self);
        let mut state = self.state();
        state.changes.clear();
        state.version += 1;
        state.oldest = state.version;
    }

    /// Sends bytes into all open watches.
    pub fn inject(&self, text: &str) {
        self.cluster.injected.send(Injected::Bytes(text.to_owned())).ok();
    }

    /// Ends all open watches as after their timeout.
    pub fn end_watches(&self) {
        self.cluster.injected.send(Injected::End).ok();
    }

    /// Closes the connections of all open watches.
    pub fn cut_watches(&self) {
        self.cluster.injected.send(Injected::Cut).ok();
    }

    pub fn requests(&self) -> Vec<String> {
        self.state().requests.clone()
    }

    /// How many connections there were so far.
    pub fn connections(&self) -> usize {
        self.state().connections
    }

    /// How many requests there were with `part` in path or query.
    pub fn count(&self, part: &str) -> usize {
        self.state().requests.iter().filter(|target| target.contains(part)).count()
    }

    /// Waits until there were `more` requests with `part` than `since`.
    pub async fn wait_for(&self, part: &str, since: usize, more: usize) {
        let arrived = async {
            while self.count(part) < since + more {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        with_timeout(part, arrived).await;
    }

    /// Waits until no watch is open.
    pub async fn wait_for_no_watch(&self) {
        let ended = async {
            while self.cluster.injected.receiver_count() > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        with_timeout("the end of the watch", ended).await;
    }

    /// Waits until a watch is open.
    pub async fn wait_for_watch(&self) {
        let opened = async {
            while self.cluster.injected.receiver_count() == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        with_timeout("a watch", opened).await;
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, cluster: Arc<Cluster>) {
    let mut connections = JoinSet::new();
    while let Ok((socket, _)) = listener.accept().await {
        cluster.state.lock().unwrap().connections += 1;
        connections.spawn(serve(socket, Arc::clone(&cluster)));
    }
}

/// Serves the requests of a connection.
async fn serve(mut socket: TcpStream, cluster: Arc<Cluster>) {
    let mut buffer = Vec::new();
    while let Some(head) = read_head(&mut socket, &mut buffer).await {
        if answer(&mut socket, &cluster, &head).await.is_none() {
            return;
        }
    }
}

/// Reads the head of a GET, which has no body.
async fn read_head(socket: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<Head> {
    loop {
        if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = Head::parse(&buffer[..end]);
            buffer.drain(..end + 4);
            return Some(head);
        }
        if socket.read_buf(buffer).await.unwrap_or(0) == 0 {
            return None;
        }
    }
}

/// Answers a request. `None`: the connection ends.
async fn answer(socket: &mut TcpStream, cluster: &Cluster, head: &Head) -> Option<()> {
    let target = head.start_line.split(' ').nth(1)?;
    let target = percent_decode_str(&target.replace('+', " ")).decode_utf8_lossy().into_owned();
    let query: BTreeMap<&str, &str> = target
        .split_once('?')?
        .1
        .split('&')
        // The first `=`: a label selector has some of its own.
        .filter_map(|pair| pair.split_once('='))
        .collect();
    let is_watch = query.get("watch") == Some(&"true");
    let (fault, is_known) = {
        let mut state = cluster.state.lock().unwrap();
        state.requests.push(target.clone());
        let fault = if is_watch { &state.watch_fault } else { &state.list_fault };
        let expected = (!state.token.is_empty()).then(|| format!("Bearer {}", state.token));
        (fault.clone(), head.header("authorization") == expected.as_deref())
    };
    if !is_known {
        if let Some((path, token)) = cluster.state.lock().unwrap().next_token.take() {
            std::fs::write(path, token).expect("the file of the token");
        }
        let body = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": "Unauthorized", "reason": "Unauthorized", "code": 401});
        return respond(socket, 401, &body.to_string()).await;
    }
    match fault {
        Some(Fault::Status(status, body)) => return respond(socket, status, &body).await,
        Some(Fault::Body(body)) => return respond(socket, 200, &body).await,
        Some(Fault::Close) => return None,
        Some(Fault::Slow(time)) => tokio::time::sleep(time).await,
        None => {}
    }
    let selector = query.get("labelSelector").copied().unwrap_or_default();
    if is_watch {
        return stream(socket, cluster, selector, query.get("resourceVersion")?).await;
    }
    let body = list(cluster, selector, query.get("continue").copied());
    respond(socket, 200, &body).await
}

async fn respond(socket: &mut TcpStream, status: u16, body: &str) -> Option<()> {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status} Status\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    );
    socket.write_all(&[head.as_bytes(), body.as_bytes()].concat()).await.ok()
}

/// A page of pods.
fn list(cluster: &Cluster, selector: &str, from: Option<&str>) -> String {
    let state = cluster.state.lock().unwrap();
    let from = from.map_or(0, |token| token.parse().expect("a token of this server"));
    let all: Vec<&Value> = state.pods.values().filter(|pod| matches(selector, pod)).collect();
    let mut metadata = json!({"resourceVersion": state.version.to_string()});
    let end = all.len().min(from + state.page);
    if end < all.len() {
        metadata["continue"] = json!(end.to_string());
        metadata["remainingItemCount"] = json!(all.len() - end);
    }
    // As an API server lists them, without the two fields.
    let items: Vec<Value> = all[from..end]
        .iter()
        .map(|pod| {
            let mut pod = (*pod).clone();
            let fields = pod.as_object_mut().expect("an object");
            fields.remove("kind");
            fields.remove("apiVersion");
            pod
        })
        .collect();
    json!({"kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": items}).to_string()
}

/// Whether a pod has the labels of a selector.
fn matches(selector: &str, pod: &Value) -> bool {
    let value = |key: &str| pod["metadata"]["labels"][key].as_str();
    let mut rest = selector;
    while !rest.is_empty() {
        // A comma in parentheses separates values.
        let end = match (rest.find(','), rest.find('(')) {
            (Some(comma), Some(open)) if open < comma => rest.find(')').expect("a closed list") + 1,
            (Some(comma), _) => comma,
            (None, _) => rest.len(),
        };
        let (requirement, after) = rest.split_at(end);
        rest = after.trim_start_matches(',');
        let is_met = match requirement.split_once(" in ") {
            Some((key, values)) => {
                let values = values.trim_start_matches('(').trim_end_matches(')');
                value(key).is_some_and(|value| values.split(',').any(|one| one == value))
            }
            None => {
                let (key, wanted) = requirement.split_once('=').expect("a requirement");
                value(key) == Some(wanted)
            }
        };
        if !is_met {
            return false;
        }
    }
    true
}

/// Streams the changes since a version.
async fn stream(socket: &mut TcpStream, cluster: &Cluster, selector: &str, since: &str) -> Option<()> {
    let mut since: u64 = since.parse().expect("a version of this server");
    if since < cluster.state.lock().unwrap().oldest {
        return respond(socket, 410, include_str!("../fixtures/kubernetes/gone.json")).await;
    }
    let mut injected = cluster.injected.subscribe();
    let mut changed = cluster.changed.subscribe();
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    socket.write_all(head.as_bytes()).await.ok()?;
    loop {
        changed.mark_unchanged();
        let events: Vec<(u64, String)> = {
            let state = cluster.state.lock().unwrap();
            let new = state.changes.iter().filter(|(version, ..)| *version > since);
            new.filter_map(|change| Some((change.0, event(selector, change)?))).collect()
        };
        for (version, event) in events {
            chunk(socket, &format!("{event}\n")).await?;
            since = version;
        }
        let mut byte = [0];
        tokio::select! {
            changed = changed.changed() => changed.ok()?,
            // The client has left.
            _ = socket.read(&mut byte) => return None,
            injected = injected.recv() => match injected.ok()? {
                Injected::Bytes(text) => chunk(socket, &text).await?,
                Injected::End => return socket.write_all(b"0\r\n\r\n").await.ok(),
                Injected::Cut => return None,
            },
        }
    }
}

async fn chunk(socket: &mut TcpStream, text: &str) -> Option<()> {
    socket.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes()).await.ok()
}

/// A change as a watch with this selector sees it.
fn event(selector: &str, (version, before, after): &(u64, Option<Value>, Option<Value>)) -> Option<String> {
    let matches = |pod: &Option<Value>| pod.as_ref().is_some_and(|pod| matches(selector, pod));
    let (kind, pod) = match (matches(before), matches(after)) {
        (false, true) => ("ADDED", after),
        (true, true) => ("MODIFIED", after),
        // The pod as it was, with the new version.
        (true, false) => ("DELETED", before),
        (false, false) => return None,
    };
    let mut pod = pod.clone().expect("it matched");
    pod["metadata"]["resourceVersion"] = json!(version.to_string());
    Some(json!({"type": kind, "object": pod}).to_string())
}

/// A pod of a test.
#[derive(Debug, Clone, Copy)]
pub struct Pod {
    pub name: &'static str,
    pub address: Ipv4Addr,
    pub role: &'static str,
    pub is_ready: bool,
    pub is_terminating: bool,
    /// The annotation of a prefill server.
    pub bootstrap_port: Option<&'static str>,
    pub uid: &'static str,
}

impl Pod {
    /// A ready pod at `127.0.0.<last>`, whose bootstrap port must be asked for.
    pub fn ready(name: &'static str, role: &'static str, last: u8) -> Self {
        let address = Ipv4Addr::new(127, 0, 0, last);
        Self { name, address, role, is_ready: true, is_terminating: false, bootstrap_port: None, uid: name }
    }

    pub fn url(&self, port: u16) -> String {
        format!("http://{}", SocketAddr::from((self.address, port)))
    }

    fn to_json(self) -> Value {
        let mut pod: Value = serde_json::from_str(POD).expect("JSON");
        let address = self.address.to_string();
        pod["metadata"]["name"] = json!(self.name);
        pod["metadata"]["uid"] = json!(self.uid);
        pod["metadata"]["labels"]["sglang/role"] = json!(self.role);
        pod["status"]["podIP"] = json!(address);
        pod["status"]["podIPs"] = json!([{ "ip": address }]);
        let annotations = pod["metadata"]["annotations"].as_object_mut().expect("an object");
        match self.bootstrap_port {
            Some(port) => annotations.insert("sglang.ai/bootstrap-port".into(), json!(port)),
            None => annotations.remove("sglang.ai/bootstrap-port"),
        };
        if !self.is_ready {
            for condition in [2, 3] {
                pod["status"]["conditions"][condition]["status"] = json!("False");
            }
        }
        if self.is_terminating {
            pod["metadata"]["deletionTimestamp"] = json!("2026-03-02T10:00:00Z");
            pod["metadata"]["deletionGracePeriodSeconds"] = json!(120);
        }
        pod
    }
}
