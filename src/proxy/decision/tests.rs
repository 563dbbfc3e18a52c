//! All orders of events, and what must hold after each.
//!
//! [`Run`] plays the part of the legs and of the client: it knows which events can happen next, does what the
//! decision says, and checks the invariants, which are the functions named `check_…`.

use std::collections::HashSet;
use std::fmt::Write;
use std::time::{Duration, Instant};

use super::*;

const ROLES: [Role; 2] = [Role::Prefill, Role::Decode];

/// How far a leg's connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Link {
    Opening {
        may_be_idle: bool,
    },
    /// Nothing was written to it.
    Open {
        is_reused: bool,
    },
    Sent,
    Responding {
        is_stream: bool,
        is_success: bool,
    },
    /// The whole response was read.
    Ended,
    /// The whole response was read and is held, and goes to the client now.
    Held,
    Closed,
}

/// How a leg ended, as its server's counters say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum LegEnd {
    Completed,
    /// By a fault or a refusal of its own.
    Counted,
    Cancelled,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Client {
    Waits,
    /// It has the head of this leg's response.
    Started(Role),
    Complete,
    /// It got an error status.
    Error,
    /// Its response was cut.
    Cut,
    /// Another pair is chosen, which begins a run of its own.
    OtherPair,
    Left,
}

/// Anything that can happen next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Step {
    Leg(Role, LegEvent, Link),
    Time(Limit),
    /// The client disconnects, or the grace period of a shutdown is over.
    Cancel,
}

/// One order of events.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Run {
    decision: Decision,
    links: [Link; 2],
    /// How often the request was written to the servers.
    sent: [u8; 2],
    /// Pieces of data so far: two are as good as many.
    pieces: [u8; 2],
    ends: [Option<LegEnd>; 2],
    client: Client,
    /// A leg has reported an error or a refusal, and the client waits.
    is_decided: bool,
}

impl Run {
    fn new(is_merge: bool) -> Self {
        Self {
            decision: Decision::new(is_merge),
            links: [Link::Opening { may_be_idle: true }; 2],
            sent: [0; 2],
            pieces: [0; 2],
            ends: [None; 2],
            client: Client::Waits,
            is_decided: false,
        }
    }

    /// That of a plain server: there is nothing of prefill.
    fn single() -> Self {
        Self {
            decision: Decision::single(),
            links: [Link::Closed, Link::Opening { may_be_idle: true }],
            ends: [Some(LegEnd::Completed), None],
            ..Self::new(false)
        }
    }

    fn is_over(&self) -> bool {
        !matches!(self.client, Client::Waits | Client::Started(_))
    }

    /// All that can happen next.
    fn steps(&self) -> Vec<Step> {
        let mut steps = vec![Step::Cancel];
        // No server is waited for.
        if let Some(role) = ROLES.into_iter().find(|role| self.links[*role as usize] == Link::Held) {
            steps.push(Step::Leg(role, LegEvent::Ended, Link::Ended));
            return steps;
        }
        let limit = self.decision.limit();
        steps.push(Step::Time(limit));
        if !matches!(limit, Limit::Body | Limit::Deadline) {
            steps.push(Step::Time(Limit::Deadline));
        }
        for role in ROLES {
            let events = self.leg_events(role);
            steps.extend(events.into_iter().map(|(event, then)| Step::Leg(role, event, then)));
        }
        steps
    }

    /// What can happen on a leg, and how its connection is after that.
    fn leg_events(&self, role: Role) -> Vec<(LegEvent, Link)> {
        let stays = self.links[role as usize];
        match stays {
            Link::Opening { may_be_idle } => {
                let mut events = vec![
                    (LegEvent::Connected, Link::Open { is_reused: false }),
                    (LegEvent::ConnectFailed, Link::Closed),
                ];
                if may_be_idle {
                    events.push((LegEvent::Connected, Link::Open { is_reused: true }));
                }
                events
            }
            Link::Open { is_reused: true } => vec![(LegEvent::Stale, Link::Closed)],
            Link::Open { is_reused: false } => vec![(LegEvent::ConnectFailed, Link::Closed)],
            Link::Sent => {
                let accepted = |is_stream| {
                    (LegEvent::Accepted { is_stream }, Link::Responding { is_stream, is_success: true })
                };
                vec![
                    accepted(true),
                    accepted(false),
                    (LegEvent::Refused, Link::Responding { is_stream: false, is_success: false }),
                    (LegEvent::Broken, Link::Closed),
                    // Also on a new connection, which a leg never reports: the decision must not rely on it.
                    (LegEvent::Stale, Link::Closed),
                ]
            }
            Link::Responding { is_stream, is_success } => {
                let mut events = vec![(LegEvent::Ended, Link::Ended), (LegEvent::Broken, Link::Closed)];
                if self.pieces[role as usize] < 2 {
                    events.push((LegEvent::Data, stays));
                }
                // Decode's events are read only while a merge holds them.
                let is_read = role == Role::Prefill
                    || (self.decision.is_merge && self.decision.stage == Stage::Deciding);
                if is_stream && is_success && is_read && self.decision.decode != Phase::Ended {
                    let then = if role == Role::Prefill { Link::Closed } else { stays };
                    events.push((LegEvent::ErrorEvent, then));
                }
                events
            }
            Link::Held | Link::Ended | Link::Closed => Vec::new(),
        }
    }

    fn step(&mut self, step: Step) -> Action {
        let action = match step {
            Step::Cancel => {
                self.decision.on_cancel();
                self.client = Client::Left;
                Action::Wait
            }
            Step::Time(limit) => {
                let action = self.decision.on_limit(limit);
                if let Action::Fail(role) = action {
                    self.end_leg(role, LegEnd::Counted);
                }
                action
            }
            Step::Leg(role, event, then) => {
                self.links[role as usize] = then;
                self.observe(role, event);
                let action = self.decision.on(role, event);
                if let (Action::Fail(failed), LegEvent::Stale) = (action, event) {
                    self.end_leg(failed, LegEnd::Counted);
                }
                action
            }
        };
        self.carry_out(action);
        if self.is_over() {
            self.close_all();
        }
        self.check(step, action);
        action
    }

    /// What an event means for its leg alone.
    fn observe(&mut self, role: Role, event: LegEvent) {
        match event {
            LegEvent::Data => self.pieces[role as usize] += 1,
            LegEvent::Ended if self.ends[role as usize].is_none() => self.end_leg(role, LegEnd::Completed),
            LegEvent::Refused | LegEvent::ConnectFailed | LegEvent::Broken => {
                self.end_leg(role, LegEnd::Counted);
            }
            // Of decode, it is in the response that the client reads.
            LegEvent::ErrorEvent if role == Role::Prefill => self.end_leg(role, LegEnd::Counted),
            _ => {}
        }
        self.is_decided |= self.client == Client::Waits
            && matches!(
                event,
                LegEvent::Refused | LegEvent::ConnectFailed | LegEvent::Broken | LegEvent::ErrorEvent
            );
    }

    fn end_leg(&mut self, role: Role, end: LegEnd) {
        let known = &mut self.ends[role as usize];
        // A refusal whose body breaks is a refusal, as its status said.
        if *known != Some(LegEnd::Counted) {
            assert_eq!(*known, None, "{role} has ended already");
            *known = Some(end);
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Wait | Action::LogLateFailure => {}
            Action::SendBoth if self.decision.is_single => self.send(Role::Decode),
            Action::SendBoth => ROLES.into_iter().for_each(|role| self.send(role)),
            Action::SendAgain(role) => self.send(role),
            Action::Reconnect(role) => self.links[role as usize] = Link::Opening { may_be_idle: false },
            Action::OtherPair(_) => self.client = Client::OtherPair,
            Action::Relay(source) => self.client = Client::Started(source),
            Action::RelayMerged => self.client = Client::Started(Role::Decode),
            Action::RespondHiddenError => self.client = Client::Error,
            Action::Fail(_) => {
                self.client = if self.client == Client::Waits { Client::Error } else { Client::Cut };
            }
            Action::Finish => self.client = Client::Complete,
        }
        if let Client::Started(source) = self.client
            && self.links[source as usize] == Link::Ended
        {
            self.links[source as usize] = Link::Held;
        }
        for role in ROLES {
            if self.decision.is_over(role) {
                self.close(role);
            }
        }
    }

    fn send(&mut self, role: Role) {
        let is_open = matches!(self.links[role as usize], Link::Open { .. });
        assert!(is_open, "{role} has no connection to write to: {self:?}");
        self.sent[role as usize] += 1;
        self.links[role as usize] = Link::Sent;
    }

    fn close(&mut self, role: Role) {
        if self.ends[role as usize].is_none() {
            self.ends[role as usize] = Some(LegEnd::Cancelled);
        }
        self.links[role as usize] = Link::Closed;
    }

    /// The request is over: its future is dropped, but for a prefill leg that is drained.
    fn close_all(&mut self) {
        let drains = self.client == Client::Complete && self.decision.drains_prefill();
        self.close(Role::Decode);
        if !drains {
            self.close(Role::Prefill);
        }
    }

    fn check(&self, step: Step, action: Action) {
        let context = || format!("after {step:?}: {action:?}, {self:?}");
        self.check_that_the_client_is_told_at_once(&context);
        self.check_that_no_leg_runs_on(&context);
        self.check_that_nothing_is_replayed(step, action, &context);
        self.check_that_ends_are_true(step, action, &context);
        self.check_outcomes(action, &context);
    }

    /// The client has its response, or its error, as soon as it is decided: at once, or at the end of a grace
    /// of 100 ms. Never is it left to the deadline.
    fn check_that_the_client_is_told_at_once(&self, context: &impl Fn() -> String) {
        if self.is_decided && self.client == Client::Waits {
            assert_eq!(self.decision.limit(), Limit::HiddenError, "{}", context());
        }
    }

    /// No leg runs on after its request is over, except a healthy prefill that is drained. A refusal ends the
    /// other leg at once.
    fn check_that_no_leg_runs_on(&self, context: &impl Fn() -> String) {
        if let Client::Started(source) = self.client
            && matches!(self.links[source as usize], Link::Responding { is_success: false, .. })
        {
            assert_eq!(self.links[other(source) as usize], Link::Closed, "{}", context());
        }
        if self.is_over() {
            assert_eq!(self.links[Role::Decode as usize], Link::Closed, "{}", context());
            let is_closed = self.links[Role::Prefill as usize] == Link::Closed;
            assert!(is_closed || self.client == Client::Complete, "{}", context());
            assert!(is_closed || self.ends[Role::Prefill as usize].is_none(), "{}", context());
        }
    }

    /// Another pair is chosen only if nothing was written; another plain server also if the request was
    /// written to a connection that was closed as idle. A server gets the request a second time only after
    /// its kept-alive connection was found closed, and never a third time.
    fn check_that_nothing_is_replayed(&self, step: Step, action: Action, context: &impl Fn() -> String) {
        if let Action::OtherPair(_) = action {
            let was_closed = self.decision.is_single && self.sent == [0, 1];
            assert!(self.sent == [0, 0] || was_closed, "{}", context());
        }
        if let Action::SendBoth = action {
            assert_eq!(self.sent, [u8::from(!self.decision.is_single), 1], "{}", context());
        }
        if let Action::Reconnect(role) = action {
            assert!(matches!(step, Step::Leg(on, LegEvent::Stale, _) if on == role), "{}", context());
            assert!(self.sent[role as usize] <= 1 && self.client == Client::Waits, "{}", context());
        }
        assert!(self.sent.iter().all(|sent| *sent <= 2), "{}", context());
    }

    /// A failed response is never ended cleanly, and a complete one is never cut.
    fn check_that_ends_are_true(&self, step: Step, action: Action, context: &impl Fn() -> String) {
        let is_end = matches!(step, Step::Leg(_, LegEvent::Ended, _));
        assert_eq!(action == Action::Finish, self.client == Client::Complete, "{}", context());
        if action == Action::Finish {
            assert!(is_end, "{}", context());
        }
        if self.client == Client::Cut {
            let is_fault = matches!(
                step,
                Step::Time(_)
                    | Step::Leg(
                        _,
                        LegEvent::Broken | LegEvent::Stale | LegEvent::Refused | LegEvent::ErrorEvent,
                        _
                    )
            );
            assert!(is_fault, "{}", context());
        }
        if action == Action::RelayMerged {
            assert_eq!(self.ends[Role::Prefill as usize], Some(LegEnd::Completed), "{}", context());
        }
    }

    /// Each leg has exactly one outcome ([`end_leg`](Self::end_leg)), all have one in the end, and a leg that
    /// is named as failed is one that is at fault.
    fn check_outcomes(&self, action: Action, context: &impl Fn() -> String) {
        if let Action::Fail(role) | Action::OtherPair(role) | Action::Relay(role) = action
            && (action != Action::Relay(role) || matches!(self.links[role as usize], Link::Closed))
        {
            assert_eq!(self.ends[role as usize], Some(LegEnd::Counted), "{}", context());
        }
        if self.is_over() {
            let drains = self.links[Role::Prefill as usize] != Link::Closed;
            assert!(self.ends[Role::Decode as usize].is_some(), "{}", context());
            assert!(drains || self.ends[Role::Prefill as usize].is_some(), "{}", context());
        }
    }
}

#[derive(Default)]
struct Enumeration {
    states: HashSet<Run>,
    runs: usize,
    longest: usize,
}

impl Enumeration {
    /// Every state that can be reached, each once.
    fn reach(&mut self, from: Run, depth: usize) {
        if !self.states.insert(from.clone()) || from.is_over() {
            return;
        }
        self.longest = self.longest.max(depth);
        for step in from.steps() {
            let mut run = from.clone();
            run.step(step);
            self.reach(run, depth + 1);
        }
    }

    /// Every order of events, to its end or to `depth`.
    fn walk(&mut self, from: &Run, depth: usize) {
        if from.is_over() || depth == 0 {
            self.runs += 1;
            return;
        }
        for step in from.steps() {
            let mut run = from.clone();
            run.step(step);
            self.walk(&run, depth - 1);
        }
    }
}

#[test]
fn every_order_of_events_keeps_the_invariants() {
    let start = Instant::now();
    for is_merge in [false, true] {
        // All states first: that this ends shows that no order of events leads to a new one.
        let mut all = Enumeration::default();
        all.reach(Run::new(is_merge), 0);
        let mut orders = Enumeration::default();
        orders.walk(&Run::new(is_merge), 11);
        println!(
            "merge {is_merge}: {} states, {} orders of events, the longest way to a state has {} events",
            all.states.len(),
            orders.runs,
            all.longest
        );
        assert!(orders.runs >= 50_000, "{} orders", orders.runs);
        let clients: HashSet<Client> = all.states.iter().map(|run| run.client).collect();
        assert_eq!(clients.len(), 8, "a client is never in some state: {clients:?}");
    }
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

#[test]
fn every_order_of_events_of_a_plain_server_keeps_the_invariants() {
    let mut all = Enumeration::default();
    all.reach(Run::single(), 0);
    let mut orders = Enumeration::default();
    orders.walk(&Run::single(), 11);
    let clients: HashSet<Client> = all.states.iter().map(|run| run.client).collect();
    // All but the beginning of prefill's response.
    assert_eq!(clients.len(), 7, "a client is never in some state: {clients:?}");
    assert!(!clients.contains(&Client::Started(Role::Prefill)));
    assert!(orders.runs >= 200, "{} orders", orders.runs);
}

#[test]
fn a_plain_server_that_is_gone_with_its_idle_connection_leaves_the_request_to_another() {
    let after_reconnect = |mut run: Run| {
        play(&mut run, Role::Decode, LegEvent::Stale);
        play(&mut run, Role::Decode, LegEvent::ConnectFailed)
    };
    let mut single = Run::single();
    single.step(Step::Leg(Role::Decode, LegEvent::Connected, Link::Open { is_reused: true }));
    assert_eq!(after_reconnect(single), Action::OtherPair(Role::Decode));
    // Of a pair, prefill has the request.
    assert_eq!(after_reconnect(sent(false)), Action::Fail(Role::Decode));
}

/// A run in which both servers have the request.
fn sent(is_merge: bool) -> Run {
    let mut run = Run::new(is_merge);
    for role in ROLES {
        run.step(Step::Leg(role, LegEvent::Connected, Link::Open { is_reused: true }));
    }
    run
}

fn play(run: &mut Run, role: Role, event: LegEvent) -> Action {
    let (event, then) = *run
        .leg_events(role)
        .iter()
        .find(|(possible, _)| *possible == event)
        .unwrap_or_else(|| panic!("{event:?} cannot happen on {role} in {run:?}"));
    run.step(Step::Leg(role, event, then))
}

const STREAM: LegEvent = LegEvent::Accepted { is_stream: true };
const WHOLE: LegEvent = LegEvent::Accepted { is_stream: false };

/// The moments of the table in `docs/FAILURES.md`: what has happened, and whether the request needs a merge.
fn moments() -> Vec<(&'static str, Run)> {
    let after = |is_merge, events: &[(Role, LegEvent)]| {
        let mut run = sent(is_merge);
        for (role, event) in events {
            play(&mut run, *role, *event);
        }
        run
    };
    let (p, d) = (Role::Prefill, Role::Decode);
    let head_sent = |mut run: Run| {
        run.step(Step::Time(Limit::FirstEvent));
        run
    };
    vec![
        ("connections are being opened", Run::new(false)),
        ("both servers have the request", sent(false)),
        ("decode's head has arrived", after(false, &[(p, STREAM), (d, STREAM)])),
        ("the client has the head of the stream", head_sent(after(false, &[(p, STREAM), (d, STREAM)]))),
        ("decode's body has begun", after(false, &[(p, STREAM), (d, STREAM), (d, LegEvent::Data)])),
        ("a refusal of prefill is relayed", after(false, &[(p, LegEvent::Refused)])),
        ("merge: decode's head has arrived", after(true, &[(p, WHOLE), (d, WHOLE)])),
        ("merge: decode's events are held", after(true, &[(p, STREAM), (d, STREAM), (d, LegEvent::Data)])),
        ("merge: prefill's lists are there", after(true, &[(p, STREAM), (p, LegEvent::Ended)])),
        (
            "merge: the merged stream has begun",
            after(true, &[(p, STREAM), (d, STREAM), (d, LegEvent::Data), (p, LegEvent::Ended)]),
        ),
    ]
}

fn event_name(event: LegEvent) -> &'static str {
    match event {
        LegEvent::Connected => "is connected",
        LegEvent::ConnectFailed => "cannot be connected",
        LegEvent::Stale => "had closed the idle connection",
        LegEvent::Accepted { is_stream: true } => "starts a stream",
        LegEvent::Accepted { is_stream: false } => "starts a response",
        LegEvent::Refused => "responds with an error status",
        LegEvent::Data => "sends data",
        LegEvent::ErrorEvent => "sends an error event",
        LegEvent::Ended => "ends its response",
        LegEvent::Broken => "breaks the connection or the response",
    }
}

fn action_name(action: Action, after: &Run) -> String {
    let limit = match after.decision.limit() {
        Limit::FirstEvent => "; its head waits 100 ms for the first event",
        Limit::HiddenError => "; decode has 100 ms to respond",
        _ => "",
    };
    match action {
        Action::Wait => format!("nothing yet{limit}"),
        Action::SendBoth => "the request is written to both".into(),
        Action::Reconnect(role) => format!("{role} gets a new connection, once"),
        Action::SendAgain(role) => format!("the request is written to {role} again"),
        Action::OtherPair(_) => "another pair, or 502/504; the other server has seen nothing".into(),
        Action::Relay(role) if after.links[role as usize] == Link::Held => {
            format!("{role}'s response, complete")
        }
        Action::Relay(role) => format!("{role}'s response starts"),
        Action::RelayMerged => "the merged response starts".into(),
        Action::RespondHiddenError => "prefill's error, with its status".into(),
        Action::Fail(role) if after.client == Client::Error => format!("502 or 504 that names {role}"),
        Action::Fail(role) => format!("the response is cut, with an event that names {role}"),
        Action::LogLateFailure => "decode's response goes on; the failure is logged".into(),
        Action::Finish => "the response is complete".into(),
    }
}

/// The table of decisions: for each moment and each event, what follows.
fn table() -> String {
    let mut table = String::from("| moment | event | the client, or the other leg |\n|---|---|---|\n");
    for (moment, run) in moments() {
        for role in ROLES {
            for (event, then) in run.leg_events(role) {
                let mut after = run.clone();
                let action = after.step(Step::Leg(role, event, then));
                // Without what changes nothing.
                if action != Action::Wait || after.decision.limit() != run.decision.limit() {
                    let (event, action) = (event_name(event), action_name(action, &after));
                    writeln!(table, "| {moment} | {role} {event} | {action} |").unwrap();
                }
            }
        }
    }
    table
}

#[test]
fn failures_md_has_the_table_of_decisions() {
    let document = std::fs::read_to_string("docs/FAILURES.md").unwrap();
    let table = table();
    assert!(document.contains(&table), "docs/FAILURES.md must contain this table:\n{table}");
}
