//! Plots of rows as SVG: the distribution of TTFT, and the work of each prefill server over time.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

use super::report::Row;

/// With room for the name of a router and its flags beside the plot.
const WIDTH: f64 = 1_020.0;
const HEIGHT: f64 = 476.0;
/// Of the plotted area: left, top, right, bottom.
const FRAME: [f64; 4] = [60.0, 56.0, 640.0, 426.0];
const COLOURS: [&str; 11] = [
    "#1b6ca8", "#d1495b", "#2e8b57", "#edae49", "#7b4fa3", "#00798c", "#8d6b4b", "#d67bb0", "#5b6770",
    "#a3b32b", "#202020",
];

/// Writes `cdf … .svg` for each load, and `work … .svg` for each row.
///
/// # Errors
/// If a file cannot be written.
pub(super) fn write(rows: &[&Row], folder: &Path) -> io::Result<()> {
    let load_of = |row: &Row| (row.trace.clone(), row.scenario.clone(), row.load.to_bits());
    for group in rows.chunk_by(|one, other| load_of(one) == load_of(other)) {
        let Row { trace, scenario, random_use, .. } = group[0];
        let what = format!("{trace}, {scenario}, load {random_use:.2}");
        fs::write(folder.join(file_name(&format!("cdf {what}"))), cdf(&what, group))?;
        for row in group {
            let name = file_name(&format!("work {}, {what}", row.policy));
            fs::write(folder.join(name), work(&what, row))?;
        }
    }
    Ok(())
}

fn file_name(words: &str) -> String {
    words.replace(", ", "-").replace([' ', ':'], "_") + ".svg"
}

/// An SVG that grows: its frame, axes and lines.
struct Svg(String);

impl Svg {
    fn new(title: &str, of: &str) -> Self {
        let left = FRAME[0];
        Self(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"{left}\" y=\"24\" font-size=\"16\">{title}</text>\n<text x=\"{left}\" y=\"44\">{of}</text>\n"
        ))
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        let _ = writeln!(self.0, "{line}");
    }

    /// A horizontal line of the grid.
    fn row(&mut self, y: f64, label: &str) {
        let [left, _, right, _] = FRAME;
        self.line(format_args!(
            "<path d=\"M{left} {y:.1}H{right}\" stroke=\"#ddd\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            left - 6.0,
            y + 4.0
        ));
    }

    /// A vertical line of the grid.
    fn column(&mut self, x: f64, label: &str) {
        let [_, top, _, bottom] = FRAME;
        self.line(format_args!(
            "<path d=\"M{x:.1} {top}V{bottom}\" stroke=\"#ddd\"/><text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
            bottom + 18.0
        ));
    }

    /// Line `number` of the plot, with its name beside it.
    fn plot(&mut self, number: usize, name: &str, width: f64, points: impl Iterator<Item = (f64, f64)>) {
        let [_, top, right, _] = FRAME;
        let colour = COLOURS[number % COLOURS.len()];
        let points = points.map(|(x, y)| format!("{x:.1},{y:.1}")).collect::<Vec<_>>().join(" ");
        self.line(format_args!(
            "<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\"/><text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{name}</text>",
            right + 14.0,
            top + 14.0 + 20.0 * number as f64
        ));
    }

    fn end(self) -> String {
        self.0 + "</svg>\n"
    }
}

/// The TTFT of these rows, of one load: a line for each, time on a logarithmic axis.
fn cdf(of: &str, rows: &[&Row]) -> String {
    let ends = rows.iter().flat_map(|row| [row.cdf[1], row.cdf[100]]);
    let ends = ends.filter(|end| end.is_finite() && *end > 0.0);
    let least = ends.clone().fold(f64::INFINITY, f64::min).log10().floor();
    let most = ends.fold(0.0, f64::max).log10().ceil().max(least + 1.0);
    let [left, top, right, bottom] = FRAME;
    let x = |seconds: f64| left + (seconds.log10() - least) / (most - least) * (right - left);
    let y = |share: f64| bottom - share * (bottom - top);
    let mut svg = Svg::new("Time to first token: share of requests", of);
    for percent in [0, 25, 50, 75, 90, 99] {
        svg.row(y(f64::from(percent) / 100.0), &format!("{percent} %"));
    }
    let mut exponent = least;
    while exponent <= most {
        let seconds = 10f64.powf(exponent);
        svg.column(x(seconds), &format!("{seconds} s"));
        exponent += 1.0;
    }
    for (number, row) in rows.iter().enumerate() {
        let points = row.cdf.iter().enumerate().filter(|(_, seconds)| **seconds > 0.0);
        let points = points.map(|(percent, seconds)| (x(*seconds).max(left), y(percent as f64 / 100.0)));
        svg.plot(number, &row.policy, 2.0, points);
    }
    svg.end()
}

/// The work of each prefill server of a row over the time of arrivals: a line for each server.
fn work(of: &str, row: &Row) -> String {
    let most = row.work.iter().flatten().fold(0.0, |most: f64, work| most.max(*work));
    let (step_y, step_x) = (step(most), step(row.seconds));
    let most = (most / step_y).ceil().max(1.0) * step_y;
    let [left, top, right, bottom] = FRAME;
    let y = |work: f64| bottom - work / most * (bottom - top);
    let x = |at: f64| left + at / row.seconds * (right - left);
    let mut svg = Svg::new(&format!("Work that waits at each prefill server: {}", row.policy), of);
    for line in 0..=(most / step_y) as u32 {
        let work = f64::from(line) * step_y;
        svg.row(y(work), &format!("{work} s"));
    }
    for line in 0..=(row.seconds / step_x) as u32 {
        let at = f64::from(line) * step_x;
        svg.column(x(at), &format!("{at} s"));
    }
    for (server, work) in row.work.iter().enumerate() {
        let between = row.seconds / (work.len() as f64 - 1.0).max(1.0);
        let points = work.iter().enumerate().map(|(point, work)| (x(point as f64 * between), y(*work)));
        svg.plot(server, &format!("prefill {}", server + 1), 1.2, points);
    }
    svg.end()
}

/// 1, 2 or 5 times a power of ten: at most six of it up to `most`.
fn step(most: f64) -> f64 {
    let power = 10f64.powf((most.max(0.1) / 6.0).log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .map(|factor| factor * power)
        .into_iter()
        .find(|step| most <= 6.0 * step)
        .unwrap_or(power)
}
