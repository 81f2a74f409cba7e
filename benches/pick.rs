//! Time of a pick by pool size and by share of resting keys. Draws `docs/pick.svg`.
//!
//! ```text
//! cargo bench --all-features --bench pick
//! ```
//!
//! A pick can't be timed alone. The benchmark sends one request repeatedly through the layer and through
//! `SetRequestHeader`, which always sets the same header. The time of a pick is the difference.

mod support;

use std::{
    fmt::Debug,
    sync::{Arc, Mutex},
};

use http::{Request, StatusCode};
use support::{
    GivesBack, Turns,
    compare::{Bar, Comparison, Outcome},
    peers, plot, rotation,
};
use tower::Service;

const SIZES: [usize; 6] = [1, 10, 100, 1_000, 10_000, 100_000];
const SAME_HEADER: &str = "`SetRequestHeader`";

/// How the resting keys are distributed.
#[derive(Clone, Copy, PartialEq)]
enum Rests {
    None,
    HalfAtRandom,
    MostAtRandom,
    /// All but the last 1 %, and at least one key is available.
    MostInFront,
}

impl Rests {
    fn name(self) -> &'static str {
        match self {
            Self::None => "all healthy",
            Self::HalfAtRandom => "random 50 % rest",
            Self::MostAtRandom => "random 99 % rest",
            Self::MostInFront => "all but the last 1 % rest",
        }
    }

    fn includes(self, number: usize, keys: usize) -> bool {
        // The same keys in each process.
        let random = fastrand::Rng::with_seed(number as u64).f64();
        match self {
            Self::None => false,
            Self::HalfAtRandom => random < 0.5,
            Self::MostAtRandom => random < 0.99,
            Self::MostInFront => number + (keys / 100).max(1) < keys,
        }
    }
}

fn takes_turns<S>(mut client: S) -> impl FnMut()
where
    S: Service<Request<StatusCode>, Error: Debug>,
{
    let mut turns = Turns::new();
    move || turns.take(&mut client, StatusCode::OK)
}

fn layer(keys: usize, rests: Rests) -> String {
    format!("layer, {}, {}", number_of(keys), rests.name())
}

fn by_hand(keys: usize, rests: Rests) -> String {
    format!("`Mutex` by hand, {}, {}", number_of(keys), rests.name())
}

fn number_of(keys: usize) -> String {
    match keys {
        1 => "1 key".into(),
        1_000.. => format!("{},000 keys", keys / 1_000),
        _ => format!("{keys} keys"),
    }
}

trait Cases {
    fn same_header(self) -> Self;
    fn layer(self, keys: usize, rests: Rests) -> Self;
    fn by_hand(self, keys: usize, rests: Rests) -> Self;
}

impl Cases for Comparison {
    fn same_header(self) -> Self {
        self.case(SAME_HEADER, || takes_turns(peers::set_header(GivesBack)))
    }

    fn layer(self, keys: usize, rests: Rests) -> Self {
        self.case(layer(keys, rests), move || {
            takes_turns(rotation(GivesBack, keys, |number| rests.includes(number, keys)))
        })
    }

    fn by_hand(self, keys: usize, rests: Rests) -> Self {
        self.case(by_hand(keys, rests), move || {
            let list = peers::keys(keys, |number| rests.includes(number, keys));
            takes_turns(peers::by_hand(GivesBack, Arc::new(Mutex::new(list))))
        })
    }
}

/// Returns the time of a case beyond `SetRequestHeader`.
fn pick(outcome: &Outcome, case: &str) -> f64 {
    outcome.beyond(case, SAME_HEADER)
}

fn main() {
    let healthy = by_size();
    by_share();
    let resting = beside_a_scan();
    let (Some(healthy), Some(resting)) = (healthy, resting) else { return };
    let lines = [
        line("Mutex<Vec<Key>>, all but the last 1 % rest", plot::RED, &resting, by_hand, Rests::MostInFront),
        line("KeyRotationLayer, all but the last 1 % rest", plot::BLUE, &resting, layer, Rests::MostInFront),
        line("KeyRotationLayer, all healthy", plot::GREEN, &healthy, layer, Rests::None),
    ];
    let times = || lines.iter().flat_map(|line| line.points.iter().map(|(_, time)| *time));
    let (shortest, longest) = (times().fold(10.0, f64::min), times().fold(0.0, f64::max));
    assert!(shortest > 0.0, "a pick took no time");
    let keys = plot::Axis {
        title: "keys in the pool",
        range: plot::logarithmic(SIZES[0] as f64..SIZES[SIZES.len() - 1] as f64),
        label: |keys| format!("{keys:.0}"),
    };
    let range = plot::logarithmic(shortest..longest * 2.0);
    let time = plot::Axis { title: "time of a pick", range, label: time };
    plot::draw(
        "docs/pick.svg",
        "Time of a pick by number of keys",
        keys,
        time,
        plot::Legend::UpperLeft,
        &lines,
    );
}

fn line(
    name: &'static str,
    color: plot::Rgb,
    outcome: &Outcome,
    case: fn(usize, Rests) -> String,
    rests: Rests,
) -> plot::Line {
    let points = SIZES.map(|keys| (keys as f64, pick(outcome, &case(keys, rests)))).into();
    plot::Line { name, color, width: 3, points }
}

fn time(nanoseconds: &f64) -> String {
    match *nanoseconds {
        1_000_000.0.. => format!("{:.0} ms", nanoseconds / 1_000_000.0),
        1_000.0.. => format!("{:.0} µs", nanoseconds / 1_000.0),
        _ => format!("{nanoseconds:.0} ns"),
    }
}

fn by_size() -> Option<Outcome> {
    let cases = Comparison::new("by pool size, all keys healthy").same_header();
    let outcome = SIZES.iter().fold(cases, |cases, keys| cases.layer(*keys, Rests::None)).run()?;
    let (least, most) = (layer(1, Rests::None), layer(100_000, Rests::None));
    outcome.print(&least);
    let (of_1, of_100_000) = (pick(&outcome, &least), pick(&outcome, &most));
    println!("a pick alone: {of_1:.1} ns with 1 key, {of_100_000:.1} ns with 100,000");
    Bar::AtMost(1.2).print("a pick alone, 100,000 keys / 1 key", of_100_000 / of_1, "");
    outcome.bar(&most, &least, Bar::AtMost(1.2));
    Some(outcome)
}

fn by_share() {
    for keys in [100, 10_000] {
        let shares = [Rests::None, Rests::HalfAtRandom, Rests::MostAtRandom, Rests::MostInFront];
        let cases = Comparison::new(format!("by share of resting keys, {}", number_of(keys))).same_header();
        let comparison = shares.into_iter().fold(cases, |cases, rests| cases.layer(keys, rests));
        let Some(outcome) = comparison.run() else { continue };
        outcome.print(&layer(keys, Rests::None));
    }
}

fn beside_a_scan() -> Option<Outcome> {
    let rests = Rests::MostInFront;
    let cases = Comparison::new("compared with a locked list, all but the last 1 % rest").same_header();
    let outcome =
        SIZES.iter().fold(cases, |cases, keys| cases.layer(*keys, rests).by_hand(*keys, rests)).run()?;
    outcome.print(&layer(10_000, rests));
    outcome.bar(&by_hand(10_000, rests), &layer(10_000, rests), Bar::AtLeast(100.0));
    Some(outcome)
}
