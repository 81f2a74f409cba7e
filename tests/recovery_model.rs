//! Several pools over one store, with their recoveries, beside a model of the protocol: what each process knows of each
//! key as a word that is joined, and what the store has. A longer run: `PROPTEST_CASES=100000`.
//!
//! Requests, passes, faults, operators, other programs, late writes, late news and crashes are played to both. After each
//! step both have to agree on every key in every pool and in the store. In the end the faults are over, each process makes
//! a pass, and all have to agree with a log of what the service said: no reset is undone, and no mark is lost.
//!
//! A process is a pool with its recovery, a runtime, a clock and a connection of its own. Each step ends with a second in
//! which every process writes its pending marks, as far as its connection lets it: so no two things happen at once.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
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
    KeyPool, KeySpec, RecoveryHandle, Status,
    clock::{Clock, ManualClock},
    store::{Born, Change, KeyStore, Mark, MemoryStore, Operation, Resting, Standing, Until, Words},
};

type Id = &'static str;

const IDS: [Id; 2] = ["alpha", "beta"];

#[derive(Clone, Debug)]
enum Step {
    /// A request with each available key. The one with that key is answered so, or stays in flight; the others succeed.
    Send(usize, Id, Option<Answer>),
    /// The answer to a request in flight.
    Answer(usize, Answer),
    Wait(u64),
    /// From now on, a part of the process's connection fails or hangs.
    Break(usize, Part, Mode),
    /// All parts work again.
    Heal(usize),
    Reload(usize),
    Pass(usize),
    Operate(usize, Act, Id),
    /// Another program does it in the store.
    Elsewhere(Act, Id),
    /// The store tells a process which keys have changed.
    Changed(usize, Vec<Id>),
    /// The store tells a process how a key stood at some moment: news may be late.
    Stood(usize, usize),
    /// A write that its process gave up arrives, perhaps once more.
    LateWrite(usize),
    /// The process ends, and another one takes its place.
    ShutDown(usize),
    Crash(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Loads,
    Writes,
    Replies,
    Recovers,
    Operators,
    Confirmations,
}

const PARTS: [Part; 6] =
    [Part::Loads, Part::Writes, Part::Replies, Part::Recovers, Part::Operators, Part::Confirmations];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Act {
    Reset,
    Disable,
    Enable,
    Remove,
    /// With a new secret.
    Insert,
    /// Another program's: removed and inserted again, with that secret.
    Replace(SecretNumber),
}

// ---- the model ----

/// A generation and a rest, joined by the greater one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Word {
    generation: u64,
    rest: Option<Rest>,
}

impl Word {
    fn is_beyond(&self, other: &Self) -> bool {
        let is_longer = self.rest.is_some_and(|rest| rest.outlasts(other.rest));
        self.generation > other.generation || self.generation == other.generation && is_longer
    }

    fn join(&mut self, other: Self) {
        if other.is_beyond(self) {
            *self = other;
        }
    }

    fn at(self, now: Duration) -> Self {
        Self { rest: self.rest.filter(|rest| !rest.is_over(now)), ..self }
    }
}

/// A key in the store.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Stored {
    secret: SecretNumber,
    /// Which key object of that id it is.
    born: u64,
    word: Word,
    disabled: bool,
}

/// A key in a process.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// Which key object of the process it is.
    object: u64,
    key: Stored,
    pending: Option<Word>,
}

#[derive(Clone, Copy, Debug)]
struct Write {
    id: Id,
    object: u64,
    born: u64,
    word: Word,
    /// The store's answer, once the write has arrived.
    answer: Option<Option<Stored>>,
}

/// What a process does in its turn, while a part of its connection hangs.
#[derive(Clone, Debug)]
enum Turn {
    Load { found: BTreeMap<Id, Stored>, ids: Vec<Id>, of: Load },
    Operate { act: Act, id: Id, secret: SecretNumber, answer: Option<Option<Stored>> },
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Load {
    Reload,
    /// After a change of a key of which the store has another one.
    Changed,
    /// Of keys whose marks were refused; the writer waits for it.
    Refused,
    /// Of which nobody hears the outcome.
    Other,
}

/// The outcomes of what a process was asked for.
#[derive(Clone, Debug, Default, PartialEq)]
struct Done {
    reloads: Vec<bool>,
    /// How many keys were reset, if nothing failed.
    passes: Vec<Option<u64>>,
    changes: Vec<Outcome>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Outcome {
    Done,
    UnknownKey,
    KeyExists,
    StoreFailed,
}

#[derive(Clone, Debug, Default)]
struct Process {
    keys: BTreeMap<Id, Known>,
    broken: BTreeMap<Part, Mode>,
    turn: Option<Turn>,
    writes: Vec<Write>,
    /// Keys whose marks the store refused, which are to be loaded.
    refused: Vec<Id>,
    done: Done,
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    process: usize,
    id: Id,
    object: u64,
}

/// What the service said of a key, as its process understood it.
#[derive(Clone, Copy, Debug)]
struct Told {
    object: u64,
    born: u64,
    word: Word,
    /// Whether the store had it at some moment.
    arrived: bool,
    /// Whether the key object that knew it is gone.
    lost: bool,
}

#[derive(Clone, Debug, PartialEq)]
enum Seen {
    Nothing,
    /// The secrets that requests were sent with, and that of the key in question.
    Sent {
        with: BTreeSet<SecretNumber>,
        of_interest: Option<SecretNumber>,
    },
    NoKey {
        retry_in: Option<Duration>,
    },
    LeftBehind(usize),
}

#[derive(Clone)]
struct World {
    now: Duration,
    store: BTreeMap<Id, Stored>,
    processes: Vec<Process>,
    flights: Vec<Sent>,
    /// Writes that were given up before they arrived.
    late: Vec<Write>,
    /// How keys have stood.
    news: Vec<(Id, Stored)>,
    told: Vec<Told>,
    /// How many secrets, key objects of the store and of processes there have been.
    secrets: SecretNumber,
    numbers: u64,
    seen: Seen,
    /// What the service answered, if it answered.
    answer: Option<Answer>,
}

impl Process {
    fn does(&self, part: Part) -> Mode {
        self.broken.get(&part).copied().unwrap_or(Mode::Works)
    }

    fn pending(&self) -> usize {
        self.keys.values().filter(|key| key.pending.is_some()).count()
    }

    fn may_begin(&self) -> bool {
        self.turn.is_none() && self.refused.is_empty()
    }

    fn writer_is_idle(&self) -> bool {
        let loads = matches!(self.turn, Some(Turn::Load { of: Load::Refused, .. }));
        self.writes.is_empty() && self.refused.is_empty() && !loads
    }

    /// Whether a pass would hang nowhere.
    fn may_pass(&self) -> bool {
        let hangs = [Part::Writes, Part::Replies, Part::Loads].map(|part| self.does(part) == Mode::Hangs);
        self.may_begin() && self.writes.is_empty() && !hangs.contains(&true)
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
        let mut world = Self {
            now: Duration::ZERO,
            store: BTreeMap::new(),
            processes: vec![Process::default(); processes],
            flights: Vec::new(),
            late: Vec::new(),
            news: Vec::new(),
            told: Vec::new(),
            secrets: 0,
            numbers: 0,
            seen: Seen::Nothing,
            answer: None,
        };
        IDS.into_iter().take(keys).for_each(|id| _ = world.insert(id, None));
        (0..processes).for_each(|process| world.start(process));
        world
    }

    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    fn take(&mut self, step: &Step) {
        self.seen = Seen::Nothing;
        self.answer = None;
        match step {
            Step::Send(process, id, answer) => self.send(*process, id, *answer),
            Step::Answer(flight, answer) => {
                let sent = self.flights.remove(*flight);
                self.tell(sent, *answer);
            }
            Step::Wait(seconds) => self.now += Duration::from_secs(*seconds),
            Step::Break(process, part, mode) => {
                self.processes[*process].broken.insert(*part, *mode);
                self.go_on(*process);
            }
            Step::Heal(process) => {
                self.processes[*process].broken.clear();
                self.go_on(*process);
            }
            Step::Reload(process) => self.load(*process, IDS.to_vec(), Load::Reload),
            Step::Pass(process) => self.pass(*process),
            Step::Operate(process, act, id) => self.operate(*process, *act, id),
            Step::Elsewhere(act, id) => {
                let secret = self.new_secret(*act);
                self.change(*act, id, secret);
            }
            Step::Changed(process, ids) => self.load(*process, ids.clone(), Load::Other),
            Step::Stood(process, news) => self.hear(*process, *news),
            Step::LateWrite(write) => {
                let mut write = self.late[*write];
                self.arrive(&mut write);
            }
            Step::ShutDown(process) => {
                self.write_marks(*process);
                self.seen = Seen::LeftBehind(self.processes[*process].pending());
                self.start(*process);
            }
            Step::Crash(process) => self.start(*process),
        }
        self.now += SECOND;
        (0..self.processes.len()).for_each(|process| _ = self.write_marks(process));
    }

    /// A process that has what the store has, in the place of one that ends.
    fn start(&mut self, process: usize) {
        let Process { keys, writes, .. } = std::mem::take(&mut self.processes[process]);
        self.late.extend(writes.iter().filter(|write| write.answer.is_none()));
        keys.values().for_each(|key| self.forget(key.object));
        self.flights.retain(|sent| sent.process != process);
        self.load(process, IDS.to_vec(), Load::Other);
    }

    /// What only a key object knew is lost with it.
    fn forget(&mut self, object: u64) {
        self.told.iter_mut().filter(|told| told.object == object).for_each(|told| told.lost = true);
    }

    fn send(&mut self, process: usize, id: Id, answer: Option<Answer>) {
        let now = self.now;
        let keys = &self.processes[process].keys;
        let available = || keys.iter().filter(|(_, key)| key.key.condition().is_available(now));
        let with: BTreeSet<_> = available().map(|(_, key)| key.key.secret).collect();
        let of_interest = available().find(|(own, _)| **own == id).map(|(_, key)| *key);
        self.seen = match with.is_empty() {
            true => {
                let conditions: Vec<_> = keys.values().map(|key| key.key.condition()).collect();
                Seen::NoKey { retry_in: retry_in(&conditions, now) }
            }
            false => Seen::Sent { with, of_interest: of_interest.map(|key| key.key.secret) },
        };
        let Some(key) = of_interest else { return };
        let sent = Sent { process, id, object: key.object };
        match answer {
            Some(answer) => self.tell(sent, answer),
            None => self.flights.push(sent),
        }
    }

    fn tell(&mut self, Sent { process, id, object }: Sent, answer: Answer) {
        let now = self.now;
        let keys = &self.processes[process].keys;
        let has_another =
            keys.values().any(|known| known.object != object && known.key.condition().is_available(now));
        let answer = answer.unless_last(has_another);
        self.answer = Some(answer);
        let Some(rest) = answer.rest(self.now) else { return };
        let known = self.processes[process].keys.get_mut(id).filter(|known| known.object == object);
        let Some(known) = known else { return };
        let word = Word { generation: known.key.word.generation, rest: Some(rest) };
        if word.is_beyond(&known.key.word) {
            known.key.word = word;
            known.pending.get_or_insert_default().join(word);
            self.told.push(Told { object, born: known.key.born, word, arrived: false, lost: false });
        }
    }

    /// Has a process write its pending marks if its writer is idle. Returns whether nothing failed.
    fn write_marks(&mut self, process: usize) -> bool {
        let now = self.now;
        let is_idle = self.processes[process].writer_is_idle();
        let Process { keys, writes, .. } = &mut self.processes[process];
        if is_idle {
            for (id, known) in keys.iter_mut() {
                let Some(word) = known.pending else { continue };
                let born = known.key.born;
                match word.at(now).rest {
                    Some(_) => writes.push(Write { id, object: known.object, born, word, answer: None }),
                    // There is nothing to say of a rest that is over.
                    None => known.pending = None,
                }
            }
        }
        self.deliver(process)
    }

    fn deliver(&mut self, process: usize) -> bool {
        let mut is_ok = true;
        for mut write in std::mem::take(&mut self.processes[process].writes) {
            if write.answer.is_none() && self.processes[process].does(Part::Writes) == Mode::Works {
                self.arrive(&mut write);
            }
            let part = if write.answer.is_some() { Part::Replies } else { Part::Writes };
            match (self.processes[process].does(part), write.answer) {
                (Mode::Hangs, _) => self.processes[process].writes.push(write),
                (Mode::Works, Some(Some(answer))) => self.acknowledge(process, &write, answer),
                (Mode::Works, _) => self.processes[process].refused.push(write.id),
                (_, None) => {
                    is_ok = false;
                    self.late.push(write);
                }
                _ => is_ok = false,
            }
        }
        is_ok & self.load_refused(process)
    }

    fn arrive(&mut self, write: &mut Write) {
        let now = self.now;
        let stored = self.store.get_mut(write.id).filter(|stored| stored.born == write.born);
        write.answer = Some(stored.map(|stored| {
            stored.word.join(write.word.at(now));
            *stored
        }));
        let Some(Some(answer)) = write.answer else { return };
        self.news.push((write.id, answer));
        let is_part = |told: &&mut Told| told.object == write.object && !told.word.is_beyond(&write.word);
        self.told.iter_mut().filter(is_part).for_each(|told| told.arrived = true);
    }

    fn acknowledge(&mut self, process: usize, write: &Write, answer: Stored) {
        let known =
            self.processes[process].keys.get_mut(write.id).filter(|known| known.object == write.object);
        if let Some(known) = known {
            if known.pending == Some(write.word) {
                known.pending = None;
            }
            known.join(answer.word.at(self.now));
        }
    }

    /// The writer loads the keys whose marks were refused, when it has its turn.
    fn load_refused(&mut self, process: usize) -> bool {
        if !self.processes[process].writes.is_empty() || self.processes[process].turn.is_some() {
            return true;
        }
        let refused = std::mem::take(&mut self.processes[process].refused);
        let is_ok = refused.is_empty() || self.processes[process].does(Part::Loads) != Mode::Fails;
        if !refused.is_empty() {
            self.load(process, refused, Load::Refused);
        }
        is_ok
    }

    /// Continues all that hung, as far as the connection lets it.
    fn go_on(&mut self, process: usize) {
        match self.processes[process].turn.take() {
            Some(Turn::Load { found, ids, of }) => self.finish_load(process, found, ids, of),
            Some(Turn::Operate { act, id, secret, answer }) => {
                self.finish_change(process, act, id, secret, answer)
            }
            None => {}
        }
        self.deliver(process);
    }

    fn pass(&mut self, process: usize) {
        let written = self.write_marks(process);
        let recovered = (self.processes[process].does(Part::Recovers) == Mode::Works).then(|| self.sweep());
        let loaded = self.processes[process].does(Part::Loads) == Mode::Works;
        self.load(process, IDS.to_vec(), Load::Other);
        self.processes[process].done.passes.push(recovered.filter(|_| written && loaded));
    }

    fn sweep(&mut self) -> u64 {
        let now = self.now;
        let over = |stored: &&mut Stored| stored.word.at(now) != stored.word;
        self.store.values_mut().filter(over).map(|stored| stored.word = stored.word.at(now)).count() as u64
    }

    fn load(&mut self, process: usize, ids: Vec<Id>, of: Load) {
        self.finish_load(process, self.store.clone(), ids, of);
    }

    fn finish_load(&mut self, process: usize, found: BTreeMap<Id, Stored>, ids: Vec<Id>, of: Load) {
        let mode = self.processes[process].does(Part::Loads);
        match mode {
            Mode::Hangs => return self.processes[process].turn = Some(Turn::Load { found, ids, of }),
            Mode::Works => ids.iter().for_each(|id| self.learn(process, id, found.get(id).copied())),
            _ => {}
        }
        let done = &mut self.processes[process].done;
        match of {
            Load::Reload => done.reloads.push(mode == Mode::Works),
            Load::Changed => done.changes.push(Outcome::Done),
            Load::Refused | Load::Other => {}
        }
        self.load_refused(process);
    }

    fn learn(&mut self, process: usize, id: Id, found: Option<Stored>) {
        let found = found.map(|found| Stored { word: found.word.at(self.now), ..found });
        let object = self.number();
        let keys = &mut self.processes[process].keys;
        match (keys.get_mut(id), found) {
            (Some(known), Some(found)) if known.key.born == found.born => {
                known.key.disabled = found.disabled;
                known.join(found.word);
            }
            (_, found) => {
                let new = found.map(|key| Known { object, key, pending: None });
                let before = match new {
                    Some(new) => keys.insert(id, new),
                    None => keys.remove(id),
                };
                before.iter().for_each(|before| self.forget(before.object));
            }
        }
    }

    fn hear(&mut self, process: usize, news: usize) {
        let (id, stood) = self.news[news];
        let word = stood.word.at(self.now);
        match self.processes[process].keys.get_mut(id).filter(|known| known.key.born == stood.born) {
            Some(known) => {
                known.join(word);
                if known.key.disabled != stood.disabled {
                    self.load(process, vec![id], Load::Other);
                }
            }
            None => self.load(process, vec![id], Load::Other),
        }
    }

    fn new_secret(&mut self, act: Act) -> SecretNumber {
        self.secrets += SecretNumber::from(act == Act::Insert);
        self.secrets
    }

    fn operate(&mut self, process: usize, act: Act, id: Id) {
        let secret = self.new_secret(act);
        let is_known = self.processes[process].keys.contains_key(id);
        match (act, is_known) {
            (Act::Insert, true) => self.processes[process].done.changes.push(Outcome::KeyExists),
            (Act::Insert, false) | (_, true) => self.finish_change(process, act, id, secret, None),
            (_, false) => self.processes[process].done.changes.push(Outcome::UnknownKey),
        }
    }

    fn finish_change(
        &mut self,
        process: usize,
        act: Act,
        id: Id,
        secret: SecretNumber,
        mut answer: Option<Option<Stored>>,
    ) {
        if answer.is_none() && self.processes[process].does(Part::Operators) == Mode::Works {
            answer = Some(self.change(act, id, secret));
        }
        let part = if answer.is_some() { Part::Confirmations } else { Part::Operators };
        let outcome = match (self.processes[process].does(part), answer) {
            (Mode::Hangs, _) => {
                self.processes[process].turn = Some(Turn::Operate { act, id, secret, answer });
                return;
            }
            (Mode::Works, Some(stored)) => match self.confirm(process, act, id, stored) {
                Some(outcome) => outcome,
                None => return self.load(process, vec![id], Load::Changed),
            },
            _ => Outcome::StoreFailed,
        };
        self.processes[process].done.changes.push(outcome);
        self.load_refused(process);
    }

    /// Applies the store's answer. `None` if the store has another key of that id, which is to be loaded.
    fn confirm(&mut self, process: usize, act: Act, id: Id, stored: Option<Stored>) -> Option<Outcome> {
        let born = self.processes[process].keys.get(id).map(|known| known.key.born);
        match (act, stored) {
            (Act::Remove, _) => self.learn(process, id, None),
            (Act::Insert, None) => return Some(Outcome::KeyExists),
            (_, None) => return Some(Outcome::UnknownKey),
            (Act::Insert, stored) => self.learn(process, id, stored),
            (_, Some(stored)) if born != Some(stored.born) => return None,
            (_, stored) => self.learn(process, id, stored),
        }
        Some(Outcome::Done)
    }

    /// A change in the store, with its answer.
    fn change(&mut self, act: Act, id: Id, secret: SecretNumber) -> Option<Stored> {
        match act {
            Act::Insert if self.store.contains_key(id) => return None,
            Act::Insert => return Some(self.insert(id, Some(secret))),
            Act::Remove => return self.store.remove(id),
            Act::Replace(secret) => {
                self.store.remove(id)?;
                return Some(self.insert(id, Some(secret)));
            }
            _ => {}
        }
        let stored = self.store.get_mut(id)?;
        match act {
            Act::Reset => stored.word = Word { generation: stored.word.generation + 1, rest: None },
            _ => stored.disabled = act == Act::Disable,
        }
        self.news.push((id, *stored));
        Some(*stored)
    }

    fn insert(&mut self, id: Id, secret: Option<SecretNumber>) -> Stored {
        let secret = secret.unwrap_or_else(|| self.new_secret(Act::Insert));
        let stored = Stored { secret, born: self.number(), word: Word::default(), disabled: false };
        self.store.insert(id, stored);
        self.news.push((id, stored));
        stored
    }

    /// Whether a pending rest ends within the second of the step: then it is a matter of luck whether it is written.
    fn is_a_race(&self, step: &Step) -> bool {
        let waited =
            if let Step::Wait(seconds) = step { Duration::from_secs(*seconds) } else { Duration::ZERO };
        let (from, to) = (self.now + waited, self.now + waited + SECOND);
        let ends = |word: Word| word.rest.is_some_and(|rest| !rest.is_over(from) && rest.is_over(to));
        let writes = self.processes.iter().flat_map(|process| process.writes.iter().map(|write| write.word));
        let pending = self.processes.iter().flat_map(|process| process.keys.values());
        pending.filter_map(|known| known.pending).chain(writes).any(ends)
    }

    /// Among them those at which a rest ends, with the second of the step itself, and just before.
    fn times_to_wait(&self) -> Vec<u64> {
        let known = self.processes.iter().flat_map(|process| process.keys.values().map(|known| known.key));
        let all = known.chain(self.store.values().copied());
        let ends = all.filter_map(|key| key.condition().time_left(self.now)).map(|left| left.as_secs());
        ends.flat_map(|left| [left.saturating_sub(1), left.saturating_sub(2)])
            .chain([1, 10, 100, 1_000])
            .collect()
    }

    /// The faults end, and each process makes a pass: the second time, it knows all that the others wrote.
    fn last_steps(&self) -> Vec<Step> {
        let every = |step: fn(usize) -> Step| (0..self.processes.len()).map(step);
        every(Step::Heal).chain(every(Step::Pass)).chain(every(Step::Pass)).collect()
    }
}

impl Stored {
    fn condition(&self) -> Condition {
        Condition { rest: self.word.rest, disabled: self.disabled }
    }
}

impl Known {
    fn join(&mut self, word: Word) {
        self.key.word.join(word);
        let generation = self.key.word.generation;
        self.pending = self.pending.filter(|pending| pending.generation == generation);
    }
}

// ---- what happens ----

fn answer() -> impl Strategy<Value = Answer> {
    let status = prop_oneof![1 => Just(200), 8 => Just(429), 1 => Just(401), 1 => Just(402)];
    let retry_after = prop_oneof![2 => Just(None), 3 => (121u64..900).prop_map(Some)];
    (status, retry_after).prop_map(|(status, retry_after)| Answer { status, retry_after })
}

fn act() -> impl Strategy<Value = Act> {
    use Act::{Disable, Enable, Insert, Remove, Reset};
    prop_oneof![4 => Just(Reset), 1 => Just(Disable), 1 => Just(Enable), 1 => Just(Remove), 2 => Just(Insert)]
}

fn fault() -> impl Strategy<Value = (Part, Mode)> {
    prop_oneof![
        4 => Just((Part::Loads, Mode::Hangs)),
        2 => Just((Part::Writes, Mode::Hangs)),
        2 => Just((Part::Replies, Mode::Hangs)),
        4 => (select(PARTS.to_vec()), select(vec![Mode::Fails, Mode::Hangs])),
    ]
}

impl ReferenceStateMachine for World {
    type State = Self;
    type Transition = Step;

    fn init_state() -> BoxedStrategy<Self> {
        (1..=IDS.len()).prop_map(|keys| Self::new(2, keys)).boxed()
    }

    fn transitions(world: &Self) -> BoxedStrategy<Step> {
        // Much of it about one key and one process, so that things meet.
        let process = || prop_oneof![Just(0), 0..world.processes.len()];
        let id = || prop_oneof![3 => Just(IDS[0]), 1 => select(IDS.to_vec())];
        let one_of = |count: usize| 0..count.max(1);
        let secret = world.store.get(IDS[0]).map_or(1, |stored| stored.secret);
        let replace = prop_oneof![Just(secret), Just(SecretNumber::MAX - world.numbers as SecretNumber)]
            .prop_map(Act::Replace);
        let elsewhere = prop_oneof![3 => act(), 1 => replace];
        prop_oneof![
            16 => (process(), id(), prop::option::weighted(0.5, answer()))
                .prop_map(|(process, id, answer)| Step::Send(process, id, answer)),
            16 => (one_of(world.flights.len()), answer()).prop_map(|(flight, answer)| Step::Answer(flight, answer)),
            6 => select(world.times_to_wait()).prop_map(Step::Wait),
            10 => (process(), fault()).prop_map(|(process, (part, mode))| Step::Break(process, part, mode)),
            6 => process().prop_map(Step::Heal),
            8 => process().prop_map(Step::Reload),
            6 => process().prop_map(Step::Pass),
            10 => (process(), act(), id()).prop_map(|(process, act, id)| Step::Operate(process, act, id)),
            6 => (elsewhere, id()).prop_map(|(act, id)| Step::Elsewhere(act, id)),
            4 => (process(), subsequence(IDS.to_vec(), 1..=IDS.len()))
                .prop_map(|(process, ids)| Step::Changed(process, ids)),
            8 => (process(), one_of(world.news.len())).prop_map(|(process, news)| Step::Stood(process, news)),
            4 => one_of(world.late.len()).prop_map(Step::LateWrite),
            2 => process().prop_map(Step::ShutDown),
            2 => process().prop_map(Step::Crash),
        ]
        .boxed()
    }

    fn preconditions(world: &Self, step: &Step) -> bool {
        if world.is_a_race(step) {
            return false;
        }
        let process = |process: &usize| &world.processes[*process];
        match step {
            Step::Answer(flight, _) => *flight < world.flights.len(),
            Step::LateWrite(write) => *write < world.late.len(),
            Step::Reload(which) | Step::Operate(which, ..) => process(which).may_begin(),
            Step::Changed(which, _) => {
                process(which).may_begin() && process(which).does(Part::Loads) == Mode::Works
            }
            Step::Stood(which, news) => {
                let may_load = process(which).may_begin() && process(which).does(Part::Loads) == Mode::Works;
                may_load && *news < world.news.len()
            }
            Step::Pass(which) | Step::ShutDown(which) => process(which).may_pass(),
            // A sweep that hangs is one that comes later.
            Step::Break(_, part, mode) => (*part, *mode) != (Part::Recovers, Mode::Hangs),
            Step::Elsewhere(Act::Insert, id) => !world.store.contains_key(id),
            Step::Elsewhere(Act::Replace(secret), id) => {
                let is_free =
                    world.store.iter().all(|(other, stored)| other == id || stored.secret != *secret);
                world.store.contains_key(id) && is_free
            }
            Step::Elsewhere(_, id) => world.store.contains_key(id),
            _ => true,
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
    starts: u32,
    /// The births of the model's key objects.
    born: BTreeMap<u64, Born>,
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

/// Runs all that can run.
fn settle(runtime: &Runtime) {
    runtime.block_on(async {
        for _ in 0..20 {
            yield_now().await;
        }
    });
}

impl RealProcess {
    fn start(memory: &MemoryStore, store_clock: &ManualClock, number: u32) -> Self {
        // One first pass in some millions would otherwise come before the end of the test.
        fastrand::seed(1);
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let connection = FaultyStore::over(memory.clone(), store_clock);
        let clock = ManualClock::new();
        clock.advance(1_000 * number * SECOND);
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
        // Births are random numbers, too, and never the same.
        static STARTS: AtomicU64 = AtomicU64::new(2);
        fastrand::seed(STARTS.fetch_add(1, Relaxed));
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
            let outcome = what.await;
            note(&mut done.lock().expect("not poisoned"), outcome);
        });
    }

    fn set(&self, part: Part, mode: Mode) {
        let method = match part {
            Part::Loads => &self.connection.loads,
            Part::Writes => &self.connection.writes,
            Part::Replies => &self.connection.replies,
            Part::Recovers => &self.connection.recovers,
            Part::Operators => &self.connection.operators,
            Part::Confirmations => &self.connection.confirmations,
        };
        method.set(mode);
    }

    fn operate(&self, act: Act, id: Id, number: SecretNumber) {
        let pool = self.pool.clone();
        let changing = async move {
            match act {
                Act::Reset => pool.reset(id).await,
                Act::Disable => pool.disable(id).await,
                Act::Enable => pool.enable(id).await,
                Act::Insert => pool.insert(id, secret(number)).await,
                Act::Remove | Act::Replace(_) => pool.remove(id).await,
            }
        };
        self.spawn(changing, |done, outcome| {
            done.changes.push(match outcome {
                Ok(()) => Outcome::Done,
                Err(error) if error.is_unknown_key() => Outcome::UnknownKey,
                Err(error) if error.is_taken() => Outcome::KeyExists,
                Err(error) if error.is_store_failure() => Outcome::StoreFailed,
                Err(error) => panic!("{error:?}"),
            });
        });
    }

    fn tell(&self, change: Change) {
        self.runtime.block_on(self.connection.tell(change));
    }

    /// Ends the process in order, and returns how many marks it could not write.
    fn shut_down(self) -> usize {
        let recovery = Arc::into_inner(self.recovery).expect("no pass is in progress");
        let shutdown = self.runtime.spawn(recovery.shutdown());
        settle(&self.runtime);
        let outcome = shutdown.now_or_never().expect("nothing hangs").expect("no panic");
        outcome.map_or_else(|lost| lost.marks, |()| 0)
    }

    /// What is seen of its keys.
    fn seen(&self) -> Conditions {
        let stats = self.pool.stats();
        stats.keys.into_iter().map(|key| (key.id.to_string(), (key.status, key.time_left))).collect()
    }
}

type Conditions = BTreeMap<String, (Status, Option<Duration>)>;

fn seen<'a>(keys: impl Iterator<Item = (&'a Id, Stored)>, now: Duration) -> Conditions {
    let seen = |key: Stored| (key.condition().status(now), key.condition().time_left(now));
    keys.map(|(id, key)| (id.to_string(), seen(key))).collect()
}

fn words(word: Word, now: Duration) -> Words {
    let resting = |rest: Rest| Resting {
        until: rest.until.map_or(Until::Reset, |until| Until::After(until - now)),
        reason: match rest.status {
            Status::Exhausted => tower_key_rotation::Rest::Exhausted,
            Status::Revoked => tower_key_rotation::Rest::Revoked,
            _ => tower_key_rotation::Rest::RateLimited,
        },
    };
    Words { generation: word.generation, key: word.at(now).rest.map(resting), ..Words::default() }
}

impl Real {
    fn new(world: &World) -> Self {
        let clock = ManualClock::new();
        let memory = MemoryStore::with_clock(Arc::new(clock.clone()));
        let (processes, flights, born) = Default::default();
        let mut real = Self { clock, memory, processes, flights, starts: 0, born };
        for (id, stored) in &world.store {
            real.change(Act::Insert, id, stored.secret);
        }
        for _ in &world.processes {
            let process = real.start();
            real.processes.push(process);
        }
        real.learn_births(world);
        real
    }

    fn start(&mut self) -> RealProcess {
        self.starts += 1;
        RealProcess::start(&self.memory, &self.clock, self.starts)
    }

    fn learn_births(&mut self, world: &World) {
        for record in immediately(self.memory.load(None)).expect("memory").records {
            if let Some(stored) = world.store.get(record.spec.id.as_str()) {
                self.born.entry(stored.born).or_insert(record.standing.born);
            }
        }
    }

    fn advance(&self, by: Duration) {
        self.clock.advance(by);
        for process in &self.processes {
            process.clock.advance(by);
            process.settle();
        }
    }

    /// Ends a process by `end`, and has another one take its place.
    fn restart<T>(&mut self, process: usize, end: impl FnOnce(RealProcess) -> T) -> T {
        self.flights.retain(|(of, _)| *of != process);
        let outcome = self.end(process, end);
        let next = self.start();
        self.processes.insert(process, next);
        outcome
    }

    fn end<T>(&mut self, process: usize, end: impl FnOnce(RealProcess) -> T) -> T {
        let process = self.processes.remove(process);
        let clock = Arc::downgrade(process.pool.clock());
        let outcome = end(process);
        assert!(clock.upgrade().is_none(), "something still holds the pool");
        outcome
    }

    fn take(&mut self, step: Step, world: &World) {
        match step {
            Step::Send(process, _, answer) => self.send(process, answer, world),
            Step::Answer(flight, answer) => {
                drop(self.flights.remove(flight).1.answer(world.answer.unwrap_or(answer)));
            }
            Step::Wait(seconds) => self.advance(Duration::from_secs(seconds)),
            Step::Break(process, part, mode) => self.processes[process].set(part, mode),
            Step::Heal(process) => {
                PARTS.iter().for_each(|part| self.processes[process].set(*part, Mode::Works))
            }
            Step::Reload(process) => {
                let pool = self.processes[process].pool.clone();
                let note = |done: &mut Done, outcome: Result<(), _>| done.reloads.push(outcome.is_ok());
                self.processes[process].spawn(async move { pool.reload().await }, note);
            }
            Step::Pass(process) => {
                let recovery = self.processes[process].recovery.clone();
                self.processes[process].spawn(async move { recovery.sweep_now().await }, |done, report| {
                    done.passes.push(report.outcome.ok().map(|recovered| recovered.count));
                });
            }
            Step::Operate(process, act, id) => self.processes[process].operate(act, id, world.secrets),
            Step::Elsewhere(act, id) => self.change(act, id, world.secrets),
            Step::Changed(process, ids) => {
                self.processes[process].tell(Change::Keys(ids.into_iter().map(key_id).collect()));
            }
            Step::Stood(process, news) => {
                let (id, stood) = world.news[news];
                let words = words(stood.word, self.clock.now());
                let standing = Standing::new(self.born[&stood.born], words, stood.disabled);
                self.processes[process].tell(Change::Standing(key_id(id), standing));
            }
            Step::LateWrite(write) => {
                let Write { id, born, word, .. } = world.late[write];
                let mark = Mark::new(key_id(id), self.born[&born], words(word, self.clock.now()));
                immediately(self.memory.merge(mark)).expect("memory");
            }
            Step::ShutDown(process) => {
                let left_behind = self.restart(process, RealProcess::shut_down);
                assert_eq!(
                    Seen::LeftBehind(left_behind),
                    world.seen,
                    "marks that a shutdown could not write"
                );
            }
            Step::Crash(process) => self.restart(process, drop),
        }
        self.processes.iter().for_each(RealProcess::settle);
        self.learn_births(world);
        self.advance(SECOND);
    }

    fn send(&mut self, process: usize, answer: Option<Answer>, world: &World) {
        let caller = &mut self.processes[process].caller;
        let (with, of_interest) = match &world.seen {
            Seen::Sent { with, of_interest } => (with, of_interest),
            seen => {
                let retry_in = caller.send().err().expect("no key is available").retry_in();
                return assert_eq!(Seen::NoKey { retry_in }, *seen, "process {process}");
            }
        };
        let flights: Vec<_> = with.iter().map(|_| caller.send().expect("a key is available")).collect();
        let sent_with: BTreeSet<_> = flights.iter().map(|flight| flight.secret()).collect();
        assert_eq!(sent_with, *with, "process {process} sent with keys that rest, or left some out");
        for flight in flights {
            match answer.filter(|_| Some(flight.secret()) == *of_interest) {
                Some(answer) => drop(flight.answer(world.answer.unwrap_or(answer))),
                None if Some(flight.secret()) == *of_interest => self.flights.push((process, flight)),
                None => drop(flight.answer(FINE)),
            }
        }
    }

    /// A change by another program.
    fn change(&self, act: Act, id: Id, number: SecretNumber) {
        let operate = |operation| {
            let done = immediately(self.memory.operate(key_id(id), operation)).expect("memory");
            done.expect("the key is there, or the id is free");
        };
        let insertion = |number| Operation::Insert(KeySpec::new(key_id(id), secret(number)));
        match act {
            Act::Reset => operate(Operation::Reset(None)),
            Act::Disable => operate(Operation::Disable),
            Act::Enable => operate(Operation::Enable),
            Act::Remove => operate(Operation::Remove),
            Act::Insert => operate(insertion(number)),
            Act::Replace(number) => {
                operate(Operation::Remove);
                operate(insertion(number));
            }
        }
    }

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
            let known = model.keys.iter().map(|(id, known)| (id, known.key));
            assert_eq!(process.seen(), seen(known, now), "what process {number} knows");
            assert_eq!(process.pool.stats().marks_waiting, model.pending(), "pending in process {number}");
            let done = process.done.lock().expect("not poisoned");
            assert_eq!(*done, model.done, "the outcomes in process {number}");
        }
        let records = immediately(real.memory.load(None)).expect("memory").records;
        let found: Vec<_> = records.into_iter().map(|record| (record.spec, record.standing)).collect();
        let expected = world.store.iter().map(|(id, stored)| {
            let standing = Standing::new(real.born[&stored.born], words(stored.word, now), stored.disabled);
            (KeySpec::new(key_id(id), secret(stored.secret)), standing)
        });
        assert_eq!(found, expected.collect::<Vec<_>>(), "what the store has");
        assert_eq!(real.flights.len(), world.flights.len());
    }

    fn teardown(mut real: Self, mut world: World) {
        for step in world.last_steps() {
            while world.is_a_race(&step) {
                let past = (1..10).map(Step::Wait).find(|wait| !world.is_a_race(wait));
                real.take_after(past.expect("some second in which no rest ends"), &mut world);
            }
            real.take_after(step, &mut world);
        }
        let now = world.now;
        for (number, process) in real.processes.iter().enumerate() {
            let stored = world.store.iter().map(|(id, stored)| (id, *stored));
            assert_eq!(process.seen(), seen(stored, now), "process {number} and the store agree");
            assert_eq!(process.pool.stats().marks_waiting, 0);
        }
        for (id, stored) in &world.store {
            let generation = stored.word.generation;
            let of_key = world.told.iter().filter(|told| told.born == stored.born);
            let counts = |told: &&Told| told.word.generation == generation && (told.arrived || !told.lost);
            let mut told = Word { generation, rest: None };
            of_key.filter(counts).for_each(|of| told.join(of.word));
            assert_eq!(stored.word.at(now), told.at(now), "how {id} rests, and by all that the service said");
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
    fn pools_and_their_store_agree_by_joining_words(sequential 1..100 => Real);
}
