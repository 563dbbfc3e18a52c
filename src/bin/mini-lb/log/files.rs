//! A log file per day, in a folder.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::clock::date;

/// Log files that are kept; older ones are removed when the file of a new day is opened.
pub(super) const KEPT_FILES: usize = 30;

const PREFIX: &str = "mini-lb.";
const SUFFIX: &str = ".log";

/// Writes to the file of the day, `mini-lb.2026-01-31.log` (UTC).
pub(super) struct DailyFiles {
    folder: PathBuf,
    /// The day, counted from 1970, and its file. `None` after a write failed: the file is opened again.
    today: Option<(u64, File)>,
}

impl DailyFiles {
    pub(super) fn open(folder: PathBuf) -> Result<Self, String> {
        let why = |error| format!("--log-dir {}: cannot be written to: {error}", folder.display());
        fs::create_dir_all(&folder).map_err(why)?;
        let mut files = Self { folder: folder.clone(), today: None };
        // Opened now, so that a folder without write permission is an error of the start, not of the first
        // line.
        files.turn_to(today()).map_err(why)?;
        Ok(files)
    }

    fn turn_to(&mut self, day: u64) -> io::Result<&mut File> {
        let file = match self.today.take() {
            Some((open, file)) if open == day => file,
            _ => {
                let name = format!("{PREFIX}{}{SUFFIX}", date(day));
                // Appended to: a restart on the same day must not delete the lines that say why.
                let file = OpenOptions::new().create(true).append(true).open(self.folder.join(name))?;
                remove_old(&self.folder);
                file
            }
        };
        Ok(&mut self.today.insert((day, file)).1)
    }
}

impl Write for DailyFiles {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // The day is checked at each write instead of with a timer, so a day without lines has no file.
        let written = self.turn_to(today()).and_then(|file| file.write(bytes));
        if written.is_err() {
            self.today = None;
        }
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn today() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs() / 86_400)
}

/// Removes all but the newest files. A file that cannot be removed must not stop the log.
fn remove_old(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut ours: Vec<String> = names.filter(|name| is_ours(name)).collect();
    // Dates sort as text.
    ours.sort_unstable();
    for name in ours.iter().rev().skip(KEPT_FILES) {
        let _ = fs::remove_file(folder.join(name));
    }
}

fn is_ours(name: &str) -> bool {
    let day = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_suffix(SUFFIX));
    // Stricter than the two ends of the name: a file that an operator put there, such as mini-lb.notes.log,
    // must not be removed.
    day.is_some_and(|day| day.len() == 10 && day.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_has_a_file_and_the_oldest_go() {
        let folder = std::env::temp_dir().join(format!("mini-lb-files-{}", std::process::id()));
        let mut files = DailyFiles::open(folder.clone()).unwrap();
        fs::write(folder.join("mini-lb.notes.log"), "mine").unwrap();
        for day in 0..40 {
            let name = format!("{day}\n");
            files.turn_to(day).unwrap().write_all(name.as_bytes()).unwrap();
        }
        files.turn_to(39).unwrap().write_all(b"again\n").unwrap();
        let mut names: Vec<String> = fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| is_ours(name))
            .collect();
        names.sort();
        // Today's, which was opened first, is the newest of all.
        assert_eq!((names.len(), names[0].as_str()), (KEPT_FILES, "mini-lb.1970-01-12.log"));
        let last = fs::read_to_string(folder.join("mini-lb.1970-02-09.log")).unwrap();
        assert_eq!(last, "39\nagain\n");
        assert!(folder.join("mini-lb.notes.log").exists(), "not ours to remove");
        fs::remove_dir_all(folder).unwrap();
    }
}
