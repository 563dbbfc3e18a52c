//! Tables of plain text for a terminal: columns of one width, within the width of a line.
//!
//! What is in a cell is printed as it is: callers make it [`printable`].

/// Between two columns.
const GAP: &str = "  ";
/// In place of what was cut.
const CUT: &str = "..";

/// How a column is set.
#[derive(Clone, Copy)]
pub(crate) struct Column {
    pub(crate) title: &'static str,
    pub(crate) kind: Cells,
}

/// What the cells of a column are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cells {
    /// On the right, and never cut.
    Numbers,
    /// Never cut.
    Words,
    /// Cut at the end to this width.
    Texts(usize),
    /// Cut at the front to this width: servers' URLs differ at their ends.
    Urls(usize),
}

impl Column {
    pub(crate) const fn new(title: &'static str, kind: Cells) -> Self {
        Self { title, kind }
    }

    /// The width that it may be cut to, if it has `full` uncut.
    fn least(&self, full: usize) -> usize {
        match self.kind {
            Cells::Numbers | Cells::Words => full,
            Cells::Texts(least) | Cells::Urls(least) => full.min(least.max(self.title.len())),
        }
    }

    fn cell(&self, text: &str, width: usize) -> String {
        let text = match self.kind {
            Cells::Urls(_) => cut_front(text, width),
            _ => cut(text, width),
        };
        match self.kind {
            Cells::Numbers => format!("{text:>width$}"),
            _ => format!("{text:<width$}"),
        }
    }
}

/// The titles and the rows as lines of at most `width` characters. Columns are cut first, the widest before
/// others, and then the last ones are left out.
pub(crate) fn lines(columns: &[Column], rows: &[Vec<String>], width: usize) -> Vec<String> {
    let full = |place: usize, column: &Column| {
        let cells = rows.iter().filter_map(|row| row.get(place)).map(|cell| cell.chars().count());
        cells.max().unwrap_or(0).max(column.title.len())
    };
    let mut widths: Vec<usize> =
        columns.iter().enumerate().map(|(place, column)| full(place, column)).collect();
    let least: Vec<usize> = columns.iter().zip(&widths).map(|(column, full)| column.least(*full)).collect();
    let line = |widths: &[usize]| widths.iter().sum::<usize>() + GAP.len() * widths.len().saturating_sub(1);
    let mut kept = columns.len();
    while kept > 1 && line(&least[..kept]) > width {
        kept -= 1;
    }
    widths.truncate(kept);
    while line(&widths) > width {
        let cuttable = (0..kept).filter(|place| widths[*place] > least[*place]);
        let Some(widest) = cuttable.max_by_key(|place| widths[*place]) else { break };
        widths[widest] -= 1;
    }
    let row = |cells: Vec<&str>| {
        let cells = columns.iter().zip(&widths).zip(cells);
        let cells: Vec<String> = cells.map(|((column, width), text)| column.cell(text, *width)).collect();
        cut(cells.join(GAP).trim_end(), width)
    };
    let titles = row(columns.iter().map(|column| column.title).collect());
    let rows = rows.iter().map(|cells| row(cells.iter().map(String::as_str).collect()));
    std::iter::once(titles).chain(rows).collect()
}

/// The first `width` characters, the last of which say that there were more.
pub(crate) fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let kept: String = text.chars().take(width.saturating_sub(CUT.len())).collect();
    (kept + CUT).chars().take(width).collect()
}

fn cut_front(text: &str, width: usize) -> String {
    let count = text.chars().count();
    if count <= width {
        return text.to_owned();
    }
    let kept: String = text.chars().skip(count - width.saturating_sub(CUT.len())).collect();
    CUT.chars().chain(kept.chars()).take(width).collect()
}

/// The text without what a terminal could take for orders, or draw wider than one place.
pub(crate) fn printable(text: &str) -> String {
    let is_plain = |c: char| c == ' ' || c.is_ascii_graphic();
    text.chars().flat_map(|c| if is_plain(c) { vec![c] } else { c.escape_default().collect() }).collect()
}

/// A text in lines of at most `width` characters, broken at spaces. All lines but the first begin with
/// `indent` spaces. A word that is too long for a line has one of its own.
pub(crate) fn wrapped(text: &str, width: usize, indent: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = String::new();
    for word in text.split(' ') {
        if !line.trim().is_empty() && line.chars().count() + 1 + word.chars().count() > width {
            lines.push(std::mem::replace(&mut line, " ".repeat(indent)));
        } else if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines.push(line);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: [Column; 3] = [
        Column::new("SERVER", Cells::Urls(10)),
        Column::new("OPEN", Cells::Numbers),
        Column::new("MODEL", Cells::Texts(6)),
    ];

    fn table(width: usize) -> Vec<String> {
        let row = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
        lines(
            &COLUMNS,
            &[row(["http://10.0.0.1:30000", "7", "llama-3-70b"]), row(["http://a:1", "12", ""])],
            width,
        )
    }

    #[test]
    fn columns_have_the_width_of_their_widest_cell() {
        assert_eq!(
            table(120),
            [
                "SERVER                 OPEN  MODEL",
                "http://10.0.0.1:30000     7  llama-3-70b",
                "http://a:1               12",
            ]
        );
    }

    #[test]
    fn a_narrow_line_cuts_wide_columns_first_and_then_drops_the_last() {
        assert_eq!(table(31)[1], "...0.1:30000     7  llama-3-70b");
        assert_eq!(table(24)[1], "...1:30000     7  llam..");
        assert_eq!(table(20), ["SERVER          OPEN", "...0.0.1:30000     7", "http://a:1        12"]);
        for width in 0..60 {
            assert!(table(width).iter().all(|line| line.chars().count() <= width), "{width}");
        }
    }

    #[test]
    fn long_texts_are_broken_at_spaces() {
        assert_eq!(wrapped("one two three", 8, 2), ["one two", "  three"]);
        assert_eq!(wrapped("a longer-than-that b", 6, 2), ["a", "  longer-than-that", "  b"]);
        assert_eq!(wrapped("", 6, 2), [""]);
    }
}
