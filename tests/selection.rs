//! Which key serves a request: days of quotas, weights, in-flight caps, the order of keys, and discovered quota groups.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroU32,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http::{HeaderMap, HeaderName, Request, Response, StatusCode};
use support::SECOND;
use tower::{Layer, ServiceExt, service_fn};
use tower_key_rotation::{
    Failover, KeyId, KeyLease, KeyPool, KeyPoolBuilder, KeyRotationLayer, KeySpec, NoKeyAvailable, Quota,
    Traits, classify::ResponseHead, clock::ManualClock,
};

const HOUR: Duration = Duration::from_secs(60 * 60);

/// The id of a key that answers well, if one has room.
fn send(pool: &KeyPool, traits: &Traits) -> Result<String, NoKeyAvailable> {
    let key = pool.lease(traits)?;
    let id = key.id().to_string();
    key.answered(&ResponseHead::new(StatusCode::OK, &HeaderMap::new()));
    Ok(id)
}

/// How many requests find room now, and the time until the next one does.
fn drain(pool: &KeyPool) -> (usize, Option<Duration>) {
    for served in 0.. {
        if let Err(error) = send(pool, &Traits::new()) {
            return (served, error.retry_in());
        }
    }
    unreachable!()
}

/// A pool of keys with these settings, `k0` first, on a clock that stands still.
fn pool_of(specs: &[fn(&mut KeySpec)]) -> KeyPoolBuilder {
    let specs = (0..).zip(specs).map(|(number, set)| {
        let mut spec = KeySpec::new(KeyId::new(format!("k{number}")).unwrap(), format!("sk-{number}"));
        set(&mut spec);
        spec
    });
    specs.fold(KeyPool::builder().clock(ManualClock::new()), KeyPoolBuilder::key_spec)
}

fn weighing<const WEIGHT: u32>(spec: &mut KeySpec) {
    spec.weight = NonZeroU32::new(WEIGHT);
}

/// How many of so many requests each key serves.
fn served(pool: &KeyPool, requests: usize) -> BTreeMap<String, usize> {
    let mut served = BTreeMap::new();
    for _ in 0..requests {
        *served.entry(send(pool, &Traits::new()).unwrap()).or_default() += 1;
    }
    served
}

fn counts<const KEYS: usize>(counts: [(&str, usize); KEYS]) -> BTreeMap<String, usize> {
    counts.into_iter().map(|(id, count)| (id.to_owned(), count)).collect()
}

// ---- weights ----

const WEIGHTS: [fn(&mut KeySpec); 3] = [weighing::<3>, weighing::<1>, weighing::<2>];
const WEIGHT_OF: [f64; 3] = [3.0, 1.0, 2.0];

#[test]
fn keys_serve_requests_by_their_weights() {
    let quota = Quota::per_second(1_000_000).burst(1_000_000);
    for pool in [pool_of(&WEIGHTS), pool_of(&WEIGHTS).paced(), pool_of(&WEIGHTS).quota(quota)] {
        let pool = pool.build().unwrap();
        // In each round, not just in the end.
        for _ in 0..100 {
            assert_eq!(served(&pool, 6), counts([("k0", 3), ("k1", 1), ("k2", 2)]));
        }
    }
}

#[test]
fn heavy_keys_are_not_used_in_a_row() {
    let pool = pool_of(&[weighing::<4>, weighing::<1>, weighing::<1>, weighing::<1>, weighing::<1>]);
    let pool = pool.build().unwrap();
    let ids: Vec<_> = (0..80).map(|_| send(&pool, &Traits::new()).unwrap()).collect();
    assert!(ids.windows(2).all(|two| two[0] != two[1]), "{ids:?}");
}

#[tokio::test]
async fn weights_hold_whatever_rests_in_between() {
    for pool in [pool_of(&WEIGHTS), pool_of(&WEIGHTS).paced()] {
        let pool = pool.build().unwrap();
        let mut served_in_all = [0.0; 3];
        let mut requests_in_phases = [0.0; 3];
        for phase in 0..300 {
            let resting = format!("k{}", phase % 3);
            pool.disable(&resting).await.unwrap();
            let requests = 50 + phase * 37 % 101;
            requests_in_phases[phase % 3] += requests as f64;
            for (id, count) in served(&pool, requests) {
                assert_ne!(id, resting);
                served_in_all[id[1..].parse::<usize>().unwrap()] += count as f64;
            }
            pool.enable(&resting).await.unwrap();
        }
        for (key, weight) in WEIGHT_OF.into_iter().enumerate() {
            let share =
                |resting: usize| if resting == key { 0.0 } else { weight / (6.0 - WEIGHT_OF[resting]) };
            let fair: f64 = (0..3).map(|resting| requests_in_phases[resting] * share(resting)).sum();
            let ratio = served_in_all[key] / fair;
            assert!((0.99..1.01).contains(&ratio), "k{key}: {} of {fair}", served_in_all[key]);
        }
    }
}

#[test]
fn weights_count_within_a_tier_and_within_a_group() {
    let spare = |spec: &mut KeySpec| {
        weighing::<9>(spec);
        spec.tier = Some(1);
    };
    let member = |spec: &mut KeySpec| {
        weighing::<3>(spec);
        spec.group = Some("org".to_owned());
    };
    let light_member = |spec: &mut KeySpec| spec.group = Some("org".to_owned());
    let pool = pool_of(&[weighing::<2>, spare, member, light_member]).build().unwrap();
    assert_eq!(served(&pool, 600), counts([("k0", 200), ("k2", 300), ("k3", 100)]));
}

#[test]
fn threads_share_by_weights() {
    let pool = pool_of(&WEIGHTS).build().unwrap();
    let served_by_thread = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| served(&pool, 15_000))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    let sum = |id: &str| served_by_thread.iter().filter_map(|served| served.get(id)).sum::<usize>();
    assert_eq!([sum("k0"), sum("k1"), sum("k2")], [30_000, 10_000, 20_000]);
}

#[tokio::test]
async fn weights_hold_while_keys_come_and_go() {
    let pool = pool_of(&WEIGHTS).build().unwrap();
    let mut sums = BTreeMap::<String, usize>::new();
    for _ in 0..2_000 {
        pool.insert("new", "sk-new").await.unwrap();
        served(&pool, 3).into_iter().for_each(|(id, count)| *sums.entry(id).or_default() += count);
        pool.remove("new").await.unwrap();
        served(&pool, 4).into_iter().for_each(|(id, count)| *sums.entry(id).or_default() += count);
    }
    // 3 of 7 turns, and 4 of 6: the cursor stays where it was in the round, give or take a turn.
    let ratio = sums["k0"] as f64 / sums["k1"] as f64;
    assert!((2.7..3.3).contains(&ratio), "{sums:?}");
}

#[test]
fn heavy_keys_get_more_sessions() {
    let specs: [fn(&mut KeySpec); 2] = [weighing::<3>, weighing::<1>];
    let specs: Vec<_> = (0..40).map(|number| specs[number / 20]).collect();
    let pool = pool_of(&specs).build().unwrap();
    let is_heavy = |id: &str| id[1..].parse::<u32>().unwrap() < 20;
    let heavy = (0..4_000).filter(|session| is_heavy(&send(&pool, &Traits::new().session(session)).unwrap()));
    let heavy = heavy.count();
    assert!((2_700..3_300).contains(&heavy), "{heavy} of 4,000, not 3,000");
}

// ---- requests in flight ----

fn at_most<const REQUESTS: u32>(spec: &mut KeySpec) {
    spec.max_in_flight = NonZeroU32::new(REQUESTS);
}

fn unlimited(_: &mut KeySpec) {}

fn scoped(scope: &str) -> Traits {
    Traits::new().scope(scope)
}

fn answer(key: KeyLease) {
    key.answered(&ResponseHead::new(StatusCode::OK, &HeaderMap::new()));
}

fn capped_pools(specs: &[fn(&mut KeySpec)]) -> [KeyPool; 3] {
    let pool = || pool_of(specs);
    let quota = Quota::per_second(1_000).burst(1_000);
    [pool(), pool().paced(), pool().quota(quota)].map(|pool| pool.build().unwrap())
}

#[test]
fn keys_carry_no_more_than_their_limit_in_all_scopes() {
    for pool in capped_pools(&[at_most::<2>, at_most::<1>]) {
        let mut held: Vec<_> = ["a", "b", "c"].map(|scope| pool.lease(&scoped(scope)).unwrap()).into();
        let ids: Vec<_> = held.iter().map(|key| key.id().to_string()).collect();
        assert_eq!(ids.iter().filter(|id| *id == "k0").count(), 2, "{ids:?}");
        for traits in [Traits::new(), scoped("a"), scoped("new").key(KeyId::new("k1").unwrap())] {
            let error = pool.lease(&traits).unwrap_err();
            assert_eq!(error.retry_in(), None);
            assert!(error.to_string().contains("as many requests in flight as they may"), "{error}");
        }
        // Answered or dropped, it makes room in every scope.
        for answered in [true, false] {
            let ended = held.remove(0);
            let id = ended.id().clone();
            if answered {
                answer(ended)
            } else {
                drop(ended)
            }
            held.push(pool.lease(&scoped("c")).unwrap());
            assert_eq!(*held[2].id(), id);
            assert!(pool.lease(&Traits::new()).is_err());
        }
    }
}

#[test]
fn a_key_without_a_limit_carries_the_rest() {
    let pool = pool_of(&[at_most::<1>, unlimited]).build().unwrap();
    let held: Vec<_> = (0..10).map(|_| pool.lease(&Traits::new()).unwrap()).collect();
    assert_eq!(held.iter().filter(|key| key.id().as_str() == "k0").count(), 1);
}

#[test]
fn a_refused_request_makes_room_when_its_rest_ends() {
    for pool in capped_pools(&[at_most::<1>]) {
        let refused = pool.lease(&Traits::new()).unwrap();
        refused.answered(&ResponseHead::new(StatusCode::TOO_MANY_REQUESTS, &HeaderMap::new()));
        // The rest is why there is no key now, not the limit.
        assert!(pool.lease(&Traits::new()).unwrap_err().retry_in().is_some());
    }
}

#[tokio::test(start_paused = true)]
async fn waiters_of_every_scope_get_a_place_at_once() {
    let builders = [KeyPool::builder(), KeyPool::builder().paced()];
    for builder in builders {
        let pool = builder.key_spec(capped()).build().unwrap();
        let began = tokio::time::Instant::now();
        let mut held = pool.lease(&scoped("a")).unwrap();
        for round in 0..20_u32 {
            let traits = match round % 3 {
                0 => scoped("a"),
                1 => scoped("b"),
                _ => scoped("a").key(KeyId::new("alpha").unwrap()),
            };
            let waiting = tokio::spawn({
                let pool = pool.clone();
                async move { pool.lease_within(&traits, 60 * SECOND).await }
            });
            // Not a whole second: whoever waits looks again each second.
            tokio::time::sleep(Duration::from_millis(300)).await;
            assert!(!waiting.is_finished());
            drop(held);
            held = waiting.await.unwrap().unwrap();
        }
        assert_eq!(began.elapsed(), Duration::from_millis(6_000));
    }
}

#[tokio::test(start_paused = true)]
async fn waiting_for_a_place_ends_at_its_limit() {
    let pool = KeyPool::builder().key_spec(capped()).build().unwrap();
    let _held = pool.lease(&Traits::new()).unwrap();
    let began = tokio::time::Instant::now();
    assert!(pool.lease_within(&Traits::new(), 5 * SECOND).await.is_err());
    assert_eq!(began.elapsed(), 5 * SECOND);
}

fn capped() -> KeySpec {
    let mut spec = KeySpec::new(KeyId::new("alpha").unwrap(), "sk-1");
    spec.max_in_flight = NonZeroU32::new(1);
    spec
}

#[tokio::test]
async fn places_outlive_changes_of_the_keys() {
    let pool = pool_of(&[at_most::<1>]).build().unwrap();
    let held = pool.lease(&Traits::new()).unwrap();
    pool.insert("other", "sk-other").await.unwrap();
    pool.remove("other").await.unwrap();
    assert!(pool.lease(&Traits::new()).is_err());
    drop(held);
    assert!(pool.lease(&Traits::new()).is_ok());
}

#[test]
fn threads_never_exceed_a_limit() {
    let pool = pool_of(&[at_most::<3>, at_most::<2>]).build().unwrap();
    let in_flight = [AtomicUsize::new(0), AtomicUsize::new(0)];
    let served = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (pool, in_flight, served) = (&pool, &in_flight, &served);
            scope.spawn(move || {
                for request in 0..2_000 {
                    let Ok(key) = pool.lease(&scoped(["a", "b"][(thread + request) % 2])) else { continue };
                    let number = usize::from(key.id().as_str() == "k1");
                    let now = in_flight[number].fetch_add(1, SeqCst) + 1;
                    assert!(now <= 3 - number, "{now} requests in flight with {}", key.id());
                    in_flight[number].fetch_sub(1, SeqCst);
                    served.fetch_add(1, SeqCst);
                    answer(key);
                }
            });
        }
    });
    assert!(served.load(SeqCst) > 5);
    // Nothing stays taken, and every scope sees it.
    for scope in ["a", "b", "new"] {
        assert_eq!((0..).map_while(|_| pool.lease(&scoped(scope)).ok()).collect::<Vec<_>>().len(), 5);
    }
}

// ---- the first key first ----

#[test]
fn the_first_key_with_room_serves() {
    let clock = ManualClock::new();
    let pool = pool_of(&[unlimited, weighing::<9>, unlimited]).clock(clock.clone()).fill_first();
    let pool = pool.quota(Quota::per_minute(3).window()).build().unwrap();
    let ids = |requests| (0..requests).map(|_| send(&pool, &scoped("a")).unwrap()).collect::<Vec<_>>();
    assert_eq!(ids(7), ["k0", "k0", "k0", "k1", "k1", "k1", "k2"]);
    // Each scope has its own limits.
    assert_eq!(send(&pool, &scoped("b")).unwrap(), "k0");
    // The first key's window ends, and it serves before the third one.
    clock.advance(61 * SECOND);
    assert_eq!(ids(4), ["k0", "k0", "k0", "k1"]);
}

#[test]
fn without_limits_one_key_serves_until_it_rests() {
    let pool = pool_of(&[unlimited, unlimited, unlimited]).fill_first().build().unwrap();
    for expected in ["k0", "k1", "k2"] {
        assert_eq!(served(&pool, 50), counts([(expected, 50)]));
        let refused = pool.lease(&Traits::new()).unwrap();
        refused.answered(&ResponseHead::new(StatusCode::TOO_MANY_REQUESTS, &HeaderMap::new()));
    }
    assert!(send(&pool, &Traits::new()).is_err());
}

#[test]
fn the_first_key_is_passed_over_when_it_must_be() {
    let first = KeyId::new("k0").unwrap();
    let spare = |spec: &mut KeySpec| spec.tier = Some(1);
    let pool = pool_of(&[at_most::<1>, unlimited, spare]).fill_first().paced().build().unwrap();
    // Of 100 keys that a request avoids, too.
    let avoid = (0..100).fold(Traits::new(), |traits, _| traits.avoid(first.clone()));
    assert_eq!(send(&pool, &avoid).unwrap(), "k1");
    let _held = pool.lease(&Traits::new()).unwrap();
    assert_eq!(send(&pool, &Traits::new()).unwrap(), "k1");
}

#[test]
fn a_large_request_passes_over_keys_with_too_little() {
    let pool = pool_of(&[unlimited, unlimited, unlimited])
        .fill_first()
        .quota(Quota::per_minute(100).window().tokens());
    let pool = pool.build().unwrap();
    let ids = [10, 10, 10, 80, 10, 80, 10].map(|tokens| send(&pool, &Traits::new().tokens(tokens)).unwrap());
    assert_eq!(ids, ["k0", "k0", "k0", "k1", "k0", "k2", "k0"]);
}

// ---- organisations ----

const WAIT: (&str, &str) = ("retry-after", "30");

fn said(key: KeyLease, status: StatusCode, lines: &[(&'static str, &str)]) {
    let lines = lines.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()));
    key.answered(&ResponseHead::new(status, &lines.collect()));
}

/// Sends a request with a key, which answers with these headers.
fn use_key(pool: &KeyPool, key: &str, status: u16, lines: &[(&'static str, &str)]) {
    let only = scoped("a").key(KeyId::new(key).unwrap());
    said(pool.lease(&only).unwrap(), StatusCode::from_u16(status).unwrap(), lines);
}

/// The keys that serve requests of the scope `a` now.
fn open_keys(pool: &KeyPool) -> Vec<String> {
    let ids = (0..30).filter_map(|_| send(pool, &scoped("a")).ok());
    ids.collect::<BTreeSet<_>>().into_iter().collect()
}

fn of_organisation(name: &str) -> [(&'static str, &str); 1] {
    [("openai-organization", name)]
}

#[test]
fn keys_of_one_organisation_share_a_limit() {
    for header in ["openai-organization", "anthropic-organization-id"] {
        let pool = pool_of(&[unlimited, unlimited, unlimited, unlimited]).paced().build().unwrap();
        for (key, organisation) in [("k0", "org-x"), ("k1", "org-y"), ("k2", "org-x"), ("k3", "org-y")] {
            use_key(&pool, key, 200, &[(header, organisation)]);
        }
        assert_eq!(open_keys(&pool), ["k0", "k1", "k2", "k3"]);
        use_key(&pool, "k2", 429, &[(header, "org-x"), WAIT]);
        assert_eq!(open_keys(&pool), ["k1", "k3"]);
        use_key(&pool, "k1", 429, &[(header, "org-y"), WAIT]);
        assert!(open_keys(&pool).is_empty());
    }
}

#[test]
fn a_key_joins_its_organisation_while_that_rests() {
    let pool = pool_of(&[unlimited, unlimited, unlimited]).paced().build().unwrap();
    use_key(&pool, "k2", 429, &[of_organisation("org-x")[0], WAIT]);
    use_key(&pool, "k1", 200, &of_organisation("org-y"));
    assert_eq!(open_keys(&pool), ["k0", "k1"]);
    use_key(&pool, "k0", 200, &of_organisation("org-x"));
    assert_eq!(open_keys(&pool), ["k1"]);
}

#[test]
fn a_key_that_changes_its_organisation_leaves_the_limit() {
    let pool = pool_of(&[unlimited, unlimited, unlimited]).paced().build().unwrap();
    for key in ["k0", "k1", "k2"] {
        use_key(&pool, key, 200, &of_organisation("org-x"));
    }
    let moved = pool.lease(&scoped("a").key(KeyId::new("k0").unwrap())).unwrap();
    use_key(&pool, "k1", 429, &[of_organisation("org-x")[0], WAIT]);
    assert!(open_keys(&pool).is_empty());
    said(moved, StatusCode::OK, &of_organisation("org-y"));
    assert_eq!(open_keys(&pool), ["k0"]);
}

#[test]
fn a_key_of_many_organisations_is_in_no_group() {
    let pool = pool_of(&[unlimited, unlimited]).paced().build().unwrap();
    for name in ["org-1", "org-2", "org-3", "org-4", "org-5", "org-6", "org-x"] {
        use_key(&pool, "k0", 200, &of_organisation(name));
    }
    use_key(&pool, "k1", 200, &of_organisation("org-x"));
    use_key(&pool, "k1", 429, &[of_organisation("org-x")[0], WAIT]);
    assert_eq!(open_keys(&pool), ["k0"]);
}

#[test]
fn a_configured_group_wins_over_the_organisation() {
    let alone = |spec: &mut KeySpec| spec.group = Some("alone".to_owned());
    let pool = pool_of(&[alone, unlimited, unlimited]).paced().build().unwrap();
    for key in ["k0", "k1", "k2"] {
        use_key(&pool, key, 200, &of_organisation("org-x"));
    }
    use_key(&pool, "k1", 429, &[of_organisation("org-x")[0], WAIT]);
    assert_eq!(open_keys(&pool), ["k0"]);
}

#[test]
fn a_pool_that_does_not_learn_makes_no_groups() {
    let pool = pool_of(&[unlimited, unlimited]).quota(Quota::per_second(100).burst(100)).build().unwrap();
    use_key(&pool, "k0", 200, &of_organisation("org-x"));
    use_key(&pool, "k1", 200, &of_organisation("org-x"));
    use_key(&pool, "k1", 429, &[of_organisation("org-x")[0], WAIT]);
    assert_eq!(open_keys(&pool), ["k0"]);
}

#[tokio::test]
async fn many_keys_are_grouped_beside_requests() {
    let clock = ManualClock::new();
    let keys = (0..200).map(|number| (format!("k{number}"), format!("sk-{number}")));
    let pool = KeyPool::builder().keys(keys).paced().clock(clock.clone()).build().unwrap();
    for number in 0..200 {
        let name = format!("org-{}", number % 2);
        use_key(&pool, &format!("k{number}"), 200, &of_organisation(&name));
    }
    // The last ones are grouped a while later, with another answer.
    for _ in 0..20 {
        clock.advance(SECOND);
        use_key(&pool, "k0", 200, &of_organisation("org-0"));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    use_key(&pool, "k0", 429, &[of_organisation("org-0")[0], WAIT]);
    let is_odd = |id: &String| id[1..].parse::<u32>().unwrap() % 2 == 1;
    let mut tries = 0;
    while !(0..300).all(|_| is_odd(&send(&pool, &scoped("a")).unwrap())) {
        tries += 1;
        assert!(tries < 6_000, "keys of a limited organisation still serve");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn failover_passes_over_the_siblings_of_a_limited_key() {
    let member = |spec: &mut KeySpec| spec.group = Some("org-x".to_owned());
    let configured = || pool_of(&[member, member, member, unlimited]);
    let discovered = pool_of(&[unlimited, unlimited, unlimited, unlimited]).paced().build().unwrap();
    for key in ["k0", "k1", "k2"] {
        use_key(&discovered, key, 200, &of_organisation("org-x"));
    }
    for pool in [discovered, configured().build().unwrap(), configured().paced().build().unwrap()] {
        let attempts = Arc::new(Mutex::new(Vec::new()));
        let service = {
            let attempts = attempts.clone();
            service_fn(move |request: Request<String>| {
                let key = request.headers()["authorization"].to_str().unwrap().to_owned();
                let status = if key == "Bearer sk-3" { 200 } else { 429 };
                attempts.lock().unwrap().push(key);
                let response = Response::builder().status(status).header("openai-organization", "org-x");
                async move { Ok::<_, std::io::Error>(response.body(String::new()).unwrap()) }
            })
        };
        let layer = KeyRotationLayer::new(&pool).failover(Failover::attempts(4));
        let request = Request::post("https://api.example.com/v1").extension(scoped("a"));
        let response = layer.layer(service).oneshot(request.body(String::new()).unwrap()).await.unwrap();
        assert_eq!(response.status(), 200);
        let attempts = attempts.lock().unwrap();
        assert!(attempts.len() <= 2, "{attempts:?}");
    }
}

// ---- days ----

fn wall(time: &str) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(time.parse::<jiff::Timestamp>().unwrap().as_second() as u64)
}

fn daily(quota: Quota, now: &str) -> (KeyPool, ManualClock) {
    let clock = ManualClock::new();
    clock.set_wall(wall(now));
    let pool = KeyPool::builder().keys([("alpha", "sk-1"), ("beta", "sk-2")]);
    (pool.quota(quota).clock(clock.clone()).build().unwrap(), clock)
}

fn pacific() -> Quota {
    Quota::per_day(5).resets_at("00:00", "America/Los_Angeles")
}

#[test]
fn days_begin_at_the_time_of_their_zone() {
    // The evening before the day of 23 hours, and before the one of 25.
    for (evening, next) in [("2026-03-07T21:00:00-08:00", 23), ("2026-10-31T21:00:00-07:00", 25)] {
        let (pool, clock) = daily(pacific(), evening);
        assert_eq!(drain(&pool), (10, Some(3 * HOUR)));
        clock.advance(3 * HOUR - Duration::from_nanos(1));
        assert_eq!(drain(&pool).0, 0);
        clock.advance(Duration::from_nanos(1));
        assert_eq!(drain(&pool), (10, Some(next * HOUR)));
        clock.advance(next * HOUR);
        assert_eq!(drain(&pool), (10, Some(24 * HOUR)));
    }
}

#[test]
fn days_follow_a_wall_clock_that_is_set() {
    let (pool, clock) = daily(pacific(), "2026-11-29T00:00:01-08:00");
    assert_eq!(drain(&pool).0, 10);
    // Set forward: no day is lost.
    clock.set_wall(wall("2026-11-30T00:00:00-08:00"));
    clock.advance(SECOND);
    assert_eq!(drain(&pool), (10, Some(24 * HOUR - SECOND)));
    // Set back a little: no day is doubled.
    clock.set_wall(wall("2026-11-29T23:59:58-08:00"));
    clock.advance(3 * SECOND);
    assert_eq!(drain(&pool), (0, Some(24 * HOUR - SECOND)));
}

#[test]
fn a_quota_of_another_pool_has_its_own_clock() {
    let quota = pacific();
    let (first, _) = daily(quota.clone(), "2026-11-29T12:00:00-08:00");
    let (second, _) = daily(quota, "2026-11-29T23:00:00-08:00");
    assert_eq!(drain(&first).1, Some(12 * HOUR));
    assert_eq!(drain(&second).1, Some(HOUR));
}

#[tokio::test(start_paused = true)]
async fn requests_wait_for_the_next_day() {
    let pool = KeyPool::builder().key("alpha", "sk-1").quota(pacific()).build().unwrap();
    let (served, next) = drain(&pool);
    let next = next.unwrap();
    assert_eq!(served, 5);
    let began = tokio::time::Instant::now();
    let lease = pool.lease_within(&Traits::new(), 26 * HOUR).await;
    assert!(lease.is_ok());
    let late = began.elapsed().saturating_sub(next);
    assert!(began.elapsed() + 2 * SECOND > next && late < 2 * SECOND, "{:?}, not {next:?}", began.elapsed());
}

#[test]
fn unusable_resets_fail_the_build() {
    let why = |quota| KeyPool::builder().quota(quota).build().unwrap_err().to_string();
    let zone = why(Quota::per_day(5).resets_at("00:00", "Mars/Olympus"));
    assert!(zone.contains(r#"time zone "Mars/Olympus""#), "{zone}");
    let time = why(Quota::per_day(5).resets_at("25:00", "UTC"));
    assert!(time.contains(r#""25:00", which is not a time of day"#), "{time}");
    let period = why(Quota::per_hour(5).resets_at("00:00", "UTC"));
    assert!(period.contains("not per day"), "{period}");
}
