//! The `sglang-sim` program: two processes as a pair over real sockets, the announcement, the end by a
//! signal.

mod common;

use std::{
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
};

use common::{Exchange, post};

/// A process that is killed on drop.
struct Process {
    child: Child,
    lines: Vec<String>,
}

impl Process {
    fn start(flags: &[&str], lines: usize) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sglang-sim"));
        command.args(["--port", "0", "--time-scale", "0.01"]).args(flags).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines: out.lines().take(lines).map(Result::unwrap).collect() }
    }

    /// The address in an announcement, and the bootstrap port if there is one.
    fn announced(&self, line: usize, name: &str) -> (SocketAddr, Option<u16>) {
        let line = &self.lines[line];
        let rest =
            line.strip_prefix(&format!("{name} listening on http://")).unwrap_or_else(|| panic!("{line}"));
        let (addr, port) = match rest.split_once(" bootstrap ") {
            Some((addr, port)) => (addr, Some(port.parse().unwrap())),
            None => (rest, None),
        };
        (addr.parse().unwrap(), port)
    }

    fn signal(&mut self, name: &str) -> Option<i32> {
        let sent = Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        self.child.wait().unwrap().code()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // After a test that passed it has exited already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn both(prefill: SocketAddr, decode: SocketAddr, body: &str) -> (u16, u16) {
    let request = post("/generate", body);
    let send = async |addr| Exchange::open(addr, &request).await.response().await.status;
    tokio::join!(send(prefill), send(decode))
}

fn body(port: u16) -> String {
    format!(r#"{{"text":"a b","bootstrap_host":"127.0.0.1","bootstrap_port":{port},"bootstrap_room":5}}"#)
}

#[tokio::test]
async fn two_processes_work_as_a_pair_and_decode_notices_a_killed_prefill() {
    let mut prefill = Process::start(&["--role", "prefill", "--bootstrap-port", "0"], 1);
    let (prefill_addr, port) = prefill.announced(0, "prefill");
    let port = port.unwrap();
    let mut decode = Process::start(&["--role", "decode"], 1);
    let (decode_addr, assumed) = decode.announced(0, "decode");
    assert_eq!(assumed, Some(8998));
    assert_eq!(both(prefill_addr, decode_addr, &body(port)).await, (200, 200));

    let mut waiting =
        Exchange::open(decode_addr, &post("/generate", &body(port).replace("\"a b\"", "\"c\""))).await;
    let busy = common::request("POST", "/flush_cache", "");
    while Exchange::open(decode_addr, &busy).await.response().await.status == 200 {}
    prefill.signal("-KILL");
    let response = waiting.response().await;
    assert_eq!(response.status, 500);
    assert!(response.text().contains(" failed for request rank=0 "), "{}", response.text());
    assert_eq!(decode.signal("-TERM"), Some(0));
}

#[tokio::test]
async fn one_process_runs_both_roles_and_exits_on_sigint() {
    let flags = ["--role", "pair", "--decode-port", "0", "--bootstrap-port", "0", "--model", "m"];
    let mut pair = Process::start(&flags, 2);
    let ((prefill, port), (decode, assumed)) = (pair.announced(0, "prefill"), pair.announced(1, "decode"));
    assert_eq!(port, assumed);
    assert_eq!(both(prefill, decode, &body(port.unwrap())).await, (200, 200));
    let models = Exchange::open(decode, &common::request("GET", "/v1/models", "")).await.response().await;
    assert_eq!(models.json()["data"][0]["id"], "m");
    assert_eq!(pair.signal("-INT"), Some(0));
}

/// `disable_radix_cache` as a server's description has it: among its options, and again in its state.
async fn without_cache(addr: SocketAddr) -> [bool; 2] {
    let info =
        Exchange::open(addr, &common::request("GET", "/server_info", "")).await.response().await.json();
    [&info, &info["internal_states"][0]].map(|options| options["disable_radix_cache"].as_bool().unwrap())
}

#[tokio::test]
async fn a_server_that_computes_prompts_says_whether_it_has_a_prefix_cache() {
    for (role, flag, expected) in [
        ("prefill", Some("--prefix-cache"), false),
        ("prefill", None, true),
        ("regular", Some("--prefix-cache"), false),
        ("regular", None, true),
        // As recorded beside a prefill server with a cache.
        ("decode", Some("--prefix-cache"), true),
    ] {
        let flags: Vec<&str> = ["--role", role, "--bootstrap-port", "0"].into_iter().chain(flag).collect();
        let server = Process::start(&flags, 1);
        let (addr, _) = server.announced(0, role);
        assert_eq!(without_cache(addr).await, [expected; 2], "{flags:?}");
    }
}

#[tokio::test]
async fn a_language_only_prefill_server_has_media_encoded_by_its_encoders() {
    let encoder = Process::start(&["--role", "encode", "--encode-status", "503"], 1);
    let (encoder_addr, _) = encoder.announced(0, "encode");
    let url = format!("http://{encoder_addr}");
    let flags = ["--role", "prefill", "--bootstrap-port", "0", "--language-only"];
    let more = ["--encoder-bootstrap-port", "0", "--encoder-urls", &url];
    let prefill = Process::start(&[&flags[..], &more].concat(), 1);
    let (line, registry) = prefill.lines[0].split_once(" encoders ").expect("its port for encoders");
    let prefill_addr = line.split("http://").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    let registry = SocketAddr::from(([127, 0, 0, 1], registry.parse().unwrap()));
    let ask = async |addr: SocketAddr, request: &[u8]| Exchange::open(addr, request).await.response().await;
    // Of an encoder there is nothing else.
    for (method, path, status) in [
        ("GET", "/health", 200),
        ("GET", "/health_generate", 200),
        ("GET", "/encode", 405),
        ("GET", "/v1/models", 404),
        ("GET", "/server_info", 404),
        ("POST", "/generate", 404),
    ] {
        assert_eq!(ask(encoder_addr, &common::request(method, path, "")).await.status, status, "{path}");
    }
    let bad = ask(encoder_addr, &post("/encode", r#"{"req_id":"r","modality":"TEXT"}"#)).await;
    let said =
        serde_json::json!({ "status": "error", "message": "unsupported modality: TEXT", "req_id": "r" });
    assert_eq!((bad.status, bad.json()), (400, said));
    let body = r#"{"text":"a","image_data":"data:","bootstrap_host":"127.0.0.1","bootstrap_room":7}"#;
    let failed = ask(prefill_addr.parse().unwrap(), &post("/generate", body)).await;
    assert_eq!(failed.status, 503);
    assert!(failed.text().contains("encoder not ready"), "{}", failed.text());
    let list = async || ask(registry, &common::request("GET", "/list_encoder_urls", "")).await.json();
    assert_eq!(list().await, serde_json::json!({ "encoder_urls": [url] }));
    let changed =
        async |method, path, body: &str| ask(registry, &common::request(method, path, body)).await.status;
    for _ in 0..2 {
        assert_eq!(changed("POST", "/register_encoder_url", r#"{"url":"http://e:1/"}"#).await, 200);
    }
    assert_eq!(list().await, serde_json::json!({ "encoder_urls": [url, "http://e:1"] }));
    let gone = format!(r#"{{"url":"{url}"}}"#);
    assert_eq!(changed("DELETE", "/unregister_encoder_url", &gone).await, 200);
    assert_eq!(list().await, serde_json::json!({ "encoder_urls": ["http://e:1"] }));
    assert_eq!(changed("POST", "/register_encoder_url", "{}").await, 400);
}
