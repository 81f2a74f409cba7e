//! What a process publishes once a second, and its encoding: about 50 B a scope, and 19 B a loan.
//!
//! Times are ns of the pool's clock. A message carries them as distances from its writing, so clocks need not agree.

use std::time::Duration;

use crate::limit::{Alike, Kind, Known, Left, Remaining};

/// The first byte. A message that begins with another one is of a version that this one can't read.
const VERSION: u8 = 1;

/// The largest amount that a reader takes: a faulty process must not make others overflow.
const LARGEST: f32 = 1e12;

/// Times are sent in tenths of a millisecond.
const TICK: i64 = 100_000;

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Message {
    /// Counts up, from 1.
    pub(crate) number: u32,
    /// How long before the writing the process read the messages that this one takes into account, in ns.
    pub(crate) read_before: u64,
    /// One for each scope that the process uses.
    pub(crate) parts: Vec<Part>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Part {
    pub(crate) scope: u64,
    /// How long the process has been using the scope, in ns.
    pub(crate) since: u64,
    pub(crate) need: Need,
    /// Whether the process lends and borrows. It does not where the service says nothing of what is left.
    pub(crate) is_sharing: bool,
    /// Whether it has found the service's headers to be wrong, itself.
    pub(crate) is_lying: bool,
    /// What its probes say of the headers.
    pub(crate) probed: f32,
    /// What is known best of a limit's rate: the keys of one scope are mostly alike.
    pub(crate) alike: Option<Alike>,
    /// Each with the number of messages that it has been in already.
    pub(crate) items: Vec<(u8, Item)>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Need {
    /// Requests that wait.
    pub(crate) waiting: f32,
    /// For how long the first of them has been waiting, in seconds.
    pub(crate) oldest: f32,
    /// Requests per second.
    pub(crate) rate: f32,
    /// Tokens that the process's own limits have until its horizon: those of preferred keys.
    pub(crate) supply: f32,
    /// The same of spare keys.
    pub(crate) spare: f32,
    /// Tokens that it holds.
    pub(crate) stock: f32,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Item {
    Loan(Loan),
    Back(Back),
    Release(Release),
    Report(Report),
    Spent(Spent),
    Used(Used),
}

/// A token for another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loan {
    pub(crate) to: u32,
    pub(crate) number: u32,
    pub(crate) limit: u32,
    pub(crate) at: u64,
    pub(crate) until: u64,
    pub(crate) reports: bool,
}

/// A token that was not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Back {
    pub(crate) lender: u32,
    pub(crate) number: u32,
}

/// How many of the service's tokens a request took that used a loan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) lender: u32,
    pub(crate) number: u32,
    pub(crate) tokens: u32,
}

/// Of a lender's loans in the scope, all before this number have been used, or are on their way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spent {
    pub(crate) lender: u32,
    pub(crate) before: u32,
}

/// A limit that its owner has given up, and what it knew of the limit at that time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Release {
    pub(crate) limit: u32,
    pub(crate) at: u64,
    pub(crate) known: Option<Known>,
}

/// What a request with a borrowed token met.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Report {
    pub(crate) lender: u32,
    pub(crate) number: u32,
    pub(crate) sent_at: u64,
    pub(crate) is_limited: bool,
    pub(crate) wait: Option<Duration>,
    pub(crate) said: Remaining,
}

impl Message {
    /// `now` is when the message is written.
    pub(crate) fn encode(&self, now: u64) -> Vec<u8> {
        let mut to = Writer { bytes: vec![VERSION], now };
        to.u32(self.number);
        to.span(self.read_before);
        for part in &self.parts {
            to.u64(part.scope);
            to.span(part.since);
            let Need { waiting, oldest, rate, supply, spare, stock } = part.need;
            for number in [waiting, oldest, rate, supply, spare, stock] {
                to.f32(number);
            }
            to.u8(u8::from(part.is_sharing) | u8::from(part.is_lying) << 1);
            to.f32(part.probed);
            to.alike(part.alike);
            to.u16(part.items.len().min(usize::from(u16::MAX)) as u16);
            for (age, item) in part.items.iter().take(usize::from(u16::MAX)) {
                to.item(*age, item);
            }
        }
        to.bytes
    }

    /// `written` is when the message was written, by the reader's clock. Returns `None` if this is no message of this
    /// version.
    pub(crate) fn decode(bytes: &[u8], written: u64) -> Option<Self> {
        let mut from = Reader { bytes, written };
        if from.u8()? != VERSION {
            return None;
        }
        let mut message = Self { number: from.u32()?, read_before: from.span()?, parts: Vec::new() };
        while !from.bytes.is_empty() {
            let (scope, since) = (from.u64()?, from.span()?);
            let need = Need {
                waiting: from.amount()?,
                oldest: from.amount()?,
                rate: from.amount()?,
                supply: from.amount()?,
                spare: from.amount()?,
                stock: from.amount()?,
            };
            let flags = from.u8()?;
            let (is_sharing, is_lying) = (flags & 1 != 0, flags & 2 != 0);
            let (probed, alike) = (from.f32()?, from.alike()?);
            let items = (0..from.u16()?).map(|_| from.item()).collect::<Option<_>>()?;
            message.parts.push(Part { scope, since, need, is_sharing, is_lying, probed, alike, items });
        }
        Some(message)
    }
}

struct Writer {
    bytes: Vec<u8>,
    now: u64,
}

impl Writer {
    fn u8(&mut self, number: u8) {
        self.bytes.push(number);
    }

    fn u16(&mut self, number: u16) {
        self.bytes.extend(number.to_le_bytes());
    }

    fn u32(&mut self, number: u32) {
        self.bytes.extend(number.to_le_bytes());
    }

    fn u64(&mut self, number: u64) {
        self.bytes.extend(number.to_le_bytes());
    }

    fn f32(&mut self, number: f32) {
        self.bytes.extend(number.to_le_bytes());
    }

    fn f64(&mut self, number: f64) {
        self.bytes.extend(number.to_le_bytes());
    }

    /// A length of time.
    fn span(&mut self, nanos: u64) {
        self.u32(u32::try_from(nanos / TICK as u64).unwrap_or(u32::MAX));
    }

    /// A point of time.
    fn time(&mut self, at: u64) {
        let distance = (i128::from(at) - i128::from(self.now)) / i128::from(TICK);
        self.bytes.extend((distance.clamp(i32::MIN.into(), i32::MAX.into()) as i32).to_le_bytes());
    }

    fn item(&mut self, age: u8, item: &Item) {
        let kind = match item {
            Item::Loan(loan) => 1 + u8::from(loan.reports),
            Item::Back(_) => 3,
            Item::Release(_) => 4,
            Item::Report(_) => 5,
            Item::Spent(_) => 6,
            Item::Used(_) => 7,
        };
        self.u8(age << 4 | kind);
        match item {
            Item::Loan(loan) => {
                for number in [loan.to, loan.number, loan.limit] {
                    self.u32(number);
                }
                self.time(loan.at);
                self.u16((loan.until.saturating_sub(loan.at) / 1_000_000).min(u16::MAX.into()) as u16);
            }
            Item::Back(back) => {
                for number in [back.lender, back.number] {
                    self.u32(number);
                }
            }
            Item::Spent(spent) => {
                for number in [spent.lender, spent.before] {
                    self.u32(number);
                }
            }
            Item::Used(used) => {
                for number in [used.lender, used.number, used.tokens] {
                    self.u32(number);
                }
            }
            Item::Release(release) => {
                self.u32(release.limit);
                self.time(release.at);
                self.known(release.known);
            }
            Item::Report(report) => {
                for number in [report.lender, report.number] {
                    self.u32(number);
                }
                self.time(report.sent_at);
                self.u8(u8::from(report.is_limited));
                self.f64(report.wait.map_or(-1.0, |wait| wait.as_secs_f64()));
                self.left(report.said.requests);
                self.left(report.said.tokens);
            }
        }
    }

    fn alike(&mut self, alike: Option<Alike>) {
        let Alike { limit, low, high } = alike.unwrap_or(Alike { limit: 0.0, low: 0.0, high: 0.0 });
        for number in [limit, low, high] {
            self.f32(number as f32);
        }
    }

    fn known(&mut self, known: Option<Known>) {
        match known {
            None => self.u8(0),
            Some(Known::Bucket { size, low, high, level }) => {
                self.u8(1);
                for number in [size, low, high, level] {
                    self.f32(number);
                }
            }
            Some(Known::Window { size, left, ends_in, period }) => {
                self.u8(2);
                for number in [size, left, ends_in, period] {
                    self.f32(number);
                }
            }
            Some(Known::Found { rate, refused_rate }) => {
                self.u8(3);
                for number in [rate, refused_rate] {
                    self.f32(number);
                }
            }
        }
    }

    fn left(&mut self, left: Option<Left>) {
        let Some(left) = left else { return self.u8(0) };
        self.u8(match left.kind {
            None => 1,
            Some(Kind::Bucket) => 2,
            Some(Kind::Window) => 3,
        });
        let (reset, resolution) = (left.reset.as_secs_f64(), left.resolution.as_secs_f64());
        for number in [left.limit, left.remaining, reset, resolution] {
            self.f64(number);
        }
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    written: u64,
}

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, rest) = self.bytes.split_first_chunk::<N>()?;
        self.bytes = rest;
        Some(*array)
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn f64(&mut self) -> Option<f64> {
        self.array().map(f64::from_le_bytes).filter(|number| number.is_finite())
    }

    fn f32(&mut self) -> Option<f32> {
        self.array().map(f32::from_le_bytes).filter(|number| number.is_finite())
    }

    /// A number of requests or of seconds. Sums over many limits may be larger than counts.
    fn amount(&mut self) -> Option<f32> {
        self.f32().filter(|number| *number >= 0.0).map(|number| number.min(LARGEST))
    }

    fn span(&mut self) -> Option<u64> {
        self.u32().map(|ticks| u64::from(ticks) * TICK as u64)
    }

    fn time(&mut self) -> Option<u64> {
        let distance = i64::from(self.array().map(i32::from_le_bytes)?) * TICK;
        Some(self.written.saturating_add_signed(distance))
    }

    fn item(&mut self) -> Option<(u8, Item)> {
        let head = self.u8()?;
        let item = match head & 0xf {
            kind @ (1 | 2) => {
                let (to, number, limit, at) = (self.u32()?, self.u32()?, self.u32()?, self.time()?);
                let until = at.saturating_add(u64::from(self.u16()?) * 1_000_000);
                Item::Loan(Loan { to, number, limit, at, until, reports: kind == 2 })
            }
            3 => Item::Back(Back { lender: self.u32()?, number: self.u32()? }),
            4 => Item::Release(Release { limit: self.u32()?, at: self.time()?, known: self.known()? }),
            5 => Item::Report(Report {
                lender: self.u32()?,
                number: self.u32()?,
                sent_at: self.time()?,
                is_limited: self.u8()? != 0,
                wait: Duration::try_from_secs_f64(self.f64()?).ok(),
                said: Remaining { requests: self.left()?, tokens: self.left()?, organisation: 0 },
            }),
            6 => Item::Spent(Spent { lender: self.u32()?, before: self.u32()? }),
            7 => Item::Used(Used { lender: self.u32()?, number: self.u32()?, tokens: self.u32()? }),
            _ => return None,
        };
        Some((head >> 4, item))
    }

    fn alike(&mut self) -> Option<Option<Alike>> {
        let [limit, low, high] = [self.amount()?, self.amount()?, self.amount()?].map(f64::from);
        Some((limit > 0.0 && high > 0.0 && low <= high).then_some(Alike { limit, low, high }))
    }

    fn known(&mut self) -> Option<Option<Known>> {
        Some(match self.u8()? {
            0 => None,
            1 => Some(Known::Bucket {
                size: self.amount()?,
                low: self.amount()?,
                high: self.amount()?,
                level: self.f32()?.clamp(-LARGEST, LARGEST),
            }),
            2 => Some(Known::Window {
                size: self.amount()?,
                left: self.amount()?,
                ends_in: self.amount()?,
                period: self.amount()?,
            }),
            3 => Some(Known::Found { rate: self.amount()?, refused_rate: self.amount()? }),
            _ => return None,
        })
    }

    fn left(&mut self) -> Option<Option<Left>> {
        let kind = match self.u8()? {
            0 => return Some(None),
            1 => None,
            2 => Some(Kind::Bucket),
            3 => Some(Kind::Window),
            _ => return None,
        };
        let (limit, remaining) = (self.f64()?, self.f64()?);
        let seconds = |number: f64| Duration::try_from_secs_f64(number).ok();
        let (reset, resolution) = (seconds(self.f64()?)?, seconds(self.f64()?)?);
        let left = Left { limit, remaining, reset, resolution, kind };
        left.is_possible().then_some(Some(left))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn message() -> Message {
        let left = Left {
            limit: 10.0,
            remaining: 0.0,
            reset: Duration::from_millis(9_500),
            resolution: Duration::from_millis(1),
            kind: Some(Kind::Bucket),
        };
        let bucket = Known::Bucket { size: 10.0, low: 0.9, high: 1.1, level: -2.5 };
        let window = Known::Window { size: 60.0, left: 3.0, ends_in: 12.5, period: 60.0 };
        let found = Known::Found { rate: 0.5, refused_rate: 0.75 };
        let loan = Loan { to: 1, number: 2, limit: 3, at: SECOND, until: 7 * SECOND, reports: true };
        let release = |known| Item::Release(Release { limit: 9, at: 4 * SECOND, known });
        let report = Report {
            lender: 1,
            number: 2,
            sent_at: 3 * SECOND,
            is_limited: true,
            wait: Some(Duration::from_millis(250)),
            said: Remaining { requests: Some(left), ..Remaining::default() },
        };
        let items = vec![
            (0, Item::Loan(loan)),
            (2, Item::Loan(Loan { reports: false, at: 9 * SECOND, until: 9 * SECOND, ..loan })),
            (1, Item::Back(Back { lender: 5, number: 6 })),
            (0, Item::Spent(Spent { lender: 5, before: 9 })),
            (0, Item::Used(Used { lender: 5, number: 6, tokens: 700 })),
            (0, release(None)),
            (0, release(Some(bucket))),
            (0, release(Some(window))),
            (0, release(Some(found))),
            (0, Item::Report(report)),
        ];
        let alike = Alike { limit: 10.0, low: 0.5, high: 1.5 };
        let need = Need { waiting: 3.0, oldest: 4.5, rate: 0.5, supply: 2.25, spare: 1.5, stock: 1.0 };
        let parts = vec![
            Part {
                scope: 77,
                since: 60 * SECOND,
                need,
                is_sharing: true,
                is_lying: true,
                probed: -1.5,
                alike: Some(alike),
                items,
            },
            Part { scope: 78, ..Part::default() },
        ];
        Message { number: 12, read_before: SECOND / 10, parts }
    }

    #[test]
    fn messages_survive_the_way() {
        let bytes = message().encode(5 * SECOND);
        assert_eq!(Message::decode(&bytes, 5 * SECOND), Some(message()));
    }

    #[test]
    fn times_move_with_the_readers_clock() {
        let bytes = message().encode(5 * SECOND);
        let read = Message::decode(&bytes, 105 * SECOND).unwrap();
        let Item::Loan(loan) = read.parts[0].items[0].1 else { panic!("a loan") };
        assert_eq!((loan.at, loan.until), (101 * SECOND, 107 * SECOND));
    }

    #[test]
    fn no_bytes_harm_the_reader() {
        let bytes = message().encode(5 * SECOND);
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..20_000 {
            let mut changed = bytes.clone();
            changed.truncate(random.usize(..=bytes.len()));
            for _ in 0..random.u8(..4) {
                if let Some(byte) = random.choice(changed.iter_mut()) {
                    *byte = random.u8(..);
                }
            }
            // A panic would fail the test.
            let _ = Message::decode(&changed, 5 * SECOND);
        }
        assert_eq!(Message::decode(&[VERSION + 1], 0), None);
        assert_eq!(Message::decode(&bytes[..bytes.len() - 1], 0), None);
    }

    #[test]
    fn impossible_numbers_are_no_message() {
        let with = |change: &dyn Fn(&mut Left)| {
            let mut message = message();
            let report = message.parts[0].items.iter_mut().find_map(|(_, item)| match item {
                Item::Report(report) => Some(report),
                _ => None,
            });
            change(report.unwrap().said.requests.as_mut().unwrap());
            Message::decode(&message.encode(SECOND), SECOND).is_some()
        };
        assert!(with(&|_| {}));
        assert!(!with(&|left| left.limit = 1e18));
        assert!(!with(&|left| left.remaining = 11.0));
        // A window that would end with the end of time.
        assert!(!with(&|left| left.reset = Duration::from_secs(u64::MAX - 2_048)));
        assert!(!with(&|left| left.resolution = Duration::from_secs(u64::MAX)));
    }

    #[test]
    fn large_sums_are_read_as_the_largest_number() {
        let mut large = message();
        (large.parts[0].need.waiting, large.parts[0].need.supply) = (3e38, 2e12);
        let need = Message::decode(&large.encode(SECOND), SECOND).unwrap().parts[0].need;
        assert_eq!((need.waiting, need.supply), (LARGEST, LARGEST));
        large.parts[0].need.supply = -1.0;
        assert_eq!(Message::decode(&large.encode(SECOND), SECOND), None);
    }

    #[test]
    fn messages_are_small() {
        let loan = Loan { to: 1, number: 2, limit: 3, at: SECOND, until: 7 * SECOND, reports: false };
        let part = Part { items: vec![(0, Item::Loan(loan)), (1, Item::Loan(loan))], ..Part::default() };
        let message = Message { parts: vec![part; 2], ..Message::default() };
        assert_eq!(message.encode(0).len(), 9 + 2 * (55 + 2 * 19));
    }
}
