//! A Prometheus as a child process, with the alerts of `docs/alerts.yaml` on a faster clock, and its HTTP
//! API.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;

use super::kit::processes::{ChildProcess, DEADLINE};
use super::kit::{Client, free_port};

/// By how much the rules' durations are shorter here: what takes five minutes in `docs/alerts.yaml` takes
/// five seconds.
const SPEED: u64 = 60;
/// Of scrapes and evaluations: a minute has twice as many in production, so a window has ten of them at
/// least.
const INTERVAL: &str = "500ms";
/// A rate's window in the dashboard, `$__rate_interval` in Grafana.
const RATE_WINDOW: &str = "5s";

pub struct Prometheus {
    address: SocketAddr,
    started: Instant,
    _program: ChildProcess,
}

impl Prometheus {
    /// Scrapes these targets, whose `instance` is their name. `None` where Prometheus is not installed
    /// (Debian: `prometheus`), which fails if `CI` is set.
    pub async fn start(targets: &[(&str, SocketAddr)]) -> Option<Self> {
        if Command::new("prometheus").arg("--version").output().is_err() {
            return super::kit::processes::missing("prometheus is not installed");
        }
        let folder =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("prometheus-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join("alerts.yaml"), faster(include_str!("../../docs/alerts.yaml")))
            .expect("a file");
        let mut config = format!(
            "global: {{scrape_interval: {INTERVAL}, scrape_timeout: {INTERVAL}, \
             evaluation_interval: {INTERVAL}}}\n\
             rule_files: [alerts.yaml]\nscrape_configs:\n- job_name: mini-lb\n  static_configs:\n"
        );
        for (name, address) in targets {
            writeln!(config, "  - {{targets: ['{address}'], labels: {{instance: {name}}}}}").expect("memory");
        }
        fs::write(folder.join("prometheus.yml"), config).expect("a file");
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let mut command = Command::new("prometheus");
        command.arg(format!("--config.file={}", folder.join("prometheus.yml").display()));
        command.arg(format!("--storage.tsdb.path={}", folder.join("data").display()));
        command.arg(format!("--web.listen-address={address}"));
        let mut program = ChildProcess::start(command);
        assert!(program.stderr.wait_for("Server is ready"), "{}", program.output());
        Some(Self { address, started: Instant::now(), _program: program })
    }

    /// The `data` of an answer.
    async fn ask(&self, path: &str, parameters: &[(&str, &str)]) -> Value {
        let mut target = format!("/api/v1/{path}?");
        for (name, value) in parameters {
            let value = utf8_percent_encode(value, NON_ALPHANUMERIC);
            write!(target, "{name}={value}&").expect("memory");
        }
        let answer = Client::connect(self.address).await.get(&target).await.json();
        assert_eq!(answer["status"], "success", "{target}: {answer}");
        answer["data"].clone()
    }

    /// The alert that fires for this router, if it does.
    async fn firing(&self, alert: &str, router: &str) -> Option<Value> {
        let all = self.ask("alerts", &[]).await;
        let mut all = all["alerts"].as_array().expect("a list").iter();
        let is_it = |one: &&Value| {
            let labels = &one["labels"];
            one["state"] == "firing" && labels["alertname"] == alert && labels["instance"] == router
        };
        all.find(is_it).cloned()
    }

    /// Waits until an alert fires for a router, and checks what it tells.
    pub async fn fires(&self, alert: &str, router: &str) -> Value {
        let found = self.wait(alert, router, true).await.expect("it fires");
        for text in ["summary", "description"] {
            let said = found["annotations"][text].as_str().expect("a text");
            assert!(!said.contains("no value") && !said.contains("<error"), "{alert}: {said}");
        }
        let said = found["annotations"]["description"].as_str().expect("a text");
        assert!(said.contains(router), "{said}");
        found["labels"].clone()
    }

    pub async fn ends(&self, alert: &str, router: &str) {
        self.wait(alert, router, false).await;
    }

    async fn wait(&self, alert: &str, router: &str, wanted: bool) -> Option<Value> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let found = self.firing(alert, router).await;
            if found.is_some() == wanted {
                return found;
            }
            let what = if wanted { "does not fire" } else { "does not end" };
            if Instant::now() >= deadline {
                let all = self.ask("alerts", &[]).await;
                panic!("{alert} {what} for {router}: {all:#}");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Every alert that has fired since the start, and the router it was for.
    pub async fn fired(&self) -> BTreeSet<(String, String)> {
        let query = r#"max by (alertname, instance) (max_over_time(ALERTS{alertstate="firing"}[1h]))"#;
        let found = self.ask("query", &[("query", query)]).await;
        let name = |one: &Value, label: &str| one["metric"][label].as_str().expect("a label").to_owned();
        let found = found["result"].as_array().expect("a list").iter();
        found.map(|one| (name(one, "alertname"), name(one, "instance"))).collect()
    }

    /// All finite values that a query of the dashboard has had since the start, of all routers.
    pub async fn panel_values(&self, query: &str) -> Vec<f64> {
        let query = query.replace("$__rate_interval", RATE_WINDOW).replace("$instance", ".*");
        assert!(!query.contains('$'), "{query}");
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().expect("a clock").as_secs_f64();
        let start = (now - self.started.elapsed().as_secs_f64()).to_string();
        let range = [("query", &*query), ("start", &start), ("end", &now.to_string()), ("step", "1")];
        let found = self.ask("query_range", &range).await;
        let found = found["result"].as_array().expect("a list").iter();
        let values = found.flat_map(|one| one["values"].as_array().expect("a list").clone());
        let numbers = values.map(|pair| pair[1].as_str().expect("text").parse().expect("a number"));
        numbers.filter(|number: &f64| number.is_finite()).collect()
    }

    /// The values of a label, as Grafana asks for them to fill a variable.
    pub async fn label_values(&self, metric: &str, label: &str) -> Vec<String> {
        let found = self.ask(&format!("label/{label}/values"), &[("match[]", metric)]).await;
        serde_json::from_value(found).expect("texts")
    }
}

/// The rules with every `for` and every window divided by [`SPEED`].
fn faster(rules: &str) -> String {
    let mut text = String::new();
    let mut count = 0;
    for line in rules.lines() {
        let mut rest = line;
        while let Some(at) = rest.find('[').or_else(|| rest.find("for: ").map(|at| at + 4)) {
            let (before, after) = rest.split_at(at + 1);
            let end = after.find(']').unwrap_or(after.len());
            write!(text, "{before}{}", divided(&after[..end])).expect("memory");
            rest = &after[end..];
            count += 1;
        }
        writeln!(text, "{rest}").expect("memory");
    }
    assert!(count >= 30, "{count} durations");
    text
}

fn divided(duration: &str) -> String {
    let (number, unit) = duration.split_at(duration.len() - 1);
    let milliseconds = match unit {
        "s" => 1_000,
        "m" => 60_000,
        _ => panic!("a duration: {duration:?}"),
    };
    format!("{}ms", number.parse::<u64>().expect("a number") * milliseconds / SPEED)
}
