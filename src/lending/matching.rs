//! Who lends how many tokens to whom. All processes compute the same table, and each serves its own part of it.

/// What one process needs and has in a scope.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Row {
    pub(crate) process: u64,
    /// Requests that wait.
    pub(crate) waiting: f64,
    /// For how long the first of them has been waiting, in seconds.
    pub(crate) oldest: f64,
    /// Requests that arrive within the horizon.
    pub(crate) expected: f64,
    /// Tokens of its own limits until the horizon: of preferred keys.
    pub(crate) supply: f64,
    /// The same of spare keys, which serve while no preferred one has room.
    pub(crate) spare: f64,
    /// Tokens that it holds, and those that are on their way to it.
    pub(crate) stock: f64,
}

/// With plenty, so many standard deviations of the expected requests are lent beyond them.
const SPARE: f64 = 3.0;

/// Returns how many tokens of preferred keys `me` sets aside for each process. `rows` are sorted by process.
///
/// With plenty, each process needs what waits and arrives, and some more against chance. If tokens are scarce, they are for
/// the requests that have been waiting longest, wherever that is. The surpluses, one after the other, meet the deficits in
/// the same order, so two lenders do not serve the same need. While tokens are scarce, `me` sets its own part aside too: the
/// loans would take what comes first, each time.
pub(crate) fn shares(rows: &[Row], me: u64) -> Vec<(u64, f64)> {
    let mut needs: Vec<f64> = rows.iter().map(|row| row.waiting + row.expected).collect();
    let there: f64 = rows.iter().map(|row| row.supply + row.stock).sum();
    let mut needed: f64 = needs.iter().sum();
    if needed < there {
        let spare = |row: &Row| SPARE * row.expected.sqrt() + 1.0;
        let all: f64 = rows.iter().map(spare).sum();
        let part = ((there - needed) / all).min(1.0);
        needs.iter_mut().zip(rows).for_each(|(need, row)| *need += part * spare(row));
        needed = needs.iter().sum();
    }
    let is_scarce = needed > there;
    if is_scarce {
        needs = first_come(rows, there);
    }
    let missing = |(need, row): (&f64, &Row)| need - row.stock - row.supply;
    let missing: Vec<f64> = needs.iter().zip(rows).map(missing).collect();
    let deficit = |place: usize| missing[place].max(0.0);
    let surplus = |place: usize| (-missing[place]).clamp(0.0, rows[place].supply);
    let deficits: f64 = (0..rows.len()).map(deficit).sum();
    let surpluses: f64 = (0..rows.len()).map(surplus).sum();
    let Some(mine) = rows.iter().position(|row| row.process == me) else { return Vec::new() };
    let mut shares = Vec::new();
    if is_scarce {
        let own = needs[mine] - rows[mine].stock;
        shares.push((me, own.clamp(0.0, rows[mine].supply)));
    }
    if deficits <= 0.0 || surpluses <= 0.0 {
        return shares;
    }
    let lent = (deficits / surpluses).min(1.0);
    let met = (surpluses / deficits).min(1.0);
    let from = (0..mine).map(surplus).sum::<f64>() * lent;
    let to = from + surplus(mine) * lent;
    let mut begin = 0.0;
    for (place, row) in rows.iter().enumerate() {
        let end = begin + deficit(place) * met;
        let share = to.min(end) - from.max(begin);
        if share > 0.0 {
            shares.push((row.process, share));
        }
        begin = end;
    }
    shares
}

/// Returns what spare keys have to serve: the needs that the preferred keys leave, and the spare keys' supply in the place
/// of theirs. `None` if there is no such need, or no such key.
pub(crate) fn left_to_spare(rows: &[Row]) -> Option<Vec<Row>> {
    let there: f64 = rows.iter().map(|row| row.supply + row.stock).sum();
    let needed: f64 = rows.iter().map(|row| row.waiting + row.expected).sum();
    if needed <= there || rows.iter().all(|row| row.spare <= 0.0) {
        return None;
    }
    let left = |(row, served): (&Row, f64)| Row {
        waiting: (row.waiting - served).max(0.0),
        expected: row.expected - (served - row.waiting).clamp(0.0, row.expected),
        stock: (row.stock - served).max(0.0),
        supply: row.spare,
        spare: 0.0,
        ..*row
    };
    Some(rows.iter().zip(first_come(rows, there)).map(left).collect())
}

/// Returns how many requests of each process are among the first ones of all, of which there are so many. A process's
/// requests are taken to have come at even intervals.
fn first_come(rows: &[Row], first: f64) -> Vec<f64> {
    let waiting: f64 = rows.iter().map(|row| row.waiting).sum();
    if waiting < first {
        let expected: f64 = rows.iter().map(|row| row.expected).sum();
        let part = (first - waiting) / expected.max(f64::MIN_POSITIVE);
        return rows.iter().map(|row| row.waiting + part.min(1.0) * row.expected).collect();
    }
    let older_than = |age: f64| {
        let of = move |row: &Row| row.waiting * (1.0 - age / row.oldest.max(0.1)).max(0.0);
        rows.iter().map(of)
    };
    let (mut low, mut high) = (0.0, rows.iter().map(|row| row.oldest).fold(0.1, f64::max));
    for _ in 0..30 {
        let age = 0.5 * (low + high);
        if older_than(age).sum::<f64>() > first { low = age } else { high = age }
    }
    older_than(high).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(process: u64, waiting: f64, supply: f64) -> Row {
        Row { process, waiting, oldest: 10.0, supply, ..Row::default() }
    }

    fn total(shares: &[(u64, f64)]) -> f64 {
        shares.iter().map(|(_, share)| share).sum()
    }

    #[test]
    fn scarce_tokens_are_shared_by_need() {
        let rows = [row(1, 0.0, 6.0), row(2, 12.0, 0.0), row(3, 6.0, 3.0)];
        let of = |me| rounded(shares(&rows, me));
        assert_eq!(of(1), [(1, 0), (2, 60)]);
        assert_eq!(of(2), [(2, 0)]);
        assert_eq!(of(3), [(3, 30)]);
    }

    #[test]
    fn scarce_tokens_are_for_those_that_wait_longest() {
        let rows = [row(1, 0.0, 6.0), row(2, 10.0, 0.0), Row { oldest: 5.0, ..row(3, 10.0, 0.0) }];
        assert_eq!(rounded(shares(&rows, 1)), [(1, 0), (2, 53), (3, 7)]);
        let few = [row(1, 0.0, 4.0), rows[1], rows[2]];
        assert_eq!(rounded(shares(&few, 1)), [(1, 0), (2, 40)]);
    }

    fn rounded(shares: Vec<(u64, f64)>) -> Vec<(u64, u32)> {
        let tenths = |(process, share): (u64, f64)| (process, (10.0 * share).round() as u32);
        shares.into_iter().map(tenths).collect()
    }

    #[test]
    fn each_lender_serves_another_part_of_the_needs() {
        let rows = [row(1, 0.0, 2.0), row(2, 3.0, 0.0), row(3, 0.0, 2.0), row(4, 3.0, 0.0)];
        assert_eq!(rounded(shares(&rows, 1)), [(1, 0), (2, 20)]);
        assert_eq!(rounded(shares(&rows, 3)), [(3, 0), (4, 20)]);
    }

    #[test]
    fn plenty_is_lent_in_advance() {
        let quiet = |process, supply| Row { process, supply, expected: 1.0, ..Row::default() };
        let lent = shares(&[quiet(1, 100.0), quiet(2, 0.0)], 1);
        assert_eq!(lent, [(2, 1.0 + SPARE + 1.0)]);
        let stocked = Row { stock: 5.0, ..quiet(2, 0.0) };
        assert!(shares(&[quiet(1, 100.0), stocked], 1).is_empty());
    }

    #[test]
    fn spare_keys_serve_what_preferred_ones_leave() {
        let spare = |row: Row, spare| Row { spare, ..row };
        let plenty = [spare(row(1, 4.0, 10.0), 9.0), spare(row(2, 5.0, 0.0), 9.0)];
        assert_eq!(left_to_spare(&plenty), None);
        // The first one has to lend although the other one has spare keys.
        assert!(shares(&plenty, 1).iter().any(|(to, share)| (*to, *share >= 5.0) == (2, true)));

        let scarce = [spare(row(1, 4.0, 6.0), 0.0), spare(row(2, 8.0, 0.0), 9.0)];
        assert_eq!(rounded(shares(&scarce, 1)), [(1, 20), (2, 40)]);
        let left = left_to_spare(&scarce).unwrap();
        let of = |row: &Row| (row.waiting.round() as u32, row.supply as u32, row.spare as u32);
        assert_eq!(left.iter().map(of).collect::<Vec<_>>(), [(2, 0, 0), (4, 9, 0)]);
        // With one more, since there are plenty of them.
        assert_eq!(rounded(shares(&left, 2)), [(1, 30)]);
        let without = [row(1, 4.0, 6.0), row(2, 8.0, 0.0)];
        assert_eq!(left_to_spare(&without), None);
    }

    #[test]
    fn nobody_gives_away_more_than_it_has() {
        let mut random = fastrand::Rng::with_seed(5);
        for _ in 0..1_000 {
            let rows: Vec<Row> = (0..random.u64(1..12))
                .map(|process| Row {
                    process,
                    waiting: f64::from(random.u32(0..20)),
                    oldest: random.f64() * 20.0,
                    expected: random.f64() * 8.0,
                    supply: random.f64() * 10.0,
                    spare: random.f64() * 10.0,
                    stock: f64::from(random.u32(0..5)),
                })
                .collect();
            for row in &rows {
                let given = total(&shares(&rows, row.process));
                assert!(given <= row.supply + 1e-6, "{row:?} gives {given} of {rows:?}");
            }
        }
    }
}
