//! A client's body with the bootstrap fields added: the same bytes for both
//! legs, shared, never copied when large.

use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut};

use super::bootstrap::BootstrapFields;
use super::shape::Edit;
use crate::http1::OutgoingBody;

/// Up to this size a body is copied behind the head of each leg, which costs less than handing over two pieces.
pub(super) const COPY_UP_TO: usize = 4 << 10;

/// A request body as it came: pieces in order, not joined.
#[derive(Debug, Default)]
pub(crate) struct ClientBody {
    pieces: Vec<Bytes>,
    length: usize,
}

impl ClientBody {
    pub(crate) fn push(&mut self, piece: Bytes) {
        self.length += piece.len();
        self.pieces.push(piece);
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// The body for both legs: everything but the cuts, with the fields in front of the closing brace.
    pub(crate) fn with_fields(&self, edit: &Edit, fields: &BootstrapFields, room: u64) -> OutgoingBody {
        if self.length <= COPY_UP_TO {
            let mut joined = BytesMut::with_capacity(self.length + fields.max_len());
            self.before_close(edit, |piece, range| joined.put_slice(&piece[range]));
            fields.put(&mut joined, room, edit.after_others);
            self.each(edit.close..self.length, |piece, range| joined.put_slice(&piece[range]));
            return OutgoingBody::new(vec![joined.freeze()]);
        }
        let mut pieces = Vec::with_capacity(self.pieces.len() + edit.cuts.len() + 2);
        self.before_close(edit, |piece, range| pieces.push(piece.slice(range)));
        let mut added = BytesMut::with_capacity(fields.max_len());
        fields.put(&mut added, room, edit.after_others);
        pieces.push(added.freeze());
        self.each(edit.close..self.length, |piece, range| pieces.push(piece.slice(range)));
        OutgoingBody::new(pieces)
    }

    /// Visits what is kept of the body before its closing brace.
    fn before_close(&self, edit: &Edit, mut visit: impl FnMut(&Bytes, Range<usize>)) {
        let mut from = 0;
        for cut in &edit.cuts {
            self.each(from..cut.start, &mut visit);
            from = cut.end;
        }
        self.each(from..edit.close, &mut visit);
    }

    /// Visits the part of every piece that lies in `range` of the body.
    fn each(&self, range: Range<usize>, mut visit: impl FnMut(&Bytes, Range<usize>)) {
        let mut start = 0;
        for piece in &self.pieces {
            let from = range.start.saturating_sub(start).min(piece.len());
            let to = range.end.saturating_sub(start).min(piece.len());
            if from < to {
                visit(piece, from..to);
            }
            start += piece.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::shape::{Dialect, Inspector};

    /// The rewritten body, of a body that came in pieces of `step` bytes.
    fn rewritten(body: &str, step: usize) -> String {
        let mut inspector = Inspector::new(Dialect::Generate);
        let mut client = ClientBody::default();
        for piece in body.as_bytes().chunks(step) {
            inspector.feed(piece).unwrap();
            client.push(Bytes::copy_from_slice(piece));
        }
        let shape = inspector.finish().unwrap();
        let leg = client.with_fields(&shape.edit, &BootstrapFields::new("h".into(), Some(1)), 2);
        let sum: usize = leg.pieces().iter().map(Bytes::len).sum();
        assert_eq!(leg.len(), sum);
        String::from_utf8(leg.pieces().concat()).unwrap()
    }

    const FIELDS: &str = r#""bootstrap_host":"h","bootstrap_port":1,"bootstrap_room":2"#;

    #[test]
    fn fields_come_last_and_every_other_byte_stays() {
        for step in [1, 2, 7, 1_000] {
            assert_eq!(rewritten("{}", step), format!("{{{FIELDS}}}"));
            assert_eq!(rewritten(" { } \n", step), format!(" {{ {FIELDS}}} \n"));
            assert_eq!(rewritten(r#"{"a" : 1.00 }"#, step), format!(r#"{{"a" : 1.00 ,{FIELDS}}}"#));
        }
    }

    #[test]
    fn own_bootstrap_fields_are_cut_wherever_they_stand() {
        for step in [1, 3, 1_000] {
            let cut = |body: &str| rewritten(body, step);
            let host = r#""bootstrap_host":"x""#;
            assert_eq!(cut(&format!("{{{host}}}")), format!("{{{FIELDS}}}"));
            assert_eq!(cut(&format!(r#"{{{host},"a":1}}"#)), format!(r#"{{"a":1,{FIELDS}}}"#));
            assert_eq!(cut(&format!(r#"{{"a":1,{host},"b":2}}"#)), format!(r#"{{"a":1,"b":2,{FIELDS}}}"#));
            assert_eq!(cut(&format!(r#"{{"a":1 , {host} }}"#)), format!(r#"{{"a":1 ,{FIELDS}}}"#));
            assert_eq!(
                cut(&format!(r#"{{{host},"a":1,{host},{host},"b":2,{host},{host}}}"#)),
                format!(r#"{{"a":1,"b":2,{FIELDS}}}"#)
            );
            assert_eq!(cut(r#"{"bootstrap_\u0072oom":0,"a":1}"#), format!(r#"{{"a":1,{FIELDS}}}"#));
        }
    }

    #[test]
    fn a_nested_bootstrap_field_is_not_ours() {
        let body = r#"{"a":{"bootstrap_room":1}}"#;
        assert_eq!(rewritten(body, 1_000), format!(r#"{{"a":{{"bootstrap_room":1}},{FIELDS}}}"#));
    }

    #[test]
    fn a_large_body_is_shared_and_not_copied() {
        let text = format!(r#"{{"bootstrap_room":1,"text":"{}"}}"#, "x".repeat(COPY_UP_TO));
        let original = Bytes::from(text);
        let mut inspector = Inspector::new(Dialect::Generate);
        inspector.feed(&original).unwrap();
        let mut client = ClientBody::default();
        client.push(original.clone());
        let leg =
            client.with_fields(&inspector.finish().unwrap().edit, &BootstrapFields::new("h".into(), None), 1);
        let inside = original.as_ptr_range();
        let shared = leg.pieces().iter().filter(|piece| inside.contains(&piece.as_ptr()));
        assert_eq!(shared.map(Bytes::len).sum::<usize>(), original.len() - r#""bootstrap_room":1,"#.len());
    }
}
