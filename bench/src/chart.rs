//! Rows as a picture: a bar for each ratio and a mark for its target; lines where a load's depth
//! varies; bars of time and of memory.

use std::fs;
use std::path::Path;

use anyhow::anyhow;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::compare::Row;
use crate::growth::Grown;
use crate::report::Header;

const WIDTH: u32 = 900;
const ROW: i32 = 26;
const TOP: i32 = 78;
const BOTTOM: i32 = 48;
/// Where bars begin, and how long one of ratio 1 is.
const LEFT: i32 = 250;
const UNIT: i32 = 460;
/// The ratio where the scale ends.
const LONGEST: f64 = 1.15;
/// Where figures end.
const FIGURES: i32 = 880;
const INK: RGBColor = RGBColor(40, 40, 40);
const GRID: RGBColor = RGBColor(205, 205, 205);
/// Told apart also by those who do not see red and green.
const BLUE: RGBColor = RGBColor(31, 105, 180);
const ORANGE: RGBColor = RGBColor(204, 82, 0);

/// Writes an SVG of the rows that have a ratio.
pub(crate) fn draw(path: &Path, header: &Header, rows: &[Row]) -> anyhow::Result<()> {
    let rows: Vec<_> = rows.iter().filter_map(|row| Some((row, row.ratio?))).collect();
    let height = TOP + ROW * i32::try_from(rows.len())? + BOTTOM;
    let mut svg = String::new();
    {
        let area =
            SVGBackend::with_string(&mut svg, (WIDTH, u32::try_from(height)?)).into_drawing_area();
        let failed = |error: DrawingAreaErrorKind<_>| anyhow!("{error}");
        area.fill(&WHITE).map_err(failed)?;
        let text = |size: u32, color: RGBColor, h: HPos| {
            ("sans-serif", size).into_font().color(&color).pos(Pos::new(h, VPos::Center))
        };
        let write = |what: &str, at: (i32, i32), style: TextStyle| {
            area.draw_text(what, &style, at).map_err(failed)
        };
        let family = rows.first().map_or("", |(row, _)| row.family);
        let title = title(family).to_owned();
        write(&title, (20, 24), text(20, INK, HPos::Left))?;
        write(&header.machine(), (20, 50), text(14, INK, HPos::Left))?;
        let bottom = height - BOTTOM;
        for tenths in (0..=10).step_by(2) {
            let x = LEFT + UNIT * tenths / 10;
            let color = if tenths == 10 { INK } else { GRID };
            area.draw(&PathElement::new([(x, TOP), (x, bottom)], color)).map_err(failed)?;
            let label = format!("{:.1}", f64::from(tenths) / 10.0);
            write(&label, (x, bottom + 14), text(14, INK, HPos::Center))?;
        }
        for (i, (row, ratio)) in rows.iter().enumerate() {
            let y = TOP + ROW * i32::try_from(i)? + ROW / 2;
            write(row.name, (LEFT - 10, y), text(15, INK, HPos::Right))?;
            let end = LEFT + (f64::from(UNIT) * ratio.min(LONGEST)) as i32;
            let bar = Rectangle::new([(LEFT, y - 8), (end, y + 8)], BLUE.filled());
            area.draw(&bar).map_err(failed)?;
            // In a column of their own, where neither bars nor marks are.
            let figure = match row.target {
                Some(target) if target > LONGEST => format!("{ratio:.2} of {target:.0}"),
                _ => format!("{ratio:.2}"),
            };
            write(&figure, (FIGURES, y), text(14, INK, HPos::Right))?;
            if let Some(target) = row.target.filter(|target| *target <= LONGEST) {
                let x = LEFT + (f64::from(UNIT) * target) as i32;
                let mark = PathElement::new([(x, y - 11), (x, y + 11)], ORANGE.stroke_width(3));
                area.draw(&mark).map_err(failed)?;
            }
        }
        write("orange: target", (LEFT, bottom + 34), text(14, ORANGE, HPos::Left))?;
        area.present().map_err(failed)?;
    }
    fs::write(path, svg)?;
    Ok(())
}

/// What the bars of a family are.
fn title(family: &str) -> &'static str {
    match family {
        "array" => "array: throughput of arrays, as a share of that of one file",
        "protect" => "protect: throughput of writes, as a share of that from stable memory",
        "nbd" => "nbd: throughput with stableio, as a share of that without",
        "guests" => "guests: throughput with stableio, as a share of that without",
        _ => "host: throughput with stableio, as a share of that without",
    }
}

/// Writes an SVG of ratios over the depth that ends the rows' names (`…-qd16`).
pub(crate) fn lines(path: &Path, header: &Header, rows: &[Row]) -> anyhow::Result<()> {
    const HEIGHT: u32 = 460;
    const LEGEND: i32 = 710;
    const COLORS: [RGBColor; 5] =
        [BLUE, RGBColor(0, 120, 90), RGBColor(120, 120, 120), ORANGE, RGBColor(120, 60, 150)];
    let mut series: Vec<(&str, Vec<(f64, f64)>)> = Vec::new();
    for row in rows {
        let Some((load, depth)) = row.name.rsplit_once("-qd") else { continue };
        let point = (depth.parse::<f64>()?.log2(), row.ratio.unwrap_or(0.0));
        match series.last_mut().filter(|(name, _)| *name == load) {
            Some((_, points)) => points.push(point),
            None => series.push((load, vec![point])),
        }
    }
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
        let failed = |error: DrawingAreaErrorKind<_>| anyhow!("{error}");
        area.fill(&WHITE).map_err(failed)?;
        let title = ("sans-serif", 20).into_font().color(&INK);
        let small = ("sans-serif", 14).into_font().color(&INK);
        area.draw_text("log: throughput with a log, as a share of that without", &title, (20, 14))
            .map_err(failed)?;
        area.draw_text(&header.machine(), &small, (20, 42)).map_err(failed)?;
        let (_, below) = area.split_vertically(66);
        let highest = series.iter().flat_map(|(_, points)| points).map(|point| point.1);
        let highest = highest.fold(1.0, f64::max) * 1.05;
        let mut chart = ChartBuilder::on(&below)
            .margin(16)
            .margin_right(WIDTH - 690)
            .x_label_area_size(44)
            .y_label_area_size(50)
            .build_cartesian_2d(0.0..6.0, 0.0..highest)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .x_labels(7)
            .x_label_formatter(&|x: &f64| format!("{:.0}", x.exp2()))
            .x_desc("writes under way")
            .y_label_formatter(&|y: &f64| format!("{y:.1}"))
            .light_line_style(WHITE)
            .bold_line_style(GRID)
            .label_style(("sans-serif", 14).into_font().color(&INK))
            .draw()
            .map_err(failed)?;
        for (i, ((name, points), color)) in series.into_iter().zip(COLORS).enumerate() {
            let line = LineSeries::new(points, color.stroke_width(2)).point_size(4);
            chart.draw_series(line).map_err(failed)?;
            // Beside the lines, where it hides none.
            let y = 100 + 24 * i32::try_from(i)?;
            let key = Rectangle::new([(LEGEND, y), (LEGEND + 16, y + 10)], color.filled());
            area.draw(&key).map_err(failed)?;
            area.draw_text(name, &small, (LEGEND + 24, y - 2)).map_err(failed)?;
        }
        area.present().map_err(failed)?;
    }
    fs::write(path, svg)?;
    Ok(())
}

/// Writes an SVG of the time and the memory that openings take.
pub(crate) fn growth(path: &Path, header: &Header, lines: &[Grown]) -> anyhow::Result<()> {
    let height = TOP + ROW * i32::try_from(lines.len())? + BOTTOM;
    // Two columns of bars, each with its own scale.
    let (time_at, memory_at, longest) = (270, 600, 200);
    let most =
        |figure: fn(&Grown) -> f64| lines.iter().map(figure).fold(f64::MIN_POSITIVE, f64::max);
    let (most_time, most_memory) = (most(|line| line.open_ms), most(|line| line.resident_mib));
    let mut svg = String::new();
    {
        let area =
            SVGBackend::with_string(&mut svg, (WIDTH, u32::try_from(height)?)).into_drawing_area();
        let failed = |error: DrawingAreaErrorKind<_>| anyhow!("{error}");
        area.fill(&WHITE).map_err(failed)?;
        let write = |what: &str, at: (i32, i32), size: u32, h: HPos| {
            let style = ("sans-serif", size).into_font().color(&INK).pos(Pos::new(h, VPos::Center));
            area.draw_text(what, &style, at).map_err(failed)
        };
        write("growth: opening a raid5 of three members", (20, 24), 20, HPos::Left)?;
        write(&header.machine(), (20, 50), 14, HPos::Left)?;
        for (i, line) in lines.iter().enumerate() {
            let y = TOP + ROW * i32::try_from(i)? + ROW / 2;
            let name = format!("{}, {}", line.size, line.left);
            write(&name, (time_at - 10, y), 14, HPos::Right)?;
            for (at, figure, most, color, text) in [
                (time_at, line.open_ms, most_time, BLUE, format!("{:.0} ms", line.open_ms)),
                (
                    memory_at,
                    line.resident_mib,
                    most_memory,
                    ORANGE,
                    format!("{:.0} MiB", line.resident_mib),
                ),
            ] {
                let end = at + (f64::from(longest) * figure / most) as i32;
                let bar = Rectangle::new([(at, y - 8), (end, y + 8)], color.filled());
                area.draw(&bar).map_err(failed)?;
                write(&text, (end + 8, y), 14, HPos::Left)?;
            }
        }
        let y = height - BOTTOM / 2;
        write("time until usable", (time_at, y), 14, HPos::Left)?;
        write("memory", (memory_at, y), 14, HPos::Left)?;
        area.present().map_err(failed)?;
    }
    fs::write(path, svg)?;
    Ok(())
}
