//! Whether other processes use the same limits, and whether the service's headers can be believed: for all keys of a scope.
//!
//! Processes without a common store see each other only in what the service says is left. Each keeps to a share of the
//! rate and of the burst, which it lowers while little is left, and raises while much is left. When much turns into little,
//! the share falls at once to this process's part of the demand.

use std::time::Duration;

use super::{
    left::{Left, Remaining},
    taken::{Answered, Taken, seconds},
};

/// How fast the memory of what was used fades, in seconds.
const FADES_IN: f64 = 20.0;

/// A share that is above the part of the demand by no more than this is lowered step by step.
const ABOVE_DEMAND: f64 = 1.2;

/// So many requests must be known for a part of the demand.
const ENOUGH: f64 = 3.0;

/// The guard of a scope of which nothing is known, in seconds.
const FIRST_GUARD: f64 = 0.02;

/// From this much distrust on, headers are ignored.
const TOO_MUCH: f64 = 3.5;

/// "Nothing left" so often in a row, each time with the same reset to the millisecond, is suspicious: the service may not
/// count these requests.
const SAME_RESETS: u32 = 9;

#[derive(Debug)]
pub(crate) struct Sharing {
    /// What this process and others use.
    used: Used,
    /// The same while much is left. Later, usage shows the shares of the processes instead of their demand.
    demand: Used,
    /// This process's share of each rate; 1 while others use nothing.
    share: f64,
    is_shared: bool,
    moved_at: f64,
    distrust: f64,
    same_resets: u32,
    same_since: f64,
    last_reset: Duration,
    /// This process has found the headers to be wrong.
    is_lying: bool,
    /// Another process says so, or what all have found together.
    is_lying_elsewhere: bool,
    has_headers: bool,
    /// What probes say of the headers: above 0 if they were served though nothing should be left.
    probed: f64,
    /// The same of the other processes, together.
    probed_elsewhere: f64,
    /// The other processes are known through the store: what is left says nothing more of them.
    is_by_messages: bool,
    /// How much later than at the moment of sending the service counts a request, at most, in seconds.
    pub(crate) guard: f64,
    /// The size and the rate of a budget whose rate is known best: the keys of one scope are mostly alike.
    pub(crate) alike: Option<Alike>,
    /// Whether the sizes of the budgets differ.
    pub(crate) is_mixed: bool,
}

/// Requests of this process and of others, which fade.
#[derive(Debug, Default)]
struct Used {
    own: f64,
    foreign: f64,
    at: f64,
}

impl Used {
    fn add(&mut self, own: f64, foreign: f64, now: f64) {
        let keep = (-(now - self.at).max(0.0) / FADES_IN).exp();
        self.at = now;
        self.own = self.own * keep + own.max(0.0);
        self.foreign = self.foreign * keep + foreign;
    }

    /// Returns this process's part of all requests.
    fn own_part(&self) -> f64 {
        (self.own / (self.own + self.foreign).max(1.0)).clamp(0.05, 1.0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Alike {
    pub(crate) limit: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Default for Sharing {
    fn default() -> Self {
        Self {
            used: Used::default(),
            demand: Used::default(),
            share: 1.0,
            is_shared: false,
            moved_at: 0.0,
            distrust: 0.0,
            same_resets: 0,
            same_since: 0.0,
            last_reset: Duration::ZERO,
            is_lying: false,
            is_lying_elsewhere: false,
            has_headers: false,
            probed: 0.0,
            probed_elsewhere: 0.0,
            is_by_messages: false,
            guard: FIRST_GUARD,
            alike: None,
            is_mixed: false,
        }
    }
}

impl Sharing {
    pub(crate) fn is_shared(&self) -> bool {
        self.is_shared
    }

    pub(crate) fn share(&self) -> f64 {
        self.share
    }

    pub(crate) fn is_by_messages(&self) -> bool {
        self.is_by_messages
    }

    /// The store tells of the other processes, or does so no more.
    pub(crate) fn set_by_messages(&mut self, is_by_messages: bool) {
        if self.is_by_messages != is_by_messages {
            self.is_by_messages = is_by_messages;
            (self.used, self.share, self.is_shared) = (Used::default(), 1.0, false);
        }
    }

    /// So many processes use the limits, and the store no longer tells of them.
    pub(crate) fn assume_processes(&mut self, processes: usize) {
        self.set_by_messages(false);
        (self.is_shared, self.share) = (true, 1.0 / processes.max(1) as f64);
        // Fades, unless what is left shows others.
        (self.used.own, self.used.foreign) = (0.0, 50.0);
    }

    /// Takes what another process knows of the keys' rate.
    pub(crate) fn join_alike(&mut self, theirs: Alike) {
        match &mut self.alike {
            None => self.alike = Some(theirs),
            Some(known) => {
                let (low, high) = (known.low.max(theirs.low), known.high.min(theirs.high));
                if known.limit == theirs.limit && low <= high {
                    (known.low, known.high) = (low, high);
                }
            }
        }
    }

    /// Whether the headers are ignored.
    pub(crate) fn is_lying(&self) -> bool {
        self.is_lying || self.is_lying_elsewhere
    }

    /// Whether this process has found the headers to be wrong itself, and did not only hear of it.
    pub(crate) fn has_caught_them(&self) -> bool {
        self.is_lying
    }

    /// Weighs whether the headers of an answer fit what became of the request. Returns whether they are ignored from now on.
    pub(crate) fn judge(&mut self, said: &Remaining, taken: &Taken, answered: Answered) -> bool {
        if self.is_lying || !said.is_known() {
            return false;
        }
        self.has_headers = true;
        let has_room =
            |left: Option<Left>, cost: f64| left.is_none_or(|left| left.remaining >= 2.0 * cost.max(1.0));
        let has_room = has_room(said.requests, 1.0) && has_room(said.tokens, taken.tokens as f64);
        let is_limited = answered.is_limited;
        self.distrust += match (is_limited, taken.is_probe) {
            // Refused although there was room, or served although there was none.
            (true, _) if has_room => 1.0,
            (false, true) => 1.5,
            (true, _) => -1.0,
            (false, false) => -0.01,
        };
        self.distrust = self.distrust.max(0.0);
        if taken.is_probe {
            self.probed = (self.probed + if is_limited { -1.0 } else { 1.5 }).clamp(-3.0, 4.5);
        }
        if let Some(left) = said.requests.filter(|_| !is_limited) {
            self.note_reset(left, answered);
        }
        self.is_lying |= self.distrust > TOO_MUCH;
        self.is_lying_elsewhere |= self.distrust + self.probed_elsewhere.max(0.0) > TOO_MUCH;
        self.is_lying()
    }

    /// Whether the service has said what is left.
    pub(crate) fn has_headers(&self) -> bool {
        self.has_headers
    }

    /// What this process's probes say of the headers, for the other processes.
    pub(crate) fn probed(&self) -> f64 {
        self.probed
    }

    /// Weighs what the probes of all other processes say, and takes the word of one for as long as it says so: a fault that
    /// is mended must not be handed on for ever. Returns whether the headers were ignored before, and whether they are now.
    pub(crate) fn judge_with(&mut self, probed_elsewhere: f64, is_lying: bool) -> (bool, bool) {
        let before = self.is_lying();
        self.probed_elsewhere = probed_elsewhere;
        self.is_lying_elsewhere = is_lying || self.distrust + probed_elsewhere.max(0.0) > TOO_MUCH;
        (before, self.is_lying())
    }

    /// A bucket with nothing left that serves more than comes back is full later and later. Keys that wait for each unit say
    /// the same each time, but not faster than the units come.
    fn note_reset(&mut self, left: Left, answered: Answered) {
        let now = seconds(answered.now);
        if left.remaining >= 1.0 || left.reset != self.last_reset {
            (self.last_reset, self.same_since, self.same_resets) = (left.reset, now, 0);
            return;
        }
        self.same_resets += 1;
        let unit = left.reset.as_secs_f64() / left.limit;
        let units = f64::from(self.same_resets) / answered.keys.max(1) as f64 - 1.0;
        // Where others take as well, what is left changes.
        let is_impossible = self.is_shared || now - self.same_since < 0.5 * units * unit;
        let is_precise = left.resolution < Duration::from_millis(500);
        self.is_lying |= is_precise && self.same_resets >= SAME_RESETS && is_impossible;
    }

    /// Counts what this process and others used of a bucket between two answers, of which the second found much or little.
    pub(crate) fn used_of_bucket(&mut self, own: f64, foreign: f64, is_plenty: bool, now: f64) {
        let was_shared = self.is_shared;
        self.used(own, foreign, now);
        if is_plenty {
            self.demand.add(own, foreign, now);
        }
        match (was_shared, self.is_shared) {
            (false, true) => self.share = 0.5,
            (_, false) => self.share = 1.0,
            _ => {}
        }
    }

    /// Counts what this process and others used between two answers.
    pub(crate) fn used(&mut self, own: f64, foreign: f64, now: f64) {
        if self.is_by_messages {
            return;
        }
        self.used.add(own, foreign, now);
        let Used { own, foreign, .. } = self.used;
        self.is_shared = if self.is_shared { foreign > 0.02 * own } else { foreign > 0.05 * own + 3.0 };
    }

    /// Whether that level of a bucket of that size, in requests, leaves room for more.
    pub(crate) fn is_plenty(level: f64, size: f64) -> bool {
        level > (0.4 * size).min(2.0)
    }

    /// Moves this process's share by what an answer shows of a bucket of that size, one of so many keys.
    ///
    /// `waiting` is the number of this process's requests that wait for each key. The more wait, the less the share falls, so
    /// that processes with more demand get more, and the waits of all become alike.
    pub(crate) fn adjust(&mut self, level: f64, size: f64, keys: f64, waiting: f64, now: f64) {
        let lower = (0.5 / keys).min(0.2) / (1.0 + waiting / 6.0);
        let raise = (0.025 / keys).min(0.05);
        if level < (0.2 * size).min(1.0) {
            if self.demand.own + self.demand.foreign > ENOUGH {
                self.share = self.share.min(ABOVE_DEMAND * self.demand.own_part());
            }
            self.share = (self.share * (1.0 - lower)).max(0.02);
        } else if Self::is_plenty(level, size) {
            let missed = ((now - self.moved_at) * keys * 0.1).min(20.0);
            self.share = (self.share + raise.max(raise * missed)).min(1.0);
        }
        self.moved_at = now;
    }

    /// Returns what this process leaves in a bucket of that size for the others, in requests. The more of its requests
    /// wait for each key, the less it leaves.
    pub(crate) fn reserve(&self, size: f64, waiting: f64) -> f64 {
        (0.2 * size).min(2.0) * (1.0 - self.share) / (1.0 + waiting)
    }

    /// What this process may take of what is left of a window.
    pub(crate) fn part_of_window(&self, left: f64) -> f64 {
        if !self.is_shared {
            return left;
        }
        // Rounded at random, so that several processes do not all round the same way.
        (left.max(0.0) * self.used.own_part() + fastrand::f64()).floor()
    }
}
