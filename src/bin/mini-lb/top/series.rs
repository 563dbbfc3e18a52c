//! Prometheus' text format, as far as a router writes it, and the values of the last minute.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Rates are of the last [`RECENT`], and everything else that grows is of the last [`MINUTE`], as on the
/// status page.
pub(super) const RECENT: Duration = Duration::from_secs(5);
pub(super) const MINUTE: Duration = Duration::from_secs(60);
/// Polls that are older than [`RECENT`] are kept this far apart: a router with 1,000 servers has some 20,000
/// series.
const THINNED: Duration = Duration::from_secs(5);

/// The prefix of all families that are read here, but for the process's own.
const PREFIX: &str = "mini_lb_";
const PROCESS: [&str; 3] = [START, "process_cpu_seconds_total", "process_resident_memory_bytes"];
const START: &str = "process_start_time_seconds";
const BUILD: &str = "mini_lb_build_info";
/// Families of pairs are not shown, and are the most.
const NOT_SHOWN: &str = "mini_lb_pair_";

/// The values of a family, by their labels as text.
type Family = HashMap<Arc<str>, f64>;

/// All values at one time.
pub(super) struct Poll {
    pub(super) at: Instant,
    families: HashMap<String, Family>,
}

impl Poll {
    /// `None`: these are not a router's metrics. Label texts are shared with the poll before.
    pub(super) fn read(text: &str, at: Instant, before: Option<&Self>) -> Option<Self> {
        let mut families: HashMap<String, Family> = HashMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            let is_wanted =
                (name.starts_with(PREFIX) && !name.starts_with(NOT_SHOWN)) || PROCESS.contains(&name);
            let Some(value) = value.parse().ok().filter(|_| is_wanted) else { continue };
            let labels = labels.strip_suffix('}').unwrap_or(labels);
            let known = before.and_then(|poll| poll.families.get(name)?.get_key_value(labels));
            let labels = known.map_or_else(|| Arc::from(labels), |(labels, _)| Arc::clone(labels));
            match families.get_mut(name) {
                Some(family) => family.insert(labels, value),
                None => families.entry(name.to_owned()).or_default().insert(labels, value),
            };
        }
        families.contains_key(BUILD).then_some(Self { at, families })
    }

    /// The labels and values of a family.
    pub(super) fn family(&self, name: &str) -> impl Iterator<Item = (&str, f64)> {
        self.families.get(name).into_iter().flatten().map(|(labels, value)| (labels.as_ref(), *value))
    }

    pub(super) fn sum(&self, name: &str) -> f64 {
        self.family(name).map(|(_, value)| value).sum()
    }

    /// The increase of each counter of a family since another poll. One that is lower than before was reset
    /// to 0.
    pub(super) fn grown<'a>(&'a self, name: &str, then: &'a Self) -> impl Iterator<Item = (&'a str, f64)> {
        let before = then.families.get(name);
        self.family(name).map(move |(labels, value)| {
            let before = before.and_then(|family| family.get(labels)).copied().unwrap_or(0.0);
            (labels, if value >= before { value - before } else { value })
        })
    }
}

/// The polls of the last minute.
#[derive(Default)]
pub(super) struct History {
    polls: VecDeque<Poll>,
}

impl History {
    pub(super) fn last(&self) -> Option<&Poll> {
        self.polls.back()
    }

    /// Adds the newest poll.
    pub(super) fn push(&mut self, poll: Poll) {
        // Counters of another process: values from before do not compare.
        if self.last().is_some_and(|last| last.sum(START) != poll.sum(START)) {
            self.polls.clear();
        }
        let now = poll.at;
        self.polls.push_back(poll);
        // Half a period more: polls are not exactly a second apart.
        let slack = Duration::from_millis(500);
        while self.polls.front().is_some_and(|oldest| now - oldest.at > MINUTE + slack) {
            self.polls.pop_front();
        }
        let mut kept: Option<Instant> = None;
        self.polls.retain(|poll| {
            let is_kept =
                now - poll.at <= RECENT + slack || kept.is_none_or(|kept| poll.at - kept >= THINNED);
            kept = if is_kept { Some(poll.at) } else { kept };
            is_kept
        });
    }

    /// The oldest poll within this time, or the newest.
    pub(super) fn since(&self, time: Duration) -> Option<&Poll> {
        let now = self.last()?;
        let slack = Duration::from_millis(500);
        self.polls.iter().find(|poll| now.at - poll.at <= time + slack)
    }
}

/// The value of one label among labels as text.
pub(super) fn label<'a>(labels: &'a str, name: &str) -> Cow<'a, str> {
    let mut rest = labels;
    while let Some((key, after)) = rest.split_once("=\"") {
        let end = closing_quote(after);
        if key.trim_start_matches(',') == name {
            return unescaped(&after[..end]);
        }
        rest = after.get(end + 1..).unwrap_or_default();
    }
    Cow::Borrowed("")
}

/// Where a label's value ends: at the first quote without a backslash before it.
fn closing_quote(text: &str) -> usize {
    let mut is_escaped = false;
    let end = text.bytes().position(|byte| {
        let is_end = byte == b'"' && !is_escaped;
        is_escaped = byte == b'\\' && !is_escaped;
        is_end
    });
    end.unwrap_or(text.len())
}

fn unescaped(text: &str) -> Cow<'_, str> {
    if !text.contains('\\') {
        return Cow::Borrowed(text);
    }
    let mut plain = String::new();
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        match c {
            '\\' => plain.extend(rest.next().map(|c| if c == 'n' { '\n' } else { c })),
            c => plain.push(c),
        }
    }
    Cow::Owned(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn poll(seconds: u64, text: &str) -> Poll {
        let text = format!("mini_lb_build_info{{version=\"1\"}} 1\n{text}");
        Poll::read(&text, epoch() + Duration::from_secs(seconds), None).unwrap()
    }

    fn epoch() -> Instant {
        static EPOCH: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        *EPOCH.get_or_init(Instant::now)
    }

    #[test]
    fn labels_are_found_whatever_is_in_their_values() {
        let labels = r#"role="a,b=\"c\"",backend="x\\",none="",last="1\n2""#;
        for (name, value) in
            [("role", "a,b=\"c\""), ("backend", "x\\"), ("none", ""), ("last", "1\n2"), ("b", "")]
        {
            assert_eq!(label(labels, name), value, "{name}");
        }
        for broken in ["", "a", "a=\"", "a=\"\\", "=\"\"", "a=\"1\",b", "a=\"é"] {
            label(broken, "b");
        }
    }

    #[test]
    fn counters_that_fall_were_reset() {
        let (then, now) = (
            poll(0, "mini_lb_x{a=\"1\"} 7\nmini_lb_x{a=\"2\"} 7"),
            poll(1, "mini_lb_x{a=\"1\"} 9\nmini_lb_x{a=\"2\"} 3\nmini_lb_x{a=\"3\"} 1"),
        );
        let mut grown: Vec<_> = now.grown("mini_lb_x", &then).collect();
        grown.sort_by(|a, b| a.0.cmp(b.0));
        assert_eq!(grown, [("a=\"1\"", 2.0), ("a=\"2\"", 3.0), ("a=\"3\"", 1.0)]);
    }

    #[test]
    fn a_minute_is_kept_and_a_restart_begins_again() {
        let mut history = History::default();
        for second in 0..200 {
            history.push(poll(second, "process_start_time_seconds 1"));
        }
        assert!(history.polls.len() <= 18, "{}", history.polls.len());
        let age = |time| (history.last().unwrap().at - history.since(time).unwrap().at).as_secs();
        assert_eq!(age(RECENT), 5);
        assert!((55..=60).contains(&age(MINUTE)), "{}", age(MINUTE));
        history.push(poll(200, "process_start_time_seconds 2"));
        assert_eq!(history.polls.len(), 1);
        assert!(Poll::read("process_start_time_seconds 1", epoch(), None).is_none());
    }
}
