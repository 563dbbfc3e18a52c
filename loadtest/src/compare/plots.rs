//! Plots: an SVG per question, with a panel per scenario and a bar per router.

use std::error::Error;
use std::io;
use std::path::Path;

use plotters::backend::SVGBackend;
use plotters::drawing::{DrawingArea, IntoDrawingArea as _};
use plotters::element::{Rectangle, Text};
use plotters::style::{BLACK, Color as _, IntoFont as _, RGBColor, WHITE};

use super::metric::{Metric, Spread};
use super::results::Results;
use super::table::number;

const OURS: RGBColor = RGBColor(0x1b, 0x6c, 0xa8);
const THEIRS: RGBColor = RGBColor(0xb0, 0xb8, 0xbf);
const BAR: i32 = 22;
const WIDTH: u32 = 760;

/// A group of bars.
struct Panel {
    title: String,
    bars: Vec<(String, f64)>,
}

/// Writes all plots into `folder`.
pub(super) fn write(results: &Results, folder: &Path) -> io::Result<()> {
    let everywhere = results.scenarios();
    let streams = ["stream_64", "stream_burst", "paced_1000", "logprob_stream"];
    let panels = |scenarios: &[&str], metric, unit| -> Vec<Panel> {
        scenarios.iter().filter_map(|scenario| panel(results, scenario, metric, unit)).collect()
    };
    let percentiles =
        [("p50", Metric::P50), ("p90", Metric::P90), ("p99", Metric::P99), ("p99.9", Metric::P999)];
    let latency = percentiles.into_iter().filter_map(|(name, metric)| {
        let panel = panel(results, "open_500", metric, 1e3)?;
        Some(Panel { title: format!("{name}, {}", panel.title), ..panel })
    });
    let plots = [
        (
            "cpu_per_request",
            "CPU of the router, µs per request",
            panels(&everywhere, Metric::CpuPerRequest, 1.0),
        ),
        ("cpu_per_token", "CPU of the router, µs per token", panels(&streams, Metric::CpuPerToken, 1.0)),
        ("memory", "Peak resident memory, MiB", panels(&everywhere, Metric::Peak, 1.0)),
        ("latency", "Latency from when a request was due, ms", latency.collect()),
        ("connections", "Connections opened to servers", panels(&everywhere, Metric::Connections, 1.0)),
    ];
    for (name, title, panels) in plots {
        let path = folder.join(format!("{name}.svg"));
        std::fs::write(path, draw(title, &panels).map_err(|error| io::Error::other(error.to_string()))?)?;
    }
    Ok(())
}

fn panel(results: &Results, scenario: &str, metric: Metric, unit: f64) -> Option<Panel> {
    let rows = results.rows.iter().filter(|row| row.scenario == scenario);
    let bars: Vec<_> = rows
        .filter_map(|row| {
            let mark = if row.why_invalid().is_some() { " ✗" } else { "" };
            Some((format!("{}{mark}", row.router), row.spread(metric)?.median / unit))
        })
        .collect();
    let title = results.rows.iter().find(|row| row.scenario == scenario)?.title.clone();
    (!bars.is_empty()).then_some(Panel { title, bars })
}

fn draw(title: &str, panels: &[Panel]) -> Result<String, Box<dyn Error>> {
    let lines: usize = panels.iter().map(|panel| panel.bars.len() + 2).sum();
    let height = u32::try_from(lines)? * BAR as u32 + 50;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        area.fill(&WHITE).map_err(|error| error.to_string())?;
        text(&area, title, (12, 12), 20)?;
        let mut top = 50;
        for panel in panels {
            draw_panel(&area, panel, &mut top)?;
        }
        area.present().map_err(|error| error.to_string())?;
    }
    Ok(svg)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn text(area: &Area<'_>, text: &str, at: (i32, i32), size: i32) -> Result<(), String> {
    let style = ("sans-serif", size).into_font().color(&BLACK);
    area.draw(&Text::new(text.to_owned(), at, style)).map_err(|error| error.to_string())
}

/// The value of a bar of full length. One router that is far off must not shrink all other bars to a line.
fn longest(bars: &[(String, f64)]) -> f64 {
    let values = || bars.iter().map(|(_, value)| *value);
    let median = Spread::of(values()).map_or(0.0, |spread| spread.median);
    values().fold(f64::MIN_POSITIVE, f64::max).min((8.0 * median).max(f64::MIN_POSITIVE))
}

fn draw_panel(area: &Area<'_>, panel: &Panel, top: &mut i32) -> Result<(), String> {
    text(area, &panel.title, (12, *top), 15)?;
    *top += BAR;
    let longest = longest(&panel.bars);
    for (name, value) in &panel.bars {
        let length = (value.clamp(0.0, longest) / longest * 480.0).round() as i32;
        let cut = if *value > longest { "… " } else { "" };
        let color = if name.starts_with("mini-lb") { OURS } else { THEIRS };
        let corners = [(150, *top), (150 + length.max(1), *top + BAR - 6)];
        text(area, name, (24, *top), 14)?;
        area.draw(&Rectangle::new(corners, color.filled())).map_err(|error| error.to_string())?;
        text(area, &format!("{cut}{}", number(*value)), (158 + length, *top), 14)?;
        *top += BAR;
    }
    *top += BAR;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_that_is_far_longer_than_the_others_is_cut() {
        let bars = |values: [f64; 3]| values.map(|value| (String::new(), value)).to_vec();
        assert!((longest(&bars([1.0, 2.0, 15.0])) - 15.0).abs() < 1e-9);
        assert!((longest(&bars([1.0, 2.0, 900.0])) - 16.0).abs() < 1e-9);
    }

    #[test]
    fn a_plot_has_a_bar_for_each_router_and_escapes_names() {
        let bars = vec![("mini-lb".to_owned(), 1.0), ("<peer> & co".to_owned(), 2.0)];
        let svg = draw("CPU", &[Panel { title: "small".to_owned(), bars }]).expect("a plot");
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        // The background is the third.
        assert_eq!(svg.matches("<rect").count(), 3);
        assert!(svg.contains("&lt;peer&gt; &amp; co"));
        assert!(
            svg.contains("width=\"480\"") && svg.contains("width=\"240\""),
            "twice as much is twice as long"
        );
    }
}
