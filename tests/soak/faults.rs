//! What is done to the store, one fault after the other, and that no mark gets lost in any.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use mongodb::bson::{Bson, Document, doc};
use tokio::time::sleep;

use crate::{
    figures::Figures,
    ledger::{Books, Resting},
    support::{
        Fault, Proxy, SECOND,
        mongo::{Mongo, Mongod, eventually_within},
    },
};

/// Until when after a fault the marks that were made in it are in the store: what failed is tried again a second
/// later, and again.
const MARKS_ARRIVE_WITHIN: Duration = Duration::from_secs(20);

/// A mark that was held up on its way rests its key for longer by as much as that: at most by a fault, and what an
/// operation may take.
const HELD_UP_FOR: Duration = Duration::from_secs(10);

/// A date has milliseconds.
const ROUNDING: Duration = Duration::from_millis(2);

pub(crate) struct Store {
    pub(crate) server: Mongod,
    pub(crate) mongo: Mongo,
    /// Each process's way to it.
    pub(crate) proxies: [Proxy; 2],
}

/// When faults come.
pub(crate) struct Schedule {
    pub(crate) first_after: Duration,
    pub(crate) last_for: Duration,
    pub(crate) apart: Duration,
    pub(crate) until: Instant,
    /// From when on the server may be killed, which is done once.
    pub(crate) kill_at: Option<Instant>,
}

impl Schedule {
    /// A longer run has longer faults, and time between them in which the store is well.
    pub(crate) fn of(time: Duration, until: Instant) -> Self {
        if time < 30 * SECOND {
            let (first_after, last_for, apart) = (SECOND * 3 / 2, SECOND * 7 / 10, SECOND / 3);
            Self { first_after, last_for, apart, until, kill_at: None }
        } else {
            let kill_at = Some(Instant::now() + time / 2);
            Self { first_after: 4 * SECOND, last_for: 2 * SECOND, apart: 4 * SECOND, until, kill_at }
        }
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Network(Fault),
    /// The server refuses these commands of the pools, with a code.
    Refused(&'static [&'static str], i32),
    /// It closes the connection that such a command comes by.
    HungUp(&'static [&'static str]),
    HeldUp(&'static [&'static str]),
    SteppedDown,
}

/// Interrupted: not what the driver tries again by itself.
const UPDATE_REFUSED: Kind = Kind::Refused(&["update"], 11_601);

const KINDS: [(&str, Kind); 10] = [
    ("fault: connections cut", Kind::Network(Fault::Cut)),
    ("fault: update refused", UPDATE_REFUSED),
    ("fault: answers truncated", Kind::Network(Fault::Truncate(100))),
    ("fault: getMore hung up on", Kind::HungUp(&["getMore"])),
    ("fault: silence", Kind::Network(Fault::Silence)),
    ("fault: find and aggregate refused", Kind::Refused(&["find", "aggregate"], 10_107)),
    ("fault: update held up", Kind::HeldUp(&["update"])),
    ("fault: answers delayed", Kind::Network(Fault::Delay(Duration::from_millis(300)))),
    ("fault: update hung up on", Kind::HungUp(&["update"])),
    ("fault: primary stepped down", Kind::SteppedDown),
];
const KILLED: &str = "fault: server killed and started again";

impl Store {
    /// Goes on until the schedule ends, and gives the store back as well as it was.
    pub(crate) async fn suffer(
        mut self,
        mut schedule: Schedule,
        books: Arc<Books>,
        figures: Arc<Figures>,
    ) -> Self {
        sleep(schedule.first_after).await;
        for (round, (name, kind)) in (0..).zip(KINDS.into_iter().cycle()) {
            if Instant::now() + schedule.last_for > schedule.until {
                break;
            }
            let trouble = books.trouble();
            if schedule.kill_at.take_if(|at| *at <= Instant::now()).is_some() {
                figures.count(KILLED, 1);
                self.server.kill();
                sleep(schedule.last_for).await;
                self.server.restart().await.unwrap();
            } else {
                figures.count(name, 1);
                self.begin(kind, round).await;
                sleep(schedule.last_for).await;
                self.end(kind).await;
            }
            drop(trouble);
            self.all_marks_arrive(&books).await;
            sleep(schedule.apart).await;
        }
        self
    }

    /// What is done to the network is done to both pools, or to one of them alone.
    async fn begin(&self, kind: Kind, round: usize) {
        let (commands, how) = match kind {
            Kind::Network(fault) => {
                for (number, proxy) in self.proxies.iter().enumerate() {
                    if round % 3 != number {
                        proxy.set(fault);
                    }
                }
                return;
            }
            Kind::SteppedDown => {
                let command = doc! { "replSetStepDown": 1, "secondaryCatchUpPeriodSecs": 0, "force": true };
                return self.admin(command).await;
            }
            Kind::Refused(commands, code) => (commands, doc! { "errorCode": code }),
            Kind::HungUp(commands) => (commands, doc! { "closeConnection": true }),
            Kind::HeldUp(commands) => (commands, doc! { "blockConnection": true, "blockTimeMS": 700_i64 }),
        };
        let mut data = doc! { "failCommands": commands.to_vec(), "appName": "tower-key-rotation" };
        data.extend(how);
        let fail = doc! { "configureFailPoint": "failCommand", "mode": "alwaysOn", "data": data };
        self.admin(fail).await;
    }

    async fn end(&self, kind: Kind) {
        match kind {
            Kind::Network(_) => self.proxies.iter().for_each(|proxy| proxy.set(Fault::None)),
            Kind::SteppedDown => {}
            _ => self.admin(doc! { "configureFailPoint": "failCommand", "mode": "off" }).await,
        }
    }

    async fn admin(&self, command: Document) {
        self.mongo.database.client().database("admin").run_command(command).await.unwrap();
    }

    /// Takes no mark, until it is [well](Self::well) again.
    pub(crate) async fn take_no_mark(&self) {
        self.begin(UPDATE_REFUSED, 0).await;
    }

    pub(crate) async fn well(&self) {
        self.end(UPDATE_REFUSED).await;
    }

    /// Each mark that lasts for long enough to be looked for is in the store before long.
    async fn all_marks_arrive(&self, books: &Books) {
        let marked = books.resting_beyond(books.now() + MARKS_ARRIVE_WITHIN + SECOND);
        eventually_within(MARKS_ARRIVE_WITHIN, "the store has all marks", || async {
            self.marks_that_are_missing(&marked, books).await.is_empty()
        })
        .await;
    }

    /// Its keys are those that there are, and rest as the pools were told, and no others do.
    pub(crate) async fn is_as_it_was_told(&self, books: &Books, keys: &BTreeSet<String>) {
        let marked = books.resting_beyond(books.now());
        let missing = self.marks_that_are_missing(&marked, books).await;
        assert!(
            missing.is_empty(),
            "{} of {} marks are not in the store: {missing:#?}",
            missing.len(),
            marked.len()
        );
        let marked = books.resting_beyond(books.now().saturating_sub(HELD_UP_FOR));
        let documents = self.documents().await;
        for (key, until) in &documents {
            let is_over = matches!(until, Until::Healthy | Until::Left(Duration::ZERO));
            let is_marked = marked.iter().any(|resting| resting.key.as_str() == key);
            assert!(is_over || is_marked, "{key} rests, and no response has said so: {until:?}");
        }
        assert_eq!(documents.into_keys().collect::<BTreeSet<_>>(), *keys);
    }

    /// Keys that should rest by what the pools were told, and in the store don't, or not until about then.
    async fn marks_that_are_missing(&self, marked: &[Resting], books: &Books) -> Vec<String> {
        let before = books.now();
        let documents = self.documents().await;
        let after = books.now();
        let is_missing = |resting: &&Resting| {
            match documents.get(resting.key.as_str()) {
                // It has been removed meanwhile.
                None => false,
                Some(Until::Healthy) => true,
                Some(Until::Reset) => resting.until != Duration::MAX,
                Some(Until::Left(left)) => {
                    after + *left + ROUNDING < resting.until
                        || before + *left > resting.until_at_most.saturating_add(HELD_UP_FOR)
                }
            }
        };
        let missing = marked.iter().filter(|resting| resting.until > after).filter(is_missing);
        let left = |resting: &Resting| resting.until.saturating_sub(after);
        missing.map(|resting| format!("{}, for {:?}", resting.key, left(resting))).collect()
    }

    /// Every key in the store, and what is left of its rest by the server's clock.
    pub(crate) async fn documents(&self) -> HashMap<String, Until> {
        let left = doc! { "$subtract": ["$cooldownUntil", "$$NOW"] };
        let pipeline = [doc! { "$project": { "status": 1, "left": left } }];
        let mut found = self.mongo.keys().aggregate(pipeline).await.unwrap();
        let mut documents = HashMap::new();
        while found.advance().await.unwrap() {
            let document = Document::try_from(found.current()).unwrap();
            documents.insert(document.get_str("_id").unwrap().to_owned(), until(&document));
        }
        documents
    }
}

/// A program that writes something to the store twenty times a second has to be answered within that time; or the
/// store, or this machine, counts as in trouble: it may have too much to do.
const WELL: Duration = Duration::from_millis(100);

/// That program.
pub(crate) async fn probe(mongo: Mongo, books: Arc<Books>) {
    let probes = mongo.database.collection::<Document>("probes");
    loop {
        let asked = books.now();
        let update = doc! { "$inc": { "probes": 1 } };
        let _ = probes.update_one(doc! { "_id": 0 }, update).upsert(true).await;
        sleep(SECOND / 20).await;
        if books.now() - asked > WELL + SECOND / 20 {
            books.was_in_trouble(asked);
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Until {
    Healthy,
    Left(Duration),
    /// Somebody resets it.
    Reset,
}

fn until(document: &Document) -> Until {
    match (document.get_str("status").unwrap(), document.get("left")) {
        ("healthy", _) => Until::Healthy,
        ("error", _) => Until::Reset,
        ("rate_limited" | "exhausted", Some(Bson::Int64(left))) => {
            Until::Left(Duration::from_millis(left.max(&0).unsigned_abs()))
        }
        _ => panic!("not as this crate writes it: {document:?}"),
    }
}
