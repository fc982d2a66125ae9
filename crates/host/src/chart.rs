//! The timeline of `detect` as a picture.

use std::fmt::Display;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::summary::Timeline;

/// Points of a curve: more than that nobody sees.
const POINTS: usize = 240;
const SIZE: (u32, u32) = (1000, 620);
const INK: RGBColor = RGBColor(40, 40, 40);
/// Told apart also by those who do not see red and green.
const BLUE: RGBColor = RGBColor(31, 105, 180);
const ORANGE: RGBColor = RGBColor(204, 82, 0);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws direct writes and changed ones per second, in SVG.
pub fn chart(timeline: &Timeline, title: &str) -> Result<String, impl Display + use<>> {
    let mut svg = String::new();
    draw(timeline, title, &mut svg).map(|()| svg)
}

fn draw(timeline: &Timeline, title: &str, svg: &mut String) -> Result<(), String> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let text = |error: DrawingAreaErrorKind<_>| error.to_string();
    root.fill(&WHITE).map_err(text)?;
    let title_style = ("sans-serif", 22).into_font().color(&INK);
    let below = root.margin(14, 0, 0, 0).titled(title, title_style).map_err(text)?;
    // Two panels: of a thousand writes one that changed is no line above the axis.
    let (upper, lower) = below.split_vertically((SIZE.1 - 50) / 2);
    panel(&upper, timeline, &timeline.watched, "direct writes", BLUE, "")?;
    panel(
        &lower,
        timeline,
        &timeline.changed,
        "changed in flight",
        ORANGE,
        "seconds since the start",
    )?;
    root.present().map_err(text)
}

fn panel(
    area: &Area<'_>,
    timeline: &Timeline,
    counts: &[u32],
    name: &str,
    color: RGBColor,
    x_title: &str,
) -> Result<(), String> {
    let text = |error: DrawingAreaErrorKind<_>| error.to_string();
    let points = rates(counts, timeline.step_s);
    let end = counts.len() as f64 * timeline.step_s;
    let top = points.iter().map(|(_, rate)| *rate).fold(1.0, f64::max) * 1.35;
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .margin_right(28)
        .x_label_area_size(if x_title.is_empty() { 28 } else { 48 })
        .y_label_area_size(90)
        .build_cartesian_2d(0.0..end, 0.0..top)
        .map_err(text)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .axis_style(INK)
        .label_style(("sans-serif", 15).into_font().color(&INK))
        .axis_desc_style(("sans-serif", 16).into_font().color(&INK))
        .x_desc(x_title)
        .y_desc("per second")
        .x_label_formatter(&|x| short(*x))
        .y_label_formatter(&|y| short(*y))
        .y_labels(6)
        .draw()
        .map_err(text)?;
    let total: u64 = counts.iter().map(|count| u64::from(*count)).sum();
    chart
        .draw_series(
            AreaSeries::new(points, 0.0, color.mix(0.25)).border_style(color.stroke_width(2)),
        )
        .map_err(text)?
        .label(format!("{name}: {total}"))
        .legend(move |(x, y)| Rectangle::new([(x, y - 6), (x + 16, y + 6)], color.filled()));
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.85))
        .border_style(INK.mix(0.3))
        .label_font(("sans-serif", 16).into_font().color(&INK))
        .draw()
        .map_err(text)
}

/// The outline of the counts as rates: each step is level, as long as it lasts.
fn rates(counts: &[u32], step_s: f64) -> Vec<(f64, f64)> {
    let per_bin = counts.len().div_ceil(POINTS).max(1);
    let mut points = Vec::new();
    for (bin, counts) in counts.chunks(per_bin).enumerate() {
        let start = (bin * per_bin) as f64 * step_s;
        let length = counts.len() as f64 * step_s;
        let rate = counts.iter().map(|count| f64::from(*count)).sum::<f64>() / length;
        points.extend([(start, rate), (start + length, rate)]);
    }
    points
}

/// A number of an axis, as short as it goes.
fn short(number: f64) -> String {
    let (scaled, unit) = match number.abs() {
        n if n >= 1e6 => (number / 1e6, " M"),
        n if n >= 1e4 => (number / 1e3, " k"),
        _ => (number, ""),
    };
    let text = format!("{scaled:.2}");
    format!("{}{unit}", text.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeline_becomes_a_picture_with_titles_units_and_sums() -> Result<(), String> {
        let watched: Vec<u32> = (0..1000).map(|n| 2000 + n % 37 * 10).collect();
        let changed: Vec<u32> = (0..1000).map(|n| u32::from(n % 90 == 0) * 3).collect();
        let total: u32 = watched.iter().sum();
        let timeline = Timeline { step_s: 0.1, watched, changed };
        let svg = chart(&timeline, "fio: 12 of 100").map_err(|error| error.to_string())?;
        let legend = format!("direct writes: {total}");
        for text in
            ["fio: 12 of 100", "per second", "seconds since", "changed in flight: 36", &legend]
        {
            assert!(svg.contains(text), "{text}");
        }
        if let Some(path) = std::env::var_os("STABLEIO_KEEP_CHART") {
            std::fs::write(path, svg).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    #[test]
    fn nothing_at_all_is_a_picture_too() {
        let timeline = Timeline { step_s: 0.1, watched: vec![0], changed: vec![0] };
        assert!(chart(&timeline, "true").is_ok());
    }

    #[test]
    fn rates_keep_the_sum() {
        let counts: Vec<u32> = (0..5000).map(|n| n % 7).collect();
        let points = rates(&counts, 0.1);
        let area: f64 = points.chunks(2).map(|ends| (ends[1].0 - ends[0].0) * ends[0].1).sum();
        assert!((area - counts.iter().sum::<u32>() as f64).abs() < 1e-6);
    }
}
