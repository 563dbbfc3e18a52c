//! The loads that routers are compared under.

use std::time::Duration;

use crate::bed::Router;
use crate::canned::Plan;
use crate::load::{Kind, Mode};

/// Which routers a scenario says something about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum For {
    Everyone,
    /// Routers that know of prefill.
    Pd,
    /// This router only.
    MiniLb,
}

/// One load.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// How it is called on the command line and in the results.
    pub name: &'static str,
    /// What it is.
    pub title: &'static str,
    pub(super) of: For,
    pub(super) kind: Kind,
    pub(super) body: usize,
    pub(super) connections: usize,
    pub(super) plan: Plan,
    pub(super) mode: Mode,
    pub(super) ramp: Duration,
    pub(super) warmup: Duration,
    pub(super) time: Duration,
    pub(super) workers: usize,
    /// Streams stay open, and who has them is looked at.
    pub(super) spread: bool,
    /// How often it is measured in a round with each router that starts quickly; with the others once.
    pub(super) slices: usize,
    /// Router and load have all cores in turn.
    pub(super) by_turns: bool,
}

impl Scenario {
    fn new(name: &'static str, title: &'static str, kind: Kind, connections: usize, time: Duration) -> Self {
        Self {
            name,
            title,
            of: For::Everyone,
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
            by_turns: false,
        }
    }

    pub(super) fn suits(&self, router: &Router) -> bool {
        match self.of {
            For::Everyone => true,
            For::Pd => router.is_pd(),
            For::MiniLb => matches!(router, Router::MiniLb { .. }),
        }
    }

    /// How often it is measured in a round with `router`.
    pub(super) fn slices(&self, router: &Router) -> usize {
        if router.starts_quickly() { self.slices } else { 1 }
    }

    /// Tokens of a stream, if it is one.
    pub(super) fn is_stream(&self) -> bool {
        matches!(self.kind, Kind::ChatStream | Kind::LogprobStream)
    }
}

/// What disturbs a machine comes and goes: routers in turn, each for some seconds, have their share of it.
const OPEN_SLICES: usize = 6;

/// All of them, measured for `time` each; `few_cores`: there are fewer than two workers and their load need.
pub(super) fn all(time: Duration, few_cores: bool) -> Vec<Scenario> {
    let new = |name, title, kind, connections| Scenario::new(name, title, kind, connections, time);
    // Real decode servers wait for prefill; without it, more bodies are in flight than there are connections.
    let plan = Plan { paired: true, ..Plan::default() };
    let body =
        |name, title, body, connections| Scenario { body, plan, ..new(name, title, Kind::Chat, connections) };
    let merged = Plan { tokens: 16, ..Plan::default() };
    let pd = |plan, scenario| Scenario { of: For::Pd, plan, ..scenario };
    let mut all = vec![
        new("chat_300b", "300 B chat, 64 connections", Kind::Chat, 64),
        new("stream_64", "streams of 64 tokens, a write each, 64 connections", Kind::ChatStream, 64),
        Scenario {
            plan: Plan { in_one_write: true, ..Plan::default() },
            ..new("stream_burst", "streams of 64 tokens in one write, 64 connections", Kind::ChatStream, 64)
        },
        body("body_64k", "64 KiB prompts, 32 connections", 64 << 10, 32),
        body("body_1m", "1 MiB bodies, 16 connections", 1 << 20, 16),
        body("body_8m", "8 MiB bodies, 8 connections", 8 << 20, 8),
        paced(time),
        pd(merged, new("logprobs", "512 prompt logprobs, 32 connections", Kind::Logprobs, 32)),
        pd(
            merged,
            new("logprob_stream", "512 prompt logprobs, 16 events, 16 connections", Kind::LogprobStream, 16),
        ),
        Scenario {
            plan: Plan { prefill_delay: Duration::from_millis(100), ..Plan::default() },
            mode: Mode::Open { rate: 100.0 },
            ..new("prefill_late", "streams, prefill answers 100 ms late, 100 a second", Kind::ChatStream, 64)
        },
        Scenario {
            mode: Mode::Open { rate: 500.0 },
            time: time * 3,
            slices: OPEN_SLICES,
            ..new("open_500", "300 B chat, 500 a second, open loop", Kind::Chat, 64)
        },
    ];
    all.extend(if few_cores { by_turns(time) } else { vec![two_workers(time)] });
    all.push(spread(time));
    all
}

fn two_workers(time: Duration) -> Scenario {
    let title = "300 B chat, 128 connections, two workers";
    Scenario { of: For::MiniLb, workers: 2, ..Scenario::new("two_workers", title, Kind::Chat, 128, time) }
}

/// Both numbers of workers, as only what is measured in the same way can be compared.
fn by_turns(time: Duration) -> Vec<Scenario> {
    let of = |name, title, workers| Scenario {
        of: For::MiniLb,
        workers,
        by_turns: true,
        warmup: Duration::from_secs(1),
        ..Scenario::new(name, title, Kind::Chat, 1000, time * 3)
    };
    vec![
        of("one_worker", "300 B chat, 1,000 connections, one worker, load and router by turns", 1),
        of("two_workers", "300 B chat, 1,000 connections, two workers, load and router by turns", 2),
    ]
}

/// Streams that last two seconds, begun over two seconds: at any time they are in all states.
fn paced(time: Duration) -> Scenario {
    let plan = Plan { tokens: 100, interval: Duration::from_millis(20), ..Plan::default() };
    let title = "1,000 streams, 20 ms a token";
    Scenario {
        plan,
        ramp: Duration::from_millis(1900),
        warmup: Duration::from_secs(2),
        ..Scenario::new("paced_1000", title, Kind::ChatStream, 1000, time * 3)
    }
}

fn spread(time: Duration) -> Scenario {
    let plan = Plan { tokens: 1000, interval: Duration::from_millis(20), ..Plan::default() };
    let title = "32 long streams, two workers";
    Scenario {
        of: For::MiniLb,
        plan,
        workers: 2,
        spread: true,
        ..Scenario::new("spread_32", title, Kind::ChatStream, 32, time)
    }
}
