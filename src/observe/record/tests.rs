//! What a record shows of a request in the end.

use std::sync::Mutex;

use super::*;
use crate::http1::{BodyProgress, WriteTiming};
use crate::upstream::{FleetSpec, InFlight, LiveFleet, Outcome};

/// What an observer has seen.
#[derive(Debug, Clone, Default, PartialEq)]
struct Seen {
    ending: Option<RequestEnd>,
    status: Option<u16>,
    bytes: (u64, u64),
    attempts: u32,
    faults: Vec<(Role, RetryCause)>,
    failed: Option<Role>,
    ran_on: [bool; 2],
    reached: Vec<Phase>,
}

#[derive(Default)]
struct Eyes(Mutex<Vec<Seen>>);

impl Observer for Eyes {
    fn finished(&self, request: &CompletedRequest<'_>) {
        let phases = [
            Phase::BodyRead,
            Phase::PrefillWritten,
            Phase::DecodeWritten,
            Phase::PrefillHead,
            Phase::DecodeHead,
            Phase::DecodeByte,
            Phase::PrefillEnd,
            Phase::ConnectionHandler,
        ];
        self.0.lock().unwrap().push(Seen {
            ending: Some(request.ending()),
            status: request.status(),
            bytes: (request.bytes_in(), request.bytes_out()),
            attempts: request.attempts(),
            faults: request.faults().iter().map(|fault| (fault.server.role(), fault.cause)).collect(),
            failed: request.failed_leg(),
            ran_on: [Role::Prefill, Role::Decode].map(|role| request.ran_on(role).is_some()),
            reached: phases.into_iter().filter(|phase| request.reached(*phase).is_some()).collect(),
        });
    }
}

fn pair() -> ServerPair {
    LiveFleet::new(FleetSpec::unknown(1, 1)).now().select_pair().unwrap()
}

/// What is seen of a request to which `happens`.
fn seen_of(happens: impl FnOnce(&Recorder, &mut Record, &ServerPair)) -> Seen {
    let eyes = Arc::new(Eyes::default());
    let recorder = Recorder::new(vec![Arc::clone(&eyes) as _]);
    let mut record = recorder.begin();
    record.is(Endpoint::Chat);
    record.body_read(7, true, None);
    let pair = pair();
    happens(&recorder, &mut record, &pair);
    assert!(eyes.0.lock().unwrap().is_empty(), "not before it is dropped");
    drop(record);
    let mut seen = eyes.0.lock().unwrap();
    assert_eq!(seen.len(), 1, "once");
    seen.remove(0)
}

fn legs(record: &mut Record, pair: &ServerPair) -> (LegRecord, LegRecord) {
    let attempt = record.sent_to(pair);
    (
        attempt.leg(InFlight::enter(Arc::clone(pair.prefill()))),
        attempt.leg(InFlight::enter(Arc::clone(pair.decode()))),
    )
}

fn sent() -> WriteTiming {
    WriteTiming { on_reused: true, written_at: Some(Instant::now()) }
}

#[test]
fn all_phases_of_a_request_that_went_well() {
    let seen = seen_of(|_, record, pair| {
        let (mut prefill, mut decode) = legs(record, pair);
        prefill.head_came(sent(), BodyProgress::Some);
        decode.head_came(sent(), BodyProgress::None);
        decode.body_came();
        record.answered(200);
        assert!(record.gives(3, false).is_some(), "the first piece");
        assert!(record.gives(4, false).is_none(), "another one");
        prefill.ends_as(Outcome::Completed);
        decode.ends_as(Outcome::Completed);
        record.completed();
    });
    assert_eq!(seen.reached.len(), 8, "{seen:?}");
    let expected = Seen {
        ending: Some(RequestEnd::Complete),
        status: Some(200),
        bytes: (7, 7),
        attempts: 1,
        reached: seen.reached.clone(),
        ..Seen::default()
    };
    assert_eq!(seen, expected);
}

#[test]
fn a_leg_that_is_cancelled_because_of_the_other_has_run_on() {
    for (failing, ran_on) in [(Role::Prefill, [false, true]), (Role::Decode, [true, false])] {
        let seen = seen_of(|_, record, pair| {
            let (mut prefill, mut decode) = legs(record, pair);
            let leg = if failing == Role::Prefill { &mut prefill } else { &mut decode };
            leg.ends_as(Outcome::Closed);
        });
        assert_eq!((seen.failed, seen.ran_on), (Some(failing), ran_on));
    }
}

#[test]
fn prefill_that_fails_late_has_failed_nothing() {
    let seen = seen_of(|_, record, pair| {
        let (mut prefill, mut decode) = legs(record, pair);
        decode.head_came(sent(), BodyProgress::Some);
        prefill.ends_as(Outcome::Closed);
    });
    assert_eq!((seen.failed, seen.ran_on), (None, [false; 2]));
}

#[test]
fn another_attempt_begins_anew_but_the_reason_stays() {
    let seen = seen_of(|_, record, pair| {
        let (mut prefill, mut decode) = legs(record, pair);
        prefill.head_came(sent(), BodyProgress::Some);
        decode.ends_as(Outcome::Refused);
        drop((prefill, decode));
        record.tried_again(pair.decode(), None);
        record.sent_to(pair);
    });
    assert_eq!((seen.attempts, seen.failed), (2, None));
    assert_eq!(seen.faults, [(Role::Decode, RetryCause::Status)]);
    assert_eq!(seen.reached, [Phase::BodyRead]);
}

#[test]
fn an_early_end_is_the_clients_or_at_the_end_the_routers() {
    assert_eq!(seen_of(|_, _, _| {}).ending, Some(RequestEnd::ClientLeft));
    assert_eq!(seen_of(|recorder, _, _| recorder.cut_off()).ending, Some(RequestEnd::CutOff));
    let completed = seen_of(|recorder, record, _| {
        record.completed();
        recorder.cut_off();
    });
    assert_eq!(completed.ending, Some(RequestEnd::Complete));
    let failed = seen_of(|_, record, _| {
        record.failed(&Error::NoServer(Role::Decode));
        record.failed(&Error::NotFound);
        record.completed();
    });
    assert_eq!(
        failed.ending,
        Some(RequestEnd::Failed("decode_unavailable")),
        "the first error, and one that was told to its end"
    );
}

#[test]
fn bytes_that_waited_for_prefill_say_nothing_of_the_router() {
    seen_of(|_, record, pair| {
        let attempt = record.sent_to(pair);
        attempt.leg(InFlight::enter(Arc::clone(pair.decode()))).head_came(sent(), BodyProgress::Some);
        attempt.merges();
        assert!(record.gives(1, false).is_none());
    });
}
