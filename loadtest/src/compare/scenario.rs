//! The loads under which routers are compared.

use std::time::Duration;

use crate::canned::Plan;
use crate::load::{Mode, RequestKind};
use crate::testbed::Router;

/// Which routers a scenario applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AppliesTo {
    AllRouters,
    /// Routers that send each request to prefill and decode.
    PdRouters,
    /// mini-lb only.
    MiniLbOnly,
}

/// One load.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Its name on the command line and in the results.
    pub name: &'static str,
    /// Its description.
    pub title: &'static str,
    pub(super) of: AppliesTo,
    pub(super) kind: RequestKind,
    pub(super) body: usize,
    pub(super) connections: usize,
    pub(super) plan: Plan,
    pub(super) mode: Mode,
    pub(super) ramp: Duration,
    pub(super) warmup: Duration,
    pub(super) time: Duration,
    pub(super) workers: usize,
    /// Streams stay open, and the connections of each event loop are counted.
    pub(super) spread: bool,
    /// Measurements per round with each router that starts quickly; one with the others.
    pub(super) slices: usize,
    /// Router and load alternate on all cores.
    pub(super) alternating: bool,
}

impl Scenario {
    fn new(
        name: &'static str,
        title: &'static str,
        kind: RequestKind,
        connections: usize,
        time: Duration,
    ) -> Self {
        Self {
            name,
            title,
            of: AppliesTo::AllRouters,
            kind,
            body: 300,
            connections,
            plan: Plan::default(),
            mode: Mode::Closed,
            ramp: Duration::ZERO,
            warmup: Duration::from_millis(300),
            time,
            workers: 1,
            spread: false,
            slices: 1,
            alternating: false,
        }
    }

    pub(super) fn applies_to(&self, router: &Router) -> bool {
        match self.of {
            AppliesTo::AllRouters => true,
            AppliesTo::PdRouters => router.is_pd(),
            AppliesTo::MiniLbOnly => matches!(router, Router::MiniLb { .. }),
        }
    }

    /// Measurements per round with `router`.
    pub(super) fn slices(&self, router: &Router) -> usize {
        if router.starts_quickly() { self.slices } else { 1 }
    }

    /// Whether responses are streams.
    pub(super) fn is_stream(&self) -> bool {
        matches!(self.kind, RequestKind::ChatStream | RequestKind::LogprobStream)
    }
}

/// Other programs disturb a machine for seconds at a time. Several short measurements of each router,
/// alternating, spread that over all of them.
const OPEN_SLICES: usize = 6;

/// All scenarios, measured for `time` each. `few_cores`: two workers and their load do not have a core each.
pub(super) fn all(time: Duration, few_cores: bool) -> Vec<Scenario> {
    let new = |name, title, kind, connections| Scenario::new(name, title, kind, connections, time);
    // Decode waits for prefill, as real servers do; otherwise more bodies are in flight than there are
    // connections.
    let plan = Plan { paired: true, ..Plan::default() };
    let body = |name, title, body, connections| Scenario {
        body,
        plan,
        ..new(name, title, RequestKind::Chat, connections)
    };
    let merged = Plan { tokens: 16, ..Plan::default() };
    let pd = |plan, scenario| Scenario { of: AppliesTo::PdRouters, plan, ..scenario };
    let mut all = vec![
        new("chat_300b", "300 B chat, 64 connections", RequestKind::Chat, 64),
        new(
            "stream_64",
            "streams of 64 tokens, a write per event, 64 connections",
            RequestKind::ChatStream,
            64,
        ),
        Scenario {
            plan: Plan { single_write: true, ..Plan::default() },
            ..new(
                "stream_burst",
                "streams of 64 tokens in one write, 64 connections",
                RequestKind::ChatStream,
                64,
            )
        },
        body("body_64k", "64 KiB prompts, 32 connections", 64 << 10, 32),
        body("body_1m", "1 MiB bodies, 16 connections", 1 << 20, 16),
        body("body_8m", "8 MiB bodies, 8 connections", 8 << 20, 8),
        paced(time),
        pd(merged, new("logprobs", "512 prompt logprobs, 32 connections", RequestKind::Logprobs, 32)),
        pd(
            merged,
            new(
                "logprob_stream",
                "512 prompt logprobs, 16 events, 16 connections",
                RequestKind::LogprobStream,
                16,
            ),
        ),
        Scenario {
            plan: Plan { prefill_delay: Duration::from_millis(100), ..Plan::default() },
            mode: Mode::Open { rate: 100.0 },
            ..new(
                "prefill_late",
                "streams, prefill responds 100 ms late, 100 per second",
                RequestKind::ChatStream,
                64,
            )
        },
        Scenario {
            mode: Mode::Open { rate: 500.0 },
            time: time * 3,
            slices: OPEN_SLICES,
            ..new("open_500", "300 B chat, 500 per second, open loop", RequestKind::Chat, 64)
        },
    ];
    all.extend(if few_cores { alternating(time) } else { vec![two_workers(time)] });
    all.push(spread(time));
    all
}

fn two_workers(time: Duration) -> Scenario {
    let title = "300 B chat, 128 connections, two workers";
    Scenario {
        of: AppliesTo::MiniLbOnly,
        workers: 2,
        ..Scenario::new("two_workers", title, RequestKind::Chat, 128, time)
    }
}

/// One worker and two, measured in the same way, as only those can be compared.
fn alternating(time: Duration) -> Vec<Scenario> {
    let of = |name, title, workers| Scenario {
        of: AppliesTo::MiniLbOnly,
        workers,
        alternating: true,
        warmup: Duration::from_secs(1),
        ..Scenario::new(name, title, RequestKind::Chat, 1000, time * 3)
    };
    vec![
        of("one_worker", "300 B chat, 1,000 connections, one worker, load and router alternating", 1),
        of("two_workers", "300 B chat, 1,000 connections, two workers, load and router alternating", 2),
    ]
}

/// Streams of two seconds whose starts are spread over two seconds, so that at any time they are at all
/// stages.
fn paced(time: Duration) -> Scenario {
    let plan = Plan { tokens: 100, interval: Duration::from_millis(20), ..Plan::default() };
    let title = "1,000 streams, 20 ms a token";
    Scenario {
        plan,
        ramp: Duration::from_millis(1900),
        warmup: Duration::from_secs(2),
        ..Scenario::new("paced_1000", title, RequestKind::ChatStream, 1000, time * 3)
    }
}

fn spread(time: Duration) -> Scenario {
    let plan = Plan { tokens: 1000, interval: Duration::from_millis(20), ..Plan::default() };
    let title = "32 long streams, two workers";
    Scenario {
        of: AppliesTo::MiniLbOnly,
        plan,
        workers: 2,
        spread: true,
        ..Scenario::new("spread_32", title, RequestKind::ChatStream, 32, time)
    }
}
