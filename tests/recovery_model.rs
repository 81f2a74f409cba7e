//! Several pools over one store, with their recoveries, beside a plain model of them: what each has been told of a
//! key, what it has read, and what the store has. A longer run: `PROPTEST_CASES=100000`.
//!
//! When it was written, of 36 single changes to the pool, its recovery and its store that each break something (a shorter
//! mark that wins, a reload that clears what it can't know, a reset that forgets news, a failed write that counts as made,
//! a restart that loses what waits), it found 34; 27 of them within 50 cases.
//!
//! Random sequences of requests, passes, faults, operators' changes and restarts are played to both. After each step
//! both have to say the same of every key in every pool and in the store. In the end the faults are over, each
//! process makes one pass, and all have to agree, also with the log of what the service ever said.
//!
//! A process is a pool with its recovery, a runtime of its own, so that it can die at any moment, a clock of its own
//! and a connection of its own to the store. Each step ends with a second in which every process writes the marks that
//! wait, as far as its connection lets it: so no two things happen at once, and no writer pauses any longer.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::FutureExt;
use proptest::{
    prelude::*,
    sample::{select, subsequence},
    test_runner::FileFailurePersistence,
};
use proptest_state_machine::{ReferenceStateMachine, StateMachineTest, prop_state_machine};
use support::{FaultyStore, Mode, SECOND, model::*, passes_by_hand};
use tokio::{runtime::Runtime, task::yield_now};
use tower_key_rotation::{
    KeyPool, MarksNotWritten, OperateError, RecoveryHandle, Status,
    clock::{Clock, ManualClock},
    store::{Changed, KeyStore, MemoryStore},
};

type Id = &'static str;

const IDS: [Id; 3] = ["alpha", "beta", "gamma"];

#[derive(Clone, Debug)]
enum Step {
    /// A request for each key that the process has available. The one with that key is answered so, or stays under
    /// way; the others go well.
    Send(usize, Id, Option<Answer>),
    /// The answer to one that is under way.
    Answer(usize, Answer),
    /// The caller drops one that is under way.
    Drop(usize),
    Wait(u64),
    /// From now on, that is what the process's connection does.
    Break(usize, Part, Mode),
    /// It works again, all of it.
    Heal(usize),
    Reload(usize),
    /// The store tells the process which keys have changed.
    Follow(usize, Vec<Id>),
    Pass(usize, Connection),
    Operate(usize, Change, Id),
    /// Another program does it, in the store.
    Elsewhere(Change, Id),
    NewSecret(Id),
    /// The process ends, and another one starts in its place.
    ShutDown(usize, Connection),
    Crash(usize),
}

/// Whether the connection works again just before.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Connection {
    AsItIs,
    Healed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Loads,
    Writes,
    Replies,
    Recovers,
    Operators,
}

const PARTS: [Part; 5] = [Part::Loads, Part::Writes, Part::Replies, Part::Recovers, Part::Operators];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Change {
    Reset,
    Disable,
    Enable,
    Remove,
    Insert,
}

// ---- the model ----

#[derive(Clone)]
struct World {
    now: Duration,
    store: BTreeMap<Id, Stored>,
    processes: Vec<Process>,
    flights: Vec<Sent>,
    log: Log,
    /// How many secrets there have been; the newest is that one.
    secrets: SecretNumber,
    moments: u64,
    outcome: Outcome,
}

/// What came of a step at once.
#[derive(Clone, Debug, PartialEq)]
enum Outcome {
    Nothing,
    /// The secrets that requests went out with, and the one among them that was asked about.
    Sent {
        with: BTreeSet<SecretNumber>,
        of_interest: Option<SecretNumber>,
    },
    NoKey {
        retry_in: Option<Duration>,
    },
    LeftBehind(usize),
}

#[derive(Clone, Debug)]
struct Stored {
    secret: SecretNumber,
    condition: Condition,
    reset_at: Option<Duration>,
}

impl Stored {
    fn healthy(secret: SecretNumber) -> Self {
        Self { secret, condition: Condition::default(), reset_at: None }
    }
}

#[derive(Clone, Debug, Default)]
struct Process {
    keys: BTreeMap<Id, Known>,
    broken: BTreeMap<Part, Mode>,
    /// A load that hangs.
    reading: Option<Reading>,
    /// Writes that hang.
    writing: Vec<Mark>,
    /// Whether some have just failed: who writes marks takes a break.
    writer_pauses: bool,
    /// What operators have asked for, in its turn.
    queue: VecDeque<Asked>,
    done: Done,
}

/// What a process knows of a key.
#[derive(Clone, Debug)]
struct Known {
    secret: SecretNumber,
    /// A key that was away is another one when it is back.
    born: u64,
    condition: Condition,
    /// When it was last reset here.
    reset_at: Duration,
    told_at: Duration,
    /// What it was told that the store is still to know.
    waiting: Option<Rest>,
    acknowledged: u64,
}

impl Known {
    fn new(born: u64, secret: SecretNumber, condition: Condition) -> Self {
        let (reset_at, told_at, waiting, acknowledged) = Default::default();
        Self { secret, born, condition, reset_at, told_at, waiting, acknowledged }
    }
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    process: usize,
    id: Id,
    born: u64,
}

#[derive(Clone, Debug)]
struct Mark {
    id: Id,
    born: u64,
    secret: SecretNumber,
    rest: Rest,
    told_at: Duration,
    arrived: bool,
}

#[derive(Clone, Debug)]
struct Reading {
    found: BTreeMap<Id, Stored>,
    ids: Vec<Id>,
    began: u64,
    of: Load,
}

#[derive(Clone, Copy, Debug)]
enum Load {
    Reload,
    /// What it has recovered, if nothing has failed so far.
    Pass(Option<u64>),
    /// Of which nobody hears how it went.
    Other,
}

#[derive(Clone, Debug)]
struct Asked {
    change: Change,
    id: Id,
    secret: SecretNumber,
    at: Duration,
    has_turn: bool,
    /// Which key that is, when it has its turn.
    born: Option<u64>,
    holds_back_writes: bool,
    /// Of a removal: the key that has been taken out, for the case that the store fails.
    leaving: Option<Known>,
}

/// What has come of what was asked of a process, in the order of it.
#[derive(Clone, Debug, Default, PartialEq)]
struct Done {
    reloads: Vec<bool>,
    /// How many keys were reset, where nothing failed.
    passes: Vec<Option<u64>>,
    changes: Vec<Changing>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Changing {
    Done,
    UnknownKey,
    KeyExists,
    StoreFailed,
}

/// Every word of the service that had a key rest longer than what its process was still to tell, and what became of it.
#[derive(Clone, Debug, Default)]
struct Log(Vec<Told>);

#[derive(Clone, Debug)]
struct Told {
    /// Which key of which process was told.
    born: u64,
    secret: SecretNumber,
    rest: Rest,
    at: Duration,
    fate: Fate,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Waits,
    Stored,
    Forgotten,
}

impl Log {
    fn of(&mut self, born: u64) -> impl Iterator<Item = &mut Told> {
        self.0.iter_mut().filter(move |told| told.born == born)
    }

    /// What the store doesn't have is lost, as far as it was told by then.
    fn forget(&mut self, born: u64, by: Duration) {
        self.of(born)
            .filter(|told| told.fate == Fate::Waits && told.at <= by)
            .for_each(|told| told.fate = Fate::Forgotten);
    }

    fn arrived(&mut self, mark: &Mark) {
        self.of(mark.born)
            .filter(|told| told.at == mark.told_at || told.at < mark.told_at && told.fate == Fate::Waits)
            .for_each(|told| told.fate = Fate::Stored);
    }

    /// A reset ends what was told before it. The key that it was asked of knows what it was told since it was asked.
    fn reset(&mut self, secret: SecretNumber, asked: Option<(u64, Duration)>, now: Duration) {
        for told in self.0.iter_mut().filter(|told| told.secret == secret) {
            if asked.is_some_and(|(born, at)| told.born == born && told.at > at) {
                (told.at, told.fate) = (now, Fate::Waits);
            } else {
                told.fate = Fate::Forgotten;
            }
        }
    }

    /// How long a key rests by all that still holds.
    fn rest(&self, secret: SecretNumber, now: Duration) -> Option<Rest> {
        let mut condition = Condition::default();
        for told in self.0.iter().filter(|told| told.secret == secret && told.fate != Fate::Forgotten) {
            condition.extend(told.rest);
        }
        condition.rest(now)
    }
}

impl Process {
    fn does(&self, part: Part) -> Mode {
        self.broken.get(&part).copied().unwrap_or(Mode::Works)
    }

    fn marks_waiting(&self) -> usize {
        self.keys.values().filter(|key| key.waiting.is_some()).count()
    }

    /// Not beside other writes, nor beside a reset in the store.
    fn may_write(&self) -> bool {
        self.writing.is_empty() && !self.queue.front().is_some_and(|asked| asked.holds_back_writes)
    }

    fn has_its_turn_free(&self) -> bool {
        self.reading.is_none() && self.queue.is_empty()
    }

    /// Nothing is under way between it and the store, nor would a pass begin what hangs.
    fn can_make_a_pass(&self, connection: Connection) -> bool {
        let hangs = [Part::Writes, Part::Replies].map(|part| self.does(part) == Mode::Hangs);
        let lets = connection == Connection::Healed || !hangs.contains(&true);
        self.has_its_turn_free() && self.writing.is_empty() && lets
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys: Vec<_> = self.store.keys().collect();
        write!(f, "{} processes over {keys:?}", self.processes.len())
    }
}

impl World {
    fn new(processes: usize, keys: usize) -> Self {
        let store = IDS.into_iter().zip(1..).take(keys).map(|(id, secret)| (id, Stored::healthy(secret)));
        let mut world = Self {
            now: Duration::ZERO,
            store: store.collect(),
            processes: vec![Process::default(); processes],
            flights: Vec::new(),
            log: Log::default(),
            secrets: keys as SecretNumber,
            moments: 0,
            outcome: Outcome::Nothing,
        };
        (0..processes).for_each(|process| world.start(process));
        world
    }

    fn moment(&mut self) -> u64 {
        self.moments += 1;
        self.moments
    }

    fn take(&mut self, step: &Step) {
        self.outcome = Outcome::Nothing;
        match step {
            Step::Send(process, id, answer) => self.send(*process, id, *answer),
            Step::Answer(flight, answer) => {
                let sent = self.flights.remove(*flight);
                self.tell(sent, *answer);
            }
            Step::Drop(flight) => _ = self.flights.remove(*flight),
            Step::Wait(seconds) => self.now += Duration::from_secs(*seconds),
            Step::Break(process, part, mode) => {
                self.processes[*process].broken.insert(*part, *mode);
                self.go_on(*process);
            }
            Step::Heal(process) => {
                self.processes[*process].broken.clear();
                self.go_on(*process);
            }
            Step::Reload(process) => self.read(*process, IDS.to_vec(), Load::Reload),
            Step::Follow(process, ids) => self.read(*process, ids.clone(), Load::Other),
            Step::Pass(process, connection) => {
                self.heal(*process, *connection);
                self.pass(*process);
            }
            Step::Operate(process, change, id) => self.operate(*process, *change, id),
            Step::Elsewhere(change, id) => {
                let secret = self.new_secret_for(*change);
                self.change(None, *change, id, secret);
            }
            Step::NewSecret(id) => {
                let secret = self.new_secret_for(Change::Insert);
                self.store.entry(id).and_modify(|stored| *stored = Stored::healthy(secret));
            }
            Step::ShutDown(process, connection) => {
                self.heal(*process, *connection);
                self.write_marks(*process);
                self.outcome = Outcome::LeftBehind(self.processes[*process].marks_waiting());
                self.start(*process);
            }
            Step::Crash(process) => self.start(*process),
        }
        self.now += SECOND;
        for process in 0..self.processes.len() {
            self.write_marks(process);
        }
    }

    /// A process that has what the store has, in the place of one that is gone.
    fn start(&mut self, process: usize) {
        let Process { keys, queue, .. } = std::mem::take(&mut self.processes[process]);
        let leaving = queue.into_iter().filter_map(|asked| asked.leaving);
        keys.into_values().chain(leaving).for_each(|key| self.log.forget(key.born, self.now));
        self.flights.retain(|sent| sent.process != process);
        self.read(process, IDS.to_vec(), Load::Other);
    }

    fn heal(&mut self, process: usize, connection: Connection) {
        if connection == Connection::Healed {
            self.processes[process].broken.clear();
        }
    }

    fn send(&mut self, process: usize, id: Id, answer: Option<Answer>) {
        let keys = &self.processes[process].keys;
        let available = || keys.iter().filter(|(_, key)| key.condition.is_available(self.now));
        let with: BTreeSet<_> = available().map(|(_, key)| key.secret).collect();
        let of_interest = available().find(|(own, _)| **own == id).map(|(_, key)| key);
        self.outcome = match with.is_empty() {
            true => Outcome::NoKey { retry_in: retry_in(keys.values().map(|key| &key.condition), self.now) },
            false => Outcome::Sent { with, of_interest: of_interest.map(|key| key.secret) },
        };
        let Some(key) = of_interest else { return };
        let sent = Sent { process, id, born: key.born };
        match answer {
            Some(answer) => self.tell(sent, answer),
            None => self.flights.push(sent),
        }
    }

    fn tell(&mut self, Sent { process, id, born }: Sent, answer: Answer) {
        let now = self.now;
        let Some(rest) = answer.rest(now) else { return };
        let Process { keys, queue, .. } = &mut self.processes[process];
        let leaving = queue.iter_mut().filter_map(|asked| asked.leaving.as_mut());
        let known = keys.get_mut(id).into_iter().chain(leaving).find(|key| key.born == born);
        // What is known may have been read from the store, and may have been reset there since.
        if let Some(key) = known
            && rest.outlasts(key.waiting)
        {
            key.condition.extend(rest);
            (key.told_at, key.waiting) = (now, Some(rest));
            self.log.0.push(Told { born, secret: key.secret, rest, at: now, fate: Fate::Waits });
        }
    }

    /// Has a process write the marks that wait, and says whether nothing failed.
    fn write_marks(&mut self, process: usize) -> bool {
        if self.processes[process].may_write() {
            let acknowledged = self.moment();
            let Process { keys, writing, .. } = &mut self.processes[process];
            for (id, key) in keys.iter_mut() {
                match key.waiting {
                    Some(rest) if !rest.is_over(self.now) => writing.push(Mark {
                        id,
                        born: key.born,
                        secret: key.secret,
                        rest,
                        told_at: key.told_at,
                        arrived: false,
                    }),
                    // There is nothing to say of a rest that is over.
                    Some(_) => (key.waiting, key.acknowledged) = (None, acknowledged),
                    None => {}
                }
            }
        }
        self.deliver_marks(process)
    }

    fn deliver_marks(&mut self, process: usize) -> bool {
        let mut nothing_failed = true;
        for mut mark in std::mem::take(&mut self.processes[process].writing) {
            if !mark.arrived && self.processes[process].does(Part::Writes) == Mode::Works {
                self.arrive(&mark);
                mark.arrived = true;
            }
            let part = if mark.arrived { Part::Replies } else { Part::Writes };
            match self.processes[process].does(part) {
                Mode::Works => self.acknowledge(process, &mark),
                Mode::Hangs => self.processes[process].writing.push(mark),
                _ => nothing_failed = false,
            }
        }
        self.processes[process].writer_pauses = !nothing_failed;
        nothing_failed
    }

    fn arrive(&mut self, mark: &Mark) {
        let is_news = |stored: &&mut Stored| {
            stored.secret == mark.secret && stored.reset_at.is_none_or(|reset| reset <= mark.told_at)
        };
        if let Some(stored) = self.store.get_mut(mark.id).filter(is_news) {
            stored.condition.extend(mark.rest);
            self.log.arrived(mark);
        }
    }

    fn acknowledge(&mut self, process: usize, mark: &Mark) {
        let acknowledged = self.moment();
        let key = self.processes[process].keys.get_mut(mark.id);
        if let Some(key) = key.filter(|key| key.born == mark.born && key.waiting == Some(mark.rest)) {
            (key.waiting, key.acknowledged) = (None, acknowledged);
        }
    }

    /// Goes on with all that hung, as far as the connection lets it.
    fn go_on(&mut self, process: usize) {
        self.deliver_marks(process);
        self.finish_reading(process);
        self.give_turns(process);
    }

    fn pass(&mut self, process: usize) {
        let written = self.write_marks(process);
        let recovered = (self.processes[process].does(Part::Recovers) == Mode::Works).then(|| self.sweep());
        self.read(process, IDS.to_vec(), Load::Pass(recovered.filter(|_| written)));
    }

    fn sweep(&mut self) -> u64 {
        let now = self.now;
        let over = |stored: &&mut Stored| stored.condition.rest.is_some_and(|rest| rest.is_over(now));
        self.store.values_mut().filter(over).map(|stored| stored.condition.rest = None).count() as u64
    }

    fn read(&mut self, process: usize, ids: Vec<Id>, of: Load) {
        let began = self.moment();
        self.processes[process].reading = Some(Reading { found: self.store.clone(), ids, began, of });
        self.finish_reading(process);
    }

    fn finish_reading(&mut self, process: usize) {
        let mode = self.processes[process].does(Part::Loads);
        if mode == Mode::Hangs {
            return;
        }
        let Some(reading) = self.processes[process].reading.take() else { return };
        if mode == Mode::Works {
            self.learn(process, &reading);
        }
        let done = &mut self.processes[process].done;
        match reading.of {
            Load::Reload => done.reloads.push(mode == Mode::Works),
            Load::Pass(recovered) => done.passes.push(recovered.filter(|_| mode == Mode::Works)),
            Load::Other => {}
        }
    }

    fn learn(&mut self, process: usize, reading: &Reading) {
        // What the store had before a change that is still on its way there is no news.
        let queue = self.processes[process].queue.iter();
        let on_their_way: Vec<_> = queue.map(|asked| (asked.change, asked.id)).collect();
        let is_on_its_way =
            |id: Id, changes: &[Change]| changes.iter().any(|change| on_their_way.contains(&(*change, id)));
        for id in &reading.ids {
            let Some(found) = reading.found.get(id) else {
                self.take_out(process, id);
                continue;
            };
            let condition = Condition { rest: found.condition.rest(self.now), ..found.condition };
            if is_on_its_way(id, &[Change::Remove]) && !self.processes[process].keys.contains_key(id) {
                continue;
            }
            let known = self.processes[process].keys.get_mut(id);
            let Some(key) = known.filter(|key| key.secret == found.secret) else {
                self.take_out(process, id);
                let key = Known::new(self.moment(), found.secret, condition);
                self.processes[process].keys.insert(id, key);
                continue;
            };
            if !is_on_its_way(id, &[Change::Disable, Change::Enable]) {
                key.condition.disabled = condition.disabled;
            }
            let had_all = key.waiting.is_none() && key.acknowledged < reading.began;
            match condition.rest {
                _ if is_on_its_way(id, &[Change::Reset]) => {}
                rest if had_all => key.condition.rest = rest,
                Some(rest) => _ = key.condition.extend(rest),
                None => {}
            }
        }
    }

    fn take_out(&mut self, process: usize, id: Id) {
        if let Some(key) = self.processes[process].keys.remove(id) {
            self.log.forget(key.born, self.now);
        }
    }

    fn new_secret_for(&mut self, change: Change) -> SecretNumber {
        self.secrets += SecretNumber::from(change == Change::Insert);
        self.secrets
    }

    fn operate(&mut self, process: usize, change: Change, id: Id) {
        let secret = self.new_secret_for(change);
        let asked = Asked {
            change,
            id,
            secret,
            at: self.now,
            has_turn: false,
            born: None,
            holds_back_writes: false,
            leaving: None,
        };
        if change != Change::Insert && !self.processes[process].keys.contains_key(id) {
            return self.processes[process].done.changes.push(Changing::UnknownKey);
        }
        let leaving = self.change_in_memory(process, &asked);
        self.processes[process].queue.push_back(Asked { leaving, ..asked });
        self.give_turns(process);
    }

    /// The key that is to be removed.
    fn change_in_memory(&mut self, process: usize, Asked { change, id, at, .. }: &Asked) -> Option<Known> {
        let key = self.processes[process].keys.get_mut(id)?;
        match change {
            Change::Reset => {
                key.reset_at = key.reset_at.max(*at);
                if key.told_at <= key.reset_at {
                    (key.condition.rest, key.waiting) = (None, None);
                }
                self.log.forget(key.born, key.reset_at);
            }
            Change::Disable | Change::Enable => key.condition.disabled = *change == Change::Disable,
            Change::Remove => return self.processes[process].keys.remove(id),
            Change::Insert => {}
        }
        None
    }

    /// Operators' changes come to the store one after the other, and not while a load or, for a reset, a write hangs.
    fn give_turns(&mut self, process: usize) {
        while self.processes[process].reading.is_none()
            && let Some(mut asked) = self.processes[process].queue.pop_front()
        {
            if !asked.has_turn {
                // To be removed is what has that name now.
                if let Some(key) = self.change_in_memory(process, &asked)
                    && let Some(before) = asked.leaving.replace(key)
                {
                    self.log.forget(before.born, self.now);
                }
                asked.has_turn = true;
                asked.born = self.processes[process].keys.get(asked.id).map(|key| key.born);
            }
            let Process { writing, queue, .. } = &mut self.processes[process];
            let is_reset = asked.change == Change::Reset && asked.born.is_some();
            if is_reset && !writing.is_empty() {
                return queue.push_front(asked);
            }
            let Some(came) = self.change_in_store(process, &asked) else {
                asked.holds_back_writes = is_reset;
                return self.processes[process].queue.push_front(asked);
            };
            if let Some(key) = asked.leaving {
                match came {
                    Changing::Done => self.log.forget(key.born, self.now),
                    _ => _ = self.processes[process].keys.insert(asked.id, key),
                }
            }
            self.processes[process].done.changes.push(came);
            // Marks that it held back, and what is news, are written before the next change has its turn.
            if is_reset && !self.processes[process].writer_pauses {
                self.write_marks(process);
            }
        }
    }

    /// What came of it; nothing where the connection hangs.
    fn change_in_store(&mut self, process: usize, asked: &Asked) -> Option<Changing> {
        let Asked { change, id, secret, at, born, .. } = *asked;
        match (change, born) {
            (Change::Insert, Some(_)) => return Some(Changing::KeyExists),
            (Change::Insert | Change::Remove, _) => {}
            (_, None) => return Some(Changing::UnknownKey),
            _ => {}
        }
        match self.processes[process].does(Part::Operators) {
            Mode::Works => {}
            Mode::Hangs => return None,
            _ => return Some(Changing::StoreFailed),
        }
        let key = self.processes[process].keys.get(id).filter(|key| Some(key.born) == born);
        let asked = born.map(|born| (born, key.map_or(at, |key| key.reset_at)));
        let changed = self.change(asked, change, id, secret);
        let known = self.processes[process].keys.get_mut(id).filter(|key| Some(key.born) == born);
        match (change, known) {
            (Change::Insert, _) if changed => {
                let key = Known::new(self.moment(), secret, Condition::default());
                self.processes[process].keys.insert(id, key);
            }
            (Change::Insert, _) => return Some(Changing::KeyExists),
            (Change::Remove, _) => {}
            _ if !changed => return Some(Changing::UnknownKey),
            // That is news, and the store has forgotten it, if it had it.
            (Change::Reset, Some(key)) if key.told_at > at => {
                (key.told_at, key.waiting) = (self.now, key.condition.rest);
            }
            _ => {}
        }
        Some(Changing::Done)
    }

    /// A change in the store: of a key of a process, which was asked for it then, or by another program. Says whether
    /// the store had the key, or the id was free.
    fn change(
        &mut self,
        asked: Option<(u64, Duration)>,
        change: Change,
        id: Id,
        secret: SecretNumber,
    ) -> bool {
        if change == Change::Insert {
            let is_free = !self.store.contains_key(id);
            self.store.entry(id).or_insert_with(|| Stored::healthy(secret));
            return is_free;
        }
        let Some(stored) = self.store.get_mut(id) else { return false };
        match change {
            Change::Reset => {
                stored.condition.rest = None;
                stored.reset_at = Some(self.now);
                self.log.reset(stored.secret, asked, self.now);
            }
            Change::Remove => _ = self.store.remove(id),
            _ => stored.condition.disabled = change == Change::Disable,
        }
        true
    }

    /// Whether a rest that is still to be written ends within the second that the step takes: then it is a matter of
    /// luck whether it is.
    fn is_a_race(&self, step: &Step) -> bool {
        let waited =
            if let Step::Wait(seconds) = step { Duration::from_secs(*seconds) } else { Duration::ZERO };
        let (from, to) = (self.now + waited, self.now + waited + SECOND);
        self.processes.iter().any(|process| {
            let may_be_written = |key: &&Known| key.waiting.is_some() || !process.queue.is_empty();
            let leaving = process.queue.iter().filter_map(|asked| asked.leaving.as_ref());
            process
                .keys
                .values()
                .chain(leaving)
                .filter(may_be_written)
                .flat_map(|key| [key.condition.rest, key.waiting])
                .any(|rest| rest.is_some_and(|rest| !rest.is_over(from) && rest.is_over(to)))
        })
    }

    /// Among them those at which a rest ends, with the second that the step itself takes, and just before.
    fn times_to_wait(&self) -> Vec<u64> {
        let known = self.processes.iter().flat_map(|process| process.keys.values().map(|key| key.condition));
        let all = known.chain(self.store.values().map(|stored| stored.condition));
        let ends = all.filter_map(|condition| condition.time_left(self.now)).map(|left| left.as_secs());
        ends.flat_map(|left| [left.saturating_sub(1), left.saturating_sub(2)])
            .chain([1, 10, 100, 1_000])
            .collect()
    }

    /// The faults are over; each process writes what waits, and makes one pass.
    fn last_steps(&self) -> Vec<Step> {
        let every = |step: fn(usize) -> Step| (0..self.processes.len()).map(step);
        let mut steps: Vec<_> = self.flights.iter().map(|_| Step::Drop(0)).collect();
        steps.extend(every(Step::Heal));
        steps.extend(every(|process| Step::Pass(process, Connection::AsItIs)));
        steps.extend(every(|process| Step::Send(process, IDS[0], Some(FINE))));
        steps
    }
}

// ---- what happens ----

fn answer() -> impl Strategy<Value = Answer> {
    let status = prop_oneof![1 => Just(200), 8 => Just(429), 1 => Just(401), 1 => Just(402)];
    let retry_after = prop_oneof![2 => Just(None), 3 => (121u64..900).prop_map(Some)];
    (status, retry_after).prop_map(|(status, retry_after)| Answer { status, retry_after })
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => Just(Change::Reset),
        1 => Just(Change::Disable),
        1 => Just(Change::Enable),
        1 => Just(Change::Remove),
        2 => Just(Change::Insert),
    ]
}

fn fault() -> impl Strategy<Value = (Part, Mode)> {
    prop_oneof![
        4 => Just((Part::Loads, Mode::Hangs)),
        2 => Just((Part::Writes, Mode::Hangs)),
        4 => (select(PARTS.to_vec()), select(vec![Mode::Fails, Mode::Hangs])),
    ]
}

fn connection() -> impl Strategy<Value = Connection> {
    select(vec![Connection::AsItIs, Connection::Healed])
}

impl ReferenceStateMachine for World {
    type State = Self;
    type Transition = Step;

    fn init_state() -> BoxedStrategy<Self> {
        (2usize..=3, 1..=IDS.len()).prop_map(|(processes, keys)| Self::new(processes, keys)).boxed()
    }

    fn transitions(world: &Self) -> BoxedStrategy<Step> {
        // Much of it about one key and one process, so that things meet.
        let process = || prop_oneof![Just(0), 0..world.processes.len()];
        let id = || prop_oneof![Just(IDS[0]), select(IDS.to_vec())];
        let flight = || 0..world.flights.len().max(1);
        let maybe_answered = prop::option::weighted(0.5, answer());
        prop_oneof![
            16 => (process(), id(), maybe_answered).prop_map(|(process, id, answer)| Step::Send(process, id, answer)),
            16 => (flight(), answer()).prop_map(|(flight, answer)| Step::Answer(flight, answer)),
            1 => flight().prop_map(Step::Drop),
            6 => select(world.times_to_wait()).prop_map(Step::Wait),
            8 => (process(), fault()).prop_map(|(process, (part, mode))| Step::Break(process, part, mode)),
            4 => process().prop_map(Step::Heal),
            10 => process().prop_map(Step::Reload),
            4 => (process(), subsequence(IDS.to_vec(), 1..IDS.len())).prop_map(|(process, ids)| Step::Follow(process, ids)),
            8 => (process(), connection()).prop_map(|(process, connection)| Step::Pass(process, connection)),
            10 => (process(), change(), id()).prop_map(|(process, change, id)| Step::Operate(process, change, id)),
            5 => (change(), id()).prop_map(|(change, id)| Step::Elsewhere(change, id)),
            2 => id().prop_map(Step::NewSecret),
            3 => (process(), connection()).prop_map(|(process, connection)| Step::ShutDown(process, connection)),
            1 => process().prop_map(Step::Crash),
        ]
        .boxed()
    }

    fn preconditions(world: &Self, step: &Step) -> bool {
        if world.is_a_race(step) {
            return false;
        }
        let process = |process: &usize| world.processes.get(*process);
        match step {
            Step::Answer(flight, _) | Step::Drop(flight) => *flight < world.flights.len(),
            Step::Reload(which) => process(which).is_some_and(Process::has_its_turn_free),
            Step::Follow(which, _) => process(which).is_some_and(|process| {
                process.has_its_turn_free() && process.does(Part::Loads) == Mode::Works
            }),
            Step::Pass(which, connection) | Step::ShutDown(which, connection) => {
                process(which).is_some_and(|process| process.can_make_a_pass(*connection))
            }
            // A sweep that hangs is one that comes later.
            Step::Break(which, part, mode) => {
                process(which).is_some() && (*part, *mode) != (Part::Recovers, Mode::Hangs)
            }
            Step::Send(which, ..) | Step::Heal(which) | Step::Operate(which, ..) | Step::Crash(which) => {
                process(which).is_some()
            }
            Step::Wait(_) | Step::Elsewhere(..) | Step::NewSecret(_) => true,
        }
    }

    fn apply(mut world: Self, step: &Step) -> Self {
        world.take(step);
        world
    }
}

// ---- the pools and their recoveries ----

struct Real {
    clock: ManualClock,
    memory: MemoryStore,
    processes: Vec<RealProcess>,
    flights: Vec<(usize, Flight)>,
    starts: u64,
}

struct RealProcess {
    runtime: Runtime,
    clock: ManualClock,
    connection: FaultyStore,
    recovery: Arc<RecoveryHandle>,
    pool: KeyPool,
    caller: Caller,
    done: Arc<Mutex<Done>>,
}

/// Has everything run that can.
fn settle(runtime: &Runtime) {
    runtime.block_on(async {
        for _ in 0..10 {
            yield_now().await;
        }
    });
}

impl RealProcess {
    fn start(memory: &MemoryStore, store_clock: &ManualClock, number: u64) -> Self {
        // One first pass in some millions would otherwise come before the end of the test.
        fastrand::seed(1);
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let connection = FaultyStore::over(memory.clone(), store_clock);
        let clock = ManualClock::new();
        clock.advance(1_000 * number as u32 * SECOND);
        let opening = KeyPool::builder().clock(clock.clone()).open(connection.clone());
        let pool = runtime.block_on(opening).expect("the store is there");
        let recovery = {
            let _within = runtime.enter();
            RecoveryHandle::spawn_with(&pool, passes_by_hand().limit(Duration::MAX))
        };
        let caller = Caller::new(&pool);
        let (recovery, done) = (Arc::new(recovery), Arc::default());
        let process = Self { runtime, clock, connection, recovery, pool, caller, done };
        process.settle();
        process
    }

    fn settle(&self) {
        settle(&self.runtime);
    }

    fn spawn<T>(&self, what: impl Future<Output = T> + Send + 'static, note: fn(&mut Done, T))
    where
        T: Send + 'static,
    {
        let done = self.done.clone();
        self.runtime.spawn(async move {
            let came = what.await;
            note(&mut done.lock().expect("not poisoned"), came);
        });
    }

    fn set(&self, part: Part, mode: Mode) {
        let operation = match part {
            Part::Loads => &self.connection.loads,
            Part::Writes => &self.connection.writes,
            Part::Replies => &self.connection.replies,
            Part::Recovers => &self.connection.recovers,
            Part::Operators => &self.connection.operators,
        };
        operation.set(mode);
    }

    fn heal(&self, connection: Connection) {
        if connection == Connection::Healed {
            PARTS.iter().for_each(|part| self.set(*part, Mode::Works));
        }
    }

    fn reload(&self) {
        let pool = self.pool.clone();
        self.spawn(async move { pool.reload().await }, |done, came| done.reloads.push(came.is_ok()));
    }

    fn pass(&self) {
        let recovery = self.recovery.clone();
        self.spawn(async move { recovery.sweep_now().await }, |done, report| {
            done.passes.push(report.outcome.ok().map(|recovered| recovered.count));
        });
    }

    fn operate(&self, change: Change, id: Id, number: SecretNumber) {
        let pool = self.pool.clone();
        let changing = async move {
            match change {
                Change::Reset => pool.reset(id).await,
                Change::Disable => pool.disable(id).await,
                Change::Enable => pool.enable(id).await,
                Change::Remove => pool.remove(id).await,
                Change::Insert => pool.insert(id, secret(number)).await,
            }
        };
        self.spawn(changing, |done, came| {
            done.changes.push(match came {
                Ok(()) => Changing::Done,
                Err(OperateError::UnknownKey(_)) => Changing::UnknownKey,
                Err(OperateError::KeyExists(_)) => Changing::KeyExists,
                Err(OperateError::Store(_)) => Changing::StoreFailed,
                Err(error) => panic!("{error:?}"),
            });
        });
    }

    /// Ends the process as one does that has the time for it, and says how many marks it could not write.
    fn shut_down(self) -> usize {
        let recovery = Arc::into_inner(self.recovery).expect("no pass is under way");
        let shutdown = self.runtime.spawn(recovery.shutdown());
        settle(&self.runtime);
        let came = shutdown.now_or_never().expect("nothing hangs").expect("no panic");
        came.map_or_else(|MarksNotWritten(marks)| marks, |()| 0)
    }
}

impl Real {
    fn new(world: &World) -> Self {
        let clock = ManualClock::new();
        let memory = MemoryStore::with_clock(Arc::new(clock.clone()));
        for (id, stored) in &world.store {
            assert!(immediately(memory.insert(key_id(id), secret(stored.secret).into())).expect("memory"));
        }
        let mut real = Self { clock, memory, processes: Vec::new(), flights: Vec::new(), starts: 0 };
        for _ in &world.processes {
            let process = real.start();
            real.processes.push(process);
        }
        real
    }

    fn start(&mut self) -> RealProcess {
        self.starts += 1;
        RealProcess::start(&self.memory, &self.clock, self.starts)
    }

    fn advance(&self, by: Duration) {
        self.clock.advance(by);
        for process in &self.processes {
            process.clock.advance(by);
            process.settle();
        }
    }

    /// Ends a process by way of `end`, and has another one take its place.
    fn restart<T>(&mut self, process: usize, end: impl FnOnce(RealProcess) -> T) -> T {
        self.flights.retain(|(of, _)| *of != process);
        let came = self.end(process, end);
        let next = self.start();
        self.processes.insert(process, next);
        came
    }

    fn end<T>(&mut self, process: usize, end: impl FnOnce(RealProcess) -> T) -> T {
        let process = self.processes.remove(process);
        let clock = Arc::downgrade(process.pool.clock());
        let came = end(process);
        assert!(clock.upgrade().is_none(), "something still holds the pool");
        came
    }

    fn take(&mut self, step: Step, world: &World) {
        match step {
            Step::Send(process, _, answer) => self.send(process, answer, world),
            Step::Answer(flight, answer) => drop(self.flights.remove(flight).1.answer(answer)),
            Step::Drop(flight) => drop(self.flights.remove(flight)),
            Step::Wait(seconds) => self.advance(Duration::from_secs(seconds)),
            Step::Break(process, part, mode) => self.processes[process].set(part, mode),
            Step::Heal(process) => self.processes[process].heal(Connection::Healed),
            Step::Reload(process) => self.processes[process].reload(),
            Step::Follow(process, ids) => {
                let process = &self.processes[process];
                let ids = ids.into_iter().map(key_id).collect();
                immediately(process.connection.tell(Changed::Keys(ids)));
            }
            Step::Pass(process, connection) => {
                self.processes[process].heal(connection);
                self.processes[process].pass();
            }
            Step::Operate(process, change, id) => self.processes[process].operate(change, id, world.secrets),
            Step::Elsewhere(change, id) => self.change(change, id, world.secrets),
            Step::NewSecret(id) => {
                if immediately(self.memory.remove(&key_id(id))).expect("memory") {
                    self.change(Change::Insert, id, world.secrets);
                }
            }
            Step::ShutDown(process, connection) => {
                self.processes[process].heal(connection);
                let left_behind = self.restart(process, RealProcess::shut_down);
                assert_eq!(
                    Outcome::LeftBehind(left_behind),
                    world.outcome,
                    "marks that a shutdown could not write"
                );
            }
            Step::Crash(process) => self.restart(process, drop),
        }
        self.processes.iter().for_each(RealProcess::settle);
        self.advance(SECOND);
    }

    fn send(&mut self, process: usize, answer: Option<Answer>, world: &World) {
        let caller = &mut self.processes[process].caller;
        let (with, of_interest) = match &world.outcome {
            Outcome::Sent { with, of_interest } => (with, of_interest),
            outcome => {
                let retry_in = caller.send().err().expect("no key is available").retry_in();
                assert_eq!(Outcome::NoKey { retry_in }, *outcome, "process {process}");
                return;
            }
        };
        let flights: Vec<_> = with.iter().map(|_| caller.send().expect("a key is available")).collect();
        let sent_with: BTreeSet<_> = flights.iter().map(|flight| flight.secret()).collect();
        assert_eq!(sent_with, *with, "process {process} sent with keys that rest, or left some out");
        for flight in flights {
            match answer.filter(|_| Some(flight.secret()) == *of_interest) {
                Some(answer) => drop(flight.answer(answer)),
                None if Some(flight.secret()) == *of_interest => self.flights.push((process, flight)),
                None => drop(flight.answer(FINE)),
            }
        }
    }

    fn change(&self, change: Change, id: Id, number: SecretNumber) {
        let id = key_id(id);
        let changing = match change {
            Change::Reset => self.memory.reset(&id),
            Change::Disable => self.memory.set_disabled(&id, true),
            Change::Enable => self.memory.set_disabled(&id, false),
            Change::Remove => self.memory.remove(&id),
            Change::Insert => self.memory.insert(id, secret(number).into()),
        };
        immediately(changing).expect("memory");
    }

    /// What the store has.
    fn stored(&self) -> BTreeMap<String, (SecretNumber, Condition)> {
        let now = self.clock.now();
        let loaded = immediately(self.memory.load()).expect("memory");
        let seen = loaded.records.into_iter().map(|record| {
            let rest = record
                .rest
                .map(|(rest, left)| Rest { status: rest.into(), until: left.map(|left| now + left) });
            let condition = Condition { rest, disabled: record.disabled };
            let number = secret_number(record.secret.expose()).expect("one of our secrets");
            (record.id.to_string(), (number, as_seen(condition, now)))
        });
        seen.collect()
    }
}

impl RealProcess {
    fn seen(&self) -> Seen {
        let stats = self.pool.stats();
        stats.keys.into_iter().map(|key| (key.id.to_string(), (key.status, key.time_left))).collect()
    }
}

/// What is seen of keys in a pool.
type Seen = BTreeMap<String, (Status, Option<Duration>)>;

fn seen<'a>(keys: impl IntoIterator<Item = (impl ToString, &'a Condition)>, now: Duration) -> Seen {
    let seen = |key: &Condition| (key.status(now), key.time_left(now));
    keys.into_iter().map(|(id, key)| (id.to_string(), seen(key))).collect()
}

/// Of a rest that is over nobody can say when that was, or why it was.
fn as_seen(condition: Condition, now: Duration) -> Condition {
    let over = Rest { status: Status::Healthy, until: Some(now) };
    let rest = condition.rest.map(|rest| if rest.is_over(now) { over } else { rest });
    Condition { rest, ..condition }
}

impl Real {
    fn take_after(&mut self, step: Step, world: &mut World) {
        world.take(&step);
        self.take(step, world);
        Self::check_invariants(self, world);
    }
}

impl StateMachineTest for Real {
    type SystemUnderTest = Self;
    type Reference = World;

    fn init_test(world: &World) -> Self {
        Self::new(world)
    }

    fn apply(mut real: Self, world: &World, step: Step) -> Self {
        real.take(step, world);
        real
    }

    fn check_invariants(real: &Self, world: &World) {
        let now = world.now;
        for (number, (process, model)) in real.processes.iter().zip(&world.processes).enumerate() {
            let known = model.keys.iter().map(|(id, key)| (id, &key.condition));
            assert_eq!(process.seen(), seen(known, now), "what process {number} knows");
            assert_eq!(
                process.pool.stats().marks_waiting,
                model.marks_waiting(),
                "marks that wait in process {number}"
            );
            assert_eq!(
                *process.done.lock().expect("not poisoned"),
                model.done,
                "what process {number} has done"
            );
        }
        let stored = world
            .store
            .iter()
            .map(|(id, stored)| (id.to_string(), (stored.secret, as_seen(stored.condition, now))));
        assert_eq!(real.stored(), stored.collect(), "what the store has");
        assert_eq!(real.flights.len(), world.flights.len());
    }

    fn teardown(mut real: Self, mut world: World) {
        for step in world.last_steps() {
            // What is a matter of luck is waited for, as no step before was taken.
            while world.is_a_race(&step) {
                let past = (1..10).map(Step::Wait).find(|wait| !world.is_a_race(wait));
                real.take_after(past.expect("some second in which no rest ends"), &mut world);
            }
            real.take_after(step, &mut world);
        }
        let stored = real.stored();
        for process in &real.processes {
            let stored = stored.iter().map(|(id, (_, condition))| (id, condition));
            assert_eq!(process.seen(), seen(stored, world.now), "all pools and the store agree");
            assert_eq!(process.pool.stats().marks_waiting, 0);
        }
        for (id, (secret, condition)) in &stored {
            let left = |rest: Option<Rest>| rest.map(|rest| rest.until);
            let told = world.log.rest(*secret, world.now);
            let (left, told) = (left(condition.rest(world.now)), left(told));
            assert_eq!(left, told, "until when {id} rests, and by all that the service said");
        }
        while !real.processes.is_empty() {
            assert_eq!(real.end(0, RealProcess::shut_down), 0, "marks are left");
        }
    }
}

prop_state_machine! {
    #![proptest_config(ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("proptest-regressions"))),
        max_local_rejects: u32::MAX,
        ..ProptestConfig::default()
    })]

    #[test]
    fn pools_that_share_a_store_agree_with_it_and_with_what_they_were_told(sequential 1..100 => Real);
}
