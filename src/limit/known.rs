//! What one owner of a limit tells the next.

/// What an owner knows of a limit's requests. Times are in seconds from now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Known {
    /// The rate lies between `low` and `high`, in requests per second.
    Bucket {
        size: f32,
        low: f32,
        high: f32,
        level: f32,
    },
    Window {
        size: f32,
        left: f32,
        ends_in: f32,
        period: f32,
    },
    /// A rate that was found by refusals.
    Found {
        rate: f32,
        refused_rate: f32,
    },
}
