//! The results as Markdown: a table per scenario, notes on what limits its numbers, and the promises.

use std::fmt::Write as _;

use super::metric::{Metric, Spread};
use super::promises::promises;
use super::results::{BUSY, Results, Row};

/// A column: its title, its metric, and the unit that the metric is divided by.
type Column = (&'static str, Metric, f64);

const COSTS: [Column; 8] = [
    ("CPU µs/request", Metric::CpuPerRequest, 1.0),
    ("requests/s", Metric::Rate, 1.0),
    ("p50 ms", Metric::P50, 1e3),
    ("p99 ms", Metric::P99, 1e3),
    ("first byte ms", Metric::FirstByte, 1e3),
    ("peak MiB", Metric::Peak, 1.0),
    ("connections", Metric::Connections, 1.0),
    ("core", Metric::RouterBusy, 0.01),
];

const STREAMS: [Column; 4] = [
    ("CPU µs/token", Metric::CpuPerToken, 1.0),
    ("token p50 ms", Metric::TokenP50, 1e3),
    ("token p99 ms", Metric::TokenP99, 1e3),
    ("KiB/stream", Metric::MemoryPerConnection, 1.0),
];

/// Share of the time that a router was runnable without its core. Its own threads wait for each other less
/// than this; more is another program.
const MAX_CORE_WAIT: f64 = 0.1;

/// In microseconds: a generator that sends later than this distorts latencies.
const MAX_SEND_DELAY_US: f64 = 1000.0;

pub(super) fn markdown(results: &Results) -> String {
    let mut out = heading(results);
    for scenario in results.scenarios() {
        let rows: Vec<_> = results.rows.iter().filter(|row| row.scenario == scenario).collect();
        if let Some(first) = rows.first() {
            let _ = writeln!(out, "\n## {scenario}: {}\n", first.title);
            out += &table(results, &rows, first.is_stream);
        }
        for row in rows {
            notes(row, &mut out);
            load_notes(row, results.machine.load_cores, &mut out);
        }
    }
    out + &promises_table(results)
}

fn heading(results: &Results) -> String {
    let machine = &results.machine;
    let mut out = format!(
        "# Comparison\n\n{} × {}, Linux {}; {}; {} rounds in {:.0} s; load average before: {}.\nEach number is the median over the rounds, with the range in brackets where it is wider than 10 %.\n",
        machine.cores,
        machine.cpu,
        machine.kernel,
        machine.pinning,
        machine.rounds,
        machine.seconds,
        machine.load_before
    );
    if !results.missing.is_empty() {
        let _ = writeln!(out, "Not installed, and left out: {}.", results.missing.join(", "));
    }
    out
}

fn table(results: &Results, rows: &[&Row], is_stream: bool) -> String {
    let columns: Vec<Column> = COSTS.into_iter().chain(STREAMS.into_iter().filter(|_| is_stream)).collect();
    let titles: Vec<_> = columns.iter().map(|(title, ..)| *title).collect();
    let mut out = format!("| router | {} | CPU relative to mini-lb |\n|---|", titles.join(" | "));
    out += &"---|".repeat(columns.len() + 1);
    out.push('\n');
    for row in rows {
        let cells: Vec<_> = columns.iter().map(|column| cell(row, *column)).collect();
        let ours = results.median(&row.scenario, "mini-lb", Metric::CpuPerRequest);
        let theirs = row.spread(Metric::CpuPerRequest).map(|spread| spread.median);
        let ratio =
            theirs.zip(ours).map_or("–".to_owned(), |(theirs, ours)| format!("{:.2}", theirs / ours));
        let mark = if row.why_invalid().is_some() { " ✗" } else { "" };
        let _ = writeln!(out, "| {}{mark} | {} | {ratio} |", row.router, cells.join(" | "));
    }
    out
}

fn cell(row: &Row, (_, metric, unit): Column) -> String {
    let Some(Spread { median, min, max }) = row.spread(metric) else { return "–".to_owned() };
    if metric == Metric::RouterBusy {
        return format!("{:.0} %", median / unit);
    }
    let mark = if metric == Metric::Rate && row.is_bound_by_generator() { " ◦" } else { "" };
    let [median, min, max] = [median, min, max].map(|value| number(value / unit));
    let wide = row.spread(metric).is_some_and(|spread| spread.max - spread.min > 0.1 * spread.median.abs());
    if wide { format!("{median} ({min}–{max}){mark}") } else { format!("{median}{mark}") }
}

/// Formats three significant digits, the precision of a measurement.
pub(super) fn number(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Notes on a row, a paragraph each: what invalidates or limits its numbers.
fn notes(row: &Row, out: &mut String) {
    let router = &row.router;
    let percent = |metric| row.spread(metric).map_or(0.0, |share: Spread| 100.0 * share.median);
    let mut note = |text: String| *out += &format!("\n{text}\n");
    if let Some(why) = row.why_invalid() {
        note(format!("✗ {router}: {why}"));
    }
    if let Some(why) = row.why_not_measured() {
        note(format!("{router}: not measured, {why}"));
    }
    if row.is_bound_by_generator() && router != "direct" {
        let [generator, servers, busy] =
            [Metric::GeneratorBusy, Metric::ServersBusy, Metric::RouterBusy].map(percent);
        note(format!(
            "◦ {router}: limited by the generator and the servers ({generator:.0} % and {servers:.0} % of a core), not by the router ({busy:.0} %)"
        ));
    }
    let waited = row.spread(Metric::RouterWaited).map_or(0.0, |waited| waited.max);
    if waited > MAX_CORE_WAIT && row.is_closed {
        note(format!("≈ {router}: waited for its core up to {:.0} % of the time", 100.0 * waited));
    }
    if let Some(router_time) = row.samples().find_map(|sample| sample.router_time.as_ref()) {
        note(format!(
            "{router}: alternating with the load, {} time slots of {:.1} ms per round, requests/s count only those; the least busy worker was busy for {:.0} % of them, workers waited for a core for {:.0} %",
            router_time.count,
            1e3 * router_time.seconds / router_time.count.max(1) as f64,
            percent(Metric::LeastBusyWorker),
            percent(Metric::RouterWaited)
        ));
    }
    if let Some(counts) = row.samples().find_map(|sample| sample.spread.as_ref()) {
        note(format!("{router}: connections of each event loop {counts:?}"));
    }
}

/// Notes on a fixed load: whether generator and backends contributed to its latencies.
fn load_notes(row: &Row, load_cores: usize, out: &mut String) {
    let router = &row.router;
    let share = |metric| row.spread(metric).map_or(0.0, |share: Spread| share.median);
    let busy = (share(Metric::GeneratorBusy) + share(Metric::ServersBusy)) / load_cores.max(1) as f64;
    if !row.is_closed && busy > BUSY {
        let percent = 100.0 * busy;
        *out += &format!(
            "\n▵ {router}: the core of generator and servers was {percent:.0} % busy: latencies include their delays\n"
        );
    }
    let pooled = row.pooled(None);
    if let (Some(p50), Some(p99)) = (pooled.quantile(0.5), pooled.quantile(0.99)) {
        let (all, left_out) = (row.samples().count(), row.disturbed());
        let [p50, p99] = [p50, p99].map(|time| number(time / 1e3));
        *out += &format!(
            "\n{router}: {} latencies of all measurements: p50 {p50}, p99 {p99} ms; {left_out} of {all} measurements left out because other programs were busy\n",
            pooled.count()
        );
    }
    let late = share(Metric::GeneratorLate);
    if late > MAX_SEND_DELAY_US {
        *out += &format!("\n▵ {router}: the generator itself sent late, p99 {:.1} ms\n", late / 1e3);
    }
}

fn promises_table(results: &Results) -> String {
    let mut out =
        "\n## What mini-lb promises\n\n| promise | bound | measured | |\n|---|---|---|---|\n".to_owned();
    for promise in promises(results) {
        let mut measured = promise.measured.map_or("–".to_owned(), number);
        if let Some(Spread { min, max, .. }) = Spread::of(promise.rounds.iter().copied()) {
            let _ = write!(measured, " ({}–{})", number(min), number(max));
        }
        let _ =
            writeln!(out, "| {} | {} | {measured} | {} |", promise.what, promise.bound(), promise.verdict());
    }
    out
}
