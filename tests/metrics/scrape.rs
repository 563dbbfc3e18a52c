//! Scrapes the metrics of an admin listener and parses them.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use super::kit::{Client, TIMEOUT};

pub use super::kit::free_port;

type Labels = BTreeMap<String, String>;

/// The text of one scrape.
#[derive(Debug)]
pub struct Scrape {
    text: String,
    series: BTreeMap<(String, Labels), f64>,
}

/// The description of a metric: name, type, labels and help.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Described {
    name: String,
    kind: String,
    labels: BTreeSet<String>,
    help: String,
}

impl Described {
    /// Whether this metric has a series of that name.
    pub fn is_series(&self, name: &str) -> bool {
        match (name.strip_prefix(&self.name), self.kind.as_str()) {
            (Some(suffix), "histogram") => ["_bucket", "_sum", "_count"].contains(&suffix),
            (suffix, _) => suffix == Some(""),
        }
    }
}

impl Scrape {
    fn read(text: String) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let series = lines.map(|line| {
            let (name, value) = line.rsplit_once(' ').expect("a value");
            let (name, labels) = name.split_once('{').unwrap_or((name, "}"));
            let labels = labels.strip_suffix('}').expect("the labels' end");
            // No label value in these tests has a comma or a quote.
            let labels = labels.split(',').filter(|label| !label.is_empty()).map(|label| {
                let (name, value) = label.split_once('=').expect("a label");
                (name.to_owned(), value.trim_matches('"').to_owned())
            });
            ((name.to_owned(), labels.collect()), value.parse().expect("a number"))
        });
        let count = text.lines().filter(|line| !line.starts_with('#')).count();
        let series: BTreeMap<_, _> = series.collect();
        assert_eq!(series.len(), count, "a series is there twice");
        Self { text, series }
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    pub fn get(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let wanted = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let value = self.series.get(&(name.to_owned(), wanted));
        *value.unwrap_or_else(|| panic!("no {name} {labels:?} in\n{}", self.text))
    }

    pub fn has(&self, name: &str, labels: &[(&str, &str)], value: u64) {
        assert_eq!(self.get(name, labels), value as f64, "{name} {labels:?} in\n{}", self.text);
    }

    /// Checks the sum of all series of that name.
    pub fn sums_to(&self, name: &str, sum: u64) {
        assert_eq!(self.sum(name), sum as f64, "{name} in\n{}", self.text);
    }

    fn sum(&self, wanted: &str) -> f64 {
        self.series.iter().filter(|((name, _), _)| name == wanted).map(|(_, value)| value).sum()
    }

    pub fn described(&self) -> Vec<Described> {
        let of = |what: &str| -> Vec<(String, String)> {
            let lines = self.text.lines().filter_map(|line| line.strip_prefix(what)?.split_once(' '));
            lines.map(|(name, rest)| (name.to_owned(), rest.to_owned())).collect()
        };
        let described = of("# TYPE ").into_iter().zip(of("# HELP "));
        let described = described.map(|((name, kind), (same, help))| {
            assert_eq!(name, same);
            let mut described = Described { name, kind, labels: BTreeSet::new(), help };
            let series = self.series.keys().filter(|(series, _)| described.is_series(series));
            let labels = series.flat_map(|(_, labels)| labels.keys().cloned()).filter(|label| label != "le");
            described.labels = labels.collect();
            described
        });
        described.collect()
    }
}

/// A scrape after `requests` requests have ended and their first bytes were written.
pub async fn after_relaying(port: u16, requests: u64) -> Scrape {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        // A request is counted as ended before its last byte is written.
        let scrape = after(port, requests).await;
        if scrape.get("mini_lb_router_relay_seconds_count", &[]) >= requests as f64 {
            return scrape;
        }
        assert!(Instant::now() < deadline, "{requests} responses are not written");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A scrape after exactly `requests` requests have ended.
pub async fn after(port: u16, requests: u64) -> Scrape {
    let deadline = Instant::now() + TIMEOUT;
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    loop {
        if std::net::TcpStream::connect(address).is_ok() {
            let response = Client::connect(address).await.get("/metrics").await;
            assert_eq!(response.status(), 200);
            let kind = response.head.header("content-type");
            assert_eq!(kind, Some("text/plain; version=0.0.4; charset=utf-8"));
            let scrape = Scrape::read(response.text().to_owned());
            if scrape.sum("mini_lb_requests_total") >= requests as f64 {
                scrape.sums_to("mini_lb_requests_total", requests);
                return scrape;
            }
        }
        assert!(Instant::now() < deadline, "{requests} requests do not end");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The rows of the tables of `docs/METRICS.md`, sorted.
pub fn documented(text: &str) -> Vec<Described> {
    let row = |line: &str| {
        let is_metric = line.starts_with("| `mini_lb_") || line.starts_with("| `process_");
        let line = line.strip_prefix("| `").filter(|_| is_metric)?;
        let cells: Vec<&str> = line.trim_end_matches('|').split(" | ").collect();
        let [name, kind, labels, help] = cells[..] else { panic!("four cells: {line}") };
        // Without samples they have no labels; `tests/kubernetes.rs` asks for each by its labels.
        let has_samples = !name.starts_with("mini_lb_kubernetes_");
        let labels = labels.split(", ").map(|label| label.trim_matches('`').to_owned());
        let labels = labels.filter(|_| has_samples);
        Some(Described {
            name: name.trim_end_matches('`').to_owned(),
            kind: kind.to_owned(),
            labels: labels.filter(|label| label != "–").collect(),
            help: help.trim().replace('`', ""),
        })
    };
    let mut rows: Vec<Described> = text.lines().filter_map(row).collect();
    rows.sort();
    rows
}

/// All metric names in a text.
pub fn metrics_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let is_metric = |word: &&str| word.starts_with("mini_lb_") || word.starts_with("process_");
    words.filter(is_metric).map(str::to_owned).collect()
}

/// Kills a child process when it is dropped.
struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn check_built_program() {
    let (port, operators) = (free_port().to_string(), free_port().to_string());
    let mut command = Command::new(env!("CARGO_BIN_EXE_mini-lb"));
    command.args([
        "--prefill",
        "http://127.0.0.1:1",
        "--decode",
        "http://127.0.0.1:2",
        "--log-level",
        "error",
    ]);
    command.args(["--host", "127.0.0.1", "--port", &port, "--prometheus-port", &operators]);
    let _router = KillOnDrop(command.spawn().expect("the built router"));
    let deadline = Instant::now() + TIMEOUT;
    let mut socket = loop {
        if let Ok(socket) = TcpStream::connect(format!("127.0.0.1:{operators}")) {
            break socket;
        }
        assert!(Instant::now() < deadline, "no one listens");
        thread::sleep(Duration::from_millis(5));
    };
    socket.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    let version = format!("mini_lb_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION"));
    assert!(text.lines().any(|line| line == version), "{text}");
    assert!(text.lines().any(|line| line.starts_with("process_cpu_seconds_total ")), "{text}");
}
