//! The header lines of a message: their bytes, and where in them names and values are.
//!
//! They are put into no map: most are only passed on, and few are looked for. Those
//! that mean something to a router are recognised once, when they are read.

use std::fmt;

/// Header lines in the order in which they came, as they were written.
#[derive(Clone, Default)]
pub(crate) struct RawHeaders {
    text: Vec<u8>,
    lines: Vec<HeaderLine>,
    /// A bit for each [`HeaderId`] that there is, or was.
    seen: u32,
}

/// Where a line is in the text.
#[derive(Clone, Copy)]
pub(crate) struct HeaderLine {
    known: HeaderId,
    name: Part,
    value: Part,
}

/// A part of the text: from where and up to where. Heads are bounded far below 4 GiB.
type Part = (u32, u32);

/// A name that means something to a router.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeaderId {
    /// Anything else.
    No,
    /// `Access-Control-…`
    AccessControl,
    Authorization,
    /// `X-Body-Compressed`: SGLang should decompress the body.
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
    /// Of one connection, though `Connection` need not name it, besides those that have a name here.
    HopByHop,
    Origin,
    /// `X-Override-…`
    Override,
    /// `X-Request-Id`
    RequestId,
    TransferEncoding,
}

/// With `SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES=1` a server takes rooms, ranks and ids from these.
const OVERRIDE_PREFIX: &[u8] = b"x-override-";
const ACCESS_CONTROL_PREFIX: &[u8] = b"access-control-";

impl HeaderId {
    /// Told by length first: few other names are as long.
    pub(crate) fn of(name: &[u8]) -> Self {
        let names: &[(&[u8], Self)] = match name.len() {
            2 => &[(b"te", Self::HopByHop)],
            4 => &[(b"host", Self::Host), (b"date", Self::Date)],
            6 => &[(b"expect", Self::Expect), (b"origin", Self::Origin)],
            7 => &[(b"trailer", Self::HopByHop), (b"upgrade", Self::HopByHop)],
            10 => &[(b"connection", Self::Connection), (b"keep-alive", Self::HopByHop)],
            12 => &[(b"content-type", Self::ContentType), (b"x-request-id", Self::RequestId)],
            13 => &[(b"authorization", Self::Authorization)],
            14 => &[(b"content-length", Self::ContentLength)],
            16 => &[(b"content-encoding", Self::ContentEncoding), (b"proxy-connection", Self::HopByHop)],
            17 => &[
                (b"transfer-encoding", Self::TransferEncoding),
                (b"x-body-compressed", Self::BodyCompressed),
            ],
            18 => &[(b"proxy-authenticate", Self::HopByHop)],
            19 => &[(b"proxy-authorization", Self::HopByHop)],
            20 => &[(b"x-data-parallel-rank", Self::DataParallelRank)],
            _ => &[],
        };
        let known = names.iter().find(|(known, _)| is_known(name, known));
        known.map_or_else(|| Self::of_prefix(name), |(_, known)| *known)
    }

    fn of_prefix(name: &[u8]) -> Self {
        let begins_with =
            |prefix: &[u8]| name.get(..prefix.len()).is_some_and(|begin| is_known(begin, prefix));
        if begins_with(OVERRIDE_PREFIX) {
            Self::Override
        } else if begins_with(ACCESS_CONTROL_PREFIX) {
            Self::AccessControl
        } else {
            Self::No
        }
    }

    /// Whether all lines that are known as this have the same name.
    fn is_one_name(self) -> bool {
        !matches!(self, Self::No | Self::AccessControl | Self::HopByHop | Self::Override)
    }

    /// Whether it belongs to one connection (RFC 9110, section 7.6.1).
    pub(crate) fn is_hop_by_hop(self) -> bool {
        matches!(self, Self::Connection | Self::TransferEncoding | Self::HopByHop)
    }

    fn bit(self) -> u32 {
        1 << self as u32
    }
}

/// Whether a name is a known one, which has small letters and hyphens. Of what may be in a name (RFC 9110, section 5.6.2)
/// the bit makes no other byte one of these, and comparing without leaving early is what the compiler does in vectors.
fn is_known(name: &[u8], known: &[u8]) -> bool {
    name[0] | 0x20 == known[0]
        && name.iter().zip(known).fold(0, |differs, (a, b)| differs | (a | 0x20) ^ b) == 0
}

/// One of 64 bits, for a name's length and first letter.
pub(crate) fn name_bit(name: &[u8]) -> u64 {
    let letter = name.first().map_or(0, |letter| letter | 0x20);
    1 << ((name.len() * 31 + usize::from(letter)) % 64)
}

/// What lines are looked for by.
pub(crate) trait HeaderKey: Copy {
    fn may_be_in(self, fields: &RawHeaders) -> bool;
    fn is(self, line: &HeaderLine, text: &[u8]) -> bool;
}

impl HeaderKey for HeaderId {
    fn may_be_in(self, fields: &RawHeaders) -> bool {
        fields.seen & self.bit() != 0
    }

    fn is(self, line: &HeaderLine, _: &[u8]) -> bool {
        line.known == self
    }
}

/// A name in small letters, or in any.
impl HeaderKey for &str {
    fn may_be_in(self, _: &RawHeaders) -> bool {
        true
    }

    fn is(self, line: &HeaderLine, text: &[u8]) -> bool {
        let (from, to) = line.name;
        (to - from) as usize == self.len()
            && text[from as usize..to as usize].eq_ignore_ascii_case(self.as_bytes())
    }
}

/// One line.
#[derive(Clone, Copy)]
pub(crate) struct RawHeader<'a> {
    pub(crate) known: HeaderId,
    pub(crate) name: &'a [u8],
    pub(crate) value: &'a [u8],
    /// All of it, without the line's end.
    pub(crate) text: &'a [u8],
}

/// Room for lines that are added, and for their bytes: a request's id, and the servers' key.
const SPARE_LINES: usize = 2;
const SPARE: usize = 160;

impl RawHeaders {
    /// The header lines of a head, which has been parsed as this text.
    pub(super) fn parsed(head: &[u8], parsed: &[httparse::Header<'_>]) -> Self {
        let part = |part: &[u8]| {
            let from = part.as_ptr() as usize - head.as_ptr() as usize;
            (from as u32, (from + part.len()) as u32)
        };
        let mut text = Vec::with_capacity(head.len() + SPARE);
        text.extend_from_slice(head);
        let mut lines = Vec::with_capacity(parsed.len() + SPARE_LINES);
        let mut seen = 0;
        for line in parsed {
            let known = HeaderId::of(line.name.as_bytes());
            seen |= known.bit();
            lines.push(HeaderLine { known, name: part(line.name.as_bytes()), value: part(line.value) });
        }
        Self { text, lines, seen }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = RawHeader<'_>> {
        self.lines.iter().map(|line| self.line(line))
    }

    /// The values of all lines of a name.
    pub(crate) fn all<K: HeaderKey>(&self, name: K) -> impl Iterator<Item = &[u8]> + use<'_, K> {
        let lines = if name.may_be_in(self) { &self.lines[..] } else { &[] };
        let found = lines.iter().filter(move |line| name.is(line, &self.text));
        found.map(|line| &self.text[line.value.0 as usize..line.value.1 as usize])
    }

    /// The value of the first line of a name.
    pub(crate) fn get(&self, name: impl HeaderKey) -> Option<&[u8]> {
        self.all(name).next()
    }

    /// Whether there may be a name of these [shapes](name_bit). Looks once for several names of which there is hardly ever
    /// one.
    pub(crate) fn may_have(&self, shapes: u64) -> bool {
        let of = |line: &HeaderLine| name_bit(&self.text[line.name.0 as usize..line.name.1 as usize]);
        self.lines.iter().any(|line| of(line) & shapes != 0)
    }

    pub(crate) fn has(&self, name: impl HeaderKey) -> bool {
        self.get(name).is_some()
    }

    /// The options that all lines of `Connection` list, without the space around them.
    pub(crate) fn connection_options(&self) -> impl Iterator<Item = &[u8]> {
        self.all(HeaderId::Connection)
            .flat_map(|list| list.split(|byte| *byte == b','))
            .map(<[u8]>::trim_ascii)
    }

    pub(crate) fn len(&self) -> usize {
        self.lines.len()
    }

    /// Removes all lines of a name.
    pub(crate) fn remove(&mut self, name: impl HeaderKey) {
        if name.may_be_in(self) {
            self.lines.retain(|line| !name.is(line, &self.text));
        }
    }

    /// Removes all lines but those that stay.
    pub(crate) fn retain(&mut self, stays: impl Fn(&RawHeader<'_>) -> bool) {
        let mut lines = std::mem::take(&mut self.lines);
        lines.retain(|line| stays(&self.line(line)));
        self.lines = lines;
    }

    /// Adds a line. Name and value must be good.
    pub(crate) fn add(&mut self, name: &[u8], value: &[u8]) {
        self.add_known(HeaderId::of(name), name, value);
    }

    fn add_known(&mut self, known: HeaderId, name: &[u8], value: &[u8]) {
        self.seen |= known.bit();
        let name = self.put(name);
        self.text.extend_from_slice(b": ");
        let value = self.put(value);
        self.lines.push(HeaderLine { known, name, value });
    }

    /// Makes a line the only one of its name.
    pub(crate) fn set(&mut self, name: &str, value: &[u8]) {
        let known = HeaderId::of(name.as_bytes());
        if known.is_one_name() {
            self.remove(known);
        } else {
            self.remove(name);
        }
        self.add_known(known, name.as_bytes(), value);
    }

    fn put(&mut self, part: &[u8]) -> Part {
        let from = self.text.len();
        self.text.extend_from_slice(part);
        (from as u32, self.text.len() as u32)
    }

    fn line(&self, line: &HeaderLine) -> RawHeader<'_> {
        let part = |from: u32, to: u32| &self.text[from as usize..to as usize];
        RawHeader {
            known: line.known,
            name: part(line.name.0, line.name.1),
            value: part(line.value.0, line.value.1),
            text: part(line.name.0, line.value.1),
        }
    }
}

/// Names only: a value may be a secret.
impl fmt::Debug for RawHeaders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter().map(|line| line.name.escape_ascii().to_string())).finish()
    }
}

impl<'a> FromIterator<(&'a str, &'a [u8])> for RawHeaders {
    fn from_iter<T: IntoIterator<Item = (&'a str, &'a [u8])>>(lines: T) -> Self {
        let mut fields = Self::default();
        lines.into_iter().for_each(|(name, value)| fields.add(name.as_bytes(), value));
        fields
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(lines: &[(&str, &str)]) -> RawHeaders {
        lines.iter().map(|(name, value)| (*name, value.as_bytes())).collect()
    }

    fn shown(fields: &RawHeaders) -> Vec<String> {
        fields.iter().map(|line| String::from_utf8(line.text.to_vec()).unwrap()).collect()
    }

    #[test]
    fn names_are_found_whatever_their_case_and_keep_it() {
        let mut fields = fields(&[("X-A", "1"), ("x-b", "2"), ("x-a", "3"), ("HOST", "h")]);
        assert!(fields.all("x-a").eq([b"1", b"3"]));
        assert_eq!(fields.get("X-B"), Some(&b"2"[..]));
        assert_eq!(fields.get(HeaderId::Host), Some(&b"h"[..]));
        assert!(!fields.has("x") && !fields.has(HeaderId::Date));
        fields.set("x-a", b"4");
        assert_eq!(shown(&fields), ["x-b: 2", "HOST: h", "x-a: 4"]);
        fields.remove(HeaderId::Host);
        fields.remove("X-B");
        fields.add(b"c", b"");
        assert!(!fields.has(HeaderId::Host));
        assert_eq!((shown(&fields), fields.len()), (vec!["x-a: 4".to_owned(), "c: ".to_owned()], 2));
    }

    #[test]
    fn a_name_of_a_group_takes_no_other_of_it_away() {
        let mut fields = fields(&[("te", "1"), ("Keep-Alive", "2"), ("date", "3"), ("Date", "4")]);
        fields.set("keep-alive", b"5");
        fields.set("date", b"6");
        assert_eq!(shown(&fields), ["te: 1", "keep-alive: 5", "date: 6"]);
    }

    #[test]
    fn options_may_be_in_several_lines() {
        let fields = fields(&[("connection", "close, X-a ,"), ("a", "b"), ("Connection", "te")]);
        let options: Vec<&[u8]> = fields.connection_options().collect();
        assert_eq!(options, [&b"close"[..], b"X-a", b"", b"te"]);
    }

    #[test]
    fn a_known_name_is_known_in_any_case_and_no_other_is() {
        for (name, known) in [
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
            ("X-Override", HeaderId::No),
            ("", HeaderId::No),
        ] {
            for name in [name.to_owned(), name.to_ascii_lowercase(), name.to_ascii_uppercase()] {
                assert_eq!(HeaderId::of(name.as_bytes()), known, "{name}");
            }
            assert_eq!(
                HeaderId::of(format!("{name}s").as_bytes()),
                if matches!(known, HeaderId::Override | HeaderId::AccessControl) {
                    known
                } else {
                    HeaderId::No
                }
            );
        }
    }
}
