//! What the event of a completed request contains.

use std::sync::Mutex;

use super::*;
use crate::http1::{BodyProgress, WriteTiming};
use crate::upstream::{Demand, FleetSpec, InFlight, LiveFleet, Outcome};

/// What an observer was shown of a request.
#[derive(Debug, Clone, Default, PartialEq)]
struct Seen {
    end: Option<RequestEnd>,
    status: Option<u16>,
    bytes: (u64, u64),
    attempts: u32,
    retries: Vec<(Role, RetryCause)>,
    failure: Option<(&'static str, String)>,
    progress: &'static str,
    failed_leg: Option<Role>,
    after_partner_failure: [bool; 2],
    reached: Vec<Phase>,
}

#[derive(Default)]
struct TestObserver(Mutex<Vec<Seen>>);

impl Observer for TestObserver {
    fn request_completed(&self, request: &CompletedRequest<'_>) {
        let phases = [
            Phase::BodyRead,
            Phase::PrefillWritten,
            Phase::DecodeWritten,
            Phase::PrefillHead,
            Phase::DecodeHead,
            Phase::DecodeByte,
            Phase::PrefillEnd,
            Phase::FirstByteToClient,
        ];
        self.0.lock().unwrap().push(Seen {
            end: Some(request.end),
            status: request.status(),
            bytes: (request.bytes_in(), request.bytes_out()),
            attempts: request.attempts(),
            retries: request.retries().iter().map(|retry| (retry.backend.role(), retry.cause)).collect(),
            failure: request.failure.as_ref().map(|failure| (failure.code, failure.cause.to_string())),
            progress: request.progress.as_str(),
            failed_leg: request.failed_leg,
            after_partner_failure: [Role::Prefill, Role::Decode]
                .map(|role| request.after_partner_failure(role).is_some()),
            reached: phases.into_iter().filter(|phase| request.time_to(*phase).is_some()).collect(),
        });
    }
}

fn pair() -> ServerPair {
    LiveFleet::new(FleetSpec::unknown(1, 1)).now().select_pair(Demand::default()).unwrap()
}

/// The event of a request to which `happens`.
fn completed(happens: impl FnOnce(&Recorder, &mut Record, &ServerPair)) -> Seen {
    let observer = Arc::new(TestObserver::default());
    let recorder = Recorder::new(vec![Arc::clone(&observer) as _]);
    let mut record = recorder.begin();
    record.set_endpoint(Endpoint::Chat);
    record.body_read(7, true, None);
    let pair = pair();
    happens(&recorder, &mut record, &pair);
    assert!(observer.0.lock().unwrap().is_empty(), "not before it is dropped");
    drop(record);
    let mut seen = observer.0.lock().unwrap();
    assert_eq!(seen.len(), 1, "once");
    seen.remove(0)
}

fn legs(record: &mut Record, pair: &ServerPair) -> (LegRecord, LegRecord) {
    let attempt = record.sample_and_prompt().0.begin_attempt(pair);
    (
        attempt.begin_leg(InFlight::enter(Arc::clone(pair.prefill()), None)),
        attempt.begin_leg(InFlight::enter(Arc::clone(pair.decode()), None)),
    )
}

fn written() -> WriteTiming {
    WriteTiming { on_reused: true, written_at: Some(Instant::now()) }
}

#[test]
fn a_request_that_succeeds_reaches_all_phases() {
    let seen = completed(|_, record, pair| {
        let (mut prefill, mut decode) = legs(record, pair);
        prefill.response_head_received(written(), BodyProgress::Some);
        decode.response_head_received(written(), BodyProgress::None);
        decode.body_received();
        record.set_status(200);
        assert!(record.first_chunk_sent(false).is_some());
        record.set_bytes_out(7);
        prefill.set_outcome(Outcome::Completed);
        decode.set_outcome(Outcome::Completed);
        record.set_complete();
    });
    assert_eq!(seen.reached.len(), 8, "{seen:?}");
    let expected = Seen {
        end: Some(RequestEnd::Complete),
        progress: "answer_body",
        status: Some(200),
        bytes: (7, 7),
        attempts: 1,
        reached: seen.reached.clone(),
        ..Seen::default()
    };
    assert_eq!(seen, expected);
}

#[test]
fn a_leg_that_is_cancelled_because_its_partner_failed_has_its_time_recorded() {
    for (failing, after_partner_failure) in [(Role::Prefill, [false, true]), (Role::Decode, [true, false])] {
        let seen = completed(|_, record, pair| {
            let (mut prefill, mut decode) = legs(record, pair);
            let leg = if failing == Role::Prefill { &mut prefill } else { &mut decode };
            leg.set_outcome(Outcome::Closed);
        });
        assert_eq!((seen.failed_leg, seen.after_partner_failure), (Some(failing), after_partner_failure));
    }
}

#[test]
fn a_failure_of_prefill_after_decodes_first_byte_is_ignored() {
    let seen = completed(|_, record, pair| {
        let (mut prefill, mut decode) = legs(record, pair);
        decode.response_head_received(written(), BodyProgress::Some);
        prefill.set_outcome(Outcome::Closed);
    });
    assert_eq!((seen.failed_leg, seen.after_partner_failure), (None, [false; 2]));
}

#[test]
fn a_retry_resets_the_phases_and_keeps_its_reason() {
    let seen = completed(|_, record, pair| {
        let (mut prefill, mut decode) = legs(record, pair);
        prefill.response_head_received(written(), BodyProgress::Some);
        decode.set_outcome(Outcome::Refused);
        drop((prefill, decode));
        record.sample_and_prompt().0.add_retry(pair.decode(), None);
        record.sample_and_prompt().0.begin_attempt(pair);
    });
    assert_eq!((seen.attempts, seen.failed_leg), (2, None));
    assert_eq!(seen.retries, [(Role::Decode, RetryCause::Status)]);
    assert_eq!(seen.reached, [Phase::BodyRead]);
}

#[test]
fn an_early_end_is_the_clients_until_the_grace_period_is_over() {
    assert_eq!(completed(|_, _, _| {}).end, Some(RequestEnd::ClientDisconnected));
    assert_eq!(completed(|recorder, _, _| recorder.set_grace_period_over()).end, Some(RequestEnd::Shutdown));
    let complete = completed(|recorder, record, _| {
        record.set_complete();
        recorder.set_grace_period_over();
    });
    assert_eq!(complete.end, Some(RequestEnd::Complete));
    let failed = completed(|_, record, _| {
        record.set_error(&Error::NoServer(Role::Decode));
        record.set_error(&Error::NotFound);
        record.set_complete();
    });
    assert_eq!(
        failed.end,
        Some(RequestEnd::Failed("decode_unavailable")),
        "the first error counts, and a complete error response is a failure"
    );
}

#[test]
fn a_merged_response_has_no_relay_time() {
    completed(|_, record, pair| {
        let attempt = record.sample_and_prompt().0.begin_attempt(pair);
        attempt
            .begin_leg(InFlight::enter(Arc::clone(pair.decode()), None))
            .response_head_received(written(), BodyProgress::Some);
        attempt.set_merged();
        assert!(record.first_chunk_sent(false).is_none());
    });
}

#[test]
fn a_backends_own_error_is_a_failure_with_a_code_and_its_url() {
    for (status, failing, code) in
        [(503, Role::Prefill, "server_error"), (404, Role::Decode, "server_refused")]
    {
        let seen = completed(|_, record, pair| {
            let (mut prefill, mut decode) = legs(record, pair);
            let leg = if failing == Role::Prefill { &mut prefill } else { &mut decode };
            leg.set_outcome(Outcome::Refused);
            record.set_status(status);
            record.first_chunk_sent(true);
            record.set_bytes_out(2);
            record.set_complete();
        });
        let cause = format!("{failing} server http://{failing}-0:80 answered {status}");
        assert_eq!((seen.failure, seen.progress), (Some((code, cause)), "answer_head"));
    }
    let own = completed(|_, record, _| {
        record.set_error(&Error::NotFound);
        record.set_status(404);
        record.set_complete();
    });
    assert_eq!((own.failure.unwrap().0, own.progress), ("not_found", "choice"));
}

#[test]
fn a_request_that_is_rejected_before_it_is_parsed_has_the_same_event() {
    let observer = Arc::new(TestObserver::default());
    let recorder = Recorder::new(vec![Arc::clone(&observer) as _]);
    let id = recorder.reject_before_parse(&Error::NotFound);
    assert_eq!(id.as_str().len(), 32);
    let seen = observer.0.lock().unwrap().remove(0);
    assert_eq!((seen.end, seen.status), (Some(RequestEnd::Failed("not_found")), Some(404)));
    assert_eq!((seen.progress, seen.reached), ("head", vec![]));
}

#[test]
fn a_request_for_several_samples_ends_as_its_decisive_copy_with_the_attempts_of_all() {
    let run = |decisive: Option<usize>| {
        completed(|_, record, pair| {
            let (all, mut copies) = record.begin_copies(3);
            copies[0].sample().begin_attempt(pair);
            let retried = copies[1].sample();
            retried.begin_attempt(pair);
            retried.add_retry(pair.decode(), None);
            let attempt = retried.begin_attempt(pair);
            let mut prefill = attempt.begin_leg(InFlight::enter(Arc::clone(pair.prefill()), None));
            prefill.set_outcome(Outcome::ServerError);
            drop(prefill);
            if let Some(copy) = decisive {
                all.set_decisive(copy);
            }
            record.set_status(503);
            record.first_chunk_sent(true);
            record.set_bytes_out(5);
            record.set_complete();
            // In any order; the third was never sent.
            copies.rotate_left(1);
        })
    };
    let (first, second) = (run(None), run(Some(1)));
    for seen in [&first, &second] {
        assert_eq!((seen.attempts, &seen.retries[..]), (3, &[(Role::Decode, RetryCause::Status)][..]));
        assert_eq!((seen.bytes, seen.status), ((7, 5), Some(503)));
        // The client's, whatever copy decides.
        assert_eq!(seen.reached, [Phase::BodyRead, Phase::FirstByteToClient]);
    }
    assert_eq!((first.failed_leg, second.failed_leg), (None, Some(Role::Prefill)));
    assert!(second.failure.is_some_and(|(_, cause)| cause.contains("prefill server")));
}

#[test]
fn a_copy_tells_how_much_of_its_prompt_is_missing_and_when_it_is_there() {
    completed(|_, record, pair| {
        let (_, mut copies) = record.begin_copies(2);
        let watch = copies[0].watch();
        assert_eq!(
            (watch.missing_bytes(), watch.has_prompt(), watch.server().is_some()),
            (None, false, false)
        );
        let attempt = copies[0].sample().begin_attempt(pair);
        assert_eq!((watch.missing_bytes(), watch.has_prompt()), (Some(0), false));
        assert!(Arc::ptr_eq(&watch.server().unwrap(), pair.decode()));
        attempt.begin_leg(InFlight::enter(Arc::clone(pair.prefill()), None)).set_outcome(Outcome::Completed);
        assert!(watch.has_prompt() && !copies[1].watch().has_prompt());
    });
}
