//! A request's place in a trace, and that of its legs, as W3C's Trace Context defines it.
//!
//! Each leg has a span of its own. Its backend gets that span's id in `traceparent`, as the
//! parent of the spans that SGLang makes. How spans are exported is not known here.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::http1::RawHeaders;
use crate::upstream::{Backend, ServerPair};

const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";
/// The flag of a `traceparent` that says that the caller records its spans.
const SAMPLED: u8 = 1;

/// A request's place in a trace, and the spans of its legs.
pub(crate) struct Trace {
    pub(crate) id: u128,
    pub(crate) span: u64,
    /// The client's span. `None`: the trace starts at the router.
    pub(crate) parent: Option<u64>,
    flags: u8,
    pub(crate) state: Option<String>,
    pub(crate) started_at: SystemTime,
    pub(crate) legs: Vec<LegSpan>,
}

/// The span of one leg of one attempt. Times are counted from the request's head.
pub(crate) struct LegSpan {
    pub(crate) backend: Arc<Backend>,
    pub(crate) span: u64,
    pub(crate) started: Duration,
    /// When the next attempt started, if the request was retried after this one.
    pub(crate) retried: Option<Duration>,
}

impl Trace {
    /// Continues the client's trace, or starts one. `None`: the client does not sample this trace, and its
    /// headers are forwarded unchanged. Otherwise `traceparent` is removed, as each leg gets one of its own.
    pub(crate) fn start(headers: &mut RawHeaders, started_at: SystemTime) -> Option<Self> {
        let parent = {
            let mut values = headers.all(TRACEPARENT);
            // More than one is invalid by the specification.
            values.next().filter(|_| values.next().is_none()).and_then(parse_parent)
        };
        if parent.as_ref().is_some_and(|parent| parent.flags & SAMPLED == 0) {
            return None;
        }
        headers.remove(TRACEPARENT);
        let (id, span) = (fastrand::u128(1..), fastrand::u64(1..));
        let Some(TraceParent { trace, span: parent, flags }) = parent else {
            // By the specification a state without a valid parent is discarded.
            headers.remove(TRACESTATE);
            let (parent, flags, state) = (None, SAMPLED, None);
            return Some(Self { id, span, parent, flags, state, started_at, legs: Vec::new() });
        };
        let state = headers.get(TRACESTATE).and_then(|state| String::from_utf8(state.to_vec()).ok());
        Some(Self { id: trace, span, parent: Some(parent), flags, state, started_at, legs: Vec::new() })
    }

    /// For a copy of the request, whose legs are spans of the same trace.
    pub(super) fn of_copy(&self) -> Self {
        let Self { id, span, parent, flags, started_at, ref state, legs: _ } = *self;
        Self { id, span, parent, flags, state: state.clone(), started_at, legs: Vec::new() }
    }

    /// Starts the spans of an attempt's legs. Returns the header line for each leg's backend.
    pub(super) fn begin_attempt(&mut self, pair: &ServerPair, now: Duration) -> [Vec<u8>; 2] {
        for leg in self.legs.iter_mut().filter(|leg| leg.retried.is_none()) {
            leg.retried = Some(now);
        }
        let mut headers = <[Vec<u8>; 2]>::default();
        for backend in pair.servers() {
            let span = fastrand::u64(1..);
            self.legs.push(LegSpan { backend: Arc::clone(backend), span, started: now, retried: None });
            let line = format!("traceparent: 00-{:032x}-{span:016x}-{:02x}\r\n", self.id, self.flags);
            headers[backend.role().leg()] = line.into_bytes();
        }
        headers
    }
}

/// The fields of a `traceparent`.
#[derive(Debug, PartialEq, Eq)]
struct TraceParent {
    trace: u128,
    span: u64,
    flags: u8,
}

/// Parses a `traceparent`. `None` if it is invalid by the specification, which then demands a new trace.
fn parse_parent(value: &[u8]) -> Option<TraceParent> {
    let value = std::str::from_utf8(value).ok()?;
    let mut parts = value.split('-');
    let mut hex = |digits: usize| {
        let part = parts.next().filter(|part| part.len() == digits)?;
        // `from_str_radix` also takes upper case and a sign, which the specification does not.
        let is_lower_hex = part.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        if is_lower_hex { u128::from_str_radix(part, 16).ok() } else { None }
    };
    let (version, trace, span, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
    // Later versions may append fields; version 0 has none, and 255 is reserved.
    let is_known = version < 0xff && (version > 0 || parts.next().is_none());
    let (span, flags) = (u64::try_from(span).ok()?, u8::try_from(flags).ok()?);
    (is_known && trace != 0 && span != 0).then_some(TraceParent { trace, span, flags })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const SPAN: &str = "00f067aa0ba902b7";

    #[test]
    fn a_traceparent_is_parsed_as_w3c_defines_it() {
        let good = TraceParent {
            trace: 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736,
            span: 0x00f0_67aa_0ba9_02b7,
            flags: 1,
        };
        assert_eq!(parse_parent(format!("00-{TRACE}-{SPAN}-01").as_bytes()), Some(good));
        assert!(parse_parent(format!("01-{TRACE}-{SPAN}-00-more").as_bytes()).is_some());
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
            assert_eq!(parse_parent(bad.as_bytes()), None, "{bad}");
        }
    }
}
