//! The responses of a request's copies as one.

use bytes::{Bytes, BytesMut};

use super::{FuzzInput, data_of, is_json, split, split_at_random};
use crate::wire::samples::{MergeProgress, StreamMerger, merge_bodies};
use crate::wire::shape::Dialect;
use crate::wire::sse::single_data_line;

const COPIES: usize = 3;

/// The responses of three copies: JSON stays JSON, a stream ends at most once, and cuts change nothing. The
/// text's parts are the three bodies.
pub fn merge_samples(data: &[u8]) {
    let Some(input) = FuzzInput::new(data) else { return };
    let [dialect, seed, limit, ..] = input.options;
    let dialects = [Dialect::Generate, Dialect::Chat, Dialect::Completions];
    let dialect = dialects[usize::from(dialect) % dialects.len()];
    // Most limits are none to the recordings.
    let limit = if limit < 0x20 { usize::from(limit) } else { usize::MAX };
    let bodies: [&[u8]; COPIES] = input.parts();

    let merged = merge_bodies(dialect, bodies.map(Bytes::copy_from_slice).to_vec());
    if let Ok(merged) = merged
        && bodies.iter().all(|body| is_json(body))
    {
        assert!(is_json(&merged), "{}", merged.escape_ascii());
    }

    let (stream, progress) = merge(dialect, bodies.map(|body| vec![body]), limit);
    assert_eq!(
        merge(dialect, bodies.map(|body| split_at_random(body, seed)), limit),
        (stream.clone(), progress)
    );
    let (events, ..) = split(vec![&stream], usize::MAX);
    let is_end = |event: &&Bytes| single_data_line(event).is_some_and(|data| event[data] == *b"[DONE]");
    let ends = events.iter().filter(is_end).count();
    assert!(ends <= usize::from(matches!(progress, Some(MergeProgress::Complete | MergeProgress::Failed))));
    if bodies.iter().all(|body| data_of(body).iter().all(|data| is_json(data))) {
        for data in data_of(&stream) {
            assert!(is_json(&data), "{}", data.escape_ascii());
        }
    }
}

/// The merged stream, one copy's after the other's, and how it ended; `None` is an error.
fn merge(dialect: Dialect, copies: [Vec<&[u8]>; COPIES], limit: usize) -> (Vec<u8>, Option<MergeProgress>) {
    let mut merger = StreamMerger::new(dialect, COPIES, limit);
    let mut out = BytesMut::new();
    let mut progress = Some(MergeProgress::Open);
    for (copy, pieces) in copies.into_iter().enumerate() {
        for piece in pieces {
            if progress.is_some() {
                progress = merger.push(copy, piece, &mut out).ok();
            }
        }
        if progress.is_some() {
            progress = merger.end(copy, &mut out).ok();
        }
    }
    (out.to_vec(), progress)
}
