//! The plot: failed requests by load, for one process with the keys of `openai`.

use crate::{
    arguments::name,
    chart::{self, Axis, BLUE, GREEN, Legend, Line, RED, Rgb, YELLOW},
    clients::ClientKind,
    service::ServiceKind,
    table::Row,
};

pub(crate) const SERVICE: ServiceKind = ServiceKind::OpenAi;

pub(crate) fn clients() -> [ClientKind; 4] {
    [ClientKind::Today, ClientKind::LeastUsed, ClientKind::Governor, ClientKind::Paced]
}

pub(crate) fn loads() -> impl Iterator<Item = f64> {
    (50..=110).step_by(5).map(|percent| f64::from(percent) / 100.0)
}

pub(crate) fn draw(path: &str, rows: &[Row]) {
    // A wide line remains visible below a narrow one.
    let lines = clients().map(|client| match client {
        ClientKind::Today => line(rows, client, "this crate without pacing", RED, 3),
        ClientKind::LeastUsed => line(rows, client, "least used, as in LiteLLM (knows the limits)", GREEN, 3),
        ClientKind::Governor => line(rows, client, "governor (knows the limits)", YELLOW, 9),
        _ => line(rows, client, "this crate, paced (learns the limits)", BLUE, 3),
    });
    let x = Axis {
        title: "load, in % of what the service allows",
        range: 50.0..110.0,
        label: |load| format!("{load:.0} %"),
    };
    let y = Axis { title: "failed requests", range: 0.0..100.0, label: |failed| format!("{failed:.0} %") };
    chart::draw(path, "Failed requests by load", x, y, Legend::At(245, 110), &lines);
}

/// Returns the line of a client: loads and failed requests, both in percent.
fn line(rows: &[Row], client: ClientKind, label: &'static str, color: Rgb, width: u32) -> Line {
    let client = name(client);
    let point = |row: &Row| (100.0 * row.load, 100.0 * row.figures.failed);
    let points = rows.iter().filter(|row| row.client == client).map(point).collect();
    Line { name: label, color, width, points }
}
