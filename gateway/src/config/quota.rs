//! Quotas of an upstream's keys: `quotas = [{ requests = 60, per = "minute", burst = 10 }]`.

use tower_key_rotation::{KeyPool, Quota};

use super::{
    problems::Problems,
    table::{At, Fields},
};

pub(super) fn read(upstream: &mut Fields<'_>, problems: &mut Problems) -> Vec<Quota> {
    let quotas = upstream.tables(problems, "quotas");
    quotas.into_iter().filter_map(|quota| one(quota, problems)).collect()
}

fn one(mut table: Fields<'_>, problems: &mut Problems) -> Option<Quota> {
    let mut number = |field| {
        let At { at, value } = table.parsed::<u32>(problems, field)?;
        if value == 0 {
            table.wrong_field(problems, at, field, "it must be at least 1");
        }
        Some(value)
    };
    let (requests, tokens, burst) = (number("requests"), number("tokens"), number("burst"));
    let per = table.text(problems, "per").map(|per| per.value);
    let is_window = table.flag(problems, "window");
    let (time, zone) = (table.text(problems, "resets-at"), table.text(problems, "zone"));
    let units = match (requests, tokens) {
        (Some(units), None) | (None, Some(units)) => Some(units),
        _ => {
            table.wrong(problems, "it must have either requests or tokens");
            None
        }
    };
    let per = match per.as_deref() {
        Some("second") => Some(Quota::per_second as fn(u32) -> Quota),
        Some("minute") => Some(Quota::per_minute as _),
        Some("hour") => Some(Quota::per_hour as _),
        Some("day") => Some(Quota::per_day as _),
        _ => {
            table.wrong(problems, "per must be \"second\", \"minute\", \"hour\" or \"day\"");
            None
        }
    };
    let resets = match (time, zone) {
        (Some(time), Some(zone)) => Some((time.value, zone.value)),
        (None, None) => None,
        _ => {
            table.wrong(problems, "resets-at and zone belong together");
            None
        }
    };
    let mut quota = per?(units?);
    if tokens.is_some() {
        quota = quota.tokens();
    }
    if let Some(burst) = burst {
        quota = quota.burst(burst);
    }
    if is_window == Some(true) {
        quota = quota.window();
    }
    if let Some((time, zone)) = resets {
        quota = quota.resets_at(time, zone);
    }
    // The library checks the time and the zone when it builds a pool.
    if let Err(error) = KeyPool::builder().quota(quota.clone()).build() {
        table.wrong(problems, error);
        return None;
    }
    table.finish(problems);
    Some(quota)
}
