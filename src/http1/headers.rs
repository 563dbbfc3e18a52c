//! The header lines of a message: their bytes, and where in them names and values are.
//!
//! There is no map: most lines are only forwarded, and few are looked up. A name that has a meaning for the
//! router is recognised once, when the head is parsed. What the headers mean is for the parsers of heads and
//! for `wire`.

use std::fmt;

/// Header lines in their order and spelling.
#[derive(Clone, Default)]
pub(crate) struct RawHeaders {
    text: Vec<u8>,
    lines: Vec<HeaderSpans>,
    /// A bit for each [`HeaderId`] among the lines, also of removed ones: a lookup without a hit is one test.
    seen: u32,
}

/// Where a line's name and value are in the text.
#[derive(Clone, Copy)]
pub(crate) struct HeaderSpans {
    id: HeaderId,
    name: Span,
    value: Span,
}

/// Start and end in the text. `u32` is enough: a head has at most 64 KiB.
type Span = (u32, u32);

/// A header name that has a meaning for the router.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeaderId {
    /// Any other name.
    Other,
    AcceptEncoding,
    /// `Access-Control-…`
    AccessControl,
    Authorization,
    /// `X-Body-Compressed`: with `SGLANG_ENABLE_REQUEST_DECOMPRESSION=1` SGLang
    /// decompresses the body (since 0.5.15).
    BodyCompressed,
    Connection,
    ContentEncoding,
    ContentLength,
    ContentType,
    /// `X-Data-Parallel-Rank`
    DataParallelRank,
    Date,
    Expect,
    Host,
    /// A hop-by-hop header that has no variant of its own and that `Connection` need not name.
    HopByHop,
    Origin,
    /// `X-Override-…`, see [`OVERRIDE_PREFIX`].
    Override,
    /// `X-Request-Id`
    RequestId,
    TransferEncoding,
}

/// With `SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES=1` SGLang takes bootstrap rooms, DP ranks and request ids
/// from these headers instead of the body (since 0.5.15).
const OVERRIDE_PREFIX: &[u8] = b"x-override-";
const ACCESS_CONTROL_PREFIX: &[u8] = b"access-control-";

impl HeaderId {
    /// By length first: few header names share one, so hardly any name is compared
    /// with more than one of these.
    pub(crate) fn of(name: &[u8]) -> Self {
        let names: &[(&[u8], Self)] = match name.len() {
            2 => &[(b"te", Self::HopByHop)],
            4 => &[(b"host", Self::Host), (b"date", Self::Date)],
            6 => &[(b"expect", Self::Expect), (b"origin", Self::Origin)],
            // Trailers are dropped in both directions, so `Trailer` would announce what never comes.
            7 => &[(b"trailer", Self::HopByHop), (b"upgrade", Self::HopByHop)],
            10 => &[(b"connection", Self::Connection), (b"keep-alive", Self::HopByHop)],
            12 => &[(b"content-type", Self::ContentType), (b"x-request-id", Self::RequestId)],
            13 => &[(b"authorization", Self::Authorization)],
            14 => &[(b"content-length", Self::ContentLength)],
            15 => &[(b"accept-encoding", Self::AcceptEncoding)],
            16 => &[(b"content-encoding", Self::ContentEncoding), (b"proxy-connection", Self::HopByHop)],
            17 => &[
                (b"transfer-encoding", Self::TransferEncoding),
                (b"x-body-compressed", Self::BodyCompressed),
            ],
            // For one proxy only (RFC 9110, section 11.7): a server must not see a client's credentials for
            // it.
            18 => &[(b"proxy-authenticate", Self::HopByHop)],
            19 => &[(b"proxy-authorization", Self::HopByHop)],
            20 => &[(b"x-data-parallel-rank", Self::DataParallelRank)],
            _ => &[],
        };
        let found = names.iter().find(|(known, _)| eq_name(name, known));
        found.map_or_else(|| Self::of_prefix(name), |(_, id)| *id)
    }

    fn of_prefix(name: &[u8]) -> Self {
        let has_prefix = |prefix: &[u8]| name.get(..prefix.len()).is_some_and(|start| eq_name(start, prefix));
        if has_prefix(OVERRIDE_PREFIX) {
            Self::Override
        } else if has_prefix(ACCESS_CONTROL_PREFIX) {
            Self::AccessControl
        } else {
            Self::Other
        }
    }

    /// Whether only one name has this id.
    fn is_single_name(self) -> bool {
        !matches!(self, Self::Other | Self::AccessControl | Self::HopByHop | Self::Override)
    }

    /// Whether the header is for one connection only, and not forwarded (RFC 9110, section 7.6.1).
    pub(crate) fn is_hop_by_hop(self) -> bool {
        matches!(self, Self::Connection | Self::TransferEncoding | Self::HopByHop)
    }

    fn bit(self) -> u32 {
        // 18 variants, so 32 bits are enough.
        1 << self as u32
    }
}

/// Compares a name with a known one of the same length, in any case. Known names have only lower-case
/// letters and hyphens, and of the bytes that a name may have (RFC 9110, section 5.6.2) the bit 0x20
/// maps no other byte to these. The comparison does not stop at the first difference, so that the
/// compiler can vectorise it.
fn eq_name(name: &[u8], known: &[u8]) -> bool {
    // Most other names of the same length differ in the first letter.
    name[0] | 0x20 == known[0]
        && name.iter().zip(known).fold(0, |differs, (a, b)| differs | (a | 0x20) ^ b) == 0
}

/// The bit of a name in a filter of 64 bits, from its length and first letter. Names
/// with different bits differ.
pub(crate) fn name_bit(name: &[u8]) -> u64 {
    let letter = name.first().map_or(0, |letter| letter | 0x20);
    1 << ((name.len() * 31 + usize::from(letter)) % 64)
}

/// What a lookup can go by: the id of a known name, or any name.
pub(crate) trait HeaderKey: Copy {
    /// `false`: no line can match, so the lookup ends here.
    fn may_be_in(self, headers: &RawHeaders) -> bool;
    fn matches(self, line: &HeaderSpans, text: &[u8]) -> bool;
}

impl HeaderKey for HeaderId {
    fn may_be_in(self, headers: &RawHeaders) -> bool {
        headers.seen & self.bit() != 0
    }

    fn matches(self, line: &HeaderSpans, _: &[u8]) -> bool {
        line.id == self
    }
}

/// A name in any case.
impl HeaderKey for &str {
    fn may_be_in(self, _: &RawHeaders) -> bool {
        true
    }

    fn matches(self, line: &HeaderSpans, text: &[u8]) -> bool {
        let (start, end) = line.name;
        (end - start) as usize == self.len()
            && text[start as usize..end as usize].eq_ignore_ascii_case(self.as_bytes())
    }
}

/// One header line.
#[derive(Clone, Copy)]
pub(crate) struct RawHeader<'a> {
    pub(crate) id: HeaderId,
    pub(crate) name: &'a [u8],
    pub(crate) value: &'a [u8],
    /// Name, separator and value, without the end of the line.
    pub(crate) text: &'a [u8],
}

/// Capacity for the two lines that the router may add, a request id and the servers' key, and for their
/// bytes. With it, adding them does not reallocate.
const SPARE_LINES: usize = 2;
const SPARE: usize = 160;

impl RawHeaders {
    /// The header lines of a parsed head. The slices in `parsed` point into `head`.
    pub(super) fn parsed(head: &[u8], parsed: &[httparse::Header<'_>]) -> Self {
        // No offset is cut off: the callers bound heads to a few times MAX_HEAD.
        let span = |part: &[u8]| {
            let start = part.as_ptr() as usize - head.as_ptr() as usize;
            (start as u32, (start + part.len()) as u32)
        };
        // The whole head in one copy, so that httparse's slices become offsets by a subtraction.
        let mut text = Vec::with_capacity(head.len() + SPARE);
        text.extend_from_slice(head);
        let mut lines = Vec::with_capacity(parsed.len() + SPARE_LINES);
        let mut seen = 0;
        for line in parsed {
            let id = HeaderId::of(line.name.as_bytes());
            seen |= id.bit();
            lines.push(HeaderSpans { id, name: span(line.name.as_bytes()), value: span(line.value) });
        }
        Self { text, lines, seen }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = RawHeader<'_>> {
        self.lines.iter().map(|line| self.line(line))
    }

    /// The values of all lines with this name.
    pub(crate) fn all<K: HeaderKey>(&self, name: K) -> impl Iterator<Item = &[u8]> + use<'_, K> {
        // An empty slice instead of an early return keeps one iterator type.
        let lines = if name.may_be_in(self) { &self.lines[..] } else { &[] };
        let found = lines.iter().filter(move |line| name.matches(line, &self.text));
        found.map(|line| &self.text[line.value.0 as usize..line.value.1 as usize])
    }

    /// The value of the first line with this name.
    pub(crate) fn get(&self, name: impl HeaderKey) -> Option<&[u8]> {
        self.all(name).next()
    }

    /// Whether one of several names may be here: `filter` has the [bit](name_bit) of each. One pass for all
    /// of them, and hardly ever a lookup of each.
    pub(crate) fn may_have(&self, filter: u64) -> bool {
        // Computed here and not kept for each line: by default only requests without a valid x-request-id
        // ask.
        let bit = |line: &HeaderSpans| name_bit(&self.text[line.name.0 as usize..line.name.1 as usize]);
        self.lines.iter().any(|line| bit(line) & filter != 0)
    }

    pub(crate) fn has(&self, name: impl HeaderKey) -> bool {
        self.get(name).is_some()
    }

    /// The options in all `Connection` lines (RFC 9110, section 7.6.1), without the white space around them.
    pub(crate) fn connection_options(&self) -> impl Iterator<Item = &[u8]> {
        self.all(HeaderId::Connection)
            .flat_map(|list| list.split(|byte| *byte == b','))
            .map(<[u8]>::trim_ascii)
    }

    pub(crate) fn len(&self) -> usize {
        self.lines.len()
    }

    /// Removes all lines with this name. Their bytes stay in the text, which is never compacted.
    pub(crate) fn remove(&mut self, name: impl HeaderKey) {
        if name.may_be_in(self) {
            self.lines.retain(|line| !name.matches(line, &self.text));
        }
    }

    /// Keeps only the lines for which `keep` is true.
    pub(crate) fn retain(&mut self, keep: impl Fn(&RawHeader<'_>) -> bool) {
        // Taken out, because `keep` borrows the text while lines are removed.
        let mut lines = std::mem::take(&mut self.lines);
        lines.retain(|line| keep(&self.line(line)));
        self.lines = lines;
    }

    /// Adds a line. Name and value must be valid: nothing is checked or escaped.
    pub(crate) fn add(&mut self, name: &[u8], value: &[u8]) {
        self.add_with_id(HeaderId::of(name), name, value);
    }

    fn add_with_id(&mut self, id: HeaderId, name: &[u8], value: &[u8]) {
        self.seen |= id.bit();
        let name = self.append(name);
        self.text.extend_from_slice(b": ");
        let value = self.append(value);
        self.lines.push(HeaderSpans { id, name, value });
    }

    /// Adds a line and removes all others with its name.
    pub(crate) fn set(&mut self, name: &str, value: &[u8]) {
        let id = HeaderId::of(name.as_bytes());
        // An id of a group would remove its other names too.
        if id.is_single_name() {
            self.remove(id);
        } else {
            self.remove(name);
        }
        self.add_with_id(id, name.as_bytes(), value);
    }

    fn append(&mut self, part: &[u8]) -> Span {
        let start = self.text.len();
        self.text.extend_from_slice(part);
        (start as u32, self.text.len() as u32)
    }

    fn line(&self, line: &HeaderSpans) -> RawHeader<'_> {
        let part = |start: u32, end: u32| &self.text[start as usize..end as usize];
        RawHeader {
            id: line.id,
            name: part(line.name.0, line.name.1),
            value: part(line.value.0, line.value.1),
            text: part(line.name.0, line.value.1),
        }
    }
}

/// Only the names: a value may be an API key.
impl fmt::Debug for RawHeaders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter().map(|line| line.name.escape_ascii().to_string())).finish()
    }
}

impl<'a> FromIterator<(&'a str, &'a [u8])> for RawHeaders {
    fn from_iter<T: IntoIterator<Item = (&'a str, &'a [u8])>>(lines: T) -> Self {
        let mut headers = Self::default();
        lines.into_iter().for_each(|(name, value)| headers.add(name.as_bytes(), value));
        headers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&str, &str)]) -> RawHeaders {
        lines.iter().map(|(name, value)| (*name, value.as_bytes())).collect()
    }

    fn lines_of(headers: &RawHeaders) -> Vec<String> {
        headers.iter().map(|line| String::from_utf8(line.text.to_vec()).unwrap()).collect()
    }

    #[test]
    fn a_name_is_found_in_any_case_and_keeps_its_spelling() {
        let mut headers = headers(&[("X-A", "1"), ("x-b", "2"), ("x-a", "3"), ("HOST", "h")]);
        assert!(headers.all("x-a").eq([b"1", b"3"]));
        assert_eq!(headers.get("X-B"), Some(&b"2"[..]));
        assert_eq!(headers.get(HeaderId::Host), Some(&b"h"[..]));
        assert!(!headers.has("x") && !headers.has(HeaderId::Date));
        headers.set("x-a", b"4");
        assert_eq!(lines_of(&headers), ["x-b: 2", "HOST: h", "x-a: 4"]);
        headers.remove(HeaderId::Host);
        headers.remove("X-B");
        headers.add(b"c", b"");
        assert!(!headers.has(HeaderId::Host));
        assert_eq!((lines_of(&headers), headers.len()), (vec!["x-a: 4".to_owned(), "c: ".to_owned()], 2));
    }

    #[test]
    fn setting_a_name_of_a_group_keeps_the_other_names_of_the_group() {
        let mut headers = headers(&[("te", "1"), ("Keep-Alive", "2"), ("date", "3"), ("Date", "4")]);
        headers.set("keep-alive", b"5");
        headers.set("date", b"6");
        assert_eq!(lines_of(&headers), ["te: 1", "keep-alive: 5", "date: 6"]);
    }

    #[test]
    fn connection_options_are_read_from_several_lines() {
        let headers = headers(&[("connection", "close, X-a ,"), ("a", "b"), ("Connection", "te")]);
        let options: Vec<&[u8]> = headers.connection_options().collect();
        assert_eq!(options, [&b"close"[..], b"X-a", b"", b"te"]);
    }

    #[test]
    fn known_names_are_recognised_in_any_case_and_no_other_name_is() {
        for (name, id) in [
            ("TE", HeaderId::HopByHop),
            ("Trailer", HeaderId::HopByHop),
            ("Upgrade", HeaderId::HopByHop),
            ("Keep-Alive", HeaderId::HopByHop),
            ("Proxy-Connection", HeaderId::HopByHop),
            ("Proxy-Authenticate", HeaderId::HopByHop),
            ("Proxy-Authorization", HeaderId::HopByHop),
            ("Connection", HeaderId::Connection),
            ("Transfer-Encoding", HeaderId::TransferEncoding),
            ("Authorization", HeaderId::Authorization),
            ("X-Body-Compressed", HeaderId::BodyCompressed),
            ("Content-Encoding", HeaderId::ContentEncoding),
            ("Content-Length", HeaderId::ContentLength),
            ("Content-Type", HeaderId::ContentType),
            ("X-Data-Parallel-Rank", HeaderId::DataParallelRank),
            ("Date", HeaderId::Date),
            ("Expect", HeaderId::Expect),
            ("Host", HeaderId::Host),
            ("X-Override-Rid", HeaderId::Override),
            ("X-Override-", HeaderId::Override),
            ("X-Request-Id", HeaderId::RequestId),
            ("Origin", HeaderId::Origin),
            ("Access-Control-Allow-Origin", HeaderId::AccessControl),
            ("Access-Control-", HeaderId::AccessControl),
            ("X-Override", HeaderId::Other),
            ("", HeaderId::Other),
        ] {
            for name in [name.to_owned(), name.to_ascii_lowercase(), name.to_ascii_uppercase()] {
                assert_eq!(HeaderId::of(name.as_bytes()), id, "{name}");
            }
            assert_eq!(
                HeaderId::of(format!("{name}s").as_bytes()),
                if matches!(id, HeaderId::Override | HeaderId::AccessControl) { id } else { HeaderId::Other }
            );
        }
    }
}
