//! Draws a line plot as an SVG.

use std::ops::Range;

use plotters::{
    coord::ranged1d::{AsRangedCoord, ValueFormatter},
    prelude::*,
};

pub use plotters::style::RGBColor as Rgb;

/// An axis. `range` is a range of numbers, or one with a logarithmic scale.
pub struct Axis<R> {
    pub title: &'static str,
    pub range: R,
    pub label: fn(&f64) -> String,
}

pub struct Line {
    pub name: &'static str,
    pub color: Rgb,
    pub width: u32,
    pub points: Vec<(f64, f64)>,
}

/// Where the names of the lines stand.
pub enum Legend {
    UpperLeft,
    /// Pixels from the left and from above.
    At(i32, i32),
}

pub const RED: Rgb = RGBColor(200, 80, 50);
pub const BLUE: Rgb = RGBColor(40, 110, 180);
pub const GREEN: Rgb = RGBColor(90, 160, 80);
pub const YELLOW: Rgb = RGBColor(230, 170, 40);

pub fn logarithmic(range: Range<f64>) -> impl AsRangedCoord<Value = f64, CoordDescType: Coordinates> {
    range.log_scale()
}

/// Coordinates along an axis, with labels.
pub trait Coordinates: Ranged<ValueType = f64> + ValueFormatter<f64> {}

impl<C: Ranged<ValueType = f64> + ValueFormatter<f64>> Coordinates for C {}

/// Draws on white, which is legible on dark pages as well. The path is relative to the package's folder.
///
/// Later lines are on top of earlier ones.
pub fn draw<X, Y>(path: &str, caption: &str, x: Axis<X>, y: Axis<Y>, legend: Legend, lines: &[Line])
where
    X: AsRangedCoord<Value = f64, CoordDescType: Coordinates>,
    Y: AsRangedCoord<Value = f64, CoordDescType: Coordinates>,
{
    let path = format!("{}/{path}", env!("CARGO_MANIFEST_DIR"));
    let root = SVGBackend::new(&path, (720, 400)).into_drawing_area();
    root.fill(&WHITE).unwrap();
    let mut chart = ChartBuilder::on(&root)
        .caption(caption, ("sans-serif", 18))
        .margin(16)
        .margin_right(44)
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d(x.range, y.range)
        .unwrap();
    chart
        .configure_mesh()
        .x_desc(x.title)
        .y_desc(y.title)
        .x_label_formatter(&x.label)
        .y_label_formatter(&y.label)
        .label_style(("sans-serif", 13))
        .light_line_style(TRANSPARENT)
        .draw()
        .unwrap();
    for line in lines {
        let style = line.color.stroke_width(line.width);
        chart
            .draw_series(LineSeries::new(line.points.iter().copied(), style))
            .unwrap()
            .label(line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
        let dots = line.points.iter().map(|point| Circle::new(*point, 4, line.color.filled()));
        chart.draw_series(dots).unwrap();
    }
    let position = match legend {
        Legend::UpperLeft => SeriesLabelPosition::UpperLeft,
        Legend::At(x, y) => SeriesLabelPosition::Coordinate(x, y),
    };
    chart
        .configure_series_labels()
        .position(position)
        .background_style(WHITE)
        .border_style(TRANSPARENT)
        .label_font(("sans-serif", 14))
        .draw()
        .unwrap();
    root.present().unwrap();
    println!("written: {path}");
}
