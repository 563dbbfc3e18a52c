//! Why a body is rejected, and the limits that the errors name.

use std::fmt;

/// The deepest nesting that is accepted: the limit of orjson, with which SGLang parses requests.
pub(super) const MAX_DEPTH: usize = 1_024;
/// Places of one body with fields that the router may change. Clients send one or two, if any; the bound
/// keeps a hostile body from costing two slices a field on each leg.
pub(super) const MAX_CHANGED_PLACES: usize = 64;

/// Why a body is rejected. `at` is an offset in bytes from the body's start.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum BodyError {
    Empty,
    ByteOrderMark,
    NotUtf8 {
        at: usize,
    },
    NotAnObject {
        found: &'static str,
    },
    Syntax {
        expected: &'static str,
        at: usize,
    },
    TooDeep {
        at: usize,
    },
    TooManyChangedPlaces,
    /// A field that clients may not send here.
    InternalField {
        name: &'static str,
    },
    Truncated {
        at: usize,
    },
}

impl BodyError {
    /// The error for a body that does not start with `{`, as far as its first chunk shows what it is instead.
    pub(super) fn not_an_object(text: &[u8], at: usize) -> Self {
        let found = match text {
            [b'[', ..] => "an array",
            [b'"', ..] => "a string",
            [b'0'..=b'9' | b'-', ..] => "a number",
            _ if text.starts_with(b"true") || text.starts_with(b"false") => "true or false",
            _ if text.starts_with(b"null") => "null",
            _ => return Self::Syntax { expected: "'{'", at },
        };
        Self::NotAnObject { found }
    }
}

impl fmt::Display for BodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("the body is empty; a JSON object is expected"),
            Self::ByteOrderMark => {
                f.write_str("the body begins with a byte order mark, which JSON does not allow")
            }
            Self::NotUtf8 { at } => write!(f, "the body is not UTF-8 at byte {at}"),
            Self::NotAnObject { found } => write!(f, "the body must be a JSON object, not {found}"),
            Self::Syntax { expected, at } => {
                write!(f, "the body is not JSON: expected {expected} at byte {at}")
            }
            Self::TooDeep { at } => {
                write!(f, "the body is nested deeper than {MAX_DEPTH} levels at byte {at}")
            }
            Self::TooManyChangedPlaces => write!(
                f,
                "the body has fields that the router removes or reads, such as bootstrap_* and rid, in over \
                 {MAX_CHANGED_PLACES} places"
            ),
            Self::InternalField { name } => {
                write!(f, "the field {name} is for servers only and not accepted here (--internal-fields)")
            }
            Self::Truncated { at } => {
                write!(f, "the body is not JSON: it ends at byte {at} inside the object")
            }
        }
    }
}
