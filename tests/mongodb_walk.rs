//! Random walks over one key: statements of other programs and calls of the store, against a model of the rules.
//!
//! The model knows nothing of pipelines. It keeps what a document says and what was last absorbed, and applies the
//! rules of docs/ARCHITECTURE.md. `WALK_STEPS` makes the walks longer, `WALK_SEED` other ones.

mod support;

use std::{collections::BTreeMap, env, time::Duration};

use mongodb::bson::{Bson, DateTime, Document, doc};
use support::mongo::*;
use tower_key_rotation::{
    KeyId, KeySpec, Rest,
    store::{Born, KeyStore, Mark, Operation, Resting, Scope, Standing, Until, Words, mongodb::MongoStore},
};

/// When a rest ends, and why: 1 rate limited, 2 exhausted, 3 revoked. The later one is the greater one.
type Limit = (End, u8);

/// In milliseconds since the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    At(i64),
    Reset,
}

const NOTHING: Limit = (End::At(0), 0);
const SCOPES: [&str; 3] = ["$m", "a.b", "x"];
/// The first day of the year 9999, when a rest ends that does not end.
const FOREVER: i64 = 253_370_764_800_000;
const DAY: i64 = 24 * 60 * 60 * 1_000;
/// Deadlines that differ by less are the same: the test does not know when the server made them.
const TOLERANCE: i64 = 20_000;

fn now() -> i64 {
    DateTime::now().timestamp_millis()
}

/// What was last absorbed.
#[derive(Clone, Debug)]
struct Own {
    generation: u64,
    key: Limit,
    scopes: BTreeMap<String, Limit>,
    secret: u32,
    /// The births are told apart by numbers here, and by random ones in the store.
    born: u32,
}

#[derive(Clone, Debug, PartialEq)]
enum Date {
    None,
    At(i64),
    Odd,
}

/// A document, as other programs see it, and what was absorbed.
#[derive(Clone, Debug)]
struct Model {
    status: String,
    date: Date,
    secret: u32,
    own: Option<Own>,
    /// The rests of scopes that a document without a birth still has.
    orphans: BTreeMap<String, Limit>,
    births: u32,
}

impl Model {
    fn new() -> Self {
        Self {
            status: "healthy".into(),
            date: Date::None,
            secret: 0,
            own: None,
            orphans: BTreeMap::new(),
            births: 0,
        }
    }

    fn own(&mut self) -> &mut Own {
        self.own.as_mut().unwrap()
    }

    fn is_in_service(&self) -> bool {
        ["healthy", "rate_limited", "exhausted", "error"].contains(&self.status.as_str())
    }

    /// What status and date say.
    fn said(&self, had: Limit) -> Limit {
        match self.status.as_str() {
            "healthy" => NOTHING,
            "rate_limited" => match self.date {
                Date::At(date) => (end_at(date), 1),
                // Without a date it rests for two minutes, from when that is first seen.
                _ if had.1 == 1 => had,
                _ => (End::At(now() + 120_000), 1),
            },
            "exhausted" => match self.date {
                Date::At(date) if had == (End::At(date), 2) => had,
                _ => (End::Reset, 2),
            },
            "error" => (End::Reset, 3),
            _ => had,
        }
    }

    /// Whether a load has nothing to absorb.
    fn is_settled(&self) -> bool {
        let Some(own) = self.own.as_ref().filter(|own| own.secret == self.secret) else { return false };
        let lacks_its_date = self.status == "rate_limited" && self.date == Date::None;
        self.said(own.key) == own.key && !lacks_its_date
    }

    fn is_expired(&self) -> bool {
        let had = self.own.as_ref().map_or(NOTHING, |own| own.key);
        let same_key = self.own.as_ref().is_some_and(|own| own.secret == self.secret);
        let has_passed = matches!(self.date, Date::At(date) if date < now());
        match self.status.as_str() {
            "rate_limited" if matches!(self.date, Date::At(_)) => has_passed,
            "rate_limited" => same_key && had.1 == 1 && !is_live(had),
            "exhausted" => has_passed && had.1 == 2 && self.said(had) == had,
            _ => false,
        }
    }

    fn absorb(&mut self) {
        let had = self.own.as_ref().map_or(NOTHING, |own| own.key);
        match &mut self.own {
            Some(own) if own.secret == self.secret => {
                let had = own.key;
                let said = self.said(had);
                let own = self.own.as_mut().unwrap();
                own.key = said;
                if said < had && is_live(had) {
                    own.generation += 1;
                    own.scopes.clear();
                }
            }
            _ => {
                self.births += 1;
                let kept = self.own.is_none();
                let scopes = if kept { std::mem::take(&mut self.orphans) } else { BTreeMap::new() };
                let key = self.said(had);
                self.own = Some(Own { generation: 0, key, scopes, secret: self.secret, born: self.births });
            }
        }
    }

    /// A load absorbs and nothing more, but that a limited key gets the date that it lacks.
    fn settle(&mut self) {
        self.absorb();
        if self.status == "rate_limited" && self.date == Date::None {
            self.date = match self.own().key.0 {
                End::At(at) => Date::At(at),
                End::Reset => Date::At(FOREVER),
            };
        }
    }

    /// The sweep first gives dates, and then ends what has ended.
    fn sweep(&mut self) {
        let is_undated = self.status == "rate_limited" && !matches!(self.date, Date::At(_));
        if is_undated && !self.is_settled() {
            self.settle();
        }
        if self.is_expired() {
            self.absorb();
            self.show();
        }
    }

    fn drop_ended(&mut self) {
        let own = self.own();
        if !is_live(own.key) {
            own.key = NOTHING;
        }
        own.scopes.retain(|_, limit| is_live(*limit));
    }

    /// Status and date from the word.
    fn show(&mut self) {
        self.drop_ended();
        let key = self.own().key;
        if !self.is_in_service() {
            return;
        }
        let due = ["healthy", "rate_limited", "exhausted", "error"][usize::from(key.1)];
        match key.0 {
            End::At(0) if matches!(self.date, Date::At(_)) && self.status != "healthy" => {
                self.date = Date::None
            }
            End::At(0) => {}
            End::Reset if key.1 > 1 && self.status == due => {}
            End::Reset if key.1 > 1 => self.date = Date::None,
            _ if self.date == Date::Odd => {}
            End::Reset => self.date = Date::At(FOREVER),
            End::At(until) => self.date = Date::At(until),
        }
        due.clone_into(&mut self.status);
    }

    fn merge(&mut self, generation: u64, key: Option<Limit>, scopes: &BTreeMap<String, Limit>) {
        let own = self.own();
        if generation == own.generation {
            let wins = key.is_some_and(|key| key > own.key);
            own.key = own.key.max(key.unwrap_or(NOTHING));
            for (name, limit) in scopes {
                let known = own.scopes.entry(name.clone()).or_insert(*limit);
                *known = (*known).max(*limit);
            }
            if wins {
                self.date = Date::None;
            }
        }
        self.show();
    }

    fn reset(&mut self, scope: Option<&str>) {
        let own = self.own();
        own.generation += 1;
        match scope {
            Some(scope) => _ = own.scopes.remove(scope),
            None => {
                own.key = NOTHING;
                own.scopes.clear();
                self.date = Date::None;
            }
        }
        self.show();
    }
}

fn is_live(limit: Limit) -> bool {
    limit.0 > End::At(now())
}

// ---- the walk ----

struct Walk {
    random: fastrand::Rng,
    mongo: Mongo,
    store: MongoStore,
    model: Model,
    /// The birth in the store of each birth in the model.
    births: BTreeMap<u32, Born>,
    steps: usize,
    log: Vec<String>,
}

fn id() -> KeyId {
    KeyId::new("alpha").unwrap()
}

fn document(secret: u32) -> Document {
    let mut document = healthy("alpha");
    document.insert("apiKey", format!("sk-{secret}"));
    document
}

fn reason(code: u8) -> Rest {
    [Rest::RateLimited, Rest::Exhausted, Rest::Revoked][usize::from(code) - 1]
}

fn code(reason: Rest) -> u8 {
    match reason {
        Rest::RateLimited => 1,
        Rest::Exhausted => 2,
        _ => 3,
    }
}

impl Walk {
    async fn new(mongo: Mongo, seed: u64) -> Self {
        let store = mongo.store().await;
        mongo.keys().insert_one(document(0)).await.unwrap();
        Self {
            random: fastrand::Rng::with_seed(seed),
            mongo,
            store,
            model: Model::new(),
            births: BTreeMap::new(),
            steps: 0,
            log: Vec::new(),
        }
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.random.usize(..from.len())].clone()
    }

    async fn step(&mut self) {
        self.steps += 1;
        match self.random.u8(..20) {
            0..8 => self.merge().await,
            8 => self.reset(None).await,
            9 => {
                let scope = self.pick(&SCOPES);
                self.reset(Some(scope)).await;
            }
            10 => self.disable_or_enable().await,
            11 => self.sweep().await,
            12 => self.pass_time().await,
            13 => self.load().await,
            _ => self.edit().await,
        }
    }

    // ---- calls of the store ----

    async fn merge(&mut self) {
        let Some(known) = self.births.keys().next_back().copied() else { return self.load().await };
        // Now and then of a key object that is gone.
        let born = if self.random.u8(..6) == 0 { 1 + self.random.u32(..known) } else { known };
        let generation = self.model.own.as_ref().map_or(0, |own| own.generation);
        let generation = if self.random.u8(..5) == 0 { generation.saturating_sub(1) } else { generation };
        let key = (self.random.u8(..3) > 0).then(|| self.limit());
        let mut scopes = BTreeMap::new();
        for name in SCOPES {
            if self.random.u8(..4) == 0 {
                scopes.insert(name.to_owned(), self.limit());
            }
        }
        self.log(format!("merge {born} {generation} {key:?} {scopes:?}"));
        let left = |(end, why): Limit| Resting {
            until: match end {
                End::Reset => Until::Reset,
                End::At(at) => Until::After(Duration::from_millis((at - now()).unsigned_abs())),
            },
            reason: reason(why),
        };
        let words = Words {
            generation,
            key: key.map(left),
            scopes: scopes.iter().map(|(name, limit)| (Scope::new(name).unwrap(), left(*limit))).collect(),
        };
        let standing = self.store.merge(Mark::new(id(), self.births[&born], words)).await.unwrap();
        let is_it =
            self.model.own.as_ref().is_some_and(|own| own.born == born && own.secret == self.model.secret);
        if !is_it {
            assert_eq!(standing, None, "{}", self.said());
            return;
        }
        self.model.absorb();
        self.model.drop_ended();
        self.model.merge(generation, key, &scopes);
        self.compare(standing.as_ref()).await;
    }

    fn limit(&mut self) -> Limit {
        let code = 1 + self.random.u8(..3);
        let end = match self.random.u8(..4) {
            0 => End::Reset,
            days => End::At(now() + i64::from(days) * DAY),
        };
        if code == 3 { (End::Reset, 3) } else { (end, code) }
    }

    async fn reset(&mut self, scope: Option<&str>) {
        self.log(format!("reset {scope:?}"));
        let operation = Operation::Reset(scope.map(|scope| Scope::new(scope).unwrap()));
        let standing = self.store.operate(id(), operation).await.unwrap();
        self.model.absorb();
        self.model.drop_ended();
        self.model.reset(scope);
        self.compare(standing.as_ref()).await;
    }

    async fn disable_or_enable(&mut self) {
        let enable = self.random.bool();
        self.log(format!("enable {enable}"));
        let operation = if enable { Operation::Enable } else { Operation::Disable };
        let standing = self.store.operate(id(), operation).await.unwrap();
        self.model.absorb();
        self.model.drop_ended();
        if enable && !self.model.is_in_service() {
            self.model.status = "healthy".into();
            if self.model.own().key == NOTHING {
                self.model.date = Date::None;
            }
        } else if !enable {
            self.model.status = "disabled".into();
        }
        self.model.show();
        self.compare(standing.as_ref()).await;
    }

    async fn sweep(&mut self) {
        self.log("sweep".into());
        self.store.sweep().await.unwrap();
        assert_eq!(self.store.sweep().await.unwrap().count, 0, "{}", self.said());
        self.model.sweep();
        self.load().await;
    }

    async fn load(&mut self) {
        self.log("load".into());
        let loaded = self.store.load(None).await;
        let mut loaded = match loaded {
            Ok(loaded) => loaded,
            Err(error) => panic!("{error:?} {} {}", self.mongo.document("alpha").await, self.said()),
        };
        let record = loaded.records.pop().unwrap_or_else(|| panic!("{loaded:?} {}", self.said()));
        assert_eq!(record.spec, KeySpec::new(id(), format!("sk-{}", self.model.secret)), "{}", self.said());
        if !self.model.is_settled() {
            self.model.settle();
        }
        self.compare(Some(&record.standing)).await;
    }

    // ---- statements of other programs ----

    async fn update(&mut self, what: &str, update: impl Into<mongodb::options::UpdateModifications>) {
        self.log(what.to_owned());
        self.mongo.keys().update_one(doc! { "_id": "alpha" }, update).await.unwrap();
    }

    /// All rests end, as if time had passed.
    async fn pass_time(&mut self) {
        let passed = |date: &str| {
            doc! { "$cond": [{ "$and": [
                { "$eq": [{ "$type": date }, "date"] },
                { "$gt": [date, "$$NOW"] },
                { "$lt": [date, DateTime::from_millis(now() + 1_100 * DAY)] },
            ] }, { "$subtract": [date, 200 * DAY] }, date] }
        };
        let limits = doc! { "$map": { "input": { "$ifNull": ["$limits", []] }, "in": {
            "s": "$$this.s", "u": passed("$$this.u"), "r": "$$this.r",
        } } };
        let has_word = doc! { "$eq": [{ "$type": "$rest" }, "object"] };
        let rest = doc! { "g": "$rest.g", "u": passed("$rest.u"), "r": "$rest.r" };
        let set = doc! {
            "rest": { "$cond": [has_word, rest, "$$REMOVE"] },
            "cooldownUntil": { "$cond": [
                { "$eq": [{ "$type": "$cooldownUntil" }, "missing"] }, "$$REMOVE", passed("$cooldownUntil"),
            ] },
            "limits": { "$cond": [{ "$isArray": "$limits" }, limits, "$$REMOVE"] },
        };
        self.update("time passes", vec![doc! { "$set": set }]).await;
        // Later dates stay in the document, too.
        let passes = |at: &mut i64| {
            if *at > now() && *at < now() + 1_100 * DAY {
                *at -= 200 * DAY;
            }
        };
        let end = |limit: &mut Limit| {
            if let End::At(at) = &mut limit.0 {
                passes(at);
            }
        };
        if let Date::At(at) = &mut self.model.date {
            passes(at);
        }
        if let Some(own) = &mut self.model.own {
            end(&mut own.key);
            own.scopes.values_mut().for_each(end);
        }
        self.model.orphans.values_mut().for_each(end);
    }

    async fn edit(&mut self) {
        match self.random.u8(..12) {
            0..2 => {
                self.model.status = "healthy".into();
                self.update("status healthy", doc! { "$set": { "status": "healthy" } }).await;
            }
            2 => {
                (self.model.status, self.model.date) = ("healthy".into(), Date::None);
                self.update("reset", doc! { "$set": { "status": "healthy", "cooldownUntil": Bson::Null } })
                    .await;
            }
            3..5 => {
                let date = self.pick(&[now() - DAY, now() + DAY, now() + 9 * DAY, now() + 2_000 * DAY]);
                let status = self.pick(&["rate_limited", "rate_limited", "exhausted", "error", "disabled"]);
                (self.model.status, self.model.date) = (status.into(), Date::At(date));
                let set = doc! { "status": status, "cooldownUntil": DateTime::from_millis(date) };
                self.update(&format!("{status} {}", date - now()), doc! { "$set": set }).await;
            }
            5..7 => {
                let status = self.pick(&["rate_limited", "exhausted", "error", "disabled", "theirs"]);
                self.model.status = status.into();
                self.update(status, doc! { "$set": { "status": status } }).await;
            }
            7 => {
                let status = self.pick(&["rate_limited", "exhausted"]);
                (self.model.status, self.model.date) = (status.into(), Date::None);
                self.update(
                    &format!("{status} without a date"),
                    doc! { "$set": { "status": status }, "$unset": { "cooldownUntil": "" } },
                )
                .await;
            }
            8 => {
                self.model.date = Date::Odd;
                self.update("an odd date", doc! { "$set": { "cooldownUntil": "tomorrow" } }).await;
            }
            9 => {
                self.model.secret = self.random.u32(..3);
                let secret = format!("sk-{}", self.model.secret);
                self.update(&format!("secret {secret}"), doc! { "$set": { "apiKey": secret } }).await;
            }
            10 => self.unset_born().await,
            _ => self.replace().await,
        }
    }

    async fn unset_born(&mut self) {
        let limits_too = self.random.bool();
        let same_secret = self.model.own.as_ref().is_some_and(|own| own.secret == self.model.secret);
        let Some(own) = self.model.own.take() else { return };
        // What it rests for is still in the word.
        let model = &mut self.model;
        if same_secret && !limits_too {
            model.orphans = own.scopes;
        }
        let said = model.said(own.key);
        let unset = if limits_too {
            doc! { "born": "", "limits": "" }
        } else {
            doc! { "born": "" }
        };
        self.update("unset born", doc! { "$unset": unset }).await;
        // Absorbed at once, so that the model need not keep half a word.
        let record = self.store.load(None).await.unwrap().records.pop().unwrap();
        let model = &mut self.model;
        model.births += 1;
        let scopes = std::mem::take(&mut model.orphans);
        model.own = Some(Own { generation: 0, key: said, scopes, secret: model.secret, born: model.births });
        model.settle();
        self.compare(Some(&record.standing)).await;
    }

    async fn replace(&mut self) {
        self.log("replace".into());
        let births = self.model.births;
        self.model = Model { births, secret: self.model.secret, ..Model::new() };
        let document = document(self.model.secret);
        self.mongo.keys().replace_one(doc! { "_id": "alpha" }, document).await.unwrap();
    }

    // ---- comparisons ----

    async fn compare(&mut self, standing: Option<&Standing>) {
        self.compare_standing(standing);
        let document = self.mongo.document("alpha").await;
        self.adopt(&document);
    }

    fn compare_standing(&mut self, standing: Option<&Standing>) {
        let standing = standing.unwrap_or_else(|| panic!("no key: {}", self.said()));
        let mut own = self.model.own.clone().unwrap();
        if !is_live(own.key) {
            own.key = NOTHING;
        }
        own.scopes.retain(|_, limit| is_live(*limit));
        let born = *self.births.entry(own.born).or_insert(standing.born);
        assert_eq!(born, standing.born, "{}", self.said());
        let same = self.births.values().filter(|born| **born == standing.born);
        assert_eq!(same.count(), 1, "a birth came twice: {}", self.said());
        assert_eq!(standing.disabled, !self.model.is_in_service(), "{}", self.said());
        assert_eq!(standing.words.generation, own.generation, "{} {standing:?}", self.said());
        let seen = standing.words.key.map_or(NOTHING, limit_of);
        assert!(is_about(seen, own.key), "{seen:?} {}", self.said());
        let names: Vec<_> = standing.words.scopes.keys().map(Scope::as_str).collect();
        assert_eq!(names, own.scopes.keys().map(String::as_str).collect::<Vec<_>>(), "{}", self.said());
        for (scope, resting) in &standing.words.scopes {
            assert!(is_about(limit_of(*resting), own.scopes[scope.as_str()]), "{scope} {}", self.said());
        }
    }

    /// Other programs see what the model has them see. Then the model takes over the exact dates of the document.
    fn adopt(&mut self, document: &Document) {
        assert_eq!(document.get_str("status").unwrap(), self.model.status, "{document} {}", self.said());
        let date = match document.get("cooldownUntil") {
            Some(Bson::DateTime(date)) => Date::At(date.timestamp_millis()),
            Some(Bson::Null) | None => Date::None,
            Some(_) => Date::Odd,
        };
        if self.model.is_in_service() {
            let is_same = match (&date, &self.model.date) {
                (Date::At(one), Date::At(other)) => (one - other).abs() < TOLERANCE,
                (one, other) => one == other,
            };
            assert!(is_same, "{document} {}", self.said());
        }
        self.model.date = date;
        let rest = document.get_document("rest").unwrap();
        let own = self.model.own.as_mut().unwrap();
        if is_live(own.key) {
            own.key = exact(rest);
        }
        let limits = document.get_array("limits").into_iter().flatten().filter_map(Bson::as_document);
        for limit in limits {
            if let Some(known) = own.scopes.get_mut(limit.get_str("s").unwrap()) {
                *known = exact(limit);
            }
        }
    }

    fn log(&mut self, step: String) {
        self.log.push(step);
    }

    fn said(&self) -> String {
        let last = &self.log[self.log.len().saturating_sub(12)..];
        format!("\nstep {}, after {last:#?}\n{:#?}", self.steps, self.model)
    }
}

fn exact(rest: &Document) -> Limit {
    let until = rest.get_datetime("u").unwrap().timestamp_millis();
    let reason = rest.get_i32("r").unwrap();
    (end_at(until), u8::try_from(reason).unwrap())
}

fn end_at(date: i64) -> End {
    if date >= FOREVER { End::Reset } else { End::At(date) }
}

fn limit_of(resting: Resting) -> Limit {
    let end = match resting.until {
        Until::Reset => End::Reset,
        Until::After(left) => End::At(now() + left.as_millis() as i64),
    };
    (end, code(resting.reason))
}

fn is_about(one: Limit, other: Limit) -> bool {
    match (one.0, other.0) {
        (End::At(first), End::At(second)) => one.1 == other.1 && (first - second).abs() < TOLERANCE,
        _ => one == other,
    }
}

#[tokio::test]
async fn f09_random_statements_leave_what_the_model_says() {
    let number = |name: &str, otherwise| env::var(name).map_or(otherwise, |text| text.parse().unwrap());
    let steps: usize = number("WALK_STEPS", 1_500) as usize;
    let mut walk = Walk::new(Mongo::standalone().await, number("WALK_SEED", 7)).await;
    while walk.steps < steps {
        walk.step().await;
    }
}
