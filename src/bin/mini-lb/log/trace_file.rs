//! The file of a load trace, a line of Mooncake's format for each request, and its predecessor.
//!
//! A worker queues numbers ([`put`]), and the writer thread makes lines of them ([`TraceFile`]), because only
//! it knows which file a line goes to, and each file has hash ids of its own. What the numbers mean is for
//! the library to know.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use mini_lb::TraceLine;

use super::escape;
use super::queue::ENOUGH;

/// Ids fit the numbers of JSON's readers, which may be doubles (RFC 8259, section 6).
const ID_BITS: u32 = 53;
/// A line is shorter: 1,024 ids of 16 digits, three numbers, and what is around them. The least bound of a
/// file is three times as much.
const MAX_LINE: usize = 20 << 10;

/// Queues the numbers of a line: arrival in milliseconds, both lengths, and the hashes.
pub(super) fn put(line: &TraceLine<'_>, into: &mut Vec<u8>) {
    escape::number(line.arrival.as_millis() as u64, into);
    for number in [line.input_length, line.output_length].into_iter().chain(line.hashes()) {
        into.push(b' ');
        escape::number(number, into);
    }
    into.push(b'\n');
}

/// Writes the trace to a file, and begins a new one when it is full.
pub(super) struct TraceFile {
    path: PathBuf,
    /// The file before this one.
    previous: PathBuf,
    max_bytes: u64,
    /// `None` after a write failed and left a part of a line: then a new file is begun.
    open: Option<OpenFile>,
    /// Lines that are to be written to the open file.
    lines: Vec<u8>,
}

/// A file and what only its own lines have in common.
struct OpenFile {
    file: File,
    /// Up to the end of its last whole line.
    length: u64,
    /// Random for each file: the ids of two files cannot be compared, and nobody can find out whether a
    /// prompt that he knows is in one. SipHash keeps its key secret although ids are published.
    key: RandomState,
}

impl TraceFile {
    /// Begins a file. One that is there becomes the previous one: its ids have another key.
    pub(super) fn open(path: PathBuf, max_bytes: u64) -> Result<Self, String> {
        let mut previous = OsString::from(&path);
        previous.push(".1");
        let previous = PathBuf::from(previous);
        // Now, so that a wrong path is an error of the start, not of the first line.
        let open = OpenFile::begin(&path, &previous)
            .map_err(|error| format!("--trace-log {}: cannot be written: {error}", path.display()))?;
        Ok(Self { path, previous, max_bytes, open: Some(open), lines: Vec::new() })
    }

    /// Whether the longest line fits.
    fn takes_more(&self) -> bool {
        let gathered = (self.lines.len() + MAX_LINE) as u64;
        self.open.as_ref().is_some_and(|open| open.length + gathered <= self.max_bytes)
    }

    /// Begins the next file.
    fn turn(&mut self) -> io::Result<()> {
        // Its predecessor is not ours to remove.
        if let Some(open) = &self.open
            && !open.is_at(&self.path)?
        {
            return Err(io::Error::other(format!("{} is another process's now", self.path.display())));
        }
        self.open = Some(OpenFile::begin(&self.path, &self.previous)?);
        Ok(())
    }

    /// Writes the lines that have been gathered.
    fn write_lines(&mut self) -> io::Result<()> {
        let Some(open) = &mut self.open else { return Ok(()) };
        let written = open.file.write_all(&self.lines);
        match &written {
            Ok(()) => open.length += self.lines.len() as u64,
            // So that the next line does not begin within one that is cut off.
            Err(_) if open.file.set_len(open.length).is_ok() => {}
            Err(_) => self.open = None,
        }
        self.lines.clear();
        written
    }
}

impl OpenFile {
    fn begin(path: &Path, previous: &Path) -> io::Result<Self> {
        match fs::symlink_metadata(path) {
            // A device or a pipe must not be renamed.
            Ok(old) if !old.is_file() => return Err(io::Error::other("it is not a regular file")),
            // Of a program that could not start, perhaps again and again: the previous file is worth more.
            Ok(old) if old.len() == 0 => fs::remove_file(path)?,
            Ok(_) => fs::rename(path, previous)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(path)?;
        Ok(Self { file, length: 0, key: RandomState::new() })
    }

    /// Whether the path still leads to this file, or to none.
    fn is_at(&self, path: &Path) -> io::Result<bool> {
        match (fs::symlink_metadata(path), self.file.metadata()?) {
            (Ok(there), own) => Ok((there.dev(), there.ino()) == (own.dev(), own.ino())),
            (Err(_), _) => Ok(true),
        }
    }

    /// Appends the line of these numbers, as Mooncake's traces have it.
    fn put_line(&self, numbers: &[u8], into: &mut Vec<u8>) {
        let mut numbers = numbers.split(|byte| *byte == b' ');
        for name in ["{\"timestamp\": ", ", \"input_length\": ", ", \"output_length\": "] {
            escape::text(name, into);
            into.extend_from_slice(numbers.next().unwrap_or(b"0"));
        }
        escape::text(", \"hash_ids\": [", into);
        for (place, hash) in numbers.enumerate() {
            escape::text(if place == 0 { "" } else { ", " }, into);
            escape::number(self.key.hash_one(hash) & ((1 << ID_BITS) - 1), into);
        }
        escape::text("]}\n", into);
    }
}

impl Write for TraceFile {
    /// Takes whole lines of numbers, all of them.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for numbers in bytes.split(|byte| *byte == b'\n').filter(|numbers| !numbers.is_empty()) {
            if !self.takes_more() {
                self.write_lines()?;
                self.turn()?;
            }
            if let Some(open) = &self.open {
                open.put_line(numbers, &mut self.lines);
            }
            if self.lines.len() >= ENOUGH {
                self.write_lines()?;
            }
        }
        self.write_lines()?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An empty folder of a test's own.
    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("mini-lb-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn after_a_write_that_cannot_be_undone_the_next_file_begins() {
        let folder = folder("trace-broken");
        let path = folder.join("load.jsonl");
        let mut trace = TraceFile::open(path.clone(), 1 << 20).unwrap();
        trace.write_all(b"0 3 4 17\n").unwrap();
        // A file that takes nothing, and cannot be shortened either.
        trace.open.as_mut().unwrap().file = File::open(&path).unwrap();
        trace.write_all(b"1 3 4 17\n").unwrap_err();
        trace.write_all(b"2 600 0 17 18\n3 0 0\n").unwrap();
        let [before, now] = [folder.join("load.jsonl.1"), path].map(|path| fs::read_to_string(path).unwrap());
        let begins = "{\"timestamp\": 0, \"input_length\": 3, \"output_length\": 4, \"hash_ids\": [";
        assert!(before.starts_with(begins) && before.lines().count() == 1, "{before}");
        assert!(now.starts_with("{\"timestamp\": 2, ") && now.lines().count() == 2, "{now}");
        assert!(now.ends_with("\"hash_ids\": []}\n"), "{now}");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn an_empty_file_does_not_replace_the_one_before() {
        let folder = folder("trace-empty");
        let path = folder.join("load.jsonl");
        TraceFile::open(path.clone(), 1 << 20).unwrap().write_all(b"0 3 4 17\n").unwrap();
        // Programs that could not start, for example because their port is in use.
        (0..3).for_each(|_| drop(TraceFile::open(path.clone(), 1 << 20).unwrap()));
        assert_eq!(fs::read_to_string(folder.join("load.jsonl.1")).unwrap().lines().count(), 1);
        assert_eq!(fs::metadata(path).unwrap().len(), 0);
        fs::remove_dir_all(folder).unwrap();
    }
}
