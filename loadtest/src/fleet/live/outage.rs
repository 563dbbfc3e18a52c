//! A prefill server that stops and starts, or joins, during a replay: makes it happen, and says what became
//! of requests because of it.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::io;
use std::net::SocketAddr;

use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::super::cache::PrefixCache;
use super::super::report::{quantile, seconds};
use super::super::simulation::{CHANGE_AT, Fleet, OUTAGE, Scenario};
use super::super::trace::{BLOCK_TOKENS, Request, duration};
use super::port::{Had, Stop};
use super::servers::{Clock, Servers, Taken};

/// Seconds of ours in which a server that is back has to get a request.
const BACK_WITHIN: f64 = 5.0;
/// Seconds of work that a server has at least when it is stopped: it is to be under load.
const UNDER_LOAD: f64 = 0.5;
/// A pause is at least half as long as the longest between so many arrivals.
const PAUSE_AMONG: usize = 50;
/// With fewer requests the p99 is that of the slowest one, which depends on luck.
const ENOUGH_REQUESTS: usize = 100;
/// How much worse the p99 of all others may become, as a factor.
const WORSE: f64 = 2.0;
/// The share of what it had cached, of what is asked for again and again, that others have to have.
const MOVED: f64 = 0.5;
/// Tokens that say something about it: a few conversations.
const ENOUGH_ASKED: u64 = 50_000;

/// What happened to the first prefill server, and when. Seconds of the model, since the start of the replay.
pub(super) struct Change {
    had: Vec<Had>,
    stopped: Option<f64>,
    back: f64,
}

/// Waits for the time of the scenario, and lets it happen.
pub(super) async fn play(
    scenario: Scenario,
    servers: &mut Servers,
    clock: Clock,
    start: f64,
    requests: &[Request],
    router: SocketAddr,
) -> io::Result<Option<Change>> {
    let how = match scenario {
        Scenario::Steady | Scenario::HalfSpeed => return Ok(None),
        Scenario::Restart | Scenario::Join => Stop::Close,
        Scenario::Kill => Stop::Reset,
    };
    clock.until(start + duration(requests) * CHANGE_AT).await;
    if scenario == Scenario::Join {
        let address = servers.start_first()?;
        add_worker(router, address).await?;
        return Ok(Some(Change { had: Vec::new(), stopped: None, back: clock.now() - start }));
    }
    for pause in pauses(requests) {
        clock.until(start + pause).await;
        if servers.first_has() >= UNDER_LOAD {
            break;
        }
    }
    let (had, stopped) = servers.stop_first(how).await?;
    clock.until(stopped + OUTAGE).await;
    servers.start_first()?;
    Ok(Some(Change { had, stopped: Some(stopped - start), back: clock.now() - start }))
}

/// When a server may be stopped: in long pauses between arrivals, so that what it has does not depend on
/// microseconds. A request that is written in the moment at which its connection ends would be lost, and the
/// server would not know of it.
fn pauses(requests: &[Request]) -> Vec<f64> {
    let from = duration(requests) * CHANGE_AT;
    let due: Vec<_> = requests.iter().map(|request| request.at).filter(|at| *at >= from).collect();
    let gap = |pair: &[f64]| pair[1] - pair[0];
    let longest = due.windows(2).take(PAUSE_AMONG).map(gap).fold(0.0, f64::max);
    let long = due.windows(2).filter(|pair| gap(pair) >= longest / 2.0);
    long.map(|pair| f64::midpoint(pair[0], pair[1])).collect()
}

/// Tells the router of a server.
async fn add_worker(router: SocketAddr, server: SocketAddr) -> io::Result<()> {
    let body = format!(r#"{{"url":"http://{server}","worker_type":"prefill","bootstrap_port":8998}}"#);
    let length = body.len();
    let request = format!(
        "POST /workers HTTP/1.1\r\nhost: {router}\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    let mut stream = TcpStream::connect(router).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut response = String::new();
    stream.read_to_string(&mut response).await?;
    if response.starts_with("HTTP/1.1 2") {
        return Ok(());
    }
    Err(io::Error::other(format!("POST /workers: {response}")))
}

/// What became of each request of a replay.
pub(super) struct Fates {
    /// By request: seconds from when it was due to its first byte, or why it failed.
    pub(super) ttft: Vec<Result<f64, String>>,
    /// What prefill servers took, in the order of its time.
    taken: Vec<Taken>,
    /// By request: tokens of the prompt, and those that were cached.
    tokens: HashMap<usize, (u64, u64)>,
}

impl Fates {
    /// The time in `taken` is that of the trace.
    pub(super) fn new(ttft: Vec<Result<f64, String>>, taken: Vec<Taken>) -> Self {
        let tokens = taken.iter().map(|taken| (taken.index, (taken.input, taken.cached))).collect();
        Self { ttft, taken, tokens }
    }

    fn p99(&self, of: &[usize]) -> f64 {
        let mut ttft: Vec<_> =
            of.iter().filter_map(|index| self.ttft[*index].as_ref().ok().copied()).collect();
        ttft.sort_by(f64::total_cmp);
        quantile(&ttft, 0.99)
    }

    /// The tokens of [`Outage::asked_again`] and [`Outage::found_again`].
    fn moved(&self, fleet: &Fleet, requests: &[Request], stopped: f64) -> (u64, u64) {
        let mut lost =
            PrefixCache::new(usize::try_from(fleet.model.cache_tokens / BLOCK_TOKENS).unwrap_or(usize::MAX));
        // A beginning that others have had, too, does not have to move.
        let (mut others, mut seen) = (HashSet::new(), HashSet::new());
        let mut tokens = (0, 0);
        let taken = self.taken.iter().filter_map(|taken| Some((taken, &requests.get(taken.index)?.blocks)));
        for (taken, blocks) in taken {
            match (taken.at < stopped, taken.server) {
                (true, 0) => lost.insert(blocks),
                (true, _) => others.extend(blocks),
                (false, _) => {
                    let of =
                        |set: &HashSet<u64>| blocks.iter().take_while(|block| set.contains(*block)).count();
                    let (shared, again) = (of(&others), of(&seen).min(lost.matched(blocks)));
                    let found = again.min(taken.cached.div_ceil(BLOCK_TOKENS) as usize);
                    let beyond = |blocks: usize| blocks.saturating_sub(shared) as u64 * BLOCK_TOKENS;
                    tokens = (tokens.0 + beyond(again), tokens.1 + beyond(found));
                    seen.extend(blocks);
                }
            }
        }
        tokens
    }

    /// Tokens that were cached, and all.
    fn cached(&self, of: &[usize]) -> (u64, u64) {
        let tokens = of.iter().filter_map(|index| self.tokens.get(index));
        tokens.fold((0, 0), |sum, (input, cached)| (sum.0 + cached, sum.1 + input))
    }
}

/// The requests that were due in a part of the time, without those that were lost.
#[derive(Clone, Debug, Serialize)]
pub struct Window {
    /// `before`, `while`, `after`, and `since` for the last two together.
    pub name: &'static str,
    /// How many.
    pub requests: usize,
    /// Of their TTFT.
    pub p99: f64,
    /// The same of the same requests in a run in which nothing happened.
    pub p99_without: Option<f64>,
    /// The share of their prompts' tokens that were cached.
    pub hit_rate: f64,
    /// The same in a run in which nothing happened.
    pub hit_rate_without: Option<f64>,
}

/// What a server's stop and start, or its joining, did to requests.
#[derive(Clone, Debug, Serialize)]
pub struct Outage {
    /// The scenario's name.
    pub scenario: &'static str,
    /// Requests that the server had not answered when it stopped.
    pub had: usize,
    /// Requests that failed.
    pub lost: usize,
    /// Why those failed that the server did not have, or at another time.
    pub lost_beyond: Vec<String>,
    /// Seconds of ours from when it was back to its first request.
    pub first_again: Option<f64>,
    /// Its share of the requests in the first five seconds of ours since then.
    pub share: f64,
    /// The share of one server of all.
    pub even_share: f64,
    /// Of the tokens that it alone had cached when it stopped: those that were asked for since then for the
    /// second time or more.
    pub asked_again: u64,
    /// Those of them that were cached, on whatever server.
    pub found_again: u64,
    /// Before, while, after and since.
    pub windows: Vec<Window>,
}

impl Outage {
    pub(super) fn new(
        fleet: &Fleet,
        requests: &[Request],
        speed: f64,
        change: &Change,
        fates: &Fates,
        without: Option<&Fates>,
    ) -> Self {
        let lost: Vec<_> = (0..requests.len()).filter(|index| fates.ttft[*index].is_err()).collect();
        let unread = change.had.iter().filter(|had| **had == Had::Unread).count();
        let beyond = lost.iter().filter(|index| !change.had.contains(&Had::Request(**index)));
        let why =
            |index: &usize| fates.ttft[*index].clone().err().map(|why| format!("request {index}: {why}"));
        let lost_beyond = beyond.skip(unread).filter_map(why).collect();
        let since: Vec<_> = fates.taken.iter().filter(|taken| taken.at >= change.back).collect();
        let first = since.iter().find(|taken| taken.server == 0);
        let soon = since.iter().filter(|taken| taken.at < change.back + BACK_WITHIN * speed);
        let (soon, own) =
            soon.fold((0, 0), |(all, own), taken| (all + 1, own + u32::from(taken.server == 0)));
        let stopped = change.stopped.unwrap_or(change.back);
        let spans = [
            ("before", 0.0..stopped),
            ("while", stopped..change.back),
            ("after", change.back..f64::INFINITY),
            ("since", stopped..f64::INFINITY),
        ];
        let windows = spans.into_iter().filter(|(_, span)| span.start < span.end).map(|(name, span)| {
            let is_in = |index: &usize| span.contains(&requests[*index].at) && fates.ttft[*index].is_ok();
            let of: Vec<_> = (0..requests.len()).filter(is_in).collect();
            let rate = |fates: &Fates| {
                let (cached, all) = fates.cached(&of);
                cached as f64 / all.max(1) as f64
            };
            Window {
                name,
                requests: of.len(),
                p99: fates.p99(&of),
                p99_without: without.map(|fates| fates.p99(&of)),
                hit_rate: rate(fates),
                hit_rate_without: without.map(rate),
            }
        });
        let (asked_again, found_again) = fates.moved(fleet, requests, stopped);
        Self {
            scenario: fleet.scenario.name(),
            had: change.had.len(),
            lost: lost.len(),
            lost_beyond,
            first_again: first.map(|taken| (taken.at - change.back) / speed),
            share: f64::from(own) / f64::from(soon.max(1)),
            even_share: 1.0 / fleet.prefill as f64,
            asked_again,
            found_again,
            windows: windows.collect(),
        }
    }

    /// What has to hold, and whether it does.
    pub fn checks(&self) -> Vec<(String, bool)> {
        let Self { had, lost, lost_beyond, first_again, asked_again, found_again, .. } = self;
        let back = first_again.unwrap_or(f64::INFINITY);
        let mut checks = vec![
            (
                format!("{lost} lost of the {had} requests that it had, and {} others", lost_beyond.len()),
                lost_beyond.is_empty(),
            ),
            (format!("its first request came {back:.2} s after it was back"), back <= BACK_WITHIN),
        ];
        let counts = |window: &&Window| window.name != "before" && window.requests >= ENOUGH_REQUESTS;
        for window in self.windows.iter().filter(counts) {
            let Window { name, p99, p99_without, .. } = window;
            if let Some(without) = p99_without {
                let text = format!("p99 {name}: {}, and {} without", seconds(*p99), seconds(*without));
                checks.push((text, *p99 <= WORSE * without));
            }
        }
        if *asked_again >= ENOUGH_ASKED {
            let share = *found_again as f64 / *asked_again as f64;
            let text = format!(
                "{found_again} of {asked_again} tokens that it alone had were found when asked for again"
            );
            checks.push((text, share >= MOVED));
        }
        checks
    }

    /// As a row of the table of outages, after the columns that say of what.
    pub(super) fn row(&self) -> String {
        let mut row = format!("{} | {} | {}", self.had, self.lost, self.lost_beyond.len());
        let first = self.first_again.map_or("never".to_owned(), |again| format!("{again:.2}"));
        let _ = write!(row, " | {first} | {:.2} of {:.2}", self.share, self.even_share);
        for name in ["before", "while", "after"] {
            let window = self.windows.iter().find(|window| window.name == name);
            let cell = window.map(|window| {
                let pair = |with: String, without: Option<String>| match without {
                    Some(without) => format!("{with} ({without})"),
                    None => with,
                };
                let p99 = pair(seconds(window.p99), window.p99_without.map(seconds));
                let percent = |rate: f64| format!("{:.1}", rate * 100.0);
                format!("{p99}; {} %", pair(percent(window.hit_rate), window.hit_rate_without.map(percent)))
            });
            let _ = write!(row, " | {}", cell.unwrap_or_else(|| "–".to_owned()));
        }
        row
    }
}

/// The head of the table of outages, after the columns that say of what.
pub(super) const HEAD: &str = "had | lost | lost beyond those | first request again, s | share of the first 5 s | before: p99; hit rate (without) | while | after";
