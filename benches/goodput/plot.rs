//! The plot: failed requests by load, for one process with the keys of `openai`.

use plotters::prelude::*;

use crate::{arguments::name, clients::ClientKind, service::ServiceKind, table::Row};

pub(crate) const SERVICE: ServiceKind = ServiceKind::OpenAi;

/// Drawn in this order: where lines are on top of each other, the thick one remains visible.
const LINES: [Line; 4] = [
    Line::new(ClientKind::Today, "this crate without pacing", RGBColor(200, 80, 50), 3),
    Line::new(
        ClientKind::LeastUsed,
        "least used, as in LiteLLM (knows the limits)",
        RGBColor(90, 160, 80),
        3,
    ),
    Line::new(ClientKind::Governor, "governor (knows the limits)", RGBColor(230, 170, 40), 9),
    Line::new(ClientKind::Paced, "this crate, paced (learns the limits)", RGBColor(40, 110, 180), 3),
];

struct Line {
    client: ClientKind,
    label: &'static str,
    color: RGBColor,
    width: u32,
}

impl Line {
    const fn new(client: ClientKind, label: &'static str, color: RGBColor, width: u32) -> Self {
        Self { client, label, color, width }
    }

    /// Returns loads and failed requests, both in percent.
    fn points(&self, rows: &[Row]) -> Vec<(f64, f64)> {
        let client = name(self.client);
        let point = |row: &Row| (100.0 * row.load, 100.0 * row.figures.failed);
        rows.iter().filter(|row| row.client == client).map(point).collect()
    }
}

pub(crate) fn clients() -> Vec<ClientKind> {
    LINES.iter().map(|line| line.client).collect()
}

pub(crate) fn loads() -> impl Iterator<Item = f64> {
    (50..=110).step_by(5).map(|percent| f64::from(percent) / 100.0)
}

/// Draws an SVG on white, which is legible on dark pages as well. The path is relative to the package's folder.
pub(crate) fn draw(path: &str, rows: &[Row]) {
    let path = format!("{}/{path}", env!("CARGO_MANIFEST_DIR"));
    let root = SVGBackend::new(&path, (720, 400)).into_drawing_area();
    root.fill(&WHITE).unwrap();
    let mut chart = ChartBuilder::on(&root)
        .caption("Failed requests by load", ("sans-serif", 18))
        .margin(16)
        .margin_right(44)
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d(50.0..110.0, 0.0..100.0)
        .unwrap();
    chart
        .configure_mesh()
        .x_desc("load, in % of what the service allows")
        .y_desc("failed requests")
        .x_label_formatter(&|load| format!("{load:.0} %"))
        .y_label_formatter(&|failed| format!("{failed:.0} %"))
        .label_style(("sans-serif", 13))
        .light_line_style(TRANSPARENT)
        .draw()
        .unwrap();
    for line in &LINES {
        let (points, style) = (line.points(rows), line.color.stroke_width(line.width));
        chart
            .draw_series(LineSeries::new(points, style))
            .unwrap()
            .label(line.label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::Coordinate(245, 110))
        .background_style(WHITE)
        .border_style(TRANSPARENT)
        .label_font(("sans-serif", 14))
        .draw()
        .unwrap();
    root.present().unwrap();
    println!("written: {path}");
}
