//! The fast mode: the model and a router in one thread, without sockets and without a clock.
//!
//! Requests arrive when the trace says, whatever became of those before (an open loop).

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

use super::model::{DecodeServer, Model, PrefillServer, Prefilled};
use super::noise::factor;
use super::report::{Outcome, ServerLoad};
use super::router::{Arrival, Pair, PrefillEnd, Router, View};
use super::trace::{Request, duration, prompt_bytes};

/// What happens to the prefill servers meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Scenario {
    /// Nothing.
    #[default]
    Steady,
    /// The first two are half as fast as the others.
    HalfSpeed,
    /// The first stops after two fifths of the time, fails what it had, and is back [`OUTAGE`] seconds later
    /// with an empty cache.
    Restart,
    /// The first is not there before two fifths of the time.
    Join,
    /// As `Restart`; on loopback its connections are reset rather than closed.
    Kill,
}

/// Seconds from a server's stop to its start.
pub const OUTAGE: f64 = 20.0;
/// When a server stops or joins, of the time.
pub(super) const CHANGE_AT: f64 = 0.4;

impl Scenario {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Steady, Self::HalfSpeed, Self::Restart, Self::Join, Self::Kill];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Steady => "steady",
            Self::HalfSpeed => "half-speed",
            Self::Restart => "restart",
            Self::Join => "join",
            Self::Kill => "kill",
        }
    }
}

/// The servers, and what happens to them.
#[derive(Clone, Copy, Debug)]
pub struct Fleet {
    /// Number of prefill servers.
    pub prefill: usize,
    /// Number of decode servers.
    pub decode: usize,
    /// How each works.
    pub model: Model,
    /// What happens to them.
    pub scenario: Scenario,
    /// Of everything that is random in the fleet.
    pub seed: u64,
    /// The share of the requests, from the first on, that is played and not measured.
    pub warm_up: f64,
}

impl Default for Fleet {
    fn default() -> Self {
        Self {
            prefill: 8,
            decode: 8,
            model: Model::default(),
            scenario: Scenario::Steady,
            seed: 1,
            warm_up: 0.0,
        }
    }
}

impl Fleet {
    /// The prefill servers at the start.
    pub(super) fn prefill_servers(&self) -> Vec<PrefillServer> {
        let slow = |server| self.scenario == Scenario::HalfSpeed && server < 2;
        let server = |index| PrefillServer::new(self.model, if slow(index) { 0.5 } else { 1.0 });
        (0..self.prefill).map(server).collect()
    }

    /// The factor of the time of request `index`.
    pub(super) fn noise(&self, index: usize) -> f64 {
        factor(self.seed, 1, index as u64, self.model.noise)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Stop(usize),
    Start(usize),
    /// The KV cache of a request is on its decode server, if its prefill server has not stopped since.
    Transferred {
        index: usize,
        epoch: u32,
    },
    /// A request of a decode server ends, unless another has joined since.
    DecodeEnd {
        server: usize,
        generation: u64,
    },
}

/// An instant, ordered.
#[derive(Clone, Copy, PartialEq)]
struct At(f64);

impl Eq for At {}

impl PartialOrd for At {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for At {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// Plays `requests` through `router` and the fleet.
///
/// # Panics
/// If the router chooses a server that is not there, or the fleet has none.
pub fn simulate(fleet: &Fleet, requests: &[Request], router: &mut dyn Router) -> Outcome {
    let mut run = Run::new(fleet, requests, router);
    for (index, request) in requests.iter().enumerate() {
        run.until(request.at);
        run.arrive(index);
    }
    run.until(f64::INFINITY);
    run.outcome()
}

struct Run<'a> {
    fleet: &'a Fleet,
    requests: &'a [Request],
    measured_from: usize,
    router: &'a mut dyn Router,
    prefill: Vec<PrefillServer>,
    up: Vec<usize>,
    decode: Vec<DecodeServer>,
    /// By decode server: how many requests have joined or ended.
    generations: Vec<u64>,
    /// By prefill server: the requests that are there.
    inside: Vec<BTreeSet<usize>>,
    /// By request.
    placed: Vec<Option<(Pair, Prefilled)>>,
    events: BinaryHeap<Reverse<(At, Event)>>,
    outcome: Outcome,
}

impl<'a> Run<'a> {
    fn new(fleet: &'a Fleet, requests: &'a [Request], router: &'a mut dyn Router) -> Self {
        let mut run = Self {
            fleet,
            requests,
            measured_from: (requests.len() as f64 * fleet.warm_up) as usize,
            router,
            prefill: fleet.prefill_servers(),
            up: (0..fleet.prefill).collect(),
            decode: (0..fleet.decode).map(|_| DecodeServer::new(fleet.model)).collect(),
            generations: vec![0; fleet.decode],
            inside: vec![BTreeSet::new(); fleet.prefill],
            placed: vec![None; requests.len()],
            events: BinaryHeap::new(),
            outcome: Outcome::default(),
        };
        let change = duration(requests) * CHANGE_AT;
        match fleet.scenario {
            Scenario::Steady | Scenario::HalfSpeed => {}
            Scenario::Restart | Scenario::Kill => {
                run.at(change, Event::Stop(0));
                run.at(change + OUTAGE, Event::Start(0));
            }
            Scenario::Join => {
                run.stop(0, 0.0);
                run.at(change, Event::Start(0));
            }
        }
        run
    }

    fn at(&mut self, time: f64, event: Event) {
        self.events.push(Reverse((At(time), event)));
    }

    /// Handles all events up to `time`.
    fn until(&mut self, time: f64) {
        while let Some(Reverse((At(now), event))) = self.events.peek().copied() {
            if now > time {
                return;
            }
            self.events.pop();
            match event {
                Event::Stop(server) => self.stop(server, now),
                Event::Start(server) => {
                    self.prefill[server].up = true;
                    self.find_up();
                    self.router.prefill_started(server);
                }
                Event::Transferred { index, epoch } => self.transferred(index, epoch, now),
                Event::DecodeEnd { server, generation } if generation == self.generations[server] => {
                    if let Some(index) = self.decode[server].end(now) {
                        self.ended(index);
                    }
                    self.decode_changed(server);
                }
                Event::DecodeEnd { .. } => {}
            }
        }
    }

    fn find_up(&mut self) {
        self.up = (0..self.prefill.len()).filter(|server| self.prefill[*server].up).collect();
    }

    fn arrive(&mut self, index: usize) {
        let request = &self.requests[index];
        let bytes = prompt_bytes(request, request.input);
        let now = request.at;
        let view = View {
            up: &self.up,
            decode: self.decode.len(),
            prefill: &self.prefill,
            model: &self.fleet.model,
        };
        let pair = self.router.choose(&Arrival { index, now, request, bytes }, &view);
        let server = &mut self.prefill[pair.prefill];
        assert!(server.up, "prefill server {} is down", pair.prefill);
        let prefilled = server.arrive(now, request, self.fleet.noise(index));
        let epoch = server.epoch;
        self.placed[index] = Some((pair, prefilled));
        self.inside[pair.prefill].insert(index);
        self.at(prefilled.transferred, Event::Transferred { index, epoch });
    }

    fn transferred(&mut self, index: usize, epoch: u32, now: f64) {
        let Some((pair, prefilled)) = self.placed[index] else { return };
        if self.prefill[pair.prefill].epoch != epoch {
            return;
        }
        self.inside[pair.prefill].remove(&index);
        let request = &self.requests[index];
        let end = PrefillEnd::Answered { cached: prefilled.cached, time: now - request.at };
        self.router.prefill_done(index, pair, end);
        let first = self.decode[pair.decode].join(now, index, request.input, request.output);
        if index >= self.measured_from {
            self.outcome.ttft.push(first - request.at);
            self.outcome.prompt_tokens += request.input;
            self.outcome.cached_tokens += prefilled.cached;
        }
        self.decode_changed(pair.decode);
    }

    fn decode_changed(&mut self, server: usize) {
        self.generations[server] += 1;
        if let Some(end) = self.decode[server].next_end() {
            self.at(end, Event::DecodeEnd { server, generation: self.generations[server] });
        }
    }

    fn stop(&mut self, server: usize, now: f64) {
        self.prefill[server].stop(now);
        self.find_up();
        for index in std::mem::take(&mut self.inside[server]) {
            let Some((pair, _)) = self.placed[index] else { continue };
            self.router.prefill_done(index, pair, PrefillEnd::Failed);
            self.outcome.failed += 1;
            self.ended(index);
        }
    }

    fn ended(&mut self, index: usize) {
        if let Some((pair, _)) = self.placed[index].take() {
            self.router.done(index, pair);
        }
    }

    fn outcome(self) -> Outcome {
        let Self { mut outcome, mut prefill, decode, requests, .. } = self;
        outcome.ttft.sort_by(f64::total_cmp);
        outcome.seconds = duration(requests);
        outcome.prefill = prefill
            .iter()
            .map(|server| ServerLoad { requests: server.requests, busy: server.busy })
            .collect();
        outcome.queues = prefill.iter_mut().map(|server| std::mem::take(&mut server.queue)).collect();
        outcome.decode_requests = decode.iter().map(|server| server.requests).collect();
        outcome
    }
}
