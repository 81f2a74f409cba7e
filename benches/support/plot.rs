//! Draws an SVG plot with two logarithmic axes.

use plotters::prelude::*;

pub struct Line {
    pub name: &'static str,
    /// Pairs of a number of keys and a time in nanoseconds.
    pub points: Vec<(usize, f64)>,
}

const COLORS: [RGBColor; 3] = [RGBColor(200, 80, 50), RGBColor(40, 110, 180), RGBColor(90, 160, 80)];

/// Draws the time of a pick by pool size. The path is relative to the package's folder.
pub fn draw(path: &str, lines: &[Line]) {
    let path = format!("{}/{path}", env!("CARGO_MANIFEST_DIR"));
    let root = SVGBackend::new(&path, (720, 400)).into_drawing_area();
    root.fill(&WHITE).unwrap();
    let points = || lines.iter().flat_map(|line| line.points.iter().copied());
    let most_keys = points().map(|(keys, _)| keys).max().unwrap() as f64;
    let fewest_keys = points().map(|(keys, _)| keys).min().unwrap() as f64;
    let longest = points().map(|(_, time)| time).fold(0.0, f64::max);
    let shortest = points().map(|(_, time)| time).fold(10.0, f64::min);
    assert!(shortest > 0.0, "a pick took no time");

    let mut chart = ChartBuilder::on(&root)
        .caption("Time of a pick by number of keys", ("sans-serif", 18))
        .margin(16)
        .margin_right(44)
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d((fewest_keys..most_keys).log_scale(), (shortest..longest * 2.0).log_scale())
        .unwrap();
    chart
        .configure_mesh()
        .x_desc("keys in the pool")
        .y_desc("time of a pick")
        .x_label_formatter(&|keys| format!("{keys:.0}"))
        .y_label_formatter(&time)
        .label_style(("sans-serif", 13))
        .light_line_style(TRANSPARENT)
        .draw()
        .unwrap();
    for (line, color) in lines.iter().zip(COLORS) {
        let points: Vec<_> = line.points.iter().map(|(keys, time)| (*keys as f64, *time)).collect();
        chart
            .draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(3)))
            .unwrap()
            .label(line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(3)));
        chart.draw_series(points.iter().map(|point| Circle::new(*point, 4, color.filled()))).unwrap();
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .border_style(TRANSPARENT)
        .label_font(("sans-serif", 14))
        .draw()
        .unwrap();
    root.present().unwrap();
    println!("written: {path}");
}

fn time(nanoseconds: &f64) -> String {
    match *nanoseconds {
        1_000_000.0.. => format!("{:.0} ms", nanoseconds / 1_000_000.0),
        1_000.0.. => format!("{:.0} µs", nanoseconds / 1_000.0),
        _ => format!("{nanoseconds:.0} ns"),
    }
}
