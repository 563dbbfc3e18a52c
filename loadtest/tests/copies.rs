//! When the copies of a request for several samples should be sent: at once to one prefill server, at once to
//! several, or first one and the others when it has the prompt.
//!
//! A prefill server here works as SGLang's scheduler: in batches of whole or cut prompts of 8,192 tokens
//! together, each prompt matched with the cache when it is first put in a batch. So what comes together is
//! computed together, also if it is the same. `--nocapture` shows the table of `docs/ROUTING.md`.

use std::collections::{HashMap, VecDeque};

use loadtest::fleet::model::Model;

const SERVERS: usize = 4;
/// Tokens of the other requests, each with a prompt of its own.
const OTHERS: u64 = 4_000;
/// Requests for samples that are measured.
const MEASURED: usize = 300;
/// From a server's answer to another request of the router's at it.
const ROUND_TRIP: f64 = 0.001;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Strategy {
    AtOnceToOne,
    AtOnceToSeveral,
    FirstThenOthers,
}

struct Waiting {
    id: usize,
    prompt: u64,
    tokens: u64,
    /// Computed or found; `None` before its first batch.
    done: Option<u64>,
}

#[derive(Default)]
struct Server {
    queue: VecDeque<Waiting>,
    /// Tokens of each prompt in the cache.
    cache: HashMap<u64, u64>,
    /// When the batch ends, and how much of which place of the queue it computes.
    batch: Option<(f64, Vec<u64>)>,
}

impl Server {
    fn waiting_tokens(&self) -> u64 {
        self.queue.iter().map(|waiting| waiting.tokens - waiting.done.unwrap_or(0)).sum()
    }

    fn begin_batch(&mut self, now: f64, model: &Model) {
        if self.batch.is_some() || self.queue.is_empty() {
            return;
        }
        let (mut budget, mut parts, mut seconds) = (model.chunk_tokens, Vec::new(), model.prefill_base);
        for waiting in &mut self.queue {
            if budget == 0 {
                break;
            }
            let cached = self.cache.get(&waiting.prompt).copied().unwrap_or(0);
            let done = *waiting.done.get_or_insert(cached.min(waiting.tokens - 1));
            let new = (waiting.tokens - done).min(budget);
            let whole = model.prefill_seconds(done, new);
            seconds += whole - model.prefill_base;
            budget -= new;
            parts.push(new);
        }
        self.batch = Some((now + seconds, parts));
    }

    /// Ends the batch. Returns who is through, with the tokens of the last part.
    fn end_batch(&mut self) -> Vec<(usize, u64)> {
        let (_, parts) = self.batch.take().expect("a batch");
        let mut through = Vec::new();
        // From the back: who is through leaves the queue.
        for place in (0..parts.len()).rev() {
            let waiting = &mut self.queue[place];
            let done = waiting.done.expect("it was in the batch") + parts[place];
            waiting.done = Some(done);
            let cached = self.cache.entry(waiting.prompt).or_default();
            *cached = done.max(*cached);
            if done == waiting.tokens {
                through.push((waiting.id, parts[place]));
                self.queue.remove(place);
            }
        }
        through
    }
}

/// What one leg is for.
#[derive(Clone, Copy)]
struct Leg {
    /// Of a measured request.
    request: Option<usize>,
    arrived: f64,
    is_first: bool,
}

#[derive(Debug, Default, Clone, Copy)]
struct Times {
    /// Mean time to a request's first token, and to the first token of its last sample.
    first: f64,
    last: f64,
    /// Mean time to the first token of the other requests.
    others: f64,
}

/// Plays `MEASURED` requests for `n` samples of prompts of `tokens` beside others that use the part `load` of
/// the servers. One sample of each of the measured ones would use a tenth of that.
fn play(strategy: Strategy, n: usize, tokens: u64, load: f64, seed: u64) -> Times {
    let model = Model { noise: 0.0, ..Model::default() };
    let mut random = fastrand::Rng::with_seed(seed);
    let mut exponential = |mean: f64| -mean * (1.0 - random.f64()).ln();
    let seconds = |tokens| model.prefill_seconds(0, tokens);
    let rate = load * SERVERS as f64;
    let (every, gap) = match load > 0.0 {
        true => (seconds(OTHERS) / rate, 10.0 * seconds(tokens) / rate),
        // One after the other.
        false => (f64::INFINITY, 10.0 * n as f64 * seconds(tokens)),
    };
    let mut servers: Vec<Server> = (0..SERVERS).map(|_| Server::default()).collect();
    let mut legs: Vec<Leg> = Vec::new();
    // Copies that are to be sent: time, server and request.
    let mut later: Vec<(f64, usize, usize)> = Vec::new();
    let (mut next_other, mut next_measured, mut measured) = (exponential(every), gap, 0);
    let mut first_tokens = vec![Vec::new(); MEASURED];
    let mut others = (0.0, 0_u32);
    let send = |server: &mut Server, legs: &mut Vec<Leg>, leg: Leg, prompt, tokens| {
        server.queue.push_back(Waiting { id: legs.len(), prompt, tokens, done: None });
        legs.push(leg);
    };
    let mut now = 0.0;
    while first_tokens.iter().any(|tokens| tokens.len() < n) {
        // Begun after all arrivals of one moment.
        servers.iter_mut().for_each(|server| server.begin_batch(now, &model));
        let batch = (0..SERVERS)
            .filter_map(|server| Some((servers[server].batch.as_ref()?.0, server)))
            .min_by(|a, b| a.0.total_cmp(&b.0));
        let due = later.iter().map(|(at, ..)| *at).fold(f64::INFINITY, f64::min);
        let more = if measured < MEASURED { next_measured } else { f64::INFINITY };
        now = [batch.map_or(f64::INFINITY, |batch| batch.0), due, more, next_other]
            .into_iter()
            .fold(f64::INFINITY, f64::min);
        let by_load = |servers: &[Server]| {
            let mut order: Vec<usize> = (0..SERVERS).collect();
            order.sort_by_key(|server| servers[*server].waiting_tokens());
            order
        };
        if let Some((at, server)) = batch
            && at == now
        {
            for (id, part) in servers[server].end_batch() {
                let transferred = now + model.transfer_base + model.transfer_token * part as f64;
                let leg = legs[id];
                let first_token = transferred + model.decode_base;
                let Some(request) = leg.request else {
                    others = (others.0 + first_token - leg.arrived, others.1 + 1);
                    continue;
                };
                first_tokens[request].push(first_token - leg.arrived);
                if leg.is_first && strategy == Strategy::FirstThenOthers {
                    later.extend((1..n).map(|_| (transferred + ROUND_TRIP, server, request)));
                }
            }
        } else if due == now {
            let place = later.iter().position(|(at, ..)| *at == due).expect("one is due");
            let (_, server, request) = later.swap_remove(place);
            let arrived = legs.iter().find(|leg| leg.request == Some(request)).expect("the first").arrived;
            let leg = Leg { request: Some(request), arrived, is_first: false };
            send(&mut servers[server], &mut legs, leg, request as u64, tokens);
        } else if more == now {
            let order = by_load(&servers);
            let copies = if strategy == Strategy::FirstThenOthers { 1 } else { n };
            for copy in 0..copies {
                let server =
                    if strategy == Strategy::AtOnceToSeveral { order[copy % SERVERS] } else { order[0] };
                let leg = Leg { request: Some(measured), arrived: now, is_first: copy == 0 };
                send(&mut servers[server], &mut legs, leg, measured as u64, tokens);
            }
            measured += 1;
            next_measured = now + if load > 0.0 { exponential(gap) } else { gap };
        } else {
            let server = by_load(&servers)[0];
            let leg = Leg { request: None, arrived: now, is_first: true };
            let prompt = 1_000_000 + legs.len() as u64;
            send(&mut servers[server], &mut legs, leg, prompt, OTHERS);
            next_other = now + exponential(every);
        }
    }
    let mean = |pick: fn(&[f64]) -> f64| {
        first_tokens.iter().map(|tokens| pick(tokens)).sum::<f64>() / MEASURED as f64
    };
    Times {
        first: mean(|tokens| tokens.iter().copied().fold(f64::INFINITY, f64::min)),
        last: mean(|tokens| tokens.iter().copied().fold(0.0, f64::max)),
        others: others.0 / f64::from(others.1.max(1)),
    }
}

#[test]
fn copies_that_follow_the_first_to_its_server_cost_others_the_least() {
    println!(
        "first token, last sample's first token, and others' first token, as ratios to those of the last column"
    );
    println!("| load | n | tokens | at once to one | at once to several | first, then others: seconds |");
    for load in [0.0, 0.5, 0.7] {
        for n in [3, 8] {
            for tokens in [256, 1_000, 8_000, 32_000] {
                let [one, several, then] =
                    [Strategy::AtOnceToOne, Strategy::AtOnceToSeveral, Strategy::FirstThenOthers]
                        .map(|strategy| play(strategy, n, tokens, load, 1));
                let ratio = |times: Times| {
                    let others = if load > 0.0 { times.others / then.others } else { 1.0 };
                    format!("{:.2} {:.2} {:.2}", times.first / then.first, times.last / then.last, others)
                };
                println!(
                    "| {load} | {n} | {tokens} | {} | {} | {:.3} {:.3} {:.3} |",
                    ratio(one),
                    ratio(several),
                    then.first,
                    then.last,
                    then.others
                );
                // What `MIN_AWAITED_BYTES` of `proxy::samples` stands on: shorter ones gain nothing.
                if tokens >= 1_000 {
                    assert!(then.first <= one.first && then.last <= one.last, "{load} {n} {tokens}");
                    assert!(then.first <= 1.01 * several.first, "{load} {n} {tokens}");
                }
                if tokens >= 1_000 && load > 0.0 {
                    assert!(then.last <= several.last, "{load} {n} {tokens}");
                    assert!(
                        then.others <= one.others && then.others <= several.others,
                        "{load} {n} {tokens}"
                    );
                }
            }
        }
    }
}
