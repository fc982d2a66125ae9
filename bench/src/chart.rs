//! Rows as a picture: a bar for each ratio, a mark for its target.

use std::fs;
use std::path::Path;

use anyhow::anyhow;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::compare::Row;
use crate::report::Header;

const WIDTH: u32 = 900;
const ROW: i32 = 26;
const TOP: i32 = 78;
const BOTTOM: i32 = 48;
/// Where bars begin, and how long one of ratio 1 is.
const LEFT: i32 = 250;
const UNIT: i32 = 460;
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
        let title = format!("{family}: throughput with stableio, as a share of that without");
        write(&title, (20, 24), text(20, INK, HPos::Left))?;
        write(&header.machine(), (20, 50), text(14, INK, HPos::Left))?;
        let bottom = height - BOTTOM;
        for tenths in (0..=12).step_by(2) {
            let x = LEFT + UNIT * tenths / 10;
            let color = if tenths == 10 { INK } else { GRID };
            area.draw(&PathElement::new([(x, TOP), (x, bottom)], color)).map_err(failed)?;
            let label = format!("{:.1}", f64::from(tenths) / 10.0);
            write(&label, (x, bottom + 14), text(14, INK, HPos::Center))?;
        }
        for (i, (row, ratio)) in rows.iter().enumerate() {
            let y = TOP + ROW * i32::try_from(i)? + ROW / 2;
            write(row.name, (LEFT - 10, y), text(15, INK, HPos::Right))?;
            let end = LEFT + (f64::from(UNIT) * ratio.min(1.2)) as i32;
            let bar = Rectangle::new([(LEFT, y - 8), (end, y + 8)], BLUE.filled());
            area.draw(&bar).map_err(failed)?;
            // In a column of their own, where neither bars nor marks are.
            write(&format!("{ratio:.2}"), (FIGURES, y), text(14, INK, HPos::Right))?;
            if let Some(target) = row.target {
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
