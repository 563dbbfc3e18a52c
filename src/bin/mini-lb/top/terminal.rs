//! The terminal: its size, its keys, and a screen of its own that is gone afterwards.
//!
//! What is no terminal gets plain text, without a single escape.

use std::io::{self, Read, Write};

use rustix::termios::{
    LocalModes, OptionalActions, SpecialCodeIndex, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr,
};
use tokio::sync::mpsc;

use super::view::{Line, Tone};

/// The width of what does not say its own.
const DEFAULT_WIDTH: usize = 80;
/// Narrower windows get lines of this width, which the terminal cuts.
const MIN_WIDTH: usize = 20;
/// Of one screen; a window that says more is not believed.
const MAX_HEIGHT: usize = 1_000;

const ENTER: &str = "\x1b[?1049h\x1b[?25l\x1b[?7l";
const LEAVE: &str = "\x1b[?7h\x1b[?25h\x1b[?1049l";
const HOME: &str = "\x1b[H";
const REST_OF_LINE: &str = "\x1b[K";
const REST_OF_SCREEN: &str = "\x1b[J";
const BOLD: &str = "\x1b[1m";
const RED: &str = "\x1b[31m";
const PLAIN: &str = "\x1b[0m";

/// Keys that end the program: q, Ctrl-C and Ctrl-D.
const QUIT: [u8; 4] = [b'q', b'Q', 3, 4];

/// Width and height of the window, if stdout is one.
fn window() -> Option<(usize, usize)> {
    let size = tcgetwinsize(io::stdout()).ok().filter(|size| size.ws_col > 0)?;
    Some((usize::from(size.ws_col), usize::from(size.ws_row).min(MAX_HEIGHT)))
}

/// How wide lines may be.
pub(super) fn width() -> usize {
    let typed = || std::env::var("COLUMNS").ok()?.parse().ok();
    let width = window().map(|(width, _)| width).or_else(typed).unwrap_or(DEFAULT_WIDTH);
    width.clamp(MIN_WIDTH, 10 * DEFAULT_WIDTH)
}

/// What is drawn on. Dropping it gives the terminal back as it was.
pub(super) struct Screen {
    is_terminal: bool,
    has_color: bool,
    /// The modes of the terminal before, if keys are read from it.
    modes: Option<Termios>,
    keys: mpsc::Receiver<()>,
}

impl Screen {
    pub(super) fn open() -> io::Result<Self> {
        let is_terminal = isatty(io::stdout());
        let has_color = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        // As long as a sender is there, nobody has pressed a key.
        let (sender, keys) = mpsc::channel(1);
        let mut screen = Self { is_terminal, has_color, modes: None, keys };
        if is_terminal && isatty(io::stdin()) {
            let modes = tcgetattr(io::stdin())?;
            let mut raw = modes.clone();
            // Without signals from keys, Ctrl-Z cannot leave a stopped program's screen behind.
            raw.local_modes -= LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
            raw.special_codes[SpecialCodeIndex::VMIN] = 1;
            raw.special_codes[SpecialCodeIndex::VTIME] = 0;
            tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
            screen.modes = Some(modes);
            std::thread::spawn(move || read_keys(&sender));
        } else {
            // Signals alone end the program.
            std::mem::forget(sender);
        }
        if screen.is_terminal {
            put(ENTER)?;
        }
        Ok(screen)
    }

    /// Completes when somebody wants to see no more, or the terminal is gone.
    pub(super) async fn quit_key(&mut self) {
        self.keys.recv().await;
    }

    /// Draws the lines that are made for a width.
    pub(super) fn draw(&mut self, lines: impl FnOnce(usize) -> Vec<Line>) -> io::Result<()> {
        let lines = lines(width());
        if !self.is_terminal {
            let text: String = lines.into_iter().map(|line| line.text + "\n").collect();
            return put(&format!("{text}\n"));
        }
        let height = window().map_or(usize::MAX, |(_, height)| height).max(1);
        let mut text = HOME.to_owned();
        for (row, line) in lines.iter().take(height).enumerate() {
            // A line break behind the last line would move all of them up.
            text.push_str(if row > 0 { "\r\n" } else { "" });
            let tone = match line.tone {
                Tone::Plain => "",
                Tone::Bold => BOLD,
                Tone::Bad if self.has_color => RED,
                Tone::Bad => BOLD,
            };
            [tone, line.text.as_str(), PLAIN, REST_OF_LINE].iter().for_each(|part| text.push_str(part));
        }
        put(&(text + REST_OF_SCREEN))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if self.is_terminal {
            let _ = put(LEAVE);
        }
        if let Some(modes) = &self.modes {
            // What was typed and not read is not for the shell.
            let _ = tcsetattr(io::stdin(), OptionalActions::Flush, modes);
        }
    }
}

/// Not `print!`, which panics when stdout is closed.
fn put(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// A thread of its own: a terminal cannot be read without blocking but for everybody who has it open.
fn read_keys(pressed: &mpsc::Sender<()>) {
    let mut key = [0];
    while io::stdin().read_exact(&mut key).is_ok() {
        if QUIT.contains(&key[0]) {
            break;
        }
    }
    let _ = pressed.blocking_send(());
}
