//! A client's body with some fields changed and others added: bytes that are shared by the legs, and not
//! copied if large.

use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut};

use super::bootstrap::BootstrapFields;
use super::shape::{BodyEdit, RangeChange};
use crate::http1::OutgoingBody;

/// Bodies up to this size are copied behind the head of each leg, which costs less than a second buffer in
/// the write.
pub(super) const COPY_UP_TO: usize = 4 << 10;

/// A request body as it was read: its chunks in order, not joined.
#[derive(Debug, Default)]
pub(crate) struct ClientBody {
    chunks: Vec<Bytes>,
    length: usize,
}

impl ClientBody {
    pub(crate) fn push(&mut self, chunk: Bytes) {
        self.length += chunk.len();
        self.chunks.push(chunk);
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// The body of a leg: with the changes of `edit`, and the bootstrap fields and `added` before the closing
    /// brace. Each of the fields in `added` has a comma before it.
    ///
    /// They go last because Python's JSON parsers (json, orjson, msgspec) keep the last of duplicate names.
    /// The client's own are removed nevertheless: SGLang's Rust server rejects a body with duplicates.
    pub(crate) fn edited(
        &self,
        edit: &BodyEdit,
        fields: &BootstrapFields,
        room: u64,
        added: &[u8],
    ) -> OutgoingBody {
        let max_added = fields.max_len() + added.len();
        let write = |out: &mut BytesMut| {
            fields.write(out, room, edit.needs_comma);
            out.put_slice(added);
        };
        // Joined here, because it is copied behind each leg's head anyway.
        if self.length <= COPY_UP_TO {
            let replacing: usize = edit.changes.iter().map(|change| change.by.len()).sum();
            let mut joined = BytesMut::with_capacity(self.length + replacing + max_added);
            self.for_each_before_close(edit, |chunk, range| joined.put_slice(&chunk[range]));
            write(&mut joined);
            self.for_each_in(edit.close..self.length, |chunk, range| joined.put_slice(&chunk[range]));
            return OutgoingBody::new(vec![joined.freeze()]);
        }
        // Each change splits at most one chunk in two and adds at most one. So does the insertion.
        let mut chunks = Vec::with_capacity(self.chunks.len() + 2 * edit.changes.len() + 2);
        self.for_each_before_close(edit, |chunk, range| chunks.push(chunk.slice(range)));
        let mut inserted = BytesMut::with_capacity(max_added);
        write(&mut inserted);
        chunks.push(inserted.freeze());
        self.for_each_in(edit.close..self.length, |chunk, range| chunks.push(chunk.slice(range)));
        OutgoingBody::new(chunks)
    }

    /// The body with the changes of `edit`, and nothing added.
    pub(crate) fn cut(&self, edit: &BodyEdit) -> OutgoingBody {
        if edit.changes.is_empty() {
            return OutgoingBody::new(self.chunks.clone());
        }
        let mut chunks = Vec::with_capacity(self.chunks.len() + 2 * edit.changes.len() + 1);
        self.for_each_before_close(edit, |chunk, range| chunks.push(chunk.slice(range)));
        self.for_each_in(edit.close..self.length, |chunk, range| chunks.push(chunk.slice(range)));
        OutgoingBody::new(chunks)
    }

    /// Visits what there is before the closing brace when the changes are made.
    fn for_each_before_close(&self, edit: &BodyEdit, mut visit: impl FnMut(&Bytes, Range<usize>)) {
        let mut from = 0;
        for RangeChange { range, by } in &edit.changes {
            self.for_each_in(from..range.start, &mut visit);
            if !by.is_empty() {
                visit(by, 0..by.len());
            }
            from = range.end;
        }
        self.for_each_in(from..edit.close, &mut visit);
    }

    /// Visits the part of each chunk that lies in `range` of the body.
    fn for_each_in(&self, range: Range<usize>, mut visit: impl FnMut(&Bytes, Range<usize>)) {
        let mut start = 0;
        for chunk in &self.chunks {
            let from = range.start.saturating_sub(start).min(chunk.len());
            let to = range.end.saturating_sub(start).min(chunk.len());
            // No empty slice: each would be an entry of every vectored write.
            if from < to {
                visit(chunk, from..to);
            }
            start += chunk.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::plan::{OwnIds, RequestPlan};
    use crate::wire::shape::{BodyInspector, BodyShape, Dialect};

    fn leg_of(client: &ClientBody, shape: &BodyShape, port: Option<u16>, room: u64) -> OutgoingBody {
        let plan = RequestPlan::sglang(&shape.fields, OwnIds::default());
        let bodies = plan.bodies(client, &BootstrapFields::new("h".into(), port), room);
        assert_eq!(bodies.prefill().pieces(), bodies.decode().pieces());
        bodies.decode().clone()
    }

    /// The rewritten body, of a body that was read in chunks of `size` bytes.
    fn rewritten(body: &str, size: usize) -> String {
        let mut inspector = BodyInspector::new(Dialect::Generate);
        let mut client = ClientBody::default();
        for chunk in body.as_bytes().chunks(size) {
            inspector.feed(chunk).unwrap();
            client.push(Bytes::copy_from_slice(chunk));
        }
        let shape = inspector.finish().unwrap();
        let leg = leg_of(&client, &shape, Some(1), 2);
        let sum: usize = leg.pieces().iter().map(Bytes::len).sum();
        assert_eq!(leg.len(), sum);
        String::from_utf8(leg.pieces().concat()).unwrap()
    }

    const FIELDS: &str = r#""bootstrap_host":"h","bootstrap_port":1,"bootstrap_room":2"#;

    #[test]
    fn fields_are_added_last_and_no_other_byte_changes() {
        for size in [1, 2, 7, 1_000] {
            assert_eq!(rewritten("{}", size), format!("{{{FIELDS}}}"));
            assert_eq!(rewritten(" { } \n", size), format!(" {{ {FIELDS}}} \n"));
            assert_eq!(rewritten(r#"{"a" : 1.00 }"#, size), format!(r#"{{"a" : 1.00 ,{FIELDS}}}"#));
        }
    }

    #[test]
    fn bootstrap_fields_of_the_client_are_removed() {
        for size in [1, 3, 1_000] {
            let rewritten = |body: &str| rewritten(body, size);
            let host = r#""bootstrap_host":"x""#;
            assert_eq!(rewritten(&format!("{{{host}}}")), format!("{{{FIELDS}}}"));
            assert_eq!(rewritten(&format!(r#"{{{host},"a":1}}"#)), format!(r#"{{"a":1,{FIELDS}}}"#));
            assert_eq!(
                rewritten(&format!(r#"{{"a":1,{host},"b":2}}"#)),
                format!(r#"{{"a":1,"b":2,{FIELDS}}}"#)
            );
            assert_eq!(rewritten(&format!(r#"{{"a":1 , {host} }}"#)), format!(r#"{{"a":1 ,{FIELDS}}}"#));
            assert_eq!(
                rewritten(&format!(r#"{{{host},"a":1,{host},{host},"b":2,{host},{host}}}"#)),
                format!(r#"{{"a":1,"b":2,{FIELDS}}}"#)
            );
            assert_eq!(rewritten(r#"{"bootstrap_\u0072oom":0,"a":1}"#), format!(r#"{{"a":1,{FIELDS}}}"#));
        }
    }

    #[test]
    fn a_nested_bootstrap_field_is_not_removed() {
        let body = r#"{"a":{"bootstrap_room":1}}"#;
        assert_eq!(rewritten(body, 1_000), format!(r#"{{"a":{{"bootstrap_room":1}},{FIELDS}}}"#));
    }

    #[test]
    fn a_large_body_is_not_copied() {
        let text = format!(r#"{{"bootstrap_room":1,"text":"{}"}}"#, "x".repeat(COPY_UP_TO));
        let original = Bytes::from(text);
        let mut inspector = BodyInspector::new(Dialect::Generate);
        inspector.feed(&original).unwrap();
        let mut client = ClientBody::default();
        client.push(original.clone());
        let leg = leg_of(&client, &inspector.finish().unwrap(), None, 1);
        let inside = original.as_ptr_range();
        let shared = leg.pieces().iter().filter(|chunk| inside.contains(&chunk.as_ptr()));
        assert_eq!(shared.map(Bytes::len).sum::<usize>(), original.len() - r#""bootstrap_room":1,"#.len());
    }
}
