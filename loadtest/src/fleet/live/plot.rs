//! The distribution of TTFT as an SVG: a line for each row, time on a logarithmic axis.

use std::fmt::Write as _;

use super::super::report::Row;

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 460.0;
/// Of the plotted area: left, top, right, bottom.
const FRAME: [f64; 4] = [60.0, 40.0, 640.0, 410.0];
const COLOURS: [&str; 10] = [
    "#1b6ca8", "#d1495b", "#2e8b57", "#edae49", "#7b4fa3", "#00798c", "#8d6b4b", "#d67bb0", "#5b6770",
    "#a3b32b",
];

/// Draws these rows, of one load.
pub(super) fn cdf(title: &str, rows: &[&Row]) -> String {
    let ends = rows.iter().flat_map(|row| [row.cdf[1], row.cdf[100]]);
    let ends = ends.filter(|end| end.is_finite() && *end > 0.0);
    let least = ends.clone().fold(f64::INFINITY, f64::min).log10().floor();
    let most = ends.fold(0.0, f64::max).log10().ceil().max(least + 1.0);
    let [left, top, right, bottom] = FRAME;
    let x = |seconds: f64| left + (seconds.log10() - least) / (most - least) * (right - left);
    let y = |share: f64| bottom - share * (bottom - top);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"{left}\" y=\"24\" font-size=\"16\">{title}</text>\n"
    );
    for percent in [0, 25, 50, 75, 90, 99] {
        let y = y(f64::from(percent) / 100.0);
        let _ = writeln!(
            svg,
            "<path d=\"M{left} {y:.1}H{right}\" stroke=\"#ddd\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{percent} %</text>",
            left - 6.0,
            y + 4.0
        );
    }
    let mut exponent = least;
    while exponent <= most {
        let x = x(10f64.powf(exponent));
        let _ = writeln!(
            svg,
            "<path d=\"M{x:.1} {top}V{bottom}\" stroke=\"#ddd\"/><text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{} s</text>",
            bottom + 18.0,
            10f64.powf(exponent)
        );
        exponent += 1.0;
    }
    for (number, row) in rows.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let points = row.cdf.iter().enumerate().filter(|(_, seconds)| **seconds > 0.0);
        let points = points.map(|(percent, seconds)| {
            format!("{:.1},{:.1}", x(*seconds).max(left), y(percent as f64 / 100.0))
        });
        let points = points.collect::<Vec<_>>().join(" ");
        let _ = writeln!(
            svg,
            "<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/><text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{}</text>",
            right + 14.0,
            top + 14.0 + 20.0 * number as f64,
            row.policy
        );
    }
    svg + "</svg>\n"
}
