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
