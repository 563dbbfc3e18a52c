//! The lines of one screen, from the numbers of the last minute: what the status page shows.

use std::collections::BTreeMap;
use std::time::Duration;

use super::numbers::{Buckets, bytes, per_second, seconds, share, short, uptime};
use super::series::{History, MINUTE, Poll, RECENT, label};
use crate::columns::{Cells, Column, cut, lines as table_lines, printable, wrapped};

/// One line, and how it is set.
pub(super) struct Line {
    pub(super) text: String,
    pub(super) tone: Tone,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Tone {
    Plain,
    Bold,
    Bad,
}

/// Between two numbers of a line.
const GAP: &str = "   ";

const SERVERS: [Column; 10] = [
    Column::new("SERVER", Cells::Urls(16)),
    Column::new("ROLE", Cells::Words),
    Column::new("STATE", Cells::Words),
    Column::new("OPEN", Cells::Numbers),
    Column::new("REQ/S", Cells::Numbers),
    Column::new("WORK", Cells::Numbers),
    Column::new("FAILED", Cells::Texts(8)),
    Column::new("CACHED", Cells::Numbers),
    Column::new("IDLE", Cells::Numbers),
    Column::new("WORK BY DP RANK", Cells::Texts(15)),
];
/// The column of ranks, which is there if a server has some.
const RANKS: usize = 9;

const ENCODERS: [Column; 3] = [
    Column::new("ENCODER", Cells::Urls(16)),
    Column::new("STATE", Cells::Words),
    Column::new("REGISTRATIONS", Cells::Texts(8)),
];

/// What the numbers are made of.
struct View<'a> {
    now: &'a Poll,
    /// As long ago as rates reach, and as everything else.
    recent: &'a Poll,
    minute: &'a Poll,
    width: usize,
    lines: Vec<Line>,
}

/// All lines. A failure is why there are no newer numbers, and for how long.
pub(super) fn lines(
    history: &History,
    url: &str,
    failure: Option<(&str, Duration)>,
    width: usize,
) -> Vec<Line> {
    let error = failure.map(|(why, since)| match since.as_secs() {
        0 => format!("error: {why}; trying again"),
        seconds => format!("error: {why}; trying again, {} so far", uptime(seconds as f64)),
    });
    let polls = history.last().zip(history.since(RECENT)).zip(history.since(MINUTE));
    let mut lines = Vec::new();
    if let Some(error) = &error {
        lines.extend(
            wrapped(error, width, 2)
                .into_iter()
                .map(|text| Line { text: cut(&text, width), tone: Tone::Bad }),
        );
    }
    let Some(((now, recent), minute)) = polls else {
        if error.is_none() {
            lines.push(Line {
                text: cut(&format!("mini-lb at {url}: waiting for the router"), width),
                tone: Tone::Plain,
            });
        }
        return lines;
    };
    let mut view = View { now, recent, minute, width, lines };
    view.head(url);
    view.servers();
    view.encoders();
    view.errors();
    view.foot();
    view.lines
}

impl View<'_> {
    fn put(&mut self, text: &str, tone: Tone) {
        self.lines.push(Line { text: cut(text, self.width), tone });
    }

    /// Numbers beside each other, in as many lines as they need.
    fn flow(&mut self, parts: &[String]) {
        let mut line = String::new();
        for part in parts {
            if !line.is_empty() && line.len() + GAP.len() + part.len() > self.width {
                self.put(&std::mem::take(&mut line), Tone::Plain);
            }
            line = if line.is_empty() { part.clone() } else { format!("{line}{GAP}{part}") };
        }
        self.put(&line, Tone::Plain);
    }

    /// Of a counter's increase since `then`, for each second.
    fn rate(&self, grown: f64, then: &Poll) -> Option<f64> {
        let time = (self.now.at - then.at).as_secs_f64();
        (time > 0.0).then(|| grown / time)
    }

    fn grown(&self, name: &str, then: &Poll, keep: impl Fn(&str) -> bool) -> f64 {
        self.now.grown(name, then).filter(|(labels, _)| keep(labels)).map(|(_, grown)| grown).sum()
    }

    fn of_role(&self, name: &str, role: &str) -> f64 {
        self.now
            .family(name)
            .filter(|(labels, _)| label(labels, "role") == role)
            .map(|(_, value)| value)
            .sum()
    }

    /// Plain servers are the only role that there is, where there are some.
    fn roles(&self) -> &'static [&'static str] {
        let has_plain =
            self.now.family("mini_lb_backends").any(|(labels, _)| label(labels, "role") == "regular");
        if has_plain { &["regular"] } else { &["prefill", "decode"] }
    }

    fn head(&mut self, url: &str) {
        let version =
            self.now.family("mini_lb_build_info").map(|(labels, _)| label(labels, "version").into_owned());
        let version = printable(&version.collect::<String>());
        let since = self.now.sum("process_start_time_seconds");
        let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let up = uptime(clock.as_secs_f64() - since);
        let down: Vec<&str> = self
            .roles()
            .iter()
            .copied()
            .filter(|role| self.of_role("mini_lb_healthy_backends", role) == 0.0)
            .collect();
        let (state, tone) = match down[..] {
            [] => ("ready".to_owned(), Tone::Bold),
            _ => (format!("NOT READY: no healthy {} server", down.join(" and no healthy ")), Tone::Bad),
        };
        self.put(&format!("mini-lb {version} at {url}: {state}, up {up}"), tone);
        let (now, recent, minute) = (self.now, self.recent, self.minute);
        let requests = self.rate(self.grown("mini_lb_requests_total", recent, |_| true), recent);
        let is_error = |labels: &str| label(labels, "outcome") == "failure";
        let errors = self.grown("mini_lb_request_duration_seconds_count", recent, is_error);
        let errors = self.rate(errors, recent);
        let open = |role: &&str| self.of_role("mini_lb_backend_in_flight_requests", role);
        let each: Vec<String> =
            self.roles().iter().map(|role| format!("{role} {}", short(open(role)))).collect();
        let limit = now.sum("mini_lb_queue_limit");
        let queue = short(now.sum("mini_lb_queue_length"));
        let cpu = self.rate(self.grown("process_cpu_seconds_total", recent, |_| true), recent);
        let believed = share(
            self.grown("mini_lb_backend_matched_prompt_bytes_total", minute, |_| true),
            self.grown("mini_lb_backend_prompt_bytes_total", minute, |_| true),
        );
        let parts = [
            format!("requests {}", per_second(requests)),
            format!("errors {}", per_second(errors)),
            format!("open {}", each.join(", ")),
            if limit > 0.0 { format!("queue {queue} of {}", short(limit)) } else { "no queue".to_owned() },
            format!("first byte {}", self.times("mini_lb_time_to_first_byte_seconds_bucket")),
            format!("duration {}", self.times("mini_lb_request_duration_seconds_bucket")),
            format!("router's own {}", self.times("mini_lb_router_send_seconds_bucket")),
            format!("prompts in caches {believed}"),
            format!("to compute {}", bytes(self.of_role("mini_lb_backend_work_bytes", self.roles()[0]))),
            format!(
                "CPU {}",
                cpu.map_or_else(|| "-".to_owned(), |cpu| format!("{} %", short((cpu * 100.0).round())))
            ),
            format!("memory {}", bytes(now.sum("process_resident_memory_bytes"))),
        ];
        self.flow(&parts);
    }

    /// p50 and p99 of the last minute.
    fn times(&self, name: &str) -> String {
        // Opening a connection takes a network round trip, which is not the router's own time.
        let own =
            self.now.grown(name, self.minute).filter(|(labels, _)| label(labels, "connections") != "opened");
        let buckets = Buckets::of(own);
        match buckets.quantile(0.5) {
            None => "-".to_owned(),
            some => format!("p50 {} p99 {}", seconds(some), seconds(buckets.quantile(0.99))),
        }
    }

    fn servers(&mut self) {
        let by_server = |series: Vec<(&str, f64)>| -> BTreeMap<String, f64> {
            let mut sums = BTreeMap::new();
            for (labels, value) in series {
                *sums.entry(key(labels)).or_default() += value;
            }
            sums
        };
        let values = |name: &str| by_server(self.now.family(name).collect());
        let grown = |name: &str, then| by_server(self.now.grown(name, then).collect());
        let (draining, open) =
            (values("mini_lb_backend_draining"), values("mini_lb_backend_in_flight_requests"));
        let (work, idle) = (values("mini_lb_backend_work_bytes"), values("mini_lb_backend_idle_connections"));
        let ended = grown("mini_lb_backend_legs_total", self.recent);
        let prompts = grown("mini_lb_backend_prompt_bytes_total", self.minute);
        let matched = grown("mini_lb_backend_matched_prompt_bytes_total", self.minute);
        let (failed, ranks) = (self.failures(), self.ranks());
        let mut rows: Vec<(String, bool, Vec<String>)> = Vec::new();
        for (labels, healthy) in self.now.family("mini_lb_backend_healthy") {
            let key = key(labels);
            let of = |map: &BTreeMap<String, f64>| map.get(&key).copied().unwrap_or(0.0);
            let state = match (of(&draining) > 0.0, healthy > 0.0) {
                (true, _) => "draining",
                (false, true) => "healthy",
                (false, false) => "DOWN",
            };
            let text = |map: &BTreeMap<String, String>| map.get(&key).cloned().unwrap_or_default();
            let rate = self.rate(of(&ended), self.recent);
            let role = label(labels, "role");
            let cells = vec![
                shown(&label(labels, "backend")),
                printable(&role),
                state.to_owned(),
                short(of(&open)),
                rate.map_or_else(|| "-".to_owned(), short),
                bytes(of(&work)),
                text(&failed),
                if role == "decode" { "-".to_owned() } else { share(of(&matched), of(&prompts)) },
                short(of(&idle)),
                text(&ranks),
            ];
            rows.push((key, state != "healthy", cells));
        }
        // Prefill first, and in each role those that somebody has to look at.
        let place =
            |(key, is_bad, cells): &(String, bool, Vec<String>)| (cells[1] == "decode", !is_bad, key.clone());
        rows.sort_by_cached_key(place);
        let columns = if ranks.is_empty() { &SERVERS[..RANKS] } else { &SERVERS[..] };
        self.put("", Tone::Plain);
        self.table(columns, rows.into_iter().map(|(_, is_bad, cells)| (is_bad, cells)).collect());
    }

    fn table(&mut self, columns: &[Column], rows: Vec<(bool, Vec<String>)>) {
        let (bad, cells): (Vec<bool>, Vec<Vec<String>>) = rows.into_iter().unzip();
        let tones = bad.iter().map(|is_bad| if *is_bad { Tone::Bad } else { Tone::Plain });
        let tones = std::iter::once(Tone::Bold).chain(tones);
        let lines = table_lines(columns, &cells, self.width);
        self.lines.extend(lines.into_iter().zip(tones).map(|(text, tone)| Line { text, tone }));
    }

    /// The failures of the last minute by server: how often which outcome.
    fn failures(&self) -> BTreeMap<String, String> {
        let mut counts: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
        for (labels, grown) in self.now.grown("mini_lb_backend_legs_total", self.minute) {
            let outcome = label(labels, "outcome");
            if grown > 0.0 && !["completed", "cancelled"].contains(&outcome.as_ref()) {
                *counts.entry(key(labels)).or_default().entry(printable(&outcome)).or_default() += grown;
            }
        }
        counts.into_iter().map(|(key, counts)| (key, counted(&counts))).collect()
    }

    /// The work of each rank, of servers with several.
    fn ranks(&self) -> BTreeMap<String, String> {
        let mut ranks: BTreeMap<String, BTreeMap<u64, f64>> = BTreeMap::new();
        for (labels, work) in self.now.family("mini_lb_backend_rank_work_bytes") {
            let rank = label(labels, "dp_rank").parse().unwrap_or(u64::MAX);
            ranks.entry(key(labels)).or_default().insert(rank, work);
        }
        let text = |works: BTreeMap<u64, f64>| works.into_values().map(bytes).collect::<Vec<_>>().join(", ");
        ranks.into_iter().map(|(key, works)| (key, text(works))).collect()
    }

    fn encoders(&mut self) {
        let mut registrations: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
        for (labels, count) in
            self.now.family("mini_lb_encoder_registrations").filter(|(_, count)| *count > 0.0)
        {
            let states = registrations.entry(label(labels, "encoder").into_owned()).or_default();
            states.insert(printable(&label(labels, "state")), count);
        }
        let row = |(labels, up): (&str, f64)| {
            let encoder = label(labels, "encoder");
            let told = registrations.get(encoder.as_ref()).map(counted).unwrap_or_default();
            let state = if up > 0.0 { "healthy" } else { "DOWN" };
            (up == 0.0, vec![shown(&encoder), state.to_owned(), told])
        };
        let mut rows: Vec<(bool, Vec<String>)> = self.now.family("mini_lb_encoder_up").map(row).collect();
        if rows.is_empty() {
            return;
        }
        rows.sort();
        rows.reverse();
        self.put("", Tone::Plain);
        self.table(&ENCODERS, rows);
    }

    /// What went wrong in the last minute.
    fn errors(&mut self) {
        let mut counts: BTreeMap<String, f64> = BTreeMap::new();
        let mut note = |name: &str, say: &dyn Fn(&str) -> Option<String>| {
            for (labels, grown) in self.now.grown(name, self.minute).filter(|(_, grown)| *grown > 0.0) {
                if let Some(what) = say(labels) {
                    *counts.entry(printable(&what)).or_default() += grown;
                }
            }
        };
        note("mini_lb_requests_total", &|labels| {
            let status = label(labels, "status");
            status.starts_with(['4', '5']).then(|| format!("answered {status}"))
        });
        note("mini_lb_errors_total", &|labels| Some(format!("error {}", label(labels, "code"))));
        note("mini_lb_retries_total", &|labels| {
            Some(format!("retried, {}: {}", label(labels, "role"), label(labels, "cause")))
        });
        note("mini_lb_cancellations_total", &|labels| Some(format!("cancelled: {}", label(labels, "cause"))));
        note("mini_lb_queue_refused_total", &|labels| {
            Some(format!("rejected by a limit: {}", label(labels, "reason")))
        });
        self.put("", Tone::Plain);
        let parts: Vec<String> =
            counts.iter().map(|(what, count)| format!("{what} ({})", short(*count))).collect();
        match parts.is_empty() {
            true => self.put("no errors and no retries", Tone::Plain),
            false => self.flow(&parts),
        }
    }

    fn foot(&mut self) {
        let age = |then: &Poll| (self.now.at - then.at).as_secs_f64().round();
        let (recent, minute) = (age(self.recent), age(self.minute));
        let text =
            format!("Rates are of the last {recent} s, all else that is counted of the last {minute} s.");
        self.put(&text, Tone::Plain);
    }
}

/// A server, in labels.
fn key(labels: &str) -> String {
    format!("{} {}", label(labels, "role"), label(labels, "backend"))
}

/// A server's URL: what all have in common would take the place of what tells them apart.
fn shown(url: &str) -> String {
    printable(url.strip_prefix("http://").unwrap_or(url))
}

/// How often what: `connect 3, timeout 1`.
fn counted(counts: &BTreeMap<String, f64>) -> String {
    counts.iter().map(|(what, count)| format!("{what} {}", short(*count))).collect::<Vec<_>>().join(", ")
}
