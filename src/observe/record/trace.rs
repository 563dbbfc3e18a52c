//! A request's place in a trace, and that of its legs: W3C's Trace Context.
//!
//! Each leg has a span of its own, whose id its server gets as the parent of its own
//! spans. What becomes of spans is not known here.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::http1::RawHeaders;
use crate::upstream::{Backend, ServerPair};

const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";

/// A request's place in a trace, and its legs.
pub(crate) struct Trace {
    pub(crate) id: u128,
    pub(crate) span: u64,
    pub(crate) parent: Option<u64>,
    flags: u8,
    pub(crate) state: Option<String>,
    pub(crate) begun: SystemTime,
    pub(crate) legs: Vec<LegSpan>,
}

/// One leg of one attempt. Times are counted from the request's head.
pub(crate) struct LegSpan {
    pub(crate) server: Arc<Backend>,
    pub(crate) span: u64,
    pub(crate) begun: Duration,
    /// The attempt that it was a part of is over, and there was another one.
    pub(crate) given_up: Option<Duration>,
}

impl Trace {
    /// Continues the client's trace, or begins one. `None`: the client wants none, and its headers pass as they are.
    /// What the servers get of it is written for each attempt.
    pub(crate) fn begin(fields: &mut RawHeaders, begun: SystemTime) -> Option<Self> {
        let parent = {
            let mut given = fields.all(TRACEPARENT);
            given.next().filter(|_| given.next().is_none()).and_then(parent)
        };
        if parent.as_ref().is_some_and(|parent| parent.flags & 1 == 0) {
            return None;
        }
        fields.remove(TRACEPARENT);
        let (id, span) = (fastrand::u128(1..), fastrand::u64(1..));
        let Some(Parent { trace, span: parent, flags }) = parent else {
            // Says something about a trace that nobody can tell.
            fields.remove(TRACESTATE);
            return Some(Self { id, span, parent: None, flags: 1, state: None, begun, legs: Vec::new() });
        };
        let state = fields.get(TRACESTATE).and_then(|state| String::from_utf8(state.to_vec()).ok());
        Some(Self { id: trace, span, parent: Some(parent), flags, state, begun, legs: Vec::new() })
    }

    /// The request is sent to a pair: each leg has a span, and its server is told of it in a header line. By role.
    pub(super) fn attempt(&mut self, pair: &ServerPair, now: Duration) -> [Vec<u8>; 2] {
        for leg in self.legs.iter_mut().filter(|leg| leg.given_up.is_none()) {
            leg.given_up = Some(now);
        }
        [pair.prefill(), pair.decode()].map(|server| {
            let span = fastrand::u64(1..);
            self.legs.push(LegSpan { server: Arc::clone(server), span, begun: now, given_up: None });
            format!("traceparent: 00-{:032x}-{span:016x}-{:02x}\r\n", self.id, self.flags).into_bytes()
        })
    }
}

/// What a `traceparent` says.
#[derive(Debug, PartialEq, Eq)]
struct Parent {
    trace: u128,
    span: u64,
    flags: u8,
}

/// Reads a `traceparent` as W3C's Trace Context has it.
fn parent(value: &[u8]) -> Option<Parent> {
    let value = std::str::from_utf8(value).ok()?;
    let mut parts = value.split('-');
    let mut hex = |digits: usize| {
        let part = parts.next().filter(|part| part.len() == digits)?;
        let is_lower_hex = part.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        if is_lower_hex { u128::from_str_radix(part, 16).ok() } else { None }
    };
    let (version, trace, span, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
    // Later versions may say more.
    let is_known = version < 0xff && (version > 0 || parts.next().is_none());
    let (span, flags) = (u64::try_from(span).ok()?, u8::try_from(flags).ok()?);
    (is_known && trace != 0 && span != 0).then_some(Parent { trace, span, flags })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const SPAN: &str = "00f067aa0ba902b7";

    #[test]
    fn a_parent_is_what_w3c_says() {
        let good = Parent {
            trace: 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736,
            span: 0x00f0_67aa_0ba9_02b7,
            flags: 1,
        };
        assert_eq!(parent(format!("00-{TRACE}-{SPAN}-01").as_bytes()), Some(good));
        assert!(parent(format!("01-{TRACE}-{SPAN}-00-more").as_bytes()).is_some());
        let zeros = "0".repeat(32);
        for bad in [
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("00-{TRACE}-{SPAN}-01-more"),
            format!("00-{TRACE}-{SPAN}"),
            format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            format!("00-{zeros}-{SPAN}-01"),
            format!("00-{TRACE}-{}-01", &zeros[..16]),
            format!("00-+{}-{SPAN}-01", &TRACE[1..]),
            String::new(),
        ] {
            assert_eq!(parent(bad.as_bytes()), None, "{bad}");
        }
    }
}
